"""The folder of wheels of `make gpu`: what belongs into it, and what is refused before anything is installed."""

import sys
from pathlib import Path

import pytest

from tests.gpu import wheels
from tests.gpu.wheels import WheelError, require_usable

HERE = f"cp{sys.version_info.major}{sys.version_info.minor}"
OTHER = "cp39"


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).write_bytes(b"")
    return path


def test_what_a_machine_with_torch_alone_lacks() -> None:
    names = {line.split("==")[0] for line in wheels.requirements("3.12")}
    assert {"deepspeed", "hjson", "msgpack", "pydantic", "pydantic-core", "omegaconf", "webdataset", "rich"} <= names
    assert not names & {"torch", "numpy", "triton", "transformers", "tokenizers", "matplotlib", "megadistill"}
    assert all(line.count("==") == 1 for line in wheels.requirements("3.12"))


def test_wheels_of_this_python_are_usable(tmp_path: Path) -> None:
    names = ["a-1-py3-none-any.whl", f"b-1-{HERE}-{HERE}-manylinux_2_17_x86_64.whl", "c-1-py2.py3-none-any.whl"]
    names += ["d-1-cp310-abi3-manylinux2014_x86_64.whl"]
    assert len(require_usable(folder_of(tmp_path, *names))) == 4


@pytest.mark.parametrize(
    "name", [f"b-1-{OTHER}-{OTHER}-manylinux_2_17_x86_64.whl", "b-1-py3-none-macosx_11_0_arm64.whl"]
)
def test_wheels_of_another_python_or_machine_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(WheelError) as error:
        require_usable(folder_of(tmp_path, "a-1-py3-none-any.whl", name))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert str(error.value).startswith(f"{name} is not for Python {version} on x86_64: fill ")
    assert f"make gpu-wheels GPU_PYTHON={version}" in str(error.value)


def test_an_empty_folder_is_refused_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "IMPORTS", {"hjson": "hjson_that_is_not_there", "rich": "rich"})
    with pytest.raises(
        WheelError, match="has no wheels, and hjson cannot be imported: fill it where there is a network"
    ):
        require_usable(tmp_path / "wheels-gpu")


def test_more_than_travels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(requirement: str, folder: Path, python: str) -> bool:
        (folder / f"{requirement.replace('==', '-')}-py3-none-any.whl").write_bytes(bytes(1_000_000))
        return True

    monkeypatch.setattr(wheels, "_download", download)
    monkeypatch.setattr(wheels, "MAX_MEGABYTES", 3)
    (tmp_path / "old-1-py3-none-any.whl").write_bytes(b"")
    with pytest.raises(WheelError, match=r"MB of wheels and .* are more than 3 MB; the largest: "):
        wheels.fill(tmp_path, "3.12")
    assert not (tmp_path / "old-1-py3-none-any.whl").exists()


def test_a_package_that_only_a_compiler_makes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode, stderr = 0, ""

    def built(command: list[str], **_: object) -> Done:
        at = Path(command[command.index("--wheel-dir") + 1])
        (at / "fast-1-cp311-cp311-linux_x86_64.whl").write_bytes(b"")
        return Done()

    monkeypatch.setattr("subprocess.run", built)
    with pytest.raises(WheelError, match="was built for this machine alone; fast==1 needs another version"):
        wheels._build("fast==1", tmp_path)
