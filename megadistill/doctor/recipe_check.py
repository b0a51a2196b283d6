"""Room `doctor`: what a recipe names, part by part, so that one fault does not hide the next. It starts nothing.

What is refused, and in which words, is `setup`'s and its rooms'. Here each part is asked alone; `prepare`, which a run
asks, is asked last, so that nothing it refuses is missing here.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megadistill.config import Recipe, load_recipe
from megadistill.data import Mixture, ShardFault, TokenStream
from megadistill.data.shards.reader import open_shard
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Launch, vocab_group_size
from megadistill.distributed.vocab import block_cyclic_ranges, padded_vocabulary
from megadistill.doctor.findings import Examined, Mark
from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.flops import parameter_counts
from megadistill.models.weights import check_weights
from megadistill.student.deepspeed_config import deepspeed_config, deepspeed_profile
from megadistill.train.setup.preflight import check_start
from megadistill.train.setup.run_folder import has_saved, refuse_other_recipe
from megadistill.train.setup.setup import Setup, prepare, roles_of

SHARD_SECONDS = 10.0
"""That a rank spends on opening its share of the shards; what is left then is left out, and said."""


def check_recipe(
    own: Examined, path: Path, overrides: Sequence[str], launch: Launch
) -> tuple[Recipe | None, Setup | None]:
    """The recipe, where it can be read, and all that a run would start from, where nothing is refused."""
    recipe = own.look("recipe", lambda: (load_recipe(path, overrides), f"{path} is valid"))
    if recipe is None:
        return None, None
    content = own.facts.setdefault("content", {})
    content["recipe"] = hashlib.sha256(json.dumps(recipe.snapshot(), sort_keys=True).encode()).hexdigest()[:12]
    accumulation = own.look("launch", lambda: _launched(recipe, launch))
    own.look("DeepSpeed's file", lambda: _deepspeed(recipe, accumulation))
    data = own.look("data", lambda: _data(recipe))
    if data is not None:
        content["data"] = data.order(recipe.data.seed).fingerprint[:12]
        own.look("shards", lambda: _shards(recipe, data, launch))
        own.look("vocabulary", lambda: _vocabulary(recipe, data, launch))
    own.look("student", lambda: _student(recipe, data))
    if recipe.student.weights is not None and data is not None:
        folder = Path(recipe.student.weights)
        content["student"] = own.look("student's weights", lambda: _start(recipe, folder, data))
    if recipe.teacher is not None and recipe.teacher.path is not None:
        path_of_teacher = Path(recipe.teacher.path)
        own.look("teacher", lambda: _teacher(path_of_teacher))
        content["teacher"] = own.look("teacher's weights", lambda: _fingerprint(path_of_teacher))
    own.look("earlier checkpoints", lambda: _may_go_on(recipe))
    said = {finding.said for finding in own.findings}
    try:
        setup = prepare(recipe, launch)
    except (UserError, OSError) as error:
        if str(error) not in said:
            own.note("together", Mark.BAD, str(error))
        return recipe, None
    own.note("together", Mark.GOOD, "recipe, data and models fit together")
    return recipe, setup


def students_of(recipe: Recipe, launch: Launch) -> tuple[Roles | None, Launch]:
    """Who has which role, and the student's part of the launch as its first rank sees it.

    Raises:
        UserError: the ranks cannot be shared out as the recipe says.
    """
    roles = roles_of(recipe, launch)
    students = launch.world if roles is None else roles.students
    return roles, Launch(0, students, 0, min(launch.local_world, students))


def _launched(recipe: Recipe, launch: Launch) -> tuple[int, str]:
    roles, students = students_of(recipe, launch)
    accumulation, group = recipe.accumulation(students.world), vocab_group_size(recipe.comm.vocab_group, students)
    ranks = f"{students.world} {'rank' if students.world == 1 else 'ranks'}"
    said = f"{ranks}, vocabulary over {group}, accumulation {accumulation}"
    if roles is not None:
        said += f"; the teacher on {roles.teachers} more, {roles.replicas} x {roles.stages} stages"
    return accumulation, said


def _deepspeed(recipe: Recipe, accumulation: int | None) -> tuple[None, str]:
    profile, left_out = deepspeed_profile(Path(recipe.student.deepspeed))
    if accumulation is not None:
        deepspeed_config(profile, recipe.train, accumulation)
    without = f"; a CPU does without {', '.join(left_out)}" if left_out else ""
    return None, f"{recipe.student.deepspeed}{without}"


def _data(recipe: Recipe) -> tuple[Mixture, str]:
    data = Mixture.load(recipe.data)
    units = sum(manifest.units for manifest in data.sources.values())
    needed = recipe.train.steps * recipe.train.global_batch
    shards = sum(len(manifest.shards) for manifest in data.sources.values())
    return data, (
        f"{units:,} sequences of {data.sequence_length:,} tokens in {shards:,} shards; the run reads {needed:,}, "
        f"{needed / units:.2g} times as many"
    )


def _shards(recipe: Recipe, data: Mixture, launch: Launch) -> tuple[None, str]:
    """This rank's share of them is there, in the sizes of the manifest, with its index; and one batch is read."""
    shards = [(manifest, number) for manifest in data.sources.values() for number in range(len(manifest.shards))]
    share = shards[launch.rank :: launch.world]
    end = time.monotonic() + SHARD_SECONDS
    opened = 0
    for manifest, number in share:
        if time.monotonic() > end:
            break
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
        return None, f"{SHARD_SECONDS:.0f} s were not enough to open all {len(shards):,}; what was opened is well"
    return None, f"all {len(shards):,} open, with their indices, and each rank reads a sequence"


