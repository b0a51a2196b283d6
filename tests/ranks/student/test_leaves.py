"""Decoder layers as leaves of ZeRO-3: gradients, collectives of a step, memory that a released layer frees."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadistill.distributed.topology import Topology
from megadistill.models.experts import RouterCoefs
from megadistill.student import engine
from megadistill.student.deepspeed_config import load_deepspeed_config
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks
from tests.ranks.student.test_student import assert_matches, relative_error
from tests.ranks.student_cases import Case, RunResult, build, dense_truth, global_batch, run_steps, three_steps
from tests.unit.models.test_compiled_layers import skip_untraced_experts

LAYERS = 10
ROUTED = RouterCoefs(aux=0.02, z=0.01)

thorough = pytest.mark.thorough


def _name(case: Case) -> str:
    parts = [case.model_type, case.activation_checkpointing, "compiled" * case.compiled, "tied" * case.tied]
    return ", ".join(part for part in parts if part)


def _compile_by(backend: str) -> None:
    """Sets the backend of a rank's process: inductor would write C++ for half a minute, of the same graphs."""
    torch.compile = partial(torch.compile, backend=backend)


def _compiled_steps(topology: Topology, case: Case, backend: str) -> RunResult:
    _compile_by(backend)
    return three_steps(topology, case)


@pytest.mark.parametrize(
    "case",
    [
        Case(compiled=True, accumulation=2, activation_checkpointing="full", document_mask=True),
        Case(compiled=True, accumulation=2, tied=True, model_type="qwen3_moe", router_coefs=ROUTED),
        *[
            pytest.param(Case(compiled=True, accumulation=2, activation_checkpointing=mode, **keys), marks=thorough)
            for mode in ("none", "selective", "full")
            for keys in ({"tied": True}, {"model_type": "gemma2"}, {"model_type": "mixtral", "router_coefs": ROUTED})
        ],
    ],
    ids=_name,
)
def test_compiled_leaves_equal_the_dense_truth(case: Case) -> None:
    skip_untraced_experts(case.model_type)
    for result in run_ranks(2, _compiled_steps, case, "aot_eager"):
        assert_matches(result, dense_truth(case), case=case)


@thorough
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_kernels_of_inductor_equal_the_dense_truth(model_type: str) -> None:
    skip_untraced_experts(model_type)
    case = Case(compiled=True, accumulation=2, activation_checkpointing="full", model_type=model_type)
    for result in run_ranks(2, _compiled_steps, case, "inductor", deadline=400.0):
        assert_matches(result, dense_truth(case), case=case)


@thorough
def test_bfloat16_gradients_of_compiled_leaves_are_as_exact_as_eager_ones() -> None:
    case = Case(precision="bfloat16", accumulation=2, activation_checkpointing="full")
    true = dense_truth(case).gradients[0]
    eager = run_ranks(2, three_steps, case)[0].gradients[0]
    compiled = run_ranks(2, _compiled_steps, replace(case, compiled=True), "aot_eager")[0].gradients[0]
    for name, gradient in true.items():
        errors = [relative_error(each[name][: gradient.shape[0]], gradient) for each in (eager, compiled)]
        assert errors[1] < 1.25 * errors[0] < 0.05, name


@dataclass(frozen=True)
class Traffic:
    """Collectives of a step: by operator, the calls and the bytes sent and filled."""

    calls: Counter[str]
    nbytes: Counter[str]


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a rank asks of its process groups."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._opname.strip("_")
            self.calls[name] += 1
            self.nbytes[name] += sum(each.nbytes for each in tree_leaves(arguments) if isinstance(each, torch.Tensor))
        return function(*arguments, **(keywords or {}))


def _proportioned(case: Case) -> dict[str, Any]:
    """DeepSpeed's settings in the proportions of zero3.json and an 8B student: four to five layers stay."""
    settings = load_deepspeed_config(DS_CONFIGS / "cpu.json")
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    settings["zero_optimization"].update(
        stage3_max_reuse_distance=int(4.6 * layer), stage3_max_live_parameters=int(4.6 * layer)
    )
    return settings


