"""Random numbers that depend on a seed and a name alone: on no order, no rank and no device."""

import hashlib

import numpy as np


def keyed_generator(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for each (seed, name): Philox, keyed by their 128-bit hash."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
