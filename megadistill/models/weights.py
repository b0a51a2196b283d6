"""Parameters of a model from a folder of safetensors, one by one or all, and checks of the folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Size, Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from megadistill.errors import UserError
from megadistill.models.experts import stored_tensors
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
    """The parameter `name` of the whole model, copied from the mapped files.

    Raises:
        UserError: a tensor of it is missing, or has another shape.
    """
    parameter = torch.empty(*shape, dtype=dtype, device=device)
    stored = stored_tensors(name, shape, family(config).experts)
    for each in stored:
        _check_shape(weights, each.name, each.view(parameter).shape)
    for each, tensor in zip(stored, weights.tensors([each.name for each in stored]), strict=True):
        each.view(parameter).copy_(tensor)
    return parameter


def stored_shapes(config: PretrainedConfig) -> dict[str, Size]:
    """Name -> shape of each tensor of a checkpoint of this config, with a tensor for each expert."""
    with torch.device("meta"):
        return {
            tensor.name: tensor.view(torch.empty(shape)).shape
            for name, shape in parameter_shapes(config).items()
            for tensor in stored_tensors(name, shape, family(config).experts)
        }


def check_weights(folder: Path, config: PretrainedConfig) -> None:
    """Checks that the folder has every tensor of the model, in its shape and as a float, in complete files.

    Only headers are read: cheap enough for every rank, before any of them allocates a model.

    Raises:
        UserError: naming the first that is not.
    """
    weights = SafetensorsFolder(folder)
    for name, shape in stored_shapes(config).items():
        _check_shape(weights, name, shape)
        weights.dtype(name)


def _check_shape(weights: SafetensorsFolder, name: str, expected: Size) -> None:
    shape = weights.shape(name)
    if shape != expected:
        raise UserError(
            f"{name} in {weights.folder} is {list(shape)}, but its config.json says {list(expected)}; "
            "the folder mixes two models, or its config.json was edited"
        )


def load_pretrained(folder: Path, *, what: str, device: torch.device) -> PreTrainedModel:
    """A whole model from its folder, in its stored precision, for evaluation. Only safetensors are read.

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
