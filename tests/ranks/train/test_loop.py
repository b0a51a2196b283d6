"""The training loop on real ranks: steps, hooks, resumes, and every kind of teacher and of loss."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from megadistill.config.recipe import DataSection, Recipe
from megadistill.data import Manifest, Mixture, TokenStream
from megadistill.data.tokenizers.data_files import read_files
from megadistill.datagen.store_targets import store_on_ranks
from megadistill.distributed.launch import Launch
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault, UserError
from megadistill.models.families import EMBEDDING, HEAD, load_config
from megadistill.train.checkpoint.format import newest_checkpoint
from megadistill.train.hooks.hook import Hook, Request, StepEvent
from megadistill.train.loop import Trainer, run
from megadistill.train.setup.setup import prepare
from megadistill.train.teacher.placement import run_teacher_server
from tests.corpora import small_data_set
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks

STEPS, BATCH = 5, 4


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of a few sequences, so that steps end in the middle of an epoch, and epochs in the middle of a step."""
    folder = tmp_path_factory.mktemp("data")
    return small_data_set(folder, sequence_length=64, heldout_fraction=0.3) / "train" / "manifest.json"


STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def recipe(manifest: Path, folder: Path) -> Recipe:
    values: dict[str, Any] = {
        "objective": "labels",
        "run": {"folder": str(folder)},
        "data": {"manifest": str(manifest)},
        "student": {
            "deepspeed": str(DS_CONFIGS / "zero3.json"),
            "vocab_multiple": 64,
            "config": STUDENT,
        },
        "train": {
            "steps": STEPS,
            "global_batch": BATCH,
            "micro_batch": 1,
            "precision": "float32",
            "optimizer": {"learning_rate": 1e-3},
            "histograms_every": STEPS,
        },
    }
    return Recipe.model_validate(values)


def _train(topology: Topology, manifest: str, folder: str) -> int:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    return run(prepare(recipe(Path(manifest), Path(folder)), launch), topology, stop_after=None).step


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_takes_the_recipes_steps(manifest: Path, tmp_path: Path, world: int) -> None:
    """DeepSpeed's trap 9: ZeRO-3's gathers are collective, so a rank with one batch fewer hangs the others for ever."""
    sequences = Manifest.load(manifest).sequences
    assert sequences % BATCH, "the batch must not divide the epoch, or this tests nothing"
    assert sequences < STEPS * BATCH, "the run must be longer than an epoch"
    assert run_ranks(world, _train, str(manifest), str(tmp_path / "run")) == [STEPS] * world
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    _require_histograms_of_the_whole(tmp_path / "run")


def _train_mixture(topology: Topology, manifest: str, folder: str, stop_after: int | None) -> int:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    made = recipe(Path(manifest), Path(folder)).snapshot()
    made["student"]["config"] = {**STUDENT, "model_type": "mixtral", "num_local_experts": 4}
    made["loss"]["router_aux_loss_coef"] = 0.1
    return run(prepare(Recipe.model_validate(made), launch), topology, stop_after=stop_after).step


def test_a_student_with_experts_is_balanced_alike_on_any_ranks_and_after_a_resume(
    manifest: Path, tmp_path: Path
) -> None:
    runs = {}
    launches: dict[str, list[tuple[int, int | None]]] = {
        "whole": [(2, None)],
        "resumed": [(2, 2), (2, None)],
        "alone": [(1, None)],
    }
    for name, starts in launches.items():
        for world, stop_after in starts:
            run_ranks(world, _train_mixture, str(manifest), str(tmp_path / name), stop_after)
        runs[name] = _numbers(tmp_path / name)
    assert runs["resumed"] == runs["whole"], "bitwise, with the load of the experts"
    for ours, theirs in zip(runs["alone"], runs["whole"], strict=True):
        assert ours["experts"] == pytest.approx(theirs["experts"], rel=2e-5)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        balance = ours["loss"] - ours["student_ce"]
        assert balance == pytest.approx(0.1 * ours["experts"]["router_aux_loss"], rel=1e-4)
    assert [step for step, line in enumerate(runs["whole"], 1) if "expert_load" in line] == [STEPS]
    (load,) = runs["whole"][-1]["expert_load"].values()
    assert sum(load) == pytest.approx(4, abs=1e-3)
    assert max(load) == pytest.approx(runs["whole"][-1]["experts"]["max_load"], abs=1e-4)


