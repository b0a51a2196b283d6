"""Worker processes: tasks to shards, several at a time.

Memory: the text of at most two tasks a process waits or is worked on, and a process holds a task's text, the ids of a
group of documents, and the tokenizer.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

from megadistill.data.prepare.encode import EncodingSpec, ShardResult, encode_task, reusable_result
from megadistill.data.prepare.shard_tasks import ShardTask
from megadistill.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megadistill.errors import RestartFault

TASKS_A_PROCESS = 2


@dataclass(frozen=True)
class EncodedShard:
    """The result of a task, with what identifies the task."""

    split: str
    number: int
    file_bytes: int
    result: ShardResult
    reused: bool
    """True: an earlier start had written it."""


@dataclass(frozen=True)
class EncodeJob:
    """The settings that all tasks share."""

    output: Path
    tokenizer: Path
    """The tokenizer's file in the output: what encodes is what is shipped."""
    spec: EncodingSpec

    def reuse(self, task: ShardTask) -> EncodedShard | None:
        """The shard of an earlier start, if it is whole and of the same documents."""
        result = reusable_result(self.output / task.split, task, self.spec)
        return None if result is None else EncodedShard(task.split, task.number, task.file_bytes, result, True)

    def encode(self, task: ShardTask, tokenizer: Tokenizer) -> EncodedShard:
        result = encode_task(self.output / task.split, task, self.spec, tokenizer)
        return EncodedShard(task.split, task.number, task.file_bytes, result, False)


def encode_all(job: EncodeJob, tasks: Iterable[ShardTask], *, processes: int) -> Iterator[EncodedShard]:
    """Encodes the tasks that no earlier start has encoded; yields all of them, reused ones early.

    Raises:
        OperatorFault: the disk is full.
        RestartFault: a worker process was killed.
    """
    if processes == 1:
        tokenizer = load_tokenizer(job.tokenizer)
        for task in tasks:
            yield job.reuse(task) or job.encode(task, tokenizer)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # each worker is then a fork that has its imports
    pool = ProcessPoolExecutor(processes, context, _initialise, (job,))
    pending: deque[Future[EncodedShard]] = deque()
    try:
        for task in tasks:
            if reused := job.reuse(task):
                yield reused
                continue
            pending.append(pool.submit(_encode, task))
            if len(pending) == TASKS_A_PROCESS * processes:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)
    except BrokenProcessPool:
        raise RestartFault(
            "a worker process was killed, most likely for lack of memory: start the same command again, it reuses "
            "the shards that are whole; where memory is short, with fewer --processes or a smaller --shard-mb"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


# In the worker processes

_job: EncodeJob
_tokenizer: Tokenizer


def _initialise(job: EncodeJob) -> None:
    global _job, _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process encodes in one thread: there is one for each core
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it silently: partial files do not count
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _job, _tokenizer = job, load_tokenizer(job.tokenizer)


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    with suppress(OSError):
        parent.join()
    os._exit(1)


def _encode(task: ShardTask) -> EncodedShard:
    return _job.encode(task, _tokenizer)
