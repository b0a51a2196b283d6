"""Worker processes: runs to shards, several at a time. It knows no inputs and no manifests.

Memory: the text of at most two runs a process waits or is worked on, and a process holds a run's text, the ids of a
group of documents, and the tokenizer.
"""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

from megadistill.data.prepare.encode import Finished, Rules, encode_run, kept
from megadistill.data.prepare.shard_tasks import Run
from megadistill.data.tokenizers.base import Tokenizer, load_tokenizer
from megadistill.errors import RestartFault

RUNS_A_PROCESS = 2


@dataclass(frozen=True)
class Done:
    """A run that is a shard now."""

    split: str
    number: int
    file_bytes: int
    finished: Finished
    kept: bool
    """It was a shard already when the work began."""


@dataclass(frozen=True)
class Work:
    """What all runs have in common."""

    output: Path
    tokenizer: Path
    """As it was written into the output: what encodes is what is shipped."""
    rules: Rules


def encode_all(work: Work, runs: Iterable[Run], *, processes: int) -> Iterator[Done]:
    """Encodes the runs that no earlier start has encoded, as they are finished, in any order.

    Raises:
        OperatorFault: the disk is full.
        RestartFault: a worker process was killed.
    """
    if processes == 1:
        tokenizer = load_tokenizer(work.tokenizer)
        for run in runs:
            yield _kept(work, run) or _done(run, encode_run(work.output / run.split, run, work.rules, tokenizer))
        return
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # each worker is then a fork that has its imports
    pool = ProcessPoolExecutor(processes, context, _begin, (work,))
    try:
        yield from _encode_in(pool, work, runs, limit=RUNS_A_PROCESS * processes)
    except BrokenProcessPool:
        raise RestartFault(
            "a process that encodes was killed, most likely for want of memory: start the same command again, it keeps "
            "the shards that are whole; where memory is short, with fewer --processes or a smaller --shard-mb"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_in(pool: ProcessPoolExecutor, work: Work, runs: Iterable[Run], *, limit: int) -> Iterator[Done]:
    pending: dict[Future[Done], None] = {}  # as a set, in order
    for run in runs:
        if earlier := _kept(work, run):
            yield earlier
            continue
        pending[pool.submit(_encode, run)] = None
        if len(pending) >= limit:
            yield from _finished(pending)
    while pending:
        yield from _finished(pending)


def _finished(pending: dict[Future[Done], None]) -> Iterator[Done]:
    """Waits for one at least."""
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        del pending[future]
        yield future.result()


def _kept(work: Work, run: Run) -> Done | None:
    finished = kept(work.output / run.split, run, work.rules)
    return None if finished is None else _done(run, finished, kept=True)


def _done(run: Run, finished: Finished, *, kept: bool = False) -> Done:
    return Done(split=run.split, number=run.number, file_bytes=run.file_bytes, finished=finished, kept=kept)


# In the worker processes

_work: Work
_tokenizer: Tokenizer


def _begin(work: Work) -> None:
    global _work, _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process encodes in one thread: there is one for each core
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: nothing half-written counts
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _work, _tokenizer = work, load_tokenizer(work.tokenizer)


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    with suppress(OSError):
        parent.join()
    os._exit(1)


def _encode(run: Run) -> Done:
    return _done(run, encode_run(_work.output / run.split, run, _work.rules, _tokenizer))
