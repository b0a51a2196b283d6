"""Ranks as threads of one process, whose messages and collectives obey NCCL's rules; gloo has none of them.

* A communicator is made at its first use, on the host: the call returns when all of its ranks have made theirs. One
  send or receive has a communicator of the two ranks; collectives and batches of messages have that of the group.
* A communicator has one stream on each rank: its operations run in the order of issue. With `one_queue` all operations
  of a rank do, whatever their communicator, as where a device has one hardware queue or cannot start another kernel.
* A send ends when its receive runs; a collective when it is the next operation on all of its ranks.
* Messages in host memory are gloo's: a send ends when its receive is posted, and nothing else waits.

`wait` blocks the host, where NCCL's only makes a stream wait: later calls of a rank come later, never earlier, so what
ends here ends there too. Every wait is known, so a hang is seen when the last rank that runs begins to wait: it ends
all ranks with a picture of who waits for what. Nothing depends on time.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import Store as TorchStore
from torch.testing._internal.distributed import multi_threaded_pg

from megadistill.distributed import bridge
from megadistill.distributed.roles import Roles

Communicator = tuple[Any, ...]
"""Its group, and the two ranks where it is one of a pair."""

BACKEND = "nccl_rules"


class Hang(AssertionError):
    """No rank can go on; the message says what each of them waits for."""


@dataclass(frozen=True)
class Failed:
    """How a rank ended that raised."""

    error: BaseException


@dataclass(eq=False)
class Part:
    """A message of an operation."""

    is_sent: bool
    peer: int
    tensor: Tensor
    is_matched: bool = False


@dataclass(eq=False)
class Operation:
    """A collective, or messages that run together."""

    rank: int
    communicator: Communicator
    name: str
    parts: list[Part] = field(default_factory=list)
    collective: Callable[[list["Operation"]], None] | None = None
    """Fills the results of all ranks' operations, which come in rank order; None for messages."""
    tensors: tuple[Any, ...] = ()
    is_done: bool = False


@dataclass(eq=False)
class _Blocked:
    is_over: Callable[[], bool]
    where: Callable[[], str]


