"""Builds the parts of a run from its setup: process groups, models, data stream, objective, meter, describing files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from megadistill.config.recipe import Recipe
from megadistill.data import Mixture, TokenStream
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology, process_groups
from megadistill.distributed.vocab import VocabSlice
from megadistill.distributed.watchdog.parent import terminate_with_parent
from megadistill.errors import RankUserError, UserError
from megadistill.models.experts import RouterCoefs
from megadistill.models.families import logit_transform
from megadistill.student.engine import StudentEngine
from megadistill.train.objective import Objective
from megadistill.train.setup.run_folder import (
    copy_student_config,
    copy_tokenizer,
    recorded_parents,
    recorded_start,
    started_from,
    write_description,
)
from megadistill.train.setup.setup import Setup, check_node, prepare, with_copy
from megadistill.train.teacher.placement import load_teacher
from megadistill.train.teacher.probe import PROBE_TOKENS, ProbeInput, TeacherCheck
from megadistill.train.teacher.protocol import Teacher
from megadistill.train.telemetry.metrics import Meter
from megadistill.train.telemetry.rank_flops import RankFlops
from megadistill.train.validation.held_out_batches import HeldOutBatches
from megadistill.types import Cursor, TokenBatch


@contextmanager
def launched(recipe: Recipe) -> Iterator[tuple[Setup, Topology]]:
    """The recipe's setup and process groups, on the ranks that the launcher started.

    Raises:
        UserError: the recipe does not fit the launch, the data, the teacher or the folder; nothing was started.
        RankUserError: a UserError of the body, with its rank.
    """
    launch = Launch.from_environment()
    setup = prepare(recipe, launch, checks_models=False)
    minutes = recipe.distributed.timeout_minutes
    terminate_with_parent(60 * minutes)
    with process_groups(
        launch,
        vocab_group=setup.group_size,
        sequence=recipe.distributed.sequence,
        replicas=setup.replicas if setup.separate is None else 1,
        timeout_minutes=minutes,
        roles=setup.roles,
        node_check=partial(check_node, setup, launch),
    ) as topology:
        try:
            yield with_copy(setup), topology
        except RankUserError:  # it names the rank
            raise
        except UserError as error:
            raise RankUserError(f"rank {topology.rank}: {error}") from error


def build(setup: Setup, topology: Topology) -> tuple[StudentEngine, Teacher]:
    """Student and teacher of this rank. The teacher's stage comes first: see `load_teacher`.

    The student has no values yet: see `Recovery.restore`.
    """
    recipe = setup.recipe
    teacher_on_slice = load_teacher(setup, topology)
    student = StudentEngine(
        setup.student_config,
        section=recipe.student,
        train=recipe.train,
        deepspeed_config=setup.deepspeed_config,
        vocab_size=setup.data.vocab_size,
        accumulation=setup.accumulation,
        topology=topology,
        attention=setup.attention("student").value,
    )
    return student, teacher_on_slice(student.head.vocab)


def objective_of(setup: Setup) -> Objective:
    recipe = setup.recipe
    return Objective(
        loss=recipe.loss,
        length=recipe.train.length,
        seed=recipe.run.seed,
        entries_have_weights=recipe.has_scheduled_weights and recipe.loss.schedule is None,
        student_logits=logit_transform(setup.student_config),
        router_coefs=RouterCoefs.of(recipe.loss, setup.student_config),
    )


def stream_of(
    setup: Setup, topology: Topology, *, start: Cursor | None, skips: Sequence[tuple[int, int]] = ()
) -> TokenStream:
    """The rows that this rank reads, alone or with those that share its sequences.

    `skips`: ranges of slots to leave out beside those of the recipe.
    """
    data = setup.recipe.data
    return TokenStream(
        setup.data,
        seed=data.seed,
        batch_slots=setup.recipe.train.global_batch,
        rank=topology.data_rank,
        world_size=topology.data_world,
        start=start,
        document_mask=data.document_mask,
        on_corrupt_sample=data.on_corrupt_sample,
        max_masked_per_million=data.max_masked_per_million,
        skips=[*((first, stop) for first, stop in data.skip), *skips],
        prefetch=data.prefetch,
        pinned_for=None if topology.device.type == "cpu" else topology.device,
        peers=_peers(topology) if setup.teachers else None,
        rows=setup.rows_at,
    )


def _peers(topology: Topology) -> range:
    """The ranks of this rank's vocab group, which hold the stages of each teacher."""
    first = topology.rank - topology.group_rank
    return range(first, first + topology.group_size)


