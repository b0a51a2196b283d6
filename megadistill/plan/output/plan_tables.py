"""A plan as text of 80 columns, the most important lines first."""

import textwrap
from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megadistill.config.auto import describe_choices
from megadistill.config.recipe import TargetsSection
from megadistill.plan.checkpoint_interval import CheckpointAdvice, advise
from megadistill.plan.collective_latency import SOURCE
from megadistill.plan.counts.disk_usage import LOCAL_SAVES, final_checkpoints, local_bytes, signal_bytes, target_bytes
from megadistill.plan.counts.memory import Lines
from megadistill.plan.counts.traffic import ACROSS, SHARED
from megadistill.plan.estimate import Estimate, optimistic_mfu
from megadistill.plan.output.plan_shards import shards_table
from megadistill.plan.scaling_law import Expectation
from megadistill.plan.search import Plan
from megadistill.plan.shards import TIGHT, shard_candidates
from megadistill.plan.throughput import MfuAssumption
from megadistill.plan.validation_cost import ValidationCost, validation_cost
from megadistill.units import count, readable, spell

BAR = 20
SMALL = 0.005
"""Rows below this fraction are grouped as "smaller ones"."""


def render(
    plan: Plan, *, law: Expectation | None, price: float | None, between_faults: float | None = None
) -> RenderableType:
    """The whole plan. `price`: of a GPU-hour, in any currency. `between_faults`: see `advise`."""
    main = plan.main
    advice = None if main is None or plan.no_forecast else advise(main, between_faults=between_faults)
    parts: list[RenderableType] = [summary_lines(plan, price=price, advice=advice)]
    if plan.entries:
        parts.append(_entries(plan, price=price))
    if main is not None:
        parts += [_models(main), *_memory(main), *([] if plan.no_forecast else [_time(main)]), *_links(main)]
    if plan.best:
        parts.append(_layouts(plan, price=price))
    if main is not None and not plan.no_forecast:
        parts += _shards(plan, main, between_faults)
    if main is not None:
        cost = None if plan.no_forecast else validation_cost(main)
        parts += [] if cost is None else [_validation(main, cost)]
        parts += [_files(plan, main), *([] if advice is None else [_saves(advice)]), _law(plan, law)]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def _entries(plan: Plan, *, price: float | None) -> RenderableType:
    """A row for the steps of each shape, and one for all of them."""
    main = plan.inputs.entry
    assert main is not None
    title = f"Entries of the curriculum; the rest of this plan is of the steps of entry {main.entry}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("entry", "steps", "tokens", "sequence", "batch", "memory", "a step", "GPU-hours"):
        table.add_column(heading, justify="right")
    hours = 0.0
    for each in plan.entries:
        recipe, known = each.recipe, each.estimate
        costs = ["refused", "", ""]
        if known is not None:
            hours += known.gpu_hours
            memory = readable(known.memory, "B") + ("" if known.fits else ": too much")
            costs = [memory, spell(known.times.step), f"{known.gpu_hours:,.0f}"]
        shape = (f"{recipe.sequence_length:,}", f"{recipe.recipe.train.global_batch:,}")
        table.add_row(str(recipe.entry), f"{recipe.steps:,}", count(recipe.tokens), *shape, *costs)
    steps, tokens = (sum(getattr(each.recipe, name) for each in plan.entries) for name in ("steps", "tokens"))
    cost = "" if price is None else f", {hours * price:,.0f}"
    table.add_row("all", f"{steps:,}", count(tokens), "", "", "", "", f"{hours:,.0f}{cost}")
    refused = [Text(f"entry {each.recipe.entry}: {each.refused}", "bold red") for each in plan.entries if each.refused]
    return Group(table, *refused)


def summary_lines(plan: Plan, *, price: float | None, advice: CheckpointAdvice | None = None) -> RenderableType:
    """The first part: whether the recipe fits, how long it takes, and the assumptions."""
    cluster, main = plan.cluster, plan.main
    text = Text()
    text.append(f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.accelerator.name}\n")
    if plan.own is None:
        text.append(f"this recipe cannot start here: {plan.refused}\n", style="bold red")
        if main is not None:
            text.append(f"The rest describes the {'best' if plan.best else 'nearest'} layout that can:\n")
    if main is not None:
        text.append_text(_fit(main))
        text.append_text(_checkpointing(plan, main))
        if plan.no_forecast:
            text.append(f"{plan.no_forecast}\n", style="bold")
    if (warning := plan.low_precision_reduction) is not None:
        text.append(f"{warning}\n", style="bold yellow")
    if advice is not None and advice.warning is not None:
        text.append(f"{advice.warning}\n", style="bold yellow")
    text.rstrip()
    notes = Text("; ".join(_assumptions(plan)), style="dim")
    forecast = [_forecast(plan, main, price=price)] if main is not None and not plan.no_forecast else []
    return Group(text, *forecast, *([notes] if notes else []))


