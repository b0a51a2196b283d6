"""Every file that a command reads x every kind of odd file in its place."""

import shlex
from pathlib import Path

from tests.fuzz.harness import pairs, require_lines, table
from tests.fuzz.odd_files import KINDS
from tests.fuzz.worker import Case


def test_an_odd_file_is_refused_in_a_line_or_read(folders: list[Path]) -> None:
    rows = [(file, command) for file, commands in table("files").items() for command in commands]
    require_lines(
        [
            Case(f"{command}, {file}: {kind}", tuple(shlex.split(command)), file, kind)
            for (file, command), kind in pairs(rows, list(KINDS), each=5)
        ],
        folders,
    )
