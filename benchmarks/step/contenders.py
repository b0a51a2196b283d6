"""The contenders of a rank: our step, its matrix products, the obvious script, TRL's trainer."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.collective_calls import Collectives
from benchmarks.measure import Run, high_water, reset_high_water
from benchmarks.step.obvious_script import ObviousScript
from benchmarks.step.products import BareProducts, record_products
from benchmarks.step.sizes import IN_TURN, SEQUENCES, SIZES, Features, Size, built_with, setup_of
from benchmarks.step.trl_step import TrlStep
from megadistill.distributed.topology import Topology
from megadistill.precision import torch_dtype
from megadistill.student.deepspeed_config import PERSISTENCE, build_engine_config
from megadistill.train.build import build, objective_of, stream_of
from megadistill.train.lookahead import StepBatches
from megadistill.train.setup.setup import Setup
from megadistill.train.step import StepOutcome, train_step
from megadistill.types import TokenBatch

OURS, PRODUCTS, SCRIPT, TRL = "ours", "its products", "obvious script", "TRL"
PLAIN = "its products, as plain calls"
CALLS, SENT = "calls of collectives", "bytes sent by a rank"
"""Counts of one step."""
LEARNING_RATE = 1e-6
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu`: of all threads of a rank, for a machine on which others work too: waiting is not counted."""


def our_step(topology: Topology, folder: Path, size: Size, features: Features) -> Callable[[], StepOutcome]:
    """The whole step of a run: stream, teacher, student, loss, optimizer."""
    setup = setup_of(topology, folder, size, features)
    if not features.leaves:
        setup = replace(setup, deepspeed_config=without_leaf_settings(setup.deepspeed_config))
    with built_with(features):
        student, teacher = build(setup, topology)
    student.load_weights(folder / "student")
    objective = objective_of(setup)
    batches = StepBatches(iter(stream_of(setup, topology, start=None)), teacher, micro_batch=size.micro_batch)

    def step() -> StepOutcome:
        batch = next(batches)
        return train_step(student, batch, step=1, learning_rate=LEARNING_RATE, objective=objective, topology=topology)

    return step


def script_step(topology: Topology, folder: Path, size: Size) -> Callable[[], Tensor]:
    """The obvious script on the same batches."""
    setup = setup_of(topology, folder, size, Features())
    script = obvious_script(topology, folder, setup)
    batches = batches_of(setup, topology)
    return lambda: script.step(next(batches).tokens.to(topology.device))


def obvious_script(topology: Topology, folder: Path, setup: Setup) -> ObviousScript:
    """The script with its models and its engine."""
    config = config_of_others(setup)
    return ObviousScript(folder / "student", folder / "teacher", engine_config=config, device=topology.device)


def config_of_others(setup: Setup) -> dict[str, Any]:
    """DeepSpeed's configuration for an engine without leaves: otherwise that of our run."""
    deepspeed_config = without_leaf_settings(setup.deepspeed_config)
    return build_engine_config(deepspeed_config, setup.recipe.train, setup.accumulation, ranks=setup.ranks)


