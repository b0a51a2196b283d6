"""Validation in a run on real ranks: equal to an evaluation of the export, and no number of the training moves."""

import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.config.recipe import Recipe
from megadistill.data import Manifest
from megadistill.distributed.launch import Launch
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.evaluate.evaluate import evaluate, ranks
from megadistill.evaluate.evaluation import Evaluation
from megadistill.events import ALL, json_lines, read_validations
from megadistill.export.export_run import export_run
from megadistill.heldout.splits import load_splits
from megadistill.models.families import load_config
from megadistill.student.engine import StudentEngine
from megadistill.train.hooks.hook import Hook, Request, StepEvent
from megadistill.train.loop import RunOutcome, Trainer, run
from megadistill.train.setup.next_start import nothing_to_do
from megadistill.train.setup.setup import prepare
from megadistill.train.teacher.placement import run_teacher_server
from tests.ranks.harness import run_ranks
from tests.ranks.train import test_loop as loops

manifest, teacher = loops.manifest, loops.teacher  # the fixtures

STEPS, EVERY = 5, 2
MEASURES = ("tokens", "cross_entropy", "bits_per_byte", "calibration_error", "kl", "jsd", "agreement", "acceptance")


@pytest.fixture(scope="module")
def held_out(manifest: Path) -> dict[str, str]:
    """Two splits: a held-out one of a few sequences, and the training split, which has more."""
    return {"unseen": str(manifest.parent.parent / "heldout" / "manifest.json"), "trained": str(manifest)}


def _recipe(manifest: str, folder: str, changes: dict[str, Any]) -> Recipe:
    """A recipe with the given sections; those that a test says nothing of are `loops.recipe`'s."""
    base = loops.recipe(Path(manifest), Path(folder)).snapshot()
    base["train"] |= {"steps": STEPS, "histograms_every": 0, "checkpoint_every": 2, **changes.pop("train", {})}
    return Recipe.model_validate({**base, **changes})


def _train(
    topology: Topology, manifest: str, folder: str, changes: dict[str, Any], stops: list[int | None]
) -> list[RunOutcome]:
    """The outcomes of attempts with these `stop_after`; of a rank of the teacher's own, none."""
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    if changes.get("teacher", {}).get("placement") == "disaggregated":
        launch = Launch(topology.rank, 4, topology.rank, 4)
    outcomes = []
    for stop in stops:
        setup = prepare(_recipe(manifest, folder, {**changes}), launch)
        if topology.role == "teacher":
            run_teacher_server(setup, topology)
        else:
            outcomes.append(run(setup, topology, stop_after=stop))
    return outcomes


def _start(
    world: int, manifest: Path, folder: Path, stops: tuple[int | None, ...] = (None,), **changes: Any
) -> list[dict[str, Any]]:
    """Runs attempts; the numbers of every step."""
    run_ranks(world, _train, str(manifest), str(folder), changes, list(stops))
    return loops._numbers(folder)


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The validations of a run, without their times."""
    return [{key: line[key] for key in ("step", "tokens", "splits")} for line in read_validations(folder)]


def _distill(teacher: Path) -> dict[str, Any]:
    return {"objective": "distill", "teacher": {"path": str(teacher)}}


def _events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = json_lines(folder / "events.jsonl")
    return [line for line in lines if line is not None and line["event"] == name]


def _evaluated(folder: Path, held_out: dict[str, str], teacher: Path | None, **limits: Any) -> tuple[Evaluation, ...]:
    """The export of the newest checkpoint, evaluated by one process: the teacher's first, where there is one."""
    exported = folder / "exported"
    export_run(folder, exported, step=None, max_shard_bytes=1 << 30, dtype=None)
    splits = load_splits([f"{name}={path}" for name, path in held_out.items()], **limits)
    with ranks(Launch(0, 1, 0, 1)) as alone:
        quiet = lambda stage, **numbers: None  # noqa: E731
        return tuple(evaluate([exported], splits, teacher=teacher, batch=3, topology=alone, progress=quiet))


