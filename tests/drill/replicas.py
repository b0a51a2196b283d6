"""Cases of replicas that are launches of their own: each is lost at some instant, and the others go on.

At the end the run is compared with an undisturbed one: the same sequences in the same steps, none lost, none twice;
losses and weights to rounding, since other ranks add up the same terms.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megadistill.train.checkpoint.format import newest_checkpoint
from tests.drill.cases import RESTART, CaseResult, case, since, steps_of
from tests.drill.launch import Ranks, launch, marked, until
from tests.drill.place import Place
from tests.drill.record import Record
from tests.e2e.commands import settings
from tests.paths import ROOT

VICTIM = 1
"""The replica that is lost, where it does not matter which."""
STEPS = 16
AT = 6
"""The step of a fault."""
GATE = 10
"""The last step that is taken before the lost replicas have come again."""
READY = "rows of the head read"
"""In the log of a replica whose models are loaded."""
LOOK_SECONDS = 0.4
"""More than leaders take to see who waits."""


@dataclass
class Replicas:
    """The launches of a run's replicas, and their store."""

    place: Place
    name: str
    count: int
    shard: int
    changes: Sequence[str]
    steps: int = STEPS
    launches: list[Ranks] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    """The replica of each launch."""

    def __enter__(self) -> "Replicas":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.gate.parent.mkdir(parents=True, exist_ok=True)
        self.open_gate(self.steps)
        command = [sys.executable, "-m", "megadistill.distributed.store_server", "--port", str(self.port)]
        environment = {**os.environ, **marked()}
        self.store = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.store.stdout is not None
        assert self.store.stdout.readline().startswith("store: listening")
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.launches:
            each.send(signal.SIGKILL)
        self.store.terminate()
        self.store.wait()

    @property
    def folder(self) -> Path:
        return self.place.run_folder(self.name)

    @property
    def gate(self) -> Path:
        return self.place.folder / "output" / self.name / "gate"

    def open_gate(self, step: int) -> None:
        """Lets all replicas take the steps up to this one."""
        changed = self.gate.with_suffix(".new")
        changed.write_text(str(step), encoding="ascii")
        changed.rename(self.gate)

    def start(self, replica: int, faults: Mapping[int, Sequence[str]] | None = None) -> Ranks:
        """A launch of this replica. `faults` by rank in it."""
        environment = {
            "MEGADISTILL_REPLICA": str(replica),
            "MEGADISTILL_REPLICAS": str(self.count),
            "MEGADISTILL_STORE": f"127.0.0.1:{self.port}",
            "DRILL_GATE": str(self.gate),
        }
        gated = {rank: ["gated", *(faults or {}).get(rank, ())] for rank in range(self.shard)}
        number = self.of.count(replica) + 1
        folder = self.place.folder / "output" / self.name / f"replica-{replica}-{number:02d}"
        patient = settings(resilience__step_timeout_seconds=60)  # at the gate
        arguments = [*self.place.command(self.name, steps=self.steps), *patient, *self.changes]
        ranks = launch(arguments, world=self.shard, faults=gated, folder=folder, environment=environment)
        self.launches.append(ranks)
        self.of.append(replica)
        return ranks

    def until_step(self, step: int) -> None:
        until(lambda: steps_of(self.folder) >= step or not self.alive, 90.0, f"{self.folder} did not come to {step}")
        assert self.alive, f"all replicas ended before step {step}\n{self.output}"

    @property
    def alive(self) -> bool:
        return any(each.alive for each in self.launches)

    @property
    def output(self) -> str:
        return "\n".join(f"=== replica {of}\n{each.output}" for of, each in zip(self.of, self.launches, strict=True))

    def until_changed(self, before: int) -> float:
        """Seconds until the run has gone on with other replicas, for the next time after `before`."""
        began = time.monotonic()
        until(lambda: len(self.changed()) > before or not self.alive, 60.0, "no replica went on")
        assert self.alive, self.output
        return since(began)

    def until_joined(self, joining: Sequence[Ranks]) -> None:
        """Lets the replicas that go on take steps when these are ready to join, until all have joined."""
        until(lambda: all(READY in each.logs[0].read_text() for each in joining), 90.0, "a replica did not start")
        step = steps_of(self.folder)
        while self.changed()[-1]["replicas"] != self.count:
            assert self.alive, self.output
            assert step < self.steps, f"not joined by step {step}\n{self.output}"
            step += 1
            self.open_gate(step)
            self.until_step(step)
            time.sleep(LOOK_SECONDS)

    def changed(self) -> list[dict[str, Any]]:
        """The events of other members."""
        return [
            event
            for line in (self.folder / "events.jsonl").read_text().splitlines()
            if (event := json.loads(line))["event"] == "replicas_changed"
        ]