def _vocabulary(recipe: Recipe, data: Mixture, launch: Launch) -> tuple[None, str]:
    _, students = students_of(recipe, launch)
    padded = padded_vocabulary(data.vocab_size, recipe.student.vocab_multiple)
    group = vocab_group_size(recipe.comm.vocab_group, students)
    block_cyclic_ranges(padded, students.world, group, 0)
    return None, f"{data.vocab_size:,} ids padded to {padded:,}, {padded // group:,} a rank; {data.tokenizer.kind}"


def _student(recipe: Recipe, data: Mixture | None) -> tuple[None, str]:
    return None, _described(_student_config(recipe, data))


def _student_config(recipe: Recipe, data: Mixture | None) -> Any:
    source = recipe.student.config
    config = load_config(Path(source) if isinstance(source, str) else source, what="student.config")
    if data is not None:
        config.vocab_size = data.vocab_size
    return config


def _start(recipe: Recipe, weights: Path, data: Mixture) -> tuple[str | None, str]:
    if has_saved(Path(recipe.run.folder)):
        return None, f"{weights}: not read, the run goes on from a checkpoint"
    check_start(weights, _student_config(recipe, data), data)
    found = teacher_fingerprint(weights)[:12]
    return found, f"every tensor is there in its shape, of the student's model; fingerprint {found}"


def _teacher(folder: Path) -> tuple[None, str]:
    return None, _described(load_config(folder, what="teacher.path"))


def _fingerprint(folder: Path) -> tuple[str, str]:
    check_weights(folder, load_config(folder, what="teacher.path"))
    found = teacher_fingerprint(folder)[:12]
    return found, f"every tensor is there in its shape; fingerprint {found}"


def _described(config: Any) -> str:
    counts = parameter_counts(config)
    parts = ", ".join(f"{name} {readable(size)}" for name, size in asdict(counts).items() if name != "active_body")
    return f"{config.model_type} on meta: {readable(counts.total)} parameters ({parts})"


def readable(amount: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= size:
            return f"{amount / size:.3g} {letter}"
    return f"{amount:.3g}"


def _may_go_on(recipe: Recipe) -> tuple[None, str]:
    folder = Path(recipe.run.folder)
    refuse_other_recipe(folder, recipe.snapshot())
    found = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return None, f"the run goes on from {found[-1]}, if it holds" if found else f"{folder} is new, or has none"
