"""Imported once by the fork server: everything heavy that a rank test needs."""

import importlib.util

if importlib.util.find_spec("megadistill.student.engine"):
    import megadistill.student.engine  # noqa: F401
