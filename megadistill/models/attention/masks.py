"""Masks: what the queries of a batch see, in the form that an implementation of attention takes, made once a batch.

Every query of a supported family sees the keys from a first one to its own: the first of its document, or of its
window. From these first keys follow a dense mask, flex_attention's block mask, and the blocks that our blockwise
attention leaves out. Nothing here asks the device: transformers' models would, whether positions restart anywhere (one
or two host-device syncs a forward pass), and the caller knows.

Legend: B sequences, S tokens of a sequence, n blocks of a sequence.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention.flex_attention import BlockMask
from transformers import PretrainedConfig

FLEX = "megadistill_flex"
"""transformers' name of our attention function."""

INDEXED_KINDS = ("indexed_attention", "deepseek_sparse_attention")
"""Kinds of layers whose indexer chooses the keys: transformers' names, and those of 5.17. They read a dense mask."""

FLEX_BLOCK = 128
"""Queries and keys of a block of flex_attention: torch's default."""


def has_flex_kernels(device: torch.device) -> bool:
    """Whether `flex` is torch's flex_attention on this device. On a CPU that has no backward: there it is blockwise."""
    return device.type != "cpu"


def attention_inputs(
    config: PretrainedConfig,
    positions: Tensor | None,
    shape: tuple[int, int],
    *,
    by_kind: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """The `attention_mask` of a decoder's forward pass over `shape` = (B, S) tokens, and what flash-attn takes beside.

    Args:
        positions: [B, S], which restart at 0 where a document begins; None: a row is one document.
        by_kind: whether the family takes a mask for each kind of layer. Else the one mask is that of all its layers,
            and a mask of no element stands for none (see `omit_empty_masks`): None would have the model ask.
    """
    start_BS = None if positions is None else _document_starts(positions)
    implementation = config._attn_implementation

    def mask(window: int | None = None, chunk: int | None = None) -> Tensor | BlockMask | None:
        if implementation.startswith("flash"):
            return None  # it reads window and softcap from the layer, documents from the lengths below
        first_key = _first_keys(start_BS, shape, window=window, chunk=chunk, device=device)
        if implementation == FLEX:
            if has_flex_kernels(device):
                return block_mask(first_key, shape, device=device)
            return None if first_key is None else first_key[:, None, :, None]
        return _dense_mask(first_key, shape[1], dtype=dtype if implementation == "eager" else None, device=device)

    window = getattr(config, "sliding_window", None)
    inputs = _lengths(positions, shape, device=device) if implementation.startswith("flash") else {}
    if by_kind:
        limits: dict[str, dict[str, Any]] = {
            "full_attention": {},
            "sliding_attention": {"window": window},
            "chunked_attention": {"chunk": getattr(config, "attention_chunk_size", None)},
        }
        kinds = set(config.layer_types)
        if "hybrid" in kinds:  # each of Falcon-H1's layers has both
            kinds = {"full_attention", "linear_attention"}
        if kinds & set(INDEXED_KINDS):
            first_key = _first_keys(start_BS, shape, device=device)
            first_key = torch.zeros(1, shape[1], dtype=torch.int64, device=device) if first_key is None else first_key
            dense = _dense_mask(first_key, shape[1], dtype=dtype if implementation == "eager" else None, device=device)
            return {"attention_mask": dict.fromkeys(INDEXED_KINDS, dense), **inputs}
        # Layers of linear attention take a mask of padding, of which there is none.
        masks = {kind: mask(**limits[kind]) if kind in limits else None for kind in sorted(kinds)}
        return {"attention_mask": masks, **inputs}
    only = mask(window=window)
    return {"attention_mask": torch.empty(0, 0, 0, 0, device=device) if only is None else only, **inputs}


def _document_starts(positions: Tensor) -> Tensor:
    """[B, S]: place of the first token of each token's document in its row."""
    place = torch.arange(positions.shape[1], device=positions.device)
    return place.expand_as(positions).where(positions == 0, 0).cummax(dim=1).values


def _first_keys(
    start_BS: Tensor | None,
    shape: tuple[int, int],
    *,
    window: int | None = None,
    chunk: int | None = None,
    device: torch.device,
) -> Tensor | None:
    """[B or 1, S] int64: the first key that each query sees. None: the first of the row, for all of them.

    `chunk`: tokens of a document, from its first on, that see no others; `window`: tokens up to a query's own.
    """
    if chunk is not None and chunk < shape[1]:
        place = torch.arange(shape[1], device=device).unsqueeze(0)
        start = torch.zeros_like(place) if start_BS is None else start_BS
        return start + (place - start) // chunk * chunk
    if window is None or window >= shape[1]:
        return start_BS
    within = (torch.arange(shape[1], device=device) - window + 1).clamp(min=0).unsqueeze(0)
    return within if start_BS is None else start_BS.maximum(within)


def _dense_mask(first_key: Tensor | None, S: int, *, dtype: torch.dtype | None, device: torch.device) -> Tensor | None:
    """[B or 1, 1, S, S]: bool for torch's attention, or in `dtype`, 0 and its lowest number, to add to scores.

    None where torch's attention needs none: its own flag says causal, with which it can take its fastest kernel.
    """
    if first_key is None and dtype is None:
        return None
    place = torch.arange(S, device=device)
    allowed = place <= place.unsqueeze(1)
    if first_key is not None:
        allowed = allowed & (place >= first_key.unsqueeze(-1))
    allowed = allowed.view(-1, 1, S, S)
    if dtype is None:
        return allowed
    return torch.zeros((), dtype=dtype, device=device).where(allowed, torch.finfo(dtype).min)


def block_mask(first_key: Tensor | None, shape: tuple[int, int], *, device: torch.device) -> BlockMask:
    """flex_attention's block mask, from the first keys [B or 1, S] at the blocks' edges: O(n²), and nothing [S, S].

    First keys never decrease along a row, so those of a block's first and last query bound the others'. A key block is
    left out where no query of the block sees it, and computed without a mask where all of them see all of it; a last
    query block of fewer queries has masks, as torch's own have.
    """
    B, S = shape
    n = -(-S // FLEX_BLOCK)
    block = torch.arange(n, device=device)
    earlier_nn = block < block.unsqueeze(1)
    whole_nn = earlier_nn & ((block.unsqueeze(1) + 1) * FLEX_BLOCK <= S)
    same_nn = block == block.unsqueeze(1)
    if first_key is None:
        seen_Bnn, full_Bnn = (earlier_nn | same_nn).unsqueeze(0), whole_nn.unsqueeze(0)
    else:
        first_key = first_key.expand(B, S)
        lowest_Bn1 = first_key[:, ::FLEX_BLOCK].unsqueeze(-1)
        highest_Bn1 = first_key[:, (block * FLEX_BLOCK + FLEX_BLOCK - 1).clamp(max=S - 1)].unsqueeze(-1)
        seen_Bnn = (earlier_nn & ((block + 1) * FLEX_BLOCK > lowest_Bn1)) | same_nn
        full_Bnn = whole_nn & (block * FLEX_BLOCK >= highest_Bn1)
    return BlockMask.from_kv_blocks(
        *_ordered_blocks(seen_Bnn & ~full_Bnn),
        *_ordered_blocks(full_Bnn),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=_mask_of(first_key),
        seq_lengths=(S, S),
    )


def _ordered_blocks(blocks_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """(number [B, 1, n] of each query block's key blocks, their indices [B, 1, n, n] first) of a mask of blocks."""
    ordered = blocks_Bnn.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks_Bnn.sum(dim=-1, dtype=torch.int32).unsqueeze(1), ordered.to(torch.int32).unsqueeze(1)


def _mask_of(first_key: Tensor | None) -> Any:
    """The mask within a block, of numbers of the batch, the head, the query and the key."""
    if first_key is None:
        return _causal

    def from_first_key(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first_key[b, query])

    return from_first_key


def _causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def _lengths(positions: Tensor | None, shape: tuple[int, int], *, device: torch.device) -> dict[str, Any]:
    """flash-attn's cumulative lengths of the documents of a batch, whose rows follow one another; S bounds a document.

    With documents, their number is read from the device: one host-device sync a batch.
    """
    B, S = shape
    if positions is None:
        edges = torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=device)
    else:
        begins = positions == 0
        begins[:, 0] = True
        starts = begins.flatten().nonzero().squeeze(1)
        edges = torch.nn.functional.pad(starts, (0, 1), value=B * S).to(torch.int32)
        torch._dynamo.maybe_mark_dynamic(edges, 0)  # else layers are compiled for each number of documents
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": S, "max_length_k": S}


def omit_empty_masks(decoder: Any) -> None:
    """Has each layer of a decoder that is called with a mask of no element compute without one."""
    for layer in decoder.layers:
        layer.register_forward_pre_hook(_without_empty_mask, with_kwargs=True)


def _without_empty_mask(_: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask = kwargs.get("attention_mask")
    return (args, {**kwargs, "attention_mask": None}) if isinstance(mask, Tensor) and not mask.numel() else None
