"""Layers of Gemma 2 27B at 8,192 tokens as a run has them: the student's with each way of checkpointing, eager and
compiled, and the teacher's stage, eager, compiled and in float8.

Two layers, a sliding and a full one, by the package's own functions. Rates count the layers' matrix products (2 FLOPs a
parameter and token forward, three times that with the backward pass), attention's scores and what is recomputed aside.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadistill.config.recipe import Checkpointing
from megadistill.models.families import build_decoder, forward_inputs, load_config, rebuild_buffers
from megadistill.models.layers import checkpoint_layers, compile_layers
from megadistill.teacher.float8 import Float8Module, use_float8, weight_to_float8
from megadistill.teacher.stage import TeacherStage
from tests.gpu.device import Device
from tests.gpu.loss_numerics import relative_error
from tests.gpu.results import Record

CONFIG = Path(__file__).resolve().parents[2] / "recipes/models/gemma-2-27b"
LAYERS = 2
STUDENTS: tuple[tuple[bool, Checkpointing], ...] = (
    (False, "none"),
    (True, "none"),
    (False, "selective"),
    (True, "selective"),
    (False, "full"),
)
"""Compiled, and what is recomputed. The first is the truth of the others."""
STAGES = (("eager", False, False), ("compiled", True, False), ("compiled, float8", True, True))
"""Name, compiled, float8."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}


def _config(device: Device) -> Any:
    """Small where a CPU stands in."""
    config = load_config(CONFIG, what="the recipe's teacher")
    if device.stand_in:
        for name, value in TINY.items():
            setattr(config, name, value)
        config.sliding_window = 32
    return config


def _fill(decoder: Any, device: Device, *, float8: bool = False) -> None:
    """Gives a decoder that is on meta random weights in bf16; in float8 those are rounded."""
    torch.manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    if float8:
        use_float8(decoder)
    for name, shape in shapes.items():
        deviation = 0.0 if len(shape) == 1 else shape[-1] ** -0.5
        weight = device.random(*shape, deviation=deviation)
        place, _, last = name.rpartition(".")
        module = decoder.get_submodule(place)
        if isinstance(module, Float8Module):
            module.place(last, *weight_to_float8(weight), dtype=weight.dtype)
        else:
            setattr(module, last, torch.nn.Parameter(weight))
    rebuild_buffers(decoder)


def _decoder(config: Any) -> Any:
    """Layers and norm on meta, without an embedding: they are called with hidden states."""
    decoder: Any = build_decoder(config, layers=range(LAYERS), attention="flex")
    decoder.embed_tokens = torch.nn.Identity()
    return decoder


def _flops(decoder: Any, S: int) -> float:
    sizes: list[int] = [parameter.numel() for parameter in decoder.layers.parameters() if parameter.ndim == 2]
    return 2.0 * S * sum(sizes)


def student(device: Device, record: Record, config: Any, S: int) -> None:
    """Forward and backward: time, peak of the memory, and the gradient beside that of eager layers."""
    x, upstream = device.random(1, S, config.hidden_size), device.random(1, S, config.hidden_size)
    truth, memory = None, None
    for compiled, mode in STUDENTS:
        case = f"student, {'compiled' if compiled else 'eager'}, checkpointing {mode}"
        with record.part(case), device.compiling():
            torch.compiler.reset()
            decoder = _decoder(config)
            _fill(decoder, device)
            checkpoint_layers(decoder, mode)
            if compiled:
                compile_layers(decoder)
            weights = list(decoder.layers.parameters())

            def both(decoder: Any = decoder, weights: list[Tensor] = weights) -> tuple[Tensor, ...]:
                hidden = decoder(**forward_inputs(decoder, x, None)).last_hidden_state
                return torch.autograd.grad(hidden, weights, upstream)

            gradient, peak = both()[0].float(), device.peak_bytes(both)
            truth, memory = (gradient, peak) if truth is None or memory is None else (truth, memory)
            record(case, "error of dW of q, to the first", relative_error(gradient, truth))
            record(case, "peak memory", peak / 2**20, "MiB")
            record(case, "peak memory, to the first", peak / memory)
            seconds = device.medians({"both": both}, repeats=5)["both"]
            record(case, "forward and backward", 1e3 * seconds, "ms")
            record(case, "rate", 3 * _flops(decoder, S) / seconds / 1e12, "TFLOP/s")
            del decoder, weights, both
        device.free()


def stage(device: Device, record: Record, config: Any, S: int) -> None:
    """A frozen stage in the middle of the teacher: forward alone, and how far float8 is from bf16."""
    x = device.random(1, S, config.hidden_size)
    truth: Tensor | None = None
    for name, compiled, float8 in STAGES:
        case = f"teacher's stage, {name}"
        with record.part(case), device.compiling(), torch.no_grad():
            torch.compiler.reset()
            decoder = _decoder(config)
            flops = _flops(decoder, S)
            _fill(decoder, device, float8=float8)
            loaded = TeacherStage(decoder, stage=1, stages=3)
            if compiled:
                loaded.compile_parts()

            def forward(loaded: TeacherStage = loaded) -> Tensor:
                out: Tensor = loaded(x)
                return out

            out = forward().float()
            truth = out if truth is None else truth
            record(case, "error of the output, to the first", relative_error(out, truth))
            record(case, "weights", sum(t.nbytes for _, t in loaded.weights()) / 2**20, "MiB")
            record(case, "peak memory beside them", device.peak_bytes(forward) / 2**20, "MiB")
            seconds = device.medians({"forward": forward}, repeats=5)["forward"]
            record(case, "forward", 1e3 * seconds, "ms")
            record(case, "rate", flops / seconds / 1e12, "TFLOP/s")
            del decoder, loaded, forward
        device.free()


def run(device: Device, record: Record) -> None:
    config, S = _config(device), device.size(8192, 64)
    stage(device, record, config, S)
    student(device, record, config, S)
