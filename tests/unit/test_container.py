"""container/Dockerfile, read as docker reads it: what it copies is sent to it, what it pins is what is tested."""

import re
import subprocess
from fnmatch import fnmatch

import pytest

from megadistill.shipped import FOLDERS
from tests.paths import ROOT

DOCKERFILE = (ROOT / "container" / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    if line.strip()
]
COPIED = [text.split()[:-1] for name, text in INSTRUCTIONS if name == "COPY"]
RULES = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()


def _is_sent(path: str) -> bool:
    """The last rule of .dockerignore that matches a path, or a folder that it is in, decides."""
    sent = True
    parents = [path, *(path.rsplit("/", depth)[0] for depth in range(1, path.count("/") + 1))]
    for rule in RULES:
        if any(fnmatch(part, rule.removeprefix("!").removeprefix("**/")) for part in (*parents, path.rsplit("/")[-1])):
            sent = rule.startswith("!")
    return sent


@pytest.mark.parametrize("source", sorted(source for sources in COPIED for source in sources))
def test_what_the_image_copies_is_there_and_sent(source: str) -> None:
    assert (ROOT / source).exists()
    assert _is_sent(source)


def test_the_image_has_all_that_the_package_links_to() -> None:
    sources = {source for sources in COPIED for source in sources}
    assert {"megadistill", *FOLDERS} <= sources
    assert re.search(r'"README\.md"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")), "a build reads it"


def test_nothing_private_is_sent() -> None:
    for path in ("slurm/env.sh", ".git/config", "runs/mine/recipe.json", "mine.yaml", ".venv/bin/python", "models/t"):
        assert not _is_sent(path), path


def test_the_image_has_the_versions_that_are_tested() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = re.findall(r"\b([a-z-]+==[\d.]+)", " ".join(text for name, text in INSTRUCTIONS if name == "RUN"))
    assert len(pins) >= 2
    assert set(pins) <= set(constraints)


@pytest.mark.parametrize("script", [text for name, text in INSTRUCTIONS if name == "RUN"])
def test_commands_of_the_image_are_shell(script: str) -> None:
    subprocess.run(["bash", "-n", "-c", script], check=True)
    if "pip install" in script:
        assert "--constraint constraints.txt" in script