def _train_twice(topology: Topology, manifest: str, folder: str) -> tuple[int, int]:
    """The step after a run to step 2, and after another attempt that is to stop at step 1."""
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    setup = prepare(recipe(Path(manifest), Path(folder)), launch)
    return run(setup, topology, stop_after=2).step, run(setup, topology, stop_after=1).step


def test_a_run_that_is_past_its_stop_after_takes_no_step(manifest: Path, tmp_path: Path) -> None:
    assert run_ranks(1, _train_twice, str(manifest), str(tmp_path / "run")) == [(2, 2)]


def _train_hot(topology: Topology, manifest: str, folder: str) -> int:
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    plain = recipe(Path(manifest), Path(folder)).model_dump()
    plain["train"]["optimizer"]["learning_rate"] = 10.0
    return run(prepare(Recipe.model_validate(plain), launch), topology, stop_after=1).step


def test_a_setting_that_is_probably_a_mistake_is_logged_once(manifest: Path, tmp_path: Path) -> None:
    assert run_ranks(2, _train_hot, str(manifest), str(tmp_path / "run")) == [1, 1]
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert log.count("train.optimizer.learning_rate is 10,") == 1


def _diverge(topology: Topology, manifest: str, folder: str) -> list[bool]:
    """Whether each of three attempts knows that the student diverged."""
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    plain = recipe(Path(manifest), Path(folder)).model_dump()
    plain["train"] |= {"steps": 10, "optimizer": {"learning_rate": 1.0}, "schedule": {"warmup_steps": 0}}
    setup = prepare(Recipe.model_validate(plain), launch)
    return [run(setup, topology, stop_after=step).diverged for step in (4, 8, 10)]


def test_a_loss_that_explodes_is_reported_once_in_a_run_shorter_than_any_window(manifest: Path, tmp_path: Path) -> None:
    """And a later attempt still knows it, for the last line of the run."""
    assert run_ranks(2, _diverge, str(manifest), str(tmp_path / "run")) == [[False, True, True]] * 2
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    (event,) = [event for event in events if event["event"] == "student_diverged"]
    assert event["step"] == 6
    assert event["student_ce"] > event["limit"] > event["first_ce"]
    assert [event["reason"] for event in events if event["event"] == "stopped"] == ["--stop-after"] * 2
    assert "the student diverges" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


def _require_histograms_of_the_whole(folder: Path) -> None:
    """TensorBoard's histograms of the last step are those of the checkpoint's tensors, on any number of ranks."""
    board = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    board.Reload()
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    for name in checkpoint.manifest.parameters:
        (histogram,) = [event.histogram_value for event in board.Histograms(f"weights/{name}")]
        values = checkpoint.parameter(name).double()
        assert histogram.num == values.numel()
        assert (histogram.min, histogram.max) == (float(values.min()), float(values.max()))
        assert histogram.sum_squares == pytest.approx(float(values.square().sum()), rel=1e-9)
        assert board.Histograms(f"gradient_mean/{name}")[0].histogram_value.num == values.numel()


def _train_in_a_folder_of_its_own(topology: Topology, manifest: str, folder: str) -> str:
    """A rank's fault where rank 1 has another run folder than rank 0."""
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    own = Path(folder) / ("shared" if topology.is_first else "unshared")
    try:
        run(prepare(recipe(Path(manifest), own), launch), topology, stop_after=None)
    except OperatorFault as fault:
        return str(fault)
    return "nothing"


