"""Tokenizing broken off: by a kill at any instant, a full disk, a worker that dies. What comes after is the same."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from megadistill.data.prepare.encode import EncodingSpec
from megadistill.data.prepare.shard_tasks import ShardTask, cut_into_tasks
from megadistill.data.prepare.tokenize import tokenize
from megadistill.data.prepare.tokenize_report import TokenizeReport
from megadistill.data.prepare.workers import encode_all
from megadistill.data.text.corpus import Corpus
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.errors import OperatorFault, RestartFault
from tests.unit.data.corpora import BODY, byte_level_tokenizer, document_texts, tree, write_texts

OPTIONS: dict[str, Any] = {"sequence_length": 64, "heldout_fraction": 0.3, "shard_mb": 0.01, "processes": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("corpus") / "corpus", document_texts(1000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer", BODY)


@pytest.fixture(scope="module")
def unbroken(corpus: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("unbroken") / "out"
    _run(corpus, folder, output)
    return tree(output)


def _run(corpus: Path, tokenizer: Path | None, output: Path, **changes: Any) -> TokenizeReport:
    options: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": None, "progress": lambda stage, **numbers: None}
    return tokenize([corpus], output, **options | OPTIONS | changes)


class _BrokenOff(Exception):
    pass


def _break_off(corpus: Path, tokenizer: Path | None, output: Path, *, after: int, **changes: Any) -> None:
    """Stops when so many shards are written."""
    calls = 0

    def progress(stage: str, **numbers: int) -> None:
        nonlocal calls
        calls += stage == "shards"
        if calls > after:
            raise _BrokenOff

    with pytest.raises(_BrokenOff):
        _run(corpus, tokenizer, output, progress=progress, **changes)


SCRIPT = """
import sys, time
from pathlib import Path
from megadistill.data.prepare.tokenize import tokenize

if __name__ == "__main__":
    corpus, tokenizer, output, processes = sys.argv[1:]
    options = {options} | {{"processes": int(processes)}}
    options["progress"] = lambda stage, **numbers: time.sleep(0.02 * (stage == "shards"))  # or it may end first
    tokenize([Path(corpus)], Path(output), tokenizer=Path(tokenizer), vocab_size=None, **options)
