"""Search over the layouts of a recipe on a cluster, for those that cost least."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from megadistill.config.recipe import CHECKPOINTING
from megadistill.errors import UserError
from megadistill.plan.entries import EntryRecipe
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.latency import micro_step_latency
from megadistill.plan.layouts import Cluster, Layout, layouts, overrides, place, recipe_with_layout
from megadistill.plan.plan_input import PlanInput
from megadistill.plan.shards import TIGHT, best_shard, shard_candidates
from megadistill.plan.throughput import MfuAssumption
from megadistill.student.deepspeed_config import low_precision_reduction
from megadistill.units import count, spell

BEST = 5
"""Number of proposals."""
MAX_COST_RATIO = 1.5
"""Cost of a proposal against the cheapest one, at most; a proposal of the other placement may cost more."""


@dataclass(frozen=True, eq=False)
class EntryEstimate:
    """Costs of the steps of one shape of the curriculum."""

    recipe: EntryRecipe
    estimate: Estimate | None
    refused: str | None
    """Why such steps cannot be taken on this cluster; None where they can."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Costs of a recipe on a cluster, as it is and in its best layouts."""

    inputs: PlanInput
    cluster: Cluster
    mfu: MfuAssumption
    """The expected one, by which layouts are ranked."""
    own: Estimate | None
    """The recipe's own layout; None where a run of it would be refused on this cluster."""
    refused: str | None
    """The reason for the refusal."""
    best: tuple[Estimate, ...]
    """Layouts that fit, each with its best replicas of the student, cheapest first; of similar pipelines only one."""
    nearest: Estimate | None
    """The layout that misses least; None where one fits."""
    searched: int
    """Number of valid layouts, without the other replicas of the best ones."""
    entries: tuple["EntryEstimate", ...]
    """Costs of each shape of the curriculum's steps, in the recipe's own layout; none where all steps have one. The
    others of this record are then those of the entry with the most tokens."""
    checkpointing: Estimate | None
    """The recipe's own layout with less recomputation that fits comfortably; where its own does not fit, with as little
    as fits. None: there is no such one."""

    @property
    def main(self) -> Estimate | None:
        """The estimate that is reported in full: the recipe's own, or else the best or the nearest."""
        return self.own or (self.best[0] if self.best else self.nearest)

    @property
    def no_forecast(self) -> str | None:
        """A sentence that says why the plan has no times and costs; None where it has them."""
        main = self.main
        if main is None or not main.latency_bound:
            return None
        floor, counted = micro_step_latency(main.sharding), main.times.without_latency.micro_step
        return (
            "a toy: at this size kernel launches and network latency set the time, not arithmetic; no forecast of "
            f"days. A micro-step of {main.sharding.tokens:,} tokens has {spell(counted)} of arithmetic and traffic, "
            f"and at least {spell(floor)} of launches and latency; arithmetic rules from some "
            f"{count(main.sharding.tokens * floor / counted)} tokens on"
        )

    @property
    def low_precision_reduction(self) -> str | None:
        """A warning where the main estimate's ranks add up their gradients in 16 bits; else None."""
        if self.main is None:
            return None
        precision = self.inputs.recipe.train.precision
        return low_precision_reduction(self.inputs.deepspeed_config, precision, self.main.sharding.shard)

    def settings(self, proposal: Estimate) -> list[str]:
        """The `--set` options that turn the recipe into a proposal; none for the recipe's own layout."""
        if self.own is not None and proposal.layout == self.own.layout:
            return []
        return overrides(proposal.sharding.recipe, self.inputs.recipe)


def plan(inputs: PlanInput, cluster: Cluster, mfu: MfuAssumption, *, between_faults: float | None = None) -> Plan:
    """A recipe on a cluster. `between_faults`: mean time (s) between faults, None: by the GPUs (`fault_seconds`).

    Raises:
        UserError: the peak of the GPU at the recipe's precision is not known.
    """
    cluster.accelerator.peak_flops(inputs.recipe.train.precision)
    own, refused = None, None
    try:
        own = estimate(place(inputs.recipe, inputs, cluster), cluster, mfu)
    except UserError as error:
        refused = str(error)
    estimates = [each for each in _search(inputs, cluster, mfu) if own is None or each.layout != own.layout]
    estimates += [] if own is None else [own]
    fitting = sorted(_with_best_shards(estimates, inputs, mfu, between_faults), key=_cost)
    nearest = max(estimates, key=lambda each: each.margin, default=None) if not fitting else None
    other = None if own is None else _checkpointing(own, estimates)
    entries = _entries(inputs, cluster, mfu)
    return Plan(inputs, cluster, mfu, own, refused, _distinct(fitting), nearest, len(estimates), entries, other)


def _entries(inputs: PlanInput, cluster: Cluster, mfu: MfuAssumption) -> tuple[EntryEstimate, ...]:
    estimates = []
    for each in (inputs, *inputs.others):
        if each.entry is None:
            return ()
        try:
            estimates.append(EntryEstimate(each.entry, estimate(place(each.recipe, each, cluster), cluster, mfu), None))
        except UserError as error:
            estimates.append(EntryEstimate(each.entry, None, str(error)))
    return tuple(sorted(estimates, key=lambda each: each.recipe.entry))


