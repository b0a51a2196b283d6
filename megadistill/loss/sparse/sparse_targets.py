"""Sparse targets from the teacher's hidden states: vocabulary-parallel, exact, a chunk of tokens at a time.

`loss/reference.py` defines the result. The logits of a chunk exist at a time, each rank's on its own slice; from the
logits on the arithmetic is in float64.

Legend: N this rank's tokens; g ranks of the vocab group; n tokens of a chunk (of the whole group); E teacher width; w
this rank's rows of the vocabulary, v of them true (not padding); K ids of a token; M draws of a token; z logits over
the temperature.
"""

import math

import torch
from torch import Tensor

from megadistill.distributed.collectives import all_gather_rows, group_rank, group_size
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss.heads import Head, multiply, operand, padded
from megadistill.loss.inputs import ChunkPlan, fitting_tokens, require_whole_vocabulary
from megadistill.loss.options import LOGIT_MEMORY, LossOptions
from megadistill.loss.pointwise import apply_transform_
from megadistill.loss.sparse.distinct import draw_distinct
from megadistill.loss.sparse.exponentials import vocabulary_maximum
from megadistill.loss.sparse.most_likely import select_most_likely
from megadistill.loss.sparse.sampled import Ranges, draw, true_ranges
from megadistill.loss.sparse.selection import (
    Sampled,
    SampledDistinct,
    SelectedIds,
    Selection,
    pad_columns,
    uniforms_per_token,
)
from megadistill.types import SparseTargets, Tail, to_device


@torch.no_grad()
def sparse_targets(
    teacher: Head,
    *,
    selection: Selection,
    tail: Tail,
    vocab: VocabSlice,
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
    logit_memory: int = LOGIT_MEMORY,
) -> SparseTargets:
    """The part of the teacher's distribution at `temperature` that `selection` selects, for this rank's tokens.

    Collective over `vocab.group`: every rank passes its own N tokens (N may differ, and may be 0) and its own rows of
    the head. The result is that of one rank with the whole vocabulary, whatever the slices. An id that the teacher
    does not know (its bias is -inf) is never selected and has no mass.

    Args:
        teacher: hidden [N, E], weight [w, E]. Padding rows are never read, and may be missing.
        selection: which ids are selected.
        tail: what becomes of the mass outside; `Tail.RENORMALISED` alone for sampled ids. A token without an id above
            a threshold is all tail; with `Tail.RENORMALISED` it has its most likely id.
        vocab: which rows of the vocabulary this rank holds; slices may be uneven, empty or block-cyclic.
        uniforms: [N, M] float64 in [0, 1), for sampled ids alone: one a draw of `Sampled`, which is the first id, in
            the order of global ids, up to which the distribution adds up to more than its uniform number; one a token
            for `SampledDistinct`, the key of the noise of all ids.
        logit_memory: bytes of this rank's logits; as in `LossOptions`.

    Returns:
        `SparseTargets`, float32 (float64 for float64) without gradient. K is the largest number of ids of a token of
        the group. The ids of a row go from the most likely down, of equals the lowest first; sampled ones ascend.

    Raises:
        ValueError: shapes, dtypes or uniforms that do not fit, a tail for counts, or slices that do not add up to the
            vocabulary.
    """
    tokens = teacher.hidden.shape[0]
    teacher.require_fit("teacher", tokens, vocab, padding=False)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it divides the logits, so pass a positive number")
    _require_uniforms(uniforms, tokens, selection, tail)
    assert vocab.size < 2**24, "ids travel among float32 logits, which hold them exactly below 2**24"
    options = LossOptions(logit_memory)
    plan, max_rows, ranges = _exchange_metadata(teacher, uniforms, vocab, options)
    dtype, rank = teacher.accumulator, group_rank(vocab.group)
    weight_vE = teacher.rows(vocab, dtype)
    buffer = teacher.hidden.new_empty((group_size(vocab.group) * plan.chunk_tokens, vocab.true_rows), dtype=dtype)
    chunks = []
    for span in plan.spans():
        hidden_nE = operand(_gathered(teacher.hidden, span, vocab), dtype)
        z_nv = buffer[: len(hidden_nE)]
        multiply(hidden_nE, weight_vE.T, out=z_nv)
        apply_transform_(z_nv, teacher.true_bias(vocab, dtype), teacher.transform)
        if temperature != 1.0:
            z_nv.div_(temperature)
        maximum_n = vocabulary_maximum(z_nv, vocab)
        uniforms_nM = _gathered(uniforms, span, vocab) if uniforms is not None else maximum_n.unsqueeze(1)[:, :0]
        if isinstance(selection, Sampled):
            selected = draw(z_nv, maximum_n, uniforms_nM, ranges, vocab)
        else:
            if isinstance(selection, SampledDistinct):
                group = draw_distinct(z_nv, uniforms_nM, selection, max_rows, vocab)
            else:
                group = select_most_likely(z_nv, maximum_n, selection, tail, max_rows, vocab)
            selected = SelectedIds(*(part.chunk(group_size(vocab.group))[rank] for part in group))
        chunks.append(SelectedIds(*(part[: max(0, tokens - span.start)] for part in selected)))
    empty = teacher.hidden.new_empty((0, 0), dtype=dtype)
    chunks.append(SelectedIds(empty.long(), empty, empty.flatten()))
    width = torch.stack([(chunk.ids >= 0).any(dim=0).sum() for chunk in chunks]).amax(dim=0, keepdim=True)
    K = int(all_gather_rows(width, vocab.group).max())
    return SparseTargets(
        ids=torch.cat([pad_columns(chunk.ids, K, -1) for chunk in chunks]),
        probs=torch.cat([pad_columns(chunk.probs, K, 0).to(dtype) for chunk in chunks]),
        log_tail=torch.cat([chunk.log_tail.to(dtype) for chunk in chunks]),
        tail=tail,
        temperature=temperature,
    )


