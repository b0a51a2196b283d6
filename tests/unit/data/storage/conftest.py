"""The same files in a local folder, behind an HTTP server, and in fsspec's memory."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megadistill.data.storage.base import Folder
from megadistill.data.storage.open import folder_of
from megadistill.data.storage.remote import BLOCK_BYTES, RemoteFolder, RetryPolicy
from tests.unit.data.servers import Server, serving

FAST_RETRY = RetryPolicy(attempts=4, pause=0.01, max_pause=0.02)
HASTY = replace(FAST_RETRY, timeout=0.5)
"""For answers that do not come: on a busy machine others may take as long."""
SIZE = 3 * BLOCK_BYTES + 12_345


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def server(tmp_path: Path, data: bytes) -> Iterator[Server]:
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "shard.tar").write_bytes(data)
    (tmp_path / "split" / "empty").write_bytes(b"")
    with serving(tmp_path) as running:
        yield running


@pytest.fixture
def remote(server: Server) -> RemoteFolder:
    return RemoteFolder(f"{server.url}/split", retry=FAST_RETRY)


@pytest.fixture
def memory(data: bytes) -> Iterator[RemoteFolder]:
    files = fsspec.filesystem("memory")
    files.pipe("/storage-test/split/shard.tar", data)
    files.pipe("/storage-test/split/empty", b"")
    yield RemoteFolder("memory://storage-test/split", retry=FAST_RETRY)
    files.rm("/storage-test", recursive=True)


@pytest.fixture(params=["local", "http", "memory"])
def folder(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Folder:
    if request.param == "local":
        return folder_of(str(tmp_path / "split"))
    chosen: Folder = request.getfixturevalue("remote" if request.param == "http" else "memory")
    return chosen
