"""Initial weights of a student: random ones, or those of a Hugging Face folder, by ranges of elements.

The folder is a pruned teacher or an earlier student. ZeRO-3 keeps a flat piece of each parameter on each rank, so a
rank draws only the blocks, and reads only the rows, that its piece lies in.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Size, Tensor
from transformers import PretrainedConfig

from megadistill.errors import UserError
from megadistill.models.configs.unequal_layers import layer_config, layer_configs
from megadistill.models.experts import stored_tensors
from megadistill.models.families import (
    DROPOUTS,
    EMBEDDING,
    HEAD,
    constant_buffers,
    family,
    head_dim,
    load_config,
)
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.models.weights import check_weights
from megadistill.rng import keyed_generator
from megadistill.units import short

FREE_KEYS = (
    *DROPOUTS,
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_window_layers",  # layer_types has its effect
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "use_cache",
    "vocab_size",  # the rows are compared with the data's
)
"""Keys in which the two configs may differ: they do not change the computation of the weights here."""

MAX_DIFFERENCES = 5
"""Maximum number of differences that a message lists."""

BLOCK = 1 << 19
"""Elements of a parameter that have a generator of their own: see docs/decisions/0023.

Another value changes the initial values of all larger parameters.
"""


_CONSTANT = {
    ".act_fn.alpha_p": math.log(math.expm1(0.8)),
    ".act_fn.alpha_n": math.log(math.expm1(0.8 - 0.5)),
}
"""End of a name -> initial value: those of xIELU (2411.13010), whose softplus is 0.8, with the constant 0.5."""


def initial_tensor(name: str, shape: Sequence[int], *, std: float, seed: int, norm: float = 1.0) -> Tensor:
    """float32 on the CPU: matrices (and experts' stacks of them) normal(0, `std`), biases zero, norms `norm`.

    As in transformers, except that the embedding of `pad_token_id` is drawn like the others. `norm` is the family's
    `norm_init`. Values depend on (seed, name, place) alone, not on the world size or the order of parameters, and are
    drawn in row-major order: the first rows of an embedding or head do not depend on the number of padding rows.
    """
    values = initial_range(name, shape, 0, Size(shape).numel(), std=std, seed=seed, norm=norm)
    return values.reshape(tuple(shape))


def initial_range(
    name: str, shape: Sequence[int], start: int, stop: int, *, std: float, seed: int, norm: float = 1.0
) -> Tensor:
    """[stop - start] float32 on the CPU: these elements of the flattened `initial_tensor`, bitwise.

    Cost: the range, and less than a block more.
    """
    constant = next((value for end, value in _CONSTANT.items() if name.endswith(end)), None)
    if constant is not None:
        return torch.full((stop - start,), constant)
    like_matrices = name.endswith((".sinks", ".router.bias"))  # of gpt-oss
    if name.endswith((".bias", "_bias")) and not like_matrices:
        return torch.zeros(stop - start)
    drawn = len(shape) > 1 or like_matrices
    if not drawn or name.endswith("norm.weight"):  # Cohere's norms of queries have a row for each head
        return torch.full((stop - start,), norm)
    return torch.from_numpy(_normal(name, start, stop, seed=seed)).mul_(std)


def _normal(name: str, start: int, stop: int, *, seed: int) -> NDArray[np.float32]:
    """Elements `start` to `stop` of an endless sequence of standard normals."""
    values = np.empty(stop - start, dtype=np.float32)
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        low, high = max(start, first), min(stop, first + BLOCK)
        # numpy's normal is drawn one value after the other, each from as many random words as it rejects, so a block
        # is drawn from its beginning; torch's last digits depend on the vector unit.
        drawn = keyed_generator(seed, name, block).standard_normal(high - first, dtype=np.float32)
        values[low - start : high - start] = drawn[low - first :]
    return values


class RandomWeights:
    """Initial values by a seed, for a model of `config` whose vocabulary of `vocab_size` ids may be padded.

    They are rounded to `dtype`, the precision that the model computes in.
    """

    def __init__(self, config: PretrainedConfig, *, vocab_size: int, seed: int, dtype: torch.dtype) -> None:
        self._std, self._norm = config.initializer_range, family(config).norm_init
        self._vocab_size, self._seed, self._dtype = vocab_size, seed, dtype

    def read(self, name: str, shape: Sequence[int], start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened parameter `name`: float32, on the host; padding rows are zero."""
        values = torch.zeros(stop - start)
        rows = self._vocab_size if name in (EMBEDDING, HEAD) else shape[0]
        end = min(stop, rows * Size(shape[1:]).numel())
        if start < end:
            values[: end - start] = initial_range(
                name, shape, start, end, std=self._std, seed=self._seed, norm=self._norm
            )
        return values.to(self._dtype).float()


class InitialWeights:
    """The parameters of a folder, for a model of `config` whose vocabulary of `vocab_size` ids may be padded.

    Raises, from every method:
        UserError: a tensor is missing, or its file cannot be read.
    """

    def __init__(self, folder: Path, config: PretrainedConfig, *, vocab_size: int) -> None:
        self._weights = SafetensorsFolder(folder)
        self._experts = family(config).experts
        self._vocab_size = vocab_size

    def read(self, name: str, shape: Sequence[int], start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened parameter `name`: float32, on the host; padding rows are zero.

        A narrower type is widened exactly. Memory: the range, and at most a row more at either end.
        """
        values = torch.zeros(stop - start, dtype=torch.float32)
        whole = torch.empty(Size(shape), device="meta")
        # Each is contiguous in the flattened parameter.
        for tensor in stored_tensors(name, shape, self._experts, self._weights):
            place = tensor.view(whole)
            first = int(place.storage_offset())
            rows = self._vocab_size if name in (EMBEDDING, HEAD) else place.shape[0]
            width = place.shape[1:].numel()
            low, high = max(start, first), min(stop, first + rows * width)
            if low >= high:
                continue
            low_row, high_row = (low - first) // width, -(-(high - first) // width)
            stored = self._weights.rows(tensor.name, [(low_row, high_row)]).flatten()
            skip = low - first - low_row * width
            values[low - start : high - start] = stored[skip : skip + high - low]
        return values


def check_initial_weights(folder: Path, config: PretrainedConfig, *, vocab_size: int) -> None:
    """Whether a model of `config` can start from the folder: the same model, all of it there. Headers alone are read.

    The folder may have more rows of the vocabulary than `vocab_size`: those beyond are not read.

    Raises:
        UserError: the folder is no supported model or not whole, or is another model than `config` says.
    """
    theirs = load_config(folder, what="student.weights")
    differing = config_differences(theirs, config)
    if differing:
        more = f"; and {len(differing) - MAX_DIFFERENCES} more" if len(differing) > MAX_DIFFERENCES else ""
        raise UserError(
            f"student.weights: the model in {folder} is not that of student.config: "
            f"{'; '.join(differing[:MAX_DIFFERENCES])}{more}. Name the folder in student.config, too"
        )
    if theirs.vocab_size < vocab_size:
        raise UserError(
            f"student.weights: {folder} has a vocabulary of {theirs.vocab_size} ids, the shards were made with "
            f"{vocab_size}: tokenize the text with the tokenizer of these weights"
        )
    check_weights(folder, theirs)
    _refuse_other_constants(folder, theirs)


def _refuse_other_constants(folder: Path, config: PretrainedConfig) -> None:
    """Refuses weights whose constant buffers have other values than a student's, whose checkpoints do not hold them."""
    weights = SafetensorsFolder(folder)
    for name, constant in constant_buffers(config).items():
        stored = next(weights.tensors([name]))
        if not torch.equal(stored.to(torch.float32), constant.to(stored.dtype).float()):
            raise UserError(
                f"student.weights: {name} in {folder} is {short(float(stored.flatten()[0]))}, and a student's is "
                f"{short(float(constant.flatten()[0]))}: no gradient moves it, and checkpoints do not hold it; start "
                "from random weights, or from those of an earlier student"
            )


def config_differences(theirs: PretrainedConfig, ours: PretrainedConfig) -> list[str]:
    """Keys of two configs whose values change the computation."""
    if theirs.model_type != ours.model_type:
        return [f"model_type is {theirs.model_type} there, {ours.model_type} here"]
    general = {field.name for field in fields(PretrainedConfig)}
    by_layer = {"head_dim", "num_key_value_heads"}
    keys = sorted({field.name for field in fields(ours)} - general - set(FREE_KEYS) - by_layer)
    pairs: list[tuple[str, Any, Any]] = [(key, getattr(theirs, key), getattr(ours, key)) for key in keys]
    sizes: dict[str, Callable[[Any], int]] = {
        "head_dim": head_dim,
        "num_key_value_heads": attrgetter("num_key_value_heads"),
    }
    pairs += [(key, _of_layers(theirs, size), _of_layers(ours, size)) for key, size in sizes.items()]
    return [f"{key} is {there!r} there, {here!r} here" for key, there, here in pairs if there != here]


def _of_layers(config: PretrainedConfig, size: Callable[[Any], int]) -> int | list[int]:
    """A size of all layers, or of each where they differ."""
    sizes = [size(each) for each in layer_configs(config)]
    return sizes[0] if len({*sizes}) == 1 else [size(layer_config(config, n)) for n in range(config.num_hidden_layers)]
