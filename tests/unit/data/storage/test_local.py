"""Files of a folder and of a server: the same bytes, within limits, and an error for everything else."""

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megadistill.data.storage.base import Folder, sha256_of
from megadistill.data.storage.open import folder_of
from megadistill.data.storage.remote import BLOCK_BYTES, Patience, RemoteFolder
from megadistill.errors import UserError
from megadistill.io import file_sha256, written_whole
from megadistill.redaction import scrubbed, shown
from tests.unit.data import servers
from tests.unit.data.servers import Misdeed, Server, serving

HASTE = Patience(attempts=4, limit=0.5, pause=0.01, longest_pause=0.02)
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
    return RemoteFolder(f"{server.url}/split", patience=HASTE)


@pytest.fixture
def memory(data: bytes) -> Iterator[RemoteFolder]:
    files = fsspec.filesystem("memory")
    files.pipe("/storage-test/split/shard.tar", data)
    files.pipe("/storage-test/split/empty", b"")
    yield RemoteFolder("memory://storage-test/split", patience=HASTE)
    files.rm("/storage-test", recursive=True)


@pytest.fixture(params=["local", "http", "memory"])
def folder(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Folder:
    if request.param == "local":
        return folder_of(str(tmp_path / "split"))
    chosen: Folder = request.getfixturevalue("remote" if request.param == "http" else "memory")
    return chosen


def _ranges(server: Server) -> list[str | None]:
    """The ranges that were asked for after the file was opened."""
    return [said for _, said in server.requests[1:]]


def test_any_range_of_any_folder_is_the_files_own_bytes(folder: Folder, data: bytes) -> None:
    file = folder.open("shard.tar")
    assert file.size == SIZE
    draws = random.Random(1)
    ranges = [(start, draws.randrange(0, 3000)) for start in draws.choices(range(SIZE - 3000), k=50)]
    ranges += [(0, SIZE), (0, 0), (SIZE, 0), (SIZE - 1, 1), (BLOCK_BYTES - 1, 2), (BLOCK_BYTES, BLOCK_BYTES)]
    folder.prefetch((file, start, length) for start, length in ranges)
    for start, length in ranges:
        assert bytes(file.read(start, length)) == data[start : start + length]


def test_the_hash_of_an_open_file_is_the_hash_of_the_file(folder: Folder, data: bytes, tmp_path: Path) -> None:
    parts: list[int] = []
    digest = hashlib.sha256(data).hexdigest()
    assert sha256_of(folder.open("shard.tar"), progress=parts.append) == digest
    assert file_sha256(tmp_path / "split" / "shard.tar") == digest
    assert sum(parts) == SIZE
    assert file_sha256(tmp_path / "split" / "empty") == hashlib.sha256().hexdigest()


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, SIZE + 1), (SIZE, 1), (SIZE + 5, 0), (5, -1)])
def test_bytes_that_are_not_there_are_an_error(folder: Folder, start: int, length: int) -> None:
    with pytest.raises(OSError, match=f"it has {SIZE} bytes"):
        folder.open("shard.tar").read(start, length)


def test_a_missing_and_an_empty_file_say_so(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        folder.open("other.tar")
    assert missing.value.strerror
    with pytest.raises(OSError, match="it is empty"):
        folder.open("empty")


def test_a_whole_file_is_read_within_its_bound(folder: Folder, data: bytes) -> None:
    assert folder.read_whole("shard.tar", max_bytes=SIZE) == data
    with pytest.raises(OSError, match=f"{SIZE} bytes, more than the {SIZE - 1} allowed"):
        folder.read_whole("shard.tar", max_bytes=SIZE - 1)


def test_a_file_that_is_too_large_is_not_fetched(remote: RemoteFolder, server: Server) -> None:
    with pytest.raises(OSError, match="more than"):
        remote.read_whole("shard.tar", max_bytes=1000)
    assert server.requests == [("/split/shard.tar", "bytes=0-0")]


def test_a_sibling_lies_below_or_beside(folder: Folder, data: bytes) -> None:
    assert folder.sibling("../split").read_whole("shard.tar", max_bytes=SIZE) == data
    assert folder.sibling("a").sibling("../b").location == f"{folder.location}/b"


def test_a_pipe_or_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="not a regular file"):
            folder_of(str(tmp_path)).open(name)


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    assert folder_of((tmp_path / "a b").as_uri()).location == str(tmp_path / "a b")


