"""Room `train`: the targets of a run, made by its teacher alone and stored. It knows no student.

The ranks are those of the recipe, and the vocabulary is shared out evenly over each group: what is stored does not
depend on how many there are.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path

from torch import Tensor

from megadistill.config import Recipe
from megadistill.distributed.collectives import barrier
from megadistill.distributed.topology import Launch, Topology, joined
from megadistill.distributed.vocab import VocabSlice
from megadistill.distributed.watchdog.parent import terminate_with_parent
from megadistill.errors import RankUserError, UserError
from megadistill.progress import ShowProgress, console_progress
from megadistill.train.loop import objective_of, stream_of
from megadistill.train.setup.setup import Setup, prepare
from megadistill.train.teacher.placement import finish, keeping, pipeline_of, serve, teacher_of
from megadistill.train.teacher.targets import Teacher, lessons


def cache(recipe: Recipe, folder: Path, *, steps: int | None = None) -> str | None:
    """Stores in `folder` what the recipe's teacher says of the first `steps` steps, or of all of them.

    The same call goes on where a killed one stopped. A line that says what was stored, on the first rank alone.

    Raises:
        UserError: the recipe has no live teacher or no `loss.targets`, or the folder holds other targets.
    """
    if recipe.teacher is None or recipe.teacher.source != "live" or recipe.loss.targets is None:
        raise UserError("cache stores loss.targets of a live teacher: the recipe needs both, and objective distill")
    teacher = recipe.teacher.model_copy(update={"save_targets": str(folder)})
    launch = Launch.from_environment()
    run = recipe.run.model_copy(update={"folder": str(folder)})  # no run is begun, so none is in the way
    setup = prepare(recipe.model_copy(update={"teacher": teacher, "run": run}), launch)
    minutes = recipe.distributed.timeout_minutes
    terminate_with_parent(60 * minutes)
    with joined(launch, vocab_group=setup.group_size, timeout_minutes=minutes, roles=setup.roles) as topology:
        try:
            if topology.role == "teacher":
                serve(setup, topology)
                return None
            with console_progress() as show:
                return store_targets(setup, topology, steps or recipe.train.steps, show)
        except UserError as error:
            raise RankUserError(f"rank {topology.rank}: {error}") from error


def store_targets(setup: Setup, topology: Topology, steps: int, show: ShowProgress) -> str | None:
    """On an initialised world. Collective; see `cache`."""
    recipe, objective = setup.recipe, objective_of(setup)
    vocab = even_slice(setup.data.vocab_size, topology)
    teacher = teacher_of(setup, pipeline_of(setup, topology), vocab, topology)
    assert isinstance(teacher, Teacher)
    teacher = keeping(setup, teacher, topology)
    assert teacher.store is not None
    stream = stream_of(setup, topology, start=None)
    slots, done = recipe.train.global_batch, 0
    if not recipe.data.skip:  # which would leave it to the stream what the slots of a step are
        done = teacher.store.first_missing(0, steps * slots) // slots
        stream = stream_of(setup, topology, start=replace(stream.start, next_slot=done * slots))
    batches = islice((batch for batch, _ in stream), steps - done)
    micros = (micro for batch in batches for micro in batch.micro_batches(recipe.train.micro_batch))
    for number, (batch, said) in enumerate(lessons(teacher, micros), 1):
        assert isinstance(said, Tensor)
        teacher.targets(said, batch.to(topology.device), objective, vocab)  # which keeps them
        if topology.is_first:
            tokens = number * setup.tokens_per_step // setup.accumulation
            whole = (steps - done) * setup.tokens_per_step
            show("targets, tokens", done=tokens, total=whole, tokens=tokens)
    teacher.pipeline.close()
    teacher.store.flush()
    barrier(topology.world_group)
    return finish(setup) if topology.is_first else None


def even_slice(vocab_size: int, topology: Topology) -> VocabSlice:
    """This rank's rows of a vocabulary that no student shares out."""
    place, ranks = topology.group_rank, topology.group_size
    start, stop = (vocab_size * edge // ranks for edge in (place, place + 1))
    return VocabSlice.contiguous(start, stop, vocab_size, topology.vocab_group)