class World:
    """The state of all ranks."""

    def __init__(self, size: int, *, one_queue: bool = False) -> None:
        self.size = size
        self.one_queue = one_queue
        self.lock = threading.RLock()
        self._wake_ups = [threading.Condition(self.lock) for _ in range(size)]
        self.ended: dict[int, str] = {}
        self.values: dict[str, bytes] = {}
        """Contents of the store."""
        self.hang: str | None = None
        self.made: dict[Communicator, list[int]] = {}
        """The ranks that have entered a communicator's making, in the order in which they came."""
        self.members: dict[Any, list[int]] = {}
        """Ranks of each group."""
        self._blocked: dict[int, _Blocked] = {}
        self._streams: dict[tuple[int, Any], deque[Operation]] = {}
        self._host: dict[tuple[Any, int, int], tuple[deque[Operation], deque[Operation]]] = {}

    def block(self, rank: int, is_over: Callable[[], bool], where: Callable[[], str]) -> None:
        """Holds the thread of a rank; the lock is held by the caller."""
        if is_over():
            return
        self._blocked[rank] = _Blocked(is_over, where)
        self._find_hang()
        while not is_over():
            if self.hang is not None:
                raise Hang(self.hang)
            self._wake_ups[rank].wait()
        del self._blocked[rank]

    def wake(self) -> None:
        """Lets the ranks go on whose waits are over; the lock is held by the caller."""
        for rank, blocked in self._blocked.items():
            if self.hang is not None or blocked.is_over():
                self._wake_ups[rank].notify()

    def end(self, rank: int, how: str) -> None:
        with self.lock:
            self.ended[rank] = how
            self._blocked.pop(rank, None)
            self._find_hang()

    def enter(self, communicator: Communicator, rank: int, ranks: Sequence[int], name: str) -> None:
        """Makes a communicator on this rank, where it has none yet; the lock is held by the caller."""
        arrived = self.made.setdefault(communicator, [])
        if rank in arrived:
            return
        arrived.append(rank)
        self.wake()

        def where() -> str:
            missing = [each for each in ranks if each not in arrived]
            return f"in {name}: makes the communicator of ranks {list(ranks)}, which {missing} have not entered"

        self.block(rank, lambda: len(arrived) == len(ranks), where)

    def issue(self, operation: Operation) -> None:
        """Puts an operation on its stream and runs what can run; the lock is held by the caller."""
        stream = self._stream(operation.rank, operation.communicator)
        stream.append(operation)
        if stream[0] is operation:
            self._run(operation)

    def post(self, group: Any, operation: Operation) -> None:
        """A message in host memory, which waits for nothing but its other half; the lock is held by the caller."""
        (part,) = operation.parts
        pair = (operation.rank, part.peer) if part.is_sent else (part.peer, operation.rank)
        sends, receives = self._host.setdefault((group, *pair), (deque(), deque()))
        (sends if part.is_sent else receives).append(operation)
        if sends and receives:
            send, receive = sends.popleft(), receives.popleft()
            _copy(send.parts[0], receive.parts[0])
            send.is_done = receive.is_done = True
            self._wake_ups[send.rank].notify()
            self._wake_ups[receive.rank].notify()

    def under_way(self, group: Any) -> list[str]:
        device = [op for stream in self._streams.values() for op in stream if op.communicator[0] == group]
        host = [op for key, queues in self._host.items() if key[0] == group for queue in queues for op in queue]
        return [f"rank {operation.rank}: {operation.name}" for operation in device + host]

    def wait(self, operation: Operation) -> None:
        with self.lock:
            self.block(operation.rank, lambda: operation.is_done, lambda: self._waits_for(operation))

    def _stream(self, rank: int, communicator: Communicator) -> deque[Operation]:
        return self._streams.setdefault((rank, None if self.one_queue else communicator), deque())

    def _next(self, rank: int, communicator: Communicator) -> Operation | None:
        """The operation that runs on a rank, if it is one of this communicator."""
        stream = self._stream(rank, communicator)
        return stream[0] if stream and stream[0].communicator == communicator else None

    def _run(self, first: Operation) -> None:
        """Runs an operation that is the next one of its stream, and what follows from its end."""
        pending = [first]
        while pending:
            operation = pending.pop()
            if operation.is_done:
                continue
            done = self._meet(operation) if operation.collective is not None else self._exchange(operation)
            for each in done:
                each.is_done = True
                self._wake_ups[each.rank].notify()
                stream = self._stream(each.rank, each.communicator)
                assert stream.popleft() is each
                pending += list(stream)[:1]

    def _meet(self, operation: Operation) -> list[Operation]:
        ranks = self.members[operation.communicator[0]]
        together = []
        for rank in ranks:
            other = self._next(rank, operation.communicator)
            if other is None:
                return []
            together.append(other)
        names = {other.name for other in together}
        if len(names) > 1:
            self.hang = f"ranks {ranks} run different operations of one communicator: {sorted(names)}"
            self.wake()
            raise Hang(self.hang)
        assert operation.collective is not None
        with torch.no_grad():
            operation.collective(together)
        return together

    def _exchange(self, operation: Operation) -> list[Operation]:
        touched = [operation]
        for part in operation.parts:
            other = self._next(part.peer, operation.communicator)
            if part.is_matched or other is None:
                continue
            for half in other.parts:
                is_other_half = half.peer == operation.rank and half.is_sent != part.is_sent
                if is_other_half and not half.is_matched:
                    _copy(part, half) if part.is_sent else _copy(half, part)
                    touched.append(other)
                    break
        return [each for each in dict.fromkeys(touched) if all(part.is_matched for part in each.parts)]

    def _find_hang(self) -> None:
        """The lock is held by the caller."""
        is_any_running = len(self._blocked) + len(self.ended) < self.size
        if self.hang is not None or not self._blocked or is_any_running:
            return
        if any(blocked.is_over() for blocked in self._blocked.values()):
            return
        lines = [f"rank {rank} {blocked.where()}" for rank, blocked in sorted(self._blocked.items())]
        lines += [f"rank {rank} {how}" for rank, how in sorted(self.ended.items())]
        self.hang = "no rank can go on:\n  " + "\n  ".join(lines)
        self.wake()

    def _waits_for(self, operation: Operation) -> str:
        """Says why an operation waits: for one before it on its stream, or for what its peers run instead of it."""
        stream = self._stream(operation.rank, operation.communicator)
        if operation not in stream:  # in host memory
            return f"waits for {operation.name}"
        if stream[0] is not operation:
            return f"waits for {operation.name}, which stands behind {stream[0].name} on its stream"
        peers = [part.peer for part in operation.parts if not part.is_matched]
        for peer in peers or self.members[operation.communicator[0]]:
            if self._next(peer, operation.communicator) is None:
                ahead = self._stream(peer, operation.communicator)
                runs = f"runs {ahead[0].name}" if ahead else "has not issued it"
                return f"waits for {operation.name}; rank {peer} {runs}"
        return f"waits for {operation.name}"


