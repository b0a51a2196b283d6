"""Operators that a call of the loss launches: each is a kernel on an accelerator, some microseconds, whatever its size.

Legend: w ranks whose pieces of the vocabulary a slice holds; n tokens, v rows of the vocabulary.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.distributed.vocab import VocabSlice, block_cyclic_ranges
from megadistill.loss import Divergence, DivergenceKind
from megadistill.types import Tail
from tests.unit.loss.problems import problem, run, sparse

VIEWS = {"view", "slice", "select", "unsqueeze", "expand", "t", "transpose", "alias", "detach", "unbind", "split", "_"}
"""Operators that move no data; `as_strided` and others count, which is on the safe side."""

CHUNK_KERNELS = {"forward KL": 210, "JSD": 265, "sparse targets": 220}
"""Bounds of a chunk in one block, eager: its products, statistics, divergence and gradients."""


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run, but for views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        self.counts[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


def launches(case: str, vocab: VocabSlice, chunks: int) -> int:
    """Operators of a call of the loss and its backward, whose tokens take so many chunks."""
    p = problem(3, tokens=4 * chunks, rows=2048, size=2047).cast(torch.float32)
    divergence = Divergence(DivergenceKind.JSD if case == "JSD" else DivergenceKind.FORWARD_KL, z_loss=1e-4)
    targets = sparse(p, Tail.OTHER, kept=5) if case == "sparse targets" else None
    models = 1 if targets is not None else 2
    with Launches() as mode:
        run(p, divergence, vocab=vocab, targets=targets, logit_memory=4 * models * 4 * 2047)
    return mode.counts.total()


@pytest.mark.parametrize("case", CHUNK_KERNELS)
def test_a_chunk_launches_as_many_kernels_for_any_world(case: str) -> None:
    """A slice of the 2,048 pieces that 2,048 ranks store costs what a slice of 64 pieces does."""
    launches(case, VocabSlice.contiguous(0, 2048, 2047), 3)  # the buffer of logits is made once, for all
    first_call, chunk = {}, {}
    for world in (1, 64, 512, 2048):
        vocab = VocabSlice(block_cyclic_ranges(2048, world, 1, 0), 2047)
        assert len(vocab.ranges) == world
        first_call[world] = launches(case, vocab, 1)
        chunk[world] = launches(case, vocab, 3) - launches(case, vocab, 2)
    assert len(set(first_call.values())) == 1, first_call
    assert len(set(chunk.values())) == 1, chunk
    assert chunk[1] <= CHUNK_KERNELS[case], chunk
