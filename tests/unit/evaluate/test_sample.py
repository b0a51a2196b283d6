"""Continuations of prompts, against transformers' own and over seeds, prompts and texts that a terminal obeys."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megadistill.data import Manifest
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.errors import OperatorFault, UserError
from megadistill.evaluate.prompts import Prompt, held_out_prompts, typed_prompts
from megadistill.evaluate.sample import Continuation, Sample, _after, escape_control, load_for_sampling, samples, show
from megadistill.io import write_json
from megadistill.models.families import load_config
from megadistill.models.sampling import Sampling
from tests.unit.data.corpora import byte_level_tokenizer, document_texts
from tests.unit.data.splits import write_split

PLACES = 48
TEXTS = ["def hello(name: str)", "\n", "é漢"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with padding rows, of a tokenizer that puts a token before each document; it ends some."""
    folder = tmp_path_factory.mktemp("sample") / "model"
    byte_level_tokenizer(folder, "".join(document_texts()))
    ids = load_tokenizer(folder).vocab_size
    torch.manual_seed(1)
    config = {
        "model_type": "llama",
        "vocab_size": ids + 5,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": PLACES,
        "initializer_range": 0.3,
    }
    causal = AutoModelForCausalLM.from_config(load_config(config, what="test"))
    with torch.no_grad():
        causal.lm_head.weight[ids:] *= 5  # what must never be drawn
        causal.lm_head.weight[load_tokenizer(folder).eos] *= 2.5
    causal.save_pretrained(folder)
    return folder


def _samples(folder: Path, texts: list[str], sampling: Sampling, *, count: int = 1) -> list[Sample]:
    tokenizer = load_for_sampling(folder, None)
    prompts = typed_prompts(texts, [], tokenizer)
    return list(samples(folder, prompts, tokenizer, sampling, count=count, device=torch.device("cpu")))


def test_the_most_likely_continuation_is_that_of_transformers(model: Path) -> None:
    drawn = _samples(model, TEXTS, Sampling(20, temperature=0.0))
    tokenizer, causal = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    causal.resize_token_embeddings(len(tokenizer))
    for text, sample in zip(TEXTS, drawn, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert ids[0, 0] == tokenizer.bos_token_id
        tokens = causal.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=tokenizer.eos_token_id)[0]
        new = tokens[ids.shape[1] :].tolist()
        ended = new[-1] == tokenizer.eos_token_id
        whole, before = tokenizer.decode(tokens[: len(tokens) - ended]), tokenizer.decode(ids[0])
        (continuation,) = sample.continuations
        assert whole.startswith(before)
        assert continuation == Continuation(whole[len(before) :], len(new) - ended, ended)
        assert (sample.prompt, sample.original) == (text, None)


def test_the_same_seed_writes_the_same_and_more_of_it_changes_nothing(model: Path) -> None:
    few = _samples(model, TEXTS[:1], Sampling(20, top_p=0.9), count=2)
    many = _samples(model, TEXTS, Sampling(20, top_p=0.9), count=40)
    assert many[0].continuations[:2] == few[0].continuations
    assert len(set(many[0].continuations)) > 30
    assert any(one.ended for one in many[0].continuations)
    assert many[0].continuations != many[1].continuations
    twice = _samples(model, TEXTS[:1] * 2, Sampling(20, top_p=0.9), count=2)
    assert set(twice[1].continuations).isdisjoint(twice[0].continuations), "the same prompt again is drawn again"
    other = _samples(model, TEXTS[:1], Sampling(20, top_p=0.9, seed=2), count=2)
    assert set(other[0].continuations).isdisjoint(few[0].continuations)


def test_an_empty_prompt_is_the_beginning_of_a_document(model: Path, tmp_path: Path) -> None:
    with_begin = load_tokenizer(model)
    assert with_begin.bos is not None
    assert typed_prompts([""], [], with_begin) == [Prompt("", (with_begin.bos,))]
    shutil.copytree(model, tmp_path / "plain")
    rules = json.loads((tmp_path / "plain" / "tokenizer.json").read_text())
    (tmp_path / "plain" / "tokenizer.json").write_text(json.dumps({**rules, "post_processor": None}))
    plain = load_tokenizer(tmp_path / "plain")
    assert plain.bos is None
    assert typed_prompts([""], [], plain) == [Prompt("", (plain.eos,))]


