"""Small files of anybody go through one bounded reader: pipes, devices, folders and hostile contents are refused at
once, in one line, whichever file of a model, a run or a data set they stand for."""

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill import io
from megadistill.accelerators import accelerator
from megadistill.config.load import load_recipe
from megadistill.config.recipe import StudentSection
from megadistill.data.prepare.finished_output import InputFiles, TokenizeRecord
from megadistill.data.prepare.token_formats.arrow import ARROW
from megadistill.data.prepare.token_formats.mds import MDS
from megadistill.data.shards.manifest import Manifest
from megadistill.data.shards.shard_record import ShardRecord
from megadistill.data.targets.target_manifest import TargetManifest
from megadistill.data.text.input_files import find_files
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.data.tokenizers.tokenizer_file import TokenizerFile
from megadistill.errors import OperatorFault, UserError
from megadistill.evaluate.evaluation import read_evaluations
from megadistill.events import goodput, last_step, read_events, read_metrics
from megadistill.models.families import load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.student.deepspeed_config import load_deepspeed_config
from megadistill.timeline.files import read_timeline
from megadistill.train.checkpoint.attempt import attempt_record
from megadistill.train.checkpoint.folders import has_all_files
from megadistill.train.checkpoint.format import Checkpoint
from megadistill.train.checkpoint.rollback import read_rollbacks
from megadistill.train.setup.recipe_changes import changes_since
from megadistill.train.setup.run_folder import copy_student_config, recorded_start, refuse_other_recipe
from megadistill.train.setup.vocab_map import read_vocab_map
from tests.paths import ROOT

TABLE: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("hostile_files.yaml").read_text())

READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a model's config.json": ("config.json", lambda path: load_config(path.parent, what="teacher.path")),
    "a fingerprint": ("config.json", lambda path: teacher_fingerprint(path.parent)),
    "an index": ("model.safetensors.index.json", lambda path: SafetensorsFolder(path.parent)),
    "weights": ("model.safetensors", lambda path: SafetensorsFolder(path.parent)),
    "tokenizer.json": ("tokenizer.json", load_tokenizer),
    "tokenizer.json as a table": ("tokenizer.json", lambda path: TokenizerFile.read("huggingface", path).table),
    "tokenizer.model": ("tokenizer.model", load_tokenizer),
    "tokenizer.model as a table": ("tokenizer.model", lambda path: TokenizerFile.read("sentencepiece", path).table),
    "tekken.json": ("tekken.json", load_tokenizer),
    "tekken.json as a table": ("tekken.json", lambda path: TokenizerFile.read("huggingface", path).table),
    "ranks of tiktoken": ("llama.tiktoken", load_tokenizer),
    "the state of a folder of datasets": ("state.json", lambda path: rows_of(path.parent)),
    "the files of a saved data set": ("state.json", lambda path: ARROW.files(str(path.parent))),
    "the splits of a saved data set": ("dataset_dict.json", lambda path: ARROW.files(str(path.parent))),
    "the shards of MDS": ("index.json", lambda path: MDS.files(str(path.parent))),
    "a run's recipe.json": ("recipe.json", lambda path: refuse_other_recipe(path.parent, {})),
    "the start in recipe.json": ("recipe.json", lambda path: recorded_start(path.parent)),
    "the student's config": ("config.json", lambda path: copy_student_config(path.parent / "run", student_of(path))),
    "changes since recipe.json": ("recipe.json", lambda path: changes_since(path.parent, {})),
    "DeepSpeed's settings": ("deepspeed.json", load_deepspeed_config),
    "a checkpoint": ("manifest.json", lambda path: Checkpoint(path.parent)),
    "whether a checkpoint is whole": ("manifest.json", lambda path: has_all_files(path.parent)),
    "rollbacks": ("rollbacks.json", lambda path: read_rollbacks(path.parent)),
    "a split": ("manifest.json", Manifest.load),
    "a target set": ("targets.json", lambda path: TargetManifest.load(path.parent)),
    "events": ("events.jsonl", lambda path: (list(read_events(path.parent)), *nothing_of(path.parent))),
    "metrics": ("metrics.jsonl", lambda path: (list(read_metrics(path.parent)), *nothing_of(path.parent))),
    "an attempt": ("00001.json", attempt_record),
    "a timeline": ("timeline/rank-00000.json", lambda path: read_timeline(path.parent.parent)),
    "a recipe": ("recipe.yaml", load_recipe),
    "an accelerator": ("gpu.yaml", lambda path: accelerator(str(path))),
    "an evaluation": ("evaluation.json", read_evaluations),
    "a map of ids": ("map.json", lambda path: read_vocab_map(path, student_ids=9, teacher_ids=9)),
    "a finished tokenize": ("tokenize.json", lambda path: finished().is_finished(path.parent, ["train"])),
    "a shard's record": (".shard-0.json", lambda path: ShardRecord.load(path.with_name("shard-0.tar"))),
}
"""Reader -> the name of its file, and a call that reads it. Those that leave a damaged file out return something that
is empty, with or without the file."""


