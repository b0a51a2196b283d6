"""Data, recipes, a finished run, an exported model: all that commands read, made once by the commands themselves."""

import os
import shutil
from pathlib import Path

from megadistill.data.prepare.convert_manifest import convert
from tests.corpora import small_data_set
from tests.fuzz.worker import in_new_process, renew

RECIPE = """\
extends: base.yaml
objective: distill
run: {folder: run}
teacher: {path: teacher}
"""

BASE = """\
run:
  folder: ???
  seed: 1
data: {manifest: text/set/train/manifest.json}
student:
  deepspeed: ds.json
  config: {model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 1, max_position_embeddings: 64, tie_word_embeddings: true}
distributed: {vocab_group: 1}
train:
  steps: 2
  global_batch: 2
  micro_batch: 1
  precision: float32
  optimizer: {kind: adamw, learning_rate: 1.0e-3}
  schedule: {kind: cosine}
  checkpoint_every: 1
"""

LABELS = """\
extends: base.yaml
objective: labels
run: {folder: labels}
"""

NEW = (
    (BASE + RECIPE.replace("extends: base.yaml\n", ""))
    .replace("run:\n  folder: ???\n  seed: 1\n", "")
    .replace("folder: run", "folder: new-run, seed: 1")
)
"""All in one file, which is quicker to read thousands of times."""

COMMANDS = (
    "train labels.yaml",
    "export labels --output teacher",
    "train recipe.yaml --set run.timeline=[1,2] --set teacher.save_targets=targets --set loss.targets.draws=4",
    "vocab-map --student text/set/tokenizer --teacher teacher --output map.json",
    "evaluate teacher --teacher teacher --data text/set/heldout/manifest.json --limit 2 --json run/evaluation.json",
    "follow run --prompt x --new-tokens 2 --once",
)


def make(folder: Path) -> None:
    """Makes the place in `folder`; beside it a file that no command has to do with."""
    folder.mkdir(parents=True)
    in_new_process(folder, _begin)
    for command in COMMANDS:  # DeepSpeed has one run in a process
        in_new_process(folder, _run, command)


def _run(command: str) -> None:
    from megadistill.cli.main import run_command

    assert run_command(command.split()) == 0, command


def _begin() -> None:
    outside = Path("..", "outside")
    outside.mkdir()
    (outside / "secret.txt").write_text("outside of the folder\n", encoding="utf-8")
    text = Path("text")
    text.mkdir()
    small_data_set(text, sequence_length=16, heldout_fraction=0.3, documents=16)
    shutil.copy(Path(__file__).parents[2] / "ds_configs" / "cpu.json", "ds.json")
    for name, content in {"base": BASE, "labels": LABELS, "recipe": RECIPE, "new": NEW}.items():
        Path(f"{name}.yaml").write_text(content, encoding="utf-8")
    tars = Path("tars")
    tars.mkdir()
    shutil.copy("text/set/heldout/shard-00000.tar", tars)
    shutil.copytree("text/set", "text/table")
    convert(Path("text/table"), to="table")
    Path("folder").mkdir()
    os.mkfifo("fifo")
    os.symlink("/dev/zero", "zero")


def copies(original: Path, number: int) -> list[Path]:
    """Copies of the place, each with its own surroundings."""
    made = [original.parent.parent / f"copy{each}" / original.name for each in range(number)]
    for folder in made:
        folder.mkdir(parents=True)
        shutil.copytree(original.parent / "outside", folder.parent / "outside")
        renew(original, folder)
    return made


def outside_of(folder: Path) -> dict[str, bytes]:
    """The files beside `folder` that no command has to do with."""
    return {
        str(path.relative_to(folder.parent)): path.read_bytes()
        for path in sorted(folder.parent.rglob("*"))
        if path.is_file() and path.relative_to(folder.parent).parts[0] not in (folder.name, "home", "tmp")
    }