def held_out_of(setup: Setup, topology: Topology) -> HeldOutBatches | None:
    """The micro-batches of this rank's validations; None for a run without them."""
    if not setup.held_out:
        return None
    sizes = {shape.sequence_length: shape.micro_batch for shape in reversed(setup.shapes)}
    rows = [sizes.get(split.manifest.sequence_length, setup.recipe.train.micro_batch) for split in setup.held_out]
    mask, sources = setup.recipe.data.document_mask, setup.data.names
    return HeldOutBatches(setup.held_out, topology, rows=rows, document_mask=mask, sources=sources)


def meter_of(setup: Setup, topology: Topology) -> Meter:
    shares = [(share, setup.teachers[name].teacher_config) for name, share in setup.teacher_shares().items()]
    return Meter(
        student=setup.student_config,
        teachers=[(share, config) for share, config in (*shares, (1.0, setup.teacher_config)) if config is not None],
        precision=setup.recipe.train.precision,
        topology=topology,
        flops=partial(RankFlops.of, setup, topology),
    )


def check_teacher(
    setup: Setup,
    teacher: Teacher,
    vocab: VocabSlice,
    topology: Topology,
    *,
    start: Cursor | None,
    skips: Sequence[tuple[int, int]],
) -> list[TeacherCheck]:
    """`Teacher.check` with rows of the run's stream; of one of several teachers, with the first of its sources."""

    def rows(of: Setup) -> TokenBatch:
        return first_rows(of, topology, start=start, skips=skips) if not of.teaches else first_rows_of_source(of)

    return teacher.check(setup, vocab, topology, rows=rows)


def first_rows(
    setup: Setup, topology: Topology, *, start: Cursor | None = None, skips: Sequence[tuple[int, int]] = ()
) -> TokenBatch:
    """The next micro-batch of the run's stream, read apart from it: corrupt samples in it are not counted."""
    stream = stream_of(setup, topology, start=start, skips=skips)
    first = stream.next_start
    shape = setup.shape_at(first)
    return stream.batch(range(first, first + min(shape.micro_batch, shape.global_batch)))


def first_rows_of_source(setup: Setup) -> TokenBatch:
    """The first micro-batch of a source that one of several teachers teaches, read apart from the stream."""
    data, source = setup.recipe.data, min(setup.teaches)
    mixture = Mixture.of(setup.data.sources[source], insert_bos=setup.data.insert_bos)
    stream = TokenStream(
        mixture,
        seed=data.seed,
        batch_slots=1,
        rank=0,
        world_size=1,
        document_mask=data.document_mask,
        on_corrupt_sample=data.on_corrupt_sample,
        max_masked_per_million=data.max_masked_per_million,
    )
    return stream.batch(range(setup.shapes[0].micro_batch))


def shared_probe(setup: Setup, topology: Topology) -> ProbeInput:
    """The first tokens of the stream, as rank 0 reads them. Collective."""
    K = min(PROBE_TOKENS, setup.shapes[0].sequence_length)

    def rows() -> TokenBatch:
        return first_rows_of_source(setup) if setup.teaches else first_rows(setup, topology)

    return ProbeInput.shared(topology, lambda: ProbeInput.of(rows(), K))


def write_run_files(setup: Setup) -> None:
    """Recipe, tokenizer and student config, so that the run folder can be read and exported alone. Rank 0."""
    if setup.parent is None:
        first, parents = started_from(setup.folder, setup.recipe.student.weights), recorded_parents(setup.folder)
    else:  # student.weights are not read
        first = None if setup.parent.run is None else recorded_start(setup.parent.run)
        parents = [each.model_dump() for each in setup.parent.lineage]
    tokenizer = copy_tokenizer(setup.folder, setup.data)
    write_description(
        setup.folder,
        setup.recipe.snapshot(),
        setup.deepspeed_config,
        tokenizer=tokenizer,
        started_from=first,
        parents=parents,
    )
    copy_student_config(setup.folder, setup.recipe.student)
