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
"""Rows of each tensor that are hashed."""


def teacher_fingerprint(folder: Path) -> str:
    """sha256 over config.json and, for each tensor, its name, type, shape and first rows.

    The distribution of the tensors over files does not matter. Headers alone are equal for all checkpoints of one
    architecture; training changes all rows. An edit of later rows by hand is not detected.

    Raises:
        UserError: the folder holds no config.json, or no weights that can be read.
    """
    try:
        digest = hashlib.sha256(read_file(folder / "config.json"))
    except (OSError, ValueError) as error:
        if not (folder / "config.json").is_file():
            raise UserError(not_model(folder, str(folder))) from None
        raise UserError(f"{folder / 'config.json'} cannot be read: {reason_of(error)}") from None
    weights = SafetensorsFolder(folder)
    for name in weights.names:
        shape = list(weights.shape(name))
        digest.update(json.dumps([name, str(weights.dtype(name)), shape]).encode())
        first = weights.rows(name, [(0, min(SAMPLED_ROWS, shape[0]))]) if shape else next(weights.tensors([name]))
        digest.update(first.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
