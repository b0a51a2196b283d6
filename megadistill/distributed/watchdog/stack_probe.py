"""The state of this process: whether its main thread waits for other ranks, and at which line.

Two signs, since neither is enough. *Frames*: the main thread is inside torch.distributed, or in a wait of ours or of
DeepSpeed's. A CPU's backward runs its hooks on that thread; an accelerator's runs them on threads of autograd's, which
are read too. What frames cannot show is a host that waits for its device (`.item()`), and with nccl that is how
most ranks of a hung run look. *Counts*: how many collectives each process group has been given. A rank that has not
joined a collective that others have joined is behind, whatever its frames show, and on any backend.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

_PACKAGE = str(Path(__file__).parents[2]) + os.sep
_WATCHDOG = str(Path(__file__).parent) + os.sep
_TORCH_DISTRIBUTED = str(Path(torch.__file__).parent / "distributed") + os.sep
_DEEPSPEED_COMM = os.path.join("deepspeed", "comm", "")
_DEEPSPEED_ZERO = os.path.join("deepspeed", "runtime", "zero", "")
_MAX_CHARACTERS = 240


def blocked_in_collective(frames: Mapping[int, FrameType], main: int) -> tuple[bool, str]:
    """Whether the main thread waits for other ranks, and its innermost line in this package (or at all).

    `frames` are `sys._current_frames()`. A module of this package that waits for other ranks carries `WAITS_FOR_RANKS`,
    since a wait in C++ (of a `Work`, of a store) has no frame of torch's. For another process's JIT build the
    location is the path of its lock.
    """
    innermost = frames.get(main)
    if innermost is None:
        return False, "no frame"
    stacks = [innermost]
    if innermost.f_code.co_name == "_engine_run_backward":
        stacks = list(frames.values())
    is_waiting = any(_waits_for_ranks(frame) for stack in stacks for frame in _outwards(stack))
    return is_waiting, _location(innermost)[:_MAX_CHARACTERS]


def collectives_joined(
    world: str, across: ProcessGroup | None = None, *, excluded: ProcessGroup | None
) -> dict[str, int]:
    """How many collectives each group of this process was given so far, by a name that its ranks share.

    `world` sets the groups of one world apart from another's; `across` joins worlds, and has a name of its own. Without
    the group `excluded`: messages from rank to rank are counted too, and differ between the stages of a pipeline.
    """
    counts = {}
    registered: list[Any] = list(dist.distributed_c10d._world.pg_map)  # DeepSpeed's own are among them
    named: list[tuple[str, Any]] = [(f"{world} {group.group_name}", group) for group in registered]
    if across is not None:
        named.append((across.group_name, across))
    for name, group in named:
        if group is not excluded:
            try:
                counts[name] = group._get_sequence_number_for_group()
            except RuntimeError:  # a backend that does not count
                continue
    return counts


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _waits_for_ranks(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return (
        frame.f_globals.get("WAITS_FOR_RANKS", False)
        or file.startswith(_TORCH_DISTRIBUTED)
        or _DEEPSPEED_COMM in file
        # ZeRO's handles call torch's own `wait`, which has no frame. (DeepSpeed's other waits are for a disk.)
        or (_DEEPSPEED_ZERO in file and frame.f_code.co_name == "wait")
    )


def _location(innermost: FrameType) -> str:
    own = None
    for frame in _outwards(innermost):
        file = frame.f_code.co_filename
        if file.endswith(os.path.join("utils", "file_baton.py")):
            lock = getattr(frame.f_locals.get("self"), "lock_file_path", None)
            return f"a wait for the build lock {lock} (if no build runs: rm {lock})"
        if own is None and file.startswith(_PACKAGE) and not file.startswith(_WATCHDOG):
            own = frame
    frame = own or innermost
    return f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_qualname}"
