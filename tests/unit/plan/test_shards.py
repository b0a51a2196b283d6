"""The choice of `distributed.shard`: by memory, then the step with its latency, then goodput; and what it rests on."""

import math
import random
from dataclasses import dataclass, replace
from unittest.mock import MagicMock

import pytest

from megadistill.accelerators import accelerator
from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.plan.checkpoint_interval import SaveCosts
from megadistill.plan.counts.model_stats import measure_models
from megadistill.plan.counts.traffic import ACROSS
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.layouts import Cluster, place
from megadistill.plan.output.plan_json import to_json
from megadistill.plan.plan_input import PlanInput
from megadistill.plan.replica_deaths import Deaths
from megadistill.plan.search import plan
from megadistill.plan.shards import MOST_ALL_REDUCE, TIGHT, ShardCandidate, best_shard, shard_candidates
from megadistill.plan.throughput import MfuAssumption
from tests.unit.models.test_flops import LLAMA3_8B
from tests.unit.plan.tiny import SLOWER, cluster, plan_input

NODES = 64
MFU = MfuAssumption()


def _large(*, memory_gb: float = 80.0, accumulation: int = 1) -> tuple[PlanInput, Cluster]:
    """Llama 3 8B on 512 GPUs of so much memory."""
    config = load_config(LLAMA3_8B, what="test")
    values = {"config": LLAMA3_8B, "activation_checkpointing": "full", "vocab_multiple": 512}
    batch = {"global_batch": 8 * NODES * accumulation, "precision": "bfloat16", "steps": 100_000}
    inputs = plan_input(teacher=None, student=values, train=batch)
    inputs = replace(inputs, stats=measure_models(config, None, sequence_length=8192), vocab_size=128_256)
    kind = accelerator("h100").model_copy(update={"memory_gb": memory_gb})
    return inputs, Cluster(NODES, 8, kind)


def _candidates(inputs: PlanInput, machines: Cluster, hours: float | None = None) -> dict[int, ShardCandidate]:
    main = estimate(place(inputs.recipe, inputs, machines), machines, MFU)
    seconds = None if hours is None else 3600 * hours
    return {each.estimate.sharding.shard: each for each in shard_candidates(main, inputs, MFU, between_faults=seconds)}


def _best(candidates: dict[int, ShardCandidate]) -> int:
    best = best_shard(tuple(candidates.values()))
    assert best is not None
    return best.estimate.sharding.shard


def test_a_model_that_fits_in_eight_ranks_needs_no_more_by_memory_and_one_that_does_not_gets_them() -> None:
    rare = 1e6  # hours between faults; and with accumulation the all-reduce is short against the step
    plenty = _candidates(*_large(accumulation=64), rare)
    assert list(plenty) == [8, 16, 32, 64, 128, 256, 512]
    memory = {shard: each.estimate.memory for shard, each in plenty.items()}
    assert sorted(memory.values(), reverse=True) == list(memory.values()), "fewer ranks have more of the student each"
    states = 18 * 8.03e9
    assert memory[16] - memory[64] == pytest.approx(states / 16 - states / 64, rel=0.01)
    assert _best(plenty) == 8
    tight = _candidates(*_large(accumulation=64, memory_gb=(memory[32] + memory[64]) / 2 / (1 - TIGHT) / 1e9), rare)
    assert tight[64].is_comfortable
    assert not tight[32].is_comfortable
    assert _best(tight) == 64
    nowhere = _candidates(*_large(memory_gb=memory[512] / 2e9))
    assert best_shard(tuple(nowhere.values())) is None


def test_more_ranks_have_more_latency_and_a_shorter_all_reduce() -> None:
    candidates = _candidates(*_large())
    latencies = [each.estimate.latency.together for each in candidates.values()]
    assert latencies[2:] == sorted(latencies[2:])
    assert latencies[-1] > 4 * latencies[3]
    reduces = [each.all_reduce for each in candidates.values()]
    assert reduces == sorted(reduces, reverse=True)
    assert reduces[-1] == 0, "one copy has nothing to add"
    bytes_ = 2 * 4 * candidates[64].estimate.sharding.partition_size * 7 / 8
    assert candidates[64].all_reduce == pytest.approx(bytes_ / 50e9), "a ring over eight replicas on as many nodes"


def test_the_all_reduce_of_the_chosen_shard_is_too_short_to_overlap() -> None:
    candidates = _candidates(*_large())
    chosen = candidates[_best(candidates)]
    assert chosen.all_reduce < MOST_ALL_REDUCE * chosen.estimate.times.step
    assert candidates[8].all_reduce > MOST_ALL_REDUCE * candidates[8].estimate.times.step
    assert _best(candidates) > 8


