"""Activation memory of a decoder's layers, counted on fake tensors, which have no bytes.

Counted is one sequence of one model, or a rank's part of it where ranks share sequences: a micro-batch of B sequences
takes B times as much. The layer is transformers'
own, and torch's own autograd runs it forwards and backwards; live bytes are those of the storages that the operators
allocate, so two tensors of one storage count once.

The kernels are those that torch takes on a CPU, where scaled dot-product attention without a mask is a flash kernel: it
saves queries, keys, values, its output and a number for each token and head, as on a GPU. It stands in for flex and
flash attention, which save the same, and have no scores in memory whatever windows, documents and softcap there are.
With a dense mask a GPU takes another kernel, which saves the same and may pad the mask. A kernel's own workspace and
the allocator's fragmentation are not counted; compiled layers keep less, as the compiler recomputes what is cheap.

Legend: S tokens of the sequence, s of them on a rank, D width.
"""

import copy
import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadistill.config.recipe import Checkpointing
from megadistill.models.attention.choice import has_indexers
from megadistill.models.attention.sequence import share_sequences
from megadistill.models.configs.unequal_layers import first_sharing_layer
from megadistill.models.families import build_decoder, expert_layers, family, rebuild_buffers, stored_buffers
from megadistill.models.forward.hidden_streams import hidden_streams
from megadistill.models.forward.per_layer_inputs import has_per_layer_inputs
from megadistill.models.layers import checkpoint_layers, saves
from megadistill.types import SequencePart