def _assumptions(plan: Plan) -> Iterator[str]:
    if not plan.no_forecast:
        yield (
            "assumed, not measured: the MFU, of a peak of "
            f"{plan.cluster.accelerator.peak_tflops[plan.inputs.recipe.train.precision]:g} TFLOP/s (expected: "
            f"{'the best published for distillation' if plan.mfu == MfuAssumption() else 'as given'}); links as sold"
        )
    if plan.main is not None:
        yield describe_choices(plan.main.sharding.choices)
    if plan.inputs.without_data:
        yield "the data was not read"
    if plan.inputs.stats.first_step:
        yield f"counted are the steps after {plan.inputs.stats.first_step:,} (run.begin_from)"


def _forecast(plan: Plan, main: Estimate, *, price: float | None) -> RenderableType:
    """Time and cost of the run, expected and optimistic."""
    both, mfus = (main, main.optimistic), (plan.mfu, optimistic_mfu(main.sharding, plan.mfu))
    table = _table(f"for {count(main.requirements.tokens)} tokens", "expected", "optimistic")
    table.add_row("tokens/s", *(count(each.tokens_per_second) for each in both), style="bold")
    table.add_row("time", *(spell(each.seconds) for each in both), style="bold")
    table.add_row("GPU-hours", *(f"{each.gpu_hours:,.0f}" for each in both), style="bold")
    if price is not None:
        table.add_row(f"price, at {price:g}", *(f"{each.gpu_hours * price:,.0f}" for each in both), style="bold")
    table.add_row("MFU of the student", *(f"{each.student_mfu:.0%}" for each in mfus))
    if main.times.stages:
        table.add_row("MFU of the teacher", *(f"{each.teacher_mfu:.0%}" for each in mfus))
    return table


def _fit(estimate: Estimate) -> Text:
    kind = estimate.cluster.accelerator
    share = estimate.margin / kind.memory_bytes
    tight = ("fits, but tightly", "yellow") if share < TIGHT else ("fits", "green")
    fit, style = tight if estimate.fits else ("does not fit", "red")
    left = f"{abs(share):.0%} {'free' if estimate.fits else 'too much'}"
    line = f"{fit}: {readable(estimate.memory, 'B')} of {kind.memory_gb:g} GB a GPU, {left}\n"
    return Text(line, style=f"bold {style}")


def _checkpointing(plan: Plan, main: Estimate) -> Text:
    """A line on another `student.activation_checkpointing` for the recipe's own layout, where one is better."""
    other = plan.checkpointing
    if other is None:
        return Text()
    mode, share = other.layout.activation_checkpointing, other.margin / other.cluster.accelerator.memory_bytes
    gain = other.tokens_per_second / main.tokens_per_second - 1
    faster = f", {gain:+.0%} tokens/s" if abs(gain) >= 0.005 and not plan.no_forecast else ""
    line = f"student.activation_checkpointing={mode} fits: {readable(other.memory, 'B')}, {share:.0%} free{faster}\n"
    return Text(line)