def _copy(send: Part, receive: Part) -> None:
    assert send.tensor.nbytes == receive.tensor.nbytes, "the receive has another size than the send"
    with torch.no_grad():
        receive.tensor.copy_(send.tensor)
    send.is_matched = receive.is_matched = True


class Work:
    """The handle of an operation."""

    def __init__(self, world: World, operation: Operation) -> None:
        self._world, self._operation = world, operation

    def wait(self, *_: Any) -> bool:
        self._world.wait(self._operation)
        return True

    def is_completed(self) -> bool:
        return self._operation.is_done


_thread = threading.local()
"""`world` and `rank` of the thread's rank, `role`, the `first` rank of that role, and `roles`."""

_ProcessGroup: Any = dist.ProcessGroup
"""Its methods have overloads, of which torch's functions call one each."""


class Group(_ProcessGroup):  # type: ignore[misc]
    """A process group under the rules. `key` names it on all ranks, `ranks` are its members."""

    def __init__(self, key: Any, ranks: Sequence[int]) -> None:
        self.world, self.own = _thread.world, _thread.rank
        self.key, self.ranks = key, list(ranks)
        self.world.members.setdefault(key, self.ranks)
        super().__init__(self.ranks.index(self.own), len(self.ranks))

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return self.ranks.index(self.own)

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:
        return str(self.key)

    # Messages

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Work:
        return self._message(tensors[0], to, is_sent=True)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Work:
        return self._message(tensors[0], source, is_sent=False)

    def _message(self, tensor: Tensor, peer: int, *, is_sent: bool) -> Work:
        other = self.ranks[peer]
        pair = sorted((self.own, other))
        return self._issue(self._parts([(is_sent, peer, tensor)]), (self.key, *pair), pair)

    def batch(self, messages: list[tuple[bool, int, Tensor]]) -> Work:
        """Messages that run together: whether each is sent, its peer's place, and its buffer."""
        return self._issue(self._parts(messages), (self.key,), self.ranks)

    def _parts(self, messages: list[tuple[bool, int, Tensor]]) -> Operation:
        parts = [Part(is_sent, self.ranks[peer], tensor) for is_sent, peer, tensor in messages]
        name = ", ".join(f"the {'send to' if part.is_sent else 'receive from'} {part.peer}" for part in parts)
        return Operation(self.own, (), f"{name} ({self.key})", parts)

    def _issue(self, operation: Operation, communicator: Communicator, ranks: Sequence[int]) -> Work:
        operation.communicator = communicator
        with self.world.lock:
            self.world.enter(communicator, self.own, ranks, operation.name)
            self.world.issue(operation)
        return Work(self.world, operation)

    def shutdown(self) -> None:
        with self.world.lock:
            assert not self.world.under_way(self.key), f"shut down too early: {self.world.under_way(self.key)}"

    # Collectives

    def _collective(self, name: str, run: Callable[[list[Operation]], None], *tensors: Any) -> Work:
        operation = Operation(self.own, (), f"{name} ({self.key})", collective=run, tensors=tensors)
        return self._issue(operation, (self.key,), self.ranks)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        reduce_op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        return self._collective(f"all-reduce of {tensors[0].numel()}", _all_reduce(reduce_op), tensors[0])

    def barrier(self, opts: Any = None) -> Work:
        return self.allreduce([torch.zeros(1)])

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Any = None) -> Work:
        return self._collective(f"all-gather of {source.numel()}", _all_gather, output, source)

    def allgather(self, outputs: list[list[Tensor]], sources: list[Tensor], opts: Any = None) -> Work:
        return self._collective(f"list all-gather of {sources[0].numel()}", _all_gather_list, outputs[0], sources[0])

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any = None) -> Work:
        return self._collective(f"reduce-scatter of {source.numel()}", _reduce_scatter, output, source)

    def scatter(self, outputs: list[Tensor], sources: list[list[Tensor]], opts: Any = None) -> Work:
        name = f"scatter of {outputs[0].numel()} from {opts.rootRank}"
        return self._collective(name, _scatter(opts.rootRank), outputs[0], sources)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Work:
        name = f"broadcast of {tensors[0].numel()} from {opts.rootRank}"
        return self._collective(name, _broadcast(opts.rootRank), tensors[0])

    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single  # of earlier releases


