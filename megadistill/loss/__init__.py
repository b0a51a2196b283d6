"""The loss: what student and teacher disagree about, and its gradient. It does not know models or optimizers.

`distill_loss`, `sparse_distill_loss` and `label_loss` are the vocabulary-parallel operator; `loss.reference` defines
what they compute.
"""

from megadistill.comm.vocabulary import VocabSlice
from megadistill.loss.divergence import Divergence, DivergenceKind, Elementwise
from megadistill.loss.vocab_parallel import distill_loss, label_loss, sparse_distill_loss

__all__ = [
    "Divergence",
    "DivergenceKind",
    "Elementwise",
    "VocabSlice",
    "distill_loss",
    "label_loss",
    "sparse_distill_loss",
]
