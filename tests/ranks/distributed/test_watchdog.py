"""The watchdog on real ranks that hang and die in every way: each is detected and named, and no rank keeps waiting."""

import ctypes
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megadistill.distributed.collectives import all_reduce_sum
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology, process_groups
from megadistill.distributed.watchdog import diagnosis, relay
from megadistill.distributed.watchdog import watchdog as watchdog_module
from megadistill.distributed.watchdog.aborted import aborted_ranks, describe_aborted
from megadistill.errors import RestartFault
from tests.ranks.harness import PRELOAD

LIMIT = 2.0
"""Seconds of a step, and of silence."""
HANGS_AT = 3

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def _freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _spin() -> None:
    while True:
        pass


def _sleep() -> None:
    time.sleep(60)


def _hold_the_interpreter() -> None:
    ctypes.PyDLL("libc.so.6").sleep(60)


def _raise() -> None:
    raise ValueError("the disk is full")


@dataclass(frozen=True)
class _Ended:
    code: int | None
    """None: it had to be killed."""
    stderr: str


def _rank(launch: Launch, port: int, fault: Callable[[], None], culprit: int, folder: Path) -> None:
    """Steps of one all-reduce; the culprit does something else in one of them. Ends as the command does."""
    os.dup2(os.open(folder / f"stderr-{launch.rank}", os.O_WRONLY | os.O_CREAT), 2)
    watchdog_module.HEARTBEAT_SECONDS = 0.2
    if fault is _hold_the_interpreter:  # else a busy machine could end a rank before its watchdog does
        watchdog_module.TIMER_SECONDS = 1.0
    diagnosis.STALE_SECONDS = 1.0
    relay.REPLY_SECONDS = 0.5
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    (folder / f"up-{launch.rank}").touch()
    while len(list(folder.glob("up-*"))) < launch.world:  # the time limits below are shorter than a start may take
        time.sleep(0.01)
    code = 0
    try:
        with process_groups(launch, vocab_group=launch.world, timeout_minutes=2 * LIMIT / 60) as topology:
            topology.watchdog.open_stack_file(folder, 7)
            topology.watchdog.on_abort = lambda line: _write(folder / f"abort-{launch.rank}", line)
            _steps(topology, fault, culprit)
    except RestartFault as error:
        print(f"rank {launch.rank}: {error}", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        print(f"rank {launch.rank}: {type(error).__name__}: {error}", file=sys.stderr)
        code = 4
    os._exit(code)


def _write(file: Path, line: str) -> None:
    file.write_text(line)


def _steps(topology: Topology, fault: Callable[[], None], culprit: int) -> None:
    for step in range(1, HANGS_AT + 2):
        topology.watchdog.enter_phase("train", step, limit=LIMIT)
        if step == HANGS_AT:
            time.sleep(2 * watchdog_module.HEARTBEAT_SECONDS)  # so that this step has been published
            if topology.rank == culprit:
                fault()
        all_reduce_sum(torch.ones(1), topology.world_group)


def _launched(
    world: int, fault: Callable[[], None], culprit: int, folder: Path, *, per_node: int | None = None
) -> list[_Ended]:
    """How each rank ended. There is no launcher: what ended, ended by itself. `per_node`: ranks of a node, or all."""
    per_node = per_node or world
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        launch = Launch(rank=rank, world=world, local_rank=rank % per_node, local_world=per_node)
        processes.append(_context.Process(target=_rank, args=(launch, port, fault, culprit, folder), daemon=True))
        processes[-1].start()
    end = time.monotonic() + 60  # ranks start in half a minute where the cores are shared with other tests
    for rank, process in enumerate(processes):
        process.join(max(0.1, end - time.monotonic()) if rank != culprit or world == 1 else 0)
    codes = []
    for rank, process in enumerate(processes):
        process.join(0 if rank == culprit and fault is _freeze else 10.0)  # a frozen one never ends
        codes.append(process.exitcode)
        process.kill()
        process.join()
    return [_Ended(code, (folder / f"stderr-{rank}").read_text(errors="replace")) for rank, code in enumerate(codes)]


def _stacks(folder: Path, rank: int) -> str:
    return (folder / "stacks" / f"attempt-00007-rank-{rank:05d}.txt").read_text()


@pytest.mark.parametrize(("fault", "culprit"), [(_spin, 1), (_sleep, 0)])
def test_a_rank_stuck_in_python_is_named_with_its_line(fault: Callable[[], None], culprit: int, tmp_path: Path) -> None:
    ended = _launched(3, fault, culprit, tmp_path)
    assert [each.code for each in ended] == [3, 3, 3], ended
    stderr = ended[0].stderr
    assert f"rank {culprit} (" in stderr, ended
    assert "is stuck and is not in the collective of the others: in train of step 3 at " in stderr
    assert f" {fault.__name__} for " in stderr
    evidence = f"stacks are in {tmp_path}/stacks, the last collectives in {tmp_path}/stacks/attempt-00007-student-"
    assert f"; {evidence}collectives-*\n" in stderr
    assert (tmp_path / "abort-0").read_text() in stderr
    assert [each.stderr for each in ended[1:]] == ["", ""], "one line"
    for rank in range(3):
        assert (f"in {fault.__name__}\n" in _stacks(tmp_path, rank)) == (rank == culprit)
        assert ("all_reduce_sum" in _stacks(tmp_path, rank)) == (rank != culprit)
        assert (tmp_path / f"stacks/attempt-00007-student-collectives-{rank}").stat().st_size > 100


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_frozen_rank_is_named(culprit: int, tmp_path: Path) -> None:
    """The first rank keeps the store: without it the others have nothing but the clock."""
    ended = _launched(3, _freeze, culprit, tmp_path)
    assert [each.code for each in ended] == [None if rank == culprit else 3 for rank in range(3)], ended
    stderr = ended[0 if culprit else 1].stderr
    assert re.search(rf"no heartbeat from rank {culprit} for \d+ s: it was killed or is frozen", stderr), ended
    assert "all_reduce_sum" in _stacks(tmp_path, 2)


def test_a_rank_that_aborts_leaves_its_stacks_and_is_named(tmp_path: Path) -> None:
    """As torch's NCCL watchdog ends a process: by `std::terminate`, in a thread without Python."""
    ended = _launched(3, os.abort, 1, tmp_path)
    assert [each.code for each in ended] == [3, -6, 3], ended
    assert "lost another rank in a collective: rank 1 (" in ended[0].stderr, ended
    assert _stacks(tmp_path, 1).startswith("Fatal Python error: Aborted")
    assert aborted_ranks(tmp_path, 7) == [1]
    assert aborted_ranks(tmp_path, 6) == []
    assert "rank 1 aborted (SIGABRT), as torch's NCCL watchdog" in str(describe_aborted([1]))


def test_a_rank_whose_interpreter_is_held_is_named_and_writes_its_stacks(tmp_path: Path) -> None:
    ended = _launched(2, _hold_the_interpreter, 1, tmp_path)
    assert (ended[0].code, ended[1].code) == (3, 1), ended
    assert re.search(r"no heartbeat from rank 1 for \d+ s", ended[0].stderr), ended
    assert "_hold_the_interpreter" in _stacks(tmp_path, 1)


def test_a_killed_rank_is_named_at_once(tmp_path: Path) -> None:
    ended = _launched(3, _die, 1, tmp_path)
    assert [each.code for each in ended] == [3, -9, 3], ended
    for rank in (0, 2):
        assert "lost another rank in a collective: rank 1 (" in ended[rank].stderr, ended
        assert re.search(r"no heartbeat for \d+ s, last seen in train of step 3", ended[rank].stderr), ended


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_error_of_a_rank_is_in_the_messages_of_its_peers(culprit: int, tmp_path: Path) -> None:
    ended = _launched(2, _raise, culprit, tmp_path)
    assert ended[culprit] == _Ended(4, f"rank {culprit}: ValueError: the disk is full\n")
    peer = ended[1 - culprit]
    assert peer.code == 3
    assert f"lost another rank in a collective: rank {culprit} (" in peer.stderr, ended
    assert "): ValueError: the disk is full (" in peer.stderr
    own, others = (tmp_path / f"stderr-{rank}" for rank in (culprit, 1 - culprit))
    assert own.stat().st_mtime_ns <= others.stat().st_mtime_ns, "the reason comes first in the log"


@pytest.mark.parametrize(("fault", "code"), [(_die, -9), (_freeze, None)])
def test_the_rank_that_passes_on_its_nodes_heartbeats_is_named_itself(
    fault: Callable[[], None], code: int | None, tmp_path: Path
) -> None:
    """Ranks 2 and 3 are a node: without rank 2, rank 3 publishes its heartbeats itself."""
    ended = _launched(4, fault, 2, tmp_path, per_node=2)
    assert [each.code for each in ended] == [3, 3, code, 3], ended
    if fault is _freeze:
        assert re.search(r"no heartbeat from rank 2 for \d+ s: it was killed or is frozen", ended[0].stderr), ended
        return
    for rank in (0, 1, 3):
        assert "lost another rank in a collective: rank 2 (" in ended[rank].stderr, ended


def test_a_clean_end_leaves_nothing(tmp_path: Path) -> None:
    ended = _launched(2, _nothing, 1, tmp_path)
    assert ended == [_Ended(0, ""), _Ended(0, "")]
    assert list((tmp_path / "stacks").iterdir()) == []


def _nothing() -> None:
    return


def test_a_process_alone_ends_too(tmp_path: Path) -> None:
    (ended,) = _launched(1, _sleep, 0, tmp_path)
    assert ended.code == 3, ended
    assert "rank 0 (" in ended.stderr
    assert "is stuck: in train of step 3 at " in ended.stderr
    assert "in _sleep\n" in _stacks(tmp_path, 0)
