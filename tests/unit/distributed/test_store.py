"""The store in which ranks find each other, over the restarts of a launcher."""

import pytest
from torch._C._distributed_c10d import HashStore

from megadistill.distributed.topology import store_of_this_start


def test_a_restarted_rank_finds_nothing_of_the_start_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun with --max-restarts keeps one store: an address in it may be that of a killed rank."""
    shared = HashStore()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    store_of_this_start(shared).set("address", "of a killed rank")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not store_of_this_start(shared).check(["address"])
    store_of_this_start(shared).set("address", "mine")
    assert store_of_this_start(shared).get("address") == b"mine"


@pytest.mark.parametrize("agents", [None, "2"])
def test_ranks_whose_agents_count_restarts_by_themselves_share_one_store(
    agents: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if agents is None:
        monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("GROUP_WORLD_SIZE", agents)
    shared = HashStore()
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert store_of_this_start(shared) is shared
