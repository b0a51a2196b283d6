"""Loading of a recipe: YAML with `extends:` (relative to the file that contains it) and `--set`, then validation."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from yaml import YAMLError

from megadistill.config.interpolation import refuse_expansion
from megadistill.config.mistakes import KeyPath, find_mistakes, flattened
from megadistill.config.paths import wrong_run_folder
from megadistill.config.recipe import Recipe, TeacherSection
from megadistill.config.yaml_file import first_line, read_yaml
from megadistill.errors import UserError, nearest_of, several
from megadistill.io import read_json
from megadistill.redaction import printable, refusal, url_secret
from megadistill.shipped import is_shipped

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
        UserError: names all mistakes, a line each: file and line or --set, key, value and the way out.
    """
    merged, places, mistakes = _read_with_parents(path, seen=())
    for override in overrides:
        try:
            key, value = _parsed(override)
            merged.merge_with(value)
            _refuse_resolvers(OmegaConf.to_container(merged, resolve=False), path)
            refuse_expansion(OmegaConf.to_container(merged, resolve=False), f"--set {printable(override)}")
        except UserError:
            raise
        except YAMLError:
            raise UserError(
                f"--set {printable(override)}: the value cannot be read as YAML: close its quotes and brackets, and "
                "quote all of it for the shell, as in --set 'run.timeline=[5, 6]'"
            ) from None
        except (OmegaConfBaseException, ValueError) as error:
            raise UserError(f"--set {printable(override)}: {printable(first_line(error))}") from None
        for length in range(1, len(key)):
            places.setdefault(key[:length], f"--set {override}")
        places |= {under: f"--set {override}" for under in _paths_below(key, value)}
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except InterpolationKeyError as error:
        reason = f"{first_line(error)} in the recipe (environment variables are not read)"
        raise UserError(f"{path}: {error.full_key}: {reason}") from None
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"{path}: {printable(first_line(error))}") from None
    values = _without_unknown(values)
    if _is_map_of_names(values):
        values["teachers"] = values.pop("teacher")
        places |= {("teachers", *key[1:]): place for key, place in places.items() if key[:1] == ("teacher",)}
    mistakes += [(_place(key, places), printable(text)) for key, text in _not_expanded(values)]
    mistakes += [(_place(key, places), text) for key, text in _secrets(values)]
    folder = dotted(values).get("run.folder")
    if isinstance(folder, str) and folder and (problem := wrong_run_folder(Path(folder))) is not None:
        mistakes.append((_place(("run", "folder"), places), f"run.folder: {printable(problem)}"))
    return validate_recipe(_with_warmup_of_the_run(values), source=str(path), places=places, before=mistakes)


def _without_unknown(values: Any) -> Any:
    """The values without those that a recipe leaves to the ones that extend it, `???`."""
    if not isinstance(values, dict):
        return values
    return {key: _without_unknown(value) for key, value in values.items() if value != "???"}


def _is_map_of_names(values: Any) -> bool:
    """Whether `teacher` has several teachers by name, which stand in `teachers` from here on."""
    teacher = values.get("teacher") if isinstance(values, dict) else None
    if not isinstance(teacher, dict) or not teacher or values.get("teachers"):
        return False
    by_name = all(isinstance(each, dict) for each in teacher.values())
    return by_name and not teacher.keys() & TeacherSection.model_fields.keys()


def _not_expanded(values: Any) -> Iterator[tuple[KeyPath, str]]:
    """The texts that a shell would expand, which would name folders such as `~`: the key, and its line."""
    for key, value in dotted(values).items():
        if isinstance(value, str) and value.startswith("~"):
            yield tuple(key.split(".")), f"{key}: ~ is not expanded here: write {Path(value).expanduser()}"
        elif isinstance(value, str) and re.search(r"\$[A-Za-z_]", value):
            solution = f'write the text itself, or let the shell do it, --set "{key}={value}"'
            yield tuple(key.split(".")), f"{key}: {value}: environment variables are not read: {solution}"


