"""Sparse targets: a part of the teacher's distribution, and what becomes of the rest."""

from megadistill.loss.sparse.selection import Sampled, Selection, Threshold, TopK, TopP
from megadistill.loss.sparse.sparse_targets import sparse_targets

__all__ = ["Sampled", "Selection", "Threshold", "TopK", "TopP", "sparse_targets"]
