"""What a decoder's layer keeps for backward, and takes while it works: counted on fake tensors, which have no bytes.

It knows one sequence of one model and no recipe: a micro-batch of B sequences takes B times as much. The layer is
transformers' own, run forwards and backwards by torch's own autograd, and what lives is told by the storages that the
operators make; two tensors of one storage count once.

What is counted are the kernels that torch takes on a CPU, where scaled dot-product attention without a mask runs as a
flash kernel: it keeps queries, keys, values, its output and a number a token and head, as it does on a GPU. With a mask
(documents kept apart, a sliding window shorter than the sequence) a GPU takes another kernel, which keeps the same and
may pad the mask. What a kernel needs inside of itself is in neither count, nor what an allocator cannot use.

Legend: S tokens of the sequence, D width.
"""

import weakref
from collections.abc import Iterable
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
    """Bytes of one sequence, in one precision. A layer's are those of the layer that takes most."""

    kept: int
    """By all layers for backward: what a student holds without activation checkpointing."""
    inputs: int
    """Of all layers: what is left of that with activation checkpointing."""
    norm: int
    """Kept by the last norm, and its output: gone when the last layer goes back."""
    shared: int
    """What all layers share: rotations, a mask."""
    forward: int
    """The most that lives at a time while one layer computes and nothing is kept, its input among it."""
    backward: "Peak"
    """What lives while one layer goes back, beyond what it has kept."""
    recompute: "Peak"
    """What lives while one layer is computed recompute and goes back, beyond its input."""


@dataclass(frozen=True)
class Peak:
    """Bytes at moments that may be the highest: (what the weights' gradients take, what each sequence takes)."""

    moments: tuple[tuple[int, int], ...]

    def of(self, sequences: int) -> int:
        """The most bytes at a time, for a micro-batch of so many."""
        return max(once + sequences * each for once, each in self.moments)

    @classmethod
    def over(cls, moments: Iterable[tuple[int, int]]) -> "Peak":
        """Of the moments, those that no other one is above in both."""
        highest: list[tuple[int, int]] = []
        for once, each in sorted(set(moments), reverse=True):
            if not highest or each > highest[-1][1]:
                highest.append((once, each))
        return cls(tuple(highest))


def count_activations(config: Any, sequence_length: int, *, dtype: torch.dtype, masked: bool) -> Activations:
    """Of a supported family's decoder. `masked`: each document is read by itself, which takes a mask.

    Layers of one kind (attention, and the shapes of their parameters) are counted once. A mixture's experts in float32
    are counted as twice those in bfloat16, which is a little too much.
    """
    if dtype == torch.float32 and family(config).experts is not None:
        # torch's grouped product of experts has a shape rule for bfloat16 alone.
        return _doubled(count_activations(config, sequence_length, dtype=torch.bfloat16, masked=masked))
    counted: dict[tuple[Any, ...], _Layer] = {}
    kept = inputs = 0
    for index in range(config.num_hidden_layers):
        kind = layer_kind(config, index)
        if kind not in counted:
            counted[kind] = _Layer.count(config, index, sequence_length, dtype, masked)
        kept += counted[kind].kept
        inputs += counted[kind].input
    layers = counted.values()
    return Activations(
        kept=kept,
        inputs=inputs,
        norm=max(layer.norm for layer in layers),
        shared=max(layer.shared for layer in layers),
        forward=max(layer.forward for layer in layers),
        backward=Peak.over(moment for layer in layers for moment in layer.backward),
        recompute=Peak.over((once, each + layer.made) for layer in layers for once, each in layer.backward),
    )


def _doubled(found: Activations) -> Activations:
    def doubled(value: Any) -> Any:
        return Peak(tuple((2 * a, 2 * b) for a, b in value.moments)) if isinstance(value, Peak) else 2 * value

    return Activations(**{each.name: doubled(getattr(found, each.name)) for each in fields(found)})


def layer_kind(config: Any, index: int) -> tuple[Any, ...]:
    """Layers that are equal here take the same."""
    attention = config.layer_types[index] if getattr(config, "layer_types", None) else "full_attention"
    dense = index in (getattr(config, "mlp_only_layers", None) or ()) or (
        (index + 1) % getattr(config, "decoder_sparse_step", 1) != 0
    )
    return attention, dense


