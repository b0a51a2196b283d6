"""Imported once by the fork server: everything heavy that a rank test needs, out of the garbage collector's sight."""

import atexit
import gc
import importlib
from contextlib import suppress

import pytest  # noqa: F401

import megadistill.train.loop  # noqa: F401
import tests.ranks.student_cases
import tests.unit.loss.problems  # noqa: F401

# Imported when an engine is made or a first step is taken: a sixth of a rank's time in a test of a few steps.
for name in (
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_repack",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "numpy.ctypeslib",
    "numpy.ma",
    "torch._subclasses.schema_check_mode",
    "torch.profiler._cupti_monitor",
):
    with suppress(ImportError):  # a version without it
        importlib.import_module(name)

# DeepSpeed collects garbage when it starts, and would walk through all that was imported, in each rank.
gc.collect()
gc.freeze()
# At the server's own end extensions report what was never freed.
atexit.register(gc.unfreeze)
