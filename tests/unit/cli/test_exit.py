"""How a command's process ends."""

import os
import sys

import pytest

from megadistill.cli.main import main
from megadistill.train.telemetry.profile_capture import ProfileCapture


class _EndedAtOnce(BaseException):
    """In place of `os._exit`."""


@pytest.mark.parametrize("recorded", [True, False])
def test_a_process_that_recorded_a_profile_ends_without_the_interpreters_shutdown(
    recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind torch's profiler the shutdown ends some runs by a segmentation fault, when all is stored."""

    def ended(code: int) -> None:
        assert code == 0
        raise _EndedAtOnce

    monkeypatch.setattr(ProfileCapture, "has_recorded", recorded)
    monkeypatch.setattr(os, "_exit", ended)
    monkeypatch.setattr(sys, "argv", ["megadistill", "models"])
    with pytest.raises(_EndedAtOnce if recorded else SystemExit):
        main()
