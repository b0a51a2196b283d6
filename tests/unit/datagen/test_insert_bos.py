"""BOS in front of every sequence, from shards of an earlier release to all that reads them: the same mechanism."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.data import Manifest, Mixture, TokenStream, tokenize
from megadistill.data.prepare.verify import verify
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.datagen.generate import generate
from megadistill.distributed.launch import Launch
from megadistill.evaluate.evaluate import evaluate, ranks
from megadistill.evaluate.evaluation import Evaluation
from megadistill.evaluate.prompts import held_out_prompts
from megadistill.evaluate.sample import load_for_sampling
from megadistill.heldout.splits import load_splits
from megadistill.models.families import load_config
from megadistill.models.sampling import Sampling
from megadistill.prune.prune import prune
from megadistill.train.setup.plausibility import implausible_settings
from megadistill.train.setup.setup import prepare
from megadistill.train.teacher.placement import target_key
from megadistill.types import IGNORED_LABEL
from tests.unit.data.corpora import BODY, byte_level_tokenizer, document_texts, write_texts
from tests.unit.train.cases import recipe

SEQUENCE, BOS = 32, 0
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def _silent(stage: str, **numbers: int | None) -> None:
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """old/ and new/, data sets without and with BOS in front of every sequence; teacher/. Not to be written to."""
    folder = tmp_path_factory.mktemp("bos")
    texts, tokenizer = write_texts(folder / "texts", document_texts()), byte_level_tokenizer(folder / "bos", BODY)
    options: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": None, "heldout_fraction": 0, "processes": 1}
    for name, insert_bos in (("old", False), ("new", True)):
        tokenize([texts], folder / name, sequence_length=SEQUENCE, insert_bos=insert_bos, progress=_silent, **options)
    torch.manual_seed(0)
    ids = load_tokenizer(tokenizer).vocab_size
    AutoModelForCausalLM.from_config(load_config({**MODEL, "vocab_size": ids}, what="test")).save_pretrained(
        folder / "teacher"
    )
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / "teacher")
    return folder


def _manifest(folder: Path) -> Path:
    return folder / "train" / "manifest.json"


def _measured(place: Path, data: str, *, insert_bos: bool = False) -> Evaluation:
    with ranks(Launch(rank=0, world=1, local_rank=0, local_world=1)) as alone:
        splits = load_splits([str(_manifest(place / data))], 12, insert_bos=insert_bos)
        (result,) = evaluate(
            [place / "teacher"], splits, teacher=None, batch=4, topology=alone, progress=lambda *_, **__: None
        )
    return result


def test_evaluate_reads_stored_sequences_with_bos_put_in(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Against the losses of transformers on BOS and the first tokens of each sequence."""
    caplog.set_level(logging.WARNING, logger="megadistill")
    usual = _measured(place, "old")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("--data train: ")
    assert line.endswith("or have it put in at reading time: --insert-bos")
    caplog.clear()
    measured = _measured(place, "old", insert_bos=True)
    _measured(place, "new")
    assert not caplog.records

    model = AutoModelForCausalLM.from_pretrained(place / "teacher")
    stored = TokenStream(Manifest.load(_manifest(place / "old")), seed=0, batch_slots=1, rank=0, world_size=1)
    read = stored.batch(range(12))
    losses = []
    for tokens, labels in zip(read.tokens, read.labels, strict=True):
        row = tokens if tokens[0] == BOS else torch.cat([torch.tensor([BOS]), tokens])
        assert (tokens[1:] == labels[:-1]).all()
        with torch.no_grad():
            log_p = model(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1)
        losses.append(-log_p.gather(1, row[1:, None]))
    expected = torch.cat(losses)
    assert measured.tokens == len(expected)
    assert measured.cross_entropy == pytest.approx(float(expected.mean()), rel=1e-6)
    assert abs(usual.cross_entropy - measured.cross_entropy) > 1e-4


