"""Checks of a recipe, its nodes and its launch, on every rank before a run.

Each rank's own checks come first, so that a broken one still joins and reports; then the collective ones: whether the
ranks are alike, bandwidth and latency between them, and one small optimizer step.
"""

import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from megadistill.config.load import load_recipe
from megadistill.config.recipe import Recipe
from megadistill.distributed.collectives import all_gather_objects, all_true, barrier, broadcast_object
from megadistill.distributed.launch import Launch
from megadistill.distributed.measures.bandwidth import all_reduce_bandwidth, clock_offsets, neighbours, pair_bandwidths
from megadistill.distributed.measures.group_latencies import collective_latencies
from megadistill.distributed.topology import Topology, local_device, process_groups
from megadistill.doctor.comparison import (
    clock_row,
    contents_row,
    devices_row,
    latency_row,
    memory_rows,
    pairs_row,
    products_row,
    space_row,
    versions_row,
)
from megadistill.doctor.dry_run import dry_run
from megadistill.doctor.file_systems import check_environment, nodes_of_job
from megadistill.doctor.node_check import (
    check_device,
    check_devices,
    check_host_limits,
    check_node,
    free_space,
)
from megadistill.doctor.rank_report import RankReport, Report, Row, Status, summarize
from megadistill.doctor.recipe_check import check_recipe
from megadistill.doctor.teacher_prediction import teacher_rows
from megadistill.models.flops import parameter_counts
from megadistill.plan.counts.disk_usage import final_checkpoints
from megadistill.plan.counts.model_stats import measure_models, measure_several
from megadistill.plan.counts.requirements import count_requirements
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.zero import Zero
from megadistill.student.optimizer import state_bytes
from megadistill.train.setup.setup import Setup
from megadistill.units import number_of, short

TIMEOUT_MINUTES = 2.0
"""Time limit for the rendezvous and for each collective."""
REPORT_SECONDS = 10.0
"""Time that a failed rank waits for rank 0 to report: launchers end all ranks when one leaves."""
VISIBLE_SECONDS = 5.0
"""Time limit for a file to become visible on other nodes."""


def examine_node(path: Path, overrides: Sequence[str]) -> Report:
    """Checks of this node alone, which take seconds; of the recipe only the run folder is used."""
    own = RankReport(0, socket.gethostname())
    recipe = own.check("recipe", lambda: (load_recipe(path, overrides), f"{path} is valid"))
    check_devices(own)
    check_environment(own, nodes=nodes_of_job())
    _check_node(own, recipe)
    return Report(tuple(summarize([own])))


def examine(path: Path, overrides: Sequence[str], *, publish: Callable[[Report], None]) -> bool:
    """Whether all checks pass on the ranks that the launcher started. Rank 0 calls `publish`.

    Raises:
        UserError: the launcher's variables do not give this process a rank.
    """
    launch = Launch.from_environment()
    own, setup = _own_checks(path, overrides, launch)
    rows = summarize([own])

    def publish_first(*more: Row) -> None:
        if launch.rank == 0:
            publish(Report((*rows, *more)))

    try:
        with process_groups(launch, vocab_group=1, timeout_minutes=TIMEOUT_MINUTES) as topology:
            topology.watchdog.on_abort = lambda reason: publish_first(Row("all ranks", Status.FAIL, reason))
            topology.watchdog.enter_phase("comparing the ranks", 0, limit=60 * TIMEOUT_MINUTES)
            reports = all_gather_objects(own, topology.world_group)
            group_ranks = reports[0].facts.get("vocab_group", reports[0].facts["local_world"])
            rows = [*summarize(reports), *_comparisons(reports)]
            rows += _measurements(topology, reports, group_ranks=group_ranks)
            rows += _shared_folder(topology, reports)
            if all_true(setup is not None, topology.device, topology.world_group):
                topology.watchdog.enter_phase("dry run", 0, limit=60 * TIMEOUT_MINUTES)
                assert setup is not None
                detail = dry_run(setup, topology, launch, timeout=timedelta(minutes=TIMEOUT_MINUTES))
                rows.append(Row("dry run", Status.OK, detail))
                rows += _teacher(setup, topology, launch, rows)
            publish_first()
    except Exception as error:  # the run would have failed in the same way
        publish_first(Row("all ranks", Status.FAIL, " ".join(f"{type(error).__name__}: {error}".split())))
        if launch.rank > 0:
            time.sleep(REPORT_SECONDS)
        return False
    return Report(tuple(rows)).ok


def _teacher(setup: Setup, topology: Topology, launch: Launch, rows: Sequence[Row]) -> list[Row]:
    """The teacher's predictions, where nothing has failed before: it may not fit into memory. Collective."""
    if not all_true(Report(tuple(rows)).ok, topology.device, topology.world_group):
        return []
    topology.watchdog.enter_phase("loading the teacher", 0, limit=60 * setup.recipe.distributed.timeout_minutes)
    return teacher_rows(setup, topology, launch)


def _check_node(own: RankReport, recipe: Recipe | None) -> None:
    if recipe is None:
        check_node(own, None)
    else:
        check_node(own, Path(recipe.run.folder), deepspeed=recipe.student.deepspeed)


