"""A student and its teacher on real ranks, with a record of live bytes, their makers, and received bytes.

Both are recorded where torch dispatches operators, below DeepSpeed and this package: an operator's outputs are storages
that live until they are freed, and a collective is an operator of `c10d` with the tensors that it sends and fills.
The maker or receiver is the innermost known caller, by its file.
"""

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.collective_calls import Collective, Collectives
from megadistill.config.recipe import AttentionSetting, Checkpointing, Recipe
from megadistill.distributed.all_to_all import OPERATOR
from megadistill.distributed.p2p import Endpoint
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology
from megadistill.models.attention.choice import choose_attention
from megadistill.models.experts import RouterCoefs
from megadistill.models.families import load_config
from megadistill.precision import Precision, torch_dtype
from megadistill.student.deepspeed_config import load_deepspeed_config
from megadistill.student.engine import StudentEngine
from megadistill.teacher.codec import ActivationCodec
from megadistill.teacher.disaggregated import RemoteTeacher, RequestCodec, TeacherServer
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage, head_rows
from megadistill.train.checkpoint.format import RNG_KEY, rank_file, write_rank
from megadistill.train.lookahead import StepBatches
from megadistill.train.objective import Objective
from megadistill.train.step import train_step
from megadistill.train.teacher import targets as targets_module
from megadistill.train.teacher.live import LiveTeacher
from megadistill.train.teacher.protocol import NoTeacher, Teacher
from megadistill.types import Cursor, TokenBatch, token_digest
from tests.paths import DS_CONFIGS

