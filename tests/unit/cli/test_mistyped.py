"""Mistyped commands: exit code 2, and one line that says what to type.

A new case is a line of the list: what somebody types, and words that the answer has.
"""

import shlex
from pathlib import Path

import pytest

from megadistill.cli.main import run_command

SET = "write --set train.steps=5"

MISTYPED = [
    ("trian x.yaml", ["did you mean `megadistill train`?"]),
    ("--local_rank 0 trian x.yaml", ["did you mean `megadistill train`?"]),
    ("shards verfy x", ["did you mean `megadistill shards verify`?"]),
    ("shards", ["ACTION", "verify, info, convert, index"]),
    ("frobnicate", ["no command", "tokenize", "config-keys"]),
    ("x.yaml", ["no command", "`megadistill train x.yaml`"]),
    ("recipes", ["no command"]),
    # options
    ("tokenize x --output-dir y", ["--output-dir", "did you mean '--output'?"]),
    ("tokenize x --Output y", ["did you mean '--output'?"]),
    ("tokenize x --sequence_length 8", ["did you mean '--sequence-length'?"]),
    ("doctor x.yaml --frob", ["--frob", "it has --help, --json, --node, --set"]),
    ("doctor x.yaml -o x", ["-o", "it has --help"]),
    ("shards info x --quik", ["megadistill shards info has no such option"]),
    ("train x.yaml y.yaml", ["y.yaml", "takes no such argument"]),
    # overrides of a recipe
    ("train x.yaml train.steps=5", [SET]),
    ("train train.steps=5 x.yaml", [SET]),
    ("doctor x.yaml train.steps=5", [SET]),
    ("plan x.yaml train.steps=5 --nodes 1 --gpu h100", [SET]),
    ("store-targets x.yaml train.steps=5 --output x", [SET]),
    ("timeline x.yaml train.steps=5", [SET]),
    ("train x.yaml --set train.steps 5", [SET]),
    ("train --set train.steps 5 x.yaml", [SET]),
    ("train x.yaml --set=train.steps = 5", [SET]),
    ("train x.yaml --set train.steps = 5", [SET]),
    ("train x.yaml --set train.steps= 5", [SET]),
    ("train x.yaml --set train.steps =5", [SET]),
    ("train x.yaml --set train.log_every=1 train.steps=5", [SET]),
    ("train --set train.steps x.yaml", ["a value is missing", "write --set train.steps=VALUE"]),
    ("train x.yaml --set 'run.folder' 'a b'", ["write --set 'run.folder=a b'"]),
    ("train x.yaml --set", ["--set: expected one argument"]),
    ("train x.yaml --steps 5", [SET]),
    ("train x.yaml --steps=5", [SET]),
    ("train x.yaml --train.steps=5", [SET]),
    ("train x.yaml --max-steps 5", [SET]),
    ("train x.yaml --lr 3e-4", ["write --set train.optimizer.learning_rate=3e-4"]),
    ("train x.yaml --micro-batch-size 4", ["write --set train.micro_batch=4"]),
    ("train x.yaml --epochs 3", ["measured in steps", "train.steps"]),
    ("train x.yaml --stop-aftr 3", ["did you mean '--stop-after'?"]),
    # values
    ("plan x --nodes two --gpu h100", ["--nodes two: give an integer"]),
    ("plan x --nodes 0 --gpu h100", ["--nodes 0: give at least 1"]),
    ("train x.yaml --stop-after 0", ["--stop-after 0: give at least 1"]),
    ("store-targets x.yaml --output x --steps -1", ["--steps -1: give at least 1"]),
    ("evaluate x --data y --batch 0", ["--batch 0: give at least 1"]),
    ("sample x --prompt y --top-p much", ["--top-p much: give a number"]),
    ("export x --output y --dtype bf16", ["--dtype bf16", "float32, bfloat16"]),
    ("export x --output y --dtype bfloat61", ["did you mean 'bfloat16'?"]),
    ("export x --output", ["--output: expected one argument"]),
    ("train --config x.yaml", ["the recipe has no option: write megadistill train x.yaml"]),
    ("doctor -c x.yaml", ["write megadistill doctor x.yaml"]),
    ("train x.yaml --set 'train.steps: 5'", ["write --set train.steps=5"]),
    ("train x.yaml --set '{train: {steps: 5}}'", ["give KEY=VALUE"]),
    (
        "train x.yaml --set train.steps=5,train.micro_batch=2",
        ["write --set train.steps=5 --set train.micro_batch=2"],
    ),
    ("plan x --nodes 1 --gpu a100", ["did you mean 'a100-80gb'?"]),
    ("config-keys lr", ["use train.optimizer.learning_rate"]),
    # names of other tools' commands; a folder is no action
    ("run x.yaml", ["did you mean `megadistill train`?"]),
    ("eval x", ["did you mean `megadistill evaluate`?"]),
    ("help", ["did you mean `megadistill --help`?"]),
    ("shards .", ["no command `megadistill shards .`: there are verify, info, convert, index"]),
    # what is missing
    ("train", ["missing: RECIPE", "`megadistill train --help`"]),
    ("plan x", ["missing: --nodes, --gpu"]),
    ("tokenize x --output y --sequence-length 8", ["--vocab-size", "--tokenizer"]),
]


@pytest.mark.parametrize(("command", "says"), MISTYPED)
def test_a_mistyped_command_is_answered_in_one_line_with_what_to_type(
    command: str, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(shlex.split(command)) == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("megadistill: ")
    for part in says:
        assert part in line, line


def test_what_is_right_is_not_taken_for_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    """Abbreviated options, values that look like overrides or begin with a minus, words behind `--`."""
    for command in (
        "sample nowhere --prompt a.b=c --prompt 'x = y' --temp 0.5 --seed -3",
        "train nowhere.yaml --set=train.steps=5 --set data.skip=[] --set train.optimizer.learning_rate=-1",
        "train --set train.steps= -- nowhere.yaml",
        "evaluate nowhere --data a=nowhere.json --data nowhere.json",
    ):
        assert run_command(shlex.split(command)) == 2
        assert "nowhere" in capsys.readouterr().err, command


@pytest.mark.parametrize("command", ["tr\x1b[2Jain", "train \x1b[2J", "report \x1b[2J", "export x --\x1b[2J"])
def test_what_was_typed_is_printed_without_control_characters(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(command.split(" ")) == 2
    printed = "".join(capsys.readouterr())
    assert "\N{REPLACEMENT CHARACTER}" in printed
    assert "\x1b" not in printed
