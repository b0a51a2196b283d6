"""A plan for a person: what matters most first, in 80 columns. It computes nothing that a plan does not hold."""

import textwrap
from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megadistill.config import TargetsSection
from megadistill.plan.counts.disk_usage import signal_bytes, target_bytes
from megadistill.plan.counts.memory import Lines
from megadistill.plan.estimate import Estimate
from megadistill.plan.scaling_law import Expectation
from megadistill.plan.search import Plan
from megadistill.plan.units import count, readable, spell

BAR = 20
DRAWS = TargetsSection()
SMALL = 0.005
"""Of a whole: what is less is told together."""
SHORT = 0.005
"""Seconds: of a micro-step that is shorter, starting the kernels takes most."""
TIGHT = 0.1
"""A smaller share of free memory is called tight: an allocator never uses all of what it has."""


def told(found: Plan, *, law: Expectation | None, price: float | None) -> RenderableType:
    """Everything. `price`: of a GPU-hour, in whatever currency."""
    shown = found.shown
    parts: list[RenderableType] = [verdict(found, price=price)]
    if shown is not None:
        parts += [_models(shown), *_memory(shown), _time(shown), _links(shown)]
    if found.best:
        parts.append(_layouts(found, price=price))
    if shown is not None:
        parts += [_files(found, shown), _law(found, law)]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts))


def verdict(found: Plan, *, price: float | None) -> Text:
    """The lines that come first."""
    cluster, shown = found.cluster, found.shown
    said = Text()
    said.append(f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.accelerator.name}\n")
    if found.own is None:
        said.append(f"cannot start so: {found.refused}\n", style="bold red")
        if shown is not None:
            said.append("What follows is of " + ("the best layout that can:\n" if found.best else "the one nearest:\n"))
    if shown is not None:
        word, style = _fit(shown)
        said.append(f"{word}: {_room(shown)}\n", style=f"bold {style}")
        cost = f"{count(shown.tokens_per_second)} tokens/s, {spell(shown.seconds)}, {shown.gpu_hours:,.0f} GPU-hours"
        said.append(cost + _priced(shown, price) + f" for {count(shown.needs.tokens)} tokens\n", style="bold")
    said.append(
        f"assumed, not measured: the student's products run at {found.assumed.student_mfu:.0%} of the peak of "
        f"{cluster.accelerator.peak_tflops[found.subject.recipe.train.precision]:g} TFLOP/s, the teacher's at "
        f"{found.assumed.teacher_mfu:.0%}; links as sold",
        style="dim",
    )
    if found.subject.without_data:
        said.append("; the data was not looked at", style="dim")
    return said


def _fit(found: Estimate) -> tuple[str, str]:
    if not found.fits:
        return "does not fit", "red"
    tight = found.margin < TIGHT * found.cluster.accelerator.memory_bytes
    return ("fits, but tightly", "yellow") if tight else ("fits", "green")


def _room(found: Estimate) -> str:
    kind = found.cluster.accelerator
    share = abs(found.margin) / kind.memory_bytes
    left = "free" if found.fits else "too much"
    return f"{readable(found.memory, 'B')} of {kind.memory_gb:g} GB a GPU, {share:.0%} {left}"


def _priced(found: Estimate, price: float | None) -> str:
    return "" if price is None else f" (at {price:g}: {found.gpu_hours * price:,.0f})"


