"""A checkpoint from which a run may begin, and every one from which it may not: refused in a line, with a way out."""

import json
from pathlib import Path
from typing import Any

import pytest

from megadistill.config.recipe import Recipe
from megadistill.distributed.launch import Launch
from megadistill.errors import UserError
from megadistill.train.checkpoint.rollback import Rollback, record_rollbacks
from megadistill.train.setup.parent_checkpoint import find_parent
from megadistill.train.setup.run_folder import write_description
from megadistill.train.setup.setup import Setup, prepare
from tests.unit.train.cases import MODEL, SEQUENCE, described_data, recipe, run_with_checkpoint


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return described_data(tmp_path / "data")


def _branch(manifest: Path, start: Path | str, folder: Path, **sections: Any) -> Recipe:
    values = recipe(manifest, folder, **sections).snapshot()
    values["run"]["begin_from"] = str(start)
    return Recipe.model_validate(values)


def _prepared(made: Recipe) -> Setup:
    return prepare(made, Launch(0, 1, 0, 1))


def _refused(made: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        _prepared(made)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_and_the_newest_of_a_run_folder(manifest: Path, tmp_path: Path) -> None:
    checkpoint = run_with_checkpoint(tmp_path / "a", manifest, step=2)
    run_with_checkpoint(tmp_path / "a", manifest, step=4)
    first = _prepared(_branch(manifest, checkpoint, tmp_path / "b")).parent
    newest = _prepared(_branch(manifest, tmp_path / "a", tmp_path / "b")).parent
    assert first is not None
    assert newest is not None
    assert [first.checkpoint.manifest.step, newest.checkpoint.manifest.step] == [2, 4]
    assert [each.run for each in newest.lineage] == ["a"]


def test_a_run_folder_whose_newest_manifest_is_damaged_gives_the_one_before(manifest: Path, tmp_path: Path) -> None:
    run_with_checkpoint(tmp_path / "a", manifest, step=2)
    (run_with_checkpoint(tmp_path / "a", manifest, step=4) / "manifest.json").write_text("{")
    parent = _prepared(_branch(manifest, tmp_path / "a", tmp_path / "b")).parent
    assert parent is not None
    assert parent.checkpoint.manifest.step == 2


def test_a_checkpoint_outside_of_its_run_is_one_too(manifest: Path, tmp_path: Path) -> None:
    moved = tmp_path / "copies" / "somewhere" / "it"
    moved.parent.mkdir(parents=True)
    run_with_checkpoint(tmp_path / "a", manifest).rename(moved)
    parent = _prepared(_branch(manifest, moved, tmp_path / "b")).parent
    assert parent is not None
    assert parent.run is None
    assert [each.run for each in parent.lineage] == ["it"]


def test_what_does_not_fit_is_refused_with_both_values_and_the_way_out(manifest: Path, tmp_path: Path) -> None:
    start = run_with_checkpoint(tmp_path / "a", manifest)
    new = tmp_path / "b"

    def refused(**sections: Any) -> str:
        return _refused(_branch(manifest, start, new, **sections))

    assert "is at step 4, train.steps is 4: steps count from the beginning" in refused(train={"steps": 4})
    assert "hidden_act is 'silu' there, 'gelu' here" in refused(student={"config": {**MODEL, "hidden_act": "gelu"}})
    wider = {**MODEL, "intermediate_size": 64}
    assert "intermediate_size is 48 there, 64 here" in refused(student={"config": wider})
    other_order = refused(data={"seed": 7})
    assert "continues its data after 32 sequences" in other_order
    assert "the seed was 1, is 7" in other_order
    assert f"megadistill export {start} --output DIR, and student.weights=DIR" in other_order


def test_a_run_may_begin_from_a_checkpoint_with_another_padding_of_the_vocabulary(
    manifest: Path, tmp_path: Path
) -> None:
    """250 ids on 256 rows there; on 252 and 255 rows here."""
    start = run_with_checkpoint(tmp_path / "a", manifest)
    for multiple in (4, 5):
        assert _prepared(_branch(manifest, start, tmp_path / "b", student={"vocab_multiple": multiple})).parent


def test_the_parameters_are_compared_where_no_config_is_at_hand(manifest: Path, tmp_path: Path) -> None:
    shapes = {"model.norm.weight": (32,), "extra": (2, 2)}
    message = _refused(
        _branch(manifest, run_with_checkpoint(tmp_path / "a", manifest, parameters=shapes), tmp_path / "b")
    )
    assert "extra is [2, 2] there, absent here" in message
    assert "model.norm.weight" not in message
    assert "more. Give the student the same values" in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "does not exist (paths are relative to"),
        ("empty", "is neither a run folder nor one of its checkpoints/step-…"),
        (
            "hf",
            "is a Hugging Face folder, which has weights and no optimizer state: remove the key and name the folder",
        ),
        ("fresh", "fresh has no valid checkpoint yet"),
        ("data", "manifest.json: format None, this version reads 2: name another checkpoint"),
        ("\x1b[2Jx", "\N{REPLACEMENT CHARACTER}[2Jx does not exist"),
    ],
)
def test_a_folder_of_another_kind_is_refused(manifest: Path, tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(MODEL))
    write_description(
        tmp_path / "fresh", recipe(manifest, tmp_path / "fresh").snapshot(), {"communication_data_type": "fp32"}
    )
    message = _refused(_branch(manifest, tmp_path / name, tmp_path / "b"))
    assert message.startswith("run.begin_from: ")
    assert says in message
    assert "\x1b" not in message