def _all_reduce(reduce_op: Any) -> Callable[[list[Operation]], None]:
    def run(operations: list[Operation]) -> None:
        stacked = torch.stack([operation.tensors[0] for operation in operations])
        if reduce_op == dist.ReduceOp.SUM:
            result = stacked.sum(dim=0).to(stacked.dtype)
        elif reduce_op == dist.ReduceOp.MIN:
            result = stacked.amin(dim=0)
        else:
            assert reduce_op == dist.ReduceOp.MAX
            result = stacked.amax(dim=0)
        for operation in operations:
            operation.tensors[0].copy_(result)

    return run


def _all_gather(operations: list[Operation]) -> None:
    together = torch.cat([operation.tensors[1].flatten() for operation in operations])
    for operation in operations:
        operation.tensors[0].copy_(together.view_as(operation.tensors[0]))


def _all_gather_list(operations: list[Operation]) -> None:
    for operation in operations:
        for output, other in zip(operation.tensors[0], operations, strict=True):
            output.copy_(other.tensors[1])


def _reduce_scatter(operations: list[Operation]) -> None:
    total = torch.stack([operation.tensors[1] for operation in operations]).sum(dim=0)
    for operation, block in zip(operations, total.chunk(len(operations)), strict=True):
        operation.tensors[0].copy_(block.view_as(operation.tensors[0]))


def _scatter(root: int) -> Callable[[list[Operation]], None]:
    def run(operations: list[Operation]) -> None:
        for operation, block in zip(operations, operations[root].tensors[1][0], strict=True):
            operation.tensors[0].copy_(block)

    return run


def _broadcast(root: int) -> Callable[[list[Operation]], None]:
    def run(operations: list[Operation]) -> None:
        for operation in operations:
            operation.tensors[0].copy_(operations[root].tensors[0])

    return run


class HostGroup(Group):
    """A group of gloo's, for messages in host memory."""

    def _message(self, tensor: Tensor, peer: int, *, is_sent: bool) -> Work:
        operation = self._parts([(is_sent, peer, tensor)])
        with self.world.lock:
            self.world.post(self.key, operation)
        return Work(self.world, operation)