def _table(*headings: str, texts: tuple[int, ...] = (0,)) -> Table:
    """Columns are numbers, but for `texts`."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place in texts else "right", no_wrap=place > 0)
    return table


def _part(title: str, body: RenderableType, note: str = "") -> RenderableType:
    return Group(Text(title, style="bold"), body, *([Text(note, style="dim")] if note else []))


def _models(found: Estimate) -> RenderableType:
    models = found.needs.models
    total = found.needs.flops_per_token
    table = _table("", "parameters", "body", "head", "attention", "recompute", "all", "share")
    for model in models:
        work = model.work
        parts = (readable(part, "") for part in (work.body, work.head, work.attention, work.recompute, work.total))
        table.add_row(model.role, count(model.parameters.total), *parts, f"{work.total / total:.0%}")
    note = f"{total * found.needs.tokens:.3g} FLOP in all; to train takes three forward passes, and recompute."
    if len(models) > 1:
        student, teacher = models
        parameters, flops = teacher.parameters.total / student.parameters.total, teacher.flops / student.flops
        note += f"\nteacher : student = {parameters:.2f} in parameters, {flops:.2f} in FLOPs."
    return _part("FLOPs of a token", table, note)


def _memory(found: Estimate) -> Iterator[RenderableType]:
    """Of the student's ranks, and of the teacher's own."""
    needs, size = found.needs, found.cluster.accelerator.memory_bytes
    others = ", ".join(
        f"{phase} {readable(sum(lines.values()), 'B')}" for phase, lines in needs.phases.items() if phase != needs.phase
    )
    host = ", ".join(f"{what} {readable(held, 'B')}" for what, held in needs.host.items())
    whose = "a student's GPU" if needs.teacher_memory else "a GPU"
    title = f"Memory of {whose} in the phase that takes most: {needs.phase}"
    yield _part(title, _held(needs.memory, size), f"Other phases: {others}.\nOn the host: {host}.")
    if needs.teacher_memory:
        yield _part("Memory of a teacher's GPU", _held(needs.teacher_memory, size))


def _held(lines: Lines, size: int) -> Table:
    table = _table("", "", "", texts=(0, 2))
    table.show_header = False
    together = sum(lines.values())
    shown = {what: held for what, held in lines.items() if held >= SMALL * together}
    for what, held in sorted(shown.items(), key=lambda item: -item[1]):
        table.add_row(what, readable(held, "B"), _bar(held / size))
    if len(shown) < len(lines):
        table.add_row("what is smaller", readable(together - sum(shown.values()), "B"), "")
    table.add_section()
    table.add_row("together", readable(together, "B"), _bar(together / size))
    table.add_row("left" if together <= size else "missing", readable(abs(size - together), "B"), "")
    return table


def _bar(share: float) -> str:
    """Of a whole device."""
    eighths = round(8 * BAR * min(1.0, share))
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


def _time(found: Estimate) -> RenderableType:
    """Where a micro-step goes."""
    times, placed = found.times, found.placed
    tokens = placed.recipe.train.micro_batch * found.needs.tokens // (found.steps * placed.recipe.train.global_batch)
    title = f"A micro-step: {tokens:,} tokens a GPU, {placed.accumulation} to an optimizer step of {spell(times.step)}"
    table = _table("", "", "", texts=(0, 2))
    table.show_header = False
    rows = {
        "student, forward (with both heads)": times.student_forward,
        "student, backward": times.student_backward,
        "ZeRO-3's traffic, as far as it shows": times.exposed,
        "exchange in the vocab group": times.vocabulary,
    }
    if times.stages and not times.replicas:
        rows |= {"teacher: a round through the largest stage": times.beat, "answers": times.clients * times.answer}
    elif times.stages:
        rows["waits for the teacher"] = times.micro_step - times.student
    for what, seconds in rows.items():
        table.add_row(what, spell(seconds), _bar(seconds / times.micro_step))
    table.add_section()
    table.add_row("together", spell(times.micro_step), "")
    return _part(title, table, _hiding(found))


def _hiding(found: Estimate) -> str:
    times = found.times
    said = []
    if times.gather or times.reduce:
        said.append(
            f"ZeRO-3 hides from {found.hiding_tokens:,.0f} tokens on; from {found.hiding_tokens_apart:,.0f} if each "
            "GPU fetched all of it by itself."
        )
    if times.stages:
        even = sum(times.stages) / len(times.stages) / max(times.stages)
        said.append(f"Stages are {even:.1%} even.")
    if times.replicas:
        said.append(f"The teacher's ranks are busy {times.beat / times.micro_step:.0%} of the time.")
    if times.micro_step < SHORT:
        said.append("So short a micro-step is ruled by latency, which is not in here: expect less.")
    return " ".join(said)


def _links(found: Estimate) -> RenderableType:
    table = _table("", "in the node", "network")
    rows = {**found.needs.traffic}
    rows |= {f"{name} (a teacher's GPU)": link for name, link in found.needs.teacher_traffic.items()}
    for name, link in rows.items():
        table.add_row(name, f"{link.node:,.0f}", f"{link.network:,.0f}")
    return _part("Bytes of a token that a GPU receives", table)


def _layouts(found: Plan, *, price: float | None) -> RenderableType:
    """The best, and the recipe's own among them."""
    headings = ("", "GPUs", "stages", "vocab", "micro", "ckpt", "mem", "tok/s", "GPU-hours")
    table = _table(*headings, "time" if price is None else "price", texts=(0, 1))
    table.columns[0].no_wrap = True
    table.padding = (0, 0, 0, 1)
    rows = list(found.best)
    if found.own is not None and all(found.own.layout != each.layout for each in rows):
        rows.append(found.own)
    how = ["* the recipe's own. Of costs alike to three digits, the one with more memory left is first."]
    for number, each in enumerate(rows, 1):
        own = found.own is not None and each.layout == found.own.layout
        paid = spell(each.seconds) if price is None else f"{each.gpu_hours * price:,.0f}"
        cost = (count(each.tokens_per_second), f"{each.gpu_hours:,.0f}", paid)
        share = f"{each.memory / each.cluster.accelerator.memory_bytes:.0%}"
        table.add_row(f"{number}{'*' if own else ''}", *_chosen(each), share, *cost)
        how.append(f"{number}: " + ("the recipe as it is" if own else _spelled(found.settings(each))))
    return _part(f"The best of {found.asked} layouts that start", table, "\n".join(how))


