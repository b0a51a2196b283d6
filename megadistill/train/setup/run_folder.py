"""The run folder: what it says of the run, and whether a recipe may go on in it. It knows no ranks."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from megadistill.config import StudentSection, dotted, refuse_renamed, validate_recipe
from megadistill.data import Mixture
from megadistill.errors import UserError
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.hf_export import TOKENIZER_FILES
from megadistill.train.checkpoint.format import checkpoint_folders
from megadistill.versions import versions

# What may differ between the run that wrote a folder and the one that goes on in it: nothing that moves a number by
# more than float32 rounding. The layout follows the ranks that one has today; with `loss.label_fraction` it says among
# which tokens the surest are looked for, as the number of ranks does, which no recipe holds.
MAY_CHANGE = (
    "data.manifest",  # the stream compares what was read, wherever it lies today
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
    "run.folder",
    "run.time_limit_minutes",
    "run.timeline",
    "train.log_every",
    "train.histograms_every",
    "train.checkpoint_every",
    "train.micro_batch",
    "distributed.timeout_minutes",
    "distributed.vocab_group",
    "loss.logit_memory_mb",
    "loss.elementwise",
    "loss.diagnostics_every",
    "student.activation_checkpointing",
)

MAY_CHANGE_SECTIONS = ("data.sources.", "checkpoint.", "resilience.")

TOKENIZER_FOLDER = "tokenizer"
"""Beside recipe.json: a run can be exported where its data is no longer at hand."""

STUDENT_FOLDER = "student"
"""And where the folder that `student.config` names is not: it holds that one's config.json."""

MAX_TOKENIZER_BYTES = 256 << 20


def describe(
    recipe: dict[str, Any], profile: dict[str, Any], *, started_from: dict[str, str] | None = None
) -> dict[str, Any]:
    """The content of recipe.json: the resolved recipe, the DeepSpeed settings in force, and the versions.

    And what `started_from` below says of the student's first weights, where a folder had them.
    """
    first = {} if started_from is None else {"started_from": started_from}
    return {"recipe": recipe, "deepspeed": profile, **first, "versions": versions()}


def has_saved(folder: Path) -> bool:
    """Whether a run goes on from a checkpoint, or not at all; it does not begin again."""
    return bool(checkpoint_folders(folder / "checkpoints"))


def started_from(folder: Path, weights: str | None) -> dict[str, str] | None:
    """Folder and fingerprint of the weights that a run's student started from; None where `run.seed` decided.

    A run that has saved knows from its recipe.json: it reads the weights no more, and they need not be there.
    """
    if weights is None:
        return None
    if not has_saved(folder):
        return {"weights": weights, "fingerprint": teacher_fingerprint(Path(weights))}
    try:
        kept = json.loads((folder / "recipe.json").read_text(encoding="utf-8")).get("started_from")
    except (OSError, ValueError, AttributeError):
        return None
    return kept if isinstance(kept, dict) else None


def refuse_other_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """A folder that another recipe wrote is refused with a list of what differs.

    Raises:
        UserError: it holds another recipe, or something that is no recipe.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.folder: {folder} is a file; name a folder")
    path = folder / "recipe.json"
    if not path.exists():
        return
    try:
        written = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): name another run.folder, or move this one away") from None
    refuse_renamed(written, source=str(path))
    with suppress(UserError):  # keys that are newer than the folder have their defaults
        written = validate_recipe(written, source=str(path)).snapshot()
    before, now = dotted(written), dotted(recipe)
    differing = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in MAY_CHANGE and not key.startswith(MAY_CHANGE_SECTIONS)
    ]
    if differing:
        raise UserError(
            f"{folder} belongs to another recipe: {'; '.join(differing)}. Name another run.folder, or undo the change"
        )


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Writes recipe.json whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".recipe.json.tmp"
    temporary.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "recipe.json")


def keep_tokenizer(folder: Path, data: Mixture) -> None:
    """Copies the tokenizer of the data into the run folder, once.

    Raises:
        UserError: the data has none, or it cannot be read.
    """
    target = folder / TOKENIZER_FOLDER
    if target.exists():
        return
    temporary = folder / f".{TOKENIZER_FOLDER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        with suppress(FileNotFoundError):
            (temporary / name).write_bytes(data.tokenizer_file(name, max_bytes=MAX_TOKENIZER_BYTES))
    main = data.tokenizer.file.rpartition("/")[2]
    if not (temporary / main).exists():
        raise UserError(f"data: {main}, the tokenizer of the shards, is not where their manifest says: restore it")
    temporary.rename(target)


def keep_student_config(folder: Path, section: StudentSection) -> None:
    """Copies the config.json that the recipe names into the run folder, once; one that is spelled out is there."""
    target = folder / STUDENT_FOLDER / "config.json"
    if not isinstance(section.config, str) or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_bytes((Path(section.config) / "config.json").read_bytes())
    temporary.rename(target)


def student_config_of(run: Path | None, section: StudentSection) -> dict[str, Any] | Path:
    """What the student of a run was built from: spelled out, or a folder, the run's own where it has one."""
    if not isinstance(section.config, str):
        return section.config
    kept = None if run is None else run / STUDENT_FOLDER
    return kept if kept is not None and (kept / "config.json").is_file() else Path(section.config)
