"""A device on the CPU for tests: it counts where the host would wait for it, and refuses what a device refuses.

A tensor on `DEVICE` holds a CPU tensor, which every operator is applied to; its `.device` is not the CPU's, so the
package takes its device branches. Recorded are the host-device syncs that `torch.cuda.set_sync_debug_mode` knows
(numbers and flags that are read, blocking copies, results whose size depends on values), and copies without blocking
from memory that is not pinned, which wait too. A tensor on the host beside one on the device is an error, as there.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)
"""A device type that torch knows, whose backward pass runs in the caller's thread, and that needs no start."""

THE_TEST = "the test"

_VALUE_SIZED = ("nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "unique_dim", "bincount")
_HOST_MAY_JOIN = ("copy_", "index", "index_put_", "_index_put_impl_", "_to_copy")


class DeviceTensor(Tensor):
    """A tensor on `DEVICE`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        wrapper: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        wrapper.held = held
        return wrapper

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.held})"

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch refuses it of any subclass

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} outside of the DeviceDouble that made its tensors")


@dataclass(frozen=True)
class Sync:
    """A wait of the host for the device."""

    kind: str
    """read: a number or a flag; to host, to device: a blocking copy; pageable: a copy without blocking from memory
    that is not pinned; size: a result whose size depends on values."""
    where: str
    """Module and function of the innermost frame that is neither torch's nor of the tests."""


class DeviceDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, `DEVICE` exists. Syncs and copies are those since it was made, or since `clear`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.syncs: list[Sync] = []
        self.queued: list[str] = []
        """Where copies without blocking were queued."""
        self._pinned: dict[int, Tensor] = {}

    def __enter__(self) -> "DeviceDouble":
        # torch.tensor(numbers, device=...) otherwise makes its tensor below the modes; FakeTensorMode does the same.
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        # torch 2.11 has no autocast for the type of `DEVICE`, and refuses the question.
        self._is_autocast_enabled = torch.is_autocast_enabled
        torch.is_autocast_enabled = lambda *device_type: False
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.is_autocast_enabled = self._is_autocast_enabled
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        self.syncs.clear()
        self.queued.clear()

    @property
    def counts(self) -> dict[str, int]:
        """`kind in where` -> syncs of the package and of transformers."""
        return dict(Counter(f"{sync.kind} in {sync.where}" for sync in self.syncs if sync.where != THE_TEST))

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        if name in ("is_pinned", "_pin_memory"):
            return self.is_pinned(args[0]) if name == "is_pinned" else self._pin(args[0].clone())
        if name in ("_to_copy", "copy_"):
            self._count_copy(name, args, kwargs)
        elif on_device:
            self._count(name, args)
            # A number of the host travels as an argument of the kernel, but not in a list of tensors.
            hosts = [
                t for t in tensors if not isinstance(t, DeviceTensor) and (t.dim() > 0 or name in ("cat", "stack"))
            ]
            if hosts and name not in _HOST_MAY_JOIN:
                raise RuntimeError(f"Expected all tensors to be on the same device: {func} has one on the host")
        if kwargs.get("device") is not None:
            on_device = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        pin = kwargs.pop("pin_memory", None)
        if name == "histc" and not args[0].is_floating_point():  # which a GPU has, and a CPU has not
            args = (args[0].held.double(), *args[1:])
        result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func._schema.is_mutable:
            return next((a for a in (kwargs.get("out"), args[0]) if isinstance(a, Tensor)), result)
        if pin:
            self._pin(result)
        return tree_map(lambda x: _wrapped(x, on_device), result)

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _count_copy(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        if name == "copy_":
            to_device, source = isinstance(args[0], DeviceTensor), args[1]
            non_blocking = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
            if source.dim() == 0 and not isinstance(source, DeviceTensor):
                return  # a number of the host, which travels as an argument of the kernel
        else:
            source, non_blocking = args[0], bool(kwargs.get("non_blocking"))
            device = kwargs.get("device") or source.device
            to_device = torch.device(device).type == DEVICE.type
        if to_device == isinstance(source, DeviceTensor):
            return
        host = source if to_device else args[0] if name == "copy_" else None
        if not non_blocking:
            self._record("to device" if to_device else "to host")
        elif host is not None and not self.is_pinned(host):
            self._record("pageable")
        else:
            self.queued.append(_place())

    def _count(self, name: str, args: Any) -> None:
        if name in ("_local_scalar_dense", "equal"):
            self._record("read")
        elif name in _VALUE_SIZED or (name == "repeat_interleave" and len(args) < 3):
            self._record("size")
        elif name in ("index", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._record("size")
            elif any(not isinstance(index, DeviceTensor) for index in indices):
                self._record("to device")

    def _record(self, kind: str) -> None:
        self.syncs.append(Sync(kind, _place()))


def move(module: nn.Module) -> None:
    """Moves parameters and buffers to `DEVICE`; tied ones stay tied."""
    moved: dict[Tensor, nn.Parameter] = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(parameter.detach().to(DEVICE), parameter.requires_grad)
                each._parameters[name] = moved[parameter]
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = buffer.to(DEVICE)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, DeviceTensor) else value


def _wrapped(value: Any, on_device: bool) -> Any:
    return DeviceTensor(value) if on_device and isinstance(value, Tensor) else value


def _place() -> str:
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        for package in ("megadistill", "transformers"):
            if package in path.parts:
                return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return THE_TEST
