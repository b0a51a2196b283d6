"""Every number of a command has bounds: what is beyond them is one line, before anything starts.

A hostile number is a line of hostile_numbers.txt.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadistill.cli.main import parser, run_command
from megadistill.cli.numbers import BOUNDS, number_type

HOSTILE = Path(__file__).with_name("hostile_numbers.txt").read_text(encoding="utf-8").splitlines()


def _actions(of: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in set(action.choices.values()):
                yield from _actions(inner)
        else:
            yield action


def test_every_number_of_every_command_has_bounds() -> None:
    named = set()
    for action in _actions(parser()):
        name = action.option_strings[-1] if action.option_strings else action.dest
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert name in BOUNDS, name
        if name in BOUNDS:
            named.add(name)
        assert action.type not in (int, float) or name == "--local-rank", f"{name}: a number without bounds"
    assert named == set(BOUNDS), "an option that is gone"


@pytest.mark.parametrize("text", [*HOSTILE, "9" * 5000])
@pytest.mark.parametrize("kind", [int, float])
def test_a_hostile_number_is_refused(text: str, kind: type[int] | type[float]) -> None:
    for option in BOUNDS:
        if option in ("--teacher-tokens", "--limit", "--sequences", "--seed", "--order-seed") and kind is float:
            continue
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            number_type(kind, option)(text)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "x.yaml", "--gpu", "h100", "--nodes", "1" * 31], "--nodes 1111"),
        (["evaluate", "x", "--data", "y", "--limit", "0"], "--limit 0: give at least 1"),
        (["sample", "x", "--prompt", "y", "--temperature", "nan"], "--temperature nan: give a number from 0 up to"),
        (["tokenize", "x", "--output", "y", "--vocab-size", "many"], "--vocab-size many: give an integer, from 1"),
        (["timeline", "x.yaml", "--steps", "1" * 5000], "--steps 1111"),
    ],
)
def test_a_command_says_the_option_and_the_bounds(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert len(error) < 300
