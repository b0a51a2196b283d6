"""The ZeRO-3 student against one dense float64 process: loss, every gradient, gradient norm, three optimizer steps."""

import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megadistill.distributed.topology import Topology
from megadistill.train.checkpoint.format import newest_checkpoint
from megadistill.types import document_positions
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import VOCAB, Case, RunResult, build, dense_truth, global_batch, run_steps, three_steps
from tests.unit.train.cases import save_checkpoint

# (world, vocab group, accumulation, tied): every value of each, and the layouts with something of their own
LAYOUTS = [
    (1, 1, 1, False),
    (1, 1, 2, True),
    (2, 2, 1, False),
    (2, 2, 2, True),
    (2, 1, 2, False),
    (4, 4, 1, True),
    (4, 4, 2, False),
    (4, 2, 1, False),
    (4, 2, 2, True),
    (4, 1, 1, True),
    (4, 1, 2, False),
]


@cache
def truth(case: Case) -> RunResult:
    return dense_truth(case)


def relative_error(result: Tensor, true: Tensor) -> float:
    return float((result.double() - true.double()).norm() / true.double().norm().clamp_min(1e-30))


def assert_matches(result: RunResult, true: RunResult, *, case: Case) -> None:
    for step, (ours, theirs) in enumerate(zip(result.steps, true.steps, strict=True)):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-6, abs=1e-7), f"step {step}: {name}"
        assert theirs["grad_norm"] > 2 * case.clip, "clipping must be active, or the case does not test it"
    for step, (ours_all, theirs_all) in enumerate(zip(result.gradients, true.gradients, strict=True)):
        assert ours_all.keys() == theirs_all.keys(), "Hugging Face's own names, none missing"
        for name, gradient in theirs_all.items():
            rows = gradient.shape[0]
            error = relative_error(ours_all[name][:rows], gradient)
            assert error < 5e-6, f"step {step}: gradient of {name} is off by {error:.1e}"
            assert not ours_all[name][rows:].any(), f"padding rows of {name} have a gradient"
    for name, parameter in true.parameters.items():
        rows = parameter.shape[0]
        assert relative_error(result.parameters[name][:rows], parameter) < 5e-6, name
        assert not result.parameters[name][rows:].any(), f"padding rows of {name} moved"


@pytest.mark.parametrize(("world", "p", "accumulation", "tied"), LAYOUTS)
def test_distillation_equals_the_dense_truth(world: int, p: int, accumulation: int, tied: bool) -> None:
    case = Case(tied=tied, accumulation=accumulation)
    true = truth(Case(tied=tied))
    for result in run_ranks(world, three_steps, case, vocab_group=p):
        assert_matches(result, true, case=case)


# (replicas, ranks of each, vocab group, accumulation, tied)
REPLICAS = [(2, 1, 1, 1, False), (2, 2, 2, 2, True), (2, 2, 1, 1, False), (4, 1, 1, 2, True)]


@pytest.mark.parametrize(("replicas", "shard", "p", "accumulation", "tied"), REPLICAS)
def test_replicas_equal_the_dense_truth(replicas: int, shard: int, p: int, accumulation: int, tied: bool) -> None:
    case = Case(tied=tied, accumulation=accumulation, persistence=500)
    true = truth(Case(tied=tied))
    results = run_ranks(replicas * shard, three_steps, case, vocab_group=p, replicas=replicas)
    for result in results:
        assert_matches(result, true, case=case)
        assert result.steps == results[0].steps
        for name, parameter in result.parameters.items():
            assert torch.equal(parameter, results[0].parameters[name]), f"replicas hold other bits of {name}"


# (replicas, ranks of each, vocab group, accumulation, tied): 8 rows do not divide over three ranks, nor 256 rows of the
# vocabulary. With two micro-batches of two rows on each of three ranks the third rank is all surplus.
UNEVEN = [(3, 1, 1, 1, False), (1, 3, 3, 1, True), (1, 3, 1, 2, False), (3, 1, 1, 2, True), (1, 2, 2, 3, False)]


