"""Copies of 1.7 GB from the device to the host, a rank's share of a 9B student on 64 GPUs: pageable and pinned memory.

A checkpoint's stall is the pinned copy at the link's speed; pageable memory goes through the driver's own buffer.
"""

import torch

from tests.gpu.device import Device
from tests.gpu.results import Record

TENSORS = 64


def run(device: Device, record: Record) -> None:
    elements = device.size(1_700_000_000, 64_000) // 4 // TENSORS
    sources = [device.random(elements, dtype=torch.float32) for _ in range(TENSORS)]
    pageable = torch.empty(TENSORS, elements)
    pinned = pageable if device.stand_in else torch.empty(TENSORS, elements, pin_memory=True)

    def new() -> list[torch.Tensor]:
        return [source.to("cpu", copy=True) for source in sources]

    def into_pageable() -> None:
        for row, source in zip(pageable, sources, strict=True):
            row.copy_(source)

    def into_pinned() -> None:
        for row, source in zip(pinned, sources, strict=True):
            row.copy_(source, non_blocking=True)

    size = 4 * elements * TENSORS
    runs = {"new pageable memory": new, "kept pageable memory": into_pageable, "kept pinned memory": into_pinned}
    for name, seconds in device.medians(runs, repeats=3, warm_up=1).items():
        record(f"{size / 1e9:.1f} GB to {name}", "time", 1e3 * seconds, "ms")
        record(f"{size / 1e9:.1f} GB to {name}", "rate", size / seconds / 1e9, "GB/s")
    into_pinned()
    device.synchronize()
    equal = all(torch.equal(row, source.cpu()) for row, source in zip(pinned, sources, strict=True))
    record("kept pinned memory", "equal to the source", equal)
