"""A student and a teacher with a rank each, as two processes on one GPU under NCCL: do their messages end?

In the package's order, through its own bridge, client and server; and in the former order, in which requests and
answers share a communicator that is made by the receive of the first answer. That one hangs under NCCL's rules, and
ends under gloo, which stands in on a CPU. NCCL refuses two ranks on one GPU of one host, so each names another host.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from megadistill.distributed.groups.unregistered import device_backend
from megadistill.distributed.launch import Launch
from megadistill.distributed.p2p import Endpoint
from megadistill.distributed.rendezvous import launch_store, store_barrier
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology, local_device, process_groups
from megadistill.teacher.codec import ActivationCodec
from megadistill.teacher.disaggregated import RemoteTeacher, RequestCodec, TeacherServer
from megadistill.types import TokenBatch, token_digest
from tests.gpu.device import Device
from tests.gpu.results import Record
from tests.paths import ROOT

STUDENT, TEACHER = 0, 1
B, QUEUE, ROUNDS = 1, 2, 8
DTYPE = torch.bfloat16
ORDERS = ("package", "former")
START_SECONDS, HANG_SECONDS = 60.0, 25.0
"""Time limits of a pair until both have met, and of its messages from then on: on a device of their own they take less
than a second, and here the two processes take turns on one, by time slices of milliseconds."""
READY, DONE = "ready", "done in"
"""What a process prints."""


@dataclass(frozen=True)
class _Size:
    S: int
    E: int

    @classmethod
    def on(cls, device: torch.device) -> "_Size":
        """Of an answer: on a GPU more than NCCL buffers, so that a send waits for its receive."""
        return cls(32, 16) if device.type == "cpu" else cls(8192, 4608)


@dataclass(frozen=True)
class _Stage:
    """A teacher whose hidden states are its tokens."""

    size: _Size
    device: torch.device
    stage: int = 0
    is_first: bool = True
    is_last: bool = True
    dtype: torch.dtype = DTYPE
    reads_tokens: bool = False

    def packet_shape(self, batch: int, sequence: int) -> tuple[int, int, int]:
        return batch, sequence, self.size.E

    def __call__(self, x: Tensor, positions: Tensor | None, tokens: Tensor | None) -> Tensor:
        return x.unsqueeze(-1).expand(*x.shape, self.size.E).to(DTYPE)


def run(device: Device, record: Record) -> None:
    for order in ORDERS:
        case = f"a teacher with a rank of its own, {order} order"
        with record.part(case):
            seconds = pair(order, stand_in=device.stand_in)
            record(case, "ends", seconds is not None)
            if seconds is not None:
                record(case, "time of a micro-batch", 1e3 * seconds / ROUNDS, "ms")


def pair(order: str, *, stand_in: bool) -> float | None:
    """Seconds of all micro-batches of two processes; None where they hang.

    Raises:
        RuntimeError: one of them failed; the message is what it printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.gpu.nccl_pair", order]
    ranks = []
    for rank in (STUDENT, TEACHER):
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NCCL_HOSTID": f"host-{rank}",
            "NCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_NET": "Socket",  # whatever adapters and plugins the machine has
            **({"CUDA_VISIBLE_DEVICES": ""} if stand_in else {}),
        }
        ranks.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables}, text=True, **_PIPES))
    try:
        return _seconds(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


_PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}


def _seconds(ranks: "Sequence[subprocess.Popen[str]]") -> float | None:
    """What the student measured; None where the messages do not end within `HANG_SECONDS` from when both have met."""
    outputs = [_Output(process) for process in ranks]
    _until(outputs, READY, START_SECONDS)
    if not all(READY in output.text for output in outputs):
        raise RuntimeError("the pair did not meet: " + " | ".join(output.text for output in outputs))
    _until(outputs, DONE, HANG_SECONDS)
    for output in outputs:
        if output.process.poll() not in (None, 0):
            raise RuntimeError(f"exit code {output.process.poll()}: {output.text}")
    if not all(DONE in output.text for output in outputs):
        return None
    for output in outputs:
        if output.process.wait(timeout=START_SECONDS) != 0:
            raise RuntimeError(f"exit code {output.process.poll()}: {output.read()}")
    return float(outputs[STUDENT].text.rpartition(DONE)[2].split()[0])


