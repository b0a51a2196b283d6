"""`generate` against transformers' own generation, the distribution it draws from, and itself done in other ways.

Legend: B prompts, P tokens of each, N new tokens, V ids.
"""

import itertools
import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from megadistill.data import Manifest, Mixture, TokenStream, tokenize
from megadistill.data.prepare.verify import verify
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.datagen.generate import GenerateReport, generate
from megadistill.errors import OperatorFault, UserError
from megadistill.models.families import load_config
from megadistill.models.sampling import Sampling, continuations, draw_ids
from megadistill.progress import ShowProgress
from megadistill.types import IGNORED_LABEL
from tests.unit.models.cases import VOCAB, whole_model

SEQUENCE, IDS, ROWS = 32, 600, 608
PROMPT, NEW, SLOTS = 9, 12, range(3, 40)
STDLIB = Path(sysconfig.get_paths()["stdlib"])
SAMPLING = Sampling(NEW, temperature=0.9, top_p=0.95, seed=4)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer/ and train/. Not to be written to."""
    output = tmp_path_factory.mktemp("data") / "set"
    _tokenize(output, tokenizer=None, packer="chunk")
    return output


def _tokenize(output: Path, **options: Any) -> Manifest:
    tokenize(
        [STDLIB / "email"],
        output,
        vocab_size=IDS if options["tokenizer"] is None else None,
        sequence_length=SEQUENCE,
        heldout_fraction=0,
        include=["*.py"],
        progress=_silent,
        processes=1,
        **options,
    )
    return Manifest.load(output / "train" / "manifest.json")


@pytest.fixture(scope="module")
def teacher(data_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with padding rows, which ends what it says now and then."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = {
        "model_type": "llama",
        "vocab_size": ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    model = AutoModelForCausalLM.from_config(load_config(config, what="test"))
    with torch.no_grad():
        model.lm_head.weight[load_tokenizer(data_set / "tokenizer").eos] *= 2.5
        model.lm_head.weight[IDS:] *= 5  # what must never be drawn
    model.save_pretrained(folder)
    for file in (data_set / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


def _silent(stage: str, **numbers: int | None) -> None:
    pass


def _generate(teacher: Path, data: Path, output: Path, **options: Any) -> GenerateReport:
    defaults: dict[str, Any] = {
        "slots": SLOTS,
        "order_seed": 2,
        "prompt_tokens": PROMPT,
        "sampling": SAMPLING,
        "batch": 4,
        "shard_slots": 10,
    }
    mixture = Mixture.of(Manifest.load(data / "train" / "manifest.json"))
    return generate(
        teacher, mixture, output, device=torch.device("cpu"), **{"progress": _silent, **defaults, **options}
    )


def _files(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def _units(output: Path) -> tuple[Tensor, Tensor]:
    """Tokens and labels of the units, in the order of the slots they came from."""
    manifest = Manifest.load(output / "train" / "manifest.json")
    stream = TokenStream(manifest, seed=0, batch_slots=1, rank=0, world_size=1)
    read = stream.batch(range(manifest.sequences))
    places = stream._order.locate(np.arange(manifest.sequences))[:, 1:]
    order = torch.from_numpy(np.lexsort((places[:, 1], places[:, 0])))
    return read.tokens[order], read.labels[order]


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "qwen3_moe"])
def test_at_temperature_0_it_says_what_transformers_says(case: str) -> None:
    """Past the sliding windows of 6, and after an end that one of the rows comes to."""
    model = whole_model(case)
    prompts_BP = torch.randint(0, VOCAB, (5, 4), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 14}
    eos = int(model.generate(prompts_BP, **options, eos_token_id=None, pad_token_id=0)[2, 4 + 5])
    expected = model.generate(prompts_BP, **options, eos_token_id=eos, pad_token_id=eos)[:, 4:]
    drawn_ids = continuations(
        model, prompts_BP, torch.zeros(5, 14, dtype=torch.float64), temperature=0, top_p=1, eos=eos, vocab_size=VOCAB
    )
    assert eos in expected[2, :6], "no row comes to its end"
    assert torch.equal(drawn_ids[:, : expected.shape[1]], expected)
    assert (drawn_ids[:, expected.shape[1] :] == eos).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.6, 0.3), (0.9, 1e-6)])
def test_evenly_spread_numbers_draw_what_transformers_warpers_leave(temperature: float, top_p: float) -> None:
    points, V = 20_000, 60
    logits_V = 2 * torch.randn(V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    warped = TemperatureLogitsWarper(temperature)(torch.zeros(1, 1), logits_V[None].clone())
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(torch.zeros(1, 1), warped)
    expected_V = warped.softmax(dim=1)[0]
    uniforms = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    ids = draw_ids(logits_V.expand(points, V), uniforms, temperature=temperature, top_p=top_p)
    counts_V = torch.bincount(ids, minlength=V)
    assert ((counts_V - points * expected_V).abs() <= 1).all()


def test_of_equals_the_lowest_ids_are_the_most_likely() -> None:
    logits = torch.zeros(4, 8, dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.49, 0.51, 1 - 2**-53], dtype=torch.float64)
    assert draw_ids(logits, uniforms, temperature=1.0, top_p=0.25).tolist() == [0, 0, 1, 1]
    assert draw_ids(logits, uniforms, temperature=1.0, top_p=1.0).tolist() == [0, 3, 4, 7]


def test_first_tokens_over_many_slots_follow_the_softmax(teacher: Path) -> None:
    """Chi-square over the ids that are expected five times; slots of one prompt, each with its own numbers."""
    model = AutoModelForCausalLM.from_pretrained(teacher)
    slots, prompt_P = 4000, torch.tensor([5, 8, 13])
    uniforms = torch.stack([SAMPLING.uniforms(f"generate/{slot}")[:1] for slot in range(slots)])
    prompts = prompt_P.expand(slots, 3)
    drawn_ids = continuations(model, prompts, uniforms, temperature=1.0, top_p=1.0, eos=2, vocab_size=IDS)
    with torch.no_grad():
        expected = slots * model(input_ids=prompts[:1]).logits[0, -1, :IDS].double().softmax(dim=0)
    often = expected >= 5
    counts = torch.bincount(drawn_ids[:, 0], minlength=IDS).double()
    counts = torch.cat([counts[often], counts[~often].sum().view(1)])
    expected = torch.cat([expected[often], expected[~often].sum().view(1)])
    freedom = len(expected) - 1
    assert freedom > 30
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_units_are_prompts_and_what_follows_up_to_its_end(teacher: Path, data_set: Path, tmp_path: Path) -> None:
    report = _generate(teacher, data_set, tmp_path / "out")
    manifest = Manifest.load(tmp_path / "out" / "train" / "manifest.json")
    source = Manifest.load(data_set / "train" / "manifest.json")
    prompts = TokenStream(source, seed=2, batch_slots=1, rank=0, world_size=1)
    tokens, labels = _units(tmp_path / "out")
    read = prompts.batch(SLOTS)
    assert torch.equal(tokens[:, :PROMPT], read.tokens[:, :PROMPT])
    assert tokens.max() < IDS

    eos = load_tokenizer(data_set / "tokenizer").eos
    lengths = []
    for row_labels in labels:
        continued = row_labels[PROMPT - 1 :]  # the tokens after the prompt, ignored behind their end
        ends = (continued == eos).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else NEW
        assert (continued[length:] == IGNORED_LABEL).all()
        assert (continued[:length] != IGNORED_LABEL).all()
        lengths.append(length)
    assert min(lengths) < NEW, "no continuation comes to its end"
    assert max(lengths) == NEW

    assert report.finished
    counts = report.counts
    assert (counts["sequences"], counts["shards"], counts["prompts left out"]) == (len(SLOTS), 4, 0)
    assert counts["tokens written"] == sum(lengths)
    assert counts["continuations that ended"] == sum(
        int(row[PROMPT - 1 + length - 1] == eos) for row, length in zip(labels, lengths, strict=True)
    )
    assert manifest.tokens == int((labels != IGNORED_LABEL).sum())
    piece_bytes = torch.from_numpy(load_tokenizer(data_set / "tokenizer").piece_bytes)
    assert manifest.text_bytes == int(piece_bytes[labels[labels != IGNORED_LABEL]].sum())
    assert manifest.source.generated is not None
    assert manifest.source.generated.order == prompts.fingerprint
    assert manifest.tokenizer.sha256 == source.tokenizer.sha256
    assert verify(tmp_path / "out", quick=False, progress=_silent).lines() == []
    console = Console(width=100, record=True)
    console.print(report.table())
    assert "finished" in console.export_text()


def test_the_documents_of_a_prompt_stay_apart(teacher: Path, data_set: Path, tmp_path: Path) -> None:
    source = Manifest.load(data_set / "train" / "manifest.json")
    every = TokenStream(source, seed=2, batch_slots=1, rank=0, world_size=1).batch(range(source.sequences))
    second = int(every.starts[:, 1:PROMPT].any(dim=1).nonzero()[0])  # the first slot with two documents in its prompt
    slots = range(max(0, second - 8), second + 1)
    _generate(teacher, data_set, tmp_path, slots=slots, sampling=Sampling(4))
    manifest = Manifest.load(tmp_path / "train" / "manifest.json")
    stream = TokenStream(manifest, seed=0, batch_slots=1, rank=0, world_size=1)
    read = stream.batch(range(manifest.sequences))
    eos = load_tokenizer(data_set / "tokenizer").eos
    behind_an_end = torch.nn.functional.pad(read.tokens[:, :-1] == eos, (1, 0), value=True)[:, : PROMPT + 1]
    assert behind_an_end[:, 1:].any(), "no prompt holds two documents"
    bos_read = read.starts[:, : PROMPT + 1]
    assert torch.equal(bos_read, behind_an_end)


def test_neither_batches_nor_jobs_change_a_byte(teacher: Path, data_set: Path, tmp_path: Path) -> None:
    _generate(teacher, data_set, tmp_path / "4")
    expected = _files(tmp_path / "4")
    assert {"train/manifest.json", "train/shard-00003.tar"} <= expected.keys()
    assert not any(Path(name).name.startswith(".") for name in expected)
    for batch in (1, 7, 100):
        _generate(teacher, data_set, tmp_path / str(batch), batch=batch)
        assert _files(tmp_path / str(batch)) == expected
    for rank in (2, 0, 1):
        report = _generate(teacher, data_set, tmp_path / "jobs", rank=rank, world=3)
        assert not report.finished
    merged = _generate(teacher, data_set, tmp_path / "jobs")
    assert merged.finished
    assert (merged.counts["shards reused"], merged.counts["sequences"]) == (4, len(SLOTS))
    assert _files(tmp_path / "jobs") == expected
    _generate(teacher, data_set, tmp_path / "other", sampling=Sampling(NEW, 0.9, 0.95, seed=5))
    assert _files(tmp_path / "other") != expected


def test_what_was_broken_off_goes_on_behind_its_whole_shards(teacher: Path, data_set: Path, tmp_path: Path) -> None:
    def breaks_after(shards: int) -> ShowProgress:
        calls = itertools.count()

        def breaks(stage: str, **numbers: int | None) -> None:
            if next(calls) == shards:
                raise KeyboardInterrupt

        return breaks

    _generate(teacher, data_set, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _generate(teacher, data_set, tmp_path / "out", progress=breaks_after(3))
    damaged = tmp_path / "out" / "train" / "shard-00001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    with pytest.raises(KeyboardInterrupt):  # shards of other slots are not taken for these
        _generate(teacher, data_set, tmp_path / "elsewhere", shard_slots=12, progress=breaks_after(2))
    assert _generate(teacher, data_set, tmp_path / "elsewhere").counts["shards reused"] == 0
    assert _files(tmp_path / "elsewhere") == _files(tmp_path / "whole")
    report = _generate(teacher, data_set, tmp_path / "out")
    assert report.counts["shards reused"] == 2  # of the three that were written, one was damaged since
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    with pytest.raises(UserError, match="never changed"):
        _generate(teacher, data_set, tmp_path / "out")


def test_prompts_that_are_no_one_text_are_left_out(teacher: Path, data_set: Path, tmp_path: Path) -> None:
    source = _tokenize(tmp_path / "packed", tokenizer=data_set / "tokenizer", packer="bestfit")
    slots = range(200)
    options = {"prompt_tokens": SEQUENCE, "sampling": Sampling(2), "batch": 64, "shard_slots": 4096}
    report = _generate(teacher, tmp_path / "packed", tmp_path / "out", slots=slots, **options)
    read = TokenStream(source, seed=2, batch_slots=1, rank=0, world_size=1).batch(slots)
    whole = (read.labels != IGNORED_LABEL).all(dim=1)
    assert 0 < report.counts["prompts left out"] == int((~whole).sum())
    tokens, _ = _units(tmp_path / "out")
    assert torch.equal(tokens[:, :SEQUENCE], read.tokens[whole])


def test_manifests_of_human_text_have_no_record_of_a_teacher(data_set: Path) -> None:
    assert "generated" not in Manifest.load(data_set / "train" / "manifest.json").model_dump_json()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": range(5, 5)}, "slots 5 to 5"),
        ({"batch": 0}, "a batch of 0"),
        ({"rank": 2, "world": 2}, "job 2 of 2"),
        (
            {"prompt_tokens": 33, "sampling": Sampling(1)},
            "--prompt-tokens 33: the sequences of the data have 32",
        ),
        ({"prompt_tokens": 0}, "--prompt-tokens 0: the sequences of the data have 32"),
        ({"prompt_tokens": 32, "sampling": Sampling(33)}, "make 65, but the teacher in .* reads 64"),
    ],
)
def test_what_does_not_fit_is_refused(
    teacher: Path, data_set: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        _generate(teacher, data_set, tmp_path / "out", **options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_shape_is_refused_before_anything_is_written(
    teacher: Path, data_set: Path, tmp_path: Path
) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(teacher, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 49}))
    with pytest.raises(UserError, match=r"is \[48, 32\], but its config.json says \[49, 32\]"):
        _generate(other, data_set, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_something_else_began_is_left_alone(teacher: Path, data_set: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "shard-00000.tar").write_bytes(b"somebody's")
    (tmp_path / "file").write_bytes(b"somebody's")
    before = _files(tmp_path)
    for output in ("out", "file"):
        with pytest.raises(UserError, match=f"{output} exists and was not begun by `generate`"):
            _generate(teacher, data_set, tmp_path / output)
    assert _files(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert _generate(teacher, data_set, tmp_path / "empty", slots=range(2)).finished


@pytest.mark.parametrize(
    "numbers",
    [
        {"new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0},
        {"top_p": 1.1},
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--" + next(iter(numbers)).replace("_", "-")):
        Sampling(**{"new_tokens": 4, **numbers})


def test_a_teacher_with_another_tokenizer_is_refused(teacher: Path, data_set: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / "teacher" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        _generate(tmp_path / "teacher", data_set, tmp_path / "out")


def test_a_teacher_that_says_nan_stops_the_work(teacher: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(OperatorFault, match="not finite"):
        continuations(
            model,
            torch.tensor([[5, 6]]),
            torch.zeros(1, 2, dtype=torch.float64),
            temperature=1.0,
            top_p=1.0,
            eos=2,
            vocab_size=IDS,
        )