def undisturbed(place: Place, steps: int = STEPS, changes: Sequence[str] = ()) -> Record:
    """The run on one rank, made once."""
    name = f"one-rank-{steps}"
    if not (place.run_folder(name) / "DONE").exists():
        changes = [*changes, *settings(distributed__vocab_group=1)]
        assert place.attempt(name, *changes, world=1, steps=steps).wait(240) == [0]
    return Record.of(place.run_folder(name))


def compare(
    place: Place, name: str, *, seconds: float | None, steps: int = STEPS, changes: Sequence[str] = ()
) -> CaseResult:
    """The run against the undisturbed one. Raises AssertionError."""
    truth, folder = undisturbed(place, steps, changes), place.run_folder(name)
    record = Record.of(folder)
    assert record.steps.keys() == truth.steps.keys(), f"logged are the steps {sorted(record.steps)}"
    result = record.require_close(truth)
    ours, theirs = (newest_checkpoint(each / "checkpoints") for each in (folder, place.run_folder(f"one-rank-{steps}")))
    assert ours is not None
    assert theirs is not None
    for parameter in theirs.manifest.parameters:
        rows = theirs.parameter(parameter)
        torch.testing.assert_close(ours.parameter(parameter)[: len(rows)], rows, rtol=1e-3, atol=1e-5)
    return CaseResult(seconds, 0, result)


def lose(
    place: Place,
    name: str,
    fault: str,
    *,
    count: int = 2,
    shard: int = 2,
    victims: Sequence[int] = (VICTIM,),
    of_first: Sequence[str] = (),
    changes: Sequence[str] = (),
) -> CaseResult:
    """The victims' last rank has the fault, which kills it; they join again; the run is the undisturbed one.

    `of_first`: faults of replica 0, where that is no victim.
    """
    with Replicas(place, name, count, shard, changes) as replicas:
        faults = {victim: {shard - 1: [fault]} for victim in victims}
        replicas.open_gate(GATE)
        for replica in range(count):
            replicas.start(replica, faults.get(replica, {0: list(of_first)} if replica == 0 else {}))
        first = {victim: replicas.launches[victim] for victim in victims}
        for ranks in first.values():
            ranks.processes[-1].join(90)
            assert ranks.processes[-1].exitcode == -signal.SIGKILL, replicas.output
        seconds = replicas.until_changed(0)
        for ranks in first.values():
            ranks.wait(60)
        joining = [replicas.start(victim) for victim in victims]
        replicas.until_joined(joining)
        replicas.open_gate(STEPS)
        for of, ranks in zip(replicas.of, replicas.launches, strict=True):
            if ranks not in first.values():
                assert ranks.wait(120) == [0] * shard, f"replica {of}\n{replicas.output}"
        lost = {number for event in replicas.changed() for number in event["lost"]}
        joined = {number for event in replicas.changed() for number in event["joined"]}
        assert lost == joined == set(victims), replicas.changed()
    return compare(place, name, seconds=seconds)


@case("replica-forward", "a replica is lost in the student's forward pass")
def forward(place: Place) -> CaseResult:
    return lose(place, "replica-forward", f"die_forward:{AT}")


@case("replica-teacher", "a replica is lost in the teacher's pipeline")
def in_teacher(place: Place) -> CaseResult:
    return lose(place, "replica-teacher", f"die_teacher:{AT}")


@case("replica-across", "a replica is lost before the all-reduce over replicas, when its other rank is in it")
def across(place: Place) -> CaseResult:
    return lose(place, "replica-across", f"die_across:{AT}")


@case("replica-step", "a replica is lost in the optimizer step: the others have the sum")
def in_step(place: Place) -> CaseResult:
    return lose(place, "replica-step", f"die_step:{AT}")


@case("replica-behind", "a replica is lost, and of two others one has taken the step, and the one with rank 0 has not")
def behind(place: Place) -> CaseResult:
    return lose(
        place,
        "replica-behind",
        f"die_step:{AT}",
        count=3,
        shard=1,
        victims=(2,),
        of_first=[f"sum_lost:{AT}"],
        changes=settings(distributed__vocab_group=1),
    )


@case("replica-save", "a replica is lost while it writes a checkpoint")
def in_save(place: Place) -> CaseResult:
    return lose(place, "replica-save", "die_save:8")


@case("replica-two", "two of three replicas are lost at once")
def two(place: Place) -> CaseResult:
    changes = settings(distributed__vocab_group=1)
    return lose(place, "replica-two", f"die:{AT}", count=3, shard=1, victims=(1, 2), changes=changes)


@case("replica-first", "the replica with rank 0, which writes the run's files, is lost")
def first(place: Place) -> CaseResult:
    return lose(place, "replica-first", f"die:{AT}", victims=(0,))


