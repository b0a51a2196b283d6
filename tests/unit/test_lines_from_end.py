"""A file of lines has the same lines from its end as from its beginning."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from megadistill.events import lines as module
from megadistill.events.lines import lines_from_end, scan_lines

LINES = [
    b'{"n": 1}',
    b'{"n": 22, "x": "\xc3\xa4"}',
    b"",
    b"   ",
    b"[]",
    b'{"n": 3',
    b"\0\0\0",
    b"x" * 39,
    b"y" * 40,
    b"z" * 300,
]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
def test_from_either_end_a_file_has_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 40)
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    path, chance = tmp_path / "a.jsonl", random.Random(block)
    for _ in range(200):
        content = b"\n".join(chance.choices(LINES, k=chance.randrange(8)))
        content += chance.choice([b"", b"\n", b"\n\n"])
        path.write_bytes(content)
        backward = list(lines_from_end(path))[::-1]
        assert [line.values for line in backward] == [values for _, _, values in scan_lines(path)], content
        for line in backward:
            if line.values is not None:
                assert json.loads(content[line.offset : line.end]) == line.values
        assert all(before.end <= after.offset for before, after in pairwise(backward))


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert list(lines_from_end(tmp_path / "none")) == []
