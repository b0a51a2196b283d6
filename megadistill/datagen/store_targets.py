"""Stores the targets of a run, made by its teacher alone, for runs without a teacher in memory.

The ranks are those of the recipe, and the vocabulary is split evenly over each group: the targets do not depend on the
number of ranks.
"""

import logging
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

from megadistill.config.recipe import Recipe
from megadistill.data.stream.segments import slots_after, steps_before, tokens_after
from megadistill.distributed.topology import Topology, even_slice
from megadistill.errors import UserError
from megadistill.io import locked_folder
from megadistill.progress import ShowProgress, console_progress
from megadistill.train.build import launched, objective_of, shared_probe, stream_of
from megadistill.train.setup.plausibility import implausible_settings
from megadistill.train.setup.setup import Setup
from megadistill.train.teacher.float8_check import require_close
from megadistill.train.teacher.placement import live_teacher, run_teacher_server
from megadistill.train.teacher.probe import worse_than_uniform

logger = logging.getLogger(__name__)


def store_targets(recipe: Recipe, folder: Path, *, steps: int | None = None) -> str | None:
    """Stores in `folder` the targets of the first `steps` steps, or of all of them. The same call resumes a killed one.

    Returns:
        A line that describes the targets, on rank 0.

    Raises:
        UserError: the recipe has no live teacher or no `loss.targets`, or the folder holds other targets.
    """
    if recipe.teachers:
        raise UserError(
            "store-targets stores the targets of one teacher for every row: name it as teacher, without teachers, and "
            "store those of each in a folder of its own"
        )
    if recipe.teacher is None or not recipe.teacher.is_live or recipe.loss.targets is None:
        raise UserError(
            "store-targets stores loss.targets of a live teacher: the recipe needs both, and objective distill"
        )
    teacher = recipe.teacher.model_copy(update={"save_targets": str(folder)})
    run = recipe.run.model_copy(update={"folder": str(folder)})  # not the recipe's own, which may hold a run
    with launched(recipe.model_copy(update={"teacher": teacher, "run": run})) as (setup, topology):
        if topology.role == "teacher":
            run_teacher_server(setup, topology)
            return None
        with ExitStack() as stack:
            if topology.is_first:  # for all ranks: two jobs would number their shards alike
                problem = f"another `megadistill store-targets` is writing to {folder}: wait for it"
                stack.enter_context(locked_folder(folder, problem=problem))
            show = stack.enter_context(console_progress())
            return store_on_ranks(setup, topology, steps or setup.recipe.train.steps, show)


def store_on_ranks(setup: Setup, topology: Topology, steps: int, show: ShowProgress) -> str | None:
    """See `store_targets`, on process groups that exist. Collective."""
    recipe, objective = setup.recipe, objective_of(setup)
    vocab = even_slice(setup.data.vocab_size, topology)
    teacher = live_teacher(setup, topology)(vocab)
    probe = shared_probe(setup, topology)
    output = teacher.output(probe, setup, vocab)
    problem = worse_than_uniform(float(output.cross_entropy), setup.data.vocab_size)
    if topology.is_first:
        for warning in filter(None, (problem, implausible_settings(setup).get("BOS"))):
            logger.warning("%s", warning)
    if recipe.teacher is not None and recipe.teacher.precision == "float8":
        difference = teacher.float8_difference(probe, setup, vocab, topology)
        if topology.is_first:
            logger.info("%s", difference.line)
        if difference.problem(recipe.teacher.float8_max_kl):
            teacher.close()
        require_close(difference, recipe.teacher.float8_max_kl, topology)
    teacher.start()
    stream = stream_of(setup, topology, start=None)
    paces, done = [shape.pace for shape in setup.shapes], 0
    if teacher.saved is not None and not recipe.data.skip:  # which alone decides the slots of a step
        done = steps_before(paces, teacher.saved.first_missing(0, slots_after(paces, steps)))
        stream = stream_of(setup, topology, start=replace(stream.start, next_slot=slots_after(paces, done)))
    batches = islice((batch for batch, _ in stream), steps - done)
    micro_batches = (
        micro for batch in batches for micro in batch.micro_batches(setup.shape_at(int(batch.slots[0])).micro_batch)
    )
    tokens, whole = 0, tokens_after(paces, steps) - tokens_after(paces, done)
    for target in teacher.live_targets(micro_batches):
        target.truncated(objective, vocab)
        if topology.is_first:
            tokens += target.batch.starts.numel() * topology.data_world
            show("targets, tokens", done=tokens, total=whole, tokens=tokens)
    teacher.close()
    return teacher.finish()
