"""The copy of a teacher on a node's disk: made once, verified by its content, refused where it cannot be right."""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megadistill.errors import UserError
from megadistill.io import locked_folder, read_json
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.teacher import local_copy
from megadistill.teacher.local_copy import RECORD, copy_folder, describe_copy, make_copy
from megadistill.units import readable
from tests.unit.models.cases import saved_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "teacher"
    saved_model("llama", folder, shard_size="30KB")
    return folder


@pytest.fixture
def teacher(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are copied."""
    names: list[str] = []
    copy = local_copy._copy

    def counted(source: Path, target: Path) -> str:
        names.append(source.name)
        return copy(source, target)

    monkeypatch.setattr(local_copy, "_copy", counted)
    return names


def test_a_copy_is_made_once_and_is_the_teacher(teacher: Path, tmp_path: Path, copied: list[str]) -> None:
    first = make_copy(teacher, tmp_path / "scratch")
    folder = copy_folder(teacher, tmp_path / "scratch")
    assert teacher_fingerprint(folder) == teacher_fingerprint(teacher)
    files = {path.name for path in teacher.iterdir()} - {"generation_config.json"}
    assert sorted(copied) == sorted(files)
    assert {path.name for path in folder.iterdir()} == {*files, RECORD}
    for name, each in read_json(folder / RECORD)["files"].items():
        assert each["sha256"] == hashlib.sha256((teacher / name).read_bytes()).hexdigest()
    copied.clear()
    assert make_copy(teacher, tmp_path / "scratch") == first
    assert copied == []


def _flip(path: Path) -> None:
    """A byte in the middle, with the size and the time of before."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _partly_written(path: Path) -> None:
    path.rename(path.with_name(f".{path.name}.tmp"))


@pytest.mark.parametrize(
    "damage",
    [_flip, _partly_written, Path.unlink, lambda path: os.truncate(path, 10), lambda path: path.write_bytes(b"")],
)
def test_a_damaged_file_is_copied_again(
    damage: Callable[[Path], None], teacher: Path, tmp_path: Path, copied: list[str]
) -> None:
    first = make_copy(teacher, tmp_path / "scratch")
    folder = copy_folder(teacher, tmp_path / "scratch")
    copied.clear()
    damaged = next(folder.glob("*.safetensors"))
    damage(damaged)
    assert make_copy(teacher, tmp_path / "scratch") == first
    assert copied == [damaged.name]
    assert damaged.read_bytes() == (teacher / damaged.name).read_bytes()
    assert not list(folder.glob(".*"))


def test_another_content_of_the_teacher_is_copied_again(teacher: Path, tmp_path: Path) -> None:
    first = make_copy(teacher, tmp_path / "scratch")
    changed = next(teacher.glob("*.safetensors"))
    _flip(changed)
    os.utime(changed)  # an edit
    assert make_copy(teacher, tmp_path / "scratch") != first
    assert (copy_folder(teacher, tmp_path / "scratch") / changed.name).read_bytes() == changed.read_bytes()


def test_a_teacher_written_again_in_another_number_of_files_is_copied_whole(
    teacher: Path, tmp_path: Path, original: Path
) -> None:
    """Files of the other form would be a second model in the folder."""
    folder = copy_folder(teacher, tmp_path / "scratch")
    one_file = tmp_path / "one-file"
    saved_model("llama", one_file)
    assert {WEIGHTS} == {path.name for path in one_file.glob("*.safetensors*")}
    for form in (original, one_file, original):
        shutil.rmtree(teacher)
        shutil.copytree(form, teacher)
        make_copy(teacher, tmp_path / "scratch")
        assert teacher_fingerprint(folder) == teacher_fingerprint(teacher)
        held, given = ({path.name for path in each.glob("*.safetensors*")} for each in (folder, teacher))
        assert held == given


def test_a_damaged_record_costs_a_copy(teacher: Path, tmp_path: Path, copied: list[str]) -> None:
    first = make_copy(teacher, tmp_path / "scratch")
    number = len(copied)
    (copy_folder(teacher, tmp_path / "scratch") / RECORD).write_text("[]")
    assert make_copy(teacher, tmp_path / "scratch") == first
    assert len(copied) == 2 * number


def test_two_teachers_of_one_name_have_a_copy_each(tmp_path: Path) -> None:
    assert copy_folder(tmp_path / "a" / "teacher", tmp_path) != copy_folder(tmp_path / "b" / "teacher", tmp_path)


def test_a_disk_that_is_too_small_is_refused(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="delete copies that are no longer needed"):
        describe_copy(teacher, tmp_path / "scratch")
    with pytest.raises(UserError, match=r"scratch has 1 kB free, and .* of .*teacher are not there yet: delete"):
        make_copy(teacher, tmp_path / "scratch")
    assert list(copy_folder(teacher, tmp_path / "scratch").iterdir()) == []


def test_the_bytes_of_replaced_files_count_as_free(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_copy(teacher, tmp_path / "scratch")
    changed = next(teacher.glob("*.safetensors"))
    os.utime(changed)
    usage: Any = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    size = changed.stat().st_size
    line = describe_copy(teacher, tmp_path / "scratch")
    assert line.startswith(f"{readable(size, 'B')} of ")
    assert line.endswith(f", {readable(size + 1000, 'B')} free")
    assert size > 1000


def test_what_a_start_would_copy_is_described(teacher: Path, tmp_path: Path) -> None:
    folder = copy_folder(teacher, tmp_path / "scratch")
    size = readable(sum(path.stat().st_size for path in teacher.glob("[!g]*")), "B")
    assert describe_copy(teacher, tmp_path / "scratch").startswith(f"{size} of {size} to copy to {folder}, ")
    assert not (tmp_path / "scratch").exists()
    make_copy(teacher, tmp_path / "scratch")
    assert describe_copy(teacher, tmp_path / "scratch").startswith(f"0 B of {size} to copy to {folder}, ")


def test_a_folder_that_cannot_be_made_is_refused(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").write_text("a file")
    with pytest.raises(UserError, match=r"^teacher\.local_copy: .*scratch.* cannot be read or written: "):
        make_copy(teacher, tmp_path / "scratch")


def test_a_second_process_waits_for_the_first(teacher: Path, tmp_path: Path, copied: list[str]) -> None:
    """Two runs of a node, or a restart beside a process that is about to end: neither is invalid input."""
    folder = copy_folder(teacher, tmp_path / "scratch")
    with ThreadPoolExecutor(1) as pool:
        with locked_folder(folder):
            second = pool.submit(make_copy, teacher, tmp_path / "scratch")
            with pytest.raises(TimeoutError):
                second.result(timeout=0.2)
            assert copied == []
        assert second.result(timeout=60) == make_copy(teacher, tmp_path / "scratch")


def test_a_file_of_hugging_faces_cache_must_have_the_content_of_its_name(teacher: Path, tmp_path: Path) -> None:
    file = next(teacher.glob("*.safetensors"))
    blob = tmp_path / hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(blob)
    file.symlink_to(blob)
    make_copy(teacher, tmp_path / "scratch")
    _flip(blob)
    os.utime(blob)
    with pytest.raises(UserError, match="was published with"):
        make_copy(teacher, tmp_path / "scratch")
    assert not (copy_folder(teacher, tmp_path / "scratch") / file.name).exists()
