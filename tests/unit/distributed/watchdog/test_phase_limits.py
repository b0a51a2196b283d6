"""A phase is found late before a backend's own limit ends the process, which names no rank."""

import pytest

from megadistill.distributed.watchdog.watchdog import Watchdog


@pytest.mark.parametrize(
    ("world", "collective", "phase", "limit"),
    [
        (8, 600.0, 600.0, 595.0),
        (4096, 600.0, 600.0, 571.0),  # rank 0 reads 4,096 heartbeats every 9 seconds
        (8, 600.0, 60.0, 60.0),
        (8, 20.0, 600.0, 18.0),
        (8, 600.0, None, None),
        (8, None, 600.0, 600.0),
    ],
)
def test_the_limit_of_a_phase(world: int, collective: float | None, phase: float | None, limit: float | None) -> None:
    watchdog = Watchdog(world=world, collective_limit=collective)
    watchdog.enter_phase("step", 1, limit=phase)
    assert watchdog.heartbeat(1).limit == limit
