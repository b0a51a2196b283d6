"""The package without its checkout: a wheel, built from the source distribution, in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from megadistill.shipped import FOLDERS
from tests.e2e.commands import environment, settings
from tests.e2e.conftest import TINY, Place
from tests.paths import ROOT

SOURCES = ("megadistill", *FOLDERS, "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SEQUENCE = 32

pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 builds the wheel")


def _run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """The output of a command that must end with `code`, without anything of the checkout in its environment."""
    variables = {name: value for name, value in environment().items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{Path(command[0]).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**variables, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes beside the sources. What a user of the checkout edited must stay there."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "env.sh")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "slurm" / "env.sh").write_text("export SBATCH_ACCOUNT=mine\n")
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    _run(sys.executable, "-c", build, folder / "dist", cwd=folder)
    (built,) = (folder / "dist").glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(source_distribution: Path) -> Path:
    folder = source_distribution.parent
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    _run(*pip, "--wheel-dir", folder, source_distribution, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with the wheel and, in a .pth file, this environment's other packages.

    Python does not read the .pth files of a folder that a .pth file names: an editable installation stays behind.
    """
    environment_folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", environment_folder, cwd=wheel.parent)
    python = environment_folder / "bin" / "python"
    paths = sysconfig.get_paths()
    (packages,) = environment_folder.glob("lib/python*/site-packages")
    lines = dict.fromkeys((paths["purelib"], paths["platlib"]))
    (packages / "dependencies.pth").write_text("".join(f"{line}\n" for line in lines))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    _run(*pip, "--ignore-installed", wheel, cwd=wheel.parent)
    where = _run(python, "-c", "import megadistill; print(megadistill.__file__)", cwd=wheel.parent)
    assert Path(where.strip()).is_relative_to(packages), where
    return python.parent


def test_wheel_and_source_distribution_have_the_shipped_files_and_nothing_private(
    source_distribution: Path, wheel: Path
) -> None:
    files = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in files} - {"slurm/env.sh"}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    shipped = {name.removeprefix("megadistill/shipped/") for name in names if name.startswith("megadistill/shipped/")}
    assert shipped == {*expected, "__init__.py", "mine.yaml"}
    assert "megadistill/accelerators.yaml" in names
    assert not [name for name in names if name.startswith(("tests", "recipes"))]
    with tarfile.open(source_distribution) as tar:
        members = {name.partition("/")[2] for name in tar.getnames()}
    assert expected <= members, "README and the pages name them at the root"
    assert not [name for name in members if name.endswith("slurm/env.sh")]


@pytest.mark.thorough
def test_from_an_empty_folder_to_an_exported_student(bin_folder: Path, place: Place, tmp_path: Path) -> None:
    """The commands of the first recipe, with a tiny teacher and text where it names them."""
    megadistill = bin_folder / "megadistill"
    printed = _run(megadistill, "init", "work", cwd=tmp_path)
    assert "megadistill doctor recipes/mine.yaml" in printed
    work = tmp_path / "work"
    shutil.copytree(place.teacher, work / "models" / "teacher")
    library = Path(sysconfig.get_path("stdlib"))
    split = ["--sequence-length", str(SEQUENCE), "--heldout-fraction", "0", "--output", "data/mine"]
    _run(megadistill, "tokenize", library / "argparse.py", "--tokenizer", "models/teacher", *split, cwd=work)
    tiny = [*TINY, *settings(train__steps=2, train__checkpoint_every=2)]
    recipe = ["recipes/mine.yaml", *tiny]
    checked = _run(megadistill, "doctor", *recipe, cwd=work)
    assert "cpu, the default on a CPU" in checked
    trained = _run(bin_folder / "python", "-m", "megadistill", "train", *recipe, cwd=work)
    assert "step 2" in trained
    _run(megadistill, "export", "runs/mine", "--output", "models/student", cwd=work)
    assert (work / "models" / "student" / "model.safetensors").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.thorough
def test_a_recipe_at_scale_is_planned(bin_folder: Path, tmp_path: Path) -> None:
    _run(bin_folder / "megadistill", "init", ".", cwd=tmp_path)
    cluster = ["--nodes", "8", "--gpus-per-node", "8", "--gpu", "h100", "--sequence-length", "8192"]
    teacher = ["--teacher-config", "recipes/models/gemma-2-27b"]
    recipe = "recipes/gemma2-27b-to-2b/8-nodes.yaml"
    planned = _run(bin_folder / "megadistill", "plan", recipe, *cluster, *teacher, cwd=tmp_path)
    assert "GPU-hours" in planned