def test_units_of_one_block_are_one_request(remote: RemoteFolder, server: Server) -> None:
    file = remote.open("shard.tar")
    for start in range(0, 600_000, 6_000):
        file.read(BLOCK_BYTES + start, 6_000)
    assert _ranges(server) == [f"bytes={BLOCK_BYTES}-{2 * BLOCK_BYTES - 1}"]


def test_a_prefetch_asks_for_its_blocks_at_the_same_time(server: Server, data: bytes) -> None:
    """Each answer waits until all four requests are there."""
    together = threading.Barrier(4, timeout=10)

    def waits(handler: servers.Handler, body: bytes) -> bool:
        together.wait()
        return False

    remote = RemoteFolder(f"{server.url}/split", patience=Patience(attempts=1, limit=15))
    file = remote.open("shard.tar")
    server.misdeeds = [waits] * 4
    remote.prefetch([(file, start, 10) for start in range(0, SIZE, 1000)])
    assert sorted(map(str, _ranges(server))) == sorted(
        f"bytes={start}-{min(start + BLOCK_BYTES, SIZE) - 1}" for start in range(0, SIZE, BLOCK_BYTES)
    )
    assert file.read(0, SIZE) == data
    assert len(server.requests) == 5


def test_the_cache_holds_no_more_than_its_bytes(server: Server, data: bytes) -> None:
    small = RemoteFolder(f"{server.url}/split", cache_bytes=2 * BLOCK_BYTES, patience=HASTE)
    file = small.open("shard.tar")
    for number in (0, 1, 0, 2, 0, 1):  # 2 drives out 1, not 0, which was read since
        assert file.read(number * BLOCK_BYTES, 5) == data[number * BLOCK_BYTES :][:5]
    assert [str(said).partition("-")[0] for said in _ranges(server)] == [
        f"bytes={number * BLOCK_BYTES}" for number in (0, 1, 2, 1)
    ]


@pytest.mark.parametrize(
    "misdeed", [servers.stalls, servers.truncates, servers.shortens, servers.hangs_up, servers.fails(500)]
)
def test_a_fault_that_passes_is_outlived(remote: RemoteFolder, server: Server, data: bytes, misdeed: Misdeed) -> None:
    file = remote.open("shard.tar")
    server.misdeeds = [misdeed, servers.fails(503)]
    assert file.read(10, 100) == data[10:110]
    assert len(_ranges(server)) == 3


@pytest.mark.parametrize(
    ("misdeed", "reason"),
    [
        (servers.stalls, "no whole answer within 0.5 s"),
        (servers.truncates, "bytes"),
        (servers.shortens, "bytes"),
        (servers.hangs_up, "Disconnected"),
        (servers.fails(500), "500 Internal Server Error"),
        (servers.fails(429), "429 Too Many Requests"),
    ],
)
def test_a_fault_that_stays_ends_with_one_line(
    remote: RemoteFolder, server: Server, misdeed: Misdeed, reason: str
) -> None:
    file = remote.open("shard.tar")
    server.always = misdeed
    with pytest.raises(OSError, match=f"bytes 0 to {BLOCK_BYTES} could not be read in 4 attempts: .*{reason}") as error:
        file.read(10, 100)
    assert error.value.filename == f"{server.url}/split/shard.tar"
    assert "\n" not in str(error.value)
    assert len(_ranges(server)) >= 4  # the client asks once more by itself where a kept connection was closed


@pytest.mark.parametrize(
    ("misdeed", "reason"),
    [
        (servers.fails(403), "403 Forbidden"),
        (servers.fails(404), "404 Not Found"),
        (servers.ignores_ranges, "status 200: the server does not answer ranged requests"),
    ],
)
def test_what_no_second_attempt_can_mend_is_asked_for_once(
    remote: RemoteFolder, server: Server, misdeed: Misdeed, reason: str
) -> None:
    file = remote.open("shard.tar")
    server.always = misdeed
    with pytest.raises(OSError, match=f"in 1 attempt: {reason}"):
        file.read(10, 100)
    with pytest.raises(OSError, match=f"its size could not be read in 1 attempt: {reason}"):
        remote.open("shard.tar")
    assert len(server.requests) == 3