@case("replica-first-save", "the replica with rank 0 is lost where a checkpoint of all gets its name")
def first_save(place: Place) -> CaseResult:
    return lose(place, "replica-first-save", "die_folder:8", victims=(0,))


@case("replica-frozen", "a replica is frozen: it is left out, and ends when it goes on")
def frozen(place: Place) -> CaseResult:
    name, silence = "replica-frozen", ["silence:4"]
    with Replicas(place, name, 2, 1, settings(distributed__vocab_group=1)) as replicas:
        survivor = replicas.start(0, {0: silence})
        victim = replicas.start(1, {0: [*silence, f"frozen:{AT}"]})
        replicas.until_step(AT - 1)
        began = time.monotonic()
        until(lambda: bool(replicas.changed()) or not survivor.alive, 60.0, "the other replica did not go on")
        seconds = since(began)
        victim.send(signal.SIGCONT)
        assert victim.wait(60) == [RESTART], replicas.output
        assert survivor.wait(120) == [0], replicas.output
    return compare(place, name, seconds=seconds)


@case("replica-minimum", "fewer replicas are left than the recipe asks for: the run stops for a restart")
def minimum(place: Place) -> CaseResult:
    name = "replica-minimum"
    changes = settings(distributed__vocab_group=1, distributed__min_replicas=2)
    with Replicas(place, name, 2, 1, changes) as replicas:
        left = replicas.start(0)
        victim = replicas.start(1, {0: [f"die:{AT}"]})
        began = time.monotonic()
        victim.wait(90)
        assert left.wait(60) == [RESTART], replicas.output
        assert "distributed.min_replicas" in replicas.output
        seconds = since(began)
    with Replicas(place, name, 2, 1, changes) as replicas:
        both = [replicas.start(replica) for replica in range(2)]
        assert [each.wait(120) for each in both] == [[0], [0]], replicas.output
    return compare(place, name, seconds=seconds)


@case("replica-store", "the store in which replicas meet is lost: the run stops for a restart")
def store(place: Place) -> CaseResult:
    name, changes = "replica-store", settings(distributed__vocab_group=1)
    with Replicas(place, name, 2, 1, changes) as replicas:
        replicas.open_gate(AT)
        both = [replicas.start(replica) for replica in range(2)]
        replicas.until_step(AT - 1)
        replicas.store.kill()
        replicas.store.wait()
        replicas.open_gate(STEPS)
        began = time.monotonic()
        assert [each.wait(60) for each in both] == [[RESTART], [RESTART]], replicas.output
        assert "the store of the replicas at 127.0.0.1" in replicas.output, replicas.output
        seconds = since(began)
    with Replicas(place, name, 2, 1, changes) as replicas:
        both = [replicas.start(replica) for replica in range(2)]
        assert [each.wait(120) for each in both] == [[0], [0]], replicas.output
    return compare(place, name, seconds=seconds)


LOSSES, STEPS_OF_TEN = 10, 60


@case("replica-ten", f"{LOSSES} replicas in a row are lost at random, and join again")
def ten(place: Place) -> CaseResult:
    """Mostly one of three at a time, now and then two."""
    seed, name = int(os.environ.get("DRILL_SEED", "1")), "replica-ten"
    # At the drill's own rate rounding grows tenfold in ten steps, in one whose loss jumps.
    rate = settings(train__optimizer__learning_rate=0.0004)
    changes = [*settings(distributed__vocab_group=1), *rate]
    draw, seconds, lost = random.Random(seed), list[float](), 0
    with Replicas(place, name, 3, 1, changes, steps=STEPS_OF_TEN) as replicas:
        replicas.open_gate(2)
        here = {replica: replicas.start(replica) for replica in range(3)}
        replicas.until_step(2)
        while lost < LOSSES:
            step = steps_of(replicas.folder) + draw.randint(0, 2)
            replicas.open_gate(step)
            replicas.until_step(step)
            victims = draw.sample(sorted(here), 2 if draw.random() < 0.2 else 1)
            before, lost = len(replicas.changed()), lost + len(victims)
            replicas.open_gate(step + 1)
            time.sleep(0.2 * draw.random())
            for victim in victims:
                here[victim].send(signal.SIGKILL)
            replicas.open_gate(step + 2)  # who has taken the step already notices in the next one
            seconds.append(replicas.until_changed(before))
            for victim in victims:
                here[victim].wait(30)
                here[victim] = replicas.start(victim)
            replicas.until_joined([here[victim] for victim in victims])
        replicas.open_gate(STEPS_OF_TEN)
        for replica, ranks in here.items():
            assert ranks.wait(240) == [0], f"replica {replica}\n{replicas.output}"
    result = compare(place, name, seconds=sum(seconds) / len(seconds), steps=STEPS_OF_TEN, changes=rate)
    return CaseResult(result.seconds, 0, f"{result.result} (seed {seed})")
