"""Everything that sends or receives ends under NCCL's rules (see `tests.ranks.nccl_rules`), and gets the right answer.

The teacher's stages add 1 to what they get; the student's ZeRO-3 leaves all-gathers of its world in flight.
"""

import ast
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

import megadistill
from megadistill.distributed.bridge import Bridge
from megadistill.distributed.broadcast_reader import BroadcastReader
from megadistill.distributed.collectives import Pending, start_all_gather_rows
from megadistill.distributed.launch import Launch
from megadistill.distributed.measures import bandwidth
from megadistill.distributed.p2p import Endpoint
from megadistill.distributed.rendezvous import store_barrier
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology, even_slice, topology_of_teacher, topology_of_world
from megadistill.distributed.vocab import VocabSlice
from megadistill.errors import UserError
from megadistill.teacher.codec import ActivationCodec
from megadistill.teacher.disaggregated import RemoteTeacher, RequestCodec, TeacherServer
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage, head_rows
from megadistill.train.resilience.sdc import weights_digest
from megadistill.train.teacher.live import ColocatedTeacher, LiveTeacher
from megadistill.train.teacher.probe import ProbeInput
from megadistill.types import TeacherSignal, TokenBatch, token_digest
from tests.paths import ROOT
from tests.ranks.nccl_rules import Failed, Group, Hang, Store, finished, run_threads
from tests.unit.models.cases import VOCAB, saved_model

B, S, E, QUEUE = 1, 8, 4, 2
CPU, TIMEOUT = torch.device("cpu"), timedelta(minutes=1)
PREFETCHED = 3
"""All-gathers that the student leaves in flight."""


