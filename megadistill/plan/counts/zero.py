"""What DeepSpeed's ZeRO-3 gathers and holds of a model's parameters, module by module. It knows no tokens and no ranks.

From its third micro-step on DeepSpeed knows the order in which modules come: it fetches the next ones ahead, and lets a
module go after its use, but for those that come again before `stage3_max_reuse_distance` parameters of others have. So
the last layers of the forward pass stay until the backward pass wants them, and a small model stays as a whole.
`deepspeed/runtime/zero/partitioned_param_coordinator.py` is what this follows.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

PRECISION_BYTES = {"bfloat16": 2, "float32": 4}
COMMUNICATION_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's settings that decide memory and traffic, with DeepSpeed's own defaults; sizes in parameters."""

    reuse_distance: int = 1_000_000_000
    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    persistence: int = 100_000
    reduce_bucket: int = 500_000_000
    sub_group: int = 1_000_000_000
    contiguous_gradients: bool = True
    node_copies: int = 1
    """Ranks that together hold one more copy of the weights (hpZ); 1: none."""
    parameters_on: str = "none"
    optimizer_on: str = "none"
    """Where DeepSpeed offloads them: none, cpu or nvme."""
    quantized_weights: bool = False
    quantized_gradients: bool = False
    gradients_on_wire: int | None = None
    """Bytes of a number; None: as many as a parameter's."""

    @classmethod
    def of(cls, profile: Mapping[str, Any]) -> "Zero":
        zero = profile.get("zero_optimization", {})
        said = {name: zero[key] for key, name in _KEYS.items() if key in zero}
        for key, name in (("offload_param", "parameters_on"), ("offload_optimizer", "optimizer_on")):
            said[name] = (zero.get(key) or {}).get("device") or "none"
        wire = profile.get("communication_data_type")
        return cls(**said, gradients_on_wire=None if wire is None else COMMUNICATION_BYTES[wire])


_KEYS = {
    "stage3_max_reuse_distance": "reuse_distance",
    "stage3_prefetch_bucket_size": "prefetch",
    "stage3_max_live_parameters": "max_live",
    "stage3_param_persistence_threshold": "persistence",
    "reduce_bucket_size": "reduce_bucket",
    "sub_group_size": "sub_group",
    "contiguous_gradients": "contiguous_gradients",
    "zero_hpz_partition_size": "node_copies",
    "zero_quantized_weights": "quantized_weights",
    "zero_quantized_gradients": "quantized_gradients",
}


@dataclass(frozen=True)
class Gathered:
    """Parameters."""

    forward: int
    """Gathered in the forward pass of a micro-step."""
    backward: int
    """Gathered in the backward pass, beyond what stayed."""
    most_forward: int
    """That live at a time in the forward pass, those on their way among them."""
    at_the_loss: int
    """That live when the forward pass ends."""
    most_backward: int
    at_the_end: int
    """That live while the first module, the embedding, goes back."""


@lru_cache(maxsize=256)
def gathered(modules: tuple[tuple[int, ...], ...], zero: Zero, *, again: bool) -> Gathered:
    """What a micro-step gathers, once DeepSpeed knows the order.

    Args:
        modules: parameters of the modules in the order of the forward pass, those that stay for good left out: the
            embedding, the modules of each layer, the last norm.
        again: layers are computed again in the backward pass (activation checkpointing).
    """
    sizes = [size for part in modules for size in part]
    ends = list(accumulate(len(part) for part in modules))
    parts = [list(range(end - len(part), end)) for part, end in zip(modules, ends, strict=True)]
    forward = [index for part in parts for index in part]
    backward: list[int] = []
    for number, part in reversed(list(enumerate(parts))):
        if again and 0 < number < len(parts) - 1:
            # What ends the layer is not computed again: torch stops when it has all that backward asks for.
            backward += part[: max((at for at, module in enumerate(part) if sizes[module]), default=0)]
        backward += reversed(part)
    walk = _Walk(sizes, [*forward, *backward], zero)
    fetched, most = walk.to(len(forward))
    at_the_loss = walk.live
    fetched_back, most_back = walk.to(len(walk.order) - 1)
    last_fetched, last_most = walk.to(len(walk.order))
    return Gathered(
        forward=fetched,
        backward=fetched_back + last_fetched,
        most_forward=most,
        at_the_loss=at_the_loss,
        most_backward=max(most_back, last_most),
        at_the_end=last_most,
    )


class _Walk:
    """DeepSpeed's bookkeeping over the modules of a micro-step."""

    def __init__(self, sizes: Sequence[int], order: Sequence[int], zero: Zero) -> None:
        self.order = order
        self.live = 0
        self._sizes, self._zero = sizes, zero
        self._sums = [0, *accumulate(sizes[module] for module in order)]
        self._next = _next_uses(order)
        self._there = [False] * len(sizes)
        self._ahead: deque[int] = deque(range(len(order)))
        self._looked_to = [-1] * len(sizes)
        """The last place in the order at which a module was seen when fetching ahead."""
        self._place = 0

    def to(self, stop: int) -> tuple[int, int]:
        """Walks up to a place in the order. Returns the parameters gathered, and the most that lived at a time."""
        fetched, most = 0, self.live
        while self._place < stop:
            place, module = self._place, self.order[self._place]
            fetched += self._fetch(module)
            while self._ahead and self._ahead[0] <= place:
                self._ahead.popleft()
            self._looked_to[module] = max(self._looked_to[module], place)
            fetched += self._fetch_ahead()
            most = max(most, self.live)
            if not self._comes_soon(place, module):
                self._there[module] = False
                self.live -= self._sizes[module]
            self._place += 1
        return fetched, most

    def _fetch(self, module: int) -> int:
        if self._there[module]:
            return 0
        self._there[module] = True
        self.live += self._sizes[module]
        return self._sizes[module]

    def _fetch_ahead(self) -> int:
        fetched, room = 0, min(self._zero.max_live - self.live, self._zero.prefetch)
        while self._ahead and fetched < room:
            place = self._ahead.popleft()
            module = self.order[place]
            self._looked_to[module] = max(self._looked_to[module], place)
            fetched += self._fetch(module)
        return fetched

    def _comes_soon(self, place: int, module: int) -> bool:
        after = self._next[place]
        if after is None:
            return False
        between = self._sums[after] - self._sums[place + 1]
        return self._looked_to[module] > place or between < self._zero.reuse_distance


def _next_uses(order: Sequence[int]) -> list[int | None]:
    """For each place, the next one with the same module."""
    found: list[int | None] = [None] * len(order)
    last: dict[int, int] = {}
    for place in reversed(range(len(order))):
        found[place] = last.get(order[place])
        last[order[place]] = place
    return found
