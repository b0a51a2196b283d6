"""Room `doctor`: what can be known before a run, asked on every rank of its launch. It trains nothing.

What each rank can say by itself comes first, so that one that is broken still joins and says so; then what only all of
them together can: whether they are alike, how fast they reach each other, and whether one small step goes through.
"""

import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from megadistill.config import load_recipe
from megadistill.distributed.bandwidth import (
    all_reduce_bandwidth,
    clock_offsets,
    gathered_texts,
    neighbours,
    pair_bandwidths,
)
from megadistill.distributed.collectives import barrier, everywhere
from megadistill.distributed.topology import Launch, Topology, joined, local_device
from megadistill.doctor.comparison import (
    clock_row,
    contents_row,
    devices_row,
    memory_rows,
    pairs_row,
    products_row,
    space_row,
    versions_row,
)
from megadistill.doctor.dry_run import rehearse
from megadistill.doctor.findings import Examined, Mark, Report, Row, rows_of
from megadistill.doctor.node_check import check_device, check_devices, check_node, free_space
from megadistill.doctor.recipe_check import check_recipe
from megadistill.models.flops import parameter_counts
from megadistill.plan.counts.requirements import rank_memory
from megadistill.train.setup.setup import Setup

TIMEOUT_MINUTES = 2.0
"""For the ranks to meet, and for each collective: a launch that takes longer is not well."""
TELLING_SECONDS = 10.0
"""For the first rank to learn what broke on another one, and to tell: launchers end all ranks when one leaves."""
SEEN_SECONDS = 5.0
"""That a file may take until another node sees it."""


def examine_node(path: Path, overrides: Sequence[str]) -> Report:
    """What this node can say by itself, in seconds; the recipe is only asked for its run folder."""
    own = Examined(0, socket.gethostname())
    recipe = own.look("recipe", lambda: (load_recipe(path, overrides), f"{path} is valid"))
    check_devices(own)
    check_node(own, None if recipe is None else Path(recipe.run.folder))
    return Report(tuple(rows_of([own])))


def examine(path: Path, overrides: Sequence[str], *, tell: Callable[[Report], None]) -> bool:
    """Whether nothing stands against the run, on the ranks that the launcher started. The first of them tells.

    Raises:
        UserError: the launcher's variables do not say which rank this is.
    """
    launch = Launch.from_environment()
    own, setup = _examined_alone(path, overrides, launch)
    rows = rows_of([own])

    def tell_first(*more: Row) -> None:
        if launch.rank == 0:
            tell(Report((*rows, *more)))

    try:
        with joined(launch, vocab_group=1, timeout_minutes=TIMEOUT_MINUTES) as topology:
            topology.watch.on_verdict = lambda reason: tell_first(Row("all ranks", Mark.BAD, reason))
            topology.watch.stamp("comparing the ranks", 0, limit=60 * TIMEOUT_MINUTES)
            examined = _gathered(own, topology)
            rows = [*rows_of(examined), *_compared(examined), *_measured(topology, examined)]
            rows += _shared_folder(topology, examined)
            if everywhere(setup is not None, topology.device, topology.world_group):
                topology.watch.stamp("rehearsing", 0, limit=60 * TIMEOUT_MINUTES)
                assert setup is not None
                said = rehearse(setup, topology, launch, timeout=timedelta(minutes=TIMEOUT_MINUTES))
                rows.append(Row("rehearsal", Mark.GOOD, said))
            tell_first()
    except Exception as error:  # what the run would have met, whatever it is
        tell_first(Row("all ranks", Mark.BAD, " ".join(f"{type(error).__name__}: {error}".split())))
        if launch.rank > 0:
            time.sleep(TELLING_SECONDS)
        return False
    return Report(tuple(rows)).ok


