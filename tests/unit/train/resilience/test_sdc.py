"""Digests of weights: every bit counts, and a change is named."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.distributed.topology import Topology
from megadistill.errors import OperatorFault
from megadistill.student.state import StudentState
from megadistill.train.resilience import sdc
from megadistill.train.resilience.sdc import FrozenWeights, require_sound_student, weights_digest
from tests.device_double import DEVICE, DeviceDouble
from tests.unit.train.cases import topology

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def _digest(tensor: Tensor) -> int:
    return int(weights_digest([("w", tensor)])[0])


def _flip(tensor: Tensor, element: int, bit: int) -> None:
    raw = tensor.view(-1).view(torch.uint8)
    raw[element * tensor.dtype.itemsize + bit // 8] ^= 1 << bit % 8


def _weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_it(dtype: torch.dtype) -> None:
    weights = _weights(3, 7, dtype=dtype)
    before = _digest(weights)
    seen = {before}
    for element in (0, 10, 20):
        for bit in range(8 * dtype.itemsize):
            _flip(weights, element, bit)
            seen.add(_digest(weights))
            _flip(weights, element, bit)
    assert _digest(weights) == before
    assert len(seen) == 1 + 3 * 8 * dtype.itemsize, "two flips have one digest, or none"


def test_it_is_the_sum_that_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in Python's integers, over several chunks, the last of which is not full."""
    monkeypatch.setattr(sdc, "CHUNK", 8)
    weights = _weights(21)
    bits = weights.view(torch.int32).tolist()
    odd = sdc._odd(8, torch.device("cpu")).tolist()
    assert len(set(odd)) == 8
    assert all(number % 2 for number in odd)
    total = sum(odd[i // 8] * odd[i % 8] * bits[i] for i in range(21))
    assert _digest(weights) % (1 << 64) == total % (1 << 64)


def test_neither_order_nor_two_signs_cancel() -> None:
    weights = _weights(40, dtype=torch.bfloat16)
    seen = {_digest(weights), _digest(weights.flip(0))}
    for other in range(1, 40):
        for element in (0, other):
            _flip(weights, element, 15)
        seen.add(_digest(weights))
        for element in (0, other):
            _flip(weights, element, 15)
    assert len(seen) == 2 + 39


def test_a_matrix_that_is_a_view_and_one_without_rows() -> None:
    whole = _weights(6, 5)
    assert _digest(whole[1:4]) == _digest(whole[1:4].clone())
    assert _digest(whole.T) == _digest(whole.T.contiguous())
    assert _digest(whole[:0]) == 0
    assert weights_digest([]).tolist() == []


def test_a_change_is_named() -> None:
    named = [(name, _weights(4, 4)) for name in ("q", "k", "v")]
    frozen = FrozenWeights.of(named)
    frozen.require_unchanged(topology())
    frozen.require_same_replicas(topology())
    _flip(named[1][1], 5, 0)
    with pytest.raises(OperatorFault, match=r"^rank 0 on \S+: the teacher's k changed in memory; .*exclude the node"):
        frozen.require_unchanged(topology())


def test_a_message_stays_a_line() -> None:
    frozen = FrozenWeights.of([(f"layer {number}", _weights(4)) for number in range(100)])
    for _, tensor in frozen.tensors:
        tensor.add_(1)
    with pytest.raises(OperatorFault, match=re.escape("layer 0, layer 1, layer 2 and 97 more changed")):
        frozen.require_unchanged(topology())


class _State(StudentState):
    """That of two norms which are whole on the device, and two matrices whose pieces are offloaded to the host."""

    def __init__(self) -> None:
        self.masters = {name: _weights(6) for name in ("norm", "up", "last_norm", "down")}
        self.copies = {name: master.bfloat16() for name, master in self.masters.items()}
        self.whole = {name: copy.to(DEVICE) for name, copy in self.copies.items() if "norm" in name}

    def replicated(self) -> list[tuple[str, Tensor]]:
        return list(self.whole.items())

    def _partitions(self) -> Iterator[Any]:
        for name, master in self.masters.items():
            parameter = SimpleNamespace(ds_tensor=self.whole.get(name, self.copies[name])[2:5])
            place = {"start": 2, "stop": 5, "numel": 3, "read": lambda kind, master=master: master[2:5]}
            yield SimpleNamespace(name=name, parameter=parameter, **place)


def test_parameters_on_the_host_and_on_the_device_are_checked_with_a_wait_for_each_answer() -> None:
    on_device = Topology(rank=0, world=1, local_rank=0, group_size=1, device=DEVICE)
    with DeviceDouble() as double:
        state = _State()
        student: Any = SimpleNamespace(state=state)
        require_sound_student(student, on_device)
        double.clear()
        require_sound_student(student, on_device)
        masters = double.counts.pop("to device in state.params_differing_from_master")
        assert masters == 2, "an offloaded master of each norm"
        answers = {place: count for place, count in double.counts.items() if not place.startswith("to device")}
        assert sum(answers.values()) == 3, answers
        assert len(double.syncs) == 3 + masters
        for name in ("up", "last_norm"):
            _flip(state.masters[name], 3, 30)
            assert state.params_differing_from_master() == [name]
            with pytest.raises(OperatorFault, match=f"the student's {name} is not its float32 master"):
                require_sound_student(student, on_device)
            _flip(state.masters[name], 3, 30)
