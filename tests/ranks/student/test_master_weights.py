"""bfloat16 parameters with float32 masters, against AdamW in float64 on the same gradients."""

import torch
from torch import Tensor

from megadistill.distributed.topology import Topology
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import RATE, Case, build, run_steps, train_section

CASE = Case(precision="bfloat16", accumulation=2)
STEPS = 3
Tensors = dict[str, Tensor]


def _masters(topology: Topology) -> tuple[Tensors, Tensors, list[Tensors], list[str], bool]:
    """The masters before and after; each step's gradients, before clipping; copies that are not their masters."""
    student = build(CASE, topology)
    first = student.full_parameters()
    run_steps(CASE, student, topology, range(STEPS))
    in_bf16 = all(parameter.dtype == torch.bfloat16 for parameter in student._model.parameters())
    differing = student.state.params_differing_from_master()
    return first, student.full_parameters(), student.gradients, differing, in_bf16


def _adamw(first: Tensors, gradients: list[Tensors]) -> Tensors:
    """AdamW in float64: clipped by the norm of all gradients, decoupled weight decay on matrices alone."""
    section = train_section(CASE, 1).optimizer
    parameters = {name: value.double().requires_grad_() for name, value in first.items()}
    groups = [
        {
            "params": [p for p in parameters.values() if (p.ndim >= 2) is decayed],
            "weight_decay": section.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(section.beta1, section.beta2), eps=section.epsilon)
    for step, of_step in enumerate(gradients):
        norm = torch.cat([gradient.double().flatten() for gradient in of_step.values()]).norm()
        for name, parameter in parameters.items():
            parameter.grad = of_step[name].double() * min(1.0, CASE.clip / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = RATE * (step + 1) / 3
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def test_masters_take_float32_steps_and_the_parameters_are_their_rounding() -> None:
    """A step moves a master by the rate at most; a float32 update is off by some 2^-20 of that.

    A master is rounded at each step, by 2^-24 of itself. A master in bf16 would be off by 2^-8 of itself, more than the
    steps are.
    """
    for first, masters, gradients, differing, in_bf16 in run_ranks(2, _masters):
        assert in_bf16
        assert differing == []
        assert len(gradients) == STEPS
        for name, true in _adamw(first, gradients).items():
            bound = STEPS * (2**-23 * first[name].abs() + 2**-20 * RATE)
            assert ((masters[name].double() - true).abs() <= bound).all(), name
            assert (masters[name] - first[name]).abs().max() > RATE / 10, name