VOCAB, SEQUENCE, STEPS = 4000, 128, 2
STUDENT: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQUENCE,
}
TEACHER: dict[str, Any] = {**STUDENT, "hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 4}


@dataclass(frozen=True)
class Case:
    """A run of a few steps on a few ranks."""

    students: int = 2
    teachers: int = 0
    """Ranks of the teacher's own; 0: each of the student's ranks has a stage."""
    sequence: int = 1
    """Ranks that share each sequence."""
    replicas: int = 1
    """Replicas of the student, on as many of its ranks each."""
    length: int = SEQUENCE
    """Tokens of a sequence."""
    vocab_group: int = 2
    precision: Precision = "float32"
    micro_batch: int = 2
    accumulation: int = 2
    activation_checkpointing: Checkpointing = "none"
    attention: AttentionSetting = "auto"
    """The student's."""
    objective: str = "distill"
    student: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=lambda: {"logit_memory_mb": 8})
    zero: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return Recipe.model_validate(
            {
                "objective": self.objective,
                "run": {"folder": "run"},
                "data": {"manifest": "manifest.json"},
                "student": {
                    "config": {**STUDENT, **self.student},
                    "vocab_multiple": 32,
                    "activation_checkpointing": self.activation_checkpointing,
                    "attention": self.attention,
                },
                "train": {
                    "steps": STEPS,
                    "global_batch": self.students // self.sequence * self.micro_batch * self.accumulation,
                    "micro_batch": self.micro_batch,
                    "precision": self.precision,
                    "optimizer": {"learning_rate": 1e-3},
                },
                "distributed": {"sequence": self.sequence, "shard": self.students // self.replicas},
                "loss": {"elementwise": "eager", **self.loss},  # as auto is on a CPU
                "teacher": self._teacher() if self.objective == "distill" else None,
            }
        )

    def _teacher(self) -> dict[str, Any]:
        own = {"placement": "disaggregated", "ranks": self.teachers, "queue": 2, "transfer_dtype": "float8"}
        return {"path": "teacher", **(own if self.teachers else {})}

    @property
    def roles(self) -> Roles | None:
        return Roles(self.students + self.teachers, self.teachers, self.teachers) if self.teachers else None

    @property
    def deepspeed_config(self) -> dict[str, Any]:
        """Settings like those of a GPU, in proportion: parameters of some layers stay, those of one are prefetched."""
        deepspeed_config = load_deepspeed_config(DS_CONFIGS / "cpu.json")
        deepspeed_config["zero_optimization"].update(
            {
                "stage3_max_reuse_distance": 4_000_000,
                "stage3_prefetch_bucket_size": 500_000,
                "stage3_max_live_parameters": 6_000_000,
                "stage3_param_persistence_threshold": 1_000,
                "reduce_bucket_size": 1_000_000,
                "reduce_scatter": True,
                **self.zero,
            }
        )
        return deepspeed_config


@dataclass(frozen=True)
class Seen:
    """Record of one rank."""

    built: Counter[str]
    """Bytes that live when student and teacher are built, by maker."""
    peaks: dict[str, Counter[str]]
    """The bytes that live when they are most in the last step, by phase and maker."""
    highest: dict[str, Counter[str]]
    """The most bytes of each maker in the last step, by phase."""
    received: Counter[str]
    """Bytes that came to this rank in the last step, by who asked for them."""
    checkpoint: int
    """Bytes of this rank's file; 0 where another replica writes it."""
    calls: list[Collective] = field(default_factory=list)
    """Collectives of the last step."""


def watched_run(topology: Topology, case: Case, teacher: str | None, folder: str) -> Seen:
    """`teacher`: its folder. `folder`: for a checkpoint."""
    torch.manual_seed(0)
    with Watch() as watch:
        if topology.role == "teacher":
            assert teacher is not None
            return _serve(topology, case, teacher, watch)
        pipeline = None if teacher is None else _pipeline(topology, case, teacher)
        student = _student(topology, case)
        source: Teacher = NoTeacher()
        if pipeline is not None and teacher is not None:
            dtype = torch_dtype(case.precision)
            head = head_rows(Path(teacher), student.head.vocab, dtype=dtype, device=topology.device)
            source = LiveTeacher(pipeline=pipeline, head=head, topology=topology)
        built = Counter(watch.live)
        with watch.phases(student, pipeline):
            calls = _steps(topology, case, student, source, watch)
        seen = Seen(built, dict(watch.peaks), dict(watch.highest), watch.received, 0, calls)
    if topology.replica > 0:
        return seen
    state = {**student.state.snapshot(), RNG_KEY: torch.get_rng_state()}
    shard, shards = topology.shard_rank, topology.shard_world
    record = write_rank(Path(folder), state, rank=shard, world=shards)
    assert (Path(folder) / rank_file(shard, shards)).stat().st_size == record.bytes
    return replace(seen, checkpoint=record.bytes)


def _student(topology: Topology, case: Case) -> StudentEngine:
    recipe = case.recipe
    config = load_config(recipe.student.config, what="test")  # type: ignore[arg-type]
    attention = choose_attention(
        case.attention,
        config,
        accelerator=False,
        precision=case.precision,
        documents=False,
        sequence_length=case.length,
    )
    student = StudentEngine(
        config,
        section=recipe.student,
        train=recipe.train,
        deepspeed_config=case.deepspeed_config,
        vocab_size=VOCAB,
        accumulation=case.accumulation,
        topology=topology,
        attention=attention.value,
    )
    student.draw_weights(1)
    return student


def _stage(topology: Topology, case: Case, teacher: str) -> TeacherStage:
    place: dict[str, Any] = {"stage": topology.rank % topology.group_size, "stages": topology.group_size}
    place |= {"dtype": torch_dtype(case.precision), "device": topology.device, "sequence": topology}
    return TeacherStage.load(Path(teacher), **place)


def _forms(case: Case) -> tuple[RequestCodec, ActivationCodec]:
    form = RequestCodec(case.micro_batch, SEQUENCE, masked=False)
    return form, ActivationCodec(TEACHER["hidden_size"], torch_dtype(case.precision), float8=True)


def _pipeline(topology: Topology, case: Case, teacher: str) -> TeacherPipeline | RemoteTeacher:
    if topology.bridge is None:
        return TeacherPipeline(_stage(topology, case, teacher), topology)
    section = case.recipe.teacher
    assert section is not None
    return RemoteTeacher(topology.bridge, *_forms(case), queue=section.queue, device=topology.device)


def _serve(topology: Topology, case: Case, teacher: str, watch: "Watch") -> Seen:
    """All that this stage receives in the run, and the most that lives meanwhile."""
    section, bridge = case.recipe.teacher, topology.bridge
    assert section is not None
    assert bridge is not None
    stage = _stage(topology, case, teacher)
    built = Counter(watch.live)
    watch.begin()
    with watch.bridge():
        for _ in TeacherServer(stage, bridge, *_forms(case), queue=section.queue).serve():
            pass
    return Seen(built, dict(watch.peaks), dict(watch.highest), watch.received, 0)


def _steps(
    topology: Topology, case: Case, student: StudentEngine, teacher: Teacher, watch: "Watch"
) -> list[Collective]:
    """Takes the steps; returns the calls of the last one."""
    collectives = Collectives()
    coefs = RouterCoefs.of(case.recipe.loss, load_config({**STUDENT, **case.student}, what="test"))
    objective = Objective(case.recipe.loss, length=STEPS, seed=1, router_coefs=coefs)
    how: dict[str, Any] = {"micro_batch": case.micro_batch, "part": topology.sequence_part}
    with closing(StepBatches(_batches(topology, case), teacher, **how)) as batches:
        for step in range(1, STEPS + 1):
            watch.begin()
            batch = next(batches)
            collectives.calls.clear()
            with collectives:
                train_step(student, batch, step=step, learning_rate=1e-3, objective=objective, topology=topology)
    teacher.close()
    return collectives.calls


def _batches(topology: Topology, case: Case) -> Iterator[tuple[TokenBatch, Cursor]]:
    """More than the steps take, so that the teacher's pipeline stays full."""
    rows = case.accumulation * case.micro_batch
    for number in range(STEPS + 1):
        generator = torch.Generator().manual_seed(1000 * topology.data_rank + number)
        units = torch.randint(0, VOCAB, (rows, case.length + 1), generator=generator)
        tokens, labels = units[:, :-1].contiguous(), units[:, 1:].contiguous()
        slots = torch.arange(rows) + rows * (number * topology.data_world + topology.data_rank)
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        batch = TokenBatch(tokens=tokens, labels=labels, slots=slots, digests=token_digest(tokens), starts=starts)
        yield batch, Cursor("", 0)


MAKERS = {
    "zero/partition_parameters.py": "gathered layers",
    "comm/coalesced_collectives.py": "gradients on their way",
    "deepspeed/comm/torch.py": "gloo",
    "zero/stage3.py": "ZeRO-3",
    "student/engine.py": "ZeRO-3",
    "student/head.py:gradient": "head gradient",
    "loss/buffers.py": "logits",
    "loss/gradients.py:empty": "head gradient",
    "megadistill/loss/": "loss",
    "teacher/stage.py:head_rows": "teacher head rows",
    "models/weights.py": "teacher stage",
    "teacher/pipeline.py": "packets",
    "teacher/disaggregated.py": "packets",
    "teacher/codec.py": "packets",
    "site-packages/transformers/": "layers",
    "distributed/all_to_all.py": "layers",
    "models/attention/sequence.py": "layers",
    "deepspeed/runtime/engine.py:backward": "layers",
    "student/head.py": "head rows",
}
"""Part of `file:function` -> what it makes."""

ASKERS = {
    "zero/partition_parameters.py": "weights",
    "zero/stage3.py": "gradients",
    "student/head.py": "head",
    "collectives.py:add_across": "across",
    "megadistill/loss/": "loss",
    "teacher/pipeline.py:_scatter_signals": "answers",
    "teacher/pipeline.py:signals": "stages",
}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that live, and bytes that come to this rank."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.highest: dict[str, Counter[str]] = defaultdict(Counter)
        self.received: Counter[str] = Counter()
        self._sum = 0
        self._most: Counter[str] = Counter()
        self._phase = "forward"
        self._storages: dict[int, weakref.ref[Any]] = {}

    def begin(self) -> None:
        self.peaks, self.received, self._most = {}, Counter(), Counter()
        self.highest = defaultdict(Counter)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if str(function.name()) == OPERATOR:  # what it calls is not seen from here
            blocks = arguments[0]
            self.received["all-to-all"] += blocks.nbytes - blocks[0].nbytes
        if function.namespace == "c10d":
            self._receive(function._opname, arguments)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if self._sum > self._most[self._phase]:
            self._most[self._phase], self.peaks[self._phase] = self._sum, Counter(self.live)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        maker = _known_caller(_maker)

        def gone(_: Any) -> None:
            del self._storages[key]
            self.live[maker] -= size
            self._sum -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live[maker] += size
        self._sum += size
        highest = self.highest[self._phase]
        highest[maker] = max(highest[maker], self.live[maker])

    def _receive(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Adds the bytes that the other ranks send; an all-reduce is a reduce-scatter and an all-gather."""
        who = _known_caller(_asker)
        if name == "_allgather_base_":
            self.received[who] += arguments[0].nbytes - arguments[1].nbytes
        elif name == "_reduce_scatter_base_":
            self.received[who] += arguments[1].nbytes - arguments[0].nbytes
        elif name in ("recv_", "scatter_", "broadcast_"):
            self.received[who] += sum(tensor.nbytes for tensor in arguments[0])
        elif name == "allreduce_":
            self.received[who] += 2 * sum(tensor.nbytes for tensor in arguments[0])
        else:
            assert name in ("send", "barrier"), f"nothing is known of {name}"

    @contextmanager
    def phases(self, student: StudentEngine, pipeline: TeacherPipeline | RemoteTeacher | None) -> Iterator[None]:
        """Calls the phases of a step by the plan's names; what is none of them is the forward pass."""
        losses = {name: getattr(targets_module, name) for name in ("distill_loss", "label_loss", "sparse_distill_loss")}
        for name, function in losses.items():
            setattr(targets_module, name, self._named("loss", function))
        student.backward = self._named("backward", student.backward)  # type: ignore[method-assign]
        student.step = self._named("step", student.step)  # type: ignore[method-assign]
        if isinstance(pipeline, TeacherPipeline):
            pipeline._work = self._named("teacher", pipeline._work)  # type: ignore[method-assign]
        try:
            with self.bridge():
                yield
        finally:
            for name, function in losses.items():
                setattr(targets_module, name, function)

    @contextmanager
    def bridge(self) -> Iterator[None]:
        """Its messages are no operators."""
        expect = Endpoint.post_recv

        def expected(endpoint: Endpoint, buffer: Tensor, *arguments: Any, **keywords: Any) -> Any:
            if isinstance(endpoint._group, ProcessGroupGloo):  # those of the world are operators
                self.received["bridge"] += buffer.nbytes
            return expect(endpoint, buffer, *arguments, **keywords)

        Endpoint.post_recv = expected  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Endpoint.post_recv = expect  # type: ignore[method-assign]

    def _named(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            before, self._phase = self._phase, phase
            try:
                return function(*arguments, **keywords)
            finally:
                self._phase = before

        return call


def _known_caller(name_of: Callable[[CodeType], str | None]) -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = name_of(frame.f_code)
        if name is not None:
            return name
        frame = frame.f_back
    return "else"


@cache
def _maker(code: CodeType) -> str | None:
    return _named_in(MAKERS, code)


@cache
def _asker(code: CodeType) -> str | None:
    return _named_in(ASKERS, code)


def _named_in(known: dict[str, str], code: CodeType) -> str | None:
    place = f"{code.co_filename}:{code.co_name}"
    return next((name for part, name in known.items() if part in place), None)
