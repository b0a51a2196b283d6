"""What the device reaches by itself: a large product in bf16, and a large copy."""

import torch

from tests.gpu.device import Device
from tests.gpu.results import Record


def run(device: Device, record: Record) -> None:
    size = device.size(8192, 64)
    left, right = device.random(size, size), device.random(size, size)
    out = torch.empty_like(left)
    source = device.random(device.size(1 << 31, 1 << 12), dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = device.medians(
        {"product": lambda: torch.mm(left, right, out=out), "copy": lambda: target.copy_(source)}, repeats=15
    )
    record(f"product {size}³, bf16", "rate", 2 * size**3 / seconds["product"] / 1e12, "TFLOP/s")
    record("copy on the device", "rate", 2 * source.nbytes / seconds["copy"] / 1e9, "GB/s read and written")