class _Output:
    """What a process has printed so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process, self.text = process, ""
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)

    def read(self) -> str:
        assert self.process.stdout is not None
        with suppress(TypeError, BlockingIOError):  # nothing to read: the second one since Python 3.14
            self.text += self.process.stdout.read()
        return self.text


def _until(outputs: Sequence[_Output], word: str, limit: float) -> None:
    """Reads until each process has printed the word, one has failed, or the time is over."""
    end = time.monotonic() + limit
    while time.monotonic() < end and not all([word in output.read() for output in outputs]):
        if any(output.process.poll() not in (None, 0) for output in outputs):
            return
        time.sleep(0.05)


# One of the two processes


def main(order: str) -> None:
    launch = Launch.from_environment()
    seconds = {"package": _package_order, "former": _former_order}[order](launch)
    print(f"{DONE} {seconds} s", flush=True)


def _package_order(launch: Launch) -> float:
    with process_groups(launch, vocab_group=1, timeout_minutes=1.0, roles=Roles(2, 1, 1)) as topology:
        print(READY, flush=True)
        began = time.perf_counter()
        _serve(topology) if topology.role == "teacher" else _request(topology)
        _synchronize(topology.device)
        return time.perf_counter() - began


def _serve(topology: Topology) -> None:
    size = _Size.on(topology.device)
    stage = _Stage(size, topology.device)
    assert topology.bridge is not None
    for _ in TeacherServer(stage, topology.bridge, *_codecs(size), queue=QUEUE).serve():
        pass


def _request(topology: Topology) -> None:
    size = _Size.on(topology.device)
    assert topology.bridge is not None
    remote = RemoteTeacher(topology.bridge, *_codecs(size), queue=QUEUE, device=topology.device)
    stopped = remote.signals(_batches(size))
    next(stopped)
    stopped.close()  # as a rollback does, with a request under way
    batches = list(_batches(size))
    signals = list(remote.signals(iter(batches)))
    assert len(signals) == ROUNDS
    for signal, batch in zip(signals, batches, strict=True):
        hidden_NE = signal.hidden_for(batch).cpu()
        assert torch.equal(hidden_NE, batch.tokens.view(-1, 1).expand_as(hidden_NE).to(DTYPE))
    remote.close()


def _codecs(size: _Size) -> tuple[RequestCodec, ActivationCodec]:
    return RequestCodec(B, size.S, masked=False), ActivationCodec(size.E, DTYPE)


def _batches(size: _Size) -> Iterator[TokenBatch]:
    for index in range(ROUNDS):
        tokens = torch.randint(256, (B, size.S), generator=torch.Generator().manual_seed(index))
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        yield TokenBatch(tokens, tokens, torch.tensor([index]), token_digest(tokens), starts)


def _former_order(launch: Launch) -> float:
    device, timeout = local_device(launch.local_rank), timedelta(minutes=1)
    store, size = launch_store(launch, timeout), _Size.on(device)
    group = device_backend(PrefixStore("pair", store), launch.rank, [0, 1], timeout, device=device, name="pair")
    endpoint = Endpoint(group, rank=launch.rank, ranks=range(2))
    request = torch.zeros(B * size.S, dtype=torch.int64, device=device)
    answer = torch.zeros(B * size.S * size.E, dtype=DTYPE, device=device)
    store_barrier(store, READY, launch.rank, 2, timeout)
    print(READY, flush=True)
    began = time.perf_counter()
    if launch.rank == STUDENT:
        for _ in range(ROUNDS):
            received = endpoint.post_recv(answer, TEACHER, label="answer")
            endpoint.send(request, TEACHER, label="request").wait()
            received.wait()
            _synchronize(device)
    else:
        asked = endpoint.post_recv(request, STUDENT, label="request")
        for number in range(ROUNDS):
            asked.wait()
            if number + 1 < ROUNDS:
                asked = endpoint.post_recv(request, STUDENT, label="request")
            endpoint.send(answer, STUDENT, label="answer").wait()
            _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
