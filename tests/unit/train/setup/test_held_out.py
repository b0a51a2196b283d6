"""Held-out splits that a run cannot read are refused before it starts; those that it should not read are warned of."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.data import Manifest
from megadistill.distributed.launch import Launch
from megadistill.errors import UserError
from megadistill.heldout.splits import Split
from megadistill.train.setup.held_out import refuse_unknown_ids
from megadistill.train.setup.plausibility import implausible_settings
from megadistill.train.setup.setup import Setup, prepare
from tests.unit.data.splits import VOCAB, random_sequences, write_split
from tests.unit.train.cases import SEQUENCE, described_data, recipe

ALONE = Launch(rank=0, world=1, local_rank=0, local_world=1)


def _split(folder: Path, **changes: Any) -> str:
    values = json.loads(described_data(folder).read_text(encoding="utf-8"))
    del values["sha256"]
    Manifest.model_validate_json(json.dumps({**values, **changes})).write(folder)
    return str(folder / "manifest.json")


def _prepared(folder: Path, held_out: dict[str, str], **sections: Any) -> Setup:
    validation = {"every": 2, "data": held_out}
    given = recipe(described_data(folder / "train"), folder / "run", validation=validation, **sections)
    return prepare(given, ALONE, checks_models=False)


def test_splits_are_read_by_name_and_up_to_the_bound(tmp_path: Path) -> None:
    setup = _prepared(tmp_path, {"web": _split(tmp_path / "web")})
    (split,) = setup.held_out
    assert (split.name, split.sequences, split.manifest.sequence_length) == ("web", 8, SEQUENCE)
    few = recipe(
        tmp_path / "train" / "manifest.json",
        tmp_path / "run",
        validation={"every": 2, "data": {"web": str(tmp_path / "web" / "manifest.json")}, "sequences": 3},
    )
    assert [each.sequences for each in prepare(few, ALONE, checks_models=False).held_out] == [3]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 0}, "it has no token to predict: give another split"),
        (
            {"sequence_length": SEQUENCE // 2, "tokens": 4 * SEQUENCE},
            f"its sequences have {SEQUENCE // 2} tokens, those of the training data {SEQUENCE}: ",
        ),
        (
            {"tokenizer": {"kind": "sentencepiece", "file": "../tokenizer/tokenizer.model", "sha256": "1" * 64}},
            "it was made by another tokenizer (sha256 111111111111…) than the training data",
        ),
    ],
    ids=["empty", "length", "tokenizer"],
)
def test_a_split_that_the_run_cannot_read_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _prepared(tmp_path, {"web": _split(tmp_path / "web", **changes)})
    assert str(caught.value).startswith(f"validation.data.web: {reason}")
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_missing_is_named_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^validation\.data\.web: .*does not exist"):
        _prepared(tmp_path, {"web": str(tmp_path / "nowhere" / "manifest.json")})


def test_a_token_without_an_id_of_the_teachers_is_refused_before_the_run(tmp_path: Path) -> None:
    web = Split("web", write_split(tmp_path / "web", random_sequences(70, seed=1)))
    few = replace(web, limit=10)
    last = int(web.stream().batch(range(9, 10)).tokens[0, 5])
    ids = torch.arange(VOCAB)
    refuse_unknown_ids([web], ids, sources={}, document_mask=False)
    ids[last] = -1
    says = rf"^validation\.data\.web: teacher\.vocab_map has no teacher's id for {last}, which is "
    with pytest.raises(UserError, match=says):
        refuse_unknown_ids([web], ids, sources={}, document_mask=False)
    with pytest.raises(UserError, match=says):
        refuse_unknown_ids([few], ids, sources=["web"], document_mask=False)
    refuse_unknown_ids([web], ids, sources=["code"], document_mask=False)


def test_a_split_of_shards_that_the_run_trains_on_is_warned_of(tmp_path: Path) -> None:
    shards = json.loads(described_data(tmp_path / "train").read_text(encoding="utf-8"))["shards"]
    unseen = _split(tmp_path / "unseen", shards=[{**shard, "sha256": "2" * 64} for shard in shards])
    both = {"unseen": unseen, "seen": _split(tmp_path / "seen")}
    warning = implausible_settings(_prepared(tmp_path, both))["held-out shards"]
    assert warning.startswith("validation.data.seen: the run trains on 1 of its 1 shards (data): ")
    assert "unseen" not in warning
    assert "held-out shards" not in implausible_settings(_prepared(tmp_path, {"unseen": unseen}))


def test_documents_that_an_evaluation_reads_otherwise_are_warned_of(tmp_path: Path) -> None:
    packer = {"name": "bestfit", "version": 2, "bos": None, "eos": 2}
    held_out = {"web": _split(tmp_path / "web", packer=packer)}
    assert "data.document_mask false" in implausible_settings(_prepared(tmp_path, held_out))["held-out documents"]
    masked = _prepared(tmp_path, held_out, data={"document_mask": True})
    assert "held-out documents" not in implausible_settings(masked)
