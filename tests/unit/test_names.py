"""The field's words stay: identifiers, docstrings and file names of the package hold none of the old idiom.

docs/glossary.md has the terms; the words below are the worst of those that they replaced.
"""

import ast
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "megadistill"
FILES = sorted(PACKAGE.rglob("*.py"))

WORDS = frozenset(
    """
    said told lesson lessons taught vigil verdict whereabouts begun everyone everyones asked obeyed deaf orphans kept
    found wanted settle notices slope hole holes room rooms verb verbs parcel parcels unfinished misfit
    scrubbed shown beat beats
    """.split()  # noqa: SIM905  a list of fifty short lines reads worse
)
"""Parts of an identifier, between underscores and capitals."""

PHRASES = re.compile(
    r"\b(knows? no|knows nothing|know no|front door|rooms?|said|told|going on after|goes on from|gone on with|vigil|"
    r"verdict|whereabouts|lessons?|closer look|somebody else|is asked|are asked|it asks)\b",
    re.IGNORECASE,
)
"""In docstrings and comments."""

HALF_SENTENCE = re.compile(r"(Of|That|By|At|From|In|With|For|To|As|On|Since|And|But|Where|What|Whom|Which|Than)\b")
"""How a docstring begins that cannot be read without the name that it belongs to."""


def _identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield line, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield line, node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield line, node.name
        elif isinstance(node, ast.arg):
            yield line, node.arg
        elif isinstance(node, ast.alias) and node.asname:
            yield line, node.asname


def _parts(identifier: str) -> set[str]:
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", identifier)}


def _docstrings(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Line, text, and whether it is that of an attribute."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for place, child in enumerate(body):
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                attribute = place > 0 and isinstance(body[place - 1], ast.Assign | ast.AnnAssign)
                yield child.lineno, child.value.value, attribute


def _comments(file: Path) -> Iterator[tuple[int, str]]:
    with open(file, "rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


def problems(file: Path) -> list[str]:
    """`line: what`, for one file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lines = [f"{line}: name {name}" for line, name in _identifiers(tree) if _parts(name) & WORDS]
    for line, text, attribute in _docstrings(tree):
        if match := PHRASES.search(text):
            lines.append(f"{line}: docstring has {match[0]!r}")
        if HALF_SENTENCE.match(text.lstrip("\n `")) and (attribute or not text.startswith(("To ", "For "))):
            lines.append(f"{line}: docstring begins with {text.split()[0]!r}")
    for line, text in _comments(file):
        if match := PHRASES.search(text):
            lines.append(f"{line}: comment has {match[0]!r}")
    return lines


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_file_speaks_the_fields_language(file: Path) -> None:
    found = problems(file)
    assert not found, f"{file.relative_to(ROOT)}: {'; '.join(found)}"


def test_a_file_name_stands_in_one_package() -> None:
    """The command line mirrors the packages, so its modules carry their names."""
    places = defaultdict(list)
    for file in FILES:
        if file.name not in ("__init__.py", "__main__.py") and file.parent.name != "cli":
            places[file.name].append(file.parent.relative_to(ROOT).as_posix())
    twice = {name: folders for name, folders in places.items() if len(folders) > 1}
    assert not twice, f"file names in several packages: {twice}"


def test_no_folder_is_crowded_and_no_function_is_long() -> None:
    crowded = {
        folder: count for folder in {file.parent for file in FILES} if (count := len([*folder.glob("*.py")])) > 16
    }
    assert not crowded
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 80, f"{file.relative_to(ROOT)}: {node.name} has {length} lines"
