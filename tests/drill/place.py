"""The data, the teacher and the recipe of the drill, made by the commands themselves in a folder of its own."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.drill.launch import Ranks, launch
from tests.e2e.commands import in_process, settings, succeeded

STEPS = 24
EVERY = 4
"""Steps between checkpoints."""

TINY = settings(
    student__config__hidden_size=32,
    student__config__intermediate_size=64,
    student__config__num_attention_heads=2,
    student__config__num_key_value_heads=2,
    student__vocab_multiple=256,
    train__schedule__kind="cosine",
    train__schedule__decay_steps="null",
    train__schedule__warmup_steps=2,
    train__micro_batch=2,
    train__global_batch=8,
)


@dataclass
class Place:
    """A folder with a corpus and a teacher. Each run has a name, and its attempts a number."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher-hf"

    def make(self) -> "Place":
        library = Path(json.__file__).parent.parent
        corpus = [str(path) for letter in "at" for path in sorted(library.glob(f"{letter}*.py"))]
        split = ["--vocab-size", "400", "--sequence-length", "32", "--heldout-fraction", "0.1"]
        succeeded(in_process("tokenize", *corpus, *split, "--output", str(self.data)))
        recipe = ["train", "recipes/smoke-teacher.yaml", *TINY, *settings(run__folder=self.folder / "teacher")]
        recipe += settings(data__manifest=self.data / "train" / "manifest.json", train__steps=6)
        assert launch(recipe, world=2, faults={}, folder=self.folder / "teacher-output", environment={}).wait() == [
            0,
            0,
        ]
        succeeded(in_process("export", str(self.folder / "teacher"), "--output", str(self.teacher)))
        return self

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def command(self, name: str, *, steps: int = STEPS, data: Path | None = None) -> list[str]:
        """Arguments of `megadistill`."""
        return [
            "train",
            "recipes/smoke.yaml",
            *TINY,
            *settings(
                run__folder=self.run_folder(name),
                data__manifest=(data or self.data) / "train" / "manifest.json",
                teacher__path=self.teacher,
                train__steps=steps,
                train__checkpoint_every=EVERY,
                train__log_every=1,
                distributed__timeout_minutes=1,
                resilience__step_timeout_seconds=6,
            ),
        ]

    def attempt(
        self,
        name: str,
        *changes: str,
        world: int = 2,
        faults: Mapping[int, Sequence[str]] | None = None,
        steps: int = STEPS,
        data: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> Ranks:
        """Starts or resumes the run of that name; `changes` are further arguments."""
        output = self.folder / "output" / name
        arguments = [*self.command(name, steps=steps, data=data), *changes]
        number = len(list(output.glob("*"))) + 1
        return launch(
            arguments, world=world, faults=faults or {}, folder=output / f"{number:02d}", environment=environment or {}
        )
