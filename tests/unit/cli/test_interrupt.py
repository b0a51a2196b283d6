"""Signals in a command: one line that says what is kept, exit code 3, no traceback."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megadistill.cli.common import NOTHING_WRITTEN, RESUMES
from megadistill.cli.interrupt import SIGNALS
from megadistill.cli.main import parser

SCRIPT = """
import os, signal, sys, time, types
from megadistill.cli import interrupt, main

def ready():
    print("ready", flush=True)
    time.sleep(60)

def export_run(*arguments, **options):
    {body}

module = types.ModuleType("megadistill.export.export_run")
module.export_run = export_run
sys.modules["megadistill.export.export_run"] = module
sys.argv = ["megadistill", *{arguments}]
interrupt.SAME_REQUEST_SECONDS = 0.0
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it runs in the background without
main.main()
"""

EXPORT = ("export", "run", "--output", "out")


def interrupted(*signals: int, body: str = "ready()", variables: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and stderr of an export that receives signals, each when it prints a line."""
    script = SCRIPT.format(body=body.replace("\n", "\n    "), arguments=repr(EXPORT))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WORLD_", "RANK"))}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**clean, **(variables or {})},
    )  # fmt: skip
    assert process.stdout is not None
    for number in signals:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_a_command_with_one_line(number: signal.Signals) -> None:
    assert interrupted(number) == (3, f"megadistill: interrupted ({number.name}): {NOTHING_WRITTEN}\n")


def test_an_import_that_fails_because_it_was_interrupted_prints_no_traceback() -> None:
    body = "try:\n    ready()\nexcept KeyboardInterrupt:\n    raise ImportError('numpy.core failed') from None"
    assert interrupted(signal.SIGINT, body=body) == (3, f"megadistill: interrupted (SIGINT): {NOTHING_WRITTEN}\n")


def test_a_second_signal_ends_what_does_not_end() -> None:
    body = "try:\n    ready()\nexcept KeyboardInterrupt:\n    ready()"
    code, errors = interrupted(signal.SIGINT, signal.SIGTERM, body=body)
    assert (code, errors) == (3, "megadistill: second signal (SIGTERM): ending at once\n")


def test_a_forked_worker_dies_of_a_signal_as_ever() -> None:
    body = """\
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, b"1")
    time.sleep(60)
os.read(read, 1)
os.kill(child, signal.SIGTERM)
print("status", os.waitpid(child, 0)[1], file=sys.stderr)
return 7"""
    code, errors = interrupted(body=body)
    assert (code, errors) == (0, f"status {int(signal.SIGTERM)}\n")


def test_a_launcher_may_end_a_rank_that_waits_for_a_failed_one() -> None:
    code, errors = interrupted(signal.SIGTERM, variables={"WORLD_SIZE": "2"})
    assert (code, errors) == (-signal.SIGTERM, "")
    code, errors = interrupted(signal.SIGUSR2, variables={"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"})
    assert (code, errors) == (3, f"megadistill: interrupted (SIGUSR2): {NOTHING_WRITTEN}\n")
    code, errors = interrupted(signal.SIGUSR2, variables={"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"})
    assert (code, errors) == (3, ""), "one rank of a node says so"
    code, errors = interrupted(signal.SIGINT, variables={"WORLD_SIZE": "two"})
    assert (code, errors) == (3, f"megadistill: interrupted (SIGINT): {NOTHING_WRITTEN}\n"), "no number is no traceback"


def _commands(top: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    groups = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    for group in groups:
        for word, command in group.choices.items():
            yield from _commands(command, f"{name} {word}".strip())
    if not groups:
        yield name, top


def test_each_command_has_a_line_for_an_interruption() -> None:
    lines = {name: command.get_default("on_interrupt") for name, command in _commands(parser())}
    assert all(lines.values()), lines
    assert {name for name, line in lines.items() if line == RESUMES} == {"tokenize", "generate", "follow"}
    assert "resumes" in lines["train"]
