"""Paths of the wrong kind are answered with the command, or the path, that gives what is needed.

A new case is a line of the list: a path, what is needed, and words that the answer has.
"""

from pathlib import Path

import pytest

from megadistill.cli.main import run_command
from megadistill.config.paths import not_model, wrong_path

FILES = (
    *("run/recipe.json", "run/metrics.jsonl", "run/checkpoints/step-00000005/manifest.json"),
    *("exported/config.json", "exported/model.safetensors", "exported/tokenizer.json"),
    *("mine/train/manifest.json", "mine/heldout/manifest.json", "mine/tokenizer/tokenizer.json"),
    *("text/a.txt", "text/b.jsonl", "adapter/adapter_config.json", "gguf/q4.gguf", "a recipe.yaml", "empty/x"),
    *("models--org--name/snapshots/abc/config.json", "models/gemma/config.json"),
)

CASES = [
    # names of the hub
    (
        "google/gemma-2-2b",
        "model",
        ["hf download google/gemma-2-2b --local-dir models/gemma-2-2b", "write models/gemm"],
    ),
    ("google/gemma-2-2b", "tokenizer", ["hf download google/gemma-2-2b --local-dir models/gemma-2-2b"]),
    ("hf://google/gemma-2-2b", "model", ["hf download google/gemma-2-2b "]),
    ("https://huggingface.co/google/gemma-2-2b", "model", ["hf download google/gemma-2-2b "]),
    ("https://huggingface.co/google/gemma-2-2b/tree/main", "model", ["hf download google/gemma-2-2b --local-dir mod"]),
    ("run/checkpoints", "model", ["is a part of a run: `megadistill export run --output models/run`"]),
    ("google/gemma", "model", ["but models/gemma is: write models/gemma"]),
    ("org/text", "manifest", ["hf download org/text --repo-type dataset", "megadistill tokenize text/text"]),
    # what a run wrote, where a model is needed
    ("run", "model", ["is a run folder", "`megadistill export run --output models/run`"]),
    ("run", "tokenizer", ["`megadistill export run --output models/run`"]),
    ("run/checkpoints/step-00000005", "model", ["a checkpoint", "`megadistill export run/checkpoints/step-00000005 "]),
    # files and folders that are no model, or not the whole of one
    ("exported/tokenizer.json", "model", ["is a file of a model: name its folder, exported"]),
    ("exported/model.safetensors", "model", ["name its folder, exported"]),
    ("mine/train/manifest.json", "model", ["is the manifest of data"]),
    ("mine", "model", ["holds token shards, not a model"]),
    ("adapter", "model", ["is an adapter", "merge_and_unload"]),
    ("gguf/q4.gguf", "model", ["is a GGUF file", "convert_gguf"]),
    ("gguf", "model", ["holds q4.gguf", "GGUF"]),
    ("models--org--name", "model", ["name models--org--name/snapshots/abc"]),
    ("models", "model", ["name models/gemma"]),
    # data
    ("mine", "manifest", ["is a folder: name mine/heldout/manifest.json or mine/train/manifest.json"]),
    ("mine/train", "manifest", ["name mine/train/manifest.json"]),
    ("text", "manifest", ["holds text", "`megadistill tokenize text ", "data/text/train/manifest.json"]),
    ("text/a.txt", "manifest", ["is text", "`megadistill tokenize text/a.txt "]),
    ("run", "manifest", ["is of a run"]),
    ("exported", "manifest", ["is a model, not token shards"]),
    # runs
    ("exported", "run", ["such as an export", "name the run folder"]),
    ("a recipe.yaml", "run", ["is a recipe: name a run folder (its run.folder)"]),
    ("run/metrics.jsonl", "run", ["name its folder, run"]),
    ("run/checkpoints", "run", ["name its folder, run"]),
    ("run/checkpoints/step-00000005", "run", ["name its run folder, run"]),
    ("mine", "run", ["holds token shards"]),
    (".", "run", ["holds some: name run"]),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FILES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("path", "kind", "says"), CASES)
def test_a_path_of_the_wrong_kind_is_answered_with_what_to_type(
    folder: Path, path: str, kind: str, says: list[str]
) -> None:
    reason = wrong_path(path, kind)  # type: ignore[arg-type]
    assert reason is not None
    assert reason.startswith(path)
    for part in says:
        assert part in reason, reason


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("exported", "model"),
        ("empty", "model"),
        ("nowhere", "model"),
        ("models/nowhere", "model"),
        ("a/b/c", "model"),
        ("nowhere/manifest.json", "manifest"),
        ("org/name", "run"),
        ("empty", "run"),
        ("x" * 300, "model"),
        ("a\0b", "model"),
    ],
)
def test_of_other_paths_nothing_is_claimed(folder: Path, path: str, kind: str) -> None:
    assert wrong_path(path, kind) is None  # type: ignore[arg-type]


def test_what_is_no_model_is_named_with_its_key() -> None:
    assert not_model("nowhere", "teacher.path").startswith(
        "teacher.path: nowhere does not exist (paths are relative to"
    )
    assert not_model("nowhere", "nowhere").startswith("nowhere does not exist")


RECIPE = """\
objective: distill
run: {folder: new}
data: {manifest: mine}
teacher: {path: google/gemma-2-2b}
student: {config: {model_type: llama, vocab_size: 64}}
train: {steps: 10, global_batch: 8, micro_batch: 2, optimizer: {learning_rate: 1.0e-3}}
"""

HUB = "hf download google/gemma-2-2b --local-dir models/gemma-2-2b"
COMMANDS = [
    ("tokenize text --tokenizer google/gemma-2-2b --sequence-length 8 --output new", HUB),
    ("evaluate google/gemma-2-2b --data mine", "name mine/heldout/manifest.json"),
    ("sample google/gemma-2-2b --prompt x", HUB),
    ("sample run --prompt x", "`megadistill export run --output models/run`"),
    (
        "generate exported --data mine --sequences 1 --prompt-tokens 1 --new-tokens 1 --output new",
        "mine/train/manifest",
    ),
    ("prune exported --data text --output new", "`megadistill tokenize text "),
    ("export exported --output new", "such as an export"),
    ("export google/gemma-2-2b --output new", "not a run folder"),
    ("report exported", "such as an export"),
    ("timeline exported", "such as an export"),
    ("shards info text", "`megadistill tokenize text "),
    ("plan 'a recipe.yaml' --nodes 1 --gpu h100 --sequence-length 8", HUB),
]


@pytest.mark.parametrize(("command", "says"), COMMANDS)
def test_every_command_answers_so(folder: Path, command: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    import shlex

    (folder / "a recipe.yaml").write_text(RECIPE)
    assert run_command(shlex.split(command)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megadistill: ")
    assert says in line, line
    assert not (folder / "new").exists()


def test_train_names_all_of_them_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a recipe.yaml").write_text(RECIPE)
    assert run_command(["train", "a recipe.yaml"]) == 2
    heading, data, teacher = capsys.readouterr().err.splitlines()
    assert heading == "megadistill: the recipe cannot start here: 2 reasons"
    assert data.startswith("  data.manifest: mine is a folder: name mine/heldout/manifest.json or mine/train/")
    assert HUB in teacher
