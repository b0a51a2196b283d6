"""A target is tried before the work; a file is whole or as it was; an error of the system is one line with a way out.

A command with an unwritable target is a line of tests/unit/cli/unwritable_targets.yaml.
"""

import errno
import os
import resource
import shlex
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from megadistill.cli import evaluate as command
from megadistill.cli import train as train_command
from megadistill.cli.main import parser, run_command
from megadistill.config.paths import wrong_run_folder
from megadistill.errors import UserError
from megadistill.io import write_file, write_json
from megadistill.outputs import naming, one_line, require_writable_file, require_writable_folder
from tests.paths import RECIPES, ROOT

COMMANDS = yaml.safe_load((ROOT / "tests/unit/cli/unwritable_targets.yaml").read_text(encoding="utf-8"))
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("line", COMMANDS)
def test_an_unwritable_target_is_refused_before_the_work(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"file": tmp_path / "file", "folder": tmp_path / "folder", "recipe": RECIPES / "smoke.yaml"}
    names["file"].write_text("mine")
    names["folder"].mkdir()
    assert run_command(shlex.split(line.format(**names))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert f"{tmp_path}/f" in error, error
    assert "name" in error, error
    assert names["file"].read_text() == "mine"
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file", "folder"], "something was left behind"


def test_every_command_that_writes_is_in_the_table() -> None:
    assert {line.split()[0] for line in COMMANDS} == {
        "evaluate", "sample", "lm-eval", "doctor", "plan", "timeline", "tokenize", "vocab-map", "generate", "export",
        "prune", "store-targets",
    }  # fmt: skip


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_place_that_takes_no_bytes_is_refused(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**where: Any) -> None:
        raise OSError(number, os.strerror(number), "/somewhere/tmpx1")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError) as caught:
        require_writable_file(tmp_path / "x.json", "--json")
    assert str(caught.value).startswith(f"--json {tmp_path}/x.json cannot be written: {os.strerror(number)}: ")
    assert "tmpx1" not in str(caught.value)


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    require_writable_file(tmp_path / "old.json", "--json")
    require_writable_file(tmp_path / "new" / "deep" / "x.json", "--json")
    require_writable_file(Path("/dev/stdout"), "--json")
    require_writable_file(None, "--json")
    require_writable_folder(tmp_path / "new", "--output")
    assert [each.name for each in tmp_path.rglob("*")] == ["old.json"]


@pytest.mark.parametrize("name", ["a\0b", "a\udc80b"])
def test_a_name_that_is_no_text_is_refused_before_the_work(tmp_path: Path, name: str) -> None:
    says = "cannot be written: its name has a NUL byte or is not UTF-8"
    with pytest.raises(UserError, match=says):
        require_writable_file(tmp_path / name, "--json")
    with pytest.raises(UserError, match=says):
        require_writable_folder(tmp_path, "--output", given=tmp_path / name)
    with pytest.raises(UserError, match=says):
        require_writable_folder(tmp_path / name / "new", "--output")
    assert wrong_run_folder(tmp_path / name) is not None


def test_a_full_disk_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})
    before = path.read_text()
    with limited_files(1 << 16), pytest.raises(OSError, match="File too large") as caught:
        write_file(path, "x" * (1 << 20))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    assert one_line(caught.value).startswith(f"{path}: File too large: raise the limit on the size of files")


def test_errors_of_rust_libraries_name_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with limited_files(1 << 16), pytest.raises(OSError, match="File too large") as caught, naming(path):
        save_file({"weight": np.zeros(1 << 18, np.float32)}, path)
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("name", ["null", "stdout"])
def test_a_device_stays_a_device(name: str) -> None:
    device = Path("/dev") / name
    before = device.lstat().st_mode
    write_json(Path("/dev/null"), {"old": 1})
    assert device.lstat().st_mode == before


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real.json")
    write_json(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real.json").read_text() == "1\n"


def test_a_full_disk_is_one_line_with_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def full(*arguments: Any) -> None:
        raise FULL

    monkeypatch.setattr("os.fsync", full)
    assert run_command(["init", str(tmp_path / "new")]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}/new/" in error
    assert "No space left on device: free some space there" in error
    assert not [each for each in (tmp_path / "new").rglob("*") if each.is_file()], "half a file"


def test_results_are_printed_before_they_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A full disk at the end of hours costs the file alone: the table is on the terminal, and the plots are tried."""
    happened: list[str] = []

    @contextmanager
    def nothing(*arguments: object) -> Iterator[Namespace]:
        yield Namespace(is_first=True)

    def full(path: Path, results: object) -> None:
        happened.append("json")
        raise FULL

    monkeypatch.setattr("megadistill.progress.console_progress", nothing)
    monkeypatch.setattr("megadistill.evaluate.evaluate.ranks", nothing)
    monkeypatch.setattr("megadistill.evaluate.evaluate.evaluate", lambda *models, **options: [])
    monkeypatch.setattr("megadistill.heldout.splits.load_splits", lambda *given, **options: {})
    monkeypatch.setattr("megadistill.evaluate.evaluation_tables.tables", lambda results: [])
    section = "megadistill.report.sections.evaluation_section"
    monkeypatch.setattr(f"{section}.write_plots", lambda *what: happened.append("plots"))
    monkeypatch.setattr(command, "print_tables", lambda *tables: happened.append("tables"))
    monkeypatch.setattr(command, "write_json", full)
    arguments = ["evaluate", "m", "--data", "d", "--json", str(tmp_path / "x"), "--plots", str(tmp_path)]
    options = parser().parse_args(arguments)
    with pytest.raises(OSError, match="No space"):
        command._evaluate(options)
    assert happened == ["tables", "json", "plots"]


def test_doctor_names_bad_nodes_on_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Namespace(table=lambda: "a table", to_json=dict, bad_nodes=["node7"], ok=False)

    def full(path: Path, values: object) -> None:
        raise FULL

    monkeypatch.setattr("megadistill.doctor.examine.examine_node", lambda recipe, overrides: report)
    monkeypatch.setattr(train_command, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        train_command._doctor(Namespace(node=True, json=tmp_path / "x", recipe=Path("r"), set=[]))
    out = capsys.readouterr().out
    assert "a table" in out
    assert "bad nodes: node7" in out
