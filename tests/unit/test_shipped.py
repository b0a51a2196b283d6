"""Files that come with the package, and the folder that `megadistill init` makes of them."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from megadistill import shipped
from megadistill.cli.main import run_command
from megadistill.config.load import load_recipe
from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.shipped import FIRST_RECIPE, FOLDERS, shipped_folder, write_starter_files
from tests.paths import ROOT


def _content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "my work"
    write_starter_files(folder)
    return folder


def test_the_folders_of_the_checkout_are_shipped() -> None:
    for name in FOLDERS:
        assert _content(shipped_folder(name)) == _content(ROOT / name)
        assert _content(shipped_folder(name))


def test_a_folder_gets_all_shipped_files_and_a_first_recipe(work: Path) -> None:
    written = _content(work)
    assert written.pop(FIRST_RECIPE) == (ROOT / "megadistill" / "shipped" / "mine.yaml").read_bytes()
    expected = {Path(name, path): content for name in FOLDERS for path, content in _content(ROOT / name).items()}
    expected.pop(Path("slurm", "env.sh"), None)
    assert written == expected


def test_what_a_user_of_a_checkout_edited_is_not_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is an executable bit lost, nor does a read-only installation make read-only copies."""
    here = tmp_path / "installed"
    for name in (*FOLDERS, "slurm"):
        (here / name).mkdir(parents=True, exist_ok=True)
    (here / "mine.yaml").write_text("objective: labels\n")
    (here / "slurm" / "env.sh").write_text("export SBATCH_ACCOUNT=secret\n")
    (here / "slurm" / "rank.sh").write_text("#!/bin/bash\n")
    (here / "slurm" / "rank.sh").chmod(0o555)
    monkeypatch.setattr(shipped, "_here", lambda: here)
    assert write_starter_files(tmp_path / "work") == [FIRST_RECIPE, Path("slurm", "rank.sh")]
    assert not (tmp_path / "work" / "slurm" / "env.sh").exists()
    assert stat.S_IMODE((tmp_path / "work" / "slurm" / "rank.sh").stat().st_mode) == 0o755


def test_nothing_is_overwritten(work: Path) -> None:
    (work / FIRST_RECIPE).write_text("mine\n")
    (work / "slurm" / "lib.sh").unlink()
    (work / "slurm" / "train.sh").write_text("mine too\n")
    before = _content(work)
    with pytest.raises(UserError, match=r"recipes/mine\.yaml, slurm/train\.sh; nothing was written: move them away"):
        write_starter_files(work)
    assert _content(work) == before


def test_many_files_of_others_are_counted(tmp_path: Path) -> None:
    for name in ("cpu", "hpz", "zero3", "zeropp"):
        (tmp_path / "ds_configs").mkdir(exist_ok=True)
        (tmp_path / "ds_configs" / f"{name}.json").mkdir()
    with pytest.raises(UserError, match=r"ds_configs/cpu\.json, .*/hpz\.json, .*/zero3\.json and 1 more; nothing"):
        write_starter_files(tmp_path)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "slurm").write_text("")
    for folder in (tmp_path / "slurm", tmp_path):
        with pytest.raises(UserError, match="slurm is a file, and would become a folder"):
            write_starter_files(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]


def test_files_of_ones_own_stay_and_what_was_interrupted_is_completed(work: Path) -> None:
    complete = _content(work)
    (work / "recipes" / "other.yaml").write_text("mine\n")
    (work / "slurm" / "lib.sh").unlink()
    write_starter_files(work)
    assert _content(work) == {**complete, Path("recipes", "other.yaml"): b"mine\n"}


@pytest.mark.parametrize("at", ["work", "."])
def test_the_command_prints_a_tree_and_the_next_commands(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(["init", at]) == 0
    printed = capsys.readouterr().out
    for part in ("mine.yaml", "zero3.json", "train.sbatch", "models/ (6 files)", "--tokenizer models/teacher"):
        assert part in printed
    verbs = ("tokenize", "doctor", "train", "export", "evaluate", "sample")
    for text in (printed, (ROOT / "megadistill" / "shipped" / "mine.yaml").read_text(encoding="utf-8")):
        assert [verb for verb in re.findall(r"megadistill (\w+)", text) if verb in verbs] == [*verbs, "train"][
            : len(verbs) + ("torchrun" in text)
        ]
    assert ("cd work\n" in printed) is (at == "work")
    assert max(map(len, printed.splitlines())) <= 80
    assert run_command(["init", "work/slurm/lib.sh" if at == "work" else "slurm/lib.sh"]) == 2


def test_a_recipe_of_the_pages_that_is_not_here_is_refused_with_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no recipe recipes/smoke\.yaml .*`megadistill init \.` writes"):
        load_recipe(Path("recipes/smoke.yaml"))
    for other in ("recipes/other.yaml", "smoke.yaml", "recipes"):
        with pytest.raises(UserError, match=r"no recipe .*[^`]$"):
            load_recipe(Path(other))


@pytest.mark.parametrize("script", sorted(shipped_folder("slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_a_job_that_was_submitted_elsewhere_ends_with_the_way_out(script: Path, tmp_path: Path) -> None:
    """Slurm runs a copy of the script: it finds the others by the folder that it was submitted from."""
    variables = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path)}

    def submitted() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", str(script)], env=variables, capture_output=True, text=True, timeout=60)

    done = submitted()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"submit from the folder that has slurm/, not {tmp_path}" in done.stderr
    write_starter_files(tmp_path)
    done = submitted()
    assert (done.returncode, done.stdout) == (2, "")
    assert "cp slurm/env.sh.example slurm/env.sh, and edit it" in done.stderr


def test_every_recipe_loads_from_the_folder_and_has_its_config_or_the_command_that_makes_it(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    paths = [path for path in sorted(Path("recipes").rglob("*.yaml")) if "base" not in path.stem]
    assert FIRST_RECIPE in paths
    for path in paths:
        source = load_recipe(path, ["run.folder=runs/mine"]).student.config  # recipes/results leave it to their command
        if isinstance(source, str) and source.startswith("runs/"):
            assert f"--output {source}\n" in path.read_text(encoding="utf-8"), path
        else:
            load_config(Path(source) if isinstance(source, str) else source, what="student.config")


def test_the_first_recipe_lacks_only_the_readers_files_and_names_the_commands(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setenv("COLUMNS", "400")
    assert run_command(["doctor", str(FIRST_RECIPE)]) == 2
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines() if "✗" in line]
    failed = {row[2]: row[3] for row in rows}
    assert failed.keys() == {"data", "teacher"}, failed
    assert "megadistill tokenize" in failed["data"]
    assert "hf download ORG/MODEL --local-dir models/teacher" in failed["teacher"]
