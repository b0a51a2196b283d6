"""DeepSpeed ZeRO-3's gathering of a model's parameters, layer by layer, simulated.

From its third micro-step on DeepSpeed knows the order of the modules: it prefetches parameters of the next ones, and
releases a module after its use unless one of the next `stage3_max_reuse_distance` parameters is its own. So the last
layers of the forward pass stay for the backward pass, and a small model stays as a whole. They stay although their own
turn is further away: between the passes comes the whole model's hook, and for a leaf DeepSpeed takes it for a use of
all parameters (`recurse` of the module that is released, in `__params_to_release`).
Where forward passes alone come first, as those that count the tokens of experts, nothing stays: the first order that
DeepSpeed knows is then that of a forward pass, and what it decides to release by that one it never decides again
(`functools.lru_cache` of `__params_to_release`).
This follows `deepspeed/runtime/zero/partitioned_param_coordinator.py`.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

COMMUNICATION_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's settings that decide memory and traffic, with its keys and defaults; sizes in parameters."""

    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_prefetch_bucket_size: int | None = None
    """None: the largest layer's partitioned parameters."""
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_param_persistence_threshold: int = 100_000
    reduce_bucket_size: int = 500_000_000
    sub_group_size: int = 1_000_000_000
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
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
    again_at_loss: int
    """Those of them that were released in the forward pass, and fetched again ahead of the backward pass."""
    peak_backward: int
    """Most gathered parameters at a time in the backward pass."""
    at_end: int
    """Gathered parameters during the backward pass of the first module, the embedding."""


@lru_cache(maxsize=256)
def count_gathered(
    leaves: tuple[tuple[int, ...], ...], zero: Zero, *, prefetch: int, forward_first: bool = False
) -> GatheredParams:
    """Parameters that a micro-step gathers, once DeepSpeed knows the order of the modules.

    Args:
        leaves: sizes of the partitioned parameters of each leaf in the order of the forward pass: the embedding, each
            layer, the last norm. A recomputation happens while its layer is gathered for the backward pass.
        prefetch: parameters that are prefetched at a time, at least.
        forward_first: whether a step begins with forward passes alone, which gather as much as those of a micro-step.
    """
    forward = list(range(len(leaves)))
    order = [*forward, WHOLE_MODEL, *reversed(forward)]
    coordinator = _Coordinator(leaves, order, zero, prefetch, stays_from=len(forward) if forward_first else 0)
    fetched, peak = coordinator.run_to(len(forward))
    at_loss, again = coordinator.live, coordinator.live_again
    fetched_back, peak_back = coordinator.run_to(len(order) - 1)
    last_fetched, last_peak = coordinator.run_to(len(order))
    return GatheredParams(
        forward=fetched,
        backward=fetched_back + last_fetched,
        peak_forward=peak,
        at_loss=at_loss,
        again_at_loss=again,
        peak_backward=max(peak_back, last_peak),
        at_end=last_peak,
    )


@dataclass(frozen=True)
class GatherCall:
    """A call by which DeepSpeed gathers parameters, by their sizes."""

    backward: bool
    sizes_new: tuple[int, ...]
    """Parameters that were not gathered before in this micro-step."""
    sizes_again: tuple[int, ...]
    """Those that were gathered and released."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.sizes_new + self.sizes_again


@lru_cache(maxsize=256)
def gather_calls(leaves: tuple[tuple[int, ...], ...], zero: Zero, *, prefetch: int) -> tuple[GatherCall, ...]:
    """The calls of a micro-step, once DeepSpeed knows the order of the modules; arguments as of `count_gathered`.

    Modules around the leaves have hooks too, at which the prefetch goes on: the causal model and its decoder before
    each pass, the rotary embedding before the first layer.
    """
    embedding, *others = forward = list(range(len(leaves)))
    whole = [WHOLE_MODEL, WHOLE_MODEL]
    order = [*whole, embedding, NO_PARAMETERS, *others, *whole, *reversed(forward)]
    coordinator = _Coordinator(leaves, order, zero, prefetch, stays_from=0)
    coordinator.run_to(len(order))
    return tuple(
        GatherCall(
            position > len(forward) + len(whole),
            tuple(leaves[leaf][number] for leaf, number, again in call if not again),
            tuple(leaves[leaf][number] for leaf, number, again in call if again),
        )
        for position, call in coordinator.calls
    )


WHOLE_MODEL, NO_PARAMETERS = -1, -2
"""Places in the order of the whole model's own hook, and of a module without parameters."""


