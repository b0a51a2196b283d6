"""Norms by layer from the partitions of real ranks, against the dense float64 model and torch's own optimizer."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.distributed.topology import Topology
from megadistill.models.families import family
from megadistill.models.initial_weights import initial_tensor
from megadistill.student.norms import groups_of
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import RATE, SEED, Case, build, config_of, dense_truth, run_steps, train_section

CASES = [
    (1, Case(tied=True)),
    (2, Case(accumulation=2)),
    (2, Case(clip=1e6, offload_optimizer=True, persistence=10_000)),
    (3, Case(accumulation=2)),
]
"""Clipped and not, accumulated, with an optimizer on the host, with surplus rows."""


Norms = dict[str, dict[str, float]]


def _three_steps(topology: Topology, case: Case) -> tuple[list[Norms | None], list[int], list[Tensor], list[Tensor]]:
    """Norms of three steps, of which the second takes none; host-device syncs of each; weights with norms, without."""
    weights, norms, syncs = [], list[Norms | None](), list[int]()
    for takes in (True, False):
        student = build(case, topology)
        assert student.norms is not None
        update = student._engine.optimizer.step
        student._engine.optimizer.step = partial(_counted, update, syncs if takes else [])
        for step in range(3):
            if takes and step != 1:
                student.norms.request()
            run_steps(case, student, topology, range(step, step + 1))
            if takes:
                norms.append(student.norms.reduced())
        weights.append(list(student.full_parameters().values()))
    return norms, syncs, weights[0], weights[1]


def _counted(update: Callable[[], None], syncs: list[int]) -> None:
    with _Syncs() as counted:
        update()
    syncs.append(counted.number)


class _Syncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


@cache
def _dense_norms(case: Case) -> list[Norms]:
    """Norms of each step: gradients of the dense model, updates by torch's clipping and AdamW, in float64."""
    truth, config, section = dense_truth(case), config_of(case), train_section(case, 1).optimizer
    shapes = {name: tensor.shape for name, tensor in truth.parameters.items()}
    values = {
        name: initial_tensor(name, shape, std=config.initializer_range, seed=SEED, norm=family(config).norm_init)
        for name, shape in shapes.items()
    }
    parameters = {name: torch.nn.Parameter(value.double()) for name, value in values.items()}
    groups = [
        {"params": [each for each in parameters.values() if (each.ndim >= 2) == is_matrix], "weight_decay": decay}
        for is_matrix, decay in ((True, section.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(section.beta1, section.beta2), eps=section.epsilon)
    norms = []
    for step, gradients in enumerate(truth.gradients):
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].double().clone()
        torch.nn.utils.clip_grad_norm_(parameters.values(), case.clip)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (step + 1) / 3
        optimizer.step()
        after = {name: parameter.detach() for name, parameter in parameters.items()}
        updates = {name: after[name] - before[name] for name in after}
        norms.append({"gradient": _grouped(gradients), "update": _grouped(updates), "weight": _grouped(after)})
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), truth.parameters[name], rtol=1e-9, atol=1e-12)
    return norms


def _grouped(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Norm of each layer, and of each module over all layers, as one long vector each."""
    groups: dict[str, list[Tensor]] = {"total": list(tensors.values())}
    for name, tensor in tensors.items():
        words = name.replace("model.", "").split(".")
        for group in (f"layers.{words[1]}", words[2]) if words[0] == "layers" else (words[0],):
            groups.setdefault(group, []).append(tensor)
    return {group: float(torch.cat([each.double().flatten() for each in own]).norm()) for group, own in groups.items()}


@pytest.mark.parametrize(("world", "case"), CASES)
def test_norms_are_those_of_the_dense_model(world: int, case: Case) -> None:
    true = _dense_norms(case)
    modules = {"embed_tokens", "norm", *(() if case.tied else ("lm_head",))}
    inside = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    for norms, syncs, with_norms, without in run_ranks(world, _three_steps, case):
        assert norms[1] is None, "no step but the requested ones"
        assert syncs == [1, 1, 1], "the global norm alone: those by layer are read later, at once"
        for step in (0, 2):
            assert {*norms[step]["gradient"]} == {"total", "layers.0", "layers.1", *modules, *inside}
            for kind, groups in true[step].items():
                assert norms[step][kind] == pytest.approx(groups, rel=2e-5), f"step {step}: {kind}"
        for ours, plain in zip(with_norms, without, strict=True):
            assert torch.equal(ours, plain), "norms must not move a bit"


def _not_finite(topology: Topology) -> tuple[bool, Norms | None]:
    student = build(Case(), topology)
    assert student.norms is not None
    student.norms.request()
    backward = student.backward

    def poisoned(loss: Tensor) -> None:
        backward(loss * math.nan)

    student.backward = poisoned  # type: ignore[method-assign]
    run_steps(Case(), student, topology, range(1))
    return student.norms.is_requested, student.norms.reduced()


def test_a_skipped_step_has_no_norms() -> None:
    assert run_ranks(2, _not_finite) == [(False, None)] * 2


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("total", "layers.3", "self_attn")),
        ("model.layers.12.mlp.experts.gate_up_proj", ("total", "layers.12", "mlp")),
        ("model.embed_tokens.weight", ("total", "embed_tokens")),
        ("model.norm.weight", ("total", "norm")),
        ("lm_head.weight", ("total", "lm_head")),
    ],
)
def test_groups_of_a_parameter(name: str, groups: tuple[str, ...]) -> None:
    assert groups_of(name) == groups
