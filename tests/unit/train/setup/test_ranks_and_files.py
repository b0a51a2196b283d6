"""A recipe for more ranks, or with files of elsewhere: everything that is missing is named at once."""

from pathlib import Path

import pytest

from megadistill.config.load import load_recipe
from megadistill.distributed.launch import Launch, SeparateReplica
from megadistill.errors import UserError
from megadistill.train.setup.ranks_and_files import require_ranks_and_files
from tests.paths import RECIPES


def _launch(world: int) -> Launch:
    return Launch(rank=0, world=world, local_rank=0, local_world=min(world, 8))


def _missing(name: str, *overrides: str, world: int = 1) -> list[str]:
    with pytest.raises(UserError) as caught:
        require_ranks_and_files(load_recipe(RECIPES / name, overrides), _launch(world))
    return str(caught.value).splitlines()


def test_a_recipe_of_a_cluster_names_its_ranks_and_all_missing_folders_on_a_laptop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    heading, ranks, data, student, teacher = _missing("gemma2-27b-to-2b/8-nodes.yaml")
    assert heading == "the recipe cannot start here: 4 reasons"
    assert "distributed.vocab_group is 8, but this run has 1 process" in ranks
    assert "torchrun --nproc_per_node 8 -m megadistill train RECIPE" in ranks
    assert "to try it here, --set distributed.vocab_group=1" in ranks
    assert "data.manifest: data/web/train/manifest.json does not exist" in data
    assert "student.config: recipes/models/gemma-2-2b does not exist" in student
    assert "`megadistill init .` writes it here" in student
    assert "teacher.path: models/gemma-2-27b does not exist" in teacher
    assert "hf download ORG/MODEL --local-dir models/gemma-2-27b" in teacher
    assert len(_missing("gemma2-27b-to-2b/8-nodes.yaml", world=64)) == 4, "the ranks are right"


def test_the_overrides_to_try_a_recipe_with_a_teacher_of_its_own_ranks_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = "gemma2-27b-to-2b/512-nodes.yaml"
    ranks = _missing(recipe, "teacher.queue=9")[1]
    assert "teacher.ranks is 2560, but this run has 1 process" in ranks
    overrides = [each for each in ranks.rpartition("to try it here, ")[2].split() if each != "--set"]
    assert "teacher.queue=4" in overrides
    assert not any("ranks" in line or "vocab_group" in line for line in _missing(recipe, *overrides)[1:])


def test_a_single_reason_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = _missing("smoke-labels.yaml")
    assert line.startswith("data.manifest: runs/smoke/data/train/manifest.json does not exist")


def test_mixtures_and_hub_names_and_initial_weights_are_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [
        "data.manifest=null",
        "data.sources={web: web/manifest.json, code: 's3://bucket/manifest.json', mine: org/text}",
        "data.curriculum=[{weights: {web: 1, code: 1, mine: 1}}]",
        "student.weights=org/model",
        "validation={every: 2, data: {web: web/heldout.json}}",
    ]
    heading, web, mine, held_out, weights, deepspeed = _missing(
        "smoke-labels.yaml", *overrides, "student.deepspeed=zero-3"
    )
    assert heading.endswith("5 reasons")
    assert "validation.data.web: web/heldout.json does not exist" in held_out
    assert "student.deepspeed is 'zero-3'" in deepspeed
    assert "data.sources.web: web/manifest.json does not exist" in web
    assert "hf download org/text --repo-type dataset" in mine
    assert "student.weights: org/model" in weights
    assert "hf download org/model --local-dir models/model" in weights


@pytest.mark.parametrize(
    ("name", "overrides", "line"),
    [
        ("smoke.yaml", ["distributed.min_replicas=4"], "distributed.min_replicas is 4, and MEGADISTILL_REPLICAS 3"),
        (
            "smoke.yaml",
            ["checkpoint.local={folder: /dev/shm/megadistill, every: 2}"],
            "checkpoint.local: a lost replica gets its state",
        ),
        ("smoke.yaml", ["distributed.shard=4"], "distributed.shard is 4, and this replica is a launch of 2 ranks"),
        (
            "smoke.yaml",
            ["teacher.placement=disaggregated", "teacher.ranks=1"],
            "teacher.placement disaggregated: the teacher's own ranks serve a fixed number",
        ),
    ],
)
def test_what_does_not_go_with_replicas_that_come_and_go(name: str, overrides: list[str], line: str) -> None:
    launch = Launch(0, 2, 0, 2, SeparateReplica(1, 3, "node7", 29400)).of_all_replicas()
    recipe = load_recipe(RECIPES / name, [*overrides, "distributed.vocab_group=null"])
    with pytest.raises(UserError) as caught:
        require_ranks_and_files(recipe, launch)
    assert line in str(caught.value)
