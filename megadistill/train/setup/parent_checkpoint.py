"""The checkpoint of another run from which a run begins (`run.begin_from`): found and checked here, never changed."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.config.load import validate_recorded
from megadistill.config.recipe import Recipe
from megadistill.data import Mixture
from megadistill.data.stream.order import order_differences
from megadistill.errors import OperatorFault, UserError
from megadistill.models.families import EMBEDDING, load_config, parameter_shapes
from megadistill.models.initial_weights import MAX_DIFFERENCES, config_differences
from megadistill.redaction import printable
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.format import Checkpoint, ParentRecord, refuse_average
from megadistill.train.checkpoint.rollback import Rollback, is_abandoned, read_rollbacks
from megadistill.train.setup.run_folder import has_saved, student_config_of
from megadistill.types import Cursor

KEY = "run.begin_from"


@dataclass(frozen=True)
class Parent:
    """A checkpoint of another run."""

    checkpoint: Checkpoint
    run: Path | None
    """The folder of its run; None for a checkpoint outside of one."""

    def __str__(self) -> str:
        return printable(str(self.checkpoint.folder))

    @property
    def lineage(self) -> tuple[ParentRecord, ...]:
        """This checkpoint and those from which its own run began, oldest first."""
        manifest = self.checkpoint.manifest
        name = (self.run or self.checkpoint.folder).resolve().name
        return (*manifest.parents, ParentRecord(run=name, step=manifest.step, sha256=manifest.sha256))

    def rollbacks(self) -> list[Rollback]:
        """Rollbacks of its run, which hold in the new one: they skip sequences.

        Raises:
            OperatorFault: their record is damaged.
        """
        return [] if self.run is None else read_rollbacks(self.run)


def find_parent(recipe: Recipe) -> Parent | None:
    """The checkpoint that `run.begin_from` names, of a run folder its newest; None where the run resumes by itself.

    Only manifests are read.

    Raises:
        UserError: there is none that a run can begin from.
    """
    if recipe.run.begin_from is None:
        return None
    path, folder = Path(recipe.run.begin_from), Path(recipe.run.folder)
    if folder.resolve() in (path.resolve(), *path.resolve().parents):
        raise UserError(
            f"{KEY}: {_printable(path)} is in run.folder itself, which resumes from its newest checkpoint by itself: "
            "remove the key, or begin a new run from this checkpoint with another run.folder"
        )
    if has_saved(folder):  # its own checkpoints count from now on, and the parent may be gone
        return None
    try:
        return _at(path)
    except OperatorFault as fault:
        raise UserError(f"{KEY}: {fault}: name another checkpoint") from None
    except OSError as error:
        raise UserError(f"{KEY}: {_printable(path)} cannot be read: {error.strerror}") from None


def check_parent(parent: Parent, recipe: Recipe, student: Any, data: Mixture, *, rank: int, world: int) -> None:
    """Checks that the run can begin from the checkpoint: steps, student, optimizer, data, and the files' sizes.

    `student`: the resolved config; `rank` of `world` looks at its share of the files.

    Raises:
        UserError: it cannot; one line.
    """
    manifest = parent.checkpoint.manifest
    if recipe.train.steps <= manifest.step:
        raise UserError(
            f"{KEY}: {parent} is at step {manifest.step}, train.steps is {recipe.train.steps}: steps count from the "
            f"beginning of the first run, so set train.steps to more than {manifest.step}"
        )
    before = validate_recorded(manifest.recipe, source=str(parent.checkpoint.folder / "manifest.json"))
    kind, their_kind = recipe.train.optimizer.kind, before.train.optimizer.kind
    if kind != their_kind:
        raise UserError(
            f"{KEY}: {parent} has the state of train.optimizer.kind {their_kind}, the recipe has {kind}: use the same, "
            f"or begin from its weights alone: {_weights_alone(parent)}"
        )
    differing = _student_differences(parent, before, student, data)
    if differing:
        more = f"; and {len(differing) - MAX_DIFFERENCES} more" if len(differing) > MAX_DIFFERENCES else ""
        raise UserError(
            f"{KEY}: the student of {parent} is not that of the recipe: "
            f"{printable('; '.join(differing[:MAX_DIFFERENCES]))}{more}. Give the student the same values"
        )
    _refuse_other_position(parent, recipe, data)
    for name, record in list(manifest.files.items())[rank::world]:
        path = parent.checkpoint.folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.bytes:
            state = "is missing" if size is None else f"has {size} bytes, its manifest says {record.bytes}"
            raise UserError(f"{KEY}: {_printable(path)} {state}: name another checkpoint")


def _at(path: Path) -> Parent:
    if (path / "recipe.json").is_file() or (path / "checkpoints").is_dir():
        return Parent(_newest(path), path)
    if not (path / "manifest.json").is_file():
        if (path / "config.json").is_file():
            raise UserError(
                f"{KEY}: {_printable(path)} is a Hugging Face folder, which has weights and no optimizer state: remove "
                "the key and name the folder in student.weights, or name the run that it was exported from"
            )
        what = "is neither a run folder nor one of its checkpoints/step-…" if path.exists() else "does not exist"
        raise UserError(f"{KEY}: {_printable(path)} {what} (paths are relative to {Path.cwd()})")
    run = path.resolve().parent.parent
    parent = Parent(Checkpoint(path), run if (run / "recipe.json").is_file() else None)
    try:
        refuse_average(parent.checkpoint.manifest, path)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from None
    if is_abandoned(parent.checkpoint.manifest, parent.rollbacks()):
        raise UserError(f"{KEY}: a rollback of its run abandoned {parent}: name an older checkpoint")
    return parent


def _newest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run with a valid manifest that no rollback abandoned."""
    folders, rollbacks, faults = checkpoint_folders(run / "checkpoints"), read_rollbacks(run), []
    for step in sorted(folders, reverse=True):
        try:
            checkpoint = Checkpoint(folders[step])
        except OperatorFault as fault:
            faults.append(str(fault))
            continue
        if not is_abandoned(checkpoint.manifest, rollbacks):
            return checkpoint
    raise UserError(f"{KEY}: {_printable(run)} has no valid checkpoint" + (f": {faults[0]}" if faults else " yet"))