def _table(*headings: str, texts: tuple[int, ...] = (0,)) -> Table:
    """Columns are numbers, except `texts`; no headings, no header."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=any(headings))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index in texts else "right", no_wrap=index > 0)
    return table


def _part(title: str, body: RenderableType, note: str = "") -> RenderableType:
    return Group(Text(title, style="bold"), body, *([Text(note, style="dim")] if note else []))


def _models(estimate: Estimate) -> RenderableType:
    models = estimate.requirements.models
    total = estimate.requirements.flops_per_token
    table = _table("", "parameters", "body", "head", "attention", "recompute", "all", "share")
    for model in models:
        work = model.work
        parts = (readable(part, "") for part in (work.body, work.head, work.attention, work.recompute, work.total))
        table.add_row(
            model.role.removeprefix("teacher "), count(model.parameters.total), *parts, f"{work.total / total:.0%}"
        )
    note = f"{total * estimate.requirements.tokens:.3g} FLOP in all; training takes 3 forward passes and recomputation."
    if len(models) > 1 and estimate.sharding.stats.teacher_name is not None:
        read = ", ".join(f"{model.role.removeprefix('teacher ')} {model.share:.0%}" for model in models[1:])
        note += f"\nEach teacher computes the rows of its sources, of the run: {read}."
    elif len(models) > 1:
        student, teacher = models
        parameters, flops = teacher.parameters.total / student.parameters.total, teacher.flops / student.flops
        note += f"\nteacher : student = {parameters:.2f} in parameters, {flops:.2f} in FLOPs."
    return _part("FLOPs of a token", table, note)


def _memory(estimate: Estimate) -> Iterator[RenderableType]:
    """Memory of the student's ranks, and of the teacher's own."""
    needs, size = estimate.requirements, estimate.cluster.accelerator.memory_bytes
    others = ", ".join(
        f"{phase} {readable(sum(lines.values()), 'B')}" for phase, lines in needs.phases.items() if phase != needs.phase
    )
    host = ", ".join(f"{name} {readable(lines, 'B')}" for name, lines in needs.host.items())
    owner = "a student's GPU" if needs.teacher_memory else "a GPU"
    title = f"Memory of {owner} in the phase that takes most: {needs.phase}"
    yield _part(title, _memory_table(needs.memory, size), f"Other phases: {others}.\nOn the host: {host}.")
    if needs.teacher_memory:
        yield _part("Memory of a teacher's GPU", _memory_table(needs.teacher_memory, size))


def _memory_table(lines: Lines, device: int) -> Table:
    table = _table("", "", "", texts=(0, 2))
    total = sum(lines.values())
    rows = {name: size for name, size in lines.items() if size >= SMALL * total}
    for name, size in sorted(rows.items(), key=lambda item: -item[1]):
        table.add_row(name, readable(size, "B"), _bar(size / device))
    if len(rows) < len(lines):
        table.add_row("smaller ones", readable(total - sum(rows.values()), "B"), "")
    table.add_section()
    table.add_row("together", readable(total, "B"), _bar(total / device))
    table.add_row("left" if total <= device else "missing", readable(abs(device - total), "B"), "")
    return table


def _bar(share: float) -> str:
    """A bar of a share of the whole."""
    eighths = round(8 * BAR * min(1.0, share))
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


ONLY_IF_ANY = ("student, attention scores in memory", "student, elementwise work recomputed", SHARED, ACROSS)
"""Rows of a micro-step that most recipes do not have."""


def _time(estimate: Estimate) -> RenderableType:
    """Parts of a micro-step."""
    times, run = estimate.times, estimate.sharding
    title = f"A micro-step: {run.tokens:,} tokens a GPU, {run.accumulation} to an optimizer step of {spell(times.step)}"
    table = _table("", "", "", texts=(0, 2))
    rows = {
        "student, forward (with both heads)": times.student_forward,
        "student, backward": times.student_backward,
        "student, attention scores in memory": times.scores_forward + times.scores_backward,
        "student, elementwise work recomputed": times.recompute,
        "ZeRO-3's traffic that compute does not hide": times.exposed,
        "exchange in the vocab group": times.vocabulary,
        SHARED: times.sequences,
        ACROSS: times.across,
        "latency of collectives that compute does not hide": times.collective_latency,
    }
    if times.stages and not times.replicas:
        rows |= {"teacher: a round through the largest stage": times.tick, "answers": times.clients * times.answer}
    elif times.stages:
        rows["waits for the teacher"] = times.micro_step - times.student
    for name, seconds in rows.items():
        if seconds or name not in ONLY_IF_ANY:
            table.add_row(name, spell(seconds), _bar(seconds / times.micro_step))
    table.add_section()
    table.add_row("together", spell(times.micro_step), "")
    return _part(title, table, _time_notes(estimate))


def _time_notes(estimate: Estimate) -> str:
    times = estimate.times
    notes = ["At the expected MFU."]
    if times.gather or times.reduce:
        notes.append(f"Compute hides ZeRO-3's traffic from {estimate.hiding_tokens:,.0f} tokens on.")
    notes += _latency_notes(estimate)
    if times.stages:
        even = sum(times.stages) / len(times.stages) / max(times.stages)
        notes.append(f"Stages are {even:.1%} even.")
    if times.teacher_scores:
        share = times.teacher_scores / max(times.stages)
        notes.append(f"Attention scores in memory are {share:.0%} of the largest stage's time (teacher.attention).")
    if times.replicas:
        notes.append(f"The teacher's ranks are busy {times.tick / times.micro_step:.0%} of the time.")
    return " ".join(notes)


def _latency_notes(estimate: Estimate) -> list[str]:
    """Calls of a step and their latency, hidden or not; and the ranks from which it takes longer than the compute."""
    latency = estimate.latency
    if not latency.calls:
        return []
    share = latency.together / (estimate.sharding.accumulation * estimate.times.compute)
    source = "as measured" if latency.model.is_measured else f"by the constants of {SOURCE}"
    ranks = latency.ranks_at_compute
    border = "" if ranks is None else f", and passes it at {ranks:,} ranks of the student"
    return [
        f"The latency of a step's {latency.calls:,} collectives, {source}, is {spell(latency.together)} together, "
        f"{share:.0%} of the student's compute{border}."
    ]


def _links(estimate: Estimate) -> list[RenderableType]:
    """Nothing on a single GPU."""
    table = _table("", "in the node", "network")
    rows = {**estimate.requirements.traffic}
    rows |= {f"{name} (a teacher's GPU)": link for name, link in estimate.requirements.teacher_traffic.items()}
    for name, link in rows.items():
        table.add_row(name, f"{link.node:,.0f}", f"{link.network:,.0f}")
    return [_part("Bytes that a GPU receives for each token", table)] if rows else []


def _shards(plan: Plan, main: Estimate, between_faults: float | None) -> list[RenderableType]:
    """Nothing where the student is within a node."""
    candidates = shard_candidates(main, plan.inputs, plan.mfu, between_faults=between_faults)
    empty = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    return [shards_table(candidates, main.sharding.shard, empty)] if len(candidates) > 1 else []


def _layouts(plan: Plan, *, price: float | None) -> RenderableType:
    """The best layouts, and the recipe's own among them."""
    headings = ["", "GPUs", "stages", "vocab", "micro", "ckpt", "mem"]
    if not plan.no_forecast:
        headings += ["tok/s", "GPU-hours", "time" if price is None else "price"]
    table = _table(*headings, texts=(0, 1))
    table.columns[0].no_wrap = True
    table.padding = (0, 0, 0, 1)
    rows = list(plan.best)
    if plan.own is not None and all(plan.own.layout != each.layout for each in rows):
        rows.append(plan.own)
    order = "Of costs equal to three digits, the one with more memory left is first."
    notes = ["* the recipe's own." + ("" if plan.no_forecast else f" {order}")]
    for number, each in enumerate(rows, 1):
        own = plan.own is not None and each.layout == plan.own.layout
        cost = () if plan.no_forecast else _costs(each, price=price)
        share = f"{each.memory / each.cluster.accelerator.memory_bytes:.0%}"
        table.add_row(f"{number}{'*' if own else ''}", *_choices(each), share, *cost)
        notes.append(f"{number}: " + ("the recipe as it is" if own else _options(plan.settings(each))))
    ranked = f"The best of {plan.searched} valid layouts, by the expected cost"
    title = f"Some of {plan.searched} valid layouts" if plan.no_forecast else ranked
    return _part(title, table, "\n".join(notes))


