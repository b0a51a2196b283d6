"""The place of the hostile inputs, and a copy of it for each process that reads them."""

from pathlib import Path

import pytest

from tests.fuzz import place

PROCESSES = 2


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "original" / "work"
    place.make(folder)
    return folder


@pytest.fixture(scope="session")
def folders(original: Path) -> list[Path]:
    """The original, and a copy of it for each process. The copies may be changed."""
    return [original, *place.copies(original, PROCESSES)]
