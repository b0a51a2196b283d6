"""Fingerprint of a folder's weights, from a few rows of each tensor."""

import hashlib
import json
from pathlib import Path
from typing import Final

import torch

from megadistill.config.paths import not_model
from megadistill.errors import UserError
from megadistill.io import read_file, reason_of
from megadistill.models.hf_folder import SafetensorsFolder

SAMPLED_ROWS: Final = 4
"""Rows of each tensor that are hashed; of stacked experts, the first expert."""
SAMPLED_TENSORS: Final = 64
"""Tensors whose rows `sampled_fingerprint` hashes: a mixture of experts has 100,000."""


def teacher_fingerprint(folder: Path) -> str:
    """sha256 over config.json and, for each tensor, its name, type, shape and first rows.

    The distribution of the tensors over files does not matter. Headers alone are equal for all checkpoints of one
    architecture; training changes all rows. An edit of later rows by hand is not detected.

    Raises:
        UserError: the folder holds no config.json, or no weights that can be read.
    """
    return _fingerprint(folder, every=1)


def sampled_fingerprint(folder: Path) -> str:
    """`teacher_fingerprint` of the rows of `SAMPLED_TENSORS` tensors at most: cheap enough for a rank of every node.

    Raises:
        UserError: see `teacher_fingerprint`.
    """
    return _fingerprint(folder, every=-(-len(SafetensorsFolder(folder).names) // SAMPLED_TENSORS) or 1)


def _fingerprint(folder: Path, *, every: int) -> str:
    """The fingerprint with the rows of one in `every` tensors."""
    try:
        digest = hashlib.sha256(read_file(folder / "config.json"))
    except (OSError, ValueError) as error:
        if not (folder / "config.json").is_file():
            raise UserError(not_model(folder, str(folder))) from None
        raise UserError(f"{folder / 'config.json'} cannot be read: {reason_of(error)}") from None
    weights = SafetensorsFolder(folder)
    for place, name in enumerate(weights.names):
        shape = list(weights.shape(name))
        digest.update(json.dumps([name, str(weights.dtype(name)), shape]).encode())
        if place % every:
            continue
        rows = SAMPLED_ROWS if len(shape) < 3 else 1  # of stacked experts, a row is a whole expert
        first = weights.rows(name, [(0, min(rows, shape[0]))]) if shape else next(weights.tensors([name]))
        digest.update(first.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
