"""Ranks that a signal of their own ended, by what they left in the stack files of the run folder.

torch's NCCL watchdog ends a process by `std::terminate` (SIGABRT, exit code 134 of a shell, -6 of Python) when a
collective has timed out, or a peer is gone. No Python runs then: the process writes its stacks, and nothing else.
"""

from pathlib import Path

from megadistill.io import open_regular

_READ_BYTES = 64 << 10
_FIRST_LINE = b"Fatal Python error: Aborted"


def aborted_ranks(folder: Path, attempt: int) -> list[int]:
    """Ranks of the launch that were aborted in an attempt at the run of this folder."""
    ranks = []
    for path in sorted((folder / "stacks").glob(f"attempt-{attempt:05d}-rank-*.txt")):
        rank = path.stem.rpartition("-")[2]
        try:
            with open_regular(path) as file:
                if rank.isdigit() and _FIRST_LINE in file.read(_READ_BYTES):
                    ranks.append(int(rank))
        except OSError:  # what happened then is no reason not to start
            continue
    return ranks


def describe_aborted(ranks: list[int]) -> str | None:
    """A line about aborted ranks; None where there are none."""
    if not ranks:
        return None
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return (
        f"{'rank' if len(ranks) == 1 else 'ranks'} {listed} aborted (SIGABRT), as torch's NCCL watchdog ends a process "
        "that has lost another rank, or whose collective has timed out"
    )
