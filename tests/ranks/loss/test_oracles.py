"""The label loss on 2 ranks against megatron-core's vocab-parallel cross-entropy, over the same gloo group.

Megatron's plain one: its fused one rounds the gradient to bfloat16, and both work in float32 whatever they are given.
It gives the gradient with respect to the logits, each rank's slice of them; the products around it are made here.

Legend: N tokens of the group, D width, V vocabulary, v rows of a rank's slice.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megadistill.distributed.topology import Topology
from megadistill.loss import Head, VocabSlice, label_loss
from megadistill.types import IGNORED_LABEL
from tests.ranks.harness import run_ranks
from tests.unit.loss.problems import TOLERANCE, problem, relative_error

RANKS, TOKENS, ROWS = 2, 14, 24
FIRST_HAS = 9
"""Tokens of rank 0. Ours are data-parallel over the group; Megatron's are all on every rank."""


@dataclass(frozen=True)
class Found:
    loss: Tensor
    """Ours: of this rank's tokens. Megatron's: of all, on every rank."""
    hidden_grad: Tensor
    """Ours: [tokens of the rank, D], complete. Megatron's: [N, D], the share of this rank's rows."""
    weight_grad: Tensor
    """[v, D]."""


def _both(topology: Topology) -> tuple[Found, Found]:
    import megatron.core.parallel_state as parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    p = problem(6, tokens=TOKENS, rows=ROWS, size=ROWS).cast(torch.float32)
    # Megatron has no label of -100: a token without a loss has weight 0, there as here.
    weights_N = torch.where(p.labels == IGNORED_LABEL, 0, p.token_weights).float()
    labels_N = p.labels.clamp_min(0)
    v = ROWS // topology.group_size
    rows = slice(topology.group_rank * v, (topology.group_rank + 1) * v)
    mine = slice(0, FIRST_HAS) if topology.group_rank == 0 else slice(FIRST_HAS, TOKENS)

    hidden, weight = p.student_hidden[mine].requires_grad_(), p.student_weight[rows].requires_grad_()
    vocab = VocabSlice.contiguous(rows.start, rows.stop, ROWS, topology.vocab_group)
    loss = label_loss(Head(hidden, weight), labels_N[mine], token_weights=weights_N[mine], vocab=vocab).loss
    ours = Found(loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=topology.group_size)
    hidden, weight = p.student_hidden.clone().requires_grad_(), p.student_weight[rows].clone().requires_grad_()
    ce_N = vocab_parallel_cross_entropy(hidden @ weight.T, labels_N)
    loss = (weights_N * ce_N).sum()
    theirs = Found(loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    return ours, theirs


@pytest.mark.filterwarnings("ignore::UserWarning:megatron.*")
def test_megatrons_vocab_parallel_cross_entropy() -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed: pip install -e '.[oracles]'")
    ours, theirs = zip(*run_ranks(RANKS, _both), strict=True)
    tolerance = TOLERANCE[torch.float32]
    assert sum(found.loss.item() for found in ours) == pytest.approx(theirs[0].loss.item(), rel=tolerance)
    hidden_grad = torch.cat([found.hidden_grad for found in ours])
    assert relative_error(hidden_grad, sum(found.hidden_grad for found in theirs)) < tolerance
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine.weight_grad, other.weight_grad) < tolerance
