"""Sparse targets: a part of the teacher's distribution, and what becomes of the rest."""

from megadistill.loss.sparse.selection import (
    Sampled,
    SampledDistinct,
    Selection,
    Threshold,
    TopK,
    TopP,
    uniforms_per_token,
)
from megadistill.loss.sparse.sparse_targets import sparse_targets

__all__ = [
    "Sampled",
    "SampledDistinct",
    "Selection",
    "Threshold",
    "TopK",
    "TopP",
    "sparse_targets",
    "uniforms_per_token",
]
