"""Loading of a recipe: YAML with `extends:` (relative to the file that contains it) and `--set`, then validation."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from megadistill.config.recipe import Recipe, Section, sections_in
from megadistill.errors import UserError, nearest
from megadistill.io import read_json

MAX_RECIPE_BYTES = 1 << 20

RENAMED = {
    "comm": "distributed",
    "faults": "resilience",
    "faults.stall_seconds": "resilience.step_timeout_seconds",
    "run.minutes": "run.time_limit_minutes",
    "data.stages": "data.curriculum",
    "data.on_fault": "data.on_corrupt_sample",
    "data.on_fault=quarantine": "data.on_corrupt_sample=mask",
    "data.on_corrupt_sample=quarantine": "data.on_corrupt_sample=mask",
    "data.max_holes_per_million": "data.max_masked_per_million",
    "teacher.source=cache": "teacher.source=stored",
    "teacher.keep_targets": "teacher.save_targets",
    "teacher.wire": "teacher.transfer_dtype",
    "teacher.wire=whole": "teacher.transfer_dtype=native",
    "teacher.transfer_dtype=whole": "teacher.transfer_dtype=native",
    "loss.diagnose_every": "loss.diagnostics_every",
    "loss.targets.mass": "loss.targets.p",
    "train.clip": "train.max_grad_norm",
    "train.adamw": "train.optimizer",
}
"""Former name of a section, a key, or a key's value (`key=value`) -> its name now, as `--set` spells them."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe file, merged over the files that it extends, with `key=value` overrides on top.

    Raises:
        UserError: one line that names the key, the value and the way out.
    """
    merged = _read_with_parents(path, seen=())
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UserError(f"--set {override!r} is not of the form key=value, as in --set train.steps=100")
        refuse_renamed({key: value}, source=f"--set {override}")
    try:
        merged.merge_with(OmegaConf.from_dotlist(list(overrides)))
        _refuse_resolvers(OmegaConf.to_container(merged, resolve=False), path)
        values = OmegaConf.to_container(merged, resolve=True)
    except UserError:
        raise
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    return validate_recipe(_with_warmup_of_the_run(values), source=str(path))


def _with_warmup_of_the_run(values: Any) -> Any:
    """Gives a recipe without `train.schedule.warmup_steps` the number in its run folder, if it has one.

    The default follows from `train.steps`: a longer run would change the rates of the steps that it has taken.
    """
    try:
        schedule = values["train"].get("schedule", {})
        if schedule.get("warmup_steps") is not None:
            return values
        recorded = read_json(Path(values["run"]["folder"]) / "recipe.json")["recipe"]["train"]["schedule"]
        schedule = {**schedule, "warmup_steps": recorded["warmup_steps"]}
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ):  # no recipe, or no run yet: both are checked later
        return values
    return {**values, "train": {**values["train"], "schedule": schedule}}


def validate_recipe(values: Any, *, source: str) -> Recipe:
    """A recipe from plain values (a YAML file's, or a run folder's recipe.json).

    Raises:
        UserError: the first problem, as one line.
    """
    refuse_renamed(values, source=source)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from None


def refuse_renamed(values: Any, *, source: str) -> None:
    """Refuses a recipe, given as plain values, that uses a former name of `RENAMED`.

    Raises:
        UserError: names the former key and the one that replaced it.
    """
    for key, value in dotted(values).items():
        parts = key.split(".")
        sections = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        for former in (f"{key}={value}", *sections):
            if former in RENAMED:
                rest = "" if "=" in former else key.removeprefix(former)
                raise UserError(f"{source}: {former}{rest} is now {RENAMED[former]}{rest}: use the new name")


def dotted(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings flattened, with keys as `--set` spells them: {"train": {"steps": 3}} -> {"train.steps": 3}."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, child in values.items():
        flat.update(dotted(child, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in (*seen, resolved))}")
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes is no recipe (at most {MAX_RECIPE_BYTES})")
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"no recipe {path} (paths are relative to {Path.cwd()})") from None
    except (OSError, YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read as YAML: {_first_line(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of sections, found a {type(loaded).__name__}")
    _refuse_resolvers(OmegaConf.to_container(loaded, resolve=False), path)
    parent = loaded.pop("extends", None)
    if parent is None:
        return loaded
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends must name one recipe file, found {parent!r}")
    base = _read_with_parents(path.parent / parent, (*seen, resolved))
    merged = OmegaConf.merge(base, loaded)
    assert isinstance(merged, DictConfig)
    return merged


def _refuse_resolvers(value: Any, path: Path) -> None:
    """`${a.b}` copies a value of the recipe; `${oc.env:X}` would let a recipe read secrets into the run folder."""
    if isinstance(value, dict):
        for child in value.values():
            _refuse_resolvers(child, path)
    elif isinstance(value, list):
        for child in value:
            _refuse_resolvers(child, path)
    elif isinstance(value, str) and re.search(r"\$\{.*:", value, flags=re.DOTALL):  # nested ones too
        raise UserError(
            f"{path}: {value!r} calls a resolver; a recipe may only refer to its own keys, as in ${{run.seed}}"
        )


def _explain(error: ValidationError) -> str:
    """The first problem as `key: reason, value, way out`, and the number of the others."""
    first = error.errors()[0]
    path, siblings = _locate(first["loc"])
    key = ".".join(path)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{key}: no such key{nearest(path[-1], siblings)}{more}"
    if first["type"] == "missing":
        return f"{key}: is required{more}"
    if first["type"] == "union_tag_invalid":
        tag = first["ctx"]["discriminator"].strip("'")
        return f"{key}.{tag}: input should be {first['ctx']['expected_tags']}, found {first['ctx']['tag']!r}{more}"
    if first["type"] == "value_error":
        message = str(first["msg"]).removeprefix("Value error, ")
        return f"{key}: {message}{more}" if key else f"{message}{more}"
    return f"{key}: {first['msg'].lower()}, found {first['input']!r}{more}"


def _locate(location: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """The key path of pydantic's location, without the kind of a union's member, and the keys beside its last part."""
    sections: list[type[Section]] = [Recipe]
    path, siblings = [], list(Recipe.model_fields)
    for part in map(str, location):
        of_kind = [
            each for each in sections if "kind" in each.model_fields and each.model_fields["kind"].default == part
        ]
        if of_kind:
            sections = of_kind
            continue
        path.append(part)
        siblings = [key for section in sections for key in section.model_fields]
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [inner for field in fields for inner in sections_in(field.annotation)] or sections
    return path, siblings


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