@dataclass(frozen=True)
class _Layer:
    """`Activations` of a single layer."""

    kept: int
    """Its input among it where it keeps that: in float32, whose norms compute on a copy otherwise."""
    input: int
    norm: int
    shared: int
    forward: int
    made: int
    """What lives when it has computed, its output among it."""
    backward: list[tuple[int, int]]
    """Beyond `made`: (weights' gradients, the rest) at each moment."""

    @classmethod
    def count(cls, config: Any, index: int, S: int, dtype: torch.dtype, masked: bool) -> "_Layer":
        decoder = build_decoder(config, layers=range(index, index + 1))
        with FakeTensorMode():
            _make_fake(decoder, dtype)
            hidden_1SD = torch.empty(1, S, config.hidden_size, dtype=dtype)
            said = _layer_arguments(decoder, hidden_1SD, masked=masked)
            if family(config).attention == "sdpa" and not masked and not _windowed(config, index, S):
                said["attention_mask"] = None  # transformers leaves it out, but where it is traced
            layer = decoder.layers[0]
            shared = [tensor for tensor in tree_leaves(said) if isinstance(tensor, Tensor)]
            hidden_1SD.requires_grad_()
            with _Live() as live, torch.no_grad():
                layer(hidden_1SD, **said)
            forward = live.peak + _bytes_of([hidden_1SD])
            with _Kept() as by_norm:
                out = decoder.norm(hidden_1SD)
            norm = by_norm.bytes_without(decoder.parameters()) + _bytes_of([out])
            made, backward, by_layer = _fwd_bwd(layer, hidden_1SD, said)
            kept = by_layer.bytes_without([*decoder.parameters(), *shared])
        return cls(kept, _bytes_of([hidden_1SD]), norm, _bytes_of(shared), forward, made, backward)


def _fwd_bwd(layer: nn.Module, hidden_1SD: Tensor, said: dict[str, Any]) -> tuple[int, list[tuple[int, int]], "_Kept"]:
    """What lives between, what lives beyond that at each moment of the way back, and what autograd kept."""
    gradients: set[int] = set()

    def take(parameter: Tensor) -> None:  # ZeRO-3 takes each gradient away as soon as it is there
        assert parameter.grad is not None
        gradients.add(live.number(parameter.grad))
        parameter.grad = None

    for parameter in layer.parameters():
        parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
    with _Live() as live:
        with _Kept() as kept:
            out = layer(hidden_1SD, **said)
        made, begun = live.now, len(live.events)
        out.backward(torch.empty_like(out))
    once = each = 0
    moments = []
    for number, size in live.events[begun:]:
        once += size if number in gradients else 0
        each += 0 if number in gradients else size
        moments.append((once, each))
    return made, moments, kept


def _make_fake(decoder: Any, dtype: torch.dtype) -> None:
    """Fake tensors that say that they are on a CPU, in place of parameters on meta."""
    for name, parameter in list(decoder.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(module), leaf, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
    rebuild_buffers(decoder)
    decoder.train()


def _layer_arguments(decoder: Any, hidden_1SD: Tensor, *, masked: bool) -> dict[str, Any]:
    """What the decoder calls its layer with, beside hidden states."""
    said: dict[str, Any] = {}

    def catch(_: nn.Module, __: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        said.update(keywords)

    handle = decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    positions = torch.empty(1, hidden_1SD.shape[1], dtype=torch.int64) if masked else None
    with torch.no_grad():
        decoder(inputs_embeds=hidden_1SD, position_ids=positions, use_cache=False)
    handle.remove()
    return said


def _windowed(config: Any, index: int, S: int) -> bool:
    """Whether the layer's window is shorter than the sequence, which takes a mask."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds[index] == "sliding_attention" if kinds else window is not None
    return bool(slides and window is not None and window <= S)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class _Kept:
    """What autograd keeps of the operations within it, by storage."""

    def __enter__(self) -> "_Kept":
        self._found: dict[int, Any] = {}
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._found.setdefault(storage._cdata, storage.nbytes())
        return tensor

    def bytes_without(self, tensors: Iterable[Tensor]) -> int:
        others = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(size for key, size in self._found.items() if key not in others)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations within it have made and that live on, and the most of them at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.events: list[tuple[int, int]] = []
        """(number of a storage, its bytes when it comes, the same below 0 when it goes)"""
        self._seen: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def number(self, tensor: Tensor) -> int:
        return self._seen[tensor.untyped_storage()._cdata][0]

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        given = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((arguments, keywords))
            if isinstance(tensor, Tensor)
        }
        found = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor)
        self.peak = max(self.peak, self.now)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, number = storage._cdata, storage.nbytes(), len(self.events)
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size
            self.events.append((number, -size))

        self._seen[key] = number, weakref.ref(storage, gone)
        self.now += size
        self.events.append((number, size))
