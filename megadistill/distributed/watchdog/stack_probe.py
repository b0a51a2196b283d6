"""Where this process is: whether its main thread waits for other ranks, and at which line. It asks nobody else.

Two signs, since neither is enough. *Frames*: the main thread stands in torch.distributed, or in a wait of ours or of
DeepSpeed's. A CPU's backward runs its hooks on that thread; an accelerator's runs them on threads of autograd's, which
are looked at too. What frames cannot show is a host that waits for its device (`.item()`), and with nccl that is how
most ranks of a hung run look. *Counts*: how many collectives each process group has been given. A rank that has not
joined a collective that others have joined is behind, whatever its frames say, and on any backend.
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
_HERE = str(Path(__file__).parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_TALKS = (
    os.path.join(_TORCH, "distributed", ""),
    os.path.join("deepspeed", "comm", ""),
)
_LONGEST = 240
"""Characters of a place."""


def whereabouts(frames: Mapping[int, FrameType], main: int) -> tuple[bool, str]:
    """Whether the main thread waits for other ranks, and its innermost line in this package (or at all).

    `frames` are `sys._current_frames()`. A module of this package that waits for other ranks carries `WAITS_FOR_RANKS`,
    since a wait in C++ (of a `Work`, of a store) has no frame of torch's. For another process's JIT build the
    place is the path of its lock.
    """
    innermost = frames.get(main)
    if innermost is None:
        return False, "no frame"
    stacks = [innermost]
    if innermost.f_code.co_name == "_engine_run_backward":
        stacks = list(frames.values())
    waits = any(_talks(frame) for stack in stacks for frame in _outwards(stack))
    return waits, _place(innermost)[:_LONGEST]


def collectives_joined(world: str, *, but: ProcessGroup | None) -> dict[str, int]:
    """How many collectives each group of this process was given so far, by a name that its ranks share.

    `world` sets the groups of one world apart from another's. Without the group `but`: messages from rank to rank are
    counted too, and differ between the stages of a pipeline.
    """
    counts = {}
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)  # DeepSpeed's own are among them
    for group in groups:
        if group is not but:
            try:
                counts[f"{world} {group.group_name}"] = group._get_sequence_number_for_group()
            except RuntimeError:  # a backend that does not count
                continue
    return counts


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _talks(frame: FrameType) -> bool:
    if frame.f_globals.get("WAITS_FOR_RANKS", False):
        return True
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    return file.startswith(_TALKS[0]) or any(part in file for part in _TALKS[1:]) or _deepspeed_waits(file, name)


def _deepspeed_waits(file: str, name: str) -> bool:
    """ZeRO's handles call torch's own `wait`, which has no frame. (Others of its waits are for a disk.)"""
    return os.path.join("deepspeed", "runtime", "zero", "") in file and name == "wait"


def _place(innermost: FrameType) -> str:
    own = None
    for frame in _outwards(innermost):
        file = frame.f_code.co_filename
        if file.endswith(os.path.join("utils", "file_baton.py")):
            lock = getattr(frame.f_locals.get("self"), "lock_file_path", None)
            return f"a wait for the build lock {lock} (if nobody builds: rm {lock})"
        if own is None and file.startswith(_PACKAGE) and not file.startswith(_HERE):
            own = frame
    return _line(own or innermost)


def _line(frame: FrameType) -> str:
    file = frame.f_code.co_filename.removeprefix(_PACKAGE)
    return f"{file}:{frame.f_lineno} {frame.f_code.co_qualname}"
