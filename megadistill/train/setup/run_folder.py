"""The run folder: its description of the run, and the check whether a recipe may resume in it."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from megadistill.config.load import refuse_renamed, validate_recipe, validate_recorded
from megadistill.config.recipe import StudentSection
from megadistill.data import Mixture
from megadistill.data.tokenizers.data_files import changed_files, hashes_in, hashes_of, read_files, write_files
from megadistill.errors import UserError
from megadistill.events import RENAMED_EVENTS, json_lines, scan_lines
from megadistill.io import read_file, read_json, reason_of, write_file, write_json
from megadistill.models.configs.text_config import with_tied_head
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.precision import Precision
from megadistill.student.deepspeed_config import numeric_settings
from megadistill.train.checkpoint.folders import checkpoint_folders
from megadistill.train.checkpoint.versions import versions
from megadistill.train.setup.recipe_changes import describe_changes, recipe_changes
from megadistill.train.setup.schedule_change import SCHEDULE_KEYS, refuse_changed_steps
from megadistill.train.setup.step_shape import refuse_changed_entries
from megadistill.train.setup.teacher_files import key_of_any_teacher

FIRST_EVENTS = 100
"""Lines of events.jsonl in which names of an earlier version are looked for: its first events have them already."""

# Keys that may differ between the attempts of a run: those that move no number by more than float32 rounding. The
# layout depends on the ranks at hand; with `loss.label_fraction` it decides among which tokens the surest are selected,
# as the number of ranks does, which is not in a recipe.
MAY_CHANGE = (
    "data.manifest",  # the stream compares the content, wherever it is
    "data.curriculum",
    "data.on_corrupt_sample",
    "data.max_masked_per_million",
    "data.skip",
    "data.prefetch",
    "teacher.source",
    "teacher.targets",
    "teacher.save_targets",
    "teacher.placement",
    "teacher.ranks",
    "teacher.stages",
    "teacher.queue",
    "teacher.local_copy",
    "teacher.float8_max_kl",
    "run.folder",
    "run.time_limit_minutes",
    "run.timeline",
    "track",
    "profile",
    "train.log_every",
    "train.histograms_every",
    "train.norms_every",
    "train.checkpoint_every",
    "train.micro_batch",
    "distributed.timeout_minutes",
    "distributed.shard",
    "distributed.min_replicas",
    "distributed.vocab_group",
    "distributed.sequence",
    "loss.logit_memory_mb",
    "loss.elementwise",
    "loss.diagnostics_every",
    "student.activation_checkpointing",
    "student.activation_offload",
    "student.attention",
    "student.vocab_multiple",
    "student.compile",
    "teacher.attention",
    "teacher.compile",
    "student.deepspeed",  # `refuse_other_deepspeed` compares the content
)

MAY_CHANGE_SECTIONS = ("profile.", "data.sources.", "checkpoint.", "resilience.", "validation")

TOKENIZER_FOLDER = "tokenizer"
"""Copy of the data's tokenizer beside recipe.json, so that a run can be exported without its data."""

STUDENT_FOLDER = "student"
"""Copy of the config.json of the folder that `student.config` names, so that a run can be exported without it."""


