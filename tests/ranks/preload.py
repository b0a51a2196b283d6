"""Imported once by the fork server: everything heavy that a rank test needs, out of the garbage collector's sight."""

import atexit
import gc

import pytest  # noqa: F401

import megadistill.train.loop  # noqa: F401
import tests.ranks.student_cases
import tests.unit.loss.problems  # noqa: F401

# DeepSpeed collects garbage when it starts, and would walk through all that was imported, in each rank.
gc.collect()
gc.freeze()
# At the server's own end extensions report what was never freed.
atexit.register(gc.unfreeze)