def _costs(estimate: Estimate, *, price: float | None) -> tuple[str, str, str]:
    paid = spell(estimate.seconds) if price is None else f"{estimate.gpu_hours * price:,.0f}"
    return count(estimate.tokens_per_second), f"{estimate.gpu_hours:,.0f}", paid


def _choices(estimate: Estimate) -> tuple[str, ...]:
    layout = estimate.layout
    gpus = f"{estimate.sharding.ranks:,}" + (f" + {layout.teacher_ranks:,}" if layout.teacher_ranks else "")
    stages = str(estimate.sharding.stages) if estimate.times.stages else "-"
    return gpus, stages, str(layout.vocab_group), str(layout.micro_batch), layout.activation_checkpointing


def _options(settings: list[str]) -> str:
    """Lines of 80 columns, none of which ends within a setting."""
    glued = " ".join(f"--set\0{setting}" for setting in settings)
    lines = textwrap.wrap(glued, 77, break_long_words=False, break_on_hyphens=False)
    return "\n   ".join(lines).replace("\0", " ")


def _files(plan: Plan, main: Estimate) -> RenderableType:
    recipe, requirements = main.sharding.recipe, main.requirements
    every = recipe.train.checkpoint_every
    checkpoints = final_checkpoints(recipe, first_step=main.sharding.stats.first_step)
    size = requirements.checkpoint_bytes
    table = _table("", "a token", "together")
    pace = "" if plan.no_forecast else f": {spell(every * main.times.step)}"
    table.add_row(f"a checkpoint, every {every:,} steps{pace}", "", readable(size, "B"))
    table.add_row(f"{checkpoints:,} of them, at the end", "", readable(checkpoints * size, "B"))
    if local := local_bytes(main.sharding):
        table.add_row(f"local saves of a node, at most {LOCAL_SAVES}, with copies", "", readable(local, "B"))
    if len(requirements.models) > 1 and main.sharding.stats.teacher_name is None:
        for name, each in _teacher_outputs(plan, main).items():
            table.add_row(name, f"{each:,.0f} B", readable(each * requirements.tokens, "B"))
    return _part("On disk", table)