def test_a_prefetch_that_fails_is_an_error_of_the_reads_and_not_waited_for_again(
    remote: RemoteFolder, server: Server, data: bytes
) -> None:
    file = remote.open("shard.tar")
    server.always = servers.fails(503)
    remote.prefetch([(file, 0, 10), (file, BLOCK_BYTES, 10)])
    asked = len(server.requests)
    for start in (0, 5, BLOCK_BYTES):
        with pytest.raises(OSError, match="503"):
            file.read(start, 5)
    assert len(server.requests) == asked
    server.always = None
    remote.prefetch([(file, BLOCK_BYTES, 10)])
    assert file.read(0, 10) == data[:10]  # errors do not outlive the next prefetch


def test_a_dead_server_costs_its_patience_once(remote: RemoteFolder, server: Server, data: bytes) -> None:
    file = remote.open("shard.tar")
    server.always = servers.fails(503)
    for _ in range(3):
        with pytest.raises(OSError, match="503"):
            file.read(0, 5)
    assert len(_ranges(server)) == 4 + 1 + 1
    server.always = None
    assert file.read(0, 5) == data[:5]
    server.misdeeds = [servers.fails(503)] * 3
    assert file.read(BLOCK_BYTES, 5) == data[BLOCK_BYTES:][:5]


def test_an_unreachable_server_is_one_line(server: Server) -> None:
    folder = RemoteFolder(f"{server.url}/split", patience=HASTE)
    server.server_close()
    server.shutdown()
    with pytest.raises(OSError, match=r"its size could not be read in 4 attempts: .*Cannot connect") as error:
        folder.open("shard.tar")
    assert "\n" not in str(error.value)


def test_threads_read_the_same_folder(remote: RemoteFolder, data: bytes) -> None:
    file = remote.open("shard.tar")
    wrong: list[int] = []

    def read(seed: int) -> None:
        draws = random.Random(seed)
        for start in draws.choices(range(SIZE - 100), k=200):
            if file.read(start, 100) != data[start : start + 100]:
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_retries_leave_the_global_generator_alone(remote: RemoteFolder, server: Server) -> None:
    file = remote.open("shard.tar")
    server.misdeeds = [servers.fails(503)] * 3
    before = random.getstate()
    file.read(0, 1)
    assert random.getstate() == before


def test_a_file_that_shrank_since_it_was_opened_is_an_error(memory: RemoteFolder, data: bytes) -> None:
    file = memory.open("shard.tar")
    fsspec.filesystem("memory").pipe("/storage-test/split/shard.tar", data[:100])
    with pytest.raises(OSError, match=f"the answer has 100 bytes, not {BLOCK_BYTES}"):
        file.read(0, 10)


def test_pauses_double_up_to_a_bound() -> None:
    patience = Patience(attempts=9, pause=1.0, longest_pause=10.0)
    pauses = [[patience.pause_before(attempt) for _ in range(200)] for attempt in range(2, 9)]
    for drawn, longest in zip(pauses, (1, 2, 4, 8, 10, 10, 10), strict=True):
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
        assert len(set(drawn)) > 100


def test_credentials_are_in_no_message(server: Server) -> None:
    host = server.url.removeprefix("http://")
    folder = RemoteFolder(f"http://user:secret@{host}/split", patience=HASTE)
    server.always = servers.fails(403)
    with pytest.raises(OSError, match="403") as error:
        folder.open("shard.tar")
    assert "secret" not in f"{error.value} {folder.location}"
    assert folder.location == f"http://{host}/split"
    assert shown("https://u:p@h/a/b?sig=1") == "https://h/a/b"
    assert shown(Path("/a/b?c@d")) == "/a/b?c@d"
    assert scrubbed("no 'https://u:p@h/a?sig=1' here") == "no 'https://h/a' here"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("dropbox://a/b", r"needs a package .* pip install 'megadistill\[remote\]'"),
        ("nonsense://a/b", "Protocol not known: nonsense"),
    ],
)
def test_a_scheme_that_cannot_be_read_is_refused_in_one_line(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        folder_of(url)
    assert "\n" not in str(error.value)


def test_a_file_bears_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as file:
        file.write(b"first")

    def break_off() -> None:
        with written_whole(path) as file:
            file.write(b"second")
            file.flush()
            assert path.read_bytes() == b"first"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