def test_ranks_that_see_other_checkpoints_do_not_train_on(manifest: Path, tmp_path: Path) -> None:
    """A folder that the nodes do not share would be resumed from different steps, with weights of two runs."""
    run_ranks(2, _train, str(manifest), str(tmp_path / "shared"))
    (tmp_path / "unshared").mkdir()
    first, second = run_ranks(2, _train_in_a_folder_of_its_own, str(manifest), str(tmp_path))
    assert first.startswith("rank 1 and rank 0 see different newest checkpoints")
    assert f"(step 0 on rank 1, step {STEPS} on rank 0)" in second


class _Seen:
    """A hook that records the steps that it sees."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def after_step(self, event: StepEvent) -> Request | None:
        self.steps.append(event.step)
        return None


class _Asks(_Seen):
    """Asks for a checkpoint of step 2, for a rollback at its first step 4 and for a stop at its second."""

    def after_step(self, event: StepEvent) -> Request | None:
        super().after_step(event)
        if event.step == 4:
            return Request.ROLL_BACK if self.steps.count(4) == 1 else Request.STOP
        return Request.SAVE if event.step == 2 else None


def _train_with_hooks(topology: Topology, manifest: str, folder: str) -> tuple[list[int], list[int], int]:
    """Steps seen by the hook that asks, by one behind it, and where the run stopped."""
    base = recipe(Path(manifest), Path(folder)).snapshot()
    given = Recipe.model_validate({**base, "checkpoint": {"asynchronous": False}})
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    own, asks, behind = Trainer._hooks, _Asks(), _Seen()

    def hooks(*arguments: Any, **keys: Any) -> list[Hook]:
        return [*own(*arguments, **keys), asks, behind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_hooks", hooks)
        ended = lambda flags: "a hook" if asks.steps.count(4) == 2 else None  # noqa: E731
        patch.setattr("megadistill.train.loop.stop_reason", ended)
        outcome = run(prepare(given, launch), topology, stop_after=None)
    assert (outcome.done, outcome.stopped_by) == (False, "a hook")
    return asks.steps, behind.steps, outcome.step


def test_a_hook_asks_for_a_checkpoint_a_rollback_and_a_stop(manifest: Path, tmp_path: Path) -> None:
    """The step that is rolled back is not seen by the hooks behind, and the steps are taken again to the same digit."""
    folder = tmp_path / "run"
    for seen, behind, step in run_ranks(2, _train_with_hooks, str(manifest), str(folder)):
        assert seen == [1, 2, 3, 4, 3, 4]
        assert behind == [1, 2, 3, 3, 4]
        assert step == 4
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    whole = tmp_path / "whole"
    run_ranks(2, _train, str(manifest), str(whole))
    assert _numbers(folder) == _numbers(whole)[:4]


def _timeouts(topology: Topology) -> list[float]:
    groups: list[Any] = [topology.world_group, topology.vocab_group, topology.slice_group, topology.pipeline_group]
    return [group._get_backend(topology.device).options._timeout.total_seconds() for group in groups]


def test_every_group_has_the_time_limit_of_the_run() -> None:
    assert run_ranks(4, _timeouts, vocab_group=2) == [[60.0] * 4] * 4


# Distillation by what a recipe may ask for. Each rank's micro-batch is all that it has of a step, so that the tokens
# of the vocab group, among which those of lowest entropy are selected, are the same on one rank and on two.

ROUTED = {
    "divergence": "jsd",
    "beta": 0.3,
    "temperature": 1.5,
    "label_fraction": 0.2,
    "schedule": {"kind": "wsd", "warmup_steps": 2, "decay_steps": 2, "final_ratio": 0.0},
    "diagnostics_every": 2,
}
TOP_P = {"select": "top_p", "p": 0.8, "max_ids": 20}
LOSSES: dict[str, dict[str, Any]] = {
    "routed": ROUTED,
    "sampled": {"targets": {"draws": 8}, "ce_weight": 0.1},
    "top-p": {"targets": TOP_P},
}
CLOCK = {
    "time", "seconds", "tokens_per_second", "data_seconds", "student_seconds", "loss_seconds", "teacher_seconds",
    "wait_seconds", "memory_bytes", "mfu", "student_mfu", "teacher_mfu",
}  # fmt: skip


def _teacher(folder: Path, manifest: Manifest, ids: torch.Tensor, *, width: int = 48) -> Path:
    """Two layers, so that they make two stages. Its id for the student's i is ids[i], where that is not -1."""
    torch.manual_seed(5)
    config = {**STUDENT, "hidden_size": width, "num_hidden_layers": 2, "vocab_size": manifest.vocab_size}
    model = AutoModelForCausalLM.from_config(load_config({**config, "initializer_range": 0.3}, what="test"))
    teacher_ids = int(ids.max()) + 1
    state, known = model.state_dict(), ids >= 0
    for name in (EMBEDDING, HEAD):
        rows = torch.randn(teacher_ids, width)  # ids that the student does not have, and that must not matter
        rows[ids[known]] = state[name][known]
        state[name] = rows
    wider = AutoModelForCausalLM.from_config(load_config({**config, "vocab_size": teacher_ids}, what="test"))
    wider.load_state_dict(state)
    wider.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(read_files(manifest)["tokenizer.model"])
    return folder