def write_description(
    folder: Path,
    recipe: dict[str, Any],
    deepspeed_config: dict[str, Any],
    *,
    tokenizer: Mapping[str, str] | None = None,
    started_from: dict[str, str] | None = None,
    parents: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Writes recipe.json: the resolved recipe, the DeepSpeed settings in force, the versions.

    `tokenizer`: the sha256 of each file of the tokenizer's copy. `started_from`: source of the initial weights, see the
    function `started_from`. `parents`: records of the checkpoints from which the run began.
    """
    first = {
        **({} if tokenizer is None else {"tokenizer": dict(tokenizer)}),
        **({} if started_from is None else {"started_from": started_from}),
        **({"parents": list(parents)} if parents else {}),
    }
    description = {"recipe": recipe, "deepspeed": deepspeed_config, **first, "versions": versions()}
    write_json(folder / "recipe.json", description)


def has_saved(folder: Path) -> bool:
    """Whether the run has a checkpoint, so that it resumes instead of starting."""
    return bool(checkpoint_folders(folder / "checkpoints"))


def started_from(folder: Path, weights: str | None) -> dict[str, str] | None:
    """Folder and fingerprint of the student's initial weights; None for random ones.

    A run that has saved takes them from its recipe.json: the folder of the weights is no longer needed.
    """
    if weights is None:
        return None
    if not has_saved(folder):
        return {"weights": weights, "fingerprint": teacher_fingerprint(Path(weights))}
    return recorded_start(folder)


def recorded_start(folder: Path) -> dict[str, str] | None:
    """Result of `started_from` at the first start of the run of this folder, by its recipe.json."""
    recorded = _recorded(folder, "started_from")
    return recorded if isinstance(recorded, dict) else None


def recorded_parents(folder: Path) -> list[dict[str, Any]]:
    """The records of the checkpoints from which the run of this folder began, by its recipe.json."""
    recorded = _recorded(folder, "parents")
    return [each for each in recorded if isinstance(each, dict)] if isinstance(recorded, list) else []


def _recorded(folder: Path, key: str) -> Any:
    try:
        return read_json(folder / "recipe.json").get(key)
    except (OSError, ValueError, AttributeError):
        return None


def refuse_other_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Refuses a folder of another recipe, with a list of the differences.

    Raises:
        UserError: the folder has another recipe, an unreadable one, or one of a version before 0.1.0.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.folder: {folder} is a file; name a folder")
    path = folder / "recipe.json"
    if not path.exists():
        return
    try:
        written = read_json(path)["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): name another run.folder, or move this one away") from None
    try:
        refuse_renamed(written, source=str(path))
    except UserError as error:
        raise UserError(f"{error} (written by a version before 0.1.0: name another run.folder)") from None
    events = folder / "events.jsonl"
    next(scan_lines(folder / "metrics.jsonl"), None)  # or one rank alone would find that it is no file
    lines = islice(json_lines(events), FIRST_EVENTS)  # a later version has not continued it
    if former := {str(line.get("event")) for line in lines if line is not None} & RENAMED_EVENTS.keys():
        names = ", ".join(f"{name} is now {RENAMED_EVENTS[name]}" for name in sorted(former))
        raise UserError(f"{events}: written by a version before 0.1.0 ({names}): name another run.folder")
    earlier = None
    with suppress(UserError):  # keys that are newer than the folder get their defaults
        earlier = validate_recorded(written, source=str(path))
        written = earlier.snapshot()
    changes = recipe_changes(written, recipe)
    may_change = MAY_CHANGE_SECTIONS if earlier is None else (*MAY_CHANGE_SECTIONS, *SCHEDULE_KEYS)
    unused = not has_saved(folder) or "run.begin_from" not in changes or changes["run.begin_from"][1] is None
    differing = [
        f"{key} was {was!r}, is {is_!r}"
        for key, (was, is_) in changes.items()
        if key_of_any_teacher(key) not in MAY_CHANGE
        and not key.startswith(may_change)
        and not (key == "run.begin_from" and unused)
    ]
    if differing:
        raise UserError(
            f"{folder} belongs to another recipe: {'; '.join(differing)}. Name another run.folder, or undo the change"
        )
    schedule = {key: values for key, values in changes.items() if key.startswith(SCHEDULE_KEYS)}
    if earlier is not None and "data.curriculum" in changes and isinstance(recipe["data"]["curriculum"], list):
        refuse_changed_entries(folder, earlier, validate_recipe(recipe, source="recipe"))
    if earlier is not None and schedule:
        now = validate_recipe(recipe, source="recipe")
        refuse_changed_steps(folder, earlier, now, changes=describe_changes(schedule))


def refuse_other_deepspeed(folder: Path, deepspeed_config: dict[str, Any], precision: Precision) -> None:
    """Refuses DeepSpeed settings under which a run of `precision` would continue with other numbers than it began with.

    Raises:
        UserError: names the settings that differ.
    """
    try:
        before = numeric_settings(read_json(folder / "recipe.json")["deepspeed"], precision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # `refuse_other_recipe` decides on a folder without a description, or with a damaged one
    now = numeric_settings(deepspeed_config, precision)
    differing = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before[key] != now[key]]
    if differing:
        raise UserError(
            f"student.deepspeed: {folder} was begun with other settings: {'; '.join(differing)}. Name the former file, "
            "or another run.folder"
        )


def copy_tokenizer(folder: Path, data: Mixture) -> dict[str, str]:
    """Copies the tokenizer of the data into the run folder, once. The sha256 of each of its files, by name.

    Raises:
        UserError: the data has none, it cannot be read or was changed, or the copy of an earlier start was changed.
    """
    target = folder / TOKENIZER_FOLDER
    if target.exists():
        return _unchanged_tokenizer(folder, data.tokenizer.files or recorded_tokenizer(folder))
    contents = read_files(data.first)
    temporary = folder / f".{TOKENIZER_FOLDER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_files(temporary, contents)
    temporary.rename(target)
    return hashes_of(contents)


def recorded_tokenizer(folder: Path) -> dict[str, str]:
    """The sha256 of each file of the run's tokenizer, by its recipe.json; empty for a run of an earlier release."""
    recorded = _recorded(folder, "tokenizer")
    return {str(name): str(sha256) for name, sha256 in recorded.items()} if isinstance(recorded, dict) else {}


def run_tokenizer(folder: Path) -> dict[str, Path]:
    """The files of the run's tokenizer, by their paths in its folder.

    Raises:
        UserError: there is none, or one was changed since the run began.
    """
    names = _unchanged_tokenizer(folder, recorded_tokenizer(folder))
    if not names:
        raise UserError(f"{folder / TOKENIZER_FOLDER} has no tokenizer: start the run again, which copies the data's")
    return {name: folder / TOKENIZER_FOLDER / name for name in names}


def _unchanged_tokenizer(folder: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """Hashes of the files of the copy that are recorded, of all where none is."""
    target = folder / TOKENIZER_FOLDER
    hashes = hashes_in(target)
    if changed := next(changed_files(hashes, recorded), None):
        raise UserError(
            f"{target}/{changed}: the tokenizer of the run was changed after its first start: remove {target} and "
            "start the run again, which copies the data's"
        )
    return {name: hashes[name] for name in recorded or hashes}


def copy_student_config(folder: Path, section: StudentSection) -> None:
    """Copies the config.json of the folder `student.config` into the run folder, once.

    Raises:
        UserError: it cannot be read.
    """
    target = folder / STUDENT_FOLDER / "config.json"
    if not isinstance(section.config, str) or target.exists():
        return
    source = Path(section.config) / "config.json"
    try:
        content = read_file(source)
    except (OSError, ValueError) as error:
        raise UserError(f"student.config: {source} cannot be copied ({reason_of(error)}): restore it") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, with_tied_head(content, source.parent))


def student_config_of(run: Path | None, section: StudentSection) -> dict[str, Any] | Path:
    """The student's config: as it is in the recipe, or a folder of it, the run's own copy where there is one."""
    if not isinstance(section.config, str):
        return section.config
    copy = None if run is None else run / STUDENT_FOLDER
    return copy if copy is not None and (copy / "config.json").is_file() else Path(section.config)
