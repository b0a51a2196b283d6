"""Conversion of a GGUF file to a Hugging Face folder, once before a run (see `recipes/smollm2.yaml`)."""

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from megadistill.errors import UserError
from megadistill.io import open_regular
from megadistill.models.families import FAMILIES
from megadistill.models.hf_export import SPECIAL_IDS, ExportedTokenizer, export_model

READERS = ("gguf", "accelerate")
"""Packages with which transformers reads a GGUF file."""

MAX_SHARD_BYTES = 2 << 30


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes the model in `file`, its weights turned back into float32, and its tokenizer to the new `folder`.

    The whole model is in memory meanwhile.

    Raises:
        UserError: a package is missing, the file is no GGUF of a supported family, or the folder exists.
    """
    if missing := [name for name in READERS if find_spec(name) is None]:
        raise UserError(f"{file}: reading GGUF takes {' and '.join(missing)}: pip install 'megadistill[gguf]'")
    if folder.exists():  # before reading, which takes a minute
        raise UserError(f"{folder} exists already; remove it, or convert to another folder")
    with TemporaryDirectory() as alone:  # transformers would read a config, an adapter and more beside the file
        linked = Path(alone) / "model.gguf"
        linked.symlink_to(file.resolve())
        _convert(linked, _read(file, linked), folder)


def _convert(file: Path, model: PreTrainedModel, folder: Path) -> None:
    config = model.config
    del config.quantization_config  # the weights are plain floats now
    tensors = [(name, tensor.shape, lambda tensor=tensor: tensor.detach()) for name, tensor in model.named_parameters()]
    with TemporaryDirectory() as beside:
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
        tokenizer.save_pretrained(beside)
        generation = {name: _row(getattr(tokenizer, name), config.vocab_size) for name in SPECIAL_IDS}
        export_model(
            folder,
            config=config,
            tensors=tensors,
            dtype=torch.float32,
            true_vocab=config.vocab_size,
            max_shard_bytes=MAX_SHARD_BYTES,
            tokenizer=ExportedTokenizer({path.name: path for path in Path(beside).iterdir()}, generation),
        )


def _row(id: int | None, rows: int) -> int | None:
    """The id, where a model of so many `rows` has one for it."""
    return id if id is not None and id < rows else None


def _read(file: Path, linked: Path) -> PreTrainedModel:
    """The model in `file`, to which `linked`, alone in its folder, is a link."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; name a GGUF file")
    with open_regular(file) as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        raise UserError(f"{file} is not a GGUF file: it does not begin with GGUF")
    disable_progress_bar()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        linked.parent, gguf_file=linked.name, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    if model.config.model_type not in FAMILIES:
        raise UserError(f"{file}: model_type is {model.config.model_type!r}; supported are {', '.join(FAMILIES)}")
    return model