def without_leaf_settings(deepspeed_config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own default of small parameters that stay gathered: without leaves, each would be gathered alone."""
    zero = {key: value for key, value in deepspeed_config["zero_optimization"].items() if key != PERSISTENCE}
    return {**deepspeed_config, "zero_optimization": zero}


def trl_step(topology: Topology, folder: Path, size: Size) -> Callable[[], None]:
    """TRL's trainer on the same sequences. No other model after it."""
    setup = setup_of(topology, folder, size, Features())
    own = islice(batches_of(setup, topology), SEQUENCES // (size.micro_batch * topology.world))
    return TrlStep(
        folder / "student",
        folder / "teacher",
        [row for batch in own for row in batch.tokens.tolist()],
        micro_batch=size.micro_batch,
        engine_config=config_of_others(setup),
        topology=topology,
        folder=folder,
    ).step


def batches_of(setup: Setup, topology: Topology) -> Iterator[TokenBatch]:
    """This rank's batches, as a run reads them."""
    for batch, _ in stream_of(setup, topology, start=None):
        yield batch


def others() -> tuple[str, ...]:
    """The contenders beside ours that are installed; TRL last."""
    return (SCRIPT, TRL) if find_spec("trl") is not None else (SCRIPT,)


CONTENDERS: dict[str, Callable[[Topology, Path, Size], Callable[[], object]]] = {
    OURS: partial(our_step, features=Features()),
    SCRIPT: script_step,
    TRL: trl_step,
}
"""Whole steps, by name."""


def products_of(topology: Topology, size: Size, step: Callable[[], object]) -> dict[str, BareProducts]:
    """The products of a step, recorded in one that follows one that fills the teacher's pipeline."""
    step()
    products, dtype = record_products(step), torch_dtype(size.precision)
    return {
        name: BareProducts(products, dtype=dtype, device=topology.device, allocates=name == PLAIN)
        for name in (PRODUCTS, PLAIN)
    }


def step_runs(topology: Topology, folder: Path, size: Size, names: tuple[str, ...], clock: str) -> dict[str, Run]:
    """Our step with all features, its products, and the others among `names`."""
    ours = our_step(topology, folder, size, Features())
    runs: dict[str, Run] = {OURS: ours, **products_of(topology, size, ours)}
    runs |= {name: CONTENDERS[name](topology, folder, size) for name in names if name not in runs}
    return timed(runs, clock, topology.device)


def feature_runs(topology: Topology, folder: Path, size: Size, names: tuple[str, ...], clock: str) -> dict[str, Run]:
    """Our step with each set of features among `names`, and the products of that with all, without recomputation."""
    steps = {name: our_step(topology, folder, size, IN_TURN[name]) for name in names if name in IN_TURN}
    runs: dict[str, Run] = {**steps, **products_of(topology, size, steps["+ compiled teacher"])}
    return timed(runs, clock, topology.device)


def device_runs(topology: Topology, folder: Path, size: Size, names: tuple[str, ...], clock: str) -> dict[str, Run]:
    """Our step with all features, on an accelerator."""
    return timed({OURS: our_step(topology, folder, size, Features())}, clock, topology.device)


def replica_runs(topology: Topology, folder: Path, size: Size, clock: str) -> dict[str, Run]:
    """Our step with all features, and what a rank calls and sends in one."""
    step = our_step(topology, folder, size, Features())

    def recorded(count: Callable[[Collectives], float]) -> float:
        with torch.compiler.set_stance("force_eager"), Collectives() as collectives:
            step()
        return count(collectives)

    counts = {
        CALLS: lambda collectives: float(sum(call.ranks > 1 for call in collectives.calls)),
        SENT: lambda collectives: sum(call.sent for call in collectives.calls),
    }
    runs = {name: partial(recorded, count) for name, count in counts.items()}
    return {**timed({OURS: step}, clock, topology.device), **runs}


def memory_runs(topology: Topology, folder: Path, small: Path, size: Size, name: str) -> dict[str, Run]:
    """The peak memory of a contender that is alone in its process: of two steps after two, without loading.

    It is counted from what is resident after two steps of a tiny model, so code and caches are left out.
    """

    def highest() -> float:
        warm_up = CONTENDERS[name](topology, small, SIZES["tiny"])
        warm_up()
        warm_up()
        del warm_up
        before = reset_high_water()
        step = CONTENDERS[name](topology, folder, size)
        step()
        step()
        reset_high_water()
        step()
        step()
        return float(high_water() - before)

    return {"peak": highest}


def timed(runs: Mapping[str, Run], clock: str, device: torch.device) -> dict[str, Run]:
    """The runs, each of which returns its seconds; the device has nothing left to do at both ends."""

    def seconds(run: Run) -> float:
        _synchronize(device)
        start = CLOCKS[clock]()
        result = run()
        _synchronize(device)
        stop = CLOCKS[clock]()
        del result
        return stop - start

    return {name: partial(seconds, run) for name, run in runs.items()}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
