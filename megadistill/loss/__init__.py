"""The loss: what student and teacher disagree about, and its gradient. It does not know models or optimizers.

`distill_loss`, `sparse_distill_loss` and `label_loss` are the vocabulary-parallel operator, `token_terms` is what they
add up, token by token; `loss.reference` defines what they compute.
"""

from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.divergence import Divergence, DivergenceKind, Elementwise
from megadistill.loss.tokens import AgainstTeacher, TokenTerms, token_terms
from megadistill.loss.vocab_parallel import distill_loss, label_loss, sparse_distill_loss

__all__ = [
    "AgainstTeacher",
    "Divergence",
    "DivergenceKind",
    "Elementwise",
    "TokenTerms",
    "VocabSlice",
    "distill_loss",
    "label_loss",
    "sparse_distill_loss",
    "token_terms",
]
