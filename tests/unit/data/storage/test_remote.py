"""Remote folders: few requests, retries of what is transient, one line for what is not."""

import random
import threading
from dataclasses import replace

import fsspec
import pytest

from megadistill.data.storage.remote import BLOCK_BYTES, RemoteFolder, RetryPolicy
from tests.unit.data import servers
from tests.unit.data.servers import Misdeed, Server
from tests.unit.data.storage.conftest import FAST_RETRY, HASTY, SIZE


def _ranges(server: Server) -> list[str | None]:
    """Range headers of the requests after the file was opened."""
    return [header for _, header in server.requests[1:]]


def test_a_file_that_is_too_large_is_not_fetched(remote: RemoteFolder, server: Server) -> None:
    with pytest.raises(OSError, match="more than"):
        remote.read_whole("shard.tar", max_bytes=1000)
    assert server.requests == [("/split/shard.tar", "bytes=0-0")]


def test_sequences_of_one_block_are_one_request(remote: RemoteFolder, server: Server) -> None:
    file = remote.open("shard.tar")
    for start in range(0, 600_000, 6_000):
        file.read(BLOCK_BYTES + start, 6_000)
    assert _ranges(server) == [f"bytes={BLOCK_BYTES}-{2 * BLOCK_BYTES - 1}"]


def test_a_prefetch_requests_its_blocks_at_the_same_time(server: Server, data: bytes) -> None:
    """Each response waits until all four requests are there."""
    together = threading.Barrier(4, timeout=10)

    def waits(handler: servers.Handler, body: bytes) -> bool:
        together.wait()
        return False

    remote = RemoteFolder(f"{server.url}/split", retry=RetryPolicy(attempts=1, timeout=15))
    file = remote.open("shard.tar")
    server.misdeeds = [waits] * 4
    remote.prefetch([(file, start, 10) for start in range(0, SIZE, 1000)])
    assert sorted(map(str, _ranges(server))) == sorted(
        f"bytes={start}-{min(start + BLOCK_BYTES, SIZE) - 1}" for start in range(0, SIZE, BLOCK_BYTES)
    )
    assert file.read(0, SIZE) == data
    assert len(server.requests) == 5


def test_the_cache_holds_no_more_than_its_bytes(server: Server, data: bytes) -> None:
    small = RemoteFolder(f"{server.url}/split", cache_bytes=2 * BLOCK_BYTES, retry=FAST_RETRY)
    file = small.open("shard.tar")
    for number in (0, 1, 0, 2, 0, 1):  # 2 drives out 1, not 0, which was read since
        assert file.read(number * BLOCK_BYTES, 5) == data[number * BLOCK_BYTES :][:5]
    assert [str(header).partition("-")[0] for header in _ranges(server)] == [
        f"bytes={number * BLOCK_BYTES}" for number in (0, 1, 2, 1)
    ]


@pytest.mark.parametrize(
    "misdeed", [servers.stalls, servers.truncates, servers.shortens, servers.hangs_up, servers.fails(500)]
)
def test_a_transient_fault_is_retried(server: Server, data: bytes, misdeed: Misdeed) -> None:
    retry = replace(HASTY, timeout=1.0) if misdeed is servers.stalls else FAST_RETRY
    file = RemoteFolder(f"{server.url}/split", retry=retry).open("shard.tar")
    server.misdeeds = [misdeed, servers.fails(503)]
    assert file.read(10, 100) == data[10:110]
    assert len(_ranges(server)) == 3


@pytest.mark.parametrize(
    ("misdeed", "reason"),
    [
        (servers.stalls, "no complete response within 0.5 s"),
        (servers.truncates, "bytes"),
        (servers.shortens, "bytes"),
        (servers.hangs_up, "Disconnected"),
        (servers.fails(500), "500 Internal Server Error"),
        (servers.fails(429), "429 Too Many Requests"),
    ],
)
def test_a_lasting_fault_ends_with_one_line(server: Server, misdeed: Misdeed, reason: str) -> None:
    retry = HASTY if misdeed is servers.stalls else FAST_RETRY
    file = RemoteFolder(f"{server.url}/split", retry=retry).open("shard.tar")
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
        (servers.ignores_ranges, "status 200: the server does not support ranged requests"),
    ],
)
def test_a_permanent_error_is_not_retried(remote: RemoteFolder, server: Server, misdeed: Misdeed, reason: str) -> None:
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
    requests = len(server.requests)
    for start in (0, 5, BLOCK_BYTES):
        with pytest.raises(OSError, match="503"):
            file.read(start, 5)
    assert len(server.requests) == requests
    server.always = None
    remote.prefetch([(file, BLOCK_BYTES, 10)])
    assert file.read(0, 10) == data[:10]  # errors do not outlive the next prefetch


def test_a_dead_server_is_retried_in_full_only_once(remote: RemoteFolder, server: Server, data: bytes) -> None:
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
    folder = RemoteFolder(f"{server.url}/split", retry=FAST_RETRY)
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
    with pytest.raises(OSError, match=f"the response has 100 bytes, not {BLOCK_BYTES}"):
        file.read(0, 10)


def test_pauses_double_up_to_a_bound() -> None:
    retry = RetryPolicy(attempts=9, pause=1.0, max_pause=10.0)
    pauses = [[retry.pause_before(attempt) for _ in range(200)] for attempt in range(2, 9)]
    for drawn, longest in zip(pauses, (1, 2, 4, 8, 10, 10, 10), strict=True):
        assert longest / 2 <= min(drawn) < max(drawn) <= longest
        assert len(set(drawn)) > 100


def test_credentials_are_in_no_message(server: Server) -> None:
    host = server.url.removeprefix("http://")
    folder = RemoteFolder(f"http://user:secret@{host}/split", retry=FAST_RETRY)
    server.always = servers.fails(403)
    with pytest.raises(OSError, match="403") as error:
        folder.open("shard.tar")
    assert "secret" not in f"{error.value} {folder.location}"
    assert folder.location == f"http://{host}/split"