FLEX_BLOCK, FLEX_LISTS, INT32, INT64 = 128, 4, 4, 8
"""Flex attention's block masks: tokens of a block; lists of blocks, partly and wholly seen, by queries and by keys."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one sequence, in one precision; those of a single layer are of the layer that takes most."""

    saved: int
    """Bytes that all layers keep for the backward pass."""
    norm: int
    """Bytes of the last norm's output and saved tensors, released when the backward pass reaches the last layer."""
    shared: int
    """Bytes of tensors that all layers share: rotary embeddings, masks."""
    forward: int
    """Most live bytes while one layer computes without saving anything, its input included."""
    forward_working: int
    """Most live bytes while one layer computes, beyond those it keeps for the backward pass."""
    backward: "Peak"
    """Live bytes in the backward pass of one layer, recomputation included, beyond those it has kept."""
    score_traffic: "Traffic"
    """Bytes read and written of attention scores in memory, by all layers."""
    elementwise_backward: int
    """Bytes that all operators but matrix products and attention read and write in the backward pass of all layers."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that operators read and write in the device's memory, each operator by itself."""

    forward: int = 0
    backward: int = 0
    """Recomputation included."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class Peak:
    """Bytes at moments that may be the highest: (bytes of the weights' gradients, bytes for each sequence)."""

    moments: tuple[tuple[int, int], ...]

    def bytes(self, sequences: int) -> int:
        """Most bytes at a time for a micro-batch of `sequences` sequences."""
        return max(once + sequences * each for once, each in self.moments)

    @classmethod
    def over(cls, moments: Iterable[tuple[int, int]]) -> "Peak":
        """Keeps the moments that no other one exceeds in both numbers."""
        highest: list[tuple[int, int]] = []
        for once, each in sorted(set(moments), reverse=True):
            if not highest or each > highest[-1][1]:
                highest.append((once, each))
        return cls(tuple(highest))


def count_activations(
    config: Any,
    sequence_length: int,
    *,
    dtype: torch.dtype,
    masked: bool,
    attention: str,
    checkpointing: Checkpointing = "none",
    ranks: int = 1,
) -> Activations:
    """Activations of a supported family's decoder.

    Layers of one kind (attention, and the shapes of their parameters) are counted once. A mixture's experts in float32
    are counted as twice those in bfloat16, which is a little too much.

    Args:
        masked: whether documents do not attend to each other.
        attention: `eager`, `sdpa`, `flex` or `flash` (`models.attention.choice`).
        ranks: that share the sequence; counted is what one of them holds.
    """
    counting = _Counting(config, sequence_length, dtype, masked, attention, checkpointing, ranks)
    if dtype == torch.float32 and family(config).experts is not None:
        # torch's grouped product of experts has a shape rule for bfloat16 alone.
        return _doubled(replace(counting, dtype=torch.bfloat16).all_layers())
    return counting.all_layers()


def _doubled(counts: Activations) -> Activations:
    def double(value: Any) -> Any:
        if isinstance(value, Peak):
            return Peak(tuple((2 * once, 2 * each) for once, each in value.moments))
        return value + value

    return Activations(**{each.name: double(getattr(counts, each.name)) for each in fields(counts)})


def layer_kind(config: Any, index: int) -> tuple[Any, ...]:
    """Attention and kind of MLP of a layer, and what its family says by layer: one kind needs the same memory.

    Layers that take another one's keys and values may have wider MLPs.
    """
    attention = config.layer_types[index] if getattr(config, "layer_types", None) else "full_attention"
    dense = index not in expert_layers(config)
    lists = (getattr(config, name, None) for name in family(config).by_layer)
    return attention, dense, index >= first_sharing_layer(config), *(values[index] for values in lists if values)


@dataclass(frozen=True)
class _Layer:
    """Bytes of a single layer, as in `Activations`."""

    saved: int
    """Kept bytes, with its input where that is kept: in float32, as the norms compute on a copy otherwise."""
    norm: int
    shared: int
    forward: int
    forward_working: int
    backward: list[tuple[int, int]]
    """Live bytes beyond the kept ones at each moment of the backward pass: (weights' gradients, the rest)."""
    score_traffic: Traffic
    elementwise_backward: int


@dataclass(frozen=True)
class _Counting:
    """Counts a decoder's layers."""

    config: Any
    S: int
    dtype: torch.dtype
    masked: bool
    attention: str
    checkpointing: Checkpointing
    ranks: int

    def all_layers(self) -> Activations:
        kinds = [layer_kind(self.config, index) for index in range(self.config.num_hidden_layers)]
        counts = {kind: self.layer(kinds.index(kind)) for kind in dict.fromkeys(kinds)}
        layers = counts.values()
        return Activations(
            saved=sum(counts[kind].saved for kind in kinds),
            norm=max(layer.norm for layer in layers),
            shared=max(layer.shared for layer in layers) + self._block_masks(),
            forward=max(layer.forward for layer in layers),
            forward_working=max(layer.forward_working for layer in layers),
            backward=Peak.over(moment for layer in layers for moment in layer.backward),
            score_traffic=sum((counts[kind].score_traffic for kind in kinds), Traffic()),
            elementwise_backward=sum(counts[kind].elementwise_backward for kind in kinds),
        )

    def _block_masks(self) -> int:
        """Flex attention's block masks of a sequence, one for each window: lists of [S / 128, S / 128] blocks."""
        if self.attention != "flex":
            return 0
        windows = {_windowed(self.config, index, self.S) for index in range(self.config.num_hidden_layers)}
        blocks = -(-self.S // FLEX_BLOCK)
        return len(windows) * FLEX_LISTS * INT32 * blocks * (blocks + 1) + (INT64 * self.S if self.masked else 0)

    def layer(self, index: int) -> _Layer:
        """Counts a forward pass without gradients, then a forward and backward pass, of the layer with this number."""
        config = copy.deepcopy(self.config)
        is_fused = self.attention in ("flex", "flash")
        if is_fused and hasattr(config, "attn_logit_softcapping"):
            config.attn_logit_softcapping = None  # the operator that stands in has none
        implementation = "eager" if self.attention == "eager" else "sdpa"
        decoder = build_decoder(config, layers=range(index, index + 1), attention="eager")
        decoder.config._attn_implementation = implementation  # a model of Gemma 2 is not built with another than eager
        with FakeTensorMode():
            _make_fake(decoder, self.dtype)
            hidden_1SD = torch.empty(1, self.S, config.hidden_size, dtype=self.dtype)
            arguments = _layer_arguments(decoder, hidden_1SD, masked=self.masked)
            if self.ranks > 1:
                hidden_1SD = hidden_1SD[:, : self.S // self.ranks].clone()
                part = _layer_arguments(decoder, hidden_1SD, masked=self.masked)
                arguments = {**part, "attention_mask": arguments["attention_mask"]}  # of the whole sequence
                share_sequences(decoder, SequencePart(0, self.ranks), _exchanged)
            is_causal = implementation == "sdpa" and not self.masked and not _windowed(config, index, self.S)
            if (is_fused or is_causal) and not has_indexers(config):
                arguments["attention_mask"] = None  # transformers omits it, unless it is traced
            if (streams := hidden_streams(config)) > 1:
                hidden_1SD = torch.empty(streams, *hidden_1SD.shape, dtype=self.dtype)
            layer = decoder.layers[0]
            shared = [tensor for tensor in tree_leaves(arguments) if isinstance(tensor, Tensor)]
            hidden_1SD.requires_grad_()
            with LiveStorages() as live, torch.no_grad():
                layer(hidden_1SD, **arguments)
            forward = live.peak + _bytes_of([hidden_1SD])
            with _saved_storages() as by_norm:
                out = decoder.norm(hidden_1SD)
            norm = _bytes_without(by_norm, decoder.parameters()) + _bytes_of([out])
            checkpoint_layers(decoder, self.checkpointing)
            passes = _Passes.of(layer, hidden_1SD, arguments, scores=(config.num_attention_heads, self.S))
            saved = passes.retained + _bytes_of([hidden_1SD])
            if self.checkpointing == "none":
                saved = _bytes_without(passes.saved, [*decoder.parameters(), *shared])
        return _Layer(
            saved,
            norm,
            _bytes_of(shared),
            forward,
            passes.working,
            passes.moments,
            passes.score_traffic,
            passes.elementwise_backward,
        )


@dataclass(frozen=True)
class _Passes:
    """A layer's forward and backward pass."""

    retained: int
    """Live bytes between the two, without the layer's input and output."""
    working: int
    """Most live bytes in the forward pass, beyond the kept ones."""
    saved: dict[int, int]
    """Storages that autograd saves where nothing is checkpointed: address -> bytes."""
    moments: list[tuple[int, int]]
    """See `_Layer.backward`."""
    score_traffic: Traffic
    elementwise_backward: int

    @classmethod
    def of(
        cls, layer: nn.Module, hidden_1SD: Tensor, arguments: dict[str, Any], *, scores: tuple[int, int]
    ) -> "_Passes":
        """`scores`: (heads, tokens) of attention scores."""
        gradients: set[int] = set()

        def release(parameter: Tensor) -> None:  # ZeRO-3 takes each gradient as soon as it is computed
            assert parameter.grad is not None
            gradients.add(live.number(parameter.grad))
            parameter.grad = None

        for parameter in layer.parameters():
            parameter.register_post_accumulate_grad_hook(release)  # type: ignore[no-untyped-call]
        with LiveStorages() as live, _Moved(*scores) as moved:
            with _saved_storages() as saved:
                out = _hidden_of(layer(hidden_1SD, **arguments))
            first, retained, forward = len(live.events), live.now - _bytes_of([out]), moved.scores
            working = live.peak - retained
            moved.clear()
            out.backward(torch.empty_like(out))
        once = each = 0
        moments = []
        for number, size in live.events[first:]:
            once += size if number in gradients else 0
            each += 0 if number in gradients else size
            moments.append((once, each))
        return cls(retained, working, saved, moments, Traffic(forward, moved.scores), moved.elementwise)


def _exchanged(blocks: Tensor) -> Tensor:
    """The memory of an all-to-all: the blocks one after the other, and those that arrive."""
    return blocks.contiguous().clone()


def _hidden_of(output: Any) -> Any:
    """The hidden states of a layer's output, which are the first of several in some families."""
    return output[0] if isinstance(output, tuple) else output


def _make_fake(decoder: Any, dtype: torch.dtype) -> None:
    """Replaces parameters, and biases of routers, on meta by fake tensors on a CPU."""
    for name, buffer in stored_buffers(decoder).items():
        module, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(module), leaf, torch.empty(buffer.shape))
    for name, parameter in list(decoder.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(module), leaf, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
    rebuild_buffers(decoder)
    _fix_stretch(decoder)
    decoder.train()


def _fix_stretch(decoder: Any) -> None:
    """Has "dynamic" rotary embeddings leave out their stretch, which asks a fake tensor for its largest position."""
    rotary: Any = getattr(decoder, "rotary_emb", None)
    kinds = getattr(rotary, "rope_type", None)  # of each kind of layer, in families that have two embeddings
    if isinstance(kinds, dict):
        rotary.rope_type = {each: "default" if kind == "dynamic" else kind for each, kind in kinds.items()}
    elif kinds == "dynamic":
        rotary.rope_type = "default"


def _layer_arguments(decoder: Any, hidden_1SD: Tensor, *, masked: bool) -> dict[str, Any]:
    """The keyword arguments with which the decoder calls its layer."""
    arguments: dict[str, Any] = {}

    def catch(layer: Any, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        names = [*inspect.signature(type(layer).forward).parameters][1:]  # without `self`
        arguments.update(dict(zip(names, given, strict=False)) | keywords)
        del arguments[names[0]]

    handle = decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    positions = torch.empty(1, hidden_1SD.shape[1], dtype=torch.int64) if masked else None
    own: dict[str, Any] = {}
    if has_per_layer_inputs(decoder.config):
        width = decoder.config.hidden_size_per_layer_input
        own["per_layer_inputs"] = torch.empty(*hidden_1SD.shape[:2], 1, width, dtype=hidden_1SD.dtype)
    with torch.no_grad():
        decoder(inputs_embeds=hidden_1SD, position_ids=positions, use_cache=False, **own)
    handle.remove()
    return arguments


def _windowed(config: Any, index: int, S: int) -> bool:
    """Whether the layer's window is shorter than the sequence, which takes a mask."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[index] == "chunked_attention":
        return bool(config.attention_chunk_size < S)
    slides = kinds[index] == "sliding_attention" if kinds else window is not None
    return bool(slides and window is not None and window <= S)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def _saved_storages() -> Iterator[dict[int, int]]:
    """Storages that autograd saves for the operations within this context: address -> bytes."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def _bytes_without(sizes: dict[int, int], tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of `_saved_storages` without those of `tensors`."""
    return sum(sizes[key] for key in sizes.keys() - {tensor.untyped_storage()._cdata for tensor in tensors})


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live bytes of the storages that operations within this context have allocated, now and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.events: list[tuple[int, int]] = []
        """(number of a storage, its bytes when it is allocated, minus its bytes when it is freed)"""
        self._seen: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def number(self, tensor: Tensor) -> int:
        return self._seen[tensor.untyped_storage()._cdata][0]

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        given = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((arguments, keywords))
            if isinstance(tensor, Tensor)
        }
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor)
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, number = storage._cdata, storage.nbytes(), len(self.events)
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            del self._seen[key]
            self.now -= size
            self.events.append((number, -size))

        self._seen[key] = number, weakref.ref(storage, freed)
        self.now += size
        self.events.append((number, size))


class _Moved(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that operators within this context read and write."""

    def __init__(self, heads: int, S: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._heads, self._S = heads, S
        self.clear()

    def clear(self) -> None:
        self.scores = 0
        """Bytes of scores [.., S, S] of all heads."""
        self.elementwise = 0
        """Bytes of operators other than matrix products and attention."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        read = [each for each in tree_leaves((arguments, keywords)) if isinstance(each, Tensor)]
        written = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        storages = {each.untyped_storage()._cdata for each in read}
        if all(each.untyped_storage()._cdata in storages for each in written) and not function._schema.is_mutable:
            return result  # a view
        tensors = [*read, *written]
        self.scores += sum(each.numel() * each.itemsize for each in tensors if self._has_scores(each))
        if not saves(function, arguments) and "bmm" not in function.name():
            self.elementwise += sum(_bytes_of([each]) for each in tensors)
        return result

    def _has_scores(self, tensor: Tensor) -> bool:
        square = tensor.dim() > 2 and tensor.shape[-2:] == (self._S, self._S)
        return square and tensor.numel() >= self._heads * self._S * self._S
