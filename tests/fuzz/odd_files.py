"""Files as they are not meant to be: each kind by its name in the data files of this folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

NESTED = 50_000
"""Levels of a nested list: more than any parser's stack."""


def _fifo(path: Path, before: bytes) -> None:
    os.mkfifo(path)


def _link(target: str) -> Callable[[Path, bytes], None]:
    return lambda path, before: path.symlink_to(target)


def _folder(path: Path, before: bytes) -> None:
    path.mkdir()


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, bytes], None]:
    def write(path: Path, before: bytes) -> None:
        path.write_bytes(change(before))

    return write


def _values(change: Callable[[Any], Any]) -> Callable[[Path, bytes], None]:
    """Every plain value of a JSON file, or of each line of one, changed; of another file, nothing."""

    def write(path: Path, before: bytes) -> None:
        try:
            lines = [before] if path.suffix == ".json" else before.splitlines()
            changed = [json.dumps(_changed(json.loads(line), change)).encode() for line in lines]
        except ValueError:
            changed = [before]
        path.write_bytes(b"\n".join(changed) + b"\n")

    return write


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _changed(child, change) for key, child in value.items()}
    if isinstance(value, list):
        return [_changed(child, change) for child in value]
    return change(value)


def _number(to: Any) -> Callable[[Any], Any]:
    return lambda value: to if isinstance(value, int | float) and not isinstance(value, bool) else value


def _string(to: str) -> Callable[[Any], Any]:
    return lambda value: to if isinstance(value, str) else value


KINDS: dict[str, Callable[[Path, bytes], None]] = {
    "fifo": _fifo,
    "link to /dev/zero": _link("/dev/zero"),
    "link to itself": lambda path, before: path.symlink_to(path.name),
    "link to nothing": _link("nothing-there"),
    "folder": _folder,
    "absent": lambda path, before: None,
    "empty": _bytes(lambda before: b""),
    "half": _bytes(lambda before: before[: len(before) // 2]),
    "last byte missing": _bytes(lambda before: before[:-1]),
    "twice": _bytes(lambda before: before + before),
    "zeros": _bytes(lambda before: bytes(len(before))),
    "NUL in front": _bytes(lambda before: b"\0" + before),
    "byte order mark": _bytes(lambda before: b"\xef\xbb\xbf" + before),
    "UTF-16": _bytes(lambda before: before.decode("latin-1").encode("utf-16")),
    "not UTF-8": _bytes(lambda before: before.replace(b"e", b"\xff")),
    "control characters": _bytes(lambda before: before.replace(b"a", b"\x1b[2J\x07")),
    "nested lists": _bytes(lambda before: b"[" * NESTED + b"]" * NESTED),
    "nested mappings": _bytes(lambda before: b'{"a":' * NESTED + b"1" + b"}" * NESTED),
    "a list": _bytes(lambda before: b"[]\n"),
    "a number": _bytes(lambda before: b"7\n"),
    "a text": _bytes(lambda before: b'"text"\n'),
    "null": _bytes(lambda before: b"null\n"),
    "empty mapping": _bytes(lambda before: b"{}\n"),
    "a foreign line behind": _bytes(lambda before: before.rstrip(b"\n") + b'\n{"foreign": [1]}\n'),
    "a broken line behind": _bytes(lambda before: before.rstrip(b"\n") + b'\n{"foreign": \n'),
    "digits without end": _bytes(lambda before: b"9" * 100_000),
    "numbers 10^30": _values(_number(10**30)),
    "numbers negative": _values(_number(-1)),
    "numbers zero": _values(_number(0)),
    "numbers infinite": _values(_number(float("inf"))),
    "numbers nan": _values(_number(float("nan"))),
    "numbers as text": _values(_number("many")),
    "numbers as lists": _values(_number([1, [2]])),
    "texts empty": _values(_string("")),
    "texts outside": _values(_string("../outside/secret.txt")),
    "texts with control characters": _values(_string("\x1b[31mred\x07\n[bold]")),
    "texts long": _values(_string("x" * 100_000)),
    "texts null": _values(lambda value: None if isinstance(value, str) else value),
    "all null": _values(lambda value: None),
    "all mappings": _values(lambda value: {"a": {"b": [value]}}),
}
"""Name -> function that makes it, from the path and the content before."""


def put(file: str, kind: str) -> None:
    """Puts one of `KINDS` in the place of a file."""
    path = Path(file)
    before = path.read_bytes()
    path.unlink()
    KINDS[kind](path, before)