def _chosen(found: Estimate) -> tuple[str, ...]:
    layout = found.layout
    gpus = f"{found.placed.students:,}" + (f" + {layout.teacher_ranks:,}" if layout.teacher_ranks else "")
    stages = str(found.placed.stages) if found.times.stages else "-"
    again = "yes" if layout.activation_checkpointing else "no"
    return gpus, stages, str(layout.vocab_group), str(layout.micro_batch), again


def _spelled(settings: list[str]) -> str:
    """Lines of 80 columns, none of which ends within a setting."""
    glued = " ".join(f"--set\0{setting}" for setting in settings)
    lines = textwrap.wrap(glued, 77, break_long_words=False, break_on_hyphens=False)
    return "\n   ".join(lines).replace("\0", " ")


def _files(found: Plan, shown: Estimate) -> RenderableType:
    recipe, needs = shown.placed.recipe, shown.needs
    every = recipe.train.checkpoint_every
    kept = recipe.checkpoint.keep_last
    if recipe.checkpoint.keep_every:
        kept += recipe.train.steps // recipe.checkpoint.keep_every
    table = _table("", "a token", "together")
    table.add_row(
        f"a checkpoint, every {every:,} steps: {spell(every * shown.times.step)}", "", _bytes(needs.checkpoint_bytes)
    )
    table.add_row(f"{kept:,} of them, at the end", "", _bytes(kept * needs.checkpoint_bytes))
    if len(needs.models) > 1:
        for what, size in _signals(found, shown).items():
            table.add_row(what, f"{size:,.0f} B", _bytes(size * needs.tokens))
    return _part("On disk", table)


def _signals(found: Plan, shown: Estimate) -> dict[str, float]:
    """Bytes a token of what the teacher says, if it were kept."""
    subject = found.subject
    assert subject.teacher is not None
    whole = signal_bytes(vocab_size=subject.vocab_size, width=subject.teacher.hidden_size)
    said: dict[str, float] = {f"the teacher's {name}, if they were stored": size for name, size in whole.items()}
    targets = shown.placed.recipe.loss.targets
    if shown.needs.target_bytes is not None:
        assert targets is not None
        said[f"its targets ({targets.select}), stored"] = shown.needs.target_bytes.expected
    else:
        drawn = target_bytes(DRAWS, vocab_size=subject.vocab_size, sequence_length=subject.sequence_length)
        said["50 draws of a token (loss.targets), if they were stored"] = drawn.expected
    return said


def _bytes(size: float) -> str:
    return readable(size, "B")


def _law(found: Plan, law: Expectation | None) -> RenderableType:
    title = "What the distillation scaling law expects (arXiv 2502.08606), nats a token"
    if found.subject.teacher is None:
        return Text("The distillation scaling law says nothing here: no teacher runs.", style="dim")
    if law is None:
        return Text(f"{title}:\nsay how good the teacher is, by --teacher-loss or --teacher-tokens.", style="dim")
    table = _table("", "")
    table.show_header = False
    table.add_row("the teacher", f"{law.teacher:.3f}")
    table.add_row(f"the student, distilled on {count(law.tokens)} tokens", f"{law.distilled:.3f}")
    table.add_row("from labels, on as many tokens", f"{law.labels:.3f}")
    more = f"from labels, for as many FLOPs: {count(law.labels_tokens)} tokens"
    table.add_row(more, f"{law.labels_equal_compute:.3f}")
    return _part(title, table, _range(law))


def _range(law: Expectation) -> str:
    if law.outside:
        return f"A warning light, not a forecast: outside of what it was fitted on, by {'; '.join(law.outside)}."
    return "Fitted on English C4, 143M to 12.6B parameters: differences carry over better than values."