@pytest.fixture(scope="module")
def teacher(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with the student's ids."""
    described = Manifest.load(manifest)
    return _teacher(tmp_path_factory.mktemp("teacher"), described, torch.arange(described.vocab_size))


def _distill(
    topology: Topology,
    manifest: str,
    folder: str,
    loss: dict[str, Any],
    teacher: dict[str, Any],
    stop_after: int | None,
    data: dict[str, Any],
) -> str:
    """The error that stopped the run, or nothing."""
    base = recipe(Path(manifest), Path(folder)).snapshot()
    changes: dict[str, Any] = {
        "objective": "distill",
        "teacher": teacher,
        "loss": loss,
        "data": {**base["data"], **data},
        "train": {**base["train"], "micro_batch": BATCH // topology.world},
    }
    rank, world = topology.rank, topology.world
    if topology.bridge is not None:
        rank, world = topology.bridge.rank, topology.bridge.roles.world
        changes["train"]["micro_batch"] = BATCH // topology.bridge.roles.students
    setup = prepare(Recipe.model_validate({**base, **changes}), Launch(rank, world, topology.local_rank, world))
    try:
        if topology.role == "teacher":
            run_teacher_server(setup, topology)
        else:
            run(setup, topology, stop_after=stop_after)
    except UserError as error:
        return str(error)
    return ""


def _numbers(folder: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def _run(
    world: int,
    manifest: Path,
    folder: Path,
    loss: dict[str, Any],
    *,
    stops: tuple[int | None, ...] = (None,),
    data: dict[str, Any] | None = None,
    roles: Roles | None = None,
    **teacher: Any,
) -> list[dict[str, Any]]:
    section = {key: str(value) if isinstance(value, Path) else value for key, value in teacher.items()}
    for stop in stops:
        arguments = (str(manifest), str(folder), loss, section, stop, data or {})
        assert run_ranks(world, _distill, *arguments, roles=roles) == [""] * world
    return _numbers(folder)


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    closer = line.get("diagnostics", {})
    return {**line, "diagnostics": len(closer), **{f"closer {name}": value for name, value in closer.items()}}


def _assert_alike(numbers: list[dict[str, Any]], truth: list[dict[str, Any]]) -> None:
    assert len(numbers) == len(truth) == STEPS
    for ours, theirs in zip(numbers, truth, strict=True):
        assert ours.keys() == theirs.keys()
        assert _flat(ours) == pytest.approx(_flat(theirs), rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_learn_as_one_and_a_resume_as_if_nothing_had_happened(
    manifest: Path, teacher: Path, tmp_path: Path, name: str
) -> None:
    loss = LOSSES[name]
    whole = _run(2, manifest, tmp_path / "two", loss, path=teacher)
    assert _run(2, manifest, tmp_path / "resumed", loss, stops=(3, None), path=teacher) == whole
    _assert_alike(_run(1, manifest, tmp_path / "one", loss, path=teacher), whole)


@pytest.fixture
def mixed(manifest: Path, tmp_path: Path) -> dict[str, Any]:
    """Two sources, one of them with a damaged unit that the first step reads, and all that `data` may ask for."""
    sources = {}
    for name in ("train", "heldout"):
        shutil.copytree(manifest.parent.parent / name, tmp_path / "set" / name)
        sources[name] = str(tmp_path / "set" / name / "manifest.json")
    shutil.copytree(manifest.parent.parent / "tokenizer", tmp_path / "set" / "tokenizer")
    curriculum = [{"tokens": 64 * 3 * BATCH, "weights": {"train": 2, "heldout": 1}}, {"weights": {"heldout": 1}}]
    data = {"manifest": None, "sources": sources, "curriculum": curriculum, "document_mask": True, "skip": [[5, 9]]}
    order = Mixture.load(DataSection.model_validate(data)).order(1)
    source, shard, unit = order.locate(np.array([2]))[0].tolist()
    path = tmp_path / "set" / order.names[source] / f"shard-{shard:05d}.tar"
    damaged = bytearray(path.read_bytes())
    damaged[np.load(f"{path}.idx.npy")[unit][0] + 700] ^= 1
    path.write_bytes(damaged)
    return {**data, "on_corrupt_sample": "mask"}


def _cursor(folder: Path) -> dict[str, Any]:
    newest = max((folder / "checkpoints").iterdir())
    cursor: dict[str, Any] = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))["cursor"]
    return cursor


def test_a_mixture_with_document_masks_skips_and_a_masked_sample_is_learned_alike(
    manifest: Path, teacher: Path, tmp_path: Path, mixed: dict[str, Any]
) -> None:
    whole = _run(2, manifest, tmp_path / "two", {}, data=mixed, path=teacher)
    assert _run(2, manifest, tmp_path / "resumed", {}, stops=(3, None), data=mixed, path=teacher) == whole
    _assert_alike(_run(1, manifest, tmp_path / "one", {}, data=mixed, path=teacher), whole)
    cursors = [_cursor(tmp_path / name) for name in ("one", "two", "resumed")]
    assert cursors[0] == cursors[1] == cursors[2]
    assert 2 in cursors[0]["masked_slots"]
    assert cursors[0]["skips"] == [[5, 9]]
    assert cursors[0]["next_slot"] == STEPS * BATCH + 4
    lines = (tmp_path / "two" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["data_seconds"] >= 0 for line in lines)


def test_a_curriculum_entry_not_yet_reached_may_be_edited_and_others_not(
    manifest: Path, teacher: Path, tmp_path: Path, mixed: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    paths = {"path": str(teacher)}
    assert run_ranks(2, _distill, str(manifest), str(folder), {}, paths, 2, mixed) == [""] * 2
    first, last = mixed["curriculum"]
    other = {**mixed, "curriculum": [{**first, "weights": {"train": 1, "heldout": 1}}, last]}
    for message in run_ranks(2, _distill, str(manifest), str(folder), {}, paths, None, other):
        assert "curriculum entry 1 was heldout 1, train 2 parts, is heldout 1, train 1 parts" in message
    edited = {**mixed, "curriculum": [first, {"weights": {"train": 1}}]}
    assert run_ranks(2, _distill, str(manifest), str(folder), {}, paths, None, edited) == [""] * 2
    assert _cursor(folder)["order"]["stages"][1]["quotas"] == {"train": 1}


DISAGGREGATED: dict[str, Any] = {"placement": "disaggregated", "queue": 3}


@pytest.fixture(scope="module")
def colocated(manifest: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The numbers of two ranks with a stage each, documents masked."""
    folder = tmp_path_factory.mktemp("colocated") / "run"
    return _run(2, manifest, folder, {}, data={"document_mask": True}, path=teacher)


def _apart(roles: Roles, teacher: Path) -> dict[str, Any]:
    ranks = {"ranks": roles.teachers, "stages": roles.stages}
    return {**DISAGGREGATED, **ranks, "path": teacher, "roles": roles, "data": {"document_mask": True}}


@pytest.mark.parametrize("roles", [Roles(3, 1, 1), Roles(4, 2, 2), Roles(4, 2, 1)])
def test_a_teacher_on_ranks_of_its_own_teaches_the_same(
    manifest: Path, teacher: Path, tmp_path: Path, roles: Roles, colocated: list[dict[str, Any]]
) -> None:
    """Masks included, which must reach its stages."""
    apart = _run(roles.world, manifest, tmp_path / "apart", {}, **_apart(roles, teacher))
    _assert_alike(apart, colocated)


def test_a_run_resumes_with_its_teacher_elsewhere(
    manifest: Path, teacher: Path, tmp_path: Path, colocated: list[dict[str, Any]]
) -> None:
    roles = Roles(4, 2, 2)
    _run(roles.world, manifest, tmp_path / "run", {}, stops=(2,), **_apart(roles, teacher))
    moved = _run(2, manifest, tmp_path / "run", {}, data={"document_mask": True}, path=teacher)
    _assert_alike(moved, colocated)


def test_hidden_states_in_eight_bits_move_the_loss_little(manifest: Path, teacher: Path, tmp_path: Path) -> None:
    roles = Roles(2, 1, 1)
    keys: dict[str, Any] = {**DISAGGREGATED, "ranks": 1, "path": teacher}
    exact = _run(2, manifest, tmp_path / "whole", {}, roles=roles, **keys)
    short = _run(2, manifest, tmp_path / "float8", {}, roles=roles, transfer_dtype="float8", **keys)
    errors = [abs(a["kl"] - b["kl"]) / b["kl"] for a, b in zip(short, exact, strict=True)]
    assert 0 < max(errors) < 0.02


def _stored(
    topology: Topology, manifest: str, folder: str, loss: dict[str, Any], teacher: dict[str, Any]
) -> str | None:
    """The result of `store-targets`, of ranks that hold the vocabulary and the teacher's stages between them."""
    base = recipe(Path(manifest), Path(folder) / "no-run").snapshot()
    section = {**teacher, "save_targets": folder}
    train = {**base["train"], "micro_batch": BATCH // topology.world}
    changes = {"objective": "distill", "teacher": section, "loss": loss, "train": train}
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    setup = prepare(Recipe.model_validate({**base, **changes}), launch)
    return store_on_ranks(setup, topology, STEPS, lambda stage, **numbers: None)


@pytest.mark.parametrize(("name", "worlds"), [("sampled", (1, 2)), ("top-p", (2,))])
def test_stored_targets_teach_as_the_live_teacher_does(
    manifest: Path, teacher: Path, tmp_path: Path, name: str, worlds: tuple[int, ...]
) -> None:
    """Stored beside a live run, or made by the teacher alone on `worlds` ranks: the run from them is the same to the
    last digit, and has no teacher in memory."""
    loss = LOSSES[name]
    live = _run(2, manifest, tmp_path / "live", loss, path=teacher, save_targets=tmp_path / "beside")
    stored: dict[str, Any] = {"source": "stored", "targets": tmp_path / "beside"}
    assert _run(2, manifest, tmp_path / "from-beside", loss, stops=(2, None), **stored) == live
    for world in worlds:
        folder = tmp_path / f"{world}"
        message = run_ranks(world, _stored, str(manifest), str(folder), loss, {"path": str(teacher)})
        assert f"targets of {STEPS * BATCH} sequences" in message[0]
        numbers = _run(2, manifest, tmp_path / f"from-{world}", loss, source="stored", targets=folder)
        if world == 1:  # other slices of the vocabulary: the sums behind the probabilities have another order
            _assert_alike(numbers, live)
        else:
            assert numbers == live


def test_stored_targets_of_another_run_are_refused(manifest: Path, teacher: Path, tmp_path: Path) -> None:
    run_ranks(1, _stored, str(manifest), str(tmp_path / "kept"), LOSSES["sampled"], {"path": str(teacher)})
    section = {"source": "stored", "targets": str(tmp_path / "kept")}
    for loss, says in (({"targets": {"draws": 9}}, "loss.targets was"), (LOSSES["top-p"], "loss.targets was")):
        (message,) = run_ranks(1, _distill, str(manifest), str(tmp_path / "run"), loss, section, None, {})
        assert says in message
    (message,) = run_ranks(
        1, _distill, str(manifest), str(tmp_path / "run"), LOSSES["sampled"], section, None, {"seed": 3}
    )
    assert "the seed was 1, is 3" in message


def test_the_log_has_the_numbers_of_the_recipes_options(manifest: Path, teacher: Path, tmp_path: Path) -> None:
    lines = _run(1, manifest, tmp_path / "run", ROUTED, path=teacher)
    assert [line["kd_weight"] for line in lines] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert [line["kd_weight"] + line["ce_weight"] for line in lines] == pytest.approx([1.0] * STEPS)
    assert ["diagnostics" in line for line in lines] == [False, True, False, True, False]
    for line in (lines[1], lines[3]):
        closer = line["diagnostics"]
        assert 0 < closer["acceptance"] < 1
        assert 0 < closer["jsd"] < closer["reverse_kl"]
        assert 0 < closer["top_16_mass"] < closer["top_64_mass"] < closer["top_256_mass"] <= 1 + 1e-6
        assert len([name for name in closer if name.startswith("kl_entropy_decile_")]) == 10
        assert line["divergence"] != line["kl"]
    last = lines[-1]
    assert last["loss"] == pytest.approx(last["student_ce"], rel=1e-6), "at the end the label has all the weight"
    assert lines[2]["loss"] != pytest.approx(lines[2]["divergence"], rel=1e-3), "some tokens learn from the label"


def test_a_teacher_of_other_ids_teaches_the_same_through_a_map(manifest: Path, teacher: Path, tmp_path: Path) -> None:
    """The same teacher with its rows shuffled among others, and without the ids that the text never uses."""
    described = Manifest.load(manifest)
    U = described.vocab_size
    stream = TokenStream(described, seed=0, batch_slots=1, rank=0, world_size=1)
    every = stream.batch(range(described.sequences))
    used = torch.zeros(U, dtype=torch.bool)
    used[every.tokens.flatten()] = used[every.labels.flatten()] = True
    assert not used.all(), "the case needs an id that the text does not use"
    shuffled = torch.randperm(U + 9, generator=torch.Generator().manual_seed(2))[:U]

    def mapped(name: str, ids: torch.Tensor, loss: dict[str, Any], world: int) -> list[dict[str, Any]]:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(ids.tolist()), encoding="utf-8")
        other = _teacher(tmp_path / f"{name}-teacher", described, ids)
        (other / "tokenizer.model").unlink()
        return _run(world, manifest, tmp_path / f"{name}-{world}", loss, path=other, vocab_map=path)

    assert mapped("all", shuffled, {}, 2) == _run(2, manifest, tmp_path / "same", {}, path=teacher), "to the last digit"
    gaps = torch.where(used, shuffled, -1)
    few = {"diagnostics_every": 1}
    two, one = mapped("some", gaps, few, 2), mapped("some", gaps, few, 1)
    assert all("reverse_kl" not in line["diagnostics"] for line in two), "it is infinite"
    assert all(line["kl"] > 0 for line in two)
    _assert_alike(two, one)


def test_a_token_that_the_teacher_has_no_id_for_stops_the_run(manifest: Path, teacher: Path, tmp_path: Path) -> None:
    described = Manifest.load(manifest)
    first = TokenStream(described, seed=1, batch_slots=BATCH, rank=0, world_size=1).batch(range(1)).tokens[0, 5]
    ids = torch.arange(described.vocab_size)
    ids[first] = -1
    path = tmp_path / "map.json"
    path.write_text(json.dumps(ids.tolist()), encoding="utf-8")
    paths = {"path": str(teacher), "vocab_map": str(path)}
    (message,) = run_ranks(1, _distill, str(manifest), str(tmp_path / "run"), {}, paths, None, {})
    assert f"no teacher's id for {int(first)}" in message
    assert "slot 0" in message