def _checkpointing(own: Estimate, estimates: Iterable[Estimate]) -> Estimate | None:
    """The estimate that differs from the recipe's own in `student.activation_checkpointing` alone, and is better."""
    order = [mode for mode in CHECKPOINTING if mode != own.layout.activation_checkpointing]
    if own.fits:
        order = order[: CHECKPOINTING.index(own.layout.activation_checkpointing)]
    similar = {
        each.layout.activation_checkpointing: each
        for each in estimates
        if replace(each.layout, activation_checkpointing="none") == replace(own.layout, activation_checkpointing="none")
    }
    least = TIGHT * own.cluster.accelerator.memory_bytes if own.fits else 0
    better = (similar[mode] for mode in order if mode in similar and similar[mode].margin >= least)
    return next(better, None)


def _search(inputs: PlanInput, cluster: Cluster, mfu: MfuAssumption) -> Iterator[Estimate]:
    """Valid layouts; of those that differ in the micro-batch alone, up to the first that does not fit."""

    def without_batch(layout: Layout) -> Layout:
        return replace(layout, micro_batch=0)

    ordered = sorted(layouts(inputs, cluster), key=lambda each: (str(without_batch(each)), each.micro_batch))
    for _, similar in groupby(ordered, key=without_batch):
        for layout in similar:
            try:
                recipe = recipe_with_layout(layout, inputs.recipe, cluster)
                proposal = estimate(place(recipe, inputs, cluster), cluster, mfu)
            except UserError:
                continue
            yield proposal
            if not proposal.fits:
                break


def _with_best_shards(
    estimates: Iterable[Estimate], inputs: PlanInput, mfu: MfuAssumption, between_faults: float | None
) -> Iterator[Estimate]:
    """The layouts that fit, each with the ranks of a replica of the student that suit it best (`best_shard`).

    Those that could be no proposals are left out: by their cost without latency, which smaller rings would save.
    """
    fitting: dict[Layout, Estimate] = {}
    for each in sorted((each for each in estimates if each.fits), key=_cost, reverse=True):
        fitting[replace(each.layout, shard=0)] = each  # the cheapest
    hours = {layout: _hours_without_latency(each) for layout, each in fitting.items()}
    for layout, each in fitting.items():
        similar = (hours[other] for other in hours if (other.teacher_ranks > 0) == (layout.teacher_ranks > 0))
        if hours[layout] <= MAX_COST_RATIO * min(similar):
            best = best_shard(shard_candidates(each, inputs, mfu, between_faults=between_faults))
            yield each if best is None else best.estimate


def _hours_without_latency(proposal: Estimate) -> float:
    return proposal.times.without_latency.seconds(proposal.sharding.steps) * proposal.cluster.ranks


def _cost(proposal: Estimate) -> tuple[float, int]:
    """GPU-hours, which are no more exact than three digits; then the free memory."""
    return float(f"{proposal.gpu_hours:.2e}"), -proposal.margin


def _distinct(fitting: list[Estimate]) -> tuple[Estimate, ...]:
    """The best of each split of the GPUs, or vocab group of a colocated teacher; of either placement at least one."""
    distinct: dict[tuple[int, int], Estimate] = {}
    for each in fitting:
        layout = each.layout
        distinct.setdefault((layout.teacher_ranks, 0 if layout.teacher_ranks else layout.vocab_group), each)
    best = list(distinct.values())
    proposals = [each for each in best[:BEST] if each.gpu_hours < MAX_COST_RATIO * best[0].gpu_hours]
    for disaggregated in (True, False):
        if not any((each.layout.teacher_ranks > 0) == disaggregated for each in proposals):
            proposals += [each for each in best if (each.layout.teacher_ranks > 0) == disaggregated][:1]
    return tuple(proposals)


def remedies(result: Plan) -> str:
    """A line for a plan in which no layout fits: how much memory the best one lacks, and what makes it fit."""
    nearest = result.nearest
    if nearest is None:
        return f"no layout of this recipe starts on {result.cluster.ranks} GPUs: {result.refused}"
    lines = max(nearest.requirements.memory, nearest.requirements.teacher_memory, key=lambda each: sum(each.values()))
    largest = sorted(lines.items(), key=lambda item: -item[1])[:3]
    filled = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in largest)
    accelerator = result.cluster.accelerator
    return (
        f"no layout fits: the best of {result.searched} needs {nearest.memory / 1e9:.1f} GB on a GPU of "
        f"{accelerator.memory_gb:g} GB ({accelerator.name}), {-nearest.margin / 1e9:.1f} GB too much ({filled}); "
        f"{'; '.join(_changes_that_fit(result)) or 'take more nodes, a GPU with more memory, or smaller models'}"
    )


def _changes_that_fit(result: Plan) -> Iterator[str]:
    """Changes that were searched and make some layout fit."""

    def fits(inputs: PlanInput, cluster: Cluster) -> bool:
        return any(each.fits for each in _search(inputs, cluster, result.mfu))

    for times in (2, 4, 8, 16, 32, 64):
        larger = replace(result.cluster, nodes=times * result.cluster.nodes)
        if fits(result.inputs, larger):
            yield f"it fits on {larger.nodes} nodes"
            break
    zero = {**result.inputs.deepspeed_config.get("zero_optimization", {}), "offload_optimizer": {"device": "cpu"}}
    deepspeed_config = {**result.inputs.deepspeed_config, "zero_optimization": zero}
    if fits(replace(result.inputs, deepspeed_config=deepspeed_config), result.cluster):
        yield "it fits with the optimizer's states on the host (--set student.deepspeed=zero3-offload)"
