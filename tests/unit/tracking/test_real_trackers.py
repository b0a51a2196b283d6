"""The packages themselves, without a server: W&B offline, MLflow with a store of files; a run is sent in two parts."""

import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from megadistill.tracking.connections import CONNECTIONS, RunToTrack, mlflow_name
from megadistill.tracking.follower import Follower
from tests.unit.report.written_run import RECIPE, WrittenRun

BLOCK = 1 << 15
KEY = "0123456789abcdef0123456789abcdef01234567"


def _send_in_two_parts(folder: Path, tracker: str) -> list[str | None]:
    """The tracker's ids of the run, of both followers."""
    run, ids = WrittenRun(folder), []
    run.begin()
    (folder / "tracking" / f"{tracker}.lock").mkdir(parents=True)  # as under `megadistill track`
    for first, last in ((1, 3), (4, 6)):
        run.steps(first, last, by_source={"c++": {"kl": 1.5}})
        run.write({**RECIPE, "data": {"sources": {"c++": "data/c/manifest.json"}}})
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
    assert run.data.params["data.sources.c__"] == "data/c/manifest.json"
    assert run.data.metrics["by_source/c__/kl"] == 1.5
    assert run.data.metrics["events/attempt_started"] == 1


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("by_source/c++/kl", "by_source/c__/kl"),
        ("by_source/web/kl", "by_source/web/kl"),
        ("by_source/a//b/./kl", "by_source/a/b/kl"),
        ("data.sources.日本 (1)/", "data.sources.日本 _1_"),
    ],
)
def test_names_that_mlflow_takes(name: str, taken: str) -> None:
    assert mlflow_name(name) == taken


def test_a_server_that_refuses_the_recipe_does_not_get_a_run_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Client:
        """MLflow's, on a server that has no place for parameters."""

        runs: ClassVar[list[str]] = []

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return "1"

        def create_run(self, experiment_id: str, run_name: str) -> Any:
            self.runs.append(run_name)
            entity: Any = ModuleType("run")
            entity.info = ModuleType("info")
            entity.info.run_id = run_name
            return entity

        def log_batch(self, run_id: str, **values: Any) -> None:
            raise RuntimeError("413: the entity is too large")

        def delete_run(self, run_id: str) -> None:
            self.runs.remove(run_id)

    entities, tracking = ModuleType("mlflow.entities"), ModuleType("mlflow.tracking")
    monkeypatch.setattr(entities, "Metric", object, raising=False)
    monkeypatch.setattr(entities, "Param", lambda *values: values, raising=False)
    monkeypatch.setattr(tracking, "MlflowClient", Client, raising=False)
    for module in (ModuleType("mlflow"), entities, tracking):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(RuntimeError, match="413"):
        CONNECTIONS["mlflow"](RunToTrack(tmp_path, RECIPE, None))
    assert Client.runs == []
