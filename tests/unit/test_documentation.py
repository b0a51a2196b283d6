"""The documentation tells the truth: every command line in it parses, every file that it names is there."""

import re
import shlex
import tomllib

import pytest
import yaml

from megadistill.cli.main import parser
from megadistill.config import Recipe, validate_recipe
from tests.documented import PAGES, every_command
from tests.paths import ROOT

LAUNCHERS = {
    "megadistill": r"^megadistill ",
    "torchrun": r"^torchrun .*-m megadistill ",
    "deepspeed": r"^deepspeed .*--module megadistill ",
}


PARSED = [command.line for command in every_command() if command.program in ("make", *LAUNCHERS)]


def test_there_are_commands() -> None:
    assert {line.split()[0] for line in PARSED} == {"make", *LAUNCHERS}


@pytest.mark.parametrize("command", PARSED)
def test_a_documented_command_parses(command: str) -> None:
    program = command.split()[0]
    if program == "make":
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    arguments, matches = re.subn(LAUNCHERS[program], "", command)
    assert matches, f"{command}: not how a launcher starts this package"
    options = parser().parse_args(shlex.split(arguments))
    recipe = getattr(options, "recipe", None)
    assert recipe is None or (ROOT / recipe).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: object) -> None:
    from pathlib import Path

    assert isinstance(page, Path)
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_documented_extras_are_the_projects() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    extras_of_pages = {
        name.strip()
        for page in PAGES
        for names in re.findall(r"megadistill\[([a-z0-9, -]+)\]", page.read_text(encoding="utf-8"))
        for name in names.split(",")
    }
    assert extras_of_pages <= set(extras), extras_of_pages - set(extras)


def test_a_documented_recipe_is_one() -> None:
    blocks = [
        yaml.safe_load(block)
        for page in PAGES
        for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    ]
    whole = [block for block in blocks if "objective" in block]
    assert whole
    for values in whole:
        validate_recipe(values, source="a page")
    sections = {section for block in blocks for section in block}
    assert sections <= set(Recipe.model_fields) | {"extends"}
