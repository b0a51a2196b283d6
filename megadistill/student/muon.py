"""DeepSpeed's Muon optimizer, which no recipe has, imported before DeepSpeed imports it with a compiler around it."""

import importlib
from contextlib import suppress

from deepspeed.runtime import compiler


def import_uncompiled() -> None:
    """Imports it without `torch.compile` around its functions.

    DeepSpeed imports it with every engine, and those decorators load torch's compiler: a fifth of a start on a CPU.
    """
    compile_ = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        with suppress(ImportError):  # a version without it
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_
