"""Random initial values of a parameter, by its name.

They depend on (seed, name) alone, so they are the same for every world size, for every order in which parameters are
filled, and whatever random numbers were drawn before.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megadistill.rng import keyed_generator


def initial_tensor(name: str, shape: Sequence[int], *, std: float, seed: int, norm: float = 1.0) -> Tensor:
    """float32 on the CPU: matrices (and experts' stacks of them) normal(0, `std`), biases zero, norms `norm`.

    As transformers fills them; `norm` is the family's `norm_init`.
    Row-major draws: the first rows of an embedding or head do not depend on how many padding rows follow.
    (transformers zeroes the embedding of `pad_token_id`, which is never trained; here it is drawn like the others.)
    """
    if name.endswith(".bias"):
        return torch.zeros(*shape)
    if len(shape) == 1:
        return torch.full(tuple(shape), norm)
    # numpy's normal is drawn one value after the other; torch's works in blocks of 16, so that its tail depends on
    # the size, and its last digits on the vector unit.
    normal = keyed_generator(seed, name).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(normal).mul_(std)
