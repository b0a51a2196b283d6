"""Parameters, FLOPs, memory and bytes of a recipe on a number of ranks. It knows no hardware and starts nothing.

Legend: V padded vocabulary, D and E widths of student and teacher, L layers, p ranks of a vocab group (and stages of
the teacher), v = V/p rows of a slice, n tokens of a rank's micro-batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megadistill.comm.roles import Roles
from megadistill.comm.topology import Launch, vocab_group_size
from megadistill.comm.vocabulary import block_cyclic_ranges, padded_vocabulary
from megadistill.config import Recipe, load_recipe
from megadistill.data import Mixture
from megadistill.errors import UserError
from megadistill.model.families import load_config
from megadistill.model.flops import Flops, ParameterCounts, flops_per_token, layer_parameters, parameter_counts
from megadistill.model.split import stage_layers
from megadistill.student.profile import load_deepspeed

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
FLOAT32_BYTES = 4
# ZeRO-3 keeps of each parameter, partitioned: the working copy, and in float32 the gradient, the master copy and
# AdamW's two moments.
FLOAT32_COPIES = 4
SAVED_COPIES = 3
"""Of these, a checkpoint has all but the gradient, and the host a copy of it while it is written."""


@dataclass(frozen=True)
class ModelNeeds:
    """One model, counted on the meta device."""

    role: str
    parameters: ParameterCounts
    forward: Flops
    """Of one token."""
    flops: int
    """Of a token of the run: three forward passes to train, and the body's once more where activations are recomputed;
    one forward pass to teach, and its head once more where the surest tokens are looked for first."""


@dataclass(frozen=True)
class Needs:
    """What a recipe needs."""

    ranks: int
    group_size: int
    accumulation: int
    tokens: int
    """Of the whole run."""
    models: tuple[ModelNeeds, ...]
    memory: dict[str, int]
    """Bytes on the device of one of the student's ranks, by what holds them. Activations are those of activation
    checkpointing, or left out."""
    host: dict[str, int]
    """Bytes on the host, of the same rank."""
    teacher_memory: dict[str, int]
    """Bytes on the device of one of the teacher's own ranks; nothing where it has none."""
    wire: dict[str, int]
    """Bytes a rank receives for each token of its micro-batch. An untied head is never gathered over the world."""

    @property
    def flops_per_token(self) -> int:
        return sum(model.flops for model in self.models)


def read_needs(path: Path, overrides: Sequence[str], *, ranks: int) -> Needs:
    """The needs of a recipe file and of what it names, with every rank on one node. `ranks`: the teacher's own, too.

    Raises:
        UserError: the recipe, its data or its models are wrong, or do not divide over the ranks.
    """
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: a run needs at least one")
    recipe = load_recipe(path, overrides)
    data = Mixture.load(recipe.data)
    source = recipe.student.config
    student = load_config(Path(source) if isinstance(source, str) else source, what="student.config")
    student.vocab_size = data.vocab_size
    teacher = None
    if recipe.teacher is not None and recipe.teacher.source == "live":
        assert recipe.teacher.path is not None
        teacher = load_config(Path(recipe.teacher.path), what="teacher.path")
    roles = None
    if recipe.teacher is not None and recipe.teacher.placement == "disaggregated":
        assert recipe.teacher.ranks is not None
        roles = Roles(ranks, recipe.teacher.ranks, recipe.teacher.stages or recipe.teacher.ranks)
        ranks = roles.students
    launch = Launch(rank=0, world=ranks, local_rank=0, local_world=ranks)
    return needs(
        recipe,
        student=student,
        teacher=teacher,
        vocab_size=data.vocab_size,
        sequence_length=data.sequence_length,
        ranks=ranks,
        group_size=vocab_group_size(recipe.comm.vocab_group, launch),
        roles=roles,
        profile=load_deepspeed(Path(recipe.student.deepspeed)),
    )


def rank_memory(
    recipe: Recipe,
    *,
    student: Any,
    teacher: Any | None,
    data: Mixture,
    rank: int,
    ranks: int,
    group_size: int,
    roles: Roles | None,
    profile: Mapping[str, Any],
) -> dict[str, dict[str, int]]:
    """Bytes that rank `rank` of a launch will hold, by what holds them, on its `device` and on its `host`.

    `ranks` are the student's; see `needs`.
    """
    found = needs(
        recipe,
        student=student,
        teacher=teacher,
        vocab_size=data.vocab_size,
        sequence_length=data.sequence_length,
        ranks=ranks,
        group_size=group_size,
        roles=roles,
        profile=profile,
    )
    if rank >= ranks:
        return {"device": found.teacher_memory, "host": {}}
    return {"device": found.memory, "host": found.host}


