"""Point-to-point messages: their numbers in a timeline, and that one module creates all of them."""

import ast
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megadistill
from megadistill.distributed.p2p import Endpoint
from megadistill.timeline.clock import HostClock
from megadistill.timeline.recorder import Recorder

CREATORS = {"isend", "irecv", "send", "recv", "P2POp", "batch_isend_irecv"}
"""What creates a message in torch.distributed."""


class _Work:
    def wait(self) -> None: ...


class _Group:
    """Accepts all messages."""

    def __init__(self) -> None:
        self.peers: list[tuple[str, int]] = []

    def send(self, tensors: list[Tensor], to: int, tag: int) -> _Work:
        self.peers.append(("send", to))
        return _Work()

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> _Work:
        self.peers.append(("recv", source))
        return _Work()


def test_messages_are_numbered_by_pair_and_direction_and_named_by_global_ranks() -> None:
    group: Any = _Group()
    endpoint = Endpoint(group, rank=1, ranks=range(4, 8))
    recorder = Recorder(HostClock())
    recorder.start()
    try:
        buffer = torch.zeros(2)
        for message in (
            endpoint.send(buffer, 2, label="packet"),
            endpoint.send(buffer, 2, label="packet"),
            endpoint.send(buffer, 3, label="packet"),
            endpoint.post_recv(buffer, 0, label="answer"),
            endpoint.post_recv(buffer, 0, label="answer"),
        ):
            assert message.wait() is buffer
    finally:
        recorder.stop()
    assert group.peers == [("send", 2), ("send", 2), ("send", 3), ("recv", 0), ("recv", 0)]
    spans = [(span.kind, span.name, span.message) for span in recorder.recorded()[0] if span.name != "flush"]
    assert spans == [
        ("send", "send packet", (5, 6, 0)),
        ("send", "send packet", (5, 6, 1)),
        ("send", "send packet", (5, 7, 0)),
        ("wait", "wait for answer", (4, 5, 0)),
        ("wait", "wait for answer", (4, 5, 1)),
    ]


def test_one_module_creates_messages() -> None:
    """Every message is numbered there, and a wait for it is visible to the hang detector."""
    own = Path(megadistill.__file__).parent
    creators = set()
    for file in own.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in CREATORS:
                receiver = ast.unparse(node.value)
                if receiver == "dist" or "group" in receiver:
                    creators.add(file.relative_to(own).as_posix())
    assert creators == {"distributed/p2p.py"}
