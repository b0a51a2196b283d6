"""From Megatron's files to a trained student by the documented commands, which read them where they lie."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.documented import commands
from tests.e2e.commands import forked, in_process, settings, succeeded
from tests.e2e.conftest import TINY, Place
from tests.paths import ROOT
from tests.unit.data.prepare.token_formats.megatron_written import write_new


def test_the_way_from_megatrons_files_to_a_run_has_five_commands_at_most() -> None:
    lines = [command.line for command in commands(ROOT / "docs" / "data.md")]
    way = [line for line in lines if re.search(r"corpora/web_text_document(-s128)?\b", line)]
    assert [line.split()[1] for line in way] == ["shards", "shards", "train"]


@pytest.mark.thorough
def test_a_student_trains_on_megatrons_files_where_they_lie(place: Place, tmp_path: Path) -> None:
    """And resumes there."""
    ids = np.random.default_rng(0).integers(3, 250, 4000)
    folder = tmp_path / "corpora"
    folder.mkdir()
    write_new(folder / "web_text_document", [[part] for part in np.split(ids, range(100, 4000, 100))], "int32")
    prefix = str(folder / "web_text_document")
    how = ["--sequence-length", "32", "--tokenizer", str(place.teacher)]
    succeeded(in_process("shards", "index", "--format", "megatron", prefix, *how))
    succeeded(in_process("shards", "verify", f"{prefix}-s32"))
    given = settings(
        run__folder=tmp_path / "run",
        data__manifest=f"{prefix}-s32/manifest.json",
        teacher__path=place.teacher,
        train__steps=4,
        train__checkpoint_every=2,
    )
    for stop in ("2", "4"):
        succeeded(forked("train", "megadistill/shipped/mine.yaml", *TINY, *given, "--stop-after", stop))
    succeeded(in_process("export", str(tmp_path / "run"), "--output", str(tmp_path / "student")))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps[-1] == 4
    assert steps == sorted(set(steps))