class Store(TorchStore):
    """The launch's store, whose waits are seen."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def set(self, key: str, value: Any) -> None:
        with self._world.lock:
            self._world.values[key] = value
            self._world.wake()

    def add(self, key: str, amount: int) -> int:
        with self._world.lock:
            total = int(self._world.values.get(key, 0)) + amount
            self._world.values[key] = str(total).encode()
            return total

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        values = self._world.values
        with self._world.lock:
            self._world.block(_thread.rank, lambda: values.keys() >= set(keys), lambda: f"waits for the store's {keys}")


def batch_isend_irecv(operations: list[dist.P2POp]) -> list[Any]:
    """torch's, whose messages run together on the group's communicator."""
    group = operations[0].group
    assert isinstance(group, Group)
    return [group.batch([(each.op is dist.isend, each.group_peer, each.tensor) for each in operations])]


def _backend(options: Any, _: Any) -> Group:
    ranks = options.global_ranks_in_group or range(options.group_size)
    return Group(f"{_thread.role} group {options.group_id}", [_thread.first + rank for rank in ranks])


def _bridge_group(kind: type[Group], name: str) -> Callable[..., Group]:
    def make(*_: Any, **__: Any) -> Group:
        roles = _thread.roles
        replica = roles.replica(_thread.rank)
        return kind(f"{name} {replica}", roles.members(replica))

    return make


def run_threads(
    size: int, function: Callable[[int, Store], Any], *, one_queue: bool = False, roles: Roles | None = None
) -> list[Any]:
    """Runs `function(rank, store)` on a thread for each rank; returns their results in rank order.

    `torch.distributed` has a default world for each rank, or for each role of `roles`. A rank that raises has a
    `Failed` as its result: for a hang with `Hang`, as all that wait for a rank that has failed.
    """
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _backend, extended_api=True, devices=["cpu"])
    world, hash_store = World(size, one_queue=one_queue), HashStore()
    results: list[Any] = [None] * size

    def serve(rank: int) -> None:
        is_student = roles is None or roles.is_student(rank)
        first, members = (0, size if roles is None else roles.students)
        if roles is not None and not is_student:
            first, members = roles.students, roles.teachers
        _thread.world, _thread.rank, _thread.roles, _thread.first = world, rank, roles, first
        _thread.role = "student" if is_student else "teacher"
        how = "has ended"
        try:
            with torch.autograd.set_multithreading_enabled(False):
                store = PrefixStore(_thread.role, hash_store)
                dist.init_process_group(BACKEND, store=store, rank=rank - first, world_size=members)
                results[rank] = function(rank, Store(world))
        except BaseException as error:
            results[rank] = Failed(error)
            how = f"has failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        world.end(rank, how)

    threads = [threading.Thread(target=serve, args=(rank,), daemon=True) for rank in range(size)]
    with _installed():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def finished(results: list[Any]) -> list[Any]:
    """The results of ranks that must all have ended well.

    Raises:
        BaseException: that of a rank that failed; a hang where there is no other.
    """
    errors = [result.error for result in results if isinstance(result, Failed)]
    for error in sorted(errors, key=lambda error: isinstance(error, Hang)):
        raise error
    return results


@contextmanager
def _installed() -> Iterator[None]:
    """torch's worlds by thread, its batches, and the bridge's groups under the rules."""
    world, threads = dist.distributed_c10d._world, cast(Any, multi_threaded_pg)
    isolation = cast(Any, torch._C._distributed_c10d)._set_thread_isolation_mode
    threads._install_threaded_pg()
    isolation(True)
    try:
        with (
            mock.patch.object(dist, "batch_isend_irecv", batch_isend_irecv),
            mock.patch.object(bridge, "host_backend", _bridge_group(HostGroup, "host")),
            mock.patch.object(bridge, "device_backend", _bridge_group(Group, "device")),
        ):
            yield
    finally:
        isolation(False)
        threads._uninstall_threaded_pg()
        dist.distributed_c10d._world = world