def _traffic_of_a_step(topology: Topology, case: Case, leaves: bool) -> Traffic:
    """Collectives of the fifth step. Without `leaves`: hooks in each module, a quarter of a layer ahead, as before."""
    settings = _proportioned(case)
    if not leaves:
        vars(engine)["set_z3_leaf_module"] = lambda module, flag: None
        settings["zero_optimization"]["stage3_prefetch_bucket_size"] = 7_000
    student: Any = build(case, topology, settings)
    student.__class__ = engine.StudentEngine  # the watched one gathers gradients
    run_steps(case, student, topology, range(4))
    with _Collectives() as collectives:
        run_steps(case, student, topology, range(4, 5))
    return Traffic(collectives.calls, collectives.nbytes)


@pytest.mark.parametrize(
    ("mode", "gathers", "before"),
    [("none", 33, 84), pytest.param("full", 33, 95, marks=thorough)],
)
def test_a_layer_is_gathered_by_one_call(mode: Any, gathers: int, before: int) -> None:
    case = Case(objective="labels", layers=LAYERS, activation_checkpointing=mode)
    whole, parts = (run_ranks(2, _traffic_of_a_step, case, leaves)[0] for leaves in (True, False))
    assert whole.calls["allgather_base"] == gathers
    assert parts.calls["allgather_base"] == before
    assert whole.nbytes["allgather_base"] <= parts.nbytes["allgather_base"]
    for name in ("allreduce", "reduce_scatter_base"):
        assert (whole.calls[name], whole.nbytes[name]) == (parts.calls[name], parts.nbytes[name])


def _alive_after_release(topology: Topology, case: Case) -> tuple[int, int]:
    """(released parameters of layers, those whose gathered memory still lives) between forward and backward."""
    _compile_by("aot_eager_decomp_partition")
    settings = load_deepspeed_config(DS_CONFIGS / "cpu.json")
    settings["zero_optimization"].update(stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)
    student = build(case, topology, settings)
    run_steps(case, student, topology, range(3))
    layers: Any = student._model.get_submodule("model.layers")
    gathered: list[tuple[Any, Any]] = []

    def remember(layer: Any, *_: Any) -> None:
        reference: Any = StorageWeakRef
        gathered.extend((each, reference(each.untyped_storage())) for each in layer.parameters())

    for layer in layers:
        layer.register_forward_hook(remember, prepend=True)  # before DeepSpeed releases it
    tokens = global_batch(0).tokens[:2]
    hidden = student.hidden(tokens)
    released = [storage for parameter, storage in gathered if parameter.ds_status.name == "NOT_AVAILABLE"]
    alive = sum(not storage.expired() for storage in released)
    assert hidden.requires_grad
    return len(released), alive


@pytest.mark.parametrize(
    "case",
    [
        Case(objective="labels", compiled=True),
        Case(objective="labels", activation_checkpointing="selective"),
        Case(objective="labels", activation_checkpointing="full"),
        *[
            pytest.param(Case(objective="labels", compiled=True, activation_checkpointing=mode), marks=thorough)
            for mode in ("selective", "full")
        ],
        pytest.param(Case(objective="labels", compiled=True, model_type="mixtral"), marks=thorough),
    ],
    ids=_name,
)
def test_a_released_layer_is_freed(case: Case) -> None:
    """Nothing that is kept for the backward pass is a view of a gathered parameter."""
    skip_untraced_experts(case.model_type)
    for released, alive in run_ranks(2, _alive_after_release, case):
        assert released >= 9
        assert alive == 0


def _reproduced(topology: Topology, case: Case) -> float:
    _compile_by("aot_eager")
    student = build(case, topology)
    return run_steps(case, student, topology, range(1), recompute=True)[0]["loss"]


def test_a_micro_batch_is_computed_twice_by_the_same_code() -> None:
    """The second pass, without gradients, must not be compiled anew: its sums would be rounded in other places."""
    skip_untraced_experts("qwen3_moe")
    case = Case(compiled=True, model_type="qwen3_moe", router_coefs=ROUTED)
    assert all(loss > 0 for loss in run_ranks(2, _reproduced, case))