class _Coordinator:
    """DeepSpeed's parameter coordinator over the leaves of a micro-step."""

    def __init__(
        self, leaves: Sequence[Sequence[int]], order: Sequence[int], zero: Zero, prefetch: int, *, stays_from: int
    ) -> None:
        """`stays_from`: position in the order before which each leaf is released after its use."""
        self._order = order
        self._stays_from = stays_from
        self.live = 0
        """Gathered parameters."""
        self._leaves, self._zero, self._prefetch_size = leaves, zero, prefetch
        self._available = [[False] * len(sizes) for sizes in leaves]
        self._queue = deque(
            (position, leaf, number)
            for position, leaf in enumerate(order)
            if leaf >= 0
            for number in range(len(leaves[leaf]))
        )
        self._fetches = [[0] * len(sizes) for sizes in leaves]
        self._last_seen = [[-1] * len(sizes) for sizes in leaves]
        """Last position in the order at which the prefetcher came upon a parameter."""
        self._position = 0
        self.calls: list[tuple[int, list[tuple[int, int, bool]]]] = []
        """Position and (leaf, number, whether it was gathered before) of each call that gathers anything."""

    @property
    def live_again(self) -> int:
        """Gathered parameters that had been released before."""
        return sum(
            size
            for leaf, sizes in enumerate(self._leaves)
            for number, size in enumerate(sizes)
            if self._available[leaf][number] and self._fetches[leaf][number] > 1
        )

    def run_to(self, stop: int) -> tuple[int, int]:
        """Advances to a position of the order. Returns the parameters gathered and the most at a time."""
        fetched, peak = 0, self.live
        while self._position < stop:
            position, leaf = self._position, self._order[self._position]
            numbers = range(len(self._leaves[leaf]) if leaf >= 0 else 0)
            self.calls.append((position, []))
            fetched += sum(self._fetch(leaf, number) for number in numbers)
            while self._queue and self._queue[0][0] <= position:
                self._queue.popleft()
            for number in numbers:
                self._last_seen[leaf][number] = max(self._last_seen[leaf][number], position)
            self.calls.append((position, []))
            fetched += self._prefetch()
            peak = max(peak, self.live)
            if numbers and not self._reused_soon(position, leaf):
                for number in numbers:
                    self._release(leaf, number, position)
            self._position += 1
        self.calls = [call for call in self.calls if call[1]]
        return fetched, peak

    def _fetch(self, leaf: int, number: int) -> int:
        if self._available[leaf][number]:
            return 0
        self._available[leaf][number] = True
        self.calls[-1][1].append((leaf, number, self._fetches[leaf][number] > 0))
        self._fetches[leaf][number] += 1
        self.live += self._leaves[leaf][number]
        return self._leaves[leaf][number]

    def _release(self, leaf: int, number: int, position: int) -> None:
        """Releases a parameter, unless the prefetcher has passed over a later use of it."""
        if self._last_seen[leaf][number] <= position or position < self._stays_from:
            self._available[leaf][number] = False
            self.live -= self._leaves[leaf][number]

    def _prefetch(self) -> int:
        fetched = 0
        limit = min(self._zero.stage3_max_live_parameters - self.live, self._prefetch_size)
        while self._queue and fetched < limit:
            position, leaf, number = self._queue.popleft()
            self._last_seen[leaf][number] = max(self._last_seen[leaf][number], position)
            fetched += self._fetch(leaf, number)
        return fetched

    def _reused_soon(self, position: int, leaf: int) -> bool:
        """Whether one of the next `stage3_max_reuse_distance` parameters is the leaf's."""
        if position < self._stays_from:
            return False
        between = 0
        for later in self._order[position + 1 :]:
            if between >= self._zero.stage3_max_reuse_distance:
                return False
            if later in (leaf, WHOLE_MODEL):
                return True
            between += sum(self._leaves[later]) if later >= 0 else 0
        return False
