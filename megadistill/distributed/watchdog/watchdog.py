"""The watch over a launch: signs of life, and an end with a reason for a run that stands still. It knows no training.

Every rank says about once a second how it is (`verdict.Sign`), over a connection of its own to the launch's store. One
rank, the first, reads what all say, so the store carries a few messages a rank and second. It alone decides
(`verdict.Observer`) and tells all; each rank then writes the stacks of its threads and ends with the exit code of a
fault that a restart can mend. A collective cannot be given up by whoever waits in it, so the process is.

Two threads can do something where others hang. The *teller* talks to the store, which hangs where its host does. The
*clock* talks to nobody, and ends a rank whose teller hears nothing more: the first rank, or the host of the store, is
frozen or gone. The clock also winds up a timer of faulthandler's. While code in C holds the interpreter's lock neither
thread runs; the timer, which needs no lock, then writes the stacks, and ends a launched rank (exit 1, after its peers).
A frozen process (SIGSTOP) can only be killed, and its launcher does so when its peers have ended.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from torch.distributed.distributed_c10d import PrefixStore, Store

from megadistill.distributed.watchdog.diagnosis import GRACE_SECONDS, LOST, Observer, Sign, silence_limit, silent_rank
from megadistill.distributed.watchdog.stack_probe import whereabouts
from megadistill.errors import RestartFault

BEAT_SECONDS = 1.0
RANKS_A_BEAT = 512
"""Signs that the first rank reads in a second; of more ranks it reads them less often."""
PATIENCE_SECONDS = 5.0
"""To learn who was lost; and for the disk to take the stacks, since it may be what hangs."""
TIMER_SECONDS = 15.0
"""What the timer gives the interpreter beyond the silence that its peers take for its end."""

_BOARD = "board"


class Watch:
    """Of one process, over all ranks of the launch. Until it is started it does nothing, and may be told everything.

    `store`: the launch's; None in a world of one, whose own stalls are found too. `silence`: seconds without a sign
    after which a rank is taken for dead. `speaks`: whether this rank says so when it is the first rank that is silent.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        silence: float = 60.0,
        speaks: bool = True,
    ) -> None:
        self.on_verdict: Callable[[str], None] | None = None
        """Called with the reason on the ranks that say it, before it ends them."""
        self._store: Any = store
        self._rank, self._world, self._silence, self._speaks = rank, world, silence, speaks
        self._joined: Callable[[], dict[str, int]] = dict
        self._period = BEAT_SECONDS * (1 + world // RANKS_A_BEAT)
        self._frozen = 0.0
        """Seconds in which this process did not run at all, as its clock noticed."""
        self._stamped: tuple[str, int, float | None, float] = ("start", 0, None, time.monotonic())
        self._heard: float | None = None
        """When the store last answered; None: not yet, and the rendezvous has a time limit of its own."""
        self._refused_since: float | None = None
        self._all_there = False
        self._end: str | None = None
        self._missing: str | None = None
        self._verdict: tuple[str, float] | None = None
        self._told, self._wake, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._stacks: IO[str] | None = None
        self._threads: list[threading.Thread] = []

    # What the main thread calls

    def start(self) -> "Watch":
        if self._store is not None:
            self._store = PrefixStore("watch", self._store.clone())  # a connection of its own: the run's may wait
        self._threads = [
            threading.Thread(target=work, name=f"watch-{name}", daemon=True)
            for name, work in (("teller", self._tell), ("clock", self._tick))
        ]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Nothing is watched any more. Called when all ranks have met for the last time: else the others miss it."""
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * BEAT_SECONDS)  # the teller may hang in the store
        if self._threads:
            faulthandler.cancel_dump_traceback_later()
        self._threads = []
        if self._stacks is not None:
            self._stacks.close()
            with suppress(OSError):
                if os.path.getsize(self._stacks.name) == 0:
                    os.unlink(self._stacks.name)
            self._stacks = None

    def stamp(self, phase: str, step: int, *, limit: float | None) -> None:
        """The main thread begins `phase`, which may take `limit` seconds (None: any time). It costs nothing.

        `step` is the optimizer step that is being taken, 0 where there is none.
        """
        self._stamped = (phase, step, limit, self._now())

    def count(self, joined: Callable[[], dict[str, int]]) -> None:
        """`joined()` says how many collectives this process has joined, by group (`whereabouts`)."""
        self._joined = joined

    def keep_stacks(self, folder: Path, attempt: int) -> None:
        """Stacks go to `folder`/stacks/attempt-00003-rank-00001.txt (ranks of the launch); before, to standard error.

        The file is opened now, since the disk may hang later; a clean end removes an empty one.
        """
        path = folder / "stacks" / f"attempt-{attempt:05d}-rank-{self._rank:05d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = path.open("w", encoding="utf-8")
        if self._threads:
            self._wind_up()

    def failed(self, reason: str) -> None:
        """This rank ends by a fault of its own. The others are told; this process is watched no longer."""
        self._leave(reason)

    def lost(self) -> str | None:
        """After a broken connection: which rank is missing and why, as far as some seconds show. Stops the watch."""
        self._leave(LOST)
        return self._missing

    def _leave(self, end: str) -> None:
        if self._threads and self._store is not None:
            self._told.clear()
            self._end = end
            self._wake.set()
            self._told.wait(PATIENCE_SECONDS)
            if self._rank == 0:
                time.sleep(1.5 * BEAT_SECONDS)  # the store may be in this process: the others read it while it lives
        self.stop()

    def _now(self) -> float:
        """A clock that stands while the process is frozen."""
        return time.monotonic() - self._frozen

    def sign(self, beat: int) -> Sign:
        """What this rank says of itself."""
        phase, step, limit, since = self._stamped
        main = threading.main_thread().ident
        assert main is not None
        waits, place = whereabouts(sys._current_frames(), main)
        return Sign(
            host=socket.gethostname(),
            pid=os.getpid(),
            beat=beat,
            phase=phase,
            step=step,
            seconds=self._now() - since,
            limit=limit,
            waits=waits,
            place=place,
            joined=self._joined(),
            end=self._end,
        )

    # The teller

    def _tell(self) -> None:
        observer = Observer(silence=self._silence, period=self._period)
        beat = 0
        while not self._stopped.is_set():
            beat += 1
            try:
                if self._rank == 0:
                    self._observe(observer, beat)
                else:
                    self._obey(beat)
                self._heard = time.monotonic()
            except RuntimeError as error:  # the store is gone, and its host with it
                self._refused(error)
            if self._verdict is not None and time.monotonic() >= self._verdict[1]:
                self._end_all(self._verdict[0], says=self._rank == 0)
            self._wake.wait(self._period if self._rank == 0 else BEAT_SECONDS)
            self._wake.clear()

    def _observe(self, observer: Observer, beat: int) -> None:
        """What the first rank does: it reads what all say, decides, and tells."""
        now = time.monotonic()
        own = self.sign(beat)
        verdict, grace = observer.look({0: own, **self._others()}, now), 0.0
        if own.end is not None:
            self._missing = observer.missing(now)
            if verdict is None:
                lost = self._missing or "rank 0 lost another rank"
                verdict, grace = f"{lost}; the others cannot go on without it", GRACE_SECONDS
        if self._store is not None:
            board = {"beat": beat, "verdict": verdict, "grace": grace, "missing": observer.missing(now)}
            self._store.set(_BOARD, json.dumps(board))
        if own.end is not None and self._missing is not None:
            self._told.set()
        elif verdict is not None and own.end is None:
            self._verdict = (verdict, now)

    def _others(self) -> dict[int, Sign]:
        """Of all ranks but the first; none before the last of them has said something."""
        if self._store is None:
            return {}
        keys = [str(rank) for rank in range(1, self._world)]
        self._all_there = self._all_there or self._store.check(keys)
        if not self._all_there:
            return {}
        return {int(key): Sign.loads(said) for key, said in zip(keys, self._store.multi_get(keys), strict=True)}

    def _obey(self, beat: int) -> None:
        """What the other ranks do: they say how they are, and read what is decided."""
        own = self.sign(beat)
        self._store.set(str(self._rank), own.dumps())
        board = json.loads(self._store.get(_BOARD))
        self._missing = board["missing"]
        if own.end is not None:
            if own.end != LOST or self._missing is not None:
                self._told.set()
        elif board["verdict"] is not None and self._verdict is None:
            self._verdict = (board["verdict"], time.monotonic() + board["grace"])

    def _refused(self, error: RuntimeError) -> None:
        now = time.monotonic()
        self._missing = self._missing or "rank 0, or the launcher that holds the store: its connection is closed"
        self._told.set()
        if self._refused_since is None:
            self._refused_since = now
        if self._verdict is None and self._end is None and now - self._refused_since > GRACE_SECONDS:
            reason = str(error).splitlines()[0]
            self._end_all(f"rank {self._rank}: lost {self._missing} ({reason})", says=self._speaks)

    # The clock

    def _tick(self) -> None:
        last = time.monotonic()
        while not self._stopped.is_set():
            now = time.monotonic()
            if now - last > 5 * BEAT_SECONDS:
                self._frozen += now - last
                self._heard = None if self._heard is None else now
            last = now
            silence = silence_limit(self._silence, self._stamped[2])
            if self._heard is not None and now - self._heard > silence and self._end is None:
                self._end_all(silent_rank(0, None, now - self._heard), says=self._speaks)
            self._wind_up()
            self._stopped.wait(BEAT_SECONDS)

    def _wind_up(self) -> None:
        """About 100 us: too long for every stamp, and the clock, which never blocks, does it for all of them."""
        seconds, ends = self._silence + TIMER_SECONDS, self._world > 1
        faulthandler.dump_traceback_later(seconds, exit=ends, file=self._stacks_descriptor())

    # The end

    def _end_all(self, verdict: str, *, says: bool) -> None:
        """Ends this process, as its peers end theirs."""
        if not self._ending.acquire(blocking=False) or self._stopped.is_set():
            return
        if says:
            _say(f"megadistill: {verdict}; stacks are in {self._stacks_name()}")
        last_words = threading.Thread(target=self._last_words, args=(verdict, says), daemon=True)
        last_words.start()
        last_words.join(PATIENCE_SECONDS)
        # A launcher ends all ranks when the first one leaves: by now the others have read the verdict too.
        time.sleep(2 * BEAT_SECONDS)
        os._exit(RestartFault.exit_code)

    def _last_words(self, verdict: str, says: bool) -> None:
        phase, step, _, _ = self._stamped
        descriptor = self._stacks_descriptor()
        header = f"rank {self._rank} on {socket.gethostname()}, {phase} of step {step}: {verdict}\n"
        with suppress(OSError):
            os.write(descriptor, header.encode())
            faulthandler.dump_traceback(descriptor)
        if says and self.on_verdict is not None:
            self.on_verdict(verdict)

    def _stacks_descriptor(self) -> int:
        return 2 if self._stacks is None else self._stacks.fileno()

    def _stacks_name(self) -> str:
        return "the lines below" if self._stacks is None else os.path.dirname(self._stacks.name)


def _say(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
