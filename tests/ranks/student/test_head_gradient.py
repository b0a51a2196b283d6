"""The float32 gradient of the head: where the optimizer reads it, from the first product to the step."""

from collections import Counter
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadistill.distributed.topology import Topology
from megadistill.student.engine import StudentEngine
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import Case, build, run_steps

FREE = {"view", "slice", "detach", "t", "alias", "as_strided", "split", "new_empty"}
"""Operators that neither read nor write a number."""


class _Matrices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators that make a matrix of the size of the head's slice, and those that read or write its gradient."""

    def __init__(self, elements: int, gradient: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: Counter[str] = Counter()
        self.touching: Counter[str] = Counter()
        self._elements = elements
        self._start, self._stop = gradient.data_ptr(), gradient.data_ptr() + gradient.nbytes

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = function(*args, **(kwargs or {}))
        name = function._opname
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        for made in tree_leaves(result):
            new = isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in storages
            if new and made.dtype == torch.float32 and made.numel() == self._elements:
                self.made[name] += made.nbytes
        if name not in FREE and any(map(self._overlaps, given)):
            self.touching[name] += 1
        return result

    def _overlaps(self, tensor: Tensor) -> bool:
        start = tensor.data_ptr()
        return start < self._stop and start + tensor.nbytes > self._start


def _a_window(topology: Topology, case: Case) -> tuple[Tensor, Counter[str], Counter[str]]:
    """The head's gradient; bytes of new matrices of its size; operators on ZeRO-3's partition of it, by name."""
    student = build(case, topology)
    student.step = MethodType(StudentEngine.step, student)  # type: ignore[method-assign]
    run_steps(case, student, topology, range(1))
    memory = student.head.gradient().memory
    partition = student.head._partition
    assert partition is not None
    with _Matrices(memory.numel(), partition) as seen:
        run_steps(case, student, topology, range(1, 2))
    return memory, seen.made, seen.touching


def test_the_gradient_is_never_copied() -> None:
    """Each chunk's product adds to the optimizer's own memory; then come the norm, clipping and AdamW."""
    for _, made, touching in run_ranks(2, _a_window, Case(accumulation=2)):
        assert made == {}
        products = touching.pop("addmm")
        assert products > 2, "several chunks of two micro-batches"
        assert touching.pop("fill_", 0) + touching.pop("zero_", 0) <= 1, "padding rows"
        assert touching == {"_foreach_norm": 1, "mul_": 1, "_fused_adamw_": 1}


@pytest.mark.parametrize(("case", "vocab_group"), [(Case(tied=True, accumulation=2), 2), (Case(accumulation=2), 1)])
def test_another_matrix_reaches_the_partition_in_one_operation(case: Case, vocab_group: int) -> None:
    """The head's slice has memory of its own where ZeRO-3's partition has the lookup's gradient, or fewer rows.

    It is added with tied embeddings (the lookup's two micro-batches are a write and an addition), and is the source of
    a reduce-scatter with p < w.
    """
    for _, _, touching in run_ranks(2, _a_window, case, vocab_group=vocab_group):
        assert touching["add_"] == (2 if case.tied else 0)
        assert touching["_reduce_scatter_base_"] == (0 if case.tied else 1)
        assert touching["copy_"] == 1, "of the lookup's first gradient; or gloo's own, out of its buffer"
        assert "addmm" not in touching
