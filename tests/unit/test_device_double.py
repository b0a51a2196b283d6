"""The device double itself: what it records and refuses is what a device would wait for and refuse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.device_double import DEVICE, DeviceDouble, DeviceTensor

SYNCS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "moved": lambda x: torch.ones(3).to(x.device),
    "copied": lambda x: x.copy_(torch.ones(4)),
    "pageable": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "list of rows": lambda x: x[[0, 1]],
    "rows of the host": lambda x: x[torch.tensor([0, 1])],
    "mask": lambda x: x[x > 0],
    "written by mask": lambda x: x.__setitem__(x > 0, torch.zeros((), device=x.device)),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.masked_select(x > 0),
    "repeat": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=x.device).fill_(2)),
}

QUEUED: dict[str, Callable[[Tensor], object]] = {
    "new_full": lambda x: x.new_full((2,), 1.0),
    "zeros": lambda x: torch.zeros(2, device=x.device),
    "scalar": lambda x: torch.where(x > 0, x, 0) + 1.5,
    "written": lambda x: x.__setitem__(0, -1.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, -1.0),
    "rows": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "pinned": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "into pinned": lambda x: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True),
    "backward": lambda x: torch.autograd.grad((y := x.clone().requires_grad_()).square().sum(), y),
}


@pytest.mark.parametrize("name", SYNCS)
def test_waits_of_the_host_are_recorded(name: str) -> None:
    with DeviceDouble() as double:
        x = torch.ones(4, device=DEVICE)
        SYNCS[name](x)
    assert double.syncs


@pytest.mark.parametrize("name", QUEUED)
def test_work_that_the_host_only_queues_is_not(name: str) -> None:
    with DeviceDouble() as double:
        x = torch.ones(4, device=DEVICE)
        QUEUED[name](x)
    assert double.syncs == []


def test_its_numbers_are_those_of_the_cpu_gradients_included() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(4, 3, generator=generator), torch.randn(5, 3, generator=generator)

    def gradient(w: Tensor, x: Tensor) -> Tensor:
        w = w.clone().requires_grad_()
        (grad,) = torch.autograd.grad((x @ w.T).softmax(dim=1)[:, 0].log().sum(), w)
        return grad

    with DeviceDouble():
        on_device = gradient(w.to(DEVICE), x.to(DEVICE))
        assert isinstance(on_device, DeviceTensor)
        assert on_device.device == DEVICE
        moved = on_device.cpu()
    torch.testing.assert_close(moved, gradient(w, x), rtol=0, atol=0)


def test_a_tensor_on_the_host_beside_one_on_the_device_is_refused() -> None:
    with DeviceDouble(), pytest.raises(RuntimeError, match="same device"):
        torch.ones(4, device=DEVICE) + torch.ones(4)
