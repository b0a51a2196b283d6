"""A world of thousands of ranks, of which one runs: torch's fake process group, whose collectives move nothing.

`in_fake_world(world, function, *arguments)` runs the function as one rank, in a fresh process like those of
`run_ranks`. What a rank makes, asks for and sends is that of a real one; what it receives has no meaning.
With `replicas` the world is as many of torch's, of which the rank's own is made, and groups that join them.
"""

import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.collective_calls import Collective, Collectives
from megadistill.config.recipe import LossSection, StudentSection, TrainSection
from megadistill.distributed.groups import unregistered
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology, topology_of_world
from megadistill.student.deepspeed_config import load_deepspeed_config
from megadistill.student.engine import StudentEngine
from megadistill.train.lookahead import StepBatches
from megadistill.train.objective import Objective
from megadistill.train.step import train_step
from megadistill.train.teacher.protocol import NoTeacher
from megadistill.types import Cursor, TokenBatch, token_digest
from tests.paths import DS_CONFIGS
from tests.ranks.harness import CONTEXT

LOCAL_WORLD = 8
"""Ranks of a node."""
TIMEOUT = timedelta(minutes=30)


@contextmanager
def fake_world(
    world: int, *, rank: int = 0, vocab_group: int = LOCAL_WORLD, local_world: int = LOCAL_WORLD, replicas: int = 1
) -> Iterator[Topology]:
    """The topology of one rank of `world`, on a CPU. Process groups and DeepSpeed's state are the process's: see
    `in_fake_world`."""
    launch = Launch(rank=rank, world=world, local_rank=rank % local_world, local_world=local_world)
    shard_world = world // replicas
    place = rank % shard_world
    os.environ.update(
        RANK=str(place),
        WORLD_SIZE=str(shard_world),
        LOCAL_RANK=str(launch.local_rank),
        LOCAL_WORLD_SIZE=str(local_world),
        LOCAL_SIZE=str(local_world),  # of DeepSpeed's hpZ groups
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=place, world_size=shard_world)
    groups: dict[str, Any] = {"vocab_group": vocab_group, "replicas": replicas, "store": store}
    try:
        with patch.object(unregistered, "device_backend", _fake_backend):
            topology = topology_of_world(launch, **groups, device=torch.device("cpu"), timeout=TIMEOUT)
        yield replace(topology, timeout=None)  # the fake groups cannot be given one
    finally:
        dist.destroy_process_group()


across_replicas: list[list[int]] = []
"""The ranks of each group across replicas that this process has made; torch knows those of its own groups alone."""


def _fake_backend(store: Any, place: int, members: Sequence[int], timeout: timedelta, **where: Any) -> Any:
    """In place of the backend of a group across replicas."""
    across_replicas.append(list(members))
    return FakeProcessGroup._create_internal(place, len(members))


def in_fake_world(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    rank: int = 0,
    vocab_group: int = LOCAL_WORLD,
    local_world: int = LOCAL_WORLD,
    replicas: int = 1,
    deadline: float = 300.0,
) -> Any:
    """The result of `function(topology, *arguments)` as rank `rank` of `world`, in a process of its own.

    `function` is at the top level of its module; its result can be pickled.

    Raises:
        AssertionError: it failed; with its traceback.
    """
    ours, theirs = CONTEXT.Pipe(duplex=False)
    layout = {"rank": rank, "vocab_group": vocab_group, "local_world": local_world, "replicas": replicas}
    process = CONTEXT.Process(target=_serve, args=(world, layout, function, arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(deadline), f"no result within {deadline:.0f} s"
        failure, result = pickle.loads(ours.recv_bytes())
    except EOFError:
        failure, result = "died without a traceback", None
    finally:
        process.kill()
        process.join(timeout=10)
    assert failure is None, failure
    return result


def _serve(
    world: int,
    layout: dict[str, int],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    pipe: Connection,
) -> None:
    torch.set_num_threads(1)
    try:
        with fake_world(world, **layout) as topology:
            result = function(topology, *arguments)
        pipe.send_bytes(pickle.dumps((None, result)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))


def build_student(
    topology: Topology,
    config: Any,
    *,
    deepspeed: str = "zero3.json",
    settings: dict[str, Any] | None = None,
    vocab_multiple: int | None = None,
    activation_checkpointing: Any = "none",
    accumulation: int = 1,
) -> StudentEngine:
    """A student of `config` (transformers' object) under a file of ds_configs, in bfloat16.

    `settings` replace keys of the file's `zero_optimization`. `take_step` needs a vocabulary without padding, a
    multiple of a replica's ranks: a fake gather gives a rank its own part as that of each.
    """
    deepspeed_config = load_deepspeed_config(DS_CONFIGS / deepspeed)
    deepspeed_config["zero_optimization"].update({"overlap_comm": False, **(settings or {})})  # no streams on a CPU
    section = StudentSection(
        config="unused",
        deepspeed=str(DS_CONFIGS / deepspeed),
        vocab_multiple=vocab_multiple or topology.shard_world,
        activation_checkpointing=activation_checkpointing,
    )
    train = TrainSection.model_validate(
        {
            "steps": 10,
            "global_batch": accumulation * topology.world,
            "micro_batch": 1,
            "precision": "bfloat16",
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    student = StudentEngine(
        config,
        section=section,
        train=train,
        deepspeed_config=deepspeed_config,
        vocab_size=config.vocab_size,
        accumulation=accumulation,
        topology=topology,
    )
    student.draw_weights(1)
    return student


def take_step(
    student: StudentEngine, topology: Topology, *, step: int = 0, tokens: int = 8, accumulation: int = 1
) -> list[Collective]:
    """The collectives of one step on labels, by the run's own code: `accumulation` sequences of `tokens` tokens a rank,
    one a micro-step."""
    ids = (torch.arange(tokens)[None] % student.head.vocab.size).repeat(accumulation, 1)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    batch = TokenBatch(ids, ids, torch.arange(accumulation) + accumulation * step, token_digest(ids), starts)
    batches = StepBatches(iter([(batch, Cursor("", 0))]), NoTeacher(), micro_batch=1)
    collectives = Collectives()
    with collectives:
        train_step(
            student,
            next(batches),
            step=step,
            learning_rate=1e-3,
            objective=Objective(LossSection(), length=10, seed=1),
            topology=topology,
        )
    return collectives.calls
