"""Inductor's Triton kernels of the functions of `loss.pointwise` for an H100, made and compiled without a GPU.

`python -m tests.triton.generated` prints JSON: function -> its kernels. Tensors are fake ones of a device `cuda`, and
what a CPU build of torch cannot answer about that device is answered here; so it is a process of its own.

Legend: n tokens, v rows of a slice of the vocabulary.
"""

import importlib
import importlib.util
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megadistill.divergence import DivergenceKind
from megadistill.loss import pointwise
from megadistill.loss.pointwise import Formula, GradCoefs, LabelCoefs, SoftmaxBlock
from megadistill.types import LogitTransform

n, v = 2048, 32_000
H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65_536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
)
MODE = FakeTensorMode()


def main() -> None:
    warnings.simplefilter("ignore")
    stand_in_for_a_gpu()
    print(json.dumps({name: described(generated(function, make())) for name, (function, make) in CASES.items()}))


def stand_in_for_a_gpu() -> None:
    """Answers for a device `cuda:0` that is an H100."""
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    importlib.import_module("triton.runtime").driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_active_torch_device=lambda: torch.device("cuda"),
        )
    )
    replaced: list[tuple[Any, str, Any]] = [
        (fake_tensor, "init_gpu_context", lambda *_: None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda *_: H100),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (torch.cuda, "_exchange_device", lambda index: index),
        (torch.cuda, "_maybe_exchange_device", lambda index: +index),
        (CudaInterface, "get_device_properties", staticmethod(lambda *_: H100)),
        (CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: H100)),
        (torch.Tensor, "copy_", lambda self, source, _=False: torch.ops.aten.copy_.default(self, source)),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        # These make real tensors of the device: patterns of attention, and constants.
        (joint_graph, "lazy_init", lambda *_, **__: None),
        (post_grad, "lazy_init", lambda *_, **__: None),
        (config, "joint_graph_constant_folding", False),
        (config, "force_disable_caches", True),
        (config, "use_static_triton_launcher", False),
    ]
    for owner, name, value in replaced:
        setattr(owner, name, value)


def generated(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """The module that Inductor writes for the function as the loss compiles it."""
    sources: list[str] = []

    def keep(graph: GraphLowering) -> None:
        wrapper, _ = graph.codegen()
        sources.append(wrapper.value)
        raise InterruptedError("nothing here can run it")

    GraphLowering.compile_to_module = keep  # type: ignore[method-assign, assignment]
    with MODE:
        try:
            pointwise.compiled(function)(*arguments)
        except Exception:
            if not sources:
                raise
    (source,) = sources
    return source


def described(source: str) -> dict[str, Any]:
    """A module's kernels, compiled, and the dtypes of the [n, v] matrices that it allocates."""
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", source, re.DOTALL)
    return {
        "kernels": [binaries(name, text) for name, text in kernels],
        "matrices": re.findall(r"empty_strided_cuda\(\(s\d+, s\d+\), .*?, torch\.(\w+)\)", source),
    }


def binaries(name: str, text: str) -> list[dict[str, Any]]:
    """A kernel's configurations, compiled for the target: its architecture and bytes of machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        kernel.precompile(warm_cache_only=True)
    compiled = [result.kernel for result in kernel.compile_results]
    return [
        {"target": re.findall(r"\.target (\w+)", each.asm["ptx"]), "bytes": len(each.asm["cubin"])} for each in compiled
    ]


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return FakeTensor(MODE, torch.empty(shape, device="meta", dtype=dtype), torch.device("cuda:0"))


def block() -> SoftmaxBlock:
    return SoftmaxBlock(fake(n, v), fake(n), fake(n), fake(n))


def coefs() -> GradCoefs:
    return GradCoefs(fake(n), LabelCoefs(fake(n), fake(n), fake(n), fake(v)))


def dlogits() -> Tensor:
    return fake(n, v, dtype=torch.bfloat16)


JSD = Formula(DivergenceKind.JSD, 1.0, 0.5)
CAPPED = LogitTransform(softcap=30.0)

CASES: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "slice_stats": (pointwise.slice_stats, lambda: (fake(n, v), fake(v), 1.0)),
    "apply_transform_": (pointwise.apply_transform_, lambda: (fake(n, v), None, CAPPED)),
    "forward_kl": (pointwise.forward_kl, lambda: (block(), block(), 1.0, coefs(), CAPPED, dlogits())),
    "mean_centred_stats": (pointwise.mean_centred_stats, lambda: (block(), block(), JSD)),
    "write_mean_centred_dlogits": (
        pointwise.write_mean_centred_dlogits,
        lambda: (block(), block(), JSD, fake(n), coefs(), CAPPED, dlogits()),
    ),
    "write_student_dlogits": (pointwise.write_student_dlogits, lambda: (block(), 1.0, coefs(), CAPPED, dlogits())),
    "tail_sum": (pointwise.tail_sum, lambda: (fake(n, v), fake(n, v, dtype=torch.bool), fake(n), 1.0)),
    "pairwise_terms": (pointwise.pairwise_terms, lambda: (block(), block())),
}

if __name__ == "__main__":
    main()
