"""The teacher's cross-entropy on real tokens, against a uniform guess: whether it knows the ids of the shards."""

import math
from dataclasses import replace
from datetime import timedelta

from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology, even_slice, topology_of_world
from megadistill.doctor.rank_report import Row, Status
from megadistill.train.build import shared_probe
from megadistill.train.setup.setup import Setup
from megadistill.train.setup.teacher_files import of_teacher
from megadistill.train.teacher.placement import live_teacher
from megadistill.train.teacher.probe import worse_than_uniform

CHECK = "teacher's predictions"
UNTRAINED_NATS = 0.1
"""Nats above a uniform guess up to which the row is a warning: random weights, as in a trial, are that bad."""


def teacher_rows(setup: Setup, topology: Topology, launch: Launch) -> list[Row]:
    """A row for each live teacher of the recipe, loaded one after the other onto the ranks of `topology`, whose world
    is `launch`'s. Collective."""
    if not setup.teachers:
        row = _teacher_row(setup, topology, launch)
        return [] if row is None else [row]
    rows = []
    for name, each in setup.teachers.items():
        row = _teacher_row(each, topology, launch)
        if row is not None:
            rows.append(replace(row, check=f"{CHECK}: {name}", detail=of_teacher(row.detail, name)))
    return rows


def _teacher_row(setup: Setup, topology: Topology, launch: Launch) -> Row | None:
    """None where the recipe has no live teacher."""
    section = setup.recipe.teacher
    if section is None or not section.is_live:
        return None
    stages = setup.group_size if setup.roles is None else setup.roles.stages
    if launch.world % stages:
        return Row(CHECK, Status.WARN, f"not tested: {launch.world} ranks do not divide into {stages} stages")
    train = setup.recipe.train.model_copy(update={"micro_batch": 1})
    teacher_alone = section.model_copy(update={"save_targets": None})
    recipe = setup.recipe.model_copy(update={"train": train, "teacher": teacher_alone})
    setup = replace(setup, recipe=recipe, roles=None, group_size=stages)
    probe = shared_probe(setup, topology)  # before the teacher is loaded, which takes some ranks longer than others
    timeout = timedelta(minutes=recipe.distributed.timeout_minutes)
    topology = topology_of_world(launch, vocab_group=stages, device=topology.device, timeout=timeout)
    vocab = even_slice(setup.data.vocab_size, topology)
    teacher = live_teacher(setup, topology)(vocab)
    entropy = float(teacher.output(probe, setup, vocab).cross_entropy)
    row = _row(entropy, setup.data.vocab_size, tokens=len(probe.tokens) - 1)
    if section.precision == "native":
        return row
    difference = teacher.float8_difference(probe, setup, vocab, topology)
    if problem := difference.problem(section.float8_max_kl):
        return Row(CHECK, Status.FAIL, problem)
    return replace(row, detail=f"{row.detail}; {difference.line}")


def _row(cross_entropy: float, vocab_size: int, *, tokens: int) -> Row:
    uniform = math.log(vocab_size)
    problem = worse_than_uniform(cross_entropy, vocab_size)
    if problem is not None:
        return Row(CHECK, Status.WARN if cross_entropy <= uniform + UNTRAINED_NATS else Status.FAIL, problem)
    compared = f"{cross_entropy:.2f} nats on {tokens:,} tokens of the data; a uniform guess has {uniform:.2f}"
    return Row(CHECK, Status.OK, f"cross-entropy {compared}")
