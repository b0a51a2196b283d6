"""Room `model`: a model's parameters out of a folder of safetensors, whole or one by one. It knows no stages, no ranks.

Which tensors a parameter is made of is `experts`' knowledge, which parameters there are is transformers'.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Size, Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from megadistill.errors import UserError
from megadistill.models.experts import pieces
from megadistill.models.families import family, load_config, parameter_shapes
from megadistill.models.hf_folder import SafetensorsFolder


def read_parameter(
    weights: SafetensorsFolder,
    config: PretrainedConfig,
    name: str,
    shape: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The parameter `name` of the whole model, in memory of its own. On the host, nothing else is allocated.

    Raises:
        UserError: a tensor of it is missing, or has another shape.
    """
    parameter = torch.empty(*shape, dtype=dtype, device=device)
    stored = pieces(name, shape, family(config).experts)
    for piece in stored:
        _check_shape(weights, piece.name, piece.of(parameter).shape)
    for piece, tensor in zip(stored, weights.tensors([piece.name for piece in stored]), strict=True):
        piece.of(parameter).copy_(tensor)
    return parameter


def stored_shapes(config: PretrainedConfig) -> dict[str, Size]:
    """Name -> shape of each tensor of a checkpoint of this config; of experts one by one, as they are stored."""
    with torch.device("meta"):
        return {
            piece.name: piece.of(torch.empty(shape)).shape
            for name, shape in parameter_shapes(config).items()
            for piece in pieces(name, shape, family(config).experts)
        }


def check_weights(folder: Path, config: PretrainedConfig) -> None:
    """Every tensor of the model is there, in its shape and as a float, in files as long as their headers say.

    Reads the headers alone: cheap enough for every rank, before any of them allocates a model.

    Raises:
        UserError: naming the first that is not.
    """
    weights = SafetensorsFolder(folder)
    for name, shape in stored_shapes(config).items():
        _check_shape(weights, name, shape)
        weights.dtype(name)


def _check_shape(weights: SafetensorsFolder, name: str, expected: Size) -> None:
    found = weights.shape(name)
    if found != expected:
        raise UserError(
            f"{name} in {weights.folder} is {list(found)}, but its config.json says {list(expected)}; "
            "the folder mixes two models, or its config.json was edited"
        )


def load_pretrained(folder: Path, *, what: str, device: torch.device) -> PreTrainedModel:
    """A whole model from its folder, in the precision that it is stored in, for evaluation. Only safetensors are read.

    Raises:
        UserError: the folder holds no model of a supported family, or its weights cannot be read.
    """
    config = load_config(folder, what=what)
    check_weights(folder, config)  # transformers would fill a missing one with random numbers
    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=family(config).attention, use_safetensors=True, local_files_only=True
    )
    return model.to(device).eval()
