"""The data and the teacher that the command tests share, made once by the commands themselves."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks import pictures
from megadistill.errors import UserError
from tests.e2e.commands import forked, in_process, settings, succeeded

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TINY = settings(
    student__config__hidden_size=32,
    student__config__intermediate_size=64,
    student__config__num_hidden_layers=2,
    student__config__num_attention_heads=2,
    student__config__num_key_value_heads=1,
    student__vocab_multiple=256,
    train__schedule__kind="cosine",
    train__schedule__decay_steps="null",
    train__schedule__warmup_steps=2,
    train__log_every=2,
    train__micro_batch=2,
    train__global_batch=8,
)


@dataclass(frozen=True)
class Place:
    """A folder with a tokenized corpus and an exported teacher of two layers."""

    folder: Path

    @property
    def data(self) -> list[str]:
        return settings(data__manifest=self.folder / "data" / "train" / "manifest.json")

    @property
    def heldout(self) -> str:
        return str(self.folder / "data" / "heldout" / "manifest.json")

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher-hf"

    def run_folder(self, name: str) -> list[str]:
        return settings(run__folder=self.folder / name)

    def distill(self, name: str, *, steps: int, checkpoint_every: int) -> list[str]:
        """The arguments of a tiny distillation run, whatever launches it."""
        return [
            "train",
            "recipes/smoke.yaml",
            *TINY,
            *self.data,
            *self.run_folder(name),
            *settings(teacher__path=self.teacher, train__steps=steps, train__checkpoint_every=checkpoint_every),
        ]

    def metrics(self, name: str) -> list[dict[str, float]]:
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("e2e")
    made = Place(folder)
    library = Path(json.__file__).parent.parent
    corpus = [str(path) for letter in "ajt" for path in sorted(library.glob(f"{letter}*.py"))]
    split = ["--vocab-size", "400", "--sequence-length", "32", "--heldout-fraction", "0.2"]
    text = in_process("tokenize", *corpus, *split, "--output", str(folder / "data"))
    assert "heldout" in succeeded(text).out
    teacher = ["train", "recipes/smoke-teacher.yaml", *TINY, *made.data, *made.run_folder("teacher")]
    succeeded(forked(*teacher, *settings(train__steps=6, train__checkpoint_every=6)))
    succeeded(in_process("export", str(folder / "teacher"), "--output", str(made.teacher)))
    return made


@pytest.fixture(scope="package")
def browser() -> Iterator["Browser"]:
    """A Chromium; without one the test is skipped, with what would bring it. Two cannot run in one process."""
    try:
        with pictures.browser() as started:
            yield started
    except UserError as error:
        pytest.skip(str(error))
