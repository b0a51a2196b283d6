"""Whether a thread waits for other ranks, read from its stack."""

import importlib
import pkgutil
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import deepspeed
import pytest
import torch
from torch.utils.file_baton import FileBaton

import megadistill.distributed
from megadistill.distributed.watchdog.stack_probe import blocked_in_collective

OWN = str(Path(megadistill.__file__).parent)
QUIET = {"watchdog", "stack_probe", "parent", "vocab", "broadcast_reader", "__init__"}
"""Modules that name torch.distributed and never wait in the main thread; a rank that reads files does not either."""
WAITING = [
    module.name
    for module in pkgutil.walk_packages(megadistill.distributed.__path__, "megadistill.distributed.")
    if not module.ispkg
    and "torch.distributed" in Path(module.module_finder.path, module.name.rpartition(".")[2] + ".py").read_text()  # type: ignore[union-attr]
    and module.name.rpartition(".")[2] not in QUIET
]
DEEPSPEED = str(Path(deepspeed.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
_held = threading.Event()


def _hold() -> None:
    _held.wait()


def _called(file: str, name: str, callee: Callable[[], None] = _hold) -> Callable[[], None]:
    """A function `name` that stands in `file`, and calls `callee` on its line 2."""
    names: dict[str, Callable[[], None]] = {"callee": callee}
    exec(compile(f"def {name}():\n    callee()", file, "exec"), names)
    return names[name]


@contextmanager
def _standing(work: Callable[[], None]) -> Iterator[int]:
    """A thread that has come to a halt in `work`; its number."""
    _held.clear()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert thread.ident is not None
    try:
        seen: FrameType | None = None
        while (frame := sys._current_frames()[thread.ident]) is not seen or frame.f_code.co_name != "wait":
            seen = frame
            time.sleep(0.005)
        yield thread.ident
    finally:
        _held.set()
        thread.join()


@pytest.mark.parametrize(
    ("file", "name", "waits"),
    [
        (f"{TORCH}/distributed/distributed_c10d.py", "all_reduce", True),
        (f"{DEEPSPEED}/comm/comm.py", "all_reduce", True),
        (f"{DEEPSPEED}/runtime/zero/partition_parameters.py", "wait", True),
        (f"{DEEPSPEED}/runtime/swap_tensor/async_swapper.py", "wait", False),
        (f"{DEEPSPEED}/runtime/engine.py", "forward", False),
        (f"{OWN}/distributed/watchdog/watchdog.py", "lost", False),
        (f"{OWN}/data/shards/reader.py", "read", False),
    ],
)
def test_a_rank_waits_where_its_frames_show_it(file: str, name: str, waits: bool) -> None:
    def work() -> None:
        _called(f"{OWN}/train/step.py", "train_step", _called(file, name))()

    with _standing(work) as thread:
        is_waiting, location = blocked_in_collective(sys._current_frames(), thread)
    assert is_waiting == waits
    innermost = file.startswith(OWN) and not file.endswith("watchdog.py")
    own = f"{file.removeprefix(OWN)[1:]}:2 {name}" if innermost else "train/step.py:2 train_step"
    assert location == own


@pytest.mark.parametrize("name", WAITING)
def test_a_module_that_communicates_is_a_wait_whatever_its_file_is_called(name: str) -> None:
    module = importlib.import_module(name)
    assert module.WAITS_FOR_RANKS
    names: dict[str, Callable[[], None]] = {"callee": _hold}
    exec(compile("def wait():\n    callee()", f"{OWN}/renamed.py", "exec"), {**vars(module), **names}, names)
    with _standing(names["wait"]) as thread:
        is_waiting, _ = blocked_in_collective(sys._current_frames(), thread)
    assert is_waiting


def test_the_modules_that_communicate_are_known() -> None:
    assert {name.rpartition(".")[2] for name in WAITING} == {
        "flight_recorder",
        "all_to_all",
        "bandwidth",
        "bridge",
        "collectives",
        "group_latencies",
        "guard",
        "members",
        "neighbour_copies",
        "node_digests",
        "p2p",
        "rendezvous",
        "topology",
        "unregistered",
    }


def test_in_a_backward_the_hooks_may_stand_on_other_threads() -> None:
    backward = _called(f"{TORCH}/autograd/graph.py", "_engine_run_backward")
    hook = _called(f"{DEEPSPEED}/comm/comm.py", "reduce_scatter")
    with _standing(hook), _standing(_hold) as computing:
        assert not blocked_in_collective(sys._current_frames(), computing)[0]
    entered: queue.Queue[FrameType] = queue.Queue()
    main = _called(f"{TORCH}/autograd/graph.py", "_engine_run_backward", lambda: entered.put(sys._getframe(1)))
    main()
    frame = entered.get()
    with _standing(hook) as other:
        assert blocked_in_collective({1: frame, 2: sys._current_frames()[other]}, 1)[0]
    with _standing(backward) as other:
        assert not blocked_in_collective({1: frame, 2: sys._current_frames()[other]}, 1)[0]


def test_a_wait_for_a_build_lock_names_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    baton = FileBaton(str(lock))
    thread = threading.Thread(target=baton.wait, daemon=True)
    thread.start()
    assert thread.ident is not None
    end = time.monotonic() + 10
    place = ""
    while "lock" not in place and time.monotonic() < end:
        waits, place = blocked_in_collective(sys._current_frames(), thread.ident)
    lock.unlink()
    thread.join()
    assert (waits, place) == (False, f"a wait for the build lock {lock} (if no build runs: rm {lock})")