def _require_uniforms(uniforms: Tensor | None, tokens: int, selection: Selection, tail: Tail) -> None:
    numbers = uniforms_per_token(selection)
    if numbers == 0:
        if uniforms is not None:
            raise ValueError(f"{selection} draws nothing; pass uniforms for sampled ids alone")
        return
    if tail is not Tail.RENORMALISED:
        raise ValueError(
            f"tail is {tail.value}, but targets of sampled ids add up to 1 and leave none; pass Tail.RENORMALISED"
        )
    shape = (tokens, numbers)
    if uniforms is None or uniforms.shape != shape or uniforms.dtype != torch.float64:
        given = "none" if uniforms is None else f"{list(uniforms.shape)} {uniforms.dtype}"
        raise ValueError(
            f"{selection} needs uniforms {list(shape)} torch.float64, got {given}; "
            f"torch.rand({shape[0]}, {shape[1]}, dtype=torch.float64) makes them"
        )


def _exchange_metadata(
    teacher: Head, uniforms: Tensor | None, vocab: VocabSlice, options: LossOptions
) -> tuple[ChunkPlan, int, Ranges]:
    """The plan of the chunks, the largest v of a rank, and the ranges of all slices.

    Two small all-gathers, and one host-device sync.
    """
    fitting = fitting_tokens(
        options.logit_memory, models=1, itemsize=teacher.accumulator.itemsize, rows=vocab.true_rows
    )
    device = teacher.hidden.device
    own = to_device(torch.tensor([teacher.hidden.shape[0], vocab.true_rows, fitting, len(true_ranges(vocab))]), device)
    outside = own.new_zeros(1)
    if uniforms is not None:
        outside = ((uniforms >= 0) & (uniforms < 1)).logical_not().sum().view(1)
    gathered = all_gather_rows(torch.cat([own, outside]).unsqueeze(0), vocab.group)
    tokens, rows, fittings, range_counts, outsides = zip(*gathered.tolist(), strict=True)
    require_whole_vocabulary(rows, vocab)
    if any(outsides):
        raise ValueError(f"{list(outsides)} uniforms (by rank) are not in [0, 1); torch.rand makes numbers that are")
    plan = ChunkPlan.of(int(max(tokens)), int(min(fittings)), group_size(vocab.group), in_flight=1)
    return plan, int(max(rows)), Ranges.gather(vocab, range_counts, device)


def _gathered(rows: Tensor, span: slice, vocab: VocabSlice) -> Tensor:
    """The rows `span` of every rank, one rank after the other; zeros after a rank's last one."""
    return all_gather_rows(padded(rows[span], span.stop - span.start, 0), vocab.group)
