"""The packages that a machine with torch, triton, transformers and numpy alone lacks, as a folder of wheels.

    python -m tests.gpu.wheels wheels-gpu --python 3.12    # fills it (`make gpu-wheels`); needs a network

`make gpu` installs from that folder, without a network, into a folder of its own. Wheels are of the versions of
constraints.txt. deepspeed and other packages that have sources alone are built here, without compiled parts.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PRESENT = ("torch", "triton", "transformers", "numpy")
"""What is there already."""

OF_THOSE = (
    "huggingface-hub", "tokenizers", "safetensors", "pyyaml", "packaging", "tqdm", "jinja2", "markupsafe", "setuptools",
)  # fmt: skip
"""What torch and transformers need in every version. What the newest one needs besides travels."""

LEFT_OUT = ("matplotlib", "pillow", "tensorboard-data-server")
"""Dependencies that no check imports."""

ADDED = ("liger-kernel==0.8.5", "cut-cross-entropy==25.1.1")
"""Other people's losses, which the check `loss_speed` compares ours with. They need triton."""

IMPORTS = {
    "deepspeed": "deepspeed", "pydantic": "pydantic", "omegaconf": "omegaconf", "webdataset": "webdataset",
    "sentencepiece": "sentencepiece", "safetensors": "safetensors", "tensorboard": "tensorboard", "rich": "rich",
    "Jinja2": "jinja2", "PyYAML": "yaml", "protobuf": "google.protobuf", "tokenizers": "tokenizers",
}  # fmt: skip
"""Packages that `megadistill train` imports -> their modules."""

MAX_MEGABYTES = 60
"""Of the wheels and the repository's files together: what travels to a machine without a network."""

PLATFORMS = (
    *(f"manylinux_2_{glibc}_x86_64" for glibc in (39, 35, 34, 31, 28, 27, 24, 17)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)


class WheelError(Exception):
    """The folder does not serve: one line that says why, and the way out."""


def missing_packages() -> list[str]:
    """The packages of `IMPORTS` that this Python lacks."""
    return [package for package, module in IMPORTS.items() if not _can_import(module)]


def _can_import(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of a parent package
        return False


def install(folder: Path, site: Path) -> None:
    """Installs all wheels of the folder into `site`, without a network.

    Raises:
        WheelError: there are none, they are for another Python or machine, or pip fails.
    """
    files = require_usable(folder)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(site), *map(str, files)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PIP_CONSTRAINT": ""}
    )
    if done.returncode:
        raise WheelError(f"pip cannot install {folder}: {_last_line(done.stderr)}")


def require_usable(folder: Path) -> list[Path]:
    """The wheels of the folder.

    Raises:
        WheelError: there are none, or some are not for this Python on this machine.
    """
    files = sorted(folder.glob("*.whl"))
    if not files:
        missing = ", ".join(missing_packages())
        raise WheelError(
            f"{folder}/ has no wheels, and {missing} cannot be imported: fill it where there is a network "
            f"(make gpu-wheels GPU_PYTHON={_this_python()}), and bring it here with the tree"
        )
    for file in files:
        if not _fits(file.stem):
            raise WheelError(
                f"{file.name} is not for Python {_this_python()} on {platform.machine()}: fill {folder}/ again, "
                f"with make gpu-wheels GPU_PYTHON={_this_python()}"
            )
    return files


def _fits(stem: str) -> bool:
    """Whether a wheel of this name (`name-version-python-abi-platform`) is for this Python and processor."""
    pythons, abi, platforms = stem.split("-")[-3:]
    ours = "cp" + _this_python().replace(".", "")
    for python in pythons.split("."):
        older = python.startswith("cp3") and int(python[3:]) <= sys.version_info.minor and "abi3" in abi
        if python.startswith("py3") or python == ours or older:
            return platforms == "any" or platform.machine() in platforms
    return False


def _this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def requirements(python: str) -> list[str]:
    """`name==version` of every package that the project needs and such a machine lacks, for that Python.

    Read from the packages that are installed here (`make install`).
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names, pins = _closure(map(_name, project), without={*PRESENT, *OF_THOSE, *LEFT_OUT}, python=python), _pins()
    return sorted(f"{name}=={pins.get(name) or importlib.metadata.version(name)}" for name in names)


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {_name(name): version for name, version in pairs}


def _name(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def _closure(names: Iterable[str], *, without: set[str], python: str) -> set[str]:
    """The packages and all that they need, extras aside; those of `without` and what they alone need are left out."""
    done: set[str] = set()
    waiting = list(names)
    while waiting:
        if (name := waiting.pop()) not in done | without:
            done.add(name)
            waiting.extend(_needs(name, python))
    return done


def _needs(name: str, python: str) -> Iterator[str]:
    from packaging.requirements import Requirement  # of the environment of `make install`, not of this module's users

    lines = importlib.metadata.requires(name) or []
    target = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(target):
            yield _name(requirement.name)


def fill(folder: Path, python: str) -> None:
    """Downloads or builds the wheels, after the ones that are there were removed.

    Raises:
        WheelError: one cannot be had, or all of them with the repository's files are over `MAX_MEGABYTES`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    for requirement in [*requirements(python), *ADDED]:
        if not _download(requirement, folder, python):
            _build(requirement, folder)
    wheels = _megabytes(folder.glob("*.whl"))
    tree = _megabytes(_repository_files())
    print(
        f"{len(list(folder.glob('*.whl')))} wheels for Python {python} in {folder}/: {wheels:.1f} MB, tree {tree:.1f}"
    )
    if wheels + tree > MAX_MEGABYTES:
        largest = sorted(folder.glob("*.whl"), key=lambda file: -file.stat().st_size)[:3]
        raise WheelError(
            f"{wheels:.1f} MB of wheels and {tree:.1f} MB of files are more than {MAX_MEGABYTES} MB; the largest: "
            + ", ".join(f"{file.name} ({_megabytes([file]):.1f})" for file in largest)
        )


def _download(requirement: str, folder: Path, python: str) -> bool:
    """Whether there is a wheel for that Python on x86-64 Linux."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    command += [str(folder), "--python-version", python, "--implementation", "cp"]
    for each in PLATFORMS:
        command += ["--platform", each]
    return subprocess.run([*command, requirement], capture_output=True, check=False).returncode == 0


def _build(requirement: str, folder: Path) -> None:
    """A wheel from sources, which must have no compiled part, since it is for another Python.

    Raises:
        WheelError: it cannot be built, or it has one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, requirement]
        environment = {**os.environ, "DS_BUILD_OPS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        built = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(built) != 1:
            raise WheelError(f"no wheel of {requirement} can be had or built: {_last_line(done.stderr)}")
        if not built[0].stem.endswith("-none-any"):
            raise WheelError(f"{built[0].name} was built for this machine alone; {requirement} needs another version")
        os.replace(built[0], folder / built[0].name)


def _repository_files() -> Iterator[Path]:
    """Files that git tracks, or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return (ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file())


def _megabytes(files: Iterable[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed no reason"


def main() -> int:
    options = argparse.ArgumentParser(description="Fills a folder with the wheels that `make gpu` needs.")
    options.add_argument("folder", type=Path)
    options.add_argument("--python", default="3.12", help="of the machine with the GPU (default %(default)s)")
    arguments = options.parse_args()
    if not re.fullmatch(r"3\.\d+", arguments.python):
        options.error(f"--python {arguments.python}: name a version such as 3.12")
    try:
        fill(arguments.folder, arguments.python)
    except WheelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