def _student_differences(parent: Parent, before: Recipe, student: Any, data: Mixture) -> list[str]:
    """Differences of the two students: of their configs, where the parent's is at hand, or of the parameters."""
    manifest = parent.checkpoint.manifest
    if manifest.vocab_size != data.vocab_size:
        return [f"the data had {manifest.vocab_size} ids there, has {data.vocab_size} here"]
    try:
        config = load_config(student_config_of(parent.run, before.student), what="student.config")
    except UserError:  # it named a folder that is gone, and the checkpoint lies outside of its run
        config = None
    if config is not None and (differing := config_differences(config, student)):
        return differing
    padded = copy.deepcopy(student)
    rows, *_ = manifest.parameters.get(EMBEDDING, (0,))
    padded.vocab_size = max(rows, data.vocab_size)  # the padding belongs to a run's layout
    shapes = {name: tuple(shape) for name, shape in parameter_shapes(padded).items()}
    return [
        f"{name} is {_size(manifest.parameters.get(name))} there, {_size(shapes.get(name))} here"
        for name in sorted(shapes.keys() | manifest.parameters.keys())
        if shapes.get(name) != manifest.parameters.get(name)
    ]


def _refuse_other_position(parent: Parent, recipe: Recipe, data: Mixture) -> None:
    cursor, order = Cursor.from_state(parent.checkpoint.manifest.cursor), data.order(recipe.data.seed)
    if cursor.fingerprint == order.fingerprint:
        return
    before = parent.checkpoint.manifest.cursor["order"]
    known = {"version", "seed", "sources", "stages"} <= before.keys()
    differing = ["its order is not recorded"]
    if known:
        differing = order_differences(before, order.description, next_slot=cursor.next_slot)
    if differing:
        raise UserError(
            f"{KEY}: {parent} continues its data after {cursor.next_slot:,} sequences, and the recipe's are other ones "
            f"up to there: {printable('; '.join(differing))}. Keep its sources and data.seed, and add other text as a "
            f"curriculum entry after them (data.curriculum), or begin from its weights alone: {_weights_alone(parent)}"
        )


def _weights_alone(parent: Parent) -> str:
    return f"megadistill export {parent} --output DIR, and student.weights=DIR in place of {KEY}"


def _size(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _printable(path: Path) -> str:
    return printable(str(path))
