"""A plan as JSON values, each with its unit in its key."""

from dataclasses import asdict
from typing import Any

from megadistill.plan.checkpoint_interval import advise
from megadistill.plan.counts.disk_usage import signal_bytes
from megadistill.plan.estimate import Estimate, optimistic_mfu
from megadistill.plan.output.plan_shards import shards_json
from megadistill.plan.scaling_law import LOWEST_LOSS, PARAMETERS, TOKENS, Expectation
from megadistill.plan.search import EntryEstimate, Plan
from megadistill.plan.shards import shard_candidates
from megadistill.plan.validation_cost import validation_cost

FITTED_ON = {"parameters": PARAMETERS, "tokens": TOKENS, "nats_per_token_above": LOWEST_LOSS}


def to_json(
    plan: Plan, *, law: Expectation | None, price: float | None, between_faults: float | None = None
) -> dict[str, Any]:
    """`price`: of a GPU-hour; `between_faults`: see `advise`. `best` is cheapest first; `own` is null where the recipe
    cannot start on this cluster.

    Times and costs are those at the expected MFUs, and beside them `optimistic`. Where `no_forecast` is a reason, they
    are null.
    """
    kind, main = plan.cluster.accelerator, plan.main
    return {
        "cluster": {
            "nodes": plan.cluster.nodes,
            "gpus_per_node": plan.cluster.gpus_per_node,
            "gpu": kind.name,
            "memory_bytes": kind.memory_bytes,
            "peak_flop_per_second": kind.peak_flops(plan.inputs.recipe.train.precision),
            "node_bytes_per_second": kind.node_bandwidth,
            "network_bytes_per_second": kind.network_bandwidth,
        },
        "assumed": {
            **asdict(plan.mfu),
            "optimistic": asdict(optimistic_mfu(main.sharding, plan.mfu)) if main else None,
        },
        "price_per_gpu_hour": price,
        "fits": plan.own is not None and plan.own.fits,
        "refused": plan.refused,
        "no_forecast": plan.no_forecast,
        "low_precision_reduction": plan.low_precision_reduction,
        "tokens": main.requirements.tokens if main else None,
        "sequence_length_tokens": plan.inputs.stats.sequence_length,
        "vocabulary_ids": plan.inputs.vocab_size,
        "models": _models(main) if main else [],
        "checkpoint_bytes": main.requirements.checkpoint_bytes if main else None,
        "checkpoint_interval": _interval(main, between_faults) if main and not plan.no_forecast else None,
        "replicas": _shards(plan, main, between_faults) if main and not plan.no_forecast else None,
        "validation": _validation(main) if main and not plan.no_forecast else None,
        "teacher_bytes_per_token": _teacher_outputs(plan, main) if main else None,
        "chosen": {key: choice._asdict() for key, choice in main.sharding.choices.items()} if main else {},
        "other_checkpointing": _layout(plan, plan.checkpointing, price) if plan.checkpointing else None,
        "layouts_searched": plan.searched,
        "entries": [_entry(each, price) for each in plan.entries],
        "own": _layout(plan, plan.own, price) if plan.own else None,
        "best": [_layout(plan, each, price) for each in plan.best],
        "nearest": _layout(plan, plan.nearest, price) if plan.nearest else None,
        "scaling_law": {"source": "arXiv 2502.08606", "fitted_on": FITTED_ON, **asdict(law)} if law else None,
    }


def _entry(each: EntryEstimate, price: float | None) -> dict[str, Any]:
    shape = {"entry": each.recipe.entry, "steps": each.recipe.steps, "tokens": each.recipe.tokens}
    train, known = each.recipe.recipe.train, each.estimate
    return {
        **shape,
        "sequence_length_tokens": each.recipe.sequence_length,
        "global_batch": train.global_batch,
        "micro_batch": train.micro_batch,
        "refused": each.refused,
        "memory_bytes": None if known is None else known.memory,
        "fits": None if known is None else known.fits,
        **({} if known is None else _costs(known, price)),
    }


