"""A run folder belongs to one recipe: what differs is listed, and only what moves no number may."""

import json
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.load import validate_recorded
from megadistill.data import Manifest, Mixture
from megadistill.data.tokenizers.data_files import hashes_in
from megadistill.errors import UserError
from megadistill.train.checkpoint.versions import PACKAGES
from megadistill.train.setup.run_folder import (
    MAY_CHANGE,
    copy_student_config,
    copy_tokenizer,
    refuse_other_deepspeed,
    refuse_other_recipe,
    student_config_of,
    write_description,
)
from tests.unit.data.servers import serving
from tests.unit.train.cases import MODEL, described_data, described_teacher, recipe


def _snapshot(**sections: Any) -> dict[str, Any]:
    return recipe(Path("data/manifest.json"), Path("run"), **sections).snapshot()


def _refused(folder: Path, snapshot: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        refuse_other_recipe(folder, snapshot)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def started(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a"
    write_description(folder, _snapshot(), {"zero_optimization": {"stage": 3}})
    return folder


def test_the_description_is_plain_json_with_recipe_settings_and_versions(started: Path) -> None:
    written = json.loads((started / "recipe.json").read_text(encoding="utf-8"))
    assert written["recipe"] == _snapshot()
    assert written["deepspeed"] == {"zero_optimization": {"stage": 3}}
    assert written["versions"].keys() == {"python", *PACKAGES}
    assert [path.name for path in started.iterdir()] == ["recipe.json"], "nothing temporary is left"


def test_a_folder_with_former_key_names_is_refused_with_the_new_ones(started: Path) -> None:
    written = json.loads((started / "recipe.json").read_text(encoding="utf-8"))
    written["recipe"]["train"]["clip"] = written["recipe"]["train"].pop("max_grad_norm")
    (started / "recipe.json").write_text(json.dumps(written), encoding="utf-8")
    message = _refused(started, _snapshot())
    assert message == (
        f"{started / 'recipe.json'}: train.clip is now train.max_grad_norm: use the new name "
        "(written by a version before 0.1.0: name another run.folder)"
    )


def test_a_folder_with_former_event_names_is_refused_with_the_new_ones(started: Path) -> None:
    (started / "events.jsonl").write_text(
        '{"event": "completed"}\n{"event": "hole"}\n{"event": ["x"]}\n', encoding="utf-8"
    )
    assert "(hole is now samples_masked): name another run.folder" in _refused(started, _snapshot())


def test_the_same_recipe_resumes_and_a_new_folder_is_free(started: Path, tmp_path: Path) -> None:
    refuse_other_recipe(started, _snapshot())
    refuse_other_recipe(tmp_path / "new", _snapshot())


@pytest.mark.parametrize(("former", "now"), [(False, "none"), (True, "full")])
def test_a_folder_of_an_earlier_release_resumes(tmp_path: Path, *, former: bool, now: str) -> None:
    """Before there were ways of checkpointing, attention, compilation and the teacher's precision."""
    distill = {"teacher": Path("teacher")}
    written = _snapshot(**distill)
    written["student"]["activation_checkpointing"] = former
    for section in (written["student"], written["teacher"]):
        for key in section.keys() & {"attention", "compile", "precision", "float8_max_kl"}:
            del section[key]
    write_description(tmp_path, written, {})
    refuse_other_recipe(tmp_path, _snapshot(**distill))
    read = validate_recorded(written, source="test").snapshot()
    assert read == _snapshot(**distill, student={"activation_checkpointing": now})
    float8 = _snapshot(**distill)
    float8["teacher"]["precision"] = "float8"
    assert "teacher.precision was 'native', is 'float8'" in _refused(tmp_path, float8)


@pytest.mark.parametrize("name", ["cpu", "hpz", "ds_configs/zero3.json", None])
def test_a_run_resumes_with_another_deepspeed_file_of_the_same_numbers(started: Path, name: str | None) -> None:
    """Such as on another device, or with offloading."""
    refuse_other_recipe(started, _snapshot(student={"deepspeed": name}))
    refuse_other_deepspeed(started, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "bfloat16")


def test_deepspeed_settings_that_change_numbers_are_refused(started: Path) -> None:
    quantized = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}
    with pytest.raises(UserError, match=r"zero_quantized_weights was False, is True"):
        refuse_other_deepspeed(started, quantized, "float32")
    wide = {"zero_optimization": {"stage": 3}, "communication_data_type": "fp32"}
    with pytest.raises(UserError, match=r"communication_data_type was 'bfloat16', is 'float32'"):
        refuse_other_deepspeed(started, wide, "bfloat16")
    refuse_other_deepspeed(started, wide, "float32")


def test_what_differs_is_listed_with_both_values(started: Path) -> None:
    message = _refused(
        started, _snapshot(train={"max_grad_norm": 0.5, "log_every": 3}, student={"config": {"model_type": "qwen3"}})
    )
    assert "train.max_grad_norm was 1.0, is 0.5" in message
    assert "student.config.model_type was 'llama', is 'qwen3'" in message
    assert "student.config.hidden_size was 32, is None" in message
    assert "log_every" not in message
    assert "train.steps" not in message


SECTIONS = ("checkpoint.", "resilience.", "validation")
"""Sections that move no number of a run: about checkpoints and faults, and the measurements on held-out splits."""


def test_what_may_change_is_all_that_may_change(started: Path) -> None:
    """Every other key of the recipe is refused when it has another value."""

    def changed(values: dict[str, Any], prefix: str = "") -> list[str]:
        refused = []
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                refused += changed(value, f"{name}.")
                continue
            values[key] = "another value"
            try:
                refuse_other_recipe(started, snapshot)
            except UserError:
                refused.append(name)
            else:
                assert name in MAY_CHANGE or name.startswith(SECTIONS), f"{name} may change in silence"
            values[key] = value
        return refused

    (started / "checkpoints" / "step-00000002").mkdir(parents=True)
    snapshot = _snapshot()
    refused = changed(snapshot)
    assert not set(refused) & set(MAY_CHANGE)
    assert not [name for name in refused if name.startswith(SECTIONS)]
    assert {
        "run.seed",
        "data.seed",
        "data.document_mask",
        "student.config.hidden_size",
        "train.optimizer.learning_rate",
    } <= set(refused)


def test_a_key_that_is_newer_than_the_folder_has_its_default(started: Path) -> None:
    written = json.loads((started / "recipe.json").read_text())
    del written["recipe"]["data"]["prefetch"], written["recipe"]["data"]["document_mask"]
    (started / "recipe.json").write_text(json.dumps(written))
    refuse_other_recipe(started, _snapshot())
    with pytest.raises(UserError, match=r"data\.document_mask was False, is True"):
        refuse_other_recipe(started, _snapshot(data={"document_mask": True}))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"recipe": ', "\udcff"])
def test_a_broken_description_is_refused(started: Path, content: str) -> None:
    (started / "recipe.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    message = _refused(started, _snapshot())
    assert "recipe.json cannot be read" in message
    assert "run.folder" in message


def test_the_tokenizer_is_copied_once(tmp_path: Path) -> None:
    source, run = tmp_path / "set" / "tokenizer", tmp_path / "run"
    data = Mixture.of(Manifest.load(described_data(tmp_path / "set" / "train")))
    source.mkdir()
    run.mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.model, the tokenizer of the shards, is missing"):
        copy_tokenizer(run, data)
    (source / "tokenizer.model").write_bytes(b"one")
    (source / "tokenizer_config.json").write_bytes(b"{}")
    copy_tokenizer(run, data)
    (source / "tokenizer.model").write_bytes(b"two")
    copy_tokenizer(run, data)
    assert (run / "tokenizer" / "tokenizer.model").read_bytes() == b"one"
    assert (run / "tokenizer" / "tokenizer_config.json").read_bytes() == b"{}"
    assert [path.name for path in run.iterdir()] == ["tokenizer"]


def test_a_changed_file_of_the_tokenizer_is_neither_copied_nor_resumed_with(tmp_path: Path) -> None:
    tokenizer, run = tmp_path / "set" / "tokenizer", tmp_path / "run"
    described = Manifest.load(described_data(tmp_path / "set" / "train"))
    tokenizer.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tokenizer / name).write_text(name)
    record = described.tokenizer.model_copy(update={"files": hashes_in(tokenizer)})
    data = Mixture.of(described.model_copy(update={"tokenizer": record}).lying_in(described.folder))
    hashes = copy_tokenizer(run, data)
    assert hashes == data.tokenizer.files == copy_tokenizer(run, data)
    assert sorted(path.name for path in (run / "tokenizer").iterdir()) == sorted(hashes)
    for place, other, way_out in (
        (run / "tokenizer", run, "the tokenizer of the run .* and start the run again"),
        (tokenizer, tmp_path / "another", "restore it, or tokenize again"),
    ):
        (place / "tokenizer_config.json").write_text('{"chat_template": "of somebody else"}')
        with pytest.raises(UserError, match=rf"tokenizer_config\.json: expected sha256 .*: {way_out}") as refused:
            copy_tokenizer(other, data)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "another" / "tokenizer").exists()