def needs(
    recipe: Recipe,
    *,
    student: Any,
    teacher: Any | None,
    vocab_size: int,
    sequence_length: int,
    ranks: int,
    group_size: int,
    roles: Roles | None = None,
    profile: Mapping[str, Any] | None = None,
) -> Needs:
    """`student` and `teacher` are Hugging Face configs; the vocabulary is the data's. `ranks` are the student's.

    `roles`: of a teacher with ranks of its own. `profile`: DeepSpeed's settings, which may keep states on the host.

    Raises:
        UserError: the batch does not divide over the ranks, or the teacher has fewer layers than stages.
    """
    accumulation = recipe.accumulation(ranks)
    micro_tokens = recipe.train.micro_batch * sequence_length
    trained = flops_per_token(student, sequence_length)
    again = trained.body + trained.attention if recipe.student.activation_checkpointing else 0
    models = [ModelNeeds("student", parameter_counts(student), trained, flops=3 * trained.forward + again)]
    if teacher is not None:
        frozen = flops_per_token(teacher, sequence_length)
        twice = frozen.head if recipe.loss.label_fraction > 0 else 0
        models.append(ModelNeeds("teacher", parameter_counts(teacher), frozen, flops=frozen.forward + twice))
    element = ELEMENT_BYTES[recipe.train.precision]
    padded = padded_vocabulary(vocab_size, recipe.student.vocab_multiple)
    counts = models[0].parameters
    rows = sum(stop - start for start, stop in block_cyclic_ranges(padded, ranks, group_size, rank=0))
    # Truncated targets are made before the loss, one model's logits at a time.
    logit_buffers = 1 if teacher is None or recipe.loss.targets is not None else 2
    memory, host = _states(counts.total // ranks, element, profile or {})
    host["checkpoint on its way to the disk"] = SAVED_COPIES * FLOAT32_BYTES * counts.total // ranks
    memory |= {
        "gathered layers (two)": 2 * element * counts.body // student.num_hidden_layers,
        "head gradient": rows * student.hidden_size * FLOAT32_BYTES,
        "logit chunk": min(
            recipe.loss.logit_memory_mb << 20, logit_buffers * FLOAT32_BYTES * micro_tokens * group_size * rows
        ),
    }
    if group_size < ranks:  # else ZeRO-3's own partition is the slice
        memory["head rows"] = element * rows * student.hidden_size
    if recipe.student.activation_checkpointing:
        memory["checkpointed activations"] = element * student.num_hidden_layers * student.hidden_size * micro_tokens
    wire = {"ZeRO-3 (two gathers, one reduce-scatter)": 3 * element * (counts.total - counts.head) // micro_tokens}
    if group_size > 1:
        wire["student hidden states, and their gradient"] = (element + FLOAT32_BYTES) * student.hidden_size * group_size
    if teacher is not None:
        stage = element * _largest_stage(teacher, models[1].parameters, roles.stages if roles else group_size)
        if roles is None:
            memory["teacher stage"] = stage
        memory["teacher head rows"] = element * rows * teacher.hidden_size
        memory["teacher hidden states"] = element * micro_tokens * teacher.hidden_size * group_size
        wire["teacher hidden states"] = element * teacher.hidden_size * (1 + group_size if group_size > 1 else 0)
    return Needs(
        ranks=ranks,
        group_size=group_size,
        accumulation=accumulation,
        tokens=recipe.train.steps * recipe.train.global_batch * sequence_length,
        models=tuple(models),
        memory=memory,
        host=host,
        teacher_memory={} if roles is None else {"teacher stage": stage},
        wire=wire,
    )


def _states(parameters: int, element: int, profile: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """What a rank's partition of ZeRO-3 takes on the device, and on the host where DeepSpeed's file offloads it."""
    weights, trained = element * parameters, FLOAT32_COPIES * FLOAT32_BYTES * parameters
    zero = profile.get("zero_optimization", {})
    on_host = 0
    device = weights + trained
    for key, size in (("offload_param", weights), ("offload_optimizer", trained)):
        place = (zero.get(key) or {}).get("device", "none")
        device -= 0 if place == "none" else size
        on_host += size if place == "cpu" else 0
    return {"ZeRO-3 states": device}, {"offloaded ZeRO-3 states": on_host} if on_host else {}


def _largest_stage(teacher: Any, counts: ParameterCounts, stages: int) -> int:
    """Parameters of the stage that holds most: stages are cut by what a token uses, and only the first has the
    embedding."""
    sizes = layer_parameters(teacher)
    held = [sum(sizes[layer] for layer in layers) for layers in stage_layers(teacher, stages)]
    held[0] += counts.embedding
    held[-1] += counts.body - sum(sizes)  # the final norm
    return max(held)


def tables(found: Needs) -> list[Table]:
    """Models, memory and traffic, for a person."""
    shown = {"memory of a rank": found.memory, "memory of its host": found.host, "received a token": found.wire}
    if found.teacher_memory:
        shown["memory of a teacher's rank"] = found.teacher_memory
    return [_models(found), *(_amounts(title, amounts) for title, amounts in shown.items())]


def _models(found: Needs) -> Table:
    total = found.flops_per_token * found.tokens
    table = Table(
        title=f"{found.ranks} ranks, vocabulary and teacher over {found.group_size}, accumulation {found.accumulation}",
        caption=f"{found.tokens:,} tokens x {readable(found.flops_per_token, 'FLOP')} = {total:.3g} FLOP",
    )
    for heading in ("model", "parameters", "body", "embedding", "head", "forward", "a token"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for model in found.models:
        counts = model.parameters
        sizes = (counts.total, counts.body, counts.embedding, counts.head)
        work = (model.forward.forward, model.flops)
        table.add_row(model.role, *(readable(size, "") for size in sizes), *(readable(flops, "FLOP") for flops in work))
    return table


def _amounts(title: str, amounts: dict[str, int]) -> Table:
    table = Table(title=title, show_header=False)
    table.add_column("what")
    table.add_column("bytes", justify="right")
    rows: Sequence[tuple[str, int]] = sorted(amounts.items(), key=lambda item: -item[1])
    for what, amount in rows:
        table.add_row(what, readable(amount, "B"))
    table.add_section()
    table.add_row("together", readable(sum(amounts.values()), "B"))
    return table


def readable(amount: float, unit: str) -> str:
    """Three significant digits with a decimal prefix: `8.03 G`, `16.1 GB`."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while amount >= 999.5 and len(prefixes) > 1:
        amount /= 1000
        prefixes.pop(0)
    return f"{amount:.3g} {prefixes[0]}{unit}".rstrip()
