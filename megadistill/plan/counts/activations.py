"""Activation memory of a decoder's layers, counted on fake tensors, which have no bytes.

Counted is one sequence of one model: a micro-batch of B sequences takes B times as much. The layer is transformers'
own, and torch's own autograd runs it forwards and backwards; live bytes are those of the storages that the operators
allocate, so two tensors of one storage count once.

The kernels are those that torch takes on a CPU, where scaled dot-product attention without a mask is a flash kernel: it
saves queries, keys, values, its output and a number for each token and head, as on a GPU. With a mask (documents that
do not attend to each other, a sliding window shorter than the sequence) a GPU takes another kernel, which saves the
same and may pad the mask. A kernel's own workspace and the allocator's fragmentation are not counted.

Legend: S tokens of the sequence, D width.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadistill.models.families import build_decoder, family, rebuild_buffers


@dataclass(frozen=True)
class Activations:
    """Bytes of one sequence, in one precision; those of a single layer are of the layer that takes most."""

    saved: int
    """Bytes that all layers save for the backward pass, without activation checkpointing."""
    layer_inputs: int
    """Bytes of the inputs of all layers, which are saved with activation checkpointing."""
    norm: int
    """Bytes of the last norm's output and saved tensors, released when the backward pass reaches the last layer."""
    shared: int
    """Bytes of tensors that all layers share: rotary embeddings, a mask."""
    forward: int
    """Most live bytes while one layer computes without saving anything, its input included."""
    backward: "Peak"
    """Live bytes in the backward pass of one layer, beyond those it has saved."""
    recompute: "Peak"
    """Live bytes in the recomputation and backward pass of one layer, beyond its input."""


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


def count_activations(config: Any, sequence_length: int, *, dtype: torch.dtype, masked: bool) -> Activations:
    """Activations of a supported family's decoder. `masked`: documents do not attend to each other, by a mask.

    Layers of one kind (attention, and the shapes of their parameters) are counted once. A mixture's experts in float32
    are counted as twice those in bfloat16, which is a little too much.
    """
    if dtype == torch.float32 and family(config).experts is not None:
        # torch's grouped product of experts has a shape rule for bfloat16 alone.
        return _doubled(count_activations(config, sequence_length, dtype=torch.bfloat16, masked=masked))
    kinds = [layer_kind(config, index) for index in range(config.num_hidden_layers)]
    counts = {
        kind: _Layer.count(config, kinds.index(kind), sequence_length, dtype, masked) for kind in dict.fromkeys(kinds)
    }
    layers = counts.values()
    return Activations(
        saved=sum(counts[kind].saved for kind in kinds),
        layer_inputs=sum(counts[kind].input for kind in kinds),
        norm=max(layer.norm for layer in layers),
        shared=max(layer.shared for layer in layers),
        forward=max(layer.forward for layer in layers),
        backward=Peak.over(moment for layer in layers for moment in layer.backward),
        recompute=Peak.over((once, each + layer.after_forward) for layer in layers for once, each in layer.backward),
    )


def _doubled(counts: Activations) -> Activations:
    def double(value: Any) -> Any:
        return Peak(tuple((2 * a, 2 * b) for a, b in value.moments)) if isinstance(value, Peak) else 2 * value

    return Activations(**{each.name: double(getattr(counts, each.name)) for each in fields(counts)})


def layer_kind(config: Any, index: int) -> tuple[Any, ...]:
    """Attention and kind of MLP of a layer: layers of the same kind need the same memory."""
    attention = config.layer_types[index] if getattr(config, "layer_types", None) else "full_attention"
    dense = index in (getattr(config, "mlp_only_layers", None) or ()) or (
        (index + 1) % getattr(config, "decoder_sparse_step", 1) != 0
    )
    return attention, dense


@dataclass(frozen=True)
class _Layer:
    """Bytes of a single layer, as in `Activations`."""

    saved: int
    """Saved bytes, with its input where that is saved: in float32, as the norms compute on a copy otherwise."""
    input: int
    norm: int
    shared: int
    forward: int
    after_forward: int
    """Live bytes at the end of the forward pass, its output included."""
    backward: list[tuple[int, int]]
    """Live bytes beyond `after_forward` at each moment of the backward pass: (weights' gradients, the rest)."""

    @classmethod
    def count(cls, config: Any, index: int, S: int, dtype: torch.dtype, masked: bool) -> "_Layer":
        decoder = build_decoder(config, layers=range(index, index + 1))
        with FakeTensorMode():
            _make_fake(decoder, dtype)
            hidden_1SD = torch.empty(1, S, config.hidden_size, dtype=dtype)
            arguments = _layer_arguments(decoder, hidden_1SD, masked=masked)
            if family(config).attention == "sdpa" and not masked and not _windowed(config, index, S):
                arguments["attention_mask"] = None  # transformers omits it, unless it is traced
            layer = decoder.layers[0]
            shared = [tensor for tensor in tree_leaves(arguments) if isinstance(tensor, Tensor)]
            hidden_1SD.requires_grad_()
            with LiveStorages() as live, torch.no_grad():
                layer(hidden_1SD, **arguments)
            forward = live.peak + _bytes_of([hidden_1SD])
            with _saved_storages() as by_norm:
                out = decoder.norm(hidden_1SD)
            norm = _bytes_without(by_norm, decoder.parameters()) + _bytes_of([out])
            after_forward, backward, by_layer = _fwd_bwd(layer, hidden_1SD, arguments)
            saved = _bytes_without(by_layer, [*decoder.parameters(), *shared])
        return cls(saved, _bytes_of([hidden_1SD]), norm, _bytes_of(shared), forward, after_forward, backward)


def _fwd_bwd(
    layer: nn.Module, hidden_1SD: Tensor, arguments: dict[str, Any]
) -> tuple[int, list[tuple[int, int]], dict[int, int]]:
    """Live bytes after the forward pass, those beyond them at each moment of the backward pass, the saved tensors."""
    gradients: set[int] = set()

    def release(parameter: Tensor) -> None:  # ZeRO-3 takes each gradient as soon as it is computed
        assert parameter.grad is not None
        gradients.add(live.number(parameter.grad))
        parameter.grad = None

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(release)  # type: ignore[no-untyped-call]
    with LiveStorages() as live:
        with _saved_storages() as saved:
            out = layer(hidden_1SD, **arguments)
        after_forward, first = live.now, len(live.events)
        out.backward(torch.empty_like(out))
    once = each = 0
    moments = []
    for number, size in live.events[first:]:
        once += size if number in gradients else 0
        each += 0 if number in gradients else size
        moments.append((once, each))
    return after_forward, moments, saved


def _make_fake(decoder: Any, dtype: torch.dtype) -> None:
    """Replaces parameters on meta by fake tensors on a CPU."""
    for name, parameter in list(decoder.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(module), leaf, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
    rebuild_buffers(decoder)
    decoder.train()


def _layer_arguments(decoder: Any, hidden_1SD: Tensor, *, masked: bool) -> dict[str, Any]:
    """The keyword arguments with which the decoder calls its layer."""
    arguments: dict[str, Any] = {}

    def catch(_: nn.Module, __: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        arguments.update(keywords)

    handle = decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    positions = torch.empty(1, hidden_1SD.shape[1], dtype=torch.int64) if masked else None
    with torch.no_grad():
        decoder(inputs_embeds=hidden_1SD, position_ids=positions, use_cache=False)
    handle.remove()
    return arguments


def _windowed(config: Any, index: int, S: int) -> bool:
    """Whether the layer's window is shorter than the sequence, which takes a mask."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
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
