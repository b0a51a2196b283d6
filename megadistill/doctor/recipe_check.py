"""Checks of a recipe and the files that it names, part by part, so that one fault does not hide the next.

Each part is checked alone, by the functions that a run calls. `prepare`, which a run calls as a whole, comes last, so
that none of its refusals is missing.
"""

import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

from megadistill.config.auto import describe_choices
from megadistill.config.load import load_recipe
from megadistill.config.recipe import Recipe, TeacherSection
from megadistill.data import Mixture, ShardFault, TokenStream
from megadistill.data.shards.reader import open_shard
from megadistill.data.stream.segments import slots_after
from megadistill.distributed.launch import Launch
from megadistill.distributed.vocab import padded_vocabulary
from megadistill.doctor.rank_report import RankReport, Status
from megadistill.errors import UserError
from megadistill.models.families import load_config, refuse_as_student, refuse_documents
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.flops import parameter_counts
from megadistill.models.weights import check_weights
from megadistill.student.deepspeed_config import (
    active_deepspeed_config,
    build_engine_config,
    describe_deepspeed,
    reduction_dtype,
)
from megadistill.teacher.local_copy import describe_copy
from megadistill.train.checkpoint.local_tier import describe_local_folder
from megadistill.train.setup.held_out import held_out_splits
from megadistill.train.setup.parent_checkpoint import check_parent, find_parent
from megadistill.train.setup.plausibility import implausible_settings
from megadistill.train.setup.preflight import check_start, model_rows
from megadistill.train.setup.ranks_and_files import replica_of, require_ranks_and_files, students_of
from megadistill.train.setup.run_folder import has_saved, refuse_other_recipe
from megadistill.train.setup.setup import Setup, prepare
from megadistill.train.setup.step_shape import paces_of, with_steps
from megadistill.units import count, number_of, short

SHARD_SECONDS = 10.0
"""Time limit for opening a rank's share of the shards; the rest is skipped and reported."""


def check_recipe(
    own: RankReport, path: Path, overrides: Sequence[str], launch: Launch
) -> tuple[Recipe | None, Setup | None]:
    """The recipe, if it can be read, and the inputs of a run, if no check fails.

    `launch`: this rank's; where its replica is a launch of its own, the checks are of the ranks of all replicas.
    """
    own_launch, launch = launch, launch.of_all_replicas()
    recipe = own.check("recipe", lambda: (load_recipe(path, overrides), f"{path} is valid"))
    if recipe is None:
        return None, None
    content = own.facts.setdefault("content", {})
    content["recipe"] = hashlib.sha256(json.dumps(recipe.snapshot(), sort_keys=True).encode()).hexdigest()[:12]
    accumulation = own.check("launch", lambda: _launched(recipe, launch))
    own.check("DeepSpeed's file", lambda: _deepspeed(recipe, launch, accumulation))
    data = own.check("data", lambda: _data(recipe))
    if data is not None:
        data = _for_models(recipe, data)
        content["data"] = data.order(recipe.data.seed).fingerprint[:12]
        own.check("shards", lambda: _shards(recipe, data, launch))
        if recipe.validation is not None:
            own.check("held-out splits", lambda: _held_out(recipe, data, launch))
        own.check("vocabulary", lambda: _vocabulary(recipe, data, launch))
    own.check("student", lambda: _described(_student_config(recipe, data)))
    if recipe.student.weights is not None and data is not None:
        folder = Path(recipe.student.weights)
        content["student"] = own.check("student's weights", lambda: _start(recipe, folder, data))
    if recipe.run.begin_from is not None and data is not None:
        content["parent"] = own.check("parent", lambda: _parent(recipe, data, launch))
    for key, section in recipe.teacher_sections.items():
        _check_teacher(own, recipe, key, section, content)
    if (local := recipe.checkpoint.local) is not None:
        own.check("local saves", lambda: (None, describe_local_folder(Path(local.folder))))
    own.check("earlier checkpoints", lambda: _earlier_checkpoints(recipe))
    details = {result.detail for result in own.results}
    try:
        require_ranks_and_files(recipe, launch)
    except UserError:  # the checks above have each of its reasons
        return recipe, None
    try:
        setup = prepare(recipe, own_launch)
    except (UserError, OSError) as error:
        if str(error) not in details:
            own.add("setup", Status.FAIL, str(error))
        return recipe, None
    own.add("setup", Status.OK, "recipe, data and models fit together")
    own.add("kernels", Status.OK, describe_choices(setup.choices()))
    for check, warning in implausible_settings(setup).items():
        own.add(check, Status.WARN, warning)
    return recipe, setup