def test_latency_makes_more_ranks_slower() -> None:
    """Links of a hundred times the latency: what a ring over all ranks waits for then shows in the step."""
    inputs, machines = _large()
    kind = machines.accelerator.model_copy(update={"latency_us": {"all_gather": {512: 1e5}, "all_reduce": {512: 1e4}}})
    slow = _candidates(inputs, replace(machines, accelerator=kind))
    steps = {shard: each.estimate.times.step for shard, each in slow.items()}
    assert steps[512] > 1.5 * steps[64]
    assert _best(slow) < 128


def test_faults_make_replicas_better_than_one_copy() -> None:
    """Rare faults leave the step alone to decide; at one in half an hour goodput does."""
    often, rare = _candidates(*_large(), hours=0.5), _candidates(*_large(), hours=1e6)
    assert often[512].goodput == often[512].goodput_with_restarts, "one copy survives nothing"
    for shard in (16, 64, 256):
        assert often[shard].goodput > often[shard].goodput_with_restarts
        assert often[shard].goodput > 1.02 * often[512].goodput
    assert rare[64].goodput == pytest.approx(1.0, abs=1e-3)


@dataclass(frozen=True)
class _Row:
    """A candidate's numbers, as `best_shard` reads them."""

    shard: int
    tokens: float
    free: float
    """Fraction of a device's memory; negative: it does not fit."""
    all_reduce: float
    """Fraction of a step."""
    goodput: float = 1.0

    def candidate(self) -> ShardCandidate:
        estimate_, step = MagicMock(), 2.0
        estimate_.sharding.shard, estimate_.times.step = self.shard, step
        estimate_.fits, estimate_.margin = self.free >= 0, self.free * 80e9
        estimate_.cluster.accelerator.memory_bytes = 80e9
        estimate_.times.across, estimate_.times.micro_steps = self.all_reduce * step / 4, 4
        estimate_.tokens_per_second = self.tokens
        advice = MagicMock()
        advice.goodput.return_value = self.goodput
        return ShardCandidate(estimate_, advice)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        pytest.param([_Row(8, 100, 0.2, 0.0), _Row(16, 101, 0.2, 0.0)], 16, id="most tokens"),
        pytest.param([_Row(8, 90, 0.2, 0.0, 1.0), _Row(16, 100, 0.2, 0.0, 0.8)], 8, id="most useful tokens"),
        pytest.param([_Row(8, 99.81, 0.2, 0.0), _Row(16, 100, 0.2, 0.0)], 8, id="equal: fewer ranks"),
        pytest.param([_Row(8, 99.79, 0.2, 0.0), _Row(16, 100, 0.2, 0.0)], 16, id="not equal"),
        pytest.param([_Row(8, 100, 0.2, 0.011), _Row(16, 100, 0.2, 0.009)], 16, id="an all-reduce that shows"),
        pytest.param([_Row(8, 100, 0.2, 0.02), _Row(16, 100, 0.2, 0.02)], 8, id="all-reduces that all show"),
        pytest.param([_Row(8, 110, 0.2, 0.02), _Row(16, 100, 0.2, 0.0)], 8, id="it shows, and is faster"),
        pytest.param([_Row(8, 110, 0.09, 0.0), _Row(16, 100, 0.11, 0.0)], 16, id="a tight fit"),
        pytest.param([_Row(8, 110, -0.1, 0.0), _Row(16, 100, 0.01, 0.0)], 16, id="tight fits alone"),
        pytest.param([_Row(8, 100, 0.1, 0.01), _Row(16, 100, 0.2, 0.0)], 8, id="at both limits"),
        pytest.param([_Row(8, 110, -0.1, 0.0)], None, id="none fits"),
        pytest.param([], None, id="none"),
    ],
)
def test_the_best_shard_goes_by_memory_then_tokens_then_the_all_reduce_then_ranks(
    rows: list[_Row], best: int | None
) -> None:
    for order in (rows, rows[::-1]):
        chosen = best_shard(tuple(row.candidate() for row in order))
        assert (None if chosen is None else chosen.estimate.sharding.shard) == best


@pytest.mark.parametrize(
    ("nodes", "settings", "shards"),
    [
        pytest.param(4, {"vocab_group": 2}, [4, 8, 16], id="whole nodes"),
        pytest.param(6, {"vocab_group": 2}, [4, 8, 24], id="each twice the last at least, without 12"),
        pytest.param(6, {"vocab_group": 3}, [12, 24], id="whole groups"),
        pytest.param(4, {"vocab_group": 2, "sequence": 4}, [8, 16], id="ranks that share sequences"),
        pytest.param(4, {"vocab_group": 8}, [8, 16], id="groups of several nodes"),
        pytest.param(6, {"vocab_group": 2, "shard": 12}, [4, 8, 12, 24], id="the recipe's own too"),
        pytest.param(1, {"vocab_group": 2}, [], id="one node"),
    ],
)
def test_candidates_are_whole_nodes_and_groups(nodes: int, settings: dict[str, int], shards: list[int]) -> None:
    inputs = plan_input(teacher=None, distributed=settings, train={"global_batch": 48})
    candidates = _candidates(inputs, cluster(nodes, 4))
    assert list(candidates) == shards
    if shards:
        assert candidates[shards[-1]].estimate.sharding.recipe.distributed.shard is None, "one copy, of any ranks"