@pytest.mark.parametrize(("replicas", "shard", "p", "accumulation", "tied"), UNEVEN)
def test_a_batch_that_does_not_divide_equals_the_dense_truth(
    replicas: int, shard: int, p: int, accumulation: int, tied: bool
) -> None:
    case = Case(tied=tied, accumulation=accumulation)
    true = truth(Case(tied=tied))
    for result in run_ranks(replicas * shard, three_steps, case, vocab_group=p, replicas=replicas):
        assert_matches(result, true, case=case)


@pytest.mark.parametrize(("world", "p", "accumulation", "tied"), [(1, 1, 1, False), (2, 2, 2, False), (4, 2, 1, True)])
def test_training_from_labels_equals_the_dense_truth(world: int, p: int, accumulation: int, tied: bool) -> None:
    case = Case(objective="labels", tied=tied, accumulation=accumulation)
    true = truth(Case(objective="labels", tied=tied))
    for result in run_ranks(world, three_steps, case, vocab_group=p):
        assert_matches(result, true, case=case)


@pytest.mark.parametrize(
    "case",
    [
        Case(persistence=10_000, tied=True),
        Case(activation_checkpointing="full"),
        Case(activation_checkpointing="selective", accumulation=2),
        Case(offload_optimizer=True, tied=True),
        Case(document_mask=True),
        Case(document_mask=True, accumulation=3),
        Case(document_mask=True, model_type="qwen3", activation_checkpointing="full"),
        Case(model_type="qwen2"),
        Case(model_type="qwen3", tied=True),
        Case(model_type="mistral"),
    ],
    ids=[
        "small parameters stay gathered",
        "activation checkpointing",
        "selective checkpointing, accumulation",
        "optimizer offloaded",
        "documents masked",
        "documents masked, surplus rows",
        "documents masked, activation checkpointing",
        "qwen2",
        "qwen3",
        "mistral",
    ],
)
def test_variants_equal_the_dense_truth(case: Case) -> None:
    for result in run_ranks(2, three_steps, case):
        assert_matches(result, truth(case), case=case)


def _steps_with_a_restart(topology: Topology, case: Case, folder: str, first: int, last: int) -> RunResult:
    """Steps `first` to `last`; from step 0 freshly built, else from what an earlier call left in `folder`."""
    student = build(case, topology)
    if first > 0:
        checkpoint = newest_checkpoint(Path(folder))
        assert checkpoint is not None
        assert checkpoint.manifest.step == first
        checkpoint.verify()
        student.state.load(checkpoint.read)
    steps = run_steps(case, student, topology, range(first, last))
    state = {**student.state.snapshot(), "rng": torch.get_rng_state()}
    save_checkpoint(Path(folder), state, last, rank=topology, parameters=student.state.shapes)
    return RunResult(steps=steps, gradients=student.gradients, parameters=student.full_parameters())


