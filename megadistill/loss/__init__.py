"""The distillation loss and its gradient.

`distill_loss`, `sparse_distill_loss` and `label_loss` are the vocabulary-parallel operator, `token_terms` its values
token by token; `loss.reference` defines what they compute.
"""

from megadistill.distributed.vocab import VocabSlice
from megadistill.divergence import Divergence, DivergenceKind
from megadistill.loss.heads import Head
from megadistill.loss.options import Elementwise, LossOptions
from megadistill.loss.tokens import AgainstTeacher, TokenTerms, token_terms
from megadistill.loss.vocab_parallel import distill_loss, label_loss, sparse_distill_loss

__all__ = [
    "AgainstTeacher",
    "Divergence",
    "DivergenceKind",
    "Elementwise",
    "Head",
    "LossOptions",
    "TokenTerms",
    "VocabSlice",
    "distill_loss",
    "label_loss",
    "sparse_distill_loss",
    "token_terms",
]