def test_one_copy_is_a_candidate_however_many_ranks_it_has() -> None:
    inputs, _ = _large(accumulation=4)
    assert list(_candidates(inputs, Cluster(256, 8, accelerator("h100")))) == [8, 16, 32, 64, 128, 256, 512, 2048]


def _simulated(costs: SaveCosts, interval: float, *, faults: int) -> float:
    """Goodput of a run in which each fault ends one replica, or with the rest of the chance the run."""
    chance, wall, useful, since = random.Random(1), 0.0, 0.0, 0.0
    deaths = costs.deaths
    for _ in range(faults):
        until = chance.expovariate(1 / costs.between_faults)
        steps = until * interval / (interval + costs.stall)
        wall += until
        if chance.random() < deaths.share:
            wall += deaths.pause + deaths.replacement / deaths.replicas
            useful, since = useful + steps, (since + steps) % interval
        else:
            wall += costs.restart
            useful, since = useful + steps - (since + steps) % interval, 0.0
    return useful / wall


@pytest.mark.parametrize("share", [0.0, 0.7, 0.95])
def test_goodput_with_survivors_is_that_of_simulated_faults(share: float) -> None:
    deaths = Deaths(share, pause=60.0, replacement=240.0, replicas=4)
    costs = SaveCosts(1.0, 0.0, 600.0, between_faults=10_800.0, deaths=deaths)
    assert costs.goodput(300.0) == pytest.approx(_simulated(costs, 300.0, faults=20_000), abs=0.003)


def test_a_run_that_survives_everything_needs_no_saves() -> None:
    costs = SaveCosts(1.0, 0.0, 600.0, 10_800.0, Deaths(1.0, pause=60.0, replacement=240.0, replicas=4))
    assert math.isinf(costs.best)
    assert costs.goodput(1e6) == pytest.approx(1 / (1 + 120 / 10_800), rel=1e-5)


@pytest.mark.parametrize(
    ("distributed", "says"),
    [
        ({"shard": 3}, r"distributed\.shard is 3, but the student has 8 ranks.*1, 2, 4, 8"),
        ({"shard": 4, "vocab_group": 8}, r"distributed\.vocab_group is 8, but a replica of the student"),
    ],
)
def test_what_a_run_with_replicas_refuses_is_refused_here(distributed: dict[str, int], says: str) -> None:
    inputs = plan_input(teacher=None, distributed=distributed)
    with pytest.raises(UserError, match=says):
        place(inputs.recipe, inputs, cluster(2, 4))


def _placed(shard: int | None) -> Estimate:
    inputs, machines = plan_input(teacher=None, distributed={"shard": shard, "vocab_group": 2}), cluster(2, 4)
    return estimate(place(inputs.recipe, inputs, machines), machines, MFU)


def test_states_are_those_of_a_replica_and_a_checkpoint_has_a_file_a_shard() -> None:
    whole, half = _placed(None), _placed(4)
    assert (half.sharding.replicas, half.sharding.shard) == (2, 4)
    assert half.sharding.accumulation == whole.sharding.accumulation, "the batch is over all ranks"
    assert half.sharding.partition_size == pytest.approx(2 * whole.sharding.partition_size, rel=0.01)
    assert half.requirements.checkpoint_bytes < whole.requirements.checkpoint_bytes, "fewer headers"
    assert ACROSS not in whole.requirements.traffic
    assert half.requirements.traffic[ACROSS].node == 0, "each replica is a node"
    assert half.layout.shard == 4
    assert whole.layout.shard == 0


def test_the_json_has_the_candidates_and_the_advised_one() -> None:
    result = plan(plan_input(teacher=None, distributed={"shard": 4}), cluster(2, 4, slower=SLOWER), MFU)
    values = to_json(result, law=None, price=None)
    assert [each["shard"] for each in values["replicas"]["candidates"]] == [4, 8]
    assert values["replicas"]["advised"] in (4, 8)
    assert values["own"]["shard"] == 4
    assert values["own"]["student_replicas"] == 2
    for each in values["best"]:
        setting = {4: [], 8: ["distributed.shard=null"]}[each["shard"]]
        assert [one for one in each["set"] if "distributed.shard" in one] == setting