def test_the_tokenizer_of_remote_shards_is_copied_too(tmp_path: Path) -> None:
    described_data(tmp_path / "set" / "train")
    (tmp_path / "set" / "tokenizer").mkdir()
    (tmp_path / "set" / "tokenizer" / "tokenizer.model").write_bytes(b"one")
    with serving(tmp_path) as server:
        copy_tokenizer(tmp_path / "run", Mixture.of(Manifest.load(f"{server.url}/set/train/manifest.json")))
    assert [path.name for path in (tmp_path / "run" / "tokenizer").iterdir()] == ["tokenizer.model"]


def test_a_named_students_config_is_copied_and_read_where_the_folder_is_gone(tmp_path: Path) -> None:
    named, run = tmp_path / "named", tmp_path / "run"
    described_teacher(named)
    section = recipe(tmp_path / "manifest.json", run, student={"config": str(named)}).student
    copy_student_config(run, section)
    before = (named / "config.json").read_bytes()
    (named / "config.json").write_text("{}", encoding="utf-8")
    copy_student_config(run, section)
    copy = student_config_of(run, section)
    assert isinstance(copy, Path)
    assert (copy / "config.json").read_bytes() == before, "a resume does not exchange it"
    assert student_config_of(None, section) == named
    spelled_out = recipe(tmp_path / "manifest.json", run).student
    copy_student_config(tmp_path / "other", spelled_out)
    assert not (tmp_path / "other").exists()
    assert student_config_of(run, spelled_out) == MODEL