def _validation(estimate: Estimate, cost: ValidationCost) -> RenderableType:
    """Time of the run's validations."""
    table = _table("", "sequences", "micro-batches a rank", "time")
    table.add_row("one", f"{cost.sequences:,}", f"{cost.micro_batches:,}", spell(cost.seconds))
    together = (f"{cost.count * number:,}" for number in (cost.sequences, cost.micro_batches))
    table.add_row(f"all {cost.count:,}", *together, spell(cost.total))
    share = cost.total / estimate.seconds
    note = (
        f"{share:.1%} of the time above, which it adds to. Forward passes of the models at the expected MFU; they take "
        "less memory than a step."
    )
    return _part("Validation", table, note)


def _saves(advice: CheckpointAdvice) -> RenderableType:
    """Goodput of the recipe's interval between checkpoints, and of the advised one."""
    costs = advice.costs
    table = _table("", "steps", "time", "goodput")
    for name, steps in (("the recipe's", advice.own), ("advice", advice.every)):
        table.add_row(f"{name}: {advice.key}", f"{steps:,}", spell(steps * advice.step), f"{advice.goodput(steps):.1%}")
    if costs.deaths.share:
        without = advice.without_survival
        goodput = f"{without.goodput(without.every):.1%}"
        table.add_row("if each fault were a restart", f"{without.every:,}", spell(without.every * advice.step), goodput)
    parts = ", ".join(f"{name} {spell(seconds)}" for name, seconds in advice.restart_parts.items())
    note = (
        f"One fault in {spell(costs.between_faults)}; a save stalls training for {spell(costs.stall)} and is whole "
        f"{spell(costs.write)} later; a restart takes {spell(costs.restart)}: {parts}."
    )
    if costs.deaths.share:
        deaths = costs.deaths
        note += f" {deaths.share:.0%} of the faults end one replica of the student alone and cost {spell(deaths.cost)}."
    return _part("Saves and faults", table, note)


def _teacher_outputs(plan: Plan, main: Estimate) -> dict[str, float]:
    """Bytes of a token's teacher output if it were stored, by its form."""
    inputs = plan.inputs
    sizes = signal_bytes(vocab_size=inputs.vocab_size, width=main.sharding.live_teacher.width)
    outputs: dict[str, float] = {f"the teacher's {name}, if they were stored": size for name, size in sizes.items()}
    targets = main.sharding.recipe.loss.targets
    if main.requirements.target_bytes is not None and targets is not None:
        outputs[f"its targets ({targets.select}), stored"] = main.requirements.target_bytes.expected
    else:
        length = inputs.stats.sequence_length
        draws = target_bytes(TargetsSection(), vocab_size=inputs.vocab_size, sequence_length=length)
        outputs["50 draws of a token (loss.targets), if they were stored"] = draws.expected
    return outputs


def _law(plan: Plan, law: Expectation | None) -> RenderableType:
    title = "Losses expected by the distillation scaling law (arXiv 2502.08606), nats a token"
    stats = plan.inputs.stats
    if stats.teacher is None or stats.teacher_name is not None:
        why = "no teacher runs" if stats.teacher is None else "it is of one teacher"
        return Text(f"The distillation scaling law does not apply: {why}.", style="dim")
    if law is None:
        return Text(f"{title}:\ndescribe the teacher with --teacher-loss or --teacher-tokens.", style="dim")
    table = _table("", "")
    table.add_row("the teacher", f"{law.teacher_nats_per_token:.3f}")
    table.add_row(f"the student, distilled on {count(law.tokens)} tokens", f"{law.distilled_nats_per_token:.3f}")
    table.add_row("from labels, on as many tokens", f"{law.labels_nats_per_token:.3f}")
    more = f"from labels, for as many FLOPs: {count(law.labels_equal_compute_tokens)} tokens"
    table.add_row(more, f"{law.labels_equal_compute_nats_per_token:.3f}")
    note = "Fitted on English C4, 143M to 12.6B parameters: differences carry over better than values."
    if law.outside:
        note = f"A warning light, not a forecast: outside the fitted range, by {'; '.join(law.outside)}."
    return _part(title, table, note)