def test_held_out_text_begins_the_prompt_and_goes_on_beside_it(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode(document_texts(8)[7])[:31]
    short = [PackedSequence(np.resize(ids, 31), np.array([0, 9, 31], dtype=np.int32))]
    sha = tokenizer.sha256
    write_split(tmp_path / "data", short, vocab=tokenizer.vocab_size, packer="bestfit", tokenizer_sha256=sha)
    manifest = Manifest.load(tmp_path / "data" / "manifest.json")
    (prompt,) = held_out_prompts(manifest, tokenizer, sequences=3, prompt_tokens=5, new_tokens=7)
    assert prompt.ids == tuple(ids[:5].tolist())
    assert prompt.original == (*ids[5:9].tolist(), *ids[10:12].tolist()), "no label lies in another document"
    with pytest.raises(UserError, match="--prompt-tokens 9: no sequence"):
        held_out_prompts(manifest, tokenizer, sequences=3, prompt_tokens=9, new_tokens=7)
    with pytest.raises(UserError, match="--sequences 0"):
        held_out_prompts(manifest, tokenizer, sequences=0, prompt_tokens=9, new_tokens=7)


def test_a_letter_that_prompt_and_continuation_share_is_the_continuations(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode("a漢b").tolist()
    assert len(ids) == 5
    assert _after(tokenizer, ids[:2], ids[2:]) == "漢b"
    assert _after(tokenizer, ids[:4], ids[4:]) == "b"


def test_nothing_that_a_model_writes_controls_the_terminal(tmp_path: Path) -> None:
    hostile = "\x1b[31mred\x07\r\x9b1A\u202e[bold]\ttab\n"
    assert escape_control(hostile) == "\\x1b[31mred\\x07\\r\\x9b1A\\u202e[bold]\ttab\n"
    sample = Sample(hostile, hostile, (Continuation(hostile, 12, ended=True), Continuation("x" * 300, 3, ended=False)))
    out = io.StringIO()
    show(sample, Console(file=out, width=80, force_terminal=True, color_system=None), title="prompt 1 of 1")
    text = out.getvalue()
    for control in ("\x1b[31", "\x07", "\r", "\x9b", "\u202e"):
        assert control not in text
    assert text.count("[bold]") == 3
    for part in ("prompt 1 of 1", "the model: 1 of 2, 12 tokens, then the end of the document", "the data", "x" * 300):
        assert part in text
    write_json(tmp_path / "new" / "samples.json", [sample])
    (written,) = json.loads((tmp_path / "new" / "samples.json").read_text(encoding="utf-8"))
    assert written["prompt"] == hostile
    assert written["continuations"][0] == {"text": hostile, "tokens": 12, "ended": True}


def test_what_cannot_be_continued_is_refused(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match=r"run is a run folder: .*megadistill export .*run --output models/run"):
        load_for_sampling(run, None)
    without = shutil.copytree(model, tmp_path / "without")
    (without / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="without has no tokenizer"):
        load_for_sampling(without, None)
    long = Sampling(PLACES)
    with pytest.raises(UserError, match=rf"a prompt of 2 tokens and --new-tokens {PLACES} make {PLACES + 2}, .* reads"):
        _samples(model, ["\n"], long)
    with pytest.raises(UserError, match="--count 0"):
        _samples(model, ["\n"], Sampling(3), count=0)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    for file, reason in ((binary, "not UTF-8"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(UserError, match=reason):
            typed_prompts([], [file], load_tokenizer(model))
    binary.write_bytes(b"a" * ((1 << 20) + 1))
    with pytest.raises(UserError, match="longer than"):
        typed_prompts([], [binary], load_tokenizer(model))


def test_logits_that_are_not_finite_are_a_fault_of_this_model(model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OperatorFault, match="broken: its logits are not finite"):
        _samples(broken, TEXTS, Sampling(3))
