"""The collectives that a process calls: each with its process group and its bytes."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._distributed_c10d import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RING = {
    "allgather": 1,
    "allgather_base": 1,
    "allreduce": 2,
    "barrier": 0,
    "broadcast": 1,
    "reduce_scatter_base": 1,
    "scatter": 1,
}
"""Times that a rank of a ring sends all of a collective's largest tensor but its own part. Where one rank sends to all,
the mean of the ranks."""
MESSAGES = {"send": 1, "recv": 0}
"""Times that a rank sends the tensor of a message to one other."""


@dataclass(frozen=True)
class Collective:
    """One call of a collective.

    Attributes:
        name: c10d's, such as `allgather_base`, `reduce_scatter_base`, `allreduce`, `broadcast`.
        ranks: of its process group.
        nbytes: of its largest tensor: what a gather receives, what a reduce-scatter sends.
        group: torch's name of the process group.
    """

    name: str
    ranks: int
    nbytes: int
    group: str = field(default="", compare=False)

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, by the algorithms of rings."""
        if self.name in MESSAGES:
            return float(MESSAGES[self.name] * self.nbytes)
        return RING[self.name] * (self.ranks - 1) / self.ranks * self.nbytes


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, every call of a collective is recorded in `calls`, in its order; backward passes are included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "c10d":
            keywords = keywords or {}
            leaves = tree_leaves((arguments, keywords))
            sizes = [each.nbytes for each in leaves if isinstance(each, torch.Tensor)]
            group = _group(leaves)
            nbytes = max(sizes, default=0)
            self.calls.append(Collective(function._opname.strip("_"), group.size(), nbytes, group.group_name))
        return function(*arguments, **(keywords or {}))


def _group(leaves: list[Any]) -> ProcessGroup:
    """The process group among a call's arguments."""
    for each in leaves:
        if isinstance(each, torch.ScriptObject):
            try:
                return ProcessGroup.unbox(each)
            except RuntimeError:  # a reduction's operator
                continue
    raise AssertionError("a collective without a process group")
