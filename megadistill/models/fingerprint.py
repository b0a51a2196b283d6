"""Room `model`: which weights a folder holds, told in seconds. It knows no architecture and no ranks."""

import hashlib
import json
from pathlib import Path
from typing import Final

import torch

from megadistill.errors import UserError
from megadistill.models.hf_folder import SafetensorsFolder

SAMPLED_ROWS: Final = 4
"""Of each tensor; they are looked at, and the rest is not."""


def teacher_fingerprint(folder: Path) -> str:
    """sha256 over config.json and, for each tensor, its name, type, shape and first rows.

    How the tensors are dealt out to files does not matter. Headers alone would be the same for any two checkpoints of
    one architecture; training moves all rows. What is not seen is an edit by hand of later rows, of a few tokens'
    embeddings for instance.

    Raises:
        UserError: the folder holds no config.json, or no weights that can be read.
    """
    try:
        digest = hashlib.sha256((folder / "config.json").read_bytes())
    except OSError as error:
        raise UserError(
            f"{folder / 'config.json'} cannot be read ({error.strerror}): name a Hugging Face model folder"
        ) from None
    weights = SafetensorsFolder(folder)
    for name in weights.names:
        shape = list(weights.shape(name))
        digest.update(json.dumps([name, str(weights.dtype(name)), shape]).encode())
        first = weights.rows(name, [(0, min(SAMPLED_ROWS, shape[0]))])
        digest.update(first.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
