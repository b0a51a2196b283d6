"""The set-up of several teachers: each checked as a run with it alone, in messages with its own keys."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.distributed.launch import Launch
from megadistill.errors import UserError
from megadistill.train.setup.run_folder import refuse_other_recipe, write_description
from megadistill.train.setup.setup import check_node, prepare, with_copy
from tests.unit.train.cases import VOCAB, described_data, described_teacher, recipe

LAUNCH = Launch(rank=0, world=2, local_rank=0, local_world=2)


def _teachers(tmp_path: Path, **second: Any) -> dict[str, Any]:
    return {
        "first": {"path": str(described_teacher(tmp_path / "first")), "weight": 3.0},
        "second": {"path": str(described_teacher(tmp_path / "second", hidden_size=64)), **second},
    }


def _recipe(tmp_path: Path, teachers: dict[str, Any], **sections: Any) -> Any:
    manifest = described_data(tmp_path / "data" / "train")
    given = recipe(manifest, tmp_path / "run", teacher=tmp_path, **sections)
    return type(given).model_validate({**given.snapshot(), "teacher": None, "teachers": teachers})


def test_each_teacher_has_the_setup_of_a_run_with_it_alone(tmp_path: Path) -> None:
    ids = torch.arange(VOCAB).flip(0).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    teachers = _teachers(tmp_path, vocab_map=str(tmp_path / "ids.json"), local_copy=str(tmp_path / "copies"))
    setup = prepare(_recipe(tmp_path, teachers), LAUNCH)
    assert setup.teacher_config is None
    first, second = setup.teachers["first"], setup.teachers["second"]
    assert [each.teacher_config and each.teacher_config.hidden_size for each in (first, second)] == [32, 64]
    assert first.vocab_map is None
    assert second.vocab_map is not None
    assert second.vocab_map.tolist() == ids
    assert (first.teaches, second.teaches) == ({"data": 0.75}, {"data": 0.25})
    assert setup.teacher_shares() == {"first": 1.0, "second": 1.0}, "both read every row"
    assert {"student.attention", "teachers.first.attention", "teachers.second.compile"} <= setup.choices().keys()
    digests = check_node(setup, LAUNCH)
    assert {"the teacher in teachers.first.path", "teachers.second.local_copy"} <= digests.keys()
    copied = with_copy(setup)
    assert copied.teachers["first"].teacher_copy is None
    assert copied.teachers["second"].teacher_copy is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_map": "short.json"}, r"^teachers\.second\.vocab_map: short\.json has 2 entries"),
        ({"path": "absent"}, r"^teachers\.second\.path.*absent"),
        ({"path": "{folder}/shallow"}, r"but teachers\.second\.path has 1 layers"),
        ({"path": "{folder}/other"}, r"^teachers\.second\.path: its tokenizer is not that of the shards.*with "
         r"teachers\.second\.vocab_map"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_is_said_with_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.json").write_text("[0, 1]", encoding="utf-8")
    described_teacher(tmp_path / "shallow", num_hidden_layers=1)
    described_teacher(tmp_path / "other", tokenizer=b"another")
    teachers = _teachers(tmp_path)
    teachers["second"] |= {key: value.format(folder=tmp_path) for key, value in change.items()}
    with pytest.raises(UserError, match=message) as caught:
        prepare(_recipe(tmp_path, teachers), LAUNCH)
    assert "\n" not in str(caught.value)


def test_a_resume_may_change_of_each_what_may_change_of_one(tmp_path: Path) -> None:
    folder, teachers = tmp_path / "run", _teachers(tmp_path)
    folder.mkdir()
    before = _recipe(tmp_path, teachers)
    write_description(folder, before.snapshot(), {})
    teachers["second"] |= {"local_copy": "/scratch", "compile": False}
    refuse_other_recipe(folder, _recipe(tmp_path, teachers).snapshot())
    teachers["second"]["weight"] = 2.0
    with pytest.raises(UserError, match=r"teachers\.second\.weight was 1\.0, is 2\.0"):
        refuse_other_recipe(folder, _recipe(tmp_path, teachers).snapshot())
