"""A plan for machines: plain JSON values, each with its unit in its key. It computes nothing."""

from dataclasses import asdict
from typing import Any

from megadistill.plan.counts.disk_usage import signal_bytes
from megadistill.plan.estimate import Estimate
from megadistill.plan.scaling_law import LOWEST_LOSS, PARAMETERS, TOKENS, Expectation
from megadistill.plan.search import Plan


def values(found: Plan, *, law: Expectation | None, price: float | None) -> dict[str, Any]:
    """`price`: of a GPU-hour. `best` is cheapest first; `own` is null where the recipe cannot start so."""
    kind, shown = found.cluster.accelerator, found.shown
    precision = found.subject.recipe.train.precision
    return {
        "cluster": {
            "nodes": found.cluster.nodes,
            "gpus_per_node": found.cluster.gpus_per_node,
            "gpu": kind.name,
            "memory_bytes": kind.memory_bytes,
            "peak_flop_per_second": kind.peak_flops(precision),
            "node_bytes_per_second": kind.node_bandwidth,
            "network_bytes_per_second": kind.network_bandwidth,
        },
        "assumed": asdict(found.assumed),
        "price_per_gpu_hour": price,
        "fits": found.own is not None and found.own.fits,
        "refused": found.refused,
        "tokens": shown.needs.tokens if shown else None,
        "sequence_length_tokens": found.subject.sequence_length,
        "vocabulary_ids": found.subject.vocab_size,
        "models": _models(shown) if shown else [],
        "checkpoint_bytes": shown.needs.checkpoint_bytes if shown else None,
        "teacher_bytes_per_token": _signals(found, shown) if shown else None,
        "layouts_asked": found.asked,
        "own": _layout(found, found.own, price) if found.own else None,
        "best": [_layout(found, each, price) for each in found.best],
        "nearest": _layout(found, found.nearest, price) if found.nearest else None,
        "scaling_law": _law(law) if law else None,
    }


def _models(found: Estimate) -> list[dict[str, Any]]:
    return [
        {
            "role": model.role,
            "parameters": {**asdict(model.parameters), "total": model.parameters.total},
            "flop_per_token": {**asdict(model.work), "total": model.work.total},
            "forward_flop_per_token": model.forward.forward,
        }
        for model in found.needs.models
    ]


def _signals(found: Plan, shown: Estimate) -> dict[str, float] | None:
    """What a teacher says of a token, in each form; targets where the recipe makes them."""
    teacher = found.subject.teacher
    if teacher is None:
        return None
    said: dict[str, float] = {
        name.replace(" ", "_"): size
        for name, size in signal_bytes(vocab_size=found.subject.vocab_size, width=teacher.hidden_size).items()
    }
    targets = shown.needs.target_bytes
    return said if targets is None else {**said, "targets": targets.expected, "targets_at_most": targets.most}


def _layout(found: Plan, each: Estimate, price: float | None) -> dict[str, Any]:
    times = each.times
    return {
        "set": found.settings(each),
        "placement": "disaggregated" if each.placed.roles else "colocated" if times.stages else None,
        **asdict(each.layout),
        "stages": each.placed.stages if times.stages else 0,
        "students": each.placed.students,
        "accumulation": each.placed.accumulation,
        "fits": each.fits,
        "memory_bytes": each.memory,
        "margin_bytes": each.margin,
        "student_memory_bytes": each.needs.phases,
        "teacher_memory_bytes": each.needs.teacher_memory,
        "host_memory_bytes": each.needs.host,
        "received_bytes_per_token": {name: asdict(link) for name, link in each.needs.traffic.items()},
        "teacher_received_bytes_per_token": {name: asdict(link) for name, link in each.needs.teacher_traffic.items()},
        "micro_step_seconds": {
            **{name: value for name, value in asdict(times).items() if isinstance(value, float | tuple)},
            "exposed": times.exposed,
            "beat": times.beat,
            "together": times.micro_step,
        },
        "step_seconds": times.step,
        "hiding_tokens": each.hiding_tokens,
        "hiding_tokens_apart": each.hiding_tokens_apart,
        "tokens_per_second": each.tokens_per_second,
        "days": each.days,
        "gpu_hours": each.gpu_hours,
        "price": None if price is None else each.gpu_hours * price,
    }


def _law(law: Expectation) -> dict[str, Any]:
    return {
        "source": "arXiv 2502.08606",
        "parameters": law.parameters,
        "tokens": law.tokens,
        "teacher_nats_per_token": law.teacher,
        "distilled_nats_per_token": law.distilled,
        "labels_nats_per_token": law.labels,
        "labels_equal_compute_tokens": law.labels_tokens,
        "labels_equal_compute_nats_per_token": law.labels_equal_compute,
        "fitted_on": {"parameters": PARAMETERS, "tokens": TOKENS, "nats_per_token_above": LOWEST_LOSS},
        "outside": law.outside,
    }
