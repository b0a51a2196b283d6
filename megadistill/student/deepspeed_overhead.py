"""Work of DeepSpeed that no run needs, removed: compilers at each start, a process at each reduction."""

import functools
import importlib
from contextlib import suppress

import deepspeed.ops
from deepspeed.runtime import compiler
from deepspeed.utils import numa


def remove_overhead() -> None:
    """Removes what DeepSpeed does beside its work; once a process, before an engine is made.

    Its Muon optimizer, which no recipe has, is imported with every engine, and `torch.compile` around its functions
    loads the compiler: a fifth of a start on a CPU. There ZeRO-3 counts the devices at each reduction of gradients, by
    a process `numactl`, whose fork takes some milliseconds.

    Whether its C++ operators can be built is looked up for one of them, by the process group's start: on a CPU that
    operator, for inference alone, would be compiled at every start for a minute, and a killed build leaves a lock that
    hangs every later run. An answer that is there already spares the compiler, which tries all operators otherwise.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    compile_ = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with suppress(ImportError):  # a version without it
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_
    numa.get_numa_cores = functools.cache(numa.get_numa_cores)
