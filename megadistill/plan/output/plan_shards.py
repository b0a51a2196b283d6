"""The part of a plan on replicas of the student: candidates for `distributed.shard`, and the advised one."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megadistill.plan.replica_deaths import fixed_ranks
from megadistill.plan.shards import MOST_ALL_REDUCE, ShardCandidate, best_shard
from megadistill.units import readable, spell


def shards_table(candidates: Sequence[ShardCandidate], own: int, table: Table) -> RenderableType:
    """A row for each candidate in an empty `table`; `own`: ranks of a replica in the layout that the plan describes."""
    for heading in ("ranks", "replicas", "mem", "a step", "all-reduce", "latency", "goodput", "restarts"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in candidates:
        run, times = each.estimate.sharding, each.estimate.times
        share = f"{each.all_reduce / times.step:.1%}" if run.replicas > 1 else "-"
        goodputs = (f"{each.goodput:.2%}", f"{each.goodput_with_restarts:.2%}")
        ranks = f"{run.shard:,}{'*' if run.shard == own else ''}"
        memory = readable(each.estimate.memory, "B") + ("" if each.estimate.fits else ": too much")
        latency = spell(each.estimate.latency.together)
        table.add_row(ranks, f"{run.replicas:,}", memory, spell(times.step), share, latency, *goodputs)
    return Group(Text("Ranks of a replica of the student", style="bold"), table, Text(_note(candidates), style="dim"))


def _note(candidates: Sequence[ShardCandidate]) -> str:
    text = (
        "* of this plan. all-reduce: of the gradients across replicas, of a step; it is waited for. latency: of all "
        "collectives, hidden or not. goodput: a replica dies alone; restarts: each fault ends the run."
    )
    best = best_shard(tuple(candidates))
    if best is None:
        return text
    run, deaths = best.estimate.sharding, best.advice.costs.deaths
    if run.replicas == 1:
        return f"{text}\nAdvised: one copy (distributed.shard=null)."
    is_short = best.all_reduce <= MOST_ALL_REDUCE * best.estimate.times.step
    text += (
        f"\nAdvised: distributed.shard={run.shard}. The all-reduce takes {spell(best.all_reduce)}, "
        f"{'less' if is_short else 'more'} than {MOST_ALL_REDUCE:.0%} of a step"
        f"{': too little to overlap it with the backward pass' if is_short else ''}."
    )
    if deaths.share:
        text += (
            f" {deaths.share:.0%} of the faults end one replica: all wait for {spell(deaths.pause)}, and 1 in "
            f"{run.replicas} of the throughput is missing for {spell(deaths.replacement)}, if a spare node is at hand."
        )
    elif (setting := fixed_ranks(run.recipe)) is not None:
        text += f" Each fault is a restart: replicas that come and go do not work with {setting}."
    return text


def shards_json(candidates: Sequence[ShardCandidate]) -> dict[str, Any] | None:
    """The candidates, and the advised number of ranks; None where there is nothing to choose."""
    best = best_shard(tuple(candidates))
    if not candidates:
        return None
    return {
        "advised": None if best is None else best.estimate.sharding.shard,
        "candidates": [
            {
                "shard": each.estimate.sharding.shard,
                "replicas": each.estimate.sharding.replicas,
                "memory_bytes": each.estimate.memory,
                "fits": each.estimate.fits,
                "step_seconds": each.estimate.times.step,
                "all_reduce_seconds": each.all_reduce,
                "latency_seconds": each.estimate.latency.together,
                "goodput": each.goodput,
                "goodput_with_restarts": each.goodput_with_restarts,
                "useful_tokens_per_second": each.useful_tokens_per_second,
                "death_cost_seconds": each.advice.costs.deaths.cost,
            }
            for each in candidates
        ],
    }