@dataclass
class Stage:
    """Hidden states that say which tokens they are of, and how many stages they passed."""

    stage: int
    stages: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def hidden_shape(self, batch: int, sequence: int) -> tuple[int, int, int]:
        return batch, sequence, E

    packet_shape = hidden_shape
    reads_tokens = False

    def __call__(
        self, x: torch.Tensor, positions: torch.Tensor | None, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        return 1 + (x.unsqueeze(-1).expand(*x.shape, E).float() if self.is_first else x)


def _batch(rank: int, index: int) -> TokenBatch:
    tokens = torch.randint(1000, (B, S), generator=torch.Generator().manual_seed(1000 * rank + index))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    return TokenBatch(tokens, tokens, torch.tensor([100 * rank + index]), token_digest(tokens), starts)


def _check(signal: TeacherSignal, batch: TokenBatch, stages: int) -> None:
    expected = (batch.tokens.flatten()[:, None] + stages).expand(-1, E).float()
    assert torch.equal(signal.hidden_for(batch), expected)


class Student:
    """The collectives of a step, some of which are in flight when the teacher is asked again."""

    def __init__(self) -> None:
        self._in_flight: list[Pending] = []

    def step(self, rank: int) -> None:
        self.finish()
        self._in_flight = [start_all_gather_rows(torch.ones(2), dist.group.WORLD) for _ in range(PREFETCHED)]

    def finish(self) -> None:
        for pending in self._in_flight:
            pending.wait()
        self._in_flight = []


# A teacher with ranks of its own


def _client(bridge: Bridge, rank: int, takes: list[int], rounds: int, queue: int) -> None:
    remote = RemoteTeacher(
        bridge, RequestCodec(B, S, masked=False), ActivationCodec(E, torch.float32), queue=queue, device=CPU
    )
    student = Student()
    for stream, take in enumerate(takes):
        batches = [_batch(rank, 10 * stream + index) for index in range(rounds)]
        with closing(remote.signals(iter(batches))) as signals:
            for batch, signal in zip(batches, islice(signals, take), strict=False):
                _check(signal, batch, bridge.roles.stages)
                student.step(rank)
    student.finish()
    remote.close()


def _server(bridge: Bridge, rank: int, queue: int, served: Callable[[int], None]) -> int:
    stage = Stage(bridge.roles.stage(rank), bridge.roles.stages)
    requests, answers = RequestCodec(B, S, masked=False), ActivationCodec(E, torch.float32)
    done = 0
    for done in TeacherServer(stage, bridge, requests, answers, queue=queue).serve():
        served(done)
    return done


def _run(
    roles: Roles,
    *,
    takes: list[int],
    rounds: int = 5,
    queue: int = QUEUE,
    one_queue: bool = False,
    fails: int | None = None,
) -> list[Any]:
    """A run from its first rendezvous to its last; `fails`: the rank that raises after its second micro-batch."""

    def rank_of(rank: int, store: Store) -> int:
        bridge = Bridge(store, roles, rank, device=CPU, timeout=TIMEOUT)
        done = 0
        if not roles.is_student(rank):

            def served(number: int) -> None:
                if rank == fails and number == 2:
                    raise ValueError("broken")

            done = _server(bridge, rank, queue, served)
        elif rank == fails:
            _client(bridge, rank, [2], rounds, queue)
            raise ValueError("broken")
        else:
            _client(bridge, rank, takes, rounds, queue)
        store_barrier(store, "end", rank, roles.world, TIMEOUT)
        bridge.close()
        return done

    return run_threads(roles.world, rank_of, one_queue=one_queue, roles=roles)


SMALL = {
    "1+1": Roles(2, 1, 1),
    "2+2": Roles(4, 2, 2),
    "3+5": Roles(8, 5, 5),
    "4+4": Roles(8, 4, 4),
    "4+2": Roles(6, 2, 2),
}


def _recipes_roles() -> dict[str, Roles]:
    """Two of the replicas of each recipe at scale, with all of their clients and stages."""
    shapes = {}
    for path in sorted(ROOT.glob("recipes/*/512-nodes.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        teacher = values["teacher"]
        whole = Roles(512 * 8, teacher["ranks"], teacher["stages"])
        share = len(whole.clients(0))
        shapes[path.parent.name] = Roles(2 * (share + whole.stages), 2 * whole.stages, whole.stages)
    return shapes


# The batch scripts' own examples: 16 nodes of eight for the student and one for the teacher; 14 and two of four.
SHAPES = SMALL | _recipes_roles() | {"17 nodes": Roles(136, 8, 8), "14 + 2 nodes": Roles(120, 8, 8)}


def test_the_recipes_at_scale_are_there() -> None:
    assert _recipes_roles() == {
        "gemma2-27b-to-2b": Roles(16, 10, 5),
        "gemma2-27b-to-9b": Roles(16, 8, 4),
        "llama3-70b-to-8b": Roles(16, 10, 5),
    }


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_starts_rolls_back_and_stops(shape: str, one_queue: bool) -> None:
    """The second stream begins after a rollback, with answers of the first one under way; the last ends by itself."""
    roles, rounds = SHAPES[shape], 3
    results = finished(_run(roles, takes=[1, 0, rounds], rounds=rounds, one_queue=one_queue))
    requested = (1 + QUEUE - 1) + 0 + rounds
    clients = len(roles.clients(0))
    assert results == [0] * roles.students + [clients * requested] * roles.teachers


@pytest.mark.parametrize(("students", "teachers", "stages", "queue"), [(1, 4, 4, 1), (3, 5, 5, 1), (6, 6, 2, 4)])
def test_any_queue_will_do(students: int, teachers: int, stages: int, queue: int) -> None:
    """With one request under way a stage's next receive must not stand in front of its send."""
    roles = Roles(students + teachers, teachers, stages)
    for one_queue in (False, True):
        finished(_run(roles, takes=[3, 5], queue=queue, one_queue=one_queue))


@pytest.mark.parametrize("shape", ["1+1", "3+5", "gemma2-27b-to-9b"])
@pytest.mark.parametrize("role", ["first client", "last client", "first stage", "last stage"])
def test_a_peer_that_dies_leaves_none_behind(shape: str, role: str) -> None:
    """All ranks of its replica wait for it in the end; NCCL's watchdog, or ours, ends them there."""
    roles = SHAPES[shape]
    last_client = roles.clients(0)[-1]
    first, last = roles.rank_of(0, 0), roles.rank_of(0, roles.stages - 1)
    dies = {"first client": 0, "last client": last_client, "first stage": first, "last stage": last}[role]
    results = _run(roles, takes=[5], fails=dies)
    for rank, result in enumerate(results):
        assert isinstance(result, Failed), f"rank {rank} ended as if nothing had happened"
        assert isinstance(result.error, ValueError if rank == dies else Hang)
        assert rank == dies or f"rank {dies} has failed: ValueError: broken" in str(result.error)


def _both_ways(kind: str) -> Callable[[pytest.MonkeyPatch], None]:
    """How the messages were ordered before: each of these hangs under NCCL's rules, and none under gloo's."""

    def one_group(patch: pytest.MonkeyPatch) -> None:
        """Requests and answers between the same two ranks on the device."""
        make = Bridge.__init__

        def made(self: Bridge, *arguments: Any, **keywords: Any) -> None:
            make(self, *arguments, **keywords)
            self.on_host = self.on_device

        patch.setattr(Bridge, "__init__", made)

    def unconnected(patch: pytest.MonkeyPatch) -> None:
        """Communicators made at the first message, which the receive of the answer is."""
        patch.setattr(Endpoint, "connect", lambda *_: None)

        def receive_first(self: RemoteTeacher, batch: TokenBatch) -> None:
            buffer = torch.empty(self._answers.bytes(B, S), dtype=torch.uint8)
            answer = self._bridge.on_device.post_recv(buffer, self._last, label="answer")
            request = self._bridge.on_host.send(self._requests.encode(batch), self._first, label="request")
            self._in_flight.append((request, answer, (B, S)))

        patch.setattr(RemoteTeacher, "_send_request", receive_first)

    def both(patch: pytest.MonkeyPatch) -> None:
        one_group(patch)
        unconnected(patch)

    return {"one group": one_group, "unconnected": unconnected, "both": both}[kind]


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [("both", ["1+1", "2+2", "3+5", "4+4"]), ("unconnected", ["1+1", "2+2", "3+5", "4+4"]), ("one group", ["1+1"])],
)
def test_the_former_orders_hang(kind: str, shapes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _both_ways(kind)(monkeypatch)
    for shape in shapes:
        results = _run(SHAPES[shape], takes=[5])
        assert all(isinstance(result, Failed) and isinstance(result.error, Hang) for result in results), results


# A teacher on the student's ranks


def _topology(rank: int, world: int, group: int) -> Topology:
    return topology_of_world(Launch(rank, world, rank, world), vocab_group=group, device=CPU, timeout=TIMEOUT)


def _pipeline(topology: Topology) -> TeacherPipeline:
    stage: Any = Stage(topology.group_rank, topology.group_size)
    return TeacherPipeline(stage, topology)


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_the_colocated_pipeline_ends(stages: int, replicas: int, one_queue: bool) -> None:
    world, rounds = stages * replicas, 12

    def rank_of(rank: int, store: Store) -> None:
        pipeline, student = _pipeline(_topology(rank, world, stages)), Student()
        for take in (3, rounds):  # closed early, as by a rollback
            batches = [_batch(rank, index) for index in range(rounds)]
            with closing(pipeline.signals(iter(batches))) as signals:
                for batch, signal in zip(batches, islice(signals, take), strict=False):
                    _check(signal, batch, stages)
                    student.step(rank)
        student.finish()
        pipeline.close()

    finished(run_threads(world, rank_of, one_queue=one_queue))


def _ragged(rank: int, index: int, rows: tuple[int, ...]) -> TokenBatch:
    return replace(
        _batch(rank, index), sources=torch.tensor(1 - rows[rank]), peer_sources=1 - torch.tensor([rows])
    ).of_sources({0})


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("stages", [2, 4])
def test_the_pipelines_of_several_teachers_end(stages: int, one_queue: bool) -> None:
    """Read in turn, each with rows of some ranks, or of none; closed early, as by a rollback, and to the end."""
    rounds = 12

    def rows_of(teacher: int, index: int) -> tuple[int, ...]:
        return tuple(int((index + rank) % 3 == teacher) if index % 5 else 0 for rank in range(stages))

    def rank_of(rank: int, store: Store) -> None:
        topology, student = _topology(rank, stages, stages), Student()
        first, stage = _pipeline(topology), Stage(rank, stages)
        pipelines = [first, TeacherPipeline(stage, topology, beside=first)]  # type: ignore[arg-type]
        for take in (3, rounds):
            batches = [[_ragged(rank, i, rows_of(teacher, i)) for i in range(rounds)] for teacher in range(2)]
            with ExitStack() as stack:
                streams = [
                    stack.enter_context(closing(pipeline.signals(iter(of_teacher))))
                    for pipeline, of_teacher in zip(pipelines, batches, strict=True)
                ]
                for index in range(take):
                    for stream, of_teacher in zip(streams, batches, strict=True):
                        _check(next(stream), of_teacher[index], stages)
                    student.step(rank)
        student.finish()

    finished(run_threads(stages, rank_of, one_queue=one_queue))


def test_the_pipelines_communicators_are_made_before_its_first_round() -> None:
    def rank_of(rank: int, store: Store) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
        topology = _topology(rank, 4, 4)
        pipeline = _pipeline(topology)
        group: Any = topology.pipeline_group
        assert isinstance(group, Group)
        store_barrier(store, "made", rank, 4, TIMEOUT)
        made = set(group.world.made)
        for _ in pipeline.signals(_batch(rank, index) for index in range(6)):
            pass
        return made, set(group.world.made)

    for before, after in finished(run_threads(4, rank_of)):
        pairs = {made[1:] for made in before if len(made) == 3}
        assert pairs == {(0, 1), (1, 2), (2, 3)}
        assert {made[1:] for made in after if len(made) == 3} == pairs


# What reads a live teacher besides a training step: the probe and the doctor's prediction, `store-targets`


def _live(kind: str, bridge: Bridge | None, topology: Topology) -> LiveTeacher:
    head = torch.randn(even_slice(50, topology).rows, E, generator=torch.Generator().manual_seed(topology.rank))
    if bridge is None:
        return ColocatedTeacher(_pipeline(topology), head)
    requests, answers = RequestCodec(B, S, masked=False), ActivationCodec(E, torch.float32)
    return LiveTeacher(RemoteTeacher(bridge, requests, answers, queue=QUEUE, device=CPU), head)


def _probe_and_targets(kind: str, bridge: Bridge | None, topology: Topology, rank: int) -> None:
    """The probe before a step, its targets read ahead, and all targets of a sweep."""
    vocab, teacher = even_slice(50, topology), _live(kind, bridge, topology)
    recipe = SimpleNamespace(data=SimpleNamespace(document_mask=False))
    setup: Any = SimpleNamespace(recipe=recipe, shapes=[SimpleNamespace(micro_batch=B, sequence_length=S)])
    tokens = torch.arange(S) % 50
    output = teacher.output(ProbeInput(slot=0, tokens=tokens), setup, vocab)
    assert output.cross_entropy.isfinite().all()
    targets = teacher.teacher_targets(_batch(rank, index) for index in range(4))
    next(targets)
    targets.close()
    assert len(list(teacher.live_targets(_batch(rank, index) for index in range(5)))) == 5
    teacher.close()


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("kind", ["colocated", "disaggregated"])
def test_probes_and_stored_targets_end(kind: str, one_queue: bool) -> None:
    roles = Roles(8, 4, 2) if kind == "disaggregated" else None

    def rank_of(rank: int, store: Store) -> None:
        bridge = None if roles is None else Bridge(store, roles, rank, device=CPU, timeout=TIMEOUT)
        if bridge is not None and not bridge.roles.is_student(rank):
            _server(bridge, rank, QUEUE, lambda done: None)
        else:
            _probe_and_targets(kind, bridge, _topology(rank, 4, 2), rank)
        store_barrier(store, "end", rank, 4 if roles is None else 8, TIMEOUT)
        if bridge is not None:
            bridge.close()

    finished(run_threads(4 if roles is None else 8, rank_of, one_queue=one_queue, roles=roles))


@pytest.mark.parametrize(("world", "local_world"), [(2, 2), (3, 3), (4, 2), (8, 4)])
def test_the_doctors_measurements_end(world: int, local_world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "CPU_BUFFER_BYTES", 64)

    def rank_of(rank: int, store: Store) -> int:
        topology = _topology(rank, world, 1)
        bandwidth.clock_offsets(topology)
        bandwidth.all_reduce_bandwidth(topology)
        return len(bandwidth.pair_bandwidths(topology, bandwidth.neighbours(world, local_world)))

    pairs = {pair for pairs in bandwidth.neighbours(world, local_world) for pair in pairs}
    assert finished(run_threads(world, rank_of, one_queue=True)) == [len(pairs)] * world


def _stage_and_head(folder: Path, topology: Topology, *, breaks: bool) -> tuple[int, torch.Tensor]:
    """Digest of the stage, and rows of the head, of a real folder of weights. `breaks`: this rank cannot read."""
    if breaks:
        folder = folder / "broken"

    def reader() -> BroadcastReader:
        return BroadcastReader(topology, group=topology.slice_group)

    place: dict[str, Any] = {"stage": topology.group_rank, "stages": topology.group_size}
    how: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
    stage = TeacherStage.load(folder, **place, **how, reader=reader())
    rows = torch.zeros(0)
    if topology.role == "student":
        rows = head_rows(folder, even_slice(VOCAB, topology), **how, reader=reader())
    return int(weights_digest(stage.weights()).sum()), rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and one whose weights are missing."""
    folder = tmp_path_factory.mktemp("teacher")
    saved_model("llama", folder)
    (folder / "broken").mkdir()
    shutil.copy(folder / "config.json", folder / "broken")
    return folder


@pytest.mark.parametrize("one_queue", [False, True])
@pytest.mark.parametrize("breaks", [None, 0, 1])
@pytest.mark.parametrize("kind", ["colocated", "disaggregated"])
def test_a_teacher_read_once_reaches_every_replica(
    kind: str, breaks: int | None, one_queue: bool, folder: Path
) -> None:
    """Four ranks in two stages; `breaks` is the one that cannot read."""
    roles = Roles(8, 4, 2) if kind == "disaggregated" else None

    def rank_of(rank: int, store: Store) -> tuple[int, torch.Tensor] | str:
        if roles is None:
            topology = _topology(rank, 4, 2)
        elif roles.is_student(rank):
            return "a student"
        else:
            own = Launch(rank - roles.students, roles.teachers, rank, 8)
            topology = topology_of_teacher(own, roles, device=CPU, timeout=TIMEOUT)
        try:
            return _stage_and_head(folder, topology, breaks=topology.rank == breaks)
        except UserError as error:
            return str(error)

    results = finished(run_threads(4 if roles is None else 8, rank_of, one_queue=one_queue, roles=roles))[-4:]
    if breaks is not None:
        whose = "rank" if roles is None else "the teacher's rank"
        assert set(results) == {
            f"{whose} {breaks}: {folder}/broken has neither model.safetensors nor "
            "model.safetensors.index.json; name a Hugging Face model folder"
        }
        return
    truth = [TeacherStage.load(folder, stage=j, stages=2, dtype=torch.float32, device=CPU) for j in range(2)]
    for rank, (digest, rows) in enumerate(results):
        assert digest == int(weights_digest(truth[rank % 2].weights()).sum())
        if roles is None:
            vocab = VocabSlice.contiguous(*((0, 125), (125, 250))[rank % 2], VOCAB, None)
            assert torch.equal(rows, head_rows(folder, vocab, dtype=torch.float32, device=CPU))


USERS = {
    "distributed/measures/bandwidth.py": test_the_doctors_measurements_end,
    "distributed/bridge.py": test_a_run_starts_rolls_back_and_stops,
    "distributed/topology.py": test_a_run_starts_rolls_back_and_stops,
    "doctor/dry_run.py": test_the_colocated_pipeline_ends,  # one round, and a step
    "teacher/disaggregated.py": test_a_run_starts_rolls_back_and_stops,
    "teacher/pipeline.py": test_the_colocated_pipeline_ends,
    "train/teacher/live.py": test_probes_and_stored_targets_end,
    "teacher/stage.py": test_a_teacher_read_once_reaches_every_replica,
    "train/teacher/placement.py": test_probes_and_stored_targets_end,
}
"""Module with messages, or a user of one -> the test above that runs its messages."""


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def test_every_user_of_messages_is_known() -> None:
    """Who sends or receives, or names a class that does, has a test above."""
    makers = {"BroadcastReader", "Endpoint", "exchange", "Bridge", "TeacherPipeline", "RemoteTeacher", "TeacherServer"}
    own = Path(megadistill.__file__).parent
    texts = {file: file.read_text(encoding="utf-8") for file in own.rglob("*.py")}
    users = {
        file.relative_to(own).as_posix()
        for file, text in texts.items()
        if any(name in text for name in makers) and makers & set(_names(ast.parse(text)))
    }
    assert users == USERS.keys()
