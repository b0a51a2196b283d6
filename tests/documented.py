"""The command lines of the documentation: indented or fenced, of README.md, CONTRIBUTING.md and docs/."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS = ("make", "megadistill", "torchrun", "deepspeed", "tensorboard", "sbatch", "source", "pip", "python", "hf")


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
    lines = _commands_in([*indented, *"".join(fenced).splitlines()])
    return [Command(page.relative_to(ROOT).as_posix(), line) for line in lines]


def _commands_in(lines: Iterable[str]) -> list[str]:
    command_lines = [line for line in lines if line.split(" ")[0] in PROGRAMS]
    return [" ".join(command.split("  #")[0].split()) for command in command_lines if len(command.split()) > 1]


def quickstart() -> str:
    """The shell script of README's first section of this name: its fenced blocks, one after the other."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, section = text.partition("\n## Quickstart")
    section, _, _ = section.partition("\n## ")
    return "".join(re.findall(r"^```bash\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL))


def quickstart_commands() -> list[str]:
    """Its lines as `every_command` has them: tests/e2e/test_quickstart.py runs them, each after the other."""
    return _commands_in(quickstart().replace("\\\n", " ").splitlines())


def every_command() -> list[Command]:
    """Each once, where it stands first."""
    once: dict[str, Command] = {}
    for page in PAGES:
        for command in commands(page):
            once.setdefault(command.line, command)
    return list(once.values())