def rows_of(dataset: Path) -> list[Path]:
    (dataset / "dataset_info.json").touch()
    return [path for path in find_files([dataset], ["*"], [], output=dataset) if path.suffix == ".arrow"]


def nothing_of(run: Path) -> tuple[int | None, float]:
    return last_step(run), goodput(run).wall


def student_of(config: Path) -> StudentSection:
    return StudentSection.model_construct(config=str(config.parent))


def finished() -> TokenizeRecord:
    return TokenizeRecord(options={}, input=InputFiles(files=0, bytes=0, names="", times=""))


def content_of(row: dict[str, Any]) -> bytes:
    if "hex" in row:
        return bytes.fromhex(row["hex"])
    times = row.get("times", 0)
    text = f"{row.get('begin', '')}{row.get('repeat', '') * times}{row.get('end', '')}{row.get('close', '') * times}"
    return text.encode()


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """The line with which a reader refuses a file; empty where it leaves the file out."""
    try:
        content = read(path)
    except (UserError, OperatorFault) as error:
        text = str(error)
        assert len(text) < 1000, text[:2000]
        return text
    empty = not content or (isinstance(content, tuple) and not any(part for part in content[:2]))
    assert empty, f"believed: {content!r}"
    return ""


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[Path], Any], Path]:
    name, read = READERS[request.param]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    return read, path


def test_a_reader_refuses_hostile_contents_in_one_line(reader: tuple[Callable[[Path], Any], Path]) -> None:
    read, path = reader
    for row in TABLE:
        path.write_bytes(content_of(row))
        text = refusal(read, path)  # of a recipe, each mistake has a line
        assert path.suffix == ".yaml" or "\n" not in text, row["name"]