"""


def test_killed_at_random_instants_and_started_again_it_gives_the_same_bytes(
    corpus: Path, folder: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(options=OPTIONS))
    output = tmp_path / "out"
    choice = random.Random(7)
    shards: list[int] = []
    for attempt in range(4):
        command = [sys.executable, str(script), str(corpus), str(folder), str(output), str(1 + attempt % 2)]
        job = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        if attempt < 3:
            _wait_for_shards(output, job, more_than=shards[-1] if shards else 0)
            time.sleep(choice.random() * 0.05)
            job.kill()
        if job.wait() == 0:
            break
        assert job.returncode == -signal.SIGKILL
        _wait_until_gone(job.pid)
        shards.append(len(list(output.rglob("shard-*.tar"))))
    assert 0 < shards[0] < len([name for name in unbroken if name.endswith(".tar")])
    assert job.returncode == 0
    assert tree(output) == unbroken


def _wait_for_shards(output: Path, job: "subprocess.Popen[bytes]", *, more_than: int) -> None:
    while job.poll() is None and len(list(output.rglob("shard-*.tar"))) <= more_than:
        time.sleep(0.002)


def _wait_until_gone(session: int) -> None:
    """The workers of a process that was killed end by themselves."""
    until = time.monotonic() + 20
    with suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(session, 0)
            time.sleep(0.01)
        pytest.fail("workers outlive the process that started them")


def test_shards_of_an_earlier_start_are_reused(
    corpus: Path, folder: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    _break_off(corpus, folder, output, after=4)
    written = {path: path.stat().st_mtime_ns for path in output.rglob("shard-*.tar")}
    assert len(written) == 4
    assert _run(corpus, folder, output).reused == 4
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert tree(output) == unbroken


@pytest.mark.parametrize("what", ["cut", "flipped", "gone", "index", "junk record", "no record"])
def test_a_shard_that_is_not_what_its_record_says_is_written_again(
    what: str, corpus: Path, folder: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    _break_off(corpus, folder, output, after=4)
    shard = next(iter(sorted(output.rglob("shard-*.tar"))))
    record = shard.with_name(f".{shard.stem}.json")
    data = shard.read_bytes()
    damage: dict[str, Callable[[], Any]] = {
        "cut": lambda: shard.write_bytes(data[:-512]),
        "flipped": lambda: shard.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:]),
        "gone": lambda: shard.unlink(),
        "index": lambda: shard.with_name(f"{shard.name}.idx.npy").unlink(),
        "junk record": lambda: record.write_bytes(b'{"encoding": 1}'),
        "no record": lambda: record.unlink(),
    }
    damage[what]()
    assert _run(corpus, folder, output).reused == 3
    assert tree(output) == unbroken


@pytest.mark.parametrize(
    "changes", [{"sequence_length": 32}, {"packer": "bestfit"}, {"shard_mb": 0.02}, {"heldout_fraction": 0}]
)
def test_another_command_takes_nothing_of_the_earlier_one_that_does_not_fit(
    changes: dict[str, Any], corpus: Path, folder: Path, tmp_path: Path
) -> None:
    _break_off(corpus, folder, tmp_path / "out", after=12)
    _run(corpus, folder, tmp_path / "out", **changes)
    _run(corpus, folder, tmp_path / "fresh", **changes)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_text_that_changed_is_read_again(corpus: Path, folder: Path, tmp_path: Path) -> None:
    changed = write_texts(tmp_path / "changed", document_texts(1000))
    _break_off(corpus, folder, tmp_path / "out", after=12)
    first = changed / "doc00000.txt"
    first.write_text(first.read_text().replace("hello", "HELLO"))
    _run(changed, folder, tmp_path / "out")
    _run(changed, folder, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_ended_between_two_manifests_it_is_incomplete(
    corpus: Path, folder: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    _break_off(corpus, folder, output, after=4)
    (output / "train" / "manifest.json").write_text("{}")
    _run(corpus, folder, output)
    assert tree(output) == unbroken


def test_a_tokenizer_is_trained_once_for_the_same_text(corpus: Path, tmp_path: Path) -> None:
    """One that another vocabulary made, under a record that vouches for it, shows which of the two is taken."""
    output = tmp_path / "out"
    options: dict[str, Any] = {"after": 1, "vocab_size": 330}
    _break_off(corpus, None, output, **options)
    _break_off(corpus, None, tmp_path / "other", **options | {"vocab_size": 340})
    model, record = output / "tokenizer" / "tokenizer.model", output / "tokenizer" / ".training.json"
    trained = model.read_bytes()
    other = tmp_path / "other" / "tokenizer" / "tokenizer.model"
    model.write_bytes(other.read_bytes())
    assert _run(corpus, None, tmp_path / "fresh", vocab_size=330).vocab_size == 330
    vouched = json.loads(record.read_text()) | {"sha256": load_tokenizer(other).sha256}
    record.write_text(json.dumps(vouched))
    _break_off(corpus, None, output, **options)
    assert model.read_bytes() == other.read_bytes()
    record.write_text(json.dumps(vouched | {"sample": "0" * 64}))
    _break_off(corpus, None, output, **options)
    assert model.read_bytes() == trained
    _run(corpus, None, output, vocab_size=330)
    assert tree(output) == tree(tmp_path / "fresh")


@contextmanager
def _small_files(size: int) -> Iterator[None]:
    """No file of this process may be larger, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_is_one_line_and_the_same_command_resumes(
    corpus: Path, folder: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with (
        _small_files(50_000),
        pytest.raises(OperatorFault, match=r"cannot be written .*: free some space, and start") as fault,
    ):
        _run(corpus, folder, output)
    assert "\n" not in str(fault.value)
    assert not list(output.rglob("*.tmp")) + list(output.rglob("manifest.json")) + list(output.rglob("shard-*"))
    _run(corpus, folder, output)
    assert tree(output) == unbroken


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_one_line_and_the_same_command_resumes(
    processes: int, corpus: Path, folder: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        with pytest.raises(OperatorFault, match="No space left on device"):
            _run(corpus, folder, disk / "out", processes=processes)
        assert not list(disk.rglob("manifest.json"))
        subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
        assert _run(corpus, folder, disk / "out", processes=processes).reused > 0
        assert tree(disk / "out") == unbroken
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_worker_that_is_killed_is_one_line_that_a_restart_mends(corpus: Path, folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    spec = EncodingSpec.of(tokenizer, packer="chunk", sequence_length=16)
    (tmp_path / "train").mkdir()
    tasks = cut_into_tasks(Corpus(sorted(corpus.iterdir()), text_field="text"), heldout_fraction=0, task_bytes=10_000)

    def deadly() -> Iterator[ShardTask]:
        for task in tasks:
            if task.number == 5:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid or 0, signal.SIGKILL)
            yield task

    with pytest.raises(RestartFault, match="a worker process was killed, most likely for lack of memory") as fault:
        list(encode_all(deadly(), tmp_path, folder / "tokenizer.json", spec, processes=2))
    assert "\n" not in str(fault.value)