def _interval(estimate: Estimate, between_faults: float | None) -> dict[str, Any]:
    advice = advise(estimate, between_faults=between_faults)
    costs, without = advice.costs, advice.without_survival
    return {
        "key": advice.key,
        "steps": advice.own,
        "goodput": advice.goodput(advice.own),
        "advised_steps": advice.every,
        "advised_goodput": advice.goodput(advice.every),
        "advised_goodput_if_each_fault_is_a_restart": without.goodput(without.every),
        "stall_seconds": costs.stall,
        "write_seconds": costs.write,
        "restart_seconds": {**advice.restart_parts, "together": costs.restart},
        "seconds_between_faults": costs.between_faults,
        "replica_deaths": {**asdict(costs.deaths), "cost": costs.deaths.cost} if costs.deaths.share else None,
    }


def _shards(plan: Plan, main: Estimate, between_faults: float | None) -> dict[str, Any] | None:
    return shards_json(shard_candidates(main, plan.inputs, plan.mfu, between_faults=between_faults))


def _validation(estimate: Estimate) -> dict[str, Any] | None:
    cost = validation_cost(estimate)
    return None if cost is None else {**asdict(cost), "total_seconds": cost.total}


def _models(estimate: Estimate) -> list[dict[str, Any]]:
    return [
        {
            "role": model.role,
            "share_of_tokens": model.share,
            "parameters": {**asdict(model.parameters), "total": model.parameters.total},
            "flop_per_token": {**asdict(model.work), "total": model.work.total},
            "forward_flop_per_token": model.forward.forward,
        }
        for model in estimate.requirements.models
    ]


def _teacher_outputs(plan: Plan, estimate: Estimate) -> dict[str, float] | None:
    """Bytes of the teacher's output for a token, in each form; targets where the recipe makes them."""
    teacher, targets = plan.inputs.stats.teacher, estimate.requirements.target_bytes
    if teacher is None or plan.inputs.stats.teacher_name is not None:
        return None
    sizes = signal_bytes(vocab_size=plan.inputs.vocab_size, width=teacher.width)
    outputs: dict[str, float] = {name.replace(" ", "_"): size for name, size in sizes.items()}
    return outputs if targets is None else {**outputs, "targets": targets.expected, "targets_at_most": targets.most}


def _layout(plan: Plan, each: Estimate, price: float | None) -> dict[str, Any]:
    times, run, requirements = each.times, each.sharding, each.requirements
    return {
        "set": plan.settings(each),
        "placement": "disaggregated" if run.roles else "colocated" if times.stages else None,
        **asdict(each.layout),
        "stages": run.stages if times.stages else 0,
        "students": run.ranks,
        "shard": run.shard,
        "student_replicas": run.replicas,
        "accumulation": run.accumulation,
        "fits": each.fits,
        "memory_bytes": each.memory,
        "margin_bytes": each.margin,
        "student_memory_bytes": requirements.phases,
        "teacher_memory_bytes": requirements.teacher_memory,
        "host_memory_bytes": requirements.host,
        "received_bytes_per_token": {name: asdict(link) for name, link in requirements.traffic.items()},
        "teacher_received_bytes_per_token": {name: asdict(link) for name, link in requirements.teacher_traffic.items()},
        **_times_and_costs(plan, each, price),
    }


def _times_and_costs(plan: Plan, each: Estimate, price: float | None) -> dict[str, Any]:
    times = each.times
    values: dict[str, Any] = {
        "micro_step_seconds": {
            **{name: value for name, value in asdict(times).items() if isinstance(value, float | tuple)},
            "exposed": times.exposed,
            "tick": times.tick,
            "together": times.micro_step,
        },
        "hiding_tokens": each.hiding_tokens,
        "step_collectives": {
            "calls": each.latency.calls,
            "latency_seconds": each.latency.together,
            "latency_is_measured": each.latency.model.is_measured,
            "ranks_at_which_latency_passes_compute": each.latency.ranks_at_compute,
        },
        **_costs(each, price),
        "optimistic": _costs(each.optimistic, price),
    }
    return dict.fromkeys(values) if plan.no_forecast else values


def _costs(each: Estimate, price: float | None) -> dict[str, float | None]:
    return {
        "step_seconds": each.times.step,
        "tokens_per_second": each.tokens_per_second,
        "days": each.seconds / 86_400,
        "gpu_hours": each.gpu_hours,
        "price": None if price is None else each.gpu_hours * price,
    }
