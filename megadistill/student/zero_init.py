"""Construction of a model under ZeRO-3 without communication, for parameters that get their values afterwards.

DeepSpeed sends rank 0's initial values of each parameter to all ranks when it partitions it, and gathers it once more
to register a hook on it: two collectives over the world a parameter.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from typing_extensions import override


class EmptyInit(deepspeed.zero.Init):  # type: ignore[misc]  # DeepSpeed has no types
    """`zero.Init` whose partitions have no values."""

    @override
    def _zero_init_param(self, param: Any) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


@contextmanager
def without_gathers(parameters: Iterable[Any]) -> Iterator[None]:
    """A context for `deepspeed.initialize`, in which these parameters of ZeRO-3 are not gathered.

    A hook on the accumulation of a gradient needs the parameter, not its values.
    """
    gathers = [(parameter, parameter.all_gather) for parameter in parameters]
    for parameter, _ in gathers:
        parameter.all_gather = lambda *_, **__: None
    try:
        yield
    finally:
        for parameter, gather in gathers:
            parameter.all_gather = gather
