"""Imported once by the fork server: everything heavy that a rank test needs."""

import megadistill.student.engine  # noqa: F401