def _examined_alone(path: Path, overrides: Sequence[str], launch: Launch) -> tuple[Examined, Setup | None]:
    own = Examined(launch.rank, socket.gethostname())
    recipe, setup = check_recipe(own, path, overrides, launch)
    device = local_device(launch.local_rank)
    check_device(own, device, local_world=launch.local_world)
    if launch.local_rank == 0:
        check_node(own, None if recipe is None else Path(recipe.run.folder))
    own.facts.update(local_world=launch.local_world, on_cpu=device.type == "cpu")
    if recipe is not None:
        own.facts.update(folder=recipe.run.folder, space=free_space(Path(recipe.run.folder)))
    if setup is not None:
        own.facts["needs"] = _needs(setup, launch)
        own.facts["parameters"] = parameter_counts(setup.student_config).total
    return own, setup


def _needs(setup: Setup, launch: Launch) -> Mapping[str, Mapping[str, int]]:
    return rank_memory(
        setup.recipe,
        student=setup.student_config,
        teacher=setup.teacher_config,
        data=setup.data,
        rank=launch.rank,
        ranks=launch.world if setup.roles is None else setup.roles.students,
        group_size=setup.group_size,
        roles=setup.roles,
        profile=setup.profile,
    )


def _gathered(own: Examined, topology: Topology) -> list[Examined]:
    return [Examined.loads(text) for text in gathered_texts(own.dumps(), topology)]


def _compared(examined: Sequence[Examined]) -> list[Row]:
    """What the facts of all ranks say beside each other, the same on every rank."""
    ranks, nodes = len(examined), len({each.host for each in examined})
    said = f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {nodes} {'node' if nodes == 1 else 'nodes'} have met"
    rows = [Row("world", Mark.GOOD, said), contents_row(examined), versions_row(examined), devices_row(examined)]
    rows += memory_rows(examined)
    first = examined[0].facts
    if "parameters" in first:
        writes = [each.facts["write"] for each in examined if each.facts.get("write")]
        rows.append(space_row(first["space"], first["parameters"], writes))
    rows.append(products_row(examined))
    return [row for row in rows if row is not None]


def _measured(topology: Topology, examined: Sequence[Examined]) -> list[Row]:
    """Clocks and links. Collective."""
    hosts = [each.host for each in examined]
    rows = [clock_row(clock_offsets(topology), hosts)]
    together = all_reduce_bandwidth(topology)
    if together is None:
        return rows
    rows.append(Row("all-reduce", Mark.GOOD, f"{together / 1e9:.3g} GB/s over {topology.world} ranks"))
    rounds = neighbours(topology.world, examined[0].facts["local_world"])
    rates = pair_bandwidths(topology, rounds)
    return [*rows, pairs_row(rates, hosts, on_cpu=topology.device.type == "cpu")]


def _shared_folder(topology: Topology, examined: Sequence[Examined]) -> list[Row]:
    """Whether every node sees what the first rank writes to the run folder. Collective."""
    named = examined[0].facts.get("folder")
    own = Examined(topology.rank, examined[topology.rank].host)
    if named is None or topology.world == 1:
        return []
    token = gathered_texts(secrets.token_hex(8) if topology.is_first else "", topology)[0]
    path = Path(named) / f".doctor-{token}"
    existed = path.parent.exists()
    if topology.is_first:
        with suppress(OSError):  # the row of the run folder says so
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(token)
    barrier(topology.world_group)
    if topology.local_rank == 0:
        if _appears(path):
            own.note("shared folder", Mark.GOOD, f"every node sees what rank 0 writes to {named}", of_node=True)
        else:
            said = f"{named} is not the folder that rank 0 sees: every node must share it"
            own.note("shared folder", Mark.BAD, said, of_node=True)
    rows = rows_of(_gathered(own, topology))  # and nobody still looks for it
    if topology.is_first:
        path.unlink(missing_ok=True)
        if not existed:
            with suppress(OSError):
                path.parent.rmdir()
    return rows


def _appears(path: Path) -> bool:
    end = time.monotonic() + SEEN_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
