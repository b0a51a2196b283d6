"""The packages themselves, without a server: W&B offline, MLflow with a store of files; a run is sent in two parts."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadistill.tracking.follower import Follower
from tests.unit.report.written_run import WrittenRun

BLOCK = 1 << 15
KEY = "0123456789abcdef0123456789abcdef01234567"


def _send_in_two_parts(folder: Path, tracker: str) -> list[str | None]:
    """The tracker's ids of the run, of both followers."""
    run, ids = WrittenRun(folder), []
    run.begin()
    (folder / "tracking" / f"{tracker}.lock").mkdir(parents=True)  # as under `megadistill track`
    for first, last in ((1, 3), (4, 6)):
        run.steps(first, last)
        run.write()
        if last == 6:
            (folder / "DONE").touch()
            time.sleep(1.1)  # W&B's offline folders are named by the second
        follower = Follower(folder, tracker)
        assert follower.follow(lambda seconds: True)
        ids.append(follower.position.run_id)
    return ids


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log, in blocks of 32 KiB, behind a header of 7 bytes."""
    offset, record = 7, b""
    while offset + 7 <= len(content):
        if (left := BLOCK - offset % BLOCK) < 7:
            offset += left
            continue
        length, kind = struct.unpack_from("<HB", content, offset + 4)
        record += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    first, second = _send_in_two_parts(tmp_path / "run", "wandb")
    assert first == second, "one run of W&B, resumed"
    files = sorted((tmp_path / "run" / "tracking" / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.stem for path in files} == {f"run-{first}"}
    losses: dict[int, float] = {}
    for path in files:
        for data in _records(path.read_bytes()):
            record = Record.FromString(data)
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "loss/loss" in items:
                losses[int(items["step"])] = float(items["loss/loss"])
    assert losses == pytest.approx({step: 4.0 / (1 + step / 10) for step in range(1, 7)})
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert KEY.encode() not in written


def test_mlflow_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    first, second = _send_in_two_parts(tmp_path / "run", "mlflow")
    assert first == second
    client = MlflowClient()
    history = client.get_metric_history(str(first), "loss/loss")
    assert {each.step: each.value for each in history} == pytest.approx({n: 4.0 / (1 + n / 10) for n in range(1, 7)})
    assert len(history) == 6
    run = client.get_run(str(first))
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "40"
    assert run.data.metrics["events/attempt_started"] == 1