def _launched(recipe: Recipe, launch: Launch) -> tuple[int, str]:
    roles, students = students_of(recipe, launch)
    accumulation = recipe.accumulation(students.world)
    replica, group = replica_of(recipe, students)
    detail = f"{number_of(students.world, 'rank')}, vocabulary over {group}, accumulation {accumulation}"
    if replica.world < students.world:
        detail += f"; {students.world // replica.world} replicas of {number_of(replica.world, 'rank')}"
    if recipe.distributed.sequence > 1:
        detail += f"; sequences shared by {recipe.distributed.sequence} ranks"
    if roles is not None:
        detail += f"; the teacher on {roles.teachers} more, {roles.replicas} x {roles.stages} stages"
    return accumulation, detail


def _deepspeed(recipe: Recipe, launch: Launch, accumulation: int | None) -> tuple[None, str]:
    deepspeed_config, disabled = active_deepspeed_config(recipe.student.deepspeed)
    if accumulation is not None:
        _, students = students_of(recipe, launch)
        replica, _ = replica_of(recipe, students)
        replicas = students.world // replica.world
        build_engine_config(deepspeed_config, recipe.train, accumulation, ranks=replica.world, replicas=replicas)
    without = f"; disabled on a CPU: {', '.join(disabled)}" if disabled else ""
    reduced = f"; gradients are reduced in {reduction_dtype(deepspeed_config, recipe.train.precision)}"
    return None, f"{describe_deepspeed(recipe.student.deepspeed)}{reduced}{without}"


def _data(recipe: Recipe) -> tuple[Mixture, str]:
    data = Mixture.load(recipe.data, global_batch=recipe.train.global_batch)
    sequences = sum(manifest.sequences for manifest in data.sources.values())
    needed = slots_after(paces_of(recipe, data), with_steps(recipe, data).train.steps)
    shards = sum(len(manifest.shards) for manifest in data.sources.values())
    return data, (
        f"{number_of(sequences, 'sequence')} of {data.sequence_length:,} tokens in {number_of(shards, 'shard')}; "
        f"the run reads {needed:,}, {short(needed / sequences)} epochs"
    )


def _shards(recipe: Recipe, data: Mixture, launch: Launch) -> tuple[None, str]:
    """Opens this rank's share of the shards, with their sizes and indices, and reads one batch."""
    manifests = list(data.sources.values())
    ends = list(accumulate(len(manifest.shards) for manifest in manifests))  # of one numbering through all sources
    share = range(launch.rank, ends[-1], launch.world)
    end = time.monotonic() + SHARD_SECONDS
    opened = 0
    for place in share:
        if time.monotonic() > end:
            break
        source = bisect_right(ends, place)
        manifest = manifests[source]
        number = place - ends[source] + len(manifest.shards)
        try:
            open_shard(manifest, number)
        except ShardFault as fault:
            raise UserError(f"shard {number}: {fault}") from None
        opened += 1
    section = recipe.data
    stream = TokenStream(
        data, seed=section.seed, batch_slots=1, rank=0, world_size=1, document_mask=section.document_mask, prefetch=0
    )
    try:
        stream.batch(range(launch.rank, launch.rank + 1))
    except ShardFault as fault:
        raise UserError(f"the sequence of slot {launch.rank}: {fault}") from None
    if opened < len(share):
        return None, f"{SHARD_SECONDS:.0f} s did not suffice to open all {ends[-1]:,}; the opened ones are valid"
    return None, f"all {ends[-1]:,} open, with their indices, and each rank reads a sequence"


def _held_out(recipe: Recipe, data: Mixture, launch: Launch) -> tuple[None, str]:
    """Opens this rank's share of the held-out shards, and reads a sequence of each split."""
    end, opened, shards, parts = time.monotonic() + SHARD_SECONDS, 0, 0, []
    for split in held_out_splits(recipe, data):
        where = f"validation.data.{split.name}"
        for number in range(launch.rank, len(split.manifest.shards), launch.world):
            shards += 1
            if time.monotonic() > end:
                continue
            try:
                open_shard(split.manifest, number)
            except ShardFault as fault:
                raise UserError(f"{where}, shard {number}: {fault}") from None
            opened += 1
        try:
            split.stream(document_mask=recipe.data.document_mask).batch(range(1))
        except ShardFault as fault:
            raise UserError(f"{where}, slot 0: {fault}") from None
        parts.append(f"{split.name}: {split.sequences:,} of {number_of(split.manifest.sequences, 'sequence')}")
    left_out = "" if opened == shards else f"; {SHARD_SECONDS:.0f} s did not suffice to open all shards"
    return None, f"{'; '.join(parts)}; each opens{left_out}"