def _require_equal(validated: dict[str, Any], results: tuple[Evaluation, ...]) -> None:
    student = results[-1]
    parts = {ALL: student, **{each.source: each for each in student.by_source}}
    assert validated["splits"].keys() == parts.keys()
    for name, expected in parts.items():
        ours = validated["splits"][name]
        for measure in MEASURES:
            value = getattr(expected, measure)
            assert (measure in ours) == (value is not None)
            if value is not None:
                assert ours[measure] == pytest.approx(value, rel=1e-5, abs=1e-6), f"{name}: {measure}"
    if len(results) > 1:
        teachers = {ALL: results[0], **{each.source: each for each in results[0].by_source}}
        for name, expected in teachers.items():
            assert validated["splits"][name]["teacher_cross_entropy"] == pytest.approx(expected.cross_entropy, rel=1e-5)


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_run_is_the_same_with_validation_and_measures_what_an_evaluation_does(
    manifest: Path, teacher: Path, held_out: dict[str, str], tmp_path: Path, world: int
) -> None:
    """Also stopped and resumed, with two stages of the teacher, whose pipeline reads ahead over each validation."""
    validation = {"every": EVERY, "data": held_out, "sequences": 5}
    plain = _start(world, manifest, tmp_path / "plain", **_distill(teacher))
    whole = _start(world, manifest, tmp_path / "whole", validation=validation, **_distill(teacher))
    resumed = _start(world, manifest, tmp_path / "resumed", (3, None), validation=validation, **_distill(teacher))
    assert whole == plain, "to the bit"
    assert resumed == plain
    lines = _lines(tmp_path / "whole")
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert _lines(tmp_path / "resumed") == lines, "to the bit, and none twice"
    limits = [min(5, Manifest.load(path).sequences) for path in held_out.values()]
    assert (
        lines[0]["splits"][ALL]["tokens"]
        == sum(lines[0]["splits"][name]["tokens"] for name in held_out)
        > 60 * sum(limits)
    )
    assert lines[-1]["splits"][ALL]["cross_entropy"] < lines[0]["splits"][ALL]["cross_entropy"], "the student learned"
    _require_equal(lines[-1], _evaluated(tmp_path / "whole", held_out, teacher, limit=5))


def test_ranks_with_another_share_of_the_rows_measure_the_same(
    manifest: Path, held_out: dict[str, str], tmp_path: Path
) -> None:
    """Of labels alone, by 1 and by 4 ranks, of which some have micro-batches without a row. All sequences are read."""
    validation = {"every": 100, "data": held_out}
    lines = {}
    for world in (1, 4):
        folder = tmp_path / str(world)
        _start(world, manifest, folder, validation=validation, train={"steps": 1})
        lines[world] = _lines(folder)
    one, four = lines[1][0], lines[4][0]
    for name in (ALL, *held_out):
        assert one["splits"][name]["tokens"] == four["splits"][name]["tokens"]
        assert four["splits"][name] == pytest.approx(one["splits"][name], rel=1e-5)
    assert "kl" not in one["splits"][ALL]
    _require_equal(lines[4][1], _evaluated(tmp_path / "4", held_out, None))


@pytest.mark.thorough
def test_a_teacher_on_ranks_of_its_own_answers_for_held_out_tokens_too(
    manifest: Path, teacher: Path, held_out: dict[str, str], tmp_path: Path
) -> None:
    roles = Roles(world=4, teachers=2, stages=2)
    section = {"path": str(teacher), "placement": "disaggregated", "ranks": 2, "stages": 2, "queue": 3}
    validation = {"every": EVERY, "data": held_out, "sequences": 3}
    own = {"objective": "distill", "teacher": section}
    folders = {name: tmp_path / name for name in ("plain", "validated", "colocated")}
    for name, extra in (("plain", {}), ("validated", {"validation": validation})):
        run_ranks(4, _train, str(manifest), str(folders[name]), {**own, **extra}, [None], roles=roles)
    assert loops._numbers(folders["validated"]) == loops._numbers(folders["plain"])
    _start(2, manifest, folders["colocated"], validation=validation, **_distill(teacher))
    ours, theirs = _lines(folders["validated"]), _lines(folders["colocated"])
    assert [line["step"] for line in ours] == [0, 2, 4, 5]
    for a, b in zip(ours, theirs, strict=True):
        for name in (ALL, *held_out):
            assert a["splits"][name] == pytest.approx(b["splits"][name], rel=1e-4)


class _RollsBack:
    """Asks for a rollback at its first step 4."""

    def __init__(self) -> None:
        self.seen = 0

    def after_step(self, event: StepEvent) -> Request | None:
        self.seen += event.step == 4
        return Request.ROLL_BACK if (event.step, self.seen) == (4, 1) else None


