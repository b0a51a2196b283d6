"""Random numbers that depend on a seed and a name alone: on no order, no rank and no device."""

import hashlib

import numpy as np


def keyed_generator(seed: int, name: str, block: int = 0) -> np.random.Generator:
    """A generator of its own for each (seed, name, block): Philox, keyed by the 128-bit hash of (seed, name).

    `block` is the highest word of its 256-bit counter, so that no block's numbers run into another's.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"), counter=block << 192))
