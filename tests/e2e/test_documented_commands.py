"""Every command of the documentation is run as it stands there, in a folder in which its names mean something small.

What needs more than this machine has is run by another test, which `ELSEWHERE` names; README's quickstart is run word
for word by test_quickstart.py.
"""

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from backports import zstd

from megadistill.cli.main import run_command
from tests.documented import Command, every_command, quickstart_commands
from tests.e2e.commands import BIN, Finished, environment, forked, in_process, succeeded
from tests.e2e.conftest import Place
from tests.paths import ROOT
from tests.unit.data.prepare.token_formats.mds_files import write_mds
from tests.unit.data.prepare.token_formats.megatron_written import write_new
from tests.unit.data.prepare.token_formats.saved_sets import write_set

ELSEWHERE = {
    r"^megadistill track ": "tests/unit/tracking/test_track_command.py",
    r"profile\.steps": "tests/ranks/train/test_telemetry.py",
    r"train recipes/(gemma2|llama3)": "tests/ranks/train/test_recipes.py",
    r"export runs/llama3": "tests/unit/export/test_export_run.py",
    r"^megadistill prune models/": "tests/unit/prune/test_pruning.py",
    r"runs/experts-": "tests/ranks/train/test_loop.py",
    r"^megadistill tokenize (fineweb|dclm|tars|saved)/": "tests/unit/data/text/test_published_layouts.py",
    r"^megadistill train .*data\.manifest=corpora/": "tests/e2e/test_token_files.py",
    r"--insert-bos$": "tests/unit/datagen/test_insert_bos.py",
    r"^megadistill lm-eval": "tests/unit/evaluate/test_lm_eval.py",
    r"^megadistill follow .*--tasks": "tests/unit/export/test_follow.py",
    r"^make ": "tests/e2e/test_documented_commands.py::test_a_documented_target_is_there",
    r"--hostfile hostfile --no_ssh": "tests/e2e/test_launchers.py::test_deepspeed_on_each_node_by_itself",
    r"--hostfile hostfile": "tests/e2e/test_launchers.py::test_deepspeed_over_ssh",
    r"--nnodes": "tests/e2e/test_launchers.py::test_torchrun_on_each_node_by_itself",
    r"sbatch ": "tests/slurm/test_training.py",
    r"^python -m benchmarks": "tests/unit/benchmarks",
    r"distributed\.store_server": "tests/e2e/test_documented_commands.py::test_a_replica_of_the_page_is_lost_and_joins",
    r"^tensorboard ": "tests/unit/train/telemetry/test_tensorboard.py",
    r"^pip install": "tests/unit/test_documentation.py::test_documented_extras_are_the_projects",
}

SMALLER = {
    r"--vocab-size \d+": "--vocab-size 500",
    r"--sequences \d{4,}": "--sequences 64",
    r"--nproc_per_node 8": "--nproc_per_node 2",
    r"step-00000200": "step-00000004",
    r"-to-00000200": "-to-00000004",
    r"train.steps=600": "train.steps=6",
    r"validation.every=100": "validation.every=2",
    r"run.timeline=\[11,13\]": "run.timeline=[2,3]",
}
"""Sizes that would take long; everything else of a command is run to the letter."""

CORPUS, DOCUMENT = 3_000_000, 2_000
"""Characters: a hundredth of the documents is a held-out split of some sequences."""

LAUNCHED = re.compile(r"^(torchrun|deepspeed) ")
TRAINS = re.compile(r"^megadistill (train|doctor|store-targets) ")
"""Makes process groups, which would be left behind here."""


def _turn(command: Command) -> int:
    """Data first, then runs, then what looks at them: pages tell it in other orders. Within a turn as the pages do."""
    if re.match(r"^megadistill (tokenize|generate|shards index) ", command.line):
        return 0
    return 1 if " train " in command.line else 2


def _runs_here(command: Command) -> bool:
    return command.line not in quickstart_commands() and not any(re.search(key, command.line) for key in ELSEWHERE)


LOCAL = sorted((command for command in every_command() if _runs_here(command)), key=_turn)