def _own_checks(path: Path, overrides: Sequence[str], launch: Launch) -> tuple[RankReport, Setup | None]:
    own = RankReport(launch.rank, socket.gethostname())
    recipe, setup = check_recipe(own, path, overrides, launch)
    device = local_device(launch.local_rank)
    check_device(own, device, local_world=launch.local_world)
    check_host_limits(own, launch)
    if launch.local_rank == 0:
        check_environment(own, nodes=-(-launch.world // launch.local_world), ranks=launch.world)
        _check_node(own, recipe)
    own.facts.update(local_world=launch.local_world, on_cpu=device.type == "cpu")
    if recipe is not None:
        own.facts.update(folder=recipe.run.folder, space=free_space(Path(recipe.run.folder)))
    if setup is not None:
        own.facts["needs"] = _needs(setup, launch)
        own.facts["vocab_group"] = setup.group_size
        own.facts["final_checkpoints"] = final_checkpoints(
            setup.recipe, first_step=0 if setup.parent is None else setup.parent.checkpoint.manifest.step
        )
        own.facts["checkpoint"] = (
            state_bytes(setup.recipe.train.optimizer) * parameter_counts(setup.student_config).total
        )
    return own, setup


def _needs(setup: Setup, launch: Launch) -> Mapping[str, Mapping[str, int]]:
    """Bytes that this rank will hold, by tensors, on its `device` and on its `host`."""
    students = setup.ranks  # of all replicas, those too that are launches of their own
    student, length = setup.student_config, setup.data.sequence_length
    if setup.teachers:
        shares = setup.teacher_shares()
        teachers = {name: (each.teacher_config, shares[name]) for name, each in setup.teachers.items()}
        stats = measure_several(student, teachers, sequence_length=length)
    else:
        stats = measure_models(student, setup.teacher_config, sequence_length=length)
    run = Sharding(
        setup.recipe,
        stats,
        vocab_size=setup.data.vocab_size,
        ranks=students,
        ranks_per_node=students,
        group_size=setup.group_size,
        roles=setup.roles,
        zero=Zero.of(setup.deepspeed_config),
        replicas=setup.replicas,
    )
    requirements = count_requirements(run)
    if launch.rank >= students:
        return {"device": requirements.teacher_memory, "host": {}}
    return {"device": requirements.memory, "host": requirements.host}


def _comparisons(reports: Sequence[RankReport]) -> list[Row]:
    """Rows from the facts of all ranks, the same on every rank."""
    ranks, nodes = len(reports), len({each.host for each in reports})
    detail = f"{number_of(ranks, 'rank')} on {number_of(nodes, 'node')}" + (" have met" if ranks > 1 else "")
    rows = [Row("world", Status.OK, detail), contents_row(reports), versions_row(reports), devices_row(reports)]
    rows += memory_rows(reports)
    first = reports[0].facts
    if "checkpoint" in first:
        writes = [each.facts["write"] for each in reports if each.facts.get("write")]
        rows.append(space_row(first["space"], first["checkpoint"], writes, final=first["final_checkpoints"]))
    rows.append(products_row(reports))
    return [row for row in rows if row is not None]


def _measurements(topology: Topology, reports: Sequence[RankReport], *, group_ranks: int) -> list[Row]:
    """Clock skew, bandwidths, and latencies over the world and over groups of `group_ranks`. Collective."""
    hosts = [each.host for each in reports]
    rows = [clock_row(clock_offsets(topology), hosts)]
    together = all_reduce_bandwidth(topology)
    if together is None:
        return rows
    rows.append(Row("all-reduce", Status.OK, f"{short(together / 1e9)} GB/s over {topology.world} ranks"))
    rows.append(latency_row(collective_latencies(topology, group_ranks)))
    rounds = neighbours(topology.world, reports[0].facts["local_world"])
    rates = pair_bandwidths(topology, rounds)
    return [*rows, pairs_row(rates, hosts, on_cpu=topology.device.type == "cpu")]


def _shared_folder(topology: Topology, reports: Sequence[RankReport]) -> list[Row]:
    """Whether every node sees a file that rank 0 writes to the run folder. Collective."""
    folder = reports[0].facts.get("folder")
    own = RankReport(topology.rank, reports[topology.rank].host)
    if folder is None or topology.world == 1:
        return []
    token = broadcast_object(secrets.token_hex(8), topology.world_group)
    path = Path(folder) / f".doctor-{token}"
    existed = path.parent.exists()
    if topology.is_first:
        with suppress(OSError):  # the check of the run folder reports it
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(token)
    barrier(topology.world_group)
    if topology.local_rank == 0:
        if _appears(path):
            own.add("shared folder", Status.OK, f"every node sees the files of rank 0 in {folder}", of_node=True)
        else:
            detail = f"{folder} is not the folder that rank 0 sees: every node must share it"
            own.add("shared folder", Status.FAIL, detail, of_node=True)
    rows = summarize(all_gather_objects(own, topology.world_group))  # after this no rank needs the file
    if topology.is_first:
        path.unlink(missing_ok=True)
        if not existed:
            with suppress(OSError):
                path.parent.rmdir()
    return rows


def _appears(path: Path) -> bool:
    end = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
