"""Parameters of a model from a folder of safetensors, one by one or all, and checks of the folder.

The one reading of a model's folder: a teacher's stages, the start of a student, and the whole models of `evaluate`,
`sample`, `generate` and `prune` come from here. What transformers or another program could read as another model is
refused by `check_weights`, which every command calls before anything costs.
"""

import functools
import re
import shlex
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Size, Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from megadistill.errors import UserError
from megadistill.models.attention.choice import choose_attention
from megadistill.models.configs.unequal_layers import first_sharing_layer
from megadistill.models.experts import stored_tensors
from megadistill.models.families import (
    EMBEDDING,
    HEAD,
    build_on_meta,
    family,
    load_config,
    rebuild_buffers,
    refuse_documents,
    stored_buffers,
    stored_parts,
    tensor_type,
)
from megadistill.models.forward.per_layer_inputs import LayerPart
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.redaction import printable

_RECOMPUTED: Final = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that older releases of transformers stored, and that are computed from the config."""

_MAX_NAME: Final = 100
"""Maximum characters of a foreign tensor's name in a message."""

_DECODED_NUMBERS: Final = 1 << 28
"""Most numbers of stacked experts that are decoded at a time: 1 GiB in float32, or one expert."""

_COMPARED_ROWS: Final = 4096
"""Rows of two matrices that are in memory while they are compared."""


