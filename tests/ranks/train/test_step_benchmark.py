"""benchmarks.step: recorded products are those of the FLOP count, and the obvious script learns what ours learns."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks.step.contenders import batches_of, obvious_script, our_step
from benchmarks.step.products import ATTENTION_BLOCKS, BareProducts, Product, by_part, record_products
from benchmarks.step.sizes import SIZES, Features, Sizes, setup_of, write_files
from megadistill.distributed.topology import Topology
from megadistill.models.families import parameter_shapes
from megadistill.models.flops import flops_per_token
from tests.ranks.harness import run_ranks

WORLD, SIZE = 2, SIZES["tiny"]
FEATURES = Features(student_compile=False, teacher_compile=False, loss="eager")
TOKENS = WORLD * SIZE.tokens


@dataclass(frozen=True)
class Measured:
    """Results of a rank."""

    losses: list[tuple[float, float]]
    """(ours over all ranks, the script's over this one's tokens) of each step."""
    grad_norms: list[tuple[float, float]]
    products: dict[str, list[Product]]
    """Recorded products by `activation_checkpointing`."""


def _measure(topology: Topology, folder: Path) -> Measured:
    setup = setup_of(topology, folder, SIZE, FEATURES)
    ours = our_step(topology, folder, SIZE, FEATURES)
    script, batches = obvious_script(topology, folder, setup), batches_of(setup, topology)
    losses, norms = [], []
    for _ in range(2):
        outcome, loss = ours(), script.step(next(batches).tokens)
        losses.append((outcome.metrics["loss"], float(loss)))
        norms.append((outcome.grad_norm, float(script.engine.get_global_grad_norm())))
    recomputing = our_step(topology, folder, SIZE, replace(FEATURES, checkpointing="full"))
    recomputing()
    products = {"none": record_products(ours), "full": record_products(recomputing)}
    BareProducts(products["none"], dtype=torch.float32, device=topology.device)()
    return Measured(losses, norms, products)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    return run_ranks(WORLD, _measure, write_files(tmp_path_factory.mktemp("step") / "files", SIZE))


def matrices(sizes: Sizes, *, without: str = "nothing") -> int:
    """Elements of the layers' matrices."""
    shapes = parameter_shapes(SIZE.config(sizes))
    layers = {name: shape for name, shape in shapes.items() if "layers." in name and without not in name}
    return sum(prod(shape) for shape in layers.values() if len(shape) == 2)


def parts(measured: list[Measured], checkpointing: str) -> Mapping[str, int]:
    """FLOPs of all ranks."""
    total: Counter[str] = Counter()
    for rank in measured:
        total.update(by_part(rank.products[checkpointing], vocab_rows=SIZE.vocab // WORLD, teacher_width=96))
    return total


def test_the_recorded_products_are_those_of_the_flop_count(measured: list[Measured]) -> None:
    assert SIZE.teacher is not None
    flops = parts(measured, "none")
    student, teacher = (flops_per_token(SIZE.config(sizes), SIZE.sequence) for sizes in (SIZE.student, SIZE.teacher))
    assert flops["student"] == 3 * 2 * TOKENS * matrices(SIZE.student)
    assert flops["teacher"] == 2 * TOKENS * matrices(SIZE.teacher)
    assert flops["heads"] == TOKENS * (3 * student.head + teacher.head)
    # On and below the diagonal, in blocks; the backward pass has five products, of which one is the scores again.
    blocks = 1 + 1 / ATTENTION_BLOCKS
    assert flops["attention"] == blocks * TOKENS * (3.5 * student.attention + teacher.attention)
    assert sum(flops.values()) == pytest.approx(TOKENS * (3 * student.forward + teacher.forward), rel=0.03)


def test_recomputation_is_among_the_products(measured: list[Measured]) -> None:
    """A layer's last product is not: what it gives is not needed again."""
    again = parts(measured, "full")["student"] - parts(measured, "none")["student"]
    assert again == 2 * TOKENS * matrices(SIZE.student, without="down_proj")


def test_the_obvious_script_learns_what_ours_learns(measured: list[Measured]) -> None:
    for step in range(2):
        ours, norm = measured[0].losses[step][0], measured[0].grad_norms[step]
        assert sum(rank.losses[step][1] for rank in measured) / WORLD == pytest.approx(ours, rel=1e-5)
        assert norm[1] == pytest.approx(norm[0], rel=1e-4)
