"""How a command's process ends."""

import os
import sys

import pytest

from megadistill.cli.main import main
from megadistill.train.telemetry.profile_capture import ProfileCapture


class _EndedAtOnce(BaseException):
    """In place of `os._exit`."""


@pytest.mark.parametrize("why", ["a profile", "a replica", None])
def test_a_process_whose_shutdown_could_abort_ends_without_it(why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind torch's profiler, or while a thread waits in torch's store for the loss of another replica."""

    def ended(code: int) -> None:
        assert code == 0
        raise _EndedAtOnce

    monkeypatch.setattr(ProfileCapture, "has_recorded", why == "a profile")
    if why == "a replica":
        monkeypatch.setenv("MEGADISTILL_REPLICA", "0")
    monkeypatch.setattr(os, "_exit", ended)
    monkeypatch.setattr(sys, "argv", ["megadistill", "models"])
    with pytest.raises(_EndedAtOnce if why else SystemExit):
        main()
