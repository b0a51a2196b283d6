"""Evaluation of models on held-out splits, data-parallel: each rank of a launch holds each model whole."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megadistill.data import missing_bos
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology, local_device, process_groups, topology_of_world
from megadistill.errors import OperatorFault, UserError
from megadistill.evaluate.evaluation import CalibrationBin, Decile, Evaluation, SourceResult
from megadistill.evaluate.models import batch_terms, check_model
from megadistill.heldout.accumulator import Accumulator, Deciles, Totals, entropy_deciles
from megadistill.heldout.measures import measures_of
from megadistill.heldout.splits import Split, own_batches, short_names
from megadistill.models.families import load_config, refuse_documents
from megadistill.models.weights import load_pretrained
from megadistill.progress import ShowProgress
from megadistill.types import TokenBatch

logger = logging.getLogger(__name__)

TIMEOUT_MINUTES = 60.0
"""Timeout of the collectives: the last rank may finish its share this much later than the first."""


@contextmanager
def ranks(launch: Launch) -> Iterator[Topology]:
    """The topology of the ranks that share an evaluation. One process makes no groups."""
    if launch.world == 1:
        yield topology_of_world(launch, vocab_group=1, device=local_device(launch.local_rank), timeout=timedelta(0))
    else:
        with process_groups(launch, vocab_group=1, timeout_minutes=TIMEOUT_MINUTES) as topology:
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
    """Results of the teacher, first, and of every model on all sequences of the splits. Collective.

    The teacher runs once a batch, however many models are compared with it. `batch`: sequences of a forward pass.

    Raises:
        UserError: a folder is no model of a supported family, or it does not fit the splits.
        OperatorFault: a model's results are not finite.
    """
    if batch < 1:
        raise UserError(f"--batch {batch}: a forward pass needs at least one sequence")
    folders = [
        *([teacher] if teacher else []),
        *(m for m in models if teacher is None or m.resolve() != teacher.resolve()),
    ]
    documents = any(split.documents for split in splits)
    for folder in folders:
        for split in splits:
            check_model(folder, split.manifest)
        if documents:  # before any model is read
            refuse_documents(
                load_config(folder, what=str(folder)),
                str(folder),
                "best-fit packing",
                "take data that are packed by chunk",
                sequence_length=max(split.manifest.sequence_length for split in splits if split.documents),
            )
    if topology.is_first:
        warn_of_missing_bos(folders, splits)
    place: dict[str, Any] = {"device": topology.device, "documents": documents}
    loaded = [load_pretrained(folder, what=str(folder), **place) for folder in folders]
    accumulators = [Accumulator(len(splits)) for _ in loaded]
    entropies: list[Tensor] = []
    vocab_size = min(splits[0].manifest.vocab_size, *(model.config.vocab_size for model in loaded))
    for source, tokens in _read(splits, batch, topology, progress):
        terms_by_model = batch_terms(loaded, tokens, vocab_size, first_is_teacher=teacher is not None)
        for accumulator, terms in zip(accumulators, terms_by_model, strict=True):
            accumulator.add(terms, source)
        if teacher:
            entropies.append(terms_by_model[0].entropy)
    deciles = entropy_deciles(entropies, topology) if teacher else None
    totals = [accumulator.totals(deciles.decile_N if deciles else None, topology) for accumulator in accumulators]
    names = short_names([folder.resolve().parts for folder in folders])
    for name, total in zip(names, totals, strict=True):
        if not np.isfinite(total.by_source_KC).all():
            raise OperatorFault(f"{name}: its cross-entropy, KL or agreement is not finite: look at its weights")
    return [
        _evaluation(name, sum(parameter.numel() for parameter in model.parameters()), total, deciles, splits)
        for name, model, total in zip(names, loaded, totals, strict=True)
    ]


def warn_of_missing_bos(folders: Sequence[Path], splits: Sequence[Split]) -> None:
    """Logs a line for each split whose sequences do not begin with the BOS of a model's tokenizer."""
    for split in splits:
        problems = (missing_bos(folder, split.data, key="--insert-bos") for folder in folders)
        if problem := next(filter(None, problems), None):
            logger.warning("--data %s: %s", split.name, problem)


def _read(
    splits: Sequence[Split], size: int, topology: Topology, progress: ShowProgress
) -> Iterator[tuple[int, TokenBatch]]:
    """This rank's batches, each with the number of its split. The first rank shows the progress of its own."""
    own = own_batches(splits, size, rank=topology.rank, world=topology.world)
    streams = [split.stream() for split in splits]
    tokens = list(
        accumulate((len(slots) * splits[number].manifest.sequence_length for number, slots in own), initial=0)
    )
    for done, (number, slots) in zip(tokens, own, strict=False):
        if topology.is_first:
            progress("evaluate", done=done, total=tokens[-1])
        yield number, streams[number].batch(slots).to(topology.device)
    if topology.is_first:
        progress("evaluate", done=tokens[-1], total=tokens[-1])


def _evaluation(
    name: str, parameters: int, total: Totals, deciles: Deciles | None, splits: Sequence[Split]
) -> Evaluation:
    with_teacher = deciles is not None
    sums_C, bins_B3 = total.by_source_KC.sum(axis=0), total.by_bin_KB3.sum(axis=0)
    return Evaluation(
        model=name,
        parameters=parameters,
        **measures_of(sums_C, bins_B3, splits, total.by_source_KC[:, 0].tolist(), with_teacher=with_teacher),
        calibration=tuple(
            CalibrationBin(int(count), confidence / count, correct / count) if count else CalibrationBin(0, None, None)
            for count, confidence, correct in bins_B3.tolist()
        ),
        by_decile=tuple(map(_decile, deciles.bounds, total.by_decile_D4.tolist())) if deciles else None,
        by_source=tuple(
            SourceResult(
                source=split.name, **measures_of(sums_C, bins_B3, [split], [sums_C[0]], with_teacher=with_teacher)
            )
            for split, sums_C, bins_B3 in zip(splits, total.by_source_KC, total.by_bin_KB3, strict=True)
        ),
    )


def _decile(bounds: tuple[float, float] | None, sums_4: list[float]) -> Decile:
    tokens, *sums_3 = sums_4
    return Decile(bounds, int(tokens), *(value / tokens if tokens else None for value in sums_3))