def read_parameter(
    weights: SafetensorsFolder,
    config: PretrainedConfig,
    name: str,
    shape: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    part: LayerPart | None = None,
) -> Tensor:
    """The parameter `name` of the whole model, copied from the folder; `part`: a part of it, which has this shape.

    Raises:
        UserError: a tensor of it is missing, or has another shape.
    """
    parameter = torch.empty(tuple(shape), dtype=dtype, device=device)
    if part is not None:
        return _read_part(weights, name, parameter, part)
    stored = stored_tensors(name, shape, family(config).experts, weights)
    for each in stored:
        _check_shape(weights, each.name, each.view(parameter).shape)
    if len(shape) == 3 and stored[0].name in weights.quantised and len(stored) == 1:
        # In float32 all experts of a layer at once would take more memory than the rest of a stage.
        step = max(1, _DECODED_NUMBERS // (shape[1] * shape[2]))
        for first in range(0, shape[0], step):
            experts = slice(first, min(first + step, shape[0]))
            parameter[experts].copy_(weights.rows(stored[0].name, [(experts.start, experts.stop)]))
        return parameter
    for each, tensor in zip(stored, weights.tensors([each.name for each in stored]), strict=True):
        each.view(parameter).copy_(tensor)
    return parameter


def _read_part(weights: SafetensorsFolder, name: str, parameter: Tensor, part: LayerPart) -> Tensor:
    """Fills `parameter`, rows or columns of a matrix, with some rows in memory at a time."""
    of_rows = part.axis == 0
    rows, width = weights.shape(name)
    length = part.stop - part.start
    if part.stop > weights.shape(name)[part.axis] or parameter.shape != (
        (length, width) if of_rows else (rows, length)
    ):
        raise UserError(
            f"{name} in {weights.folder} is {[rows, width]}, but its config.json says otherwise; the folder mixes two "
            "models, or its config.json was edited"
        )
    step = max(1, _DECODED_NUMBERS // width)
    first, last = (part.start, part.stop) if of_rows else (0, rows)
    for start in range(first, last, step):
        block = weights.rows(name, [(start, min(start + step, last))])
        block = block if of_rows else block[:, part.start : part.stop]
        parameter[start - first : start - first + len(block)].copy_(block)
    return parameter


def stored_shapes(config: PretrainedConfig, held: Container[str] = ()) -> dict[str, Size]:
    """Name -> shape of each tensor of a checkpoint of this config, with a tensor for each expert.

    `held`: see `stored_tensors`.
    """
    with torch.device("meta"):
        return {
            tensor.name: tensor.view(torch.empty(shape)).shape
            for name, shape in stored_parts(config).items()
            for tensor in stored_tensors(name, shape, family(config).experts, held)
        }


def check_weights(folder: Path, config: PretrainedConfig) -> None:
    """Checks that the folder has the tensors of the model and no others, in their shapes, as floats, in whole files.

    Only headers are read: cheap enough for every rank, before any of them allocates a model. Of a tied model whose
    folder has a head nevertheless, that head and the embedding are read: they must be equal. So are biases of GPTQ that
    the model does not have: they must be zero.

    Raises:
        UserError: naming the first that is not.
    """
    weights = SafetensorsFolder(folder)
    if weights.quantisation is not None and not weights.quantised:
        raise UserError(
            f"{folder}: config.json has a quantization_config, but no tensor is quantised: remove the key if the "
            "weights were dequantised, else download the folder again"
        )
    expected = stored_shapes(config, weights)
    for name, shape in expected.items():
        if name not in weights:
            raise _missing(weights, name)
        _check_shape(weights, name, shape)
        weights.dtype(name)
    unread = [_RECOMPUTED, *map(re.compile, _ignored_by_transformers(config))]
    extra = [name for name in weights.names if name not in expected and not any(each.search(name) for each in unread)]
    extra = [name for name in extra if not _is_zero_bias(weights, name)]
    if HEAD in extra and config.tie_word_embeddings:
        _check_tied_head(weights)
        extra.remove(HEAD)
    if extra:
        raise _unexpected(weights, extra, config)
    weights.check_files()


def _ignored_by_transformers(config: PretrainedConfig) -> Sequence[str]:
    """Expressions of tensors that transformers' model leaves out.

    They are layers that predict tokens after the next one, and keys and values of layers that take another one's.
    """
    further = sorted(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._keys_to_ignore_on_load_unexpected or ())
    sharing = range(first_sharing_layer(config), config.num_hidden_layers)
    return [*further, *(rf"\.layers\.{layer}\.self_attn\.[kv]_(proj|norm)\." for layer in sharing)]


def _is_zero_bias(weights: SafetensorsFolder, name: str) -> bool:
    """Whether a tensor is a bias of zeros: AutoGPTQ stored one beside each weight, of models without biases as well."""
    gptq = weights.quantisation is not None and weights.quantisation.format == "gptq"
    if not gptq or not name.endswith(".bias") or f"{name.removesuffix('bias')}weight" not in weights.quantised:
        return False
    weights.dtype(name)
    return not bool(next(weights.tensors([name])).any())


def _missing(weights: SafetensorsFolder, name: str) -> UserError:
    if name == HEAD and EMBEDDING in weights:
        return UserError(
            f"{weights.folder} has no {HEAD}, and its config.json does not say that the embedding is the head as well: "
            "if it is, write tie_word_embeddings: true there; else the download is not complete"
        )
    other = [each for each in weights.names if each.endswith(f".{name}") or name.endswith(f".{each}")]
    if other:
        return UserError(
            f"{weights.folder} has {printable(other[0][:_MAX_NAME])!r} where a causal model has {name!r}: it was saved "
            f"as part of another model, or without its head; {_rewritten(weights.folder)}"
        )
    return weights.missing(name)


def _unexpected(weights: SafetensorsFolder, extra: Sequence[str], config: PretrainedConfig) -> UserError:
    names = printable(", ".join(name[:_MAX_NAME] for name in extra[:3])) + (
        f" and {len(extra) - 3:,} more" if len(extra) > 3 else ""
    )
    return UserError(
        f"{weights.folder} has tensors that a {config.model_type} model of its config.json does not have: {names}. If "
        "config.json was edited or is another model's, take the one that came with these weights; if the tensors are "
        f"not needed, {_rewritten(weights.folder)}"
    )


def _rewritten(folder: Path) -> str:
    """How transformers writes a folder again with the tensors that it reads."""
    source, target = shlex.quote(printable(str(folder))), shlex.quote(printable(f"{folder}-rewritten"))
    script = (
        "import sys, transformers as t; "
        "t.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])"
    )
    return f"write the folder again, where you trust it: `python -c {shlex.quote(script)} {source} {target}`"


def _check_tied_head(weights: SafetensorsFolder) -> None:
    """A head of its own is no other model where it equals the embedding; transformers would not tie it where not."""
    rows = weights.shape(EMBEDDING)[0]
    equal = weights.shape(HEAD) == weights.shape(EMBEDDING)
    weights.dtype(HEAD)
    for start in range(0, rows if equal else 0, _COMPARED_ROWS):
        ranges = [(start, min(start + _COMPARED_ROWS, rows))]
        head, embedding = (weights.rows(name, ranges).double() for name in (HEAD, EMBEDDING))
        equal = equal and torch.equal(head, embedding)
    if not equal:
        raise UserError(
            f"{weights.folder}: its config.json says tie_word_embeddings: true, but {HEAD} is there too and differs "
            f"from {EMBEDDING}: write tie_word_embeddings: false there if the head was trained, else remove {HEAD}"
        )


def _check_shape(weights: SafetensorsFolder, name: str, expected: Size) -> None:
    shape = weights.shape(name)
    if shape != expected:
        raise UserError(
            f"{name} in {weights.folder} is {list(shape)}, but its config.json says {list(expected)}; "
            "the folder mixes two models, or its config.json was edited"
        )


def load_pretrained(
    folder: Path,
    *,
    what: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    documents: bool | None = None,
) -> PreTrainedModel:
    """A whole frozen model from its folder, for evaluation: in `dtype`, or else the type that its config names.

    Without either, in the widest of the stored types. Parameters that stay on the CPU in their stored type are views of
    the mapped files, as in transformers: the system reads and drops their pages as they are used.

    `documents`: whether attention is limited to documents, of a model that is called with `forward_inputs` alone: its
    attention is what `auto` chooses. None: it is called as transformers', with a cache.

    Raises:
        UserError: the folder holds no model of a supported family, or its weights cannot be read.
    """
    config = load_config(folder, what=what)
    if documents:
        refuse_documents(config, what, "best-fit packing", "take data that are packed by chunk")
    check_weights(folder, config)
    weights = SafetensorsFolder(folder)
    attention = None
    if documents is not None:
        precision = "bfloat16" if (dtype or config.dtype) in (torch.bfloat16, torch.float16) else "float32"
        accelerator = device.type != "cpu"
        chosen = choose_attention("auto", config, accelerator=accelerator, precision=precision, documents=documents)
        attention = chosen.value
    model = build_on_meta(config, attention=attention)
    buffers = stored_buffers(model)
    shapes = {name: tensor.shape for name, tensor in [*model.named_parameters(), *buffers.items()]}
    stored = {name: stored_tensors(name, shape, family(config).experts, weights) for name, shape in shapes.items()}
    if dtype is None:
        narrow = [parts for name, parts in stored.items() if tensor_type(config, name, torch.bfloat16).itemsize == 2]
        types = (weights.dtype(each.name) for parts in narrow for each in parts)
        dtype = config.dtype or functools.reduce(torch.promote_types, types)
    config.dtype = model.config.dtype = dtype
    # Experts that are stored in one quantised tensor are decoded some at a time.
    stacked = {
        name
        for name, parts in stored.items()
        if len(shapes[name]) == 3 and len(parts) == 1 and parts[0].name in weights.quantised
    }
    tensors = weights.tensors([each.name for name, parts in stored.items() if name not in stacked for each in parts])
    for name, parts in stored.items():
        own_type = tensor_type(config, name, dtype)
        if name in stacked:
            tensor = read_parameter(weights, config, name, shapes[name], dtype=own_type, device=device)
        elif len(parts) == 1:
            tensor = next(tensors).to(device, own_type)
        else:
            tensor = torch.empty(shapes[name], dtype=own_type, device=device)
            for each in parts:
                each.view(tensor).copy_(next(tensors))
        module, _, leaf = name.rpartition(".")
        part = tensor if name in buffers else nn.Parameter(tensor, requires_grad=False)
        setattr(model.get_submodule(module), leaf, part)
    model.tie_weights()
    rebuild_buffers(model)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"still on meta: {left}"
    return model.eval()