def _secrets(values: Any) -> Iterator[tuple[KeyPath, str]]:
    """The URLs with a secret, which recipe.json, every checkpoint and the pages on a run would keep: key, and line."""
    for key, value in dotted(values).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (secret := url_secret(text)) is not None:
                yield tuple(key.split(".")), f"{key}: {refusal(text, secret)}"


def _with_warmup_of_the_run(values: Any) -> Any:
    """Gives a recipe without `train.schedule.warmup_steps`, or `warmup_tokens`, the number in its run folder, if any.

    The default follows from the length: a longer run would change the rates of the steps that it has taken.
    """
    try:
        train = values["train"]
        schedule, unit = train.get("schedule", {}), "steps" if train.get("tokens") is None else "tokens"
        warmup = f"warmup_{unit}"
        if schedule.get(warmup) is not None:
            return values
        recorded = read_json(Path(values["run"]["folder"]) / "recipe.json")["recipe"]["train"]["schedule"]
        if recorded[warmup] + (schedule.get(f"decay_{unit}") or 0) > train[unit]:
            return values  # a much shorter run: refused, as another recipe
        schedule = {**schedule, warmup: recorded[warmup]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # no run yet, or no recipe: checked later
        return values
    return {**values, "train": {**values["train"], "schedule": schedule}}


def validate_recipe(
    values: Any, *, source: str, places: Mapping[KeyPath, str] | None = None, before: Sequence[tuple[str, str]] = ()
) -> Recipe:
    """A recipe from plain values, such as a YAML file's.

    Args:
        places: where the value of each key is from, as in `recipe.yaml, line 3`.
        before: mistakes (where, what) that are known already.

    Raises:
        UserError: all mistakes, a line each.
    """
    places = places or {}
    every = [*before, *((_place(path, places), printable(text)) for path, text in _renamed(values))]
    recipe = None
    if len(every) == len(before):  # under former names, much would be missing
        recipe, mistakes = find_mistakes(values)
        every += [(_place(each.path, places) if each.of_value else "", printable(each.text)) for each in mistakes]
    if every or recipe is None:
        raise several(source, sorted(every, key=_in_order_of_the_file))
    return recipe


def validate_recorded(values: Any, *, source: str) -> Recipe:
    """The recipe that a run has recorded in its folder or in a checkpoint, perhaps under an earlier release.

    Values that such a release has written are translated; in a recipe that somebody wrote they are refused.

    Raises:
        UserError: all mistakes, a line each.
    """
    student = values.get("student") if isinstance(values, Mapping) else None
    if isinstance(student, Mapping):
        former = student.get("activation_checkpointing")
        if isinstance(former, bool):
            student = {**student, "activation_checkpointing": "full" if former else "none"}
            values = {**values, "student": student}
    return validate_recipe(values, source=source)


def _place(path: KeyPath, places: Mapping[KeyPath, str]) -> str:
    """The file and line, or the --set, of a key or of the nearest that holds it; empty: not known."""
    return next((places[path[:length]] for length in range(len(path), 0, -1) if path[:length] in places), "")


def _in_order_of_the_file(mistake: tuple[str, str]) -> tuple[bool, bool, str, int]:
    """The sort key of a mistake: by file and line, then those of --set, then those without a place."""
    file, _, line = mistake[0].partition(", line ")
    number = re.match(r"\d+", line)
    return not file, file.startswith("--set "), file, int(number[0]) if number else 0


def _parsed(override: str) -> tuple[KeyPath, DictConfig]:
    """The key of `key=value`, and the value as a recipe that holds nothing else."""
    key, separator, _ = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(f"--set {override!r} is not of the form key=value, as in --set train.steps=100")
    return tuple(key.split(".")), OmegaConf.from_dotlist([override])


def _paths_below(key: KeyPath, value: DictConfig) -> list[KeyPath]:
    """The key of an override, and the keys of its value."""
    return [path for path in flattened(OmegaConf.to_container(value, resolve=False)) if path[: len(key)] == key]


def refuse_renamed(values: Any, *, source: str) -> None:
    """Refuses a recipe, given as plain values, that uses a former name of `RENAMED`.

    Raises:
        UserError: names the former key and the one that replaced it.
    """
    if renamed := list(_renamed(values)):
        raise several(source, [("", text) for _, text in renamed])


def _renamed(values: Any) -> Iterator[tuple[KeyPath, str]]:
    """The former names of a recipe: the key, and its line."""
    for key, value in dotted(values).items():
        parts = key.split(".")
        sections = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        former = next((each for each in (f"{key}={value}", *sections) if each in RENAMED), None)
        if former is not None:
            rest = "" if "=" in former else key.removeprefix(former)
            yield tuple(parts), f"{former}{rest} is now {RENAMED[former]}{rest}: use the new name"


def dotted(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings flattened, with keys as `--set` spells them: {"train": {"steps": 3}} -> {"train.steps": 3}."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, child in values.items():
        flat.update(dotted(child, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _read_with_parents(
    path: Path, seen: tuple[Path, ...]
) -> tuple[DictConfig, dict[KeyPath, str], list[tuple[str, str]]]:
    """The merged values, where each key is from, and mistakes (where, what) of the files."""
    resolved = Path(os.path.realpath(path))  # of a link to itself too, which reading refuses
    if resolved in seen:
        raise UserError(f"{path}: extends itself through {' -> '.join(p.name for p in (*seen, resolved))}")
    try:
        loaded, lines, mistakes = read_yaml(path)
    except (FileNotFoundError, NotADirectoryError):
        extended = f", which {seen[-1].name} extends" if seen else ""
        raise UserError(
            f"no recipe {path}{extended} (paths are relative to {Path.cwd()}){_instead_of_missing(path)}"
        ) from None
    except IsADirectoryError:
        raise UserError(_folder_for_recipe(path)) from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of sections, found a list")
    if path.suffix == ".json" and {"recipe", "versions"} <= set(loaded):
        raise UserError(f"{path} is the record of a run, not a recipe: name the YAML file that it was started with")
    _refuse_resolvers(OmegaConf.to_container(loaded, resolve=False), path)
    refuse_expansion(OmegaConf.to_container(loaded, resolve=False), str(path))
    places = {key: f"{path}, line {line}" for key, line in lines.items()}
    parent = loaded.pop("extends", None)
    if parent is None:
        return loaded, places, mistakes
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends must name one recipe file, found {parent!r}")
    base, places_of_base, mistakes_of_base = _read_with_parents(path.parent / parent, (*seen, resolved))
    merged = OmegaConf.merge(base, loaded)
    assert isinstance(merged, DictConfig)
    refuse_expansion(OmegaConf.to_container(merged, resolve=False), str(path))
    return merged, places_of_base | places, mistakes_of_base + mistakes


def _instead_of_missing(path: Path) -> str:
    """The rest of the message for a recipe that is not there: how to get it, or one beside it with a similar name."""
    if is_shipped(path):
        return "; `megadistill init .` writes the recipes of the package here"
    beside = {each.stem: each for each in sorted(path.parent.glob("*.y*ml"))}
    similar = nearest_of(path.stem, beside)
    return f"; did you mean {beside[similar]}?" if similar else ""


def _folder_for_recipe(folder: Path) -> str:
    """The message for a folder that stands where a recipe is needed."""
    recipes = sorted(each.name for each in folder.glob("*.y*ml"))
    if recipes:
        return f"{folder} is a folder: name one of its recipes, {', '.join(recipes)}"
    if (folder / "recipe.json").is_file():
        return f"{folder} is a run folder, not a recipe: name the YAML file that it was started with"
    return f"{folder} is a folder without a recipe: name a YAML file"


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
