"""The command lines of the documentation: indented or fenced, of README.md, CONTRIBUTING.md and docs/."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS = ("make", "megadistill", "torchrun", "deepspeed", "tensorboard", "sbatch", "source", "pip", "python")


@dataclass(frozen=True)
class Command:
    """A command line, its continuation lines joined, without its comment."""

    page: str
    line: str

    @property
    def program(self) -> str:
        return self.line.split()[0]


def commands(page: Path) -> list[Command]:
    """Those of a page, in its order."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE)
    found = [line for line in [*indented, *"".join(fenced).splitlines()] if line.split(" ")[0] in PROGRAMS]
    lines = [" ".join(command.split("  #")[0].split()) for command in found if len(command.split()) > 1]
    return [Command(page.relative_to(ROOT).as_posix(), line) for line in lines]


def every_command() -> list[Command]:
    """Each once, where it stands first."""
    once: dict[str, Command] = {}
    for page in PAGES:
        for command in commands(page):
            once.setdefault(command.line, command)
    return list(once.values())