def _vocabulary(recipe: Recipe, data: Mixture, launch: Launch) -> tuple[None, str]:
    _, students = students_of(recipe, launch)
    replica, group = replica_of(recipe, students)
    padded = padded_vocabulary(data.vocab_size, recipe.student.vocab_multiple, ranks=replica.world)
    return None, f"{data.vocab_size:,} ids padded to {padded:,}, {padded // group:,} a rank; {data.tokenizer.kind}"


def _for_models(recipe: Recipe, data: Mixture) -> Mixture:
    """The data as the models of the recipe read it; as it is where a model cannot be read, which is checked later."""
    rows: tuple[int | None, ...] = ()
    try:
        for each in [recipe.with_teacher(name) for name in recipe.teachers] or [recipe]:
            teacher = None
            if each.teacher is not None and each.teacher.is_live:
                teacher = load_config(Path(str(each.teacher.path)), what="teacher.path")
            rows += model_rows(each, data, _student_config(recipe, None), teacher)
        return data.for_models(*rows)
    except UserError:
        return data


def _student_config(recipe: Recipe, data: Mixture | None) -> Any:
    source = recipe.student.config
    config = load_config(Path(source) if isinstance(source, str) else source, what="student.config")
    refuse_as_student(config, "student.config")
    if data is not None:
        config.vocab_size = data.vocab_size
    return config


def _check_teacher(
    own: RankReport, recipe: Recipe, key: str, section: TeacherSection, content: dict[str, str | None]
) -> None:
    """A teacher's folder. `key` is its own in the recipe; what every node must have alike goes to `content`."""
    if section.path is None:
        return
    path, what = Path(section.path), key.replace("teachers.", "teacher ")
    parameters = own.check(what, lambda: _described(_teacher_config(recipe, path, f"{key}.path")))
    if parameters is not None:
        fingerprint = own.check(f"{what}'s weights", lambda: _fingerprint(path))
        content["teacher"] = " ".join(filter(None, (content.get("teacher"), fingerprint))) or None
    if (copies := section.local_copy) is not None:
        own.check(f"{what}'s copy", lambda: (None, describe_copy(path, Path(copies))))


def _teacher_config(recipe: Recipe, path: Path, key: str) -> Any:
    config = load_config(path, what=key)
    if recipe.data.document_mask:
        refuse_documents(config, key)
    return config


def _start(recipe: Recipe, weights: Path, data: Mixture) -> tuple[str | None, str]:
    if has_saved(Path(recipe.run.folder)):
        return None, f"{weights}: not read, the run resumes from a checkpoint"
    if recipe.run.begin_from is not None:
        return None, f"{weights}: not read, the run begins from run.begin_from"
    check_start(weights, _student_config(recipe, data), data)
    fingerprint = teacher_fingerprint(weights)[:12]
    return fingerprint, f"every tensor is there in its shape, of the student's model; fingerprint {fingerprint}"


def _parent(recipe: Recipe, data: Mixture, launch: Launch) -> tuple[str | None, str]:
    parent = find_parent(recipe)
    if parent is None:
        return None, "run.begin_from: not read, the run resumes from a checkpoint of its own"
    check_parent(parent, recipe, _student_config(recipe, data), data, rank=launch.rank, world=launch.world)
    manifest = parent.checkpoint.manifest
    detail = f"{parent}: step {manifest.step:,}, of this student and this data; every file has its size"
    return manifest.sha256[:12], f"{detail}, the start compares the sha256"


def _fingerprint(folder: Path) -> tuple[str, str]:
    check_weights(folder, load_config(folder, what="teacher.path"))
    fingerprint = teacher_fingerprint(folder)[:12]
    return fingerprint, f"every tensor is there in its shape; fingerprint {fingerprint}"


def _described(config: Any) -> tuple[int, str]:
    counts = parameter_counts(config)
    parts = ", ".join(f"{name} {count(size)}" for name, size in asdict(counts).items() if name != "active_body")
    return counts.total, f"{config.model_type} on meta: {count(counts.total)} parameters ({parts})"


def _earlier_checkpoints(recipe: Recipe) -> tuple[None, str]:
    folder = Path(recipe.run.folder)
    refuse_other_recipe(folder, recipe.snapshot())
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return None, f"the run resumes from {saved[-1]}, if it is valid" if saved else f"{folder} is new, or has none"
