"""The layouts of a recipe on a cluster, asked one by one, and the best of them. It starts nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from megadistill.errors import UserError
from megadistill.plan.counts.model_stats import RecipeStats, measure_models
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.layouts import Cluster, Layout, layouts, overrides, placed, recipe_with
from megadistill.plan.plan_input import PlanInput
from megadistill.plan.throughput import MfuAssumption
from megadistill.precision import torch_dtype

BEST = 5
"""Proposals that are shown."""
DEAR = 1.5
"""So many times the cheapest is no proposal, but to compare placements."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A recipe on a cluster: as it says, and as it might say."""

    subject: PlanInput
    measured: RecipeStats
    cluster: Cluster
    assumed: MfuAssumption
    own: Estimate | None
    """None where a run of the recipe would be refused on this cluster."""
    refused: str | None
    """Why."""
    best: tuple[Estimate, ...]
    """Those that fit, cheapest first; of pipelines alike only the best."""
    nearest: Estimate | None
    """Where none fits: the one that misses least."""
    asked: int
    """Layouts that a run would not refuse."""

    @property
    def shown(self) -> Estimate | None:
        """The one that is told in full."""
        return self.own or (self.best[0] if self.best else self.nearest)

    def settings(self, found: Estimate) -> list[str]:
        """The `--set` that make the recipe this one; none for the recipe's own layout."""
        if self.own is not None and found.layout == self.own.layout:
            return []
        return overrides(found.placed.recipe, self.subject.recipe)


def plan(subject: PlanInput, cluster: Cluster, assumed: MfuAssumption) -> Plan:
    """Raises UserError: the peak of the GPU at the recipe's precision is not known."""
    cluster.accelerator.peak_flops(subject.recipe.train.precision)
    measured = measure_models(subject.student, subject.teacher, sequence_length=subject.sequence_length)
    own, refused = None, None
    try:
        own = estimate(placed(subject.recipe, subject, cluster), subject, measured, cluster, assumed)
    except UserError as error:
        refused = str(error)
    found = [each for each in _search(subject, measured, cluster, assumed) if own is None or each.layout != own.layout]
    found += [] if own is None else [own]
    fitting = sorted((each for each in found if each.fits), key=_cost)
    nearest = max(found, key=lambda each: each.margin, default=None) if not fitting else None
    return Plan(subject, measured, cluster, assumed, own, refused, _distinct(fitting), nearest, len(found))


def _search(subject: PlanInput, measured: RecipeStats, cluster: Cluster, assumed: MfuAssumption) -> Iterator[Estimate]:
    """What would be refused, and larger micro-batches of what does not fit already, are left out."""

    def but_for_the_batch(layout: Layout) -> Layout:
        return replace(layout, micro_batch=0)

    ordered = sorted(layouts(subject, cluster), key=lambda each: (str(but_for_the_batch(each)), each.micro_batch))
    for _, alike in groupby(ordered, key=but_for_the_batch):
        for layout in alike:
            if _stage_is_too_large(layout, subject, measured, cluster):
                break
            try:
                recipe = recipe_with(layout, subject.recipe, cluster)
                found = estimate(placed(recipe, subject, cluster), subject, measured, cluster, assumed)
            except UserError:
                continue
            yield found
            if not found.fits:
                break


def _stage_is_too_large(layout: Layout, subject: PlanInput, measured: RecipeStats, cluster: Cluster) -> bool:
    """Told without counting anything else: a single stage does not fit a device."""
    stage = _stage_bytes(layout, subject, measured)
    return stage is not None and stage > 2 * cluster.accelerator.memory_bytes


def _stage_bytes(layout: Layout, subject: PlanInput, measured: RecipeStats) -> int | None:
    """Of the largest stage of a live teacher; None where there is none, or it has fewer layers than stages."""
    teacher, stages = measured.teacher, layout.stages or layout.vocab_group
    if teacher is None or stages > teacher.layers:
        return None
    return torch_dtype(subject.recipe.train.precision).itemsize * max(teacher.stage_parameters(stages))


def _cost(found: Estimate) -> tuple[float, int]:
    """GPU-hours, which are not known better than to three digits; then the memory that is left."""
    return float(f"{found.gpu_hours:.2e}"), -found.margin


def _distinct(fitting: list[Estimate]) -> tuple[Estimate, ...]:
    """The best of each split of the GPUs, or vocab group of a colocated teacher; of either placement at least one."""
    kept: dict[tuple[int, int], Estimate] = {}
    for found in fitting:
        layout = found.layout
        kept.setdefault((layout.teacher_ranks, 0 if layout.teacher_ranks else layout.vocab_group), found)
    best = list(kept.values())
    shown = [found for found in best[:BEST] if found.gpu_hours < DEAR * best[0].gpu_hours]
    for apart in (True, False):
        if not any((found.layout.teacher_ranks > 0) == apart for found in shown):
            shown += [found for found in best if (found.layout.teacher_ranks > 0) == apart][:1]
    return tuple(shown)


def remedies(found: Plan) -> str:
    """Where no layout fits: by how much the best misses, what fills it, and what was found to mend it."""
    nearest = found.nearest
    kind, ranks = found.cluster.accelerator.name, found.cluster.ranks
    if nearest is None:
        sizes = [
            _stage_bytes(layout, found.subject, found.measured) for layout in layouts(found.subject, found.cluster)
        ]
        smallest = min((size for size in sizes if size is not None), default=0)
        if smallest <= found.cluster.accelerator.memory_bytes:
            return f"no layout of this recipe starts on {ranks} GPUs: {found.refused}"
        said = (
            f"no layout fits: in as many stages as {ranks} GPUs allow, the teacher's largest has "
            f"{smallest / 1e9:.1f} GB, a GPU {found.cluster.accelerator.memory_gb:g} GB ({kind})"
        )
        return f"{said}; {'; '.join(_mended(found)) or 'take more nodes, or a smaller teacher'}"
    lines = max(nearest.needs.memory, nearest.needs.teacher_memory, key=lambda held: sum(held.values()))
    largest = sorted(lines.items(), key=lambda item: -item[1])[:3]
    filled = ", ".join(f"{what} {size / 1e9:.1f} GB" for what, size in largest)
    said = (
        f"no layout fits: the best of {found.asked} needs {nearest.memory / 1e9:.1f} GB on a GPU of "
        f"{found.cluster.accelerator.memory_gb:g} GB ({kind}), {-nearest.margin / 1e9:.1f} GB too much ({filled})"
    )
    return f"{said}; {'; '.join(_mended(found)) or 'take a GPU with more memory, or smaller models'}"


def _mended(found: Plan) -> Iterator[str]:
    """Tried, not guessed."""

    def fits(subject: PlanInput, cluster: Cluster) -> bool:
        return any(each.fits for each in _search(subject, found.measured, cluster, found.assumed))

    for times in (2, 4, 8, 16, 32, 64):
        larger = replace(found.cluster, nodes=times * found.cluster.nodes)
        if fits(found.subject, larger):
            yield f"it fits on {larger.nodes} nodes"
            break
    zero = {**found.subject.profile.get("zero_optimization", {}), "offload_optimizer": {"device": "cpu"}}
    profile = {**found.subject.profile, "zero_optimization": zero}
    if fits(replace(found.subject, profile=profile), found.cluster):
        yield "it fits with the optimizer's states on the host (offload_optimizer in the file of student.deepspeed)"