@pytest.fixture(scope="module")
def sandbox(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes of a few steps, and under the documented names a corpus, tars, a tokenizer, a teacher and its data."""
    folder = tmp_path_factory.mktemp("documented")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for recipe in (folder / "recipes").glob("smoke*.yaml"):
        recipe.write_text(_shortened(recipe.read_text(encoding="utf-8")), encoding="utf-8")
    for name in ("slurm", "tests", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    _write_corpus(folder)
    for name in ("runs/smoke/teacher-hf", "runs/smoke/labels-hf", "runs/smoke/distill-hf", "teacher", "models/teacher"):
        shutil.copytree(place.teacher, folder / name)
    split = ["--tokenizer", str(place.teacher), "--sequence-length", "128", "--heldout-fraction", "0.02"]
    text = in_process("tokenize", str(folder / "text"), *split, "--output", str(folder / "runs" / "smoke" / "data"))
    succeeded(text)
    for source in ("web", "code"):
        shutil.copytree(folder / "runs" / "smoke" / "data", folder / source)
    models = [str(folder / "runs" / "smoke" / name) for name in ("labels-hf", "distill-hf")]
    heldout = str(folder / "runs" / "smoke" / "data" / "heldout" / "manifest.json")
    measured = str(folder / "runs" / "smoke" / "evaluation.json")
    succeeded(in_process("evaluate", *models, "--data", heldout, "--json", measured))
    return folder


def _shortened(recipe: str) -> str:
    for key, value in (
        ("steps", 4),
        ("decay_steps", 2),
        ("warmup_steps", 1),
        ("checkpoint_every", 2),
        ("log_every", 1),
    ):
        recipe = re.sub(rf"^(\s*{key}:) \d+", rf"\1 {value}", recipe, flags=re.MULTILINE)
    return recipe


def _write_corpus(folder: Path) -> None:
    library = Path(json.__file__).parent.parent
    (folder / "text").mkdir()
    (folder / "crawl").mkdir()
    (folder / "tars").mkdir()
    _write_token_files(folder / "corpora")
    whole = "".join(path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py")))[:CORPUS]
    documents = [whole[start : start + DOCUMENT] for start in range(0, len(whole), DOCUMENT)]
    for number, document in enumerate(documents):
        (folder / "text" / f"{number:04}.txt").write_text(document, encoding="utf-8")
    lines = [json.dumps({"text": document}) for document in documents]
    (folder / "crawl" / "a.jsonl.zst").write_bytes(zstd.compress("\n".join(lines).encode()))
    with webdataset.TarWriter(str(folder / "tars" / "some.tar")) as tar:
        for index in range(4):
            tokens = np.arange(33, dtype=np.uint16) + index
            buffer = io.BytesIO()
            np.save(buffer, tokens)
            tar.write({"__key__": f"{index:04}", "tokens.npy": buffer.getvalue()})


def _write_token_files(folder: Path) -> None:
    """Ids below the tokenizer's, as other programs write them."""
    (folder / "olmo").mkdir(parents=True)
    ids = np.random.default_rng(0).integers(3, 250, 4000)
    write_new(folder / "web_text_document", [[part] for part in np.split(ids, range(100, 4000, 100))], "int32")
    (folder / "olmo" / "part-00000.npy").write_bytes(ids.astype("<u2").tobytes())
    rows = np.split(ids.astype("int32"), range(150, 4000, 150))
    halves = rows[:10], rows[10:]
    write_mds(folder / "c4-mds", {"tokens": "ndarray:int32"}, [[{"tokens": row} for row in half] for half in halves])
    tables = [pyarrow.table({"input_ids": [row.tolist() for row in half]}) for half in halves]
    write_set(folder / "c4-saved", tables)
    (folder / "c4-parquet").mkdir()
    for number, table in enumerate(tables):
        pyarrow.parquet.write_table(table, folder / "c4-parquet" / f"train-{number:05d}-of-00002.parquet")


@pytest.mark.parametrize("command", LOCAL, ids=lambda command: command.line)
def test_a_documented_command_runs(command: Command, sandbox: Path) -> None:
    line = command.line
    for pattern, smaller in SMALLER.items():
        line = re.sub(pattern, smaller, line)
    _remove_output(sandbox, line)
    if LAUNCHED.match(line):
        finished = _process(sandbox, line)
    elif TRAINS.match(line):
        finished = forked(*_words(line), folder=sandbox, HOME=str(sandbox))
    else:
        finished = _here(sandbox, line)
    assert finished.code == 0, f"{command.page}: {finished.transcript}"
    assert (finished.out + finished.err).strip(), f"{command.page}: {line} says nothing"


def _remove_output(sandbox: Path, line: str) -> None:
    """Removes the output of an earlier command in the same folder, or this one would have nothing to do."""
    for written in re.findall(r" (?:tokenize|generate|store-targets|export|prune) .*--output (\S+)", line):
        shutil.rmtree(sandbox / written, ignore_errors=True)
    for recipe in re.findall(r" train recipes/smoke(\S*)\.yaml(?!.*run\.folder)", line):
        shutil.rmtree(sandbox / "runs" / "smoke" / (recipe.removeprefix("-") or "distill"), ignore_errors=True)


def _process(sandbox: Path, line: str) -> Finished:
    there = {**environment(), "HOME": str(sandbox), "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], cwd=sandbox, env=there, capture_output=True, text=True, timeout=240)
    return Finished(done.returncode, done.stdout, done.stderr)


def _here(sandbox: Path, line: str) -> Finished:
    """Without the seconds of imports that a process costs."""
    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        chdir(sandbox),
        patch.dict(os.environ, HOME=str(sandbox), COLUMNS="80"),
    ):
        code = run_command(_words(line))
    return Finished(code, out.getvalue(), err.getvalue())


def _words(line: str) -> list[str]:
    """The arguments of `megadistill`, as a shell passes them."""
    return [os.path.expanduser(word) for word in shlex.split(line)[1:]]


@pytest.mark.thorough
def test_a_replica_of_the_page_is_lost_and_joins(sandbox: Path) -> None:
    """The example of docs/replicas.md, with fewer steps: between its first two blocks there are some.

    No machine takes one in less than 0.1 s, so that the last comes after the replacement.
    """
    _, _, section = (ROOT / "docs" / "replicas.md").read_text(encoding="utf-8").partition("\n## Try it on two cores")
    blocks = re.findall(r"^```bash\n(.*?)^```$", section.partition("\n## ")[0], flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    steps, folder = 400, sandbox / "runs/smoke/replicas"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    wait = f"until [ $(wc -l <{folder}/metrics.jsonl) -ge 5 ]; do sleep 0.1; done 2>/dev/null\n"
    script = f"{blocks[0]}{wait}{blocks[1]}{blocks[2]}".replace("29600", str(port))
    slow = f"export DRILL_FAULTS=slow:100 PYTHONPATH={ROOT}\n"
    script = slow + script.replace("megadistill train", "python -m tests.drill.faulty train")
    longer = f"--set train.steps={steps} --set train.checkpoint_every=100 --set run.folder="
    finished = _process(sandbox, script.replace("--set run.folder=", longer))
    assert finished.code == 0, finished.transcript
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    changes = [event for event in events if event["event"] == "replicas_changed"]
    assert [(change["lost"], change["joined"]) for change in changes] == [([0], []), ([], [0])]
    attempts = [event["step"] for event in events if event["event"] == "attempt_started"]
    assert attempts == [0, *(change["step"] for change in changes)]
    metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, steps + 1))
    assert (folder / "DONE").exists()


@pytest.mark.parametrize("target", sorted({c.line for c in every_command() if c.program == "make"}))
def test_a_documented_target_is_there(target: str) -> None:
    """CI runs check, smoke and test; the others run dry."""
    done = subprocess.run(["make", "--dry-run", *target.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_what_runs_elsewhere_is_there() -> None:
    """Each entry of the table is in a page, and its test exists."""
    lines = [command.line for command in every_command()]
    for pattern, where in ELSEWHERE.items():
        path, _, name = where.partition("::")
        assert (ROOT / path).exists(), where
        assert not name or f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), where
        assert any(re.search(pattern, line) for line in lines), f"no page says {pattern}"