def test_a_damaged_checkpoint_is_refused_by_name(manifest: Path, tmp_path: Path) -> None:
    start = run_with_checkpoint(tmp_path / "a", manifest)
    (file,) = start.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    sizes = f"has {len(content) - 1} bytes, its manifest says {len(content)}: name another checkpoint"
    assert f"{file} {sizes}" in _refused(_branch(manifest, start, tmp_path / "b"))
    file.unlink()
    assert f"{file} is missing" in _refused(_branch(manifest, start, tmp_path / "b"))
    values = json.loads((start / "manifest.json").read_text())
    (start / "manifest.json").write_text(json.dumps({**values, "step": 3}))
    assert "its values do not have the sha256 that it records" in _refused(_branch(manifest, start, tmp_path / "b"))


def test_a_checkpoint_that_a_rollback_abandoned_is_none_to_begin_from(manifest: Path, tmp_path: Path) -> None:
    older, newer = (
        run_with_checkpoint(tmp_path / "a", manifest, step=2),
        run_with_checkpoint(tmp_path / "a", manifest, step=4),
    )
    record_rollbacks(tmp_path / "a", [Rollback(at_step=5, to_step=2, skipped_slots=(20, 30), reason="spike")])
    assert "a rollback of its run abandoned" in _refused(_branch(manifest, newer, tmp_path / "b"))
    parent = find_parent(_branch(manifest, tmp_path / "a", tmp_path / "b"))
    assert parent is not None
    assert parent.checkpoint.folder == older
    assert [each.skipped_slots for each in parent.rollbacks()] == [(20, 30)], "what the parent skips is skipped"


def test_a_run_does_not_begin_from_itself(manifest: Path, tmp_path: Path) -> None:
    """The key would be ignored, since a run resumes from its newest checkpoint."""
    start = run_with_checkpoint(tmp_path / "a", manifest)
    for path in (start, tmp_path / "a", tmp_path / "b" / ".." / "a"):
        assert "is in run.folder itself" in _refused(_branch(manifest, path, tmp_path / "a"))


def test_a_run_that_has_saved_does_not_begin_again(manifest: Path, tmp_path: Path) -> None:
    """Its own checkpoints count; another parent is another run, and the key may be removed."""
    start, other = run_with_checkpoint(tmp_path / "a", manifest), run_with_checkpoint(tmp_path / "c", manifest)
    branch = _branch(manifest, start, tmp_path / "b")
    run_with_checkpoint(tmp_path / "b", manifest, made=branch)
    assert _prepared(branch).parent is None
    assert _prepared(recipe(manifest, tmp_path / "b")).parent is None
    assert "run.begin_from was" in _refused(_branch(manifest, other, tmp_path / "b"))
    assert "run.begin_from was None" in _refused(_branch(manifest, other, tmp_path / "a"))


def test_before_the_first_checkpoint_another_parent_may_be_named(manifest: Path, tmp_path: Path) -> None:
    start, other = run_with_checkpoint(tmp_path / "a", manifest), run_with_checkpoint(tmp_path / "c", manifest)
    write_description(
        tmp_path / "b", _branch(manifest, start, tmp_path / "b").snapshot(), {"communication_data_type": "fp32"}
    )
    parent = _prepared(_branch(manifest, other, tmp_path / "b")).parent
    assert parent is not None
    assert [each.run for each in parent.lineage] == ["c"]


def test_the_weights_of_the_recipe_are_not_read(manifest: Path, tmp_path: Path) -> None:
    """A branch of a run that began from weights names them still, and they may be gone."""
    start = run_with_checkpoint(tmp_path / "a", manifest)
    made = _branch(manifest, start, tmp_path / "b", student={"weights": str(tmp_path / "gone")})
    assert _prepared(made).parent is not None


@pytest.mark.parametrize(("sequences", "fits"), [(32, True), (40, True), (31, False)])
def test_other_text_is_a_curriculum_entry_after_what_was_read(
    manifest: Path, tmp_path: Path, sequences: int, fits: bool
) -> None:
    """The only source of a recipe without a mixture is called data."""
    start = run_with_checkpoint(tmp_path / "a", manifest, step=4)
    curriculum = [{"tokens": sequences * SEQUENCE, "weights": {"data": 1}}, {"weights": {"data": 0.5, "math": 0.5}}]
    data = {"manifest": None, "sources": {"data": str(manifest), "math": str(manifest)}, "curriculum": curriculum}
    branch = _branch(manifest, start, tmp_path / "b", data=data)
    if fits:
        assert _prepared(branch).parent is not None
    else:
        assert "curriculum entry" in _refused(branch)