@pytest.mark.parametrize("persistence", [0, 10_000])
def test_a_resume_is_bitwise_on_the_same_world(tmp_path_factory: pytest.TempPathFactory, persistence: int) -> None:
    """Weight decay is in one of two groups, so that hyperparameters which a resume loses are noticed."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    case = Case(tied=True, accumulation=2, persistence=persistence)
    whole = run_ranks(2, three_steps, case)[0]
    run_ranks(2, _steps_with_a_restart, case, folder, 0, 2)
    resumed = run_ranks(2, _steps_with_a_restart, case, folder, 2, 3)[0]
    assert resumed.steps[0] == whole.steps[2]
    for name, parameter in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter), name


@pytest.mark.parametrize(
    ("layouts", "tied"),
    [
        (((1, 2), (1, 1), (1, 4)), False),
        (((1, 4), (1, 2), (1, 1)), False),
        (((1, 4), (1, 3), (1, 4)), True),
        (((2, 2), (3, 1), (1, 4)), False),
        (((1, 3), (2, 1), (1, 3)), False),
    ],
    ids=["2, 1, 4", "4, 2, 1", "4, 3, 4", "2x2, 3x1, 1x4", "3, 2x1, 3"],
)
def test_a_run_goes_from_layout_to_layout_and_on(
    tmp_path_factory: pytest.TempPathFactory, layouts: tuple[tuple[int, int], ...], tied: bool
) -> None:
    """A step on each (replicas, ranks of each), resumed from what the one before saved, which itself had resumed.

    The vocabulary's padding is that of the layout: 256 rows on 1, 2 and 4 ranks, 258 on 3.
    """
    folder, case = str(tmp_path_factory.mktemp("checkpoints")), Case(tied=tied)
    true = truth(case)
    for step, (replicas, shard) in enumerate(layouts):
        arguments = (case, folder, step, step + 1)
        result = run_ranks(replicas * shard, _steps_with_a_restart, *arguments, replicas=replicas)[0]
        embedding = result.parameters["model.embed_tokens.weight"]
        assert embedding.shape[0] == (258 if shard == 3 else 256)
        assert not embedding[VOCAB:].any(), "padding rows moved"
        for name, value in true.steps[step].items():
            assert result.steps[0][name] == pytest.approx(value, rel=2e-6, abs=1e-7), f"step {step}: {name}"
        assert result.steps[0]["loss"] == pytest.approx(true.steps[step]["loss"], rel=1e-6)
    for name, parameter in true.parameters.items():
        assert relative_error(result.parameters[name][: parameter.shape[0]], parameter) < 5e-6, name


def _layer_forwards(topology: Topology, case: Case) -> int:
    student = build(case, topology)
    ran = 0

    def count(*_: object) -> None:
        nonlocal ran
        ran += 1

    # Before the forward, not after: a recomputation ends as soon as it has what it needs.
    student._model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(count)
    run_steps(case, student, topology, range(1))
    return ran


def test_activation_checkpointing_computes_each_layer_twice() -> None:
    assert run_ranks(1, _layer_forwards, Case()) == [1]
    assert run_ranks(1, _layer_forwards, Case(activation_checkpointing="full")) == [2]


def _loaded_back_after_a_step(topology: Topology, case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """The same step twice, from the same state: the second time it is loaded into an engine that has moved on."""
    student = build(case, topology)
    run_steps(case, student, topology, range(1))
    state = student.state.snapshot()
    (first,) = run_steps(case, student, topology, range(1, 2))
    student.state.load(lambda key, start, stop: state[key])  # each rank reads back its own pieces
    (second,) = run_steps(case, student, topology, range(1, 2))
    return first, second


def test_a_load_reaches_the_parameters_that_stay_gathered() -> None:
    """Small parameters are not gathered again by a forward; they would keep what they had before the load."""
    for first, second in run_ranks(2, _loaded_back_after_a_step, Case(persistence=10_000, tied=True)):
        assert first == second


def _documents_alone_and_together(topology: Topology, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states of a row of three documents, and of each by itself, in a row of its own."""
    student = build(case, topology)
    tokens = global_batch(0).tokens[topology.rank : topology.rank + 1]
    bounds = [0, 5, 6, tokens.shape[1]]
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, bounds[:-1]] = True
    together = student.hidden(tokens, document_positions(starts)).detach()
    pairs = list(itertools.pairwise(bounds))
    alone = [student.hidden(tokens[:, start:stop].contiguous()).detach() for start, stop in pairs]
    return [together[start:stop] for start, stop in pairs], alone


def test_a_document_does_not_depend_on_its_neighbours() -> None:
    for together, alone in run_ranks(2, _documents_alone_and_together, Case()):
        for packed, single in zip(together, alone, strict=True):
            torch.testing.assert_close(packed, single, rtol=1e-5, atol=1e-6)
