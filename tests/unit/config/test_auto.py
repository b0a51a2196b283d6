"""The values that `auto` takes, and the line about them."""

import shutil
import sysconfig
from pathlib import Path

import pytest

from megadistill.config import auto
from megadistill.config.auto import Choice, choose_compile, describe_choices, install_for_triton, missing_for_triton


def test_auto_compiles_on_an_accelerator_with_triton_alone() -> None:
    assert choose_compile("auto", accelerator=True, triton=True) == ("compiled", "Triton")
    assert choose_compile("auto", accelerator=True, triton=False).value == "eager"
    on_cpu = choose_compile("auto", accelerator=False, triton=True)
    assert on_cpu == ("eager", "a CPU, where compiling takes a minute of C++")
    for accelerator in (False, True):
        assert choose_compile(True, accelerator=accelerator, triton=False) == ("compiled", "by the recipe")
        assert choose_compile(False, accelerator=accelerator, triton=True) == ("eager", "by the recipe")


def test_triton_without_the_means_to_build_its_launchers_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The package alone fails in the first step, an hour into the queue: an image without gcc is common."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(auto, "find_spec", lambda name: None)
    assert missing_for_triton() == "no package triton is installed"
    assert "pip install triton" in install_for_triton("no package triton is installed")
    monkeypatch.setattr(auto, "find_spec", lambda name: object())
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
    headers = {"posix_prefix": tmp_path, "posix_local": tmp_path / "local"}
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(headers[scheme])})
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    assert missing_for_triton() is None, "Debian's own scheme has no headers"
    monkeypatch.setenv("CC", "icx")
    assert missing_for_triton() == "Triton needs a C compiler, and icx is not on the PATH"
    assert install_for_triton(missing_for_triton() or "").startswith("install gcc, or name a compiler")
    choice = choose_compile("auto", accelerator=True)
    assert choice == ("eager", "Triton needs a C compiler, and icx is not on the PATH")
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    (tmp_path / "Python.h").unlink()
    assert missing_for_triton() == "Triton needs Python.h, which this Python lacks"
    assert install_for_triton(missing_for_triton() or "") == "install the headers of this Python (python3-dev)"


def test_keys_with_the_same_choice_and_reason_are_named_together() -> None:
    eager = Choice("eager", "a CPU")
    choices = {"a": Choice("sdpa", "causal alone"), "b": eager, "c": eager, "d": eager}
    assert describe_choices(choices) == "a sdpa (causal alone); b, c and d eager (a CPU)"
