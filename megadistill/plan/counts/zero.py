"""DeepSpeed ZeRO-3's gathering of a model's parameters, module by module, simulated.

From its third micro-step on DeepSpeed knows the order of the modules: it prefetches the next ones, and releases a
module after its use unless it is used again before `stage3_max_reuse_distance` parameters of others. So the last layers
of the forward pass stay for the backward pass, and a small model stays as a whole.
Where forward passes alone come first, as those that count the tokens of experts, nothing stays: the first order that
DeepSpeed knows is then that of a forward pass, and what it decides to release by that one it never decides again
(`functools.lru_cache` of `__params_to_release`).
This follows `deepspeed/runtime/zero/partitioned_param_coordinator.py`.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate
from typing import Any

COMMUNICATION_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's settings that decide memory and traffic, with its keys and defaults; sizes in parameters."""

    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_param_persistence_threshold: int = 100_000
    reduce_bucket_size: int = 500_000_000
    sub_group_size: int = 1_000_000_000
    contiguous_gradients: bool = True
    zero_hpz_partition_size: int = 1
    """Ranks that together hold a second copy of the weights (hpZ); 1: none."""
    zero_quantized_weights: bool = False
    offload_param: str = "none"
    """Device of the offloaded parameters: none, cpu or nvme."""
    offload_optimizer: str = "none"
    """Device of the offloaded optimizer states: none, cpu or nvme."""
    reduce_element_bytes: int | None = None
    """Bytes of a gradient's number when it is reduced; None: as many as a parameter's."""

    @classmethod
    def of(cls, deepspeed_config: Mapping[str, Any]) -> "Zero":
        zero = deepspeed_config.get("zero_optimization", {})
        settings = {field.name: zero[field.name] for field in fields(cls) if field.name in zero}
        for key in ("offload_param", "offload_optimizer"):
            settings[key] = (zero.get(key) or {}).get("device") or "none"
        dtype = deepspeed_config.get("communication_data_type")
        return cls(**settings, reduce_element_bytes=None if dtype is None else COMMUNICATION_BYTES[dtype])


@dataclass(frozen=True)
class GatheredParams:
    """Numbers of parameters that a micro-step gathers, and that are gathered at a time."""

    forward: int
    """Parameters gathered in the forward pass."""
    backward: int
    """Parameters gathered in the backward pass, beyond those that stayed."""
    peak_forward: int
    """Most gathered parameters at a time in the forward pass, prefetched ones included."""
    at_loss: int
    """Gathered parameters at the end of the forward pass."""
    peak_backward: int
    """Most gathered parameters at a time in the backward pass."""
    at_end: int
    """Gathered parameters during the backward pass of the first module, the embedding."""


@lru_cache(maxsize=256)
def count_gathered(
    modules: tuple[tuple[int, ...], ...], zero: Zero, *, recompute: bool, forward_first: bool = False
) -> GatheredParams:
    """Parameters that a micro-step gathers, once DeepSpeed knows the order of the modules.

    Args:
        modules: partitioned parameters of each module in the order of the forward pass: the embedding, the modules of
            each layer, the last norm.
        recompute: whether the backward pass recomputes the layers (activation checkpointing).
        forward_first: whether a step begins with forward passes alone, which gather as much as those of a micro-step.
    """
    sizes = [size for part in modules for size in part]
    ends = list(accumulate(len(part) for part in modules))
    parts = [list(range(end - len(part), end)) for part, end in zip(modules, ends, strict=True)]
    forward = [index for part in parts for index in part]
    backward: list[int] = []
    for number, part in reversed(list(enumerate(parts))):
        if recompute and 0 < number < len(parts) - 1:
            # The end of a layer is not recomputed: torch stops when it has every tensor that the backward pass needs.
            backward += part[: max((at for at, module in enumerate(part) if sizes[module]), default=0)]
        backward += reversed(part)
    stays_from = len(forward) if forward_first else 0
    coordinator = _Coordinator(sizes, [*forward, *backward], zero, stays_from=stays_from)
    fetched, peak = coordinator.run_to(len(forward))
    at_loss = coordinator.live
    fetched_back, peak_back = coordinator.run_to(len(coordinator.order) - 1)
    last_fetched, last_peak = coordinator.run_to(len(coordinator.order))
    return GatheredParams(
        forward=fetched,
        backward=fetched_back + last_fetched,
        peak_forward=peak,
        at_loss=at_loss,
        peak_backward=max(peak_back, last_peak),
        at_end=last_peak,
    )


class _Coordinator:
    """DeepSpeed's parameter coordinator over the modules of a micro-step."""

    def __init__(self, sizes: Sequence[int], order: Sequence[int], zero: Zero, *, stays_from: int) -> None:
        """`stays_from`: position in the order before which each module is released after its use."""
        self.order = order
        self._stays_from = stays_from
        self.live = 0
        self._sizes, self._zero = sizes, zero
        self._sums = [0, *accumulate(sizes[module] for module in order)]
        self._next = _next_uses(order)
        self._available = [False] * len(sizes)
        self._queue: deque[int] = deque(range(len(order)))
        self._last_seen = [-1] * len(sizes)
        """Last position in the order at which the prefetcher came upon a module."""
        self._position = 0

    def run_to(self, stop: int) -> tuple[int, int]:
        """Advances to a position of the order. Returns the parameters gathered and the most at a time."""
        fetched, peak = 0, self.live
        while self._position < stop:
            position, module = self._position, self.order[self._position]
            fetched += self._fetch(module)
            while self._queue and self._queue[0] <= position:
                self._queue.popleft()
            self._last_seen[module] = max(self._last_seen[module], position)
            fetched += self._prefetch()
            peak = max(peak, self.live)
            if not self._reused_soon(position, module):
                self._available[module] = False
                self.live -= self._sizes[module]
            self._position += 1
        return fetched, peak

    def _fetch(self, module: int) -> int:
        if self._available[module]:
            return 0
        self._available[module] = True
        self.live += self._sizes[module]
        return self._sizes[module]

    def _prefetch(self) -> int:
        fetched = 0
        limit = min(self._zero.stage3_max_live_parameters - self.live, self._zero.stage3_prefetch_bucket_size)
        while self._queue and fetched < limit:
            position = self._queue.popleft()
            module = self.order[position]
            self._last_seen[module] = max(self._last_seen[module], position)
            fetched += self._fetch(module)
        return fetched

    def _reused_soon(self, position: int, module: int) -> bool:
        after = self._next[position]
        if after is None or position < self._stays_from:
            return False
        between = self._sums[after] - self._sums[position + 1]
        return self._last_seen[module] > position or between < self._zero.stage3_max_reuse_distance


def _next_uses(order: Sequence[int]) -> list[int | None]:
    """The next position of the same module, for each position of the order."""
    following: list[int | None] = [None] * len(order)
    last: dict[int, int] = {}
    for position in reversed(range(len(order))):
        following[position] = last.get(order[position])
        last[order[position]] = position
    return following
