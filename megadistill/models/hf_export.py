"""Export of a model to a Hugging Face folder, with one shard in memory at a time."""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from megadistill import __version__
from megadistill.errors import UserError
from megadistill.models.configs.unequal_layers import layer_config
from megadistill.models.experts import stored_tensors
from megadistill.models.families import EMBEDDING, HEAD, constant_buffers, family, parameter_shapes
from megadistill.models.hf_folder import INDEX_FILE
from megadistill.models.module_names import stored_name
from megadistill.outputs import naming

GENERATION_FILE = "generation_config.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json and generation_config.json that are ids of the tokenizer."""


@dataclass(frozen=True)
class ExportedTokenizer:
    """The tokenizer of an exported folder."""

    files: Mapping[str, Path]
    """Its files, by their paths in the exported folder."""
    generation: Mapping[str, Any]
    """Content of generation_config.json, with SPECIAL_IDS, which config.json gets, too."""


ROTARY_PCT = ("cohere2", "gpt_neox")
"""Families whose published configs say it as `rotary_pct`."""

NamedReader = tuple[str, Sequence[int], Callable[[], Tensor]]
"""A parameter's name, its shape with padding, and a function that reads it."""


def export_model(
    folder: Path,
    *,
    config: PretrainedConfig,
    tensors: Iterable[NamedReader],
    dtype: torch.dtype,
    true_vocab: int,
    max_shard_bytes: int,
    tokenizer: ExportedTokenizer | None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes the model where `AutoModelForCausalLM.from_pretrained(folder)` finds it: whole, or not at all.

    Each reader is called once, when its shard is written; a shard (`max_shard_bytes`, or one larger parameter) is
    held in memory, and one parameter more. Fused experts are written one by one, as their family's checkpoints are.
    The rows of embedding and head from `true_vocab` on are padding and are not written, nor is a tied head.
    `texts`: further files by name; README.md is a short model card unless it is among them.

    Raises:
        UserError: the folder exists, the tensors are not those of the config, or a tokenizer has no files.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it, or export to another folder")
    config = exported_config(config, dtype=dtype, true_vocab=true_vocab, tokenizer=tokenizer)
    shapes = parameter_shapes(config)
    readers = {name: read for name, _, read in _checked(tensors, shapes, tied=config.tie_word_embeddings)}
    for name, buffer in constant_buffers(config).items():
        readers[name], shapes[name] = partial(torch.clone, buffer), buffer.shape
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed, so that a reader never meets half a model.
    with naming(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        staging = Path(beside) / folder.name
        staging.mkdir()
        config.save_pretrained(staging)
        _write_shards(staging, config, readers, shapes, dtype=dtype, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            _write_tokenizer(tokenizer, staging)
        for name, text in {"README.md": _model_card(folder.name, config, shapes), **(texts or {})}.items():
            (staging / name).write_text(text, encoding="utf-8")
        staging.rename(folder)


def exported_config(
    config: PretrainedConfig, *, dtype: torch.dtype, true_vocab: int, tokenizer: ExportedTokenizer | None
) -> PretrainedConfig:
    """The config of the folder that `export_model` writes.

    Its special ids are those of the tokenizer; those of `config` belong to the tokenizer of the model that it was
    written for, or are its family's defaults. A padding id without a row, which torch refuses, is left out.
    """
    config = copy.deepcopy(config)
    for name in SPECIAL_IDS if tokenizer is not None else ():
        setattr(config, name, tokenizer.generation.get(name))  # type: ignore[union-attr]
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < true_vocab:
        config.pad_token_id = None
    config.vocab_size = true_vocab
    config.dtype = dtype
    config.use_cache = True
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    _name_turned_part(config)
    _name_wider_heads(config)
    return config


def _name_turned_part(config: PretrainedConfig) -> None:
    """Gives the part of a head that rotary embeddings turn its published name, beside `rope_parameters`.

    transformers 5 writes it there alone; llama.cpp's converter, and versions of others that are older than it, look for
    the key of the published configs.
    """
    factor = (config.rope_parameters or {}).get("partial_rotary_factor")
    if config.model_type in ROTARY_PCT:
        config.rotary_pct = 1.0 if factor is None else factor
    elif factor is not None:
        config.partial_rotary_factor = factor


def _name_wider_heads(config: PretrainedConfig) -> None:
    """Gives the sizes of Gemma 4's heads of full attention their published names, beside `per_layer_config`.

    transformers 5 writes them there alone, where other programs do not look.
    """
    if config.model_type == "gemma4_text" and "full_attention" in config.layer_types:
        full = layer_config(config, config.layer_types.index("full_attention"))
        config.global_head_dim = full.head_dim
        config.num_global_key_value_heads = full.num_key_value_heads


def _checked(tensors: Iterable[NamedReader], shapes: dict[str, torch.Size], *, tied: bool) -> list[NamedReader]:
    """The tensors to write. A missing one would be random numbers in `from_pretrained`, with no more than a warning."""
    given = [tensor for tensor in tensors if not (tied and tensor[0] == HEAD)]
    names = [name for name, _, _ in given]
    if sorted(names) != sorted(shapes):
        odd = sorted(set(names) ^ set(shapes)) or names
        raise UserError(
            f"the tensors to export are not those of the config; missing, unknown or twice: {', '.join(odd[:5])}"
        )
    for name, shape, _ in given:
        rows = shapes[name][0]
        enough = shape[0] >= rows if name in (EMBEDDING, HEAD) else shape[0] == rows
        if not enough or tuple(shape[1:]) != tuple(shapes[name][1:]):
            raise UserError(
                f"{name} is {list(shape)}, but the config says {list(shapes[name])}; export with its own config"
            )
    return given


def _write_shards(
    folder: Path,
    config: PretrainedConfig,
    readers: dict[str, Callable[[], Tensor]],
    shapes: dict[str, torch.Size],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    split: StateDictSplit = split_state_dict_into_shards_factory(
        {name: shapes[name].numel() * dtype.itemsize for name in readers},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    weight_map: dict[str, str] = {}
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            tensor = readers[name]()
            rows = tensor[: shapes[name][0]] if shapes[name] else tensor
            shard |= _stored(config, name, rows.to("cpu", dtype))
        weight_map |= dict.fromkeys(shard, file)
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes files that nobody else can read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _stored(config: PretrainedConfig, name: str, parameter: Tensor) -> dict[str, Tensor]:
    """Checkpoint name -> tensor. Experts are copied, as safetensors refuses views of one storage."""
    stored = stored_tensors(name, parameter.shape, family(config).experts)
    if len(stored) == 1:
        return {stored_name(stored[0].name, config.model_type): stored[0].view(parameter).contiguous()}
    return {each.name: each.view(parameter).clone(memory_format=torch.contiguous_format) for each in stored}


def _write_tokenizer(tokenizer: ExportedTokenizer, target: Path) -> None:
    if not tokenizer.files:
        raise UserError("the tokenizer to export has no files")
    for name, source in tokenizer.files.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target / name)
    (target / GENERATION_FILE).write_text(json.dumps(dict(tokenizer.generation), indent=2) + "\n", encoding="utf-8")


def _model_card(name: str, config: PretrainedConfig, shapes: dict[str, torch.Size]) -> str:
    parameters = sum(shape.numel() for shape in shapes.values())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {config.architectures[0]} of {parameters:,} parameters with a vocabulary of {config.vocab_size:,} ids, exported by
megadistill {__version__}.
"""
