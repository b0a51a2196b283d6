"""The documentation tells the truth: every command line in it parses, every file that it names is there."""

import re
import shlex

import pytest

from megadistill.cli import parser
from tests.paths import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
LAUNCHERS = {
    "megadistill": r"^megadistill ",
    "torchrun": r"^torchrun .*-m megadistill ",
    "deepspeed": r"^deepspeed .*--module megadistill ",
}


def commands() -> list[str]:
    """Indented command lines, with their continuation lines."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^    ((?:make|megadistill|torchrun|deepspeed) [^\n]*)$", text, flags=re.MULTILINE)
    return sorted({command.split("  #")[0].strip() for command in found})


def test_there_are_commands() -> None:
    assert {command.split()[0] for command in commands()} == {"make", *LAUNCHERS}


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_parses(command: str) -> None:
    program = command.split()[0]
    if program == "make":
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    verb, found = re.subn(LAUNCHERS[program], "", command)
    assert found, f"{command}: not how a launcher starts this package"
    options = parser().parse_args(shlex.split(verb))
    recipe = getattr(options, "recipe", None)
    assert recipe is None or (ROOT / recipe).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: object) -> None:
    from pathlib import Path

    assert isinstance(page, Path)
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