def test_a_reader_waits_for_no_pipe_and_reads_no_device(reader: tuple[Callable[[Path], Any], Path]) -> None:
    read, path = reader
    os.mkfifo(path)
    assert "\n" not in refusal(read, path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "\n" not in refusal(read, path)
    path.unlink()
    path.mkdir()
    assert "\n" not in refusal(read, path)


def test_a_reader_reads_no_gigabytes(
    reader: tuple[Callable[[Path], Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file of 8 GiB: its size is looked at before anything is read, or its lines have a bound."""
    read, path = reader
    with open(path, "wb") as file:
        file.truncate(8 << 30)
    if path.suffix != ".jsonl":
        assert "\n" not in refusal(read, path)


def test_the_ends_of_what_the_reader_takes(tmp_path: Path) -> None:
    deepest = b"[" * io.MAX_NESTING + b"]" * io.MAX_NESTING
    assert io.parse_json(b"\xef\xbb\xbf" + deepest) == json.loads(deepest), "a byte order mark is no fault"
    with pytest.raises(ValueError, match="nested more than 64 levels"):
        io.parse_json(b"[1, " + deepest + b"]")
    assert io.parse_json(b'{"model_max_length": 1000000000000000019884624838656, "a": 1, "a": 2}') == {
        "model_max_length": int(1e30),
        "a": 2,
    }
    for text, words in (
        (b"NaN", "NaN is not a JSON number"),
        (b"-Infinity", "-Infinity is not"),
        (b"1e999", "1e999 is too large"),
        (b"1" * 101, "an integer of 101 digits"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        (b"[0" + b",0" * io.MAX_VALUES + b"]", "more than 8,000,000 values"),
    ):
        with pytest.raises(ValueError, match=words):
            io.parse_json(text)
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert io.read_file(path, max_bytes=5) == b"12345"
    with pytest.raises(ValueError, match="larger than 4 B"):
        io.read_file(path, max_bytes=4)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_an_error_of_the_file_system(name: str) -> None:
    with pytest.raises(OSError, match="no file can have such a name"):
        io.read_file(Path(name))


RAW = {
    "megadistill/events/faults.py": "a file that is written",
    "megadistill/events/lines.py": "lines of logs, one at a time, each with a bound",
    "megadistill/io.py": "the reader itself",
    "megadistill/accelerators.py": "a file of the package",
    "megadistill/data/prepare/output_lock.py": "a lock that is written",
    "megadistill/data/prepare/token_formats/arrow.py": "a folder's own `open`, of data/storage",
    "megadistill/data/prepare/token_formats/flat_files.py": "a folder's own `open`, of data/storage",
    "megadistill/data/prepare/token_formats/index_file.py": "a folder's own `open`, of data/storage",
    "megadistill/data/prepare/token_formats/index_record.py": "a folder's own `open`, of data/storage",
    "megadistill/data/prepare/token_formats/index_token_files.py": "a folder's own `open`, of data/storage",
    "megadistill/data/prepare/token_formats/mds.py": "a folder's own `open`, of data/storage",
    "megadistill/data/prepare/token_formats/megatron_files.py": "a folder's own `open`, of data/storage",
    "megadistill/data/prepare/token_formats/parquet.py": "a folder's own `open`, of data/storage",
    "megadistill/data/prepare/verify.py": "a folder's own `open`, of data/storage",
    "megadistill/data/shards/npy.py": "an array in an .npz in memory, with a bound",
    "megadistill/data/shards/opening.py": "a folder's own `open`, of data/storage",
    "megadistill/data/shards/tar.py": "tarfile on an opened file, with a bound",
    "megadistill/data/shards/token_files/token_index.py": "a folder's own `open`, of data/storage",
    "megadistill/data/storage/node_files.py": "a folder's own `open`, and files of this user that are written",
    "megadistill/data/storage/remote.py": "a folder's own `open`",
    "megadistill/data/stream/stream.py": "an order in memory, of a cursor",
    "megadistill/data/targets/target_manifest.py": "an order in memory, of a validated key",
    "megadistill/data/text/corpus.py": "lines of a corpus, each with a bound; the user's own files",
    "megadistill/data/text/json_text.py": "a line of a corpus, with a bound",
    "megadistill/distributed/rendezvous.py": "a value of the store of the launch, with a bound",
    "megadistill/distributed/watchdog/parent.py": "/proc",
    "megadistill/distributed/watchdog/watchdog.py": "a value of the store of the launch, and a file that is written",
    "megadistill/doctor/node_check.py": "/proc, and a file that doctor has just written",
    "megadistill/export/pinned.py": "a lock that is written",
    "megadistill/models/hf_folder.py": "safetensors, whose header has a bound, on a regular file",
    "megadistill/shipped/__init__.py": "files of the package",
    "megadistill/tracking/__main__.py": "standard error, which is written",
    "megadistill/train/checkpoint/attempt.py": "/proc, and a file that is written",
    "megadistill/train/checkpoint/format.py": "safetensors, on a verified file, and a file that was just written",
    "megadistill/train/checkpoint/local_tier.py": "safetensors, on a verified file",
    "megadistill/distributed/collectives.py": "an object of another rank of this run, as in torch's collectives",
    "megadistill/train/telemetry/metrics.py": "a log that was just read, to cut off its end",
    "megadistill/train/telemetry/timeline_capture.py": "/proc",
    "megadistill/train/teacher/live.py": "a target writer's own `open`",
    "megadistill/types.py": "an order in memory, of a cursor",
}
"""Files that may read by other means than `megadistill.io`, and why."""

READS = {"open", "read_text", "read_bytes", "fromfile", "memmap", "safe_open", "load_file", "loadtxt", "genfromtxt"}
MODULES = {"json": {"load", "loads"}, "np": {"load"}, "torch": {"load"}, "pickle": {"load", "loads"}, "yaml": {"load"}}


def raw_reads(source: str) -> list[int]:
    """Lines of a source that open or parse a file by other means than `megadistill.io`."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        function = call.func
        if isinstance(function, ast.Name) and function.id in READS:
            lines.append(call.lineno)
        if isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            if function.attr in READS or function.attr in MODULES.get(owner, ()):
                lines.append(call.lineno)
    return sorted(lines)


def test_no_file_is_read_but_by_the_bounded_reader() -> None:
    raw = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "megadistill").rglob("*.py"))
        if (lines := raw_reads(path.read_text()))
    }
    unlisted = {path: lines for path, lines in raw.items() if path not in RAW}
    assert not unlisted, (
        f"read with megadistill.io (read_file, read_json, open_regular), or list the reason: {unlisted}"
    )
    assert not (gone := RAW.keys() - raw.keys()), f"these have no such read any more: {gone}"
    assert raw_reads("json.loads(Path(x).read_text())\nnp.load(x)\nopen(x)\nre.compile(x)") == [1, 1, 2, 3]
