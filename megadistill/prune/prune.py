"""Structured pruning of a teacher by activation importance, for a student to start from.

One process, one device that holds the whole teacher; the files are read parameter by parameter.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.table import Table

from megadistill import __version__
from megadistill.data import Mixture, TokenStream, missing_bos
from megadistill.data.tokenizers.folder_files import files_in
from megadistill.data.tokenizers.special_ids import generation_settings
from megadistill.errors import UserError
from megadistill.models.families import EMBEDDING, load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.flops import parameter_counts
from megadistill.models.hf_export import ExportedTokenizer, export_model
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.models.weights import check_weights, load_pretrained
from megadistill.progress import ShowProgress
from megadistill.prune.cut import pruned_tensors
from megadistill.prune.importance import Importance, choose, measure_importance
from megadistill.prune.sizes import Sizes, pruned_config, pruned_sizes, sizes_of
from megadistill.teacher.tokenizer_check import require_same_ids
from megadistill.types import TokenBatch
from megadistill.units import spell

logger = logging.getLogger(__name__)

RECORD_FILE: Final = "pruning.json"
MAX_SHARD_BYTES: Final = 4096 * 1_000_000


@dataclass(frozen=True)
class PruneReport:
    """Summary of a pruning."""

    output: Path
    before: Sizes
    after: Sizes
    parameters_before: int
    parameters_after: int
    layers: list[int]
    """Indices of the layers that stay."""
    sequences: int
    tokens: int
    seconds: float

    def table(self) -> Table:
        """The sizes before and after."""
        table = Table()
        for heading in ("", "teacher", "pruned"):
            table.add_column(heading, justify="right" if heading else "left")
        table.add_row("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}")
        for name, before in asdict(self.before).items():
            table.add_row(name.replace("_", " "), f"{before:,}", f"{asdict(self.after)[name]:,}")
        return table

    def line(self) -> str:
        """One line: the output, the removed layers, and the tokens that decided."""
        dropped = [str(layer) for layer in range(self.before.layers) if layer not in self.layers]
        without = f" without layers {', '.join(dropped)} (counted from 0)" if dropped else ""
        return (
            f"{self.output}: the teacher{without}, pruned by {self.tokens:,} tokens of {self.sequences:,} sequences "
            f"in {spell(self.seconds)}"
        )


def prune(
    teacher: Path,
    data: Mixture,
    output: Path,
    *,
    sequences: int,
    batch: int,
    device: torch.device,
    progress: ShowProgress,
    **given: int | None,
) -> PruneReport:
    """Writes the pruned teacher to `output`, a Hugging Face folder with the tokenizer and a record of the pruning.

    `given` are the sizes to prune to, by the fields of `Sizes`; None, and those that are not given, stay.
    The first `sequences` of the data's order under seed 1 decide which parts stay, `batch` at a time. The padding
    rows of the teacher's vocabulary are not written. On a CPU the teacher computes in float32.

    Raises:
        UserError: a size, the teacher, the data or the output is refused; one line, before the teacher is loaded.
        ShardFault: a sequence cannot be read. OperatorFault: an activation is not finite.
    """
    began = time.perf_counter()
    if output.exists():
        raise UserError(f"--output {output} exists already: remove it, or give another folder")
    for name, count in (("--sequences", sequences), ("--batch", batch)):
        if count < 1:
            raise UserError(f"{name} {count}: give at least 1")
    config = load_config(teacher, what=f"teacher {teacher}")
    sizes = pruned_sizes(config, **given)
    _check_data(teacher, config, data)
    # Best-fit packing puts whole documents together by chance: each of them is read by itself.
    masked = any(manifest.packer.name == "bestfit" for manifest in data.sources.values())
    stream = TokenStream(data, seed=1, batch_slots=1, rank=0, world_size=1, document_mask=masked)
    importance = _measure(
        teacher, data, stream, slots=sequences, batch=batch, device=device, documents=masked, progress=progress
    )
    choice = choose(importance, config, sizes)
    small = pruned_config(config, sizes, layers=choice.layers)
    record = {
        "megadistill": __version__,
        "teacher": {"name": teacher.resolve().name, "fingerprint": teacher_fingerprint(teacher)},
        "calibration": {
            "order": stream.fingerprint,
            **({"insert_bos": True} if data.insert_bos else {}),
            "tokenizer": data.tokenizer.sha256,
            "sequences": importance.sequences,
            "tokens": importance.tokens,
        },
        "teacher_sizes": asdict(sizes_of(config)),
        "sizes": asdict(sizes),
        "block_importance": importance.layers.tolist(),
        "kept": asdict(choice),
    }
    weights = SafetensorsFolder(teacher)
    rows = data.for_models(config.vocab_size).vocab_size
    export_model(
        output,
        config=small,
        tensors=pruned_tensors(weights, config, small, choice, importance.shares),
        dtype=weights.dtype(EMBEDDING),
        true_vocab=rows,
        max_shard_bytes=MAX_SHARD_BYTES,
        tokenizer=ExportedTokenizer(files_in(teacher), generation_settings(teacher, rows=rows)),
        texts={RECORD_FILE: json.dumps(record) + "\n"},
    )
    return PruneReport(
        output=output,
        before=sizes_of(config),
        after=sizes,
        parameters_before=parameter_counts(config).total,
        parameters_after=parameter_counts(load_config(output, what=str(output))).total,
        layers=choice.layers,
        sequences=importance.sequences,
        tokens=importance.tokens,
        seconds=time.perf_counter() - began,
    )


def _check_data(teacher: Path, config: Any, data: Mixture) -> None:
    require_same_ids(teacher, config, data)
    if problem := missing_bos(teacher, data, key="--insert-bos"):
        logger.warning("--data: %s", problem)
    if data.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"the teacher in {teacher} reads {config.max_position_embeddings} positions, the sequences of the data "
            f"have {data.sequence_length} tokens: tokenize with --sequence-length {config.max_position_embeddings}"
        )
    check_weights(teacher, config)


def _measure(
    teacher: Path,
    data: Mixture,
    stream: TokenStream,
    *,
    slots: int,
    batch: int,
    device: torch.device,
    documents: bool,
    progress: ShowProgress,
) -> Importance:
    dtype = torch.float32 if device.type == "cpu" else None  # products in bfloat16 are many times slower there
    model = load_pretrained(teacher, what=str(teacher), device=device, dtype=dtype, documents=documents)
    total = slots * data.sequence_length

    def batches() -> Iterator[TokenBatch]:
        progress("calibrate", done=0, total=total)
        for start in range(0, slots, batch):
            stop = min(start + batch, slots)
            yield stream.batch(range(start, stop))
            progress("calibrate", done=stop * data.sequence_length, total=total)

    return measure_importance(model, batches())
