"""Initial values under real ZeRO-3: bitwise those of one process, on any number of ranks, in every copy of a weight."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.distributed.topology import Topology
from megadistill.models import initial_weights
from megadistill.models.families import EMBEDDING, HEAD, family
from megadistill.models.initial_weights import initial_tensor
from megadistill.student.deepspeed_config import load_deepspeed_config
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import SEED, VOCAB, Case, build, config_of, run_steps

SMALL_BLOCK = 1000
"""Elements of a block, so that matrices of these tiny models have several."""


def _start(topology: Topology, case: Case, hpz: int) -> tuple[dict[str, Tensor], list[str], float]:
    """Values of a new student, names whose compute copies differ from them, and the loss of its first step."""
    initial_weights.BLOCK = SMALL_BLOCK  # in a process of its own
    deepspeed_config: dict[str, Any] = load_deepspeed_config(DS_CONFIGS / "cpu.json")
    deepspeed_config["zero_optimization"]["zero_hpz_partition_size"] = hpz
    student = build(case, topology, deepspeed_config)
    values, unlike = student.full_parameters(), student.state.params_differing_from_master()
    return values, unlike, run_steps(case, student, topology, range(1))[0]["loss"]


@pytest.mark.parametrize(
    "case",
    [
        Case(tied=True, persistence=10_000),
        Case(model_type="mixtral", precision="bfloat16"),
        Case(model_type="gemma2", offload_optimizer=True),
    ],
    ids=["tied, small parameters gathered", "experts, bfloat16", "Gemma's norms, optimizer offloaded"],
)
def test_values_are_those_of_one_process_on_any_ranks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial_weights, "BLOCK", SMALL_BLOCK)
    config, losses = config_of(case), []
    for world, hpz in ((1, 1), (2, 1), (4, 2)):
        case = replace(case, accumulation=4 // world)
        for values, unlike, loss in run_ranks(world, _start, case, hpz):
            assert unlike == []
            losses.append(loss)
            for name, value in values.items():
                rows = VOCAB if name in (EMBEDDING, HEAD) else value.shape[0]
                shape, norm = (rows, *value.shape[1:]), family(config).norm_init
                true = initial_tensor(name, shape, std=config.initializer_range, seed=SEED, norm=norm)
                assert torch.equal(value[:rows], true.to(getattr(torch, case.precision)).float()), (name, world)
                assert not value[rows:].any(), f"padding rows of {name}"
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6 if case.precision == "float32" else 1e-2)
