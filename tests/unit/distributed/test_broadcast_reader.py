"""Time limits of loading, and errors of a rank that loads alone."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from megadistill.distributed.broadcast_reader import BroadcastReader, Layout, read_by_first
from megadistill.distributed.topology import Topology
from megadistill.errors import RankUserError, UserError

CPU = torch.device("cpu")
LAYOUT = [Layout(torch.Size([2]), torch.float32)]
Phase = tuple[str, int, float | None]


class _Watchdog:
    def __init__(self) -> None:
        self.phases: list[Phase] = []

    def enter_phase(self, phase: str, step: int, *, limit: float | None) -> None:
        self.phases.append((phase, step, limit))


@pytest.mark.parametrize(("role", "after"), [("student", 600.0), ("teacher", None)])
def test_each_tensor_has_the_time_limit_of_a_collective(
    role: Literal["student", "teacher"], after: float | None
) -> None:
    watchdog: Any = _Watchdog()
    topology = Topology(0, 1, 0, 1, CPU, role=role, timeout=timedelta(minutes=10), watchdog=watchdog)
    reader = BroadcastReader(topology)
    for _ in range(3):
        (tensor,) = reader.tensors(LAYOUT, lambda: [torch.ones(2)], device=CPU)
        assert tensor.tolist() == [1, 1]
    reader.finish()
    assert watchdog.phases == [("loading the teacher", 0, 600.0)] * 3 + [("starting", 0, after)]


def test_a_rank_that_loads_alone_raises_at_once() -> None:
    def broken() -> list[torch.Tensor]:
        raise UserError("no such file")

    with pytest.raises(UserError, match="no such file"):
        BroadcastReader().tensors(LAYOUT, broken, device=CPU)


def test_what_one_rank_reads_is_refused_with_its_rank() -> None:
    def broken() -> str:
        raise UserError("no such file")

    topology = Topology(0, 1, 0, 1, CPU)
    assert read_by_first(topology, lambda: "digest") == "digest"
    with pytest.raises(RankUserError, match=r"^rank 0: no such file$"):
        read_by_first(topology, broken)


@pytest.mark.parametrize(("rank", "calls"), [(0, ["broadcast"] * 2), (1, ["broadcast", "wait"] * 2)])
def test_a_receiver_waits_for_each_tensor(rank: int, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Broadcasts of a device end after the call: all of a stage would be under way, each with its limit, at once."""
    seen: list[str] = []
    group: Any = SimpleNamespace(rank=lambda: rank)
    monkeypatch.setattr("torch.distributed.broadcast", lambda *_, **__: seen.append("broadcast"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: seen.append("wait"))
    reader, device = BroadcastReader(group=group), torch.device("meta")
    for _ in range(2):
        reader.tensors(LAYOUT, lambda: [torch.empty(2, device=device)], device=device)
    assert seen == calls


@pytest.mark.parametrize("read", [torch.ones(3), torch.ones(2, dtype=torch.float64)])
def test_a_tensor_that_the_others_do_not_expect_is_not_sent(read: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="the other ranks expect"):
        BroadcastReader().tensors(LAYOUT, lambda: [read], device=CPU)
