"""Attempts at a run: one is the newest, and what they say of themselves holds nothing that looks like a key."""

import errno
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megadistill.errors import OperatorFault
from megadistill.train.checkpoint.attempt import Attempt, acquire, launch_record, newest_number

SECRETS = {
    "hugging face": "hf_" + "aB3" * 11,
    "github": "ghp_" + "aB3" * 12,
    "github, fine": "github_pat_" + "aB3_" * 12,
    "openai": "sk-proj-" + "aB3-" * 12,
    "aws": "AKIA" + "AB34" * 4,
    "slack": "xoxb-1234-5678-abcd",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJyb290In0.c2lnbmF0dXJl",
}


def test_attempts_count_from_one_and_the_last_is_the_newest(tmp_path: Path) -> None:
    first = acquire(tmp_path / "runs" / "a", {"host": "n1"})
    assert (first.number, first.is_newest()) == (1, True)
    first.require_newest()
    second = acquire(tmp_path / "runs" / "a", {"host": "n2\x1b[2J", "pid": 7, "time": "2026-01-01T00:00:00+00:00"})
    assert (second.number, second.is_newest(), first.is_newest()) == (2, True, False)
    with pytest.raises(OperatorFault) as caught:
        first.require_newest()
    assert "attempt 1 of" in str(caught.value)
    assert "attempt 2 has started on n2\N{REPLACEMENT CHARACTER}[2J (pid 7) at 2026-01-01T00:00:00+00:00" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    second.require_newest()
    assert [acquire(tmp_path / "runs" / "a", {}).number for _ in range(9)] == list(range(3, 12)), "10 comes after 9"
    assert Attempt(first.folder, 3).is_newest() is False


def test_of_many_starts_at_once_each_has_its_number(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        numbers = sorted(threads.map(lambda place: acquire(tmp_path, {"place": place}).number, range(64)))
    assert numbers == list(range(1, 65))
    records = [json.loads(path.read_bytes()) for path in (tmp_path / "attempts").iterdir()]
    assert sorted(record["place"] for record in records) == list(range(64)), "nobody wrote into another's"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b"[" * 99_999], ids=["none", "half", "list", "bytes", "deep"]
)
def test_an_attempt_without_a_readable_record_counts(tmp_path: Path, content: bytes) -> None:
    """A start that a full disk or a kill cut short has the folder nonetheless."""
    first = acquire(tmp_path, {})
    (tmp_path / "attempts" / "00002.json").write_bytes(content)
    with pytest.raises(OperatorFault, match=r"attempt 2 has started, and only the"):
        first.require_newest()
    assert acquire(tmp_path, {}).number == 3


def test_a_stray_file_is_no_attempt(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    for name in ("notes.json", "00007.json.bak", "-5.json", "00009"):
        (tmp_path / "attempts" / name).write_text("{}")
    assert acquire(tmp_path, {}).number == 1


def test_a_record_says_how_the_attempt_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "megadistill", "train", "r.yaml", "train.steps=3"])
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("EDITOR", "vi")
    record = launch_record(8)
    assert record["world"] == 8
    assert record["command"] == [sys.executable, "-m", "megadistill", "train", "r.yaml", "train.steps=3"]
    assert record["environment"]["SLURM_JOB_ID"] == "77"
    assert record["environment"]["NCCL_DEBUG"] == "INFO"
    assert "EDITOR" not in record["environment"], "only what is on the list"
    assert record["versions"]["torch"]
    assert {"time", "host", "pid"} <= record.keys()


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_no_key_gets_into_a_record(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [secret, f"teacher.path={secret}", f"--set={secret}", f"x,{secret};y", f"https://host/{secret}/x"]
    monkeypatch.setattr(sys, "orig_argv", ["python", *arguments])
    for name in ("SLURM_JOB_NAME", "NCCL_SOMETHING", "SLURM_JWT", "HF_TOKEN", "NCCL_API_KEY"):
        monkeypatch.setenv(name, secret)
    assert secret not in json.dumps(launch_record(1))


def test_a_variable_whose_name_says_a_secret_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_AUTH_KEY", "NCCL_TOKEN", "SLURM_PASSWORD", "SLURM_SECRET", "GLOO_CREDENTIALS"):
        monkeypatch.setenv(name, "plain")
        assert name not in launch_record(1)["environment"]


def test_a_full_disk_leaves_no_record_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*00001\.json"):
        acquire(tmp_path, {})
    assert newest_number(tmp_path) == 0


@pytest.mark.parametrize("name", ["\u00b2", "\u0663", "9" * 200, "-1", "1e9"])
def test_a_record_of_a_name_that_no_attempt_gives_is_none(name: str, tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "00003.json").touch()
    (tmp_path / "attempts" / f"{name}.json").touch()
    assert newest_number(tmp_path) == 3