def _train_with_a_rollback(topology: Topology, manifest: str, folder: str, changes: dict[str, Any]) -> None:
    own, asks = Trainer._hooks, _RollsBack()

    def hooks(*arguments: Any, **keys: Any) -> list[Hook]:
        return [asks, *own(*arguments, **keys)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_hooks", hooks)
        _train(topology, manifest, folder, {"checkpoint": {"asynchronous": False}, **changes}, [None])


@pytest.mark.thorough
def test_a_rollback_takes_its_validations_again(
    manifest: Path, teacher: Path, held_out: dict[str, str], tmp_path: Path
) -> None:
    """From step 4 to the checkpoint of step 2, while the teacher has read ahead into the validation of step 4."""
    changes = {**_distill(teacher), "validation": {"every": 1, "data": held_out, "sequences": 3}}
    run_ranks(2, _train_with_a_rollback, str(manifest), str(tmp_path / "back"), changes)
    whole = _start(2, manifest, tmp_path / "whole", **changes)
    assert loops._numbers(tmp_path / "back") == whole
    assert [line["step"] for line in _lines(tmp_path / "back")] == [0, 1, 2, 3, 4, 5]
    assert _lines(tmp_path / "back") == _lines(tmp_path / "whole")
    taken = [event["step"] for event in _events(tmp_path / "back", "validated")]
    assert taken == [0, 1, 2, 3, 3, 4, 5], "that of step 3 was taken back"


def test_a_run_that_improves_no_more_says_so_and_ends_if_it_is_to(
    manifest: Path, held_out: dict[str, str], tmp_path: Path
) -> None:
    """With a learning rate of nearly 0. The same command ends at once; without `stop` it takes the other steps."""
    settings = {"every": 1, "data": held_out, "sequences": 2, "patience": 2}
    slow = {"train": {"optimizer": {"learning_rate": 1e-30}}}
    folder = tmp_path / "run"
    stops = {**slow, "validation": {**settings, "stop": True}}
    ((first, again),) = run_ranks(1, _train, str(manifest), str(folder), stops, [None, None])
    assert (folder / "DONE").read_text() == "2\n", "no scheduler starts it again"
    answer = nothing_to_do(_recipe(str(manifest), str(folder), {**stops}), stop_after=None)
    assert answer is not None
    assert answer.line.startswith("ended at step 2, since validation.patience is used up (validation.stop)")
    goes_on = {**slow, "validation": settings}
    assert nothing_to_do(_recipe(str(manifest), str(folder), {**goes_on}), stop_after=None) is None
    ((rest,),) = run_ranks(1, _train, str(manifest), str(folder), goes_on, [None])
    assert (folder / "DONE").read_text() == f"{STEPS}\n"
    assert [(each.step, each.done, each.plateau, each.stopped_by) for each in (first, again)] == [
        (2, False, True, None)
    ] * 2
    assert (rest.step, rest.done, rest.plateau) == (STEPS, True, False)
    (plateau,) = _events(folder, "validation_plateau")
    assert (plateau["step"], plateau["best_step"], plateau["validations"]) == (2, 0, 2)
    assert plateau["cross_entropy"] >= plateau["best"]
    assert [event["reason"] for event in _events(folder, "stopped")] == ["validation.stop"] * 2
    assert 2 in [event["step"] for event in _events(folder, "checkpoint_saved")]


def _train_with_a_stop(
    topology: Topology, manifest: str, folder: str, changes: dict[str, Any], at: int
) -> list[RunOutcome]:
    """An attempt that is asked to stop in the forward pass `at` of its validations."""
    own, passes = StudentEngine.hidden, count(1)

    def hidden(student: StudentEngine, *arguments: Any) -> torch.Tensor:
        if next(passes) == at:
            (Path(folder) / "STOP").touch()
        return own(student, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StudentEngine, "hidden", hidden)
        return _train(topology, manifest, folder, changes, [None])


@pytest.mark.thorough
def test_a_stop_request_breaks_a_validation_off_and_the_next_start_takes_it(
    manifest: Path, teacher: Path, held_out: dict[str, str], tmp_path: Path
) -> None:
    """In the middle of the validation of step 0, of step 2, and of the last step."""
    validation = {"every": EVERY, "data": held_out, "sequences": 5}
    changes = {**_distill(teacher), "validation": validation, "train": {"checkpoint_every": 100}}
    whole = _start(2, manifest, tmp_path / "whole", **{**changes})
    of_one = sum(
        -(-min(5, Manifest.load(path).sequences) // 2) for path in held_out.values()
    )  # micro-batches of a rank
    folder, stops = tmp_path / "stopped", (2, of_one + 2, 2 * of_one + 1, 99)
    outcomes = [run_ranks(2, _train_with_a_stop, str(manifest), str(folder), {**changes}, at)[0][0] for at in stops]
    assert [(each.step, each.done, each.stopped_by) for each in outcomes] == [
        (0, False, "the file STOP"),
        (2, False, "the file STOP"),
        (STEPS, False, "the file STOP"),
        (STEPS, True, None),
    ]
    assert loops._numbers(folder) == whole
    assert _lines(folder) == _lines(tmp_path / "whole")
    assert [event["step"] for event in _events(folder, "checkpoint_saved")] == [2, STEPS]


def test_damaged_held_out_sequences_are_left_out_and_reported(
    manifest: Path, held_out: dict[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(manifest.parent.parent, copy)
    damaged = copy / "heldout" / "manifest.json"
    (shard,) = Manifest.load(damaged).shards
    content = bytearray((copy / "heldout" / shard.name).read_bytes())
    content[content.index(b".tokens.npy") + 700] ^= 1  # behind the headers of the tar and of the array
    (copy / "heldout" / shard.name).write_bytes(bytes(content))
    validation = {"every": 100, "data": {"damaged": str(damaged), "trained": held_out["trained"]}}
    folder = tmp_path / "run"
    plain = _start(2, manifest, tmp_path / "plain", train={"steps": 2})
    assert _start(2, manifest, folder, validation=validation, train={"steps": 2}) == plain
    masked = _events(folder, "held_out_masked")
    assert [(event["step"], event["splits"]) for event in masked] == [(0, {"damaged": 1})]
    log = (folder / "log.txt").read_text(encoding="utf-8")
    assert "validation: damaged sequences are left out (damaged 1)" in log
    first, last = _lines(folder)
    whole = Manifest.load(damaged)
    assert first["splits"]["damaged"]["tokens"] == last["splits"]["damaged"]["tokens"] < whole.tokens


@pytest.mark.thorough
def test_a_split_of_a_source_is_measured_against_the_teacher_of_that_source(
    manifest: Path, teacher: Path, held_out: dict[str, str], tmp_path: Path
) -> None:
    """And one of no source without any. Two teachers, of which each teaches one of two sources."""
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    torch.manual_seed(7)
    config = {
        **loops.STUDENT,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "vocab_size": Manifest.load(manifest).vocab_size,
    }
    AutoModelForCausalLM.from_config(load_config(config, what="test")).save_pretrained(other)
    changes: dict[str, Any] = {
        "objective": "distill",
        "data": {
            "sources": {"code": str(manifest), "web": str(manifest)},
            "curriculum": [{"weights": {"code": 1.0, "web": 1.0}}],
        },
        "teachers": {
            "one": {"path": str(teacher), "sources": ["code"]},
            "two": {"path": str(other), "sources": ["web"]},
        },
    }
    splits = {"web": held_out["unseen"], "elsewhere": held_out["unseen"], "code": held_out["unseen"]}
    validation = {"every": EVERY, "data": splits, "sequences": 3}
    plain = _start(2, manifest, tmp_path / "plain", **changes)
    assert _start(2, manifest, tmp_path / "run", validation=validation, **changes) == plain
    last = _lines(tmp_path / "run")[-1]["splits"]
    for name, path in (("code", teacher), ("web", other)):
        shutil.rmtree(tmp_path / "run" / "exported", ignore_errors=True)
        expected, _ = _evaluated(tmp_path / "run", {name: splits[name]}, path, limit=3)[::-1]
        for measure in MEASURES:
            assert last[name][measure] == pytest.approx(getattr(expected, measure), rel=1e-4), f"{name}: {measure}"
    assert last["code"]["kl"] != pytest.approx(last["web"]["kl"], rel=1e-2)
    assert last["elsewhere"]["cross_entropy"] == pytest.approx(last["web"]["cross_entropy"], rel=1e-6)
    assert "kl" not in last["elsewhere"]
    assert "kl" not in last[ALL], "it is not known for all of its tokens"
