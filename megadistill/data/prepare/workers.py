"""Worker processes: tasks to shards, several at a time.

Memory: the text of at most two tasks a process waits or is worked on, and a process holds a task's text, the ids of a
group of documents, and the tokenizer.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from megadistill.data.prepare.encode import EncodedShard, EncodingSpec, encode_task, reusable_shard
from megadistill.data.prepare.shard_tasks import ShardTask
from megadistill.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megadistill.errors import RestartFault

TASKS_A_PROCESS = 2


def encode_all(
    tasks: Iterable[ShardTask], output: Path, tokenizer_file: Path, spec: EncodingSpec, *, processes: int
) -> Iterator[tuple[ShardTask, EncodedShard, bool]]:
    """Encodes the tasks that no earlier start has encoded; yields all of them with their results, reused ones early.

    True: an earlier start had written the shard. `tokenizer_file` lies in the output: what encodes is what is shipped.

    Raises:
        OperatorFault: the disk is full.
        RestartFault: a worker process was killed.
    """
    if processes == 1:
        tokenizer = load_tokenizer(tokenizer_file)
        for task in tasks:
            reused = reusable_shard(output, task, spec)
            yield task, reused or encode_task(output, task, spec, tokenizer), reused is not None
        return
    pool = worker_pool(processes, __name__, _initialise, (output, tokenizer_file, spec))
    pending: deque[tuple[ShardTask, Future[EncodedShard]]] = deque()
    try:
        for task in tasks:
            if reused := reusable_shard(output, task, spec):
                yield task, reused, True
                continue
            pending.append((task, pool.submit(_encode, task)))
            if len(pending) == TASKS_A_PROCESS * processes:
                first, future = pending.popleft()
                yield first, future.result(), False
        yield from ((first, future.result(), False) for first, future in pending)
    except BrokenProcessPool:
        raise RestartFault(
            "a worker process was killed, most likely for lack of memory: start the same command again, it reuses "
            "the shards that are whole; where memory is short, with fewer --processes or a smaller --shard-mb"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def worker_pool(
    processes: int, module: str, initialise: Callable[..., None], arguments: tuple[Any, ...]
) -> ProcessPoolExecutor:
    """Processes that have imported `module`; each calls `initialise`, which calls `begin_worker` first."""
    context = get_context("forkserver")
    context.set_forkserver_preload([module])  # each worker is then a fork that has its imports
    return ProcessPoolExecutor(processes, context, initialise, arguments)


# In the worker processes

_output: Path
_spec: EncodingSpec
_tokenizer: Tokenizer


def _initialise(output: Path, tokenizer_file: Path, spec: EncodingSpec) -> None:
    global _output, _spec, _tokenizer
    begin_worker()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process encodes in one thread: there is one for each core
    _output, _spec, _tokenizer = output, spec, load_tokenizer(tokenizer_file)


def begin_worker() -> None:
    """Ctrl-C ends a worker silently, as partial files do not count; and so does the end of its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    with suppress(OSError):
        parent.join()
    os._exit(1)


def _encode(task: ShardTask) -> EncodedShard:
    return encode_task(_output, task, _spec, _tokenizer)
