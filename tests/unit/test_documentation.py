"""Pages agree with the code: commands parse, recipes validate, links and paths exist, prose is plain."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megadistill.cli.main import parser
from megadistill.config.load import validate_recipe
from megadistill.config.recipe import Recipe
from tests.documented import PAGES, every_command
from tests.paths import ROOT

LAUNCHERS = {
    "megadistill": r"^megadistill ",
    "torchrun": r"^torchrun .*-m megadistill ",
    "deepspeed": r"^deepspeed .*--module megadistill ",
}


PROSE = sorted([*PAGES, ROOT / "CHANGELOG.md"])

MAX_COLUMNS = 120

PHRASES = re.compile(
    r"\b(rooms?|verbs?|goes on|go on with|gone on|going on|said|told|asked|nobody|somebody|everybody|knows? no|"
    r"lessons?|vigils?|verdicts?|whereabouts|parcels?|holes?|set aside|sets aside|the wire|heartbeats? of a|orphans?|"
    r"stands? for itself|stands? in the way|stood still|stand still|stands still|closer look|at a look|looks? at|"
    r"what is left|what stays|what it costs|what fills|keeps the books|by itself and no|believe it|is worth)\b",
    re.IGNORECASE,
)
"""Idiom that pages had before 0.1.0, or that a reader of English as a second language stumbles over."""

PATH = re.compile(r"`((?:megadistill|tests|docs|recipes|slurm|benchmarks|ds_configs|container)/[\w./*-]*)[`:]")
"""A path of the repository in a code span. Names with a placeholder in capitals do not match."""

MADE_BY_USERS = {"slurm/env.sh", "mine.yaml"}

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
    assert recipe is None or (ROOT / recipe).is_file() or recipe.as_posix() in MADE_BY_USERS


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is neither code nor a row of a table."""
    fenced = False
    after_list = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("|"):
            if line.startswith("    ") and not after_list:
                continue
            after_list = bool(re.match(r"\s*(\*|-|\d+\.) ", line)) or (after_list and line.startswith(" "))
            yield number, line


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_lines_of_prose_fit_the_columns(page: Path) -> None:
    long = [
        f"line {number}: {len(line)} columns"
        for number, line in prose(page)
        if len(line) > MAX_COLUMNS and not re.fullmatch(r"\W*\[[^]]*\]\([^)]*\)\W*", line)
    ]
    assert not long, long


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_have_no_former_idiom(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|^    .*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`]*`", "", text)
    matches = [match[0] for match in PHRASES.finditer(" ".join(text.split()))]
    assert not matches, matches


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_in_pages_exist(page: Path) -> None:
    paths = set(PATH.findall(page.read_text(encoding="utf-8"))) - MADE_BY_USERS
    missing = {path for path in paths if not [*ROOT.glob(path.rstrip("/"))]}
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
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


def test_the_constraints_leave_to_torch_what_its_build_decides() -> None:
    """A build for GPUs demands a triton and CUDA libraries of its own; `make install` would be refused with others."""
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    assert "torch" in pinned
    assert not [name for name in pinned if name == "triton" or name.startswith("nvidia-")]


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
