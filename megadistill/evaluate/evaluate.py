"""Models on held-out splits, over the ranks of a launch; each holds each model whole. It trains nothing."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megadistill.distributed.topology import Launch, Topology, joined, local_device, topology_of_world
from megadistill.errors import OperatorFault, UserError
from megadistill.evaluate.accumulator import COLUMNS, Deciles, Floats, Tally, Totals, deciles
from megadistill.evaluate.evaluation import CalibrationBin, Decile, Evaluation, SourceResult
from megadistill.evaluate.models import check_model, token_numbers
from megadistill.evaluate.splits import Split, batches, share, short_names
from megadistill.models.weights import load_pretrained
from megadistill.progress import ShowProgress
from megadistill.types import TokenBatch

TIMEOUT_MINUTES = 60.0
"""How much later than the first rank the last one may be done with its share."""


@contextmanager
def ranks(launch: Launch) -> Iterator[Topology]:
    """Those that share an evaluation. One process makes no groups."""
    if launch.world == 1:
        yield topology_of_world(launch, vocab_group=1, device=local_device(launch.local_rank), timeout=timedelta(0))
    else:
        with joined(launch, vocab_group=1, timeout_minutes=TIMEOUT_MINUTES) as topology:
            yield topology


def evaluate(
    models: Sequence[Path],
    splits: Sequence[Split],
    *,
    teacher: Path | None,
    batch: int,
    topology: Topology,
    progress: ShowProgress,
) -> list[Evaluation]:
    """Every model of `models`, and the teacher first, on every sequence of the splits. Collective: all ranks get it.

    The teacher runs once a batch, however many models are compared with it. `batch` sequences are read at a time.

    Raises:
        UserError: a folder is no model of a supported family, or it does not go with the splits.
        OperatorFault: a model's numbers are not finite.
    """
    if batch < 1:
        raise UserError(f"--batch {batch}: a forward pass needs at least one sequence")
    folders = [
        *([teacher] if teacher else []),
        *(m for m in models if teacher is None or m.resolve() != teacher.resolve()),
    ]
    for folder in folders:
        for split in splits:
            check_model(folder, split.manifest)
    loaded = [load_pretrained(folder, what=str(folder), device=topology.device) for folder in folders]
    tallies = [Tally(len(splits)) for _ in loaded]
    entropies: list[Tensor] = []
    vocab_size = splits[0].manifest.vocab_size
    for source, held in _own_batches(splits, batch, topology, progress):
        found = token_numbers(loaded, held, vocab_size, first_teaches=teacher is not None)
        for tally, terms in zip(tallies, found, strict=True):
            tally.add(terms, source)
        if teacher:
            entropies.append(found[0].entropy)
    tenths = deciles(entropies, topology) if teacher else None
    totals = [tally.totals(tenths.of_token_N if tenths else None, topology) for tally in tallies]
    names = short_names([folder.resolve().parts for folder in folders])
    for name, total in zip(names, totals, strict=True):
        if not np.isfinite(total.by_source_KC).all():
            raise OperatorFault(f"{name}: its cross-entropy, KL or agreement is not finite: look at its weights")
    return [
        _evaluation(name, _parameters(model), total, tenths, splits)
        for name, model, total in zip(names, loaded, totals, strict=True)
    ]


def _own_batches(
    splits: Sequence[Split], size: int, topology: Topology, progress: ShowProgress
) -> Iterator[tuple[int, TokenBatch]]:
    """This rank's share of the sequences, with the number of their split. The first rank tells of its own."""
    own = share(batches(splits, size), topology.rank, topology.world)
    streams = [split.stream() for split in splits]
    lengths = [split.manifest.sequence_length for split in splits]
    total = sum(len(batch.slots) * lengths[batch.split] for batch in own)
    tokens = 0
    for batch in own:
        if topology.is_first:
            progress("evaluate", done=tokens, total=total)
        yield batch.split, streams[batch.split].batch(batch.slots).to(topology.device)
        tokens += len(batch.slots) * lengths[batch.split]
    if topology.is_first:
        progress("evaluate", done=tokens, total=total)


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _evaluation(
    name: str, parameters: int, total: Totals, tenths: Deciles | None, splits: Sequence[Split]
) -> Evaluation:
    taught = tenths is not None
    by_source = tuple(
        SourceResult(source=split.name, **_means(sums_C, bins_B3, [split], [sums_C[0]], taught=taught))
        for split, sums_C, bins_B3 in zip(splits, total.by_source_KC, total.by_bin_KB3, strict=True)
    )
    sums_C, bins_B3 = total.by_source_KC.sum(axis=0), total.by_bin_KB3.sum(axis=0)
    return Evaluation(
        model=name,
        parameters=parameters,
        **_means(sums_C, bins_B3, splits, total.by_source_KC[:, 0].tolist(), taught=taught),
        calibration=tuple(_bin(*bin_3.tolist()) for bin_3 in bins_B3),
        by_decile=tuple(
            _decile(bounds, *sums_4.tolist()) for bounds, sums_4 in zip(tenths.bounds, total.by_decile_D4, strict=True)
        )
        if tenths
        else None,
        by_source=by_source,
    )


def _means(
    sums_C: Floats, bins_B3: Floats, splits: Sequence[Split], tokens: Sequence[float], *, taught: bool
) -> dict[str, Any]:
    """What `Evaluation` and `SourceResult` share; `tokens` is how many there were in each of the splits."""
    count = sums_C[0]
    means = dict(zip(COLUMNS[1:], (sums_C[1:] / count).tolist(), strict=True))
    bytes_ = _text_bytes(splits, tokens)
    return {
        "tokens": int(count),
        "cross_entropy": means["cross_entropy"],
        "perplexity": math.exp(means["cross_entropy"]),
        "bits_per_byte": None if bytes_ is None else float(sums_C[1] / math.log(2) / bytes_),
        "calibration_error": float(np.abs(bins_B3[:, 1] - bins_B3[:, 2]).sum() / count),
        **{name: means[name] if taught else None for name in COLUMNS[2:]},
    }


def _text_bytes(splits: Sequence[Split], tokens: Sequence[float]) -> float | None:
    """Bytes of the text of so many tokens of each split, as its manifest counts them."""
    bytes_ = 0.0
    for split, count in zip(splits, tokens, strict=True):
        if split.manifest.text_bytes is None:
            return None
        bytes_ += split.manifest.text_bytes * count / split.manifest.tokens
    return bytes_


def _bin(count: float, confidence: float, correct: float) -> CalibrationBin:
    if count == 0:
        return CalibrationBin(0, None, None)
    return CalibrationBin(int(count), confidence / count, correct / count)


def _decile(
    bounds: tuple[float, float] | None, tokens: float, cross_entropy: float, kl: float, agreement: float
) -> Decile:
    if tokens == 0:
        return Decile(None, 0, None, None, None)
    return Decile(bounds, int(tokens), cross_entropy / tokens, kl / tokens, agreement / tokens)