def test_prompts_of_held_out_text_begin_with_bos(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(place / "teacher")
    sizes: dict[str, Any] = {"sequences": 5, "prompt_tokens": 6, "new_tokens": 4}
    stored = held_out_prompts(Manifest.load(_manifest(place / "old")), tokenizer, **sizes)
    inserted = held_out_prompts(Manifest.load(_manifest(place / "old")), tokenizer, **sizes, insert_bos=True)
    packed = held_out_prompts(Manifest.load(_manifest(place / "new")), tokenizer, **sizes)
    assert any(prompt.ids[0] != BOS for prompt in stored)
    for before, prompt in zip(stored, inserted, strict=True):
        whole = (*before.ids, *(before.original or ()))
        expected = whole if whole[0] == BOS else (BOS, *whole[:-1])
        assert (*prompt.ids, *(prompt.original or ())) == expected
    assert {prompt.ids[0] for prompt in [*inserted, *packed]} == {BOS}
    caplog.set_level(logging.WARNING, logger="megadistill")
    load_for_sampling(place / "teacher", Manifest.load(_manifest(place / "old")), insert_bos=True)
    load_for_sampling(place / "teacher", Manifest.load(_manifest(place / "new")))
    assert not caplog.records
    load_for_sampling(place / "teacher", Manifest.load(_manifest(place / "old")))
    assert caplog.records[0].getMessage().endswith("or have it put in at reading time: --insert-bos")


@pytest.mark.parametrize(("data", "insert_bos"), [("old", True), ("new", False), ("old", False)])
def test_generate_writes_sequences_that_begin_as_its_prompts_do(
    place: Path, data: str, insert_bos: bool, tmp_path: Path
) -> None:
    mixture = Mixture.of(Manifest.load(_manifest(place / data)), insert_bos=insert_bos)
    generate(
        place / "teacher",
        mixture,
        tmp_path,
        slots=range(12),
        order_seed=2,
        prompt_tokens=8,
        sampling=Sampling(6, seed=1),
        batch=4,
        device=torch.device("cpu"),
        progress=_silent,
    )
    manifest = Manifest.load(_manifest(tmp_path))
    with_bos = insert_bos or data == "new"
    assert (manifest.packer.bos, manifest.packer.sequence_bos) == (BOS, with_bos)
    assert manifest.source.generated is not None
    assert manifest.source.generated.insert_bos is insert_bos
    assert ("insert_bos" in _manifest(tmp_path).read_text()) is insert_bos
    assert verify(tmp_path, quick=False, progress=_silent).lines() == []
    read = TokenStream(manifest, seed=0, batch_slots=1, rank=0, world_size=1).batch(range(manifest.sequences))
    assert bool((read.tokens[:, 0] == BOS).all()) is with_bos
    if with_bos:
        again = TokenStream(Mixture.of(manifest, insert_bos=True), seed=0, batch_slots=1, rank=0, world_size=1)
        assert torch.equal(again.batch(range(manifest.sequences)).labels, read.labels)


def test_prune_measures_with_bos_and_records_it(place: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": None, "intermediate_size": 32, "heads": None, "layers": None}
    for name, insert_bos in (("with", True), ("without", False)):
        prune(
            place / "teacher",
            Mixture.of(Manifest.load(_manifest(place / "old")), insert_bos=insert_bos),
            tmp_path / name,
            sequences=6,
            batch=3,
            device=torch.device("cpu"),
            progress=lambda *_, **__: None,
            **sizes,
        )
    calibration = json.loads((tmp_path / "with" / "pruning.json").read_text())["calibration"]
    assert calibration["insert_bos"] is True
    assert "insert_bos" not in (tmp_path / "without" / "pruning.json").read_text()


def _warnings(place: Path, data: str, **changes: Any) -> dict[str, str]:
    made = recipe(_manifest(place / data), place / "run", teacher=place / "teacher")
    section = made.data.model_copy(update=changes)
    return implausible_settings(prepare(made.model_copy(update={"data": section}), Launch(0, 1, 0, 1)))


def test_a_run_warns_when_its_teacher_reads_sequences_without_bos(place: Path) -> None:
    warning = _warnings(place, "old")["BOS"]
    assert "of the first" in warning
    assert f"begin with BOS (id {BOS}), which the tokenizer in {place / 'teacher'} puts before every text" in warning
    assert f"(megadistill tokenize ... --tokenizer {place / 'teacher'})" in warning
    assert warning.endswith("data.insert_bos=true")
    assert "\n" not in warning
    for data, changes in (("old", {"insert_bos": True}), ("new", {})):
        assert "BOS" not in _warnings(place, data, **changes)


def test_stored_targets_are_those_of_one_way_of_reading(place: Path) -> None:
    """`key_differences` refuses the other one; a target set of an earlier release has no such record."""
    made = recipe(_manifest(place / "old"), place / "run", teacher=place / "teacher", loss={"targets": {"draws": 3}})
    keys = [
        target_key(prepare(made.model_copy(update={"data": section}), Launch(0, 1, 0, 1)))
        for section in (made.data, made.data.model_copy(update={"insert_bos": True}))
    ]
    assert [key.insert_bos for key in keys] == [False, True]
    assert "insert_bos" not in keys[0].model_dump_json()


def test_the_stream_of_a_recipe_has_bos_in_front(place: Path) -> None:
    made = recipe(_manifest(place / "old"), place / "run", teacher=place / "teacher")
    section = made.data.model_copy(update={"insert_bos": True})
    data = prepare(made.model_copy(update={"data": section}), Launch(0, 1, 0, 1)).data
    batch = TokenStream(data, seed=1, batch_slots=1, rank=0, world_size=1).batch(range(data.first.sequences))
    assert (batch.tokens[:, 0] == BOS).all()
    assert (batch.labels[:, :-1] != IGNORED_LABEL).all()
