"""Paths of the wrong kind: what stands there, and the command or the path that gives what is needed."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from megadistill.outputs import is_file_name
from megadistill.redaction import printable
from megadistill.shipped import is_shipped

PathKind = Literal["model", "tokenizer", "manifest", "run"]
"""Hugging Face folder; tokenizer; manifest.json of token shards; run folder."""

_HUB_NAME = re.compile(
    r"(?:hf://|https://huggingface\.co/)?(?:models/)?([\w][\w.-]*/[\w][\w.-]*)(?:/(?:tree|blob|resolve)/.*)?/?"
)
_OWN_FOLDERS = ("models", "data", "runs", "recipes")
_TEXT = (".txt", ".jsonl", ".parquet", ".gz", ".zst", ".md", ".py", ".csv")
_MAX_NAMES = 4


def wrong_path(path: Path | str, kind: PathKind) -> str | None:
    """One line on a path at which there is not the `kind` that is needed; None: nothing is known about it.

    It does not begin with the path's key or option, which the caller knows.
    """
    text = printable(str(path))
    path = Path(path)
    try:
        reason = _of_nothing(str(path), kind) if not path.exists() else _of_path(path, kind)
    except (OSError, ValueError):  # no permission, or no path at all
        return None
    return None if reason is None else f"{text} {printable(reason)}"


_SYSTEM_FOLDERS = (
    "bin", "boot", "dev", "etc", "lib", "lib64", "opt", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "var",
)  # fmt: skip
_NEVER = ("boot", "dev", "etc", "proc", "sys")
"""Folders below / that belong to the system, and those that do so with all that is in them (/dev/shm apart)."""


def wrong_run_folder(path: Path) -> str | None:
    """One line on a folder that must not become a run's: it is something else's. None: it may."""
    if not is_file_name(path):
        return f"{path}: no folder of a run has such a name: it has a NUL byte or is not UTF-8"
    if path.exists() and not path.is_dir():
        return f"{path} is a file: name another path, at which the run makes its folder"
    folder, here = path.resolve(), Path.cwd()
    if folder.is_relative_to("/dev/shm"):
        return None
    reason = None
    if len(folder.parts) == 1 or folder.parts[1] in (_SYSTEM_FOLDERS if len(folder.parts) == 2 else _NEVER):
        reason = "is a folder of the system"
    elif folder == Path.home().resolve():
        reason = "is your home"
    elif folder == here or folder in here.parents:
        reason = "is the current folder, or holds it"
    elif (folder / ".git").exists() or (folder / "pyproject.toml").is_file():
        reason = "is the root of a project"
    elif not _is_run(folder) and (folder / "config.json").is_file():
        reason = "is a model"
    elif any((folder / each).is_file() for each in ("manifest.json", "train/manifest.json")):
        reason = "holds token shards"
    return None if reason is None else f"{path} {reason}: name a folder that the run makes, such as runs/mine"


def not_model(path: Path | str, what: str) -> str:
    """The message for a path that is no Hugging Face folder; `what` is its key, its option, or the path itself."""
    place = f" (paths are relative to {Path.cwd()})"
    missing = "does not exist" + place if not Path(path).exists() else "has no config.json"
    is_free = not Path(path).exists() or (Path(path).is_dir() and not any(Path(path).iterdir()))
    folder = shlex.quote(printable(str(path))) if is_free else "models/MODEL"
    download = f"`hf download ORG/MODEL --local-dir {folder}`"
    source = f"name a Hugging Face model folder ({download})"
    if is_shipped(Path(path)):
        source = "`megadistill init .` writes it here, with all recipes"
    reason = wrong_path(path, "model") or f"{printable(str(path))} {missing}: {source}"
    return reason if what == str(path) else f"{what}: {reason}"


def _of_nothing(path: str, kind: PathKind) -> str | None:
    """A path that does not exist may be a name on the hub."""
    name = _HUB_NAME.fullmatch(path.replace("hf:/", "hf://").replace("https:/h", "https://h").replace("///", "//"))
    if name is None or name[1].split("/")[0] in _OWN_FOLDERS or kind == "run" or path.endswith((".json", ".yaml")):
        return None
    hub, folder = name[1], name[1].split("/")[1]
    where = f"is not a folder here (paths are relative to {Path.cwd()})"
    if kind == "manifest":
        return (
            f"{where}. A data set of the Hugging Face hub: `hf download {hub} --repo-type dataset --local-dir "
            f"text/{folder}`, then `megadistill tokenize text/{folder} --tokenizer TEACHER --sequence-length 2048 "
            f"--output data/{folder}`, and write data/{folder}/train/manifest.json"
        )
    if (Path("models") / folder).is_dir():
        return f"{where}, but models/{folder} is: write models/{folder}"
    return (
        f"{where}. A model of the Hugging Face hub: `hf download {hub} --local-dir models/{folder}`, then write "
        f"models/{folder}"
    )


def _of_path(path: Path, kind: PathKind) -> str | None:
    if path.is_file():
        return _of_file(path, kind)
    if kind == "run":
        return _instead_of_run(path)
    if kind == "manifest":
        return _instead_of_manifest(path)
    return _instead_of_model(path, kind)


def _of_file(path: Path, kind: PathKind) -> str | None:
    name, folder = path.name, path.parent
    if kind in ("model", "tokenizer") and path.suffix == ".gguf":
        return _GGUF
    if kind == "model":
        if name == "manifest.json":
            return "is the manifest of data, not a model: name a Hugging Face model folder"
        if (folder / "config.json").is_file():
            return f"is a file of a model: name its folder, {folder}"
        return "is a file: name a Hugging Face model folder (config.json, safetensors, tokenizer)"
    if kind == "run":
        if (folder / "recipe.json").is_file():
            return f"is a file of a run: name its folder, {folder}"
        recipe = path.suffix in (".yaml", ".yml")
        return f"is a {'recipe' if recipe else 'file'}: name a run folder{' (its run.folder)' if recipe else ''}"
    if kind == "manifest" and path.suffix in _TEXT:
        return f"is text, not token shards: {_tokenize(path)}"
    return None


_GGUF = (
    "is a GGUF file: name a Hugging Face folder with safetensors (`hf download ORG/MODEL --local-dir models/MODEL`), "
    "or convert it with megadistill.models.gguf.convert_gguf"
)


def _instead_of_model(path: Path, kind: PathKind) -> str | None:
    if kind == "model" and (path / "config.json").is_file():
        return None
    if path.resolve().name == "checkpoints" and _is_run(path.resolve().parent):
        path, name = path.parent, f"models/{path.resolve().parent.name}"
        return f"is a part of a run: `megadistill export {shlex.quote(str(path))} --output {name}`, then write {name}"
    if _is_run(path) or _is_checkpoint(path):
        source, name = "run folder" if _is_run(path) else "checkpoint of a run", f"models/{path.resolve().name}"
        return f"is a {source}: `megadistill export {shlex.quote(str(path))} --output {name}`, then write {name}"
    if (path / "adapter_config.json").is_file():
        return (
            "is an adapter, not a whole model: merge it into its base (peft: merge_and_unload, save_pretrained), and "
            "name the folder of the result"
        )
    if any(path.glob("*.gguf")):
        return f"holds {next(path.glob('*.gguf')).name}, which {_GGUF}"
    if kind == "model" and _manifests(path):
        return "holds token shards, not a model: name a Hugging Face model folder"
    snapshots = sorted(each.parent for each in path.glob("snapshots/*/config.json"))
    inner = snapshots or sorted(each.parent for each in path.glob("*/config.json"))
    if inner:
        return f"is not a model, but holds some: name {_listed(inner)}"
    return None


def _instead_of_manifest(path: Path) -> str | None:
    if _is_run(path) or _is_checkpoint(path):
        return "is of a run, not token shards: name the manifest.json that `megadistill tokenize` wrote"
    if manifests := _manifests(path):
        return f"is a folder: name {_listed(manifests)}"
    if (path / "config.json").is_file():
        return "is a model, not token shards: name the manifest.json that `megadistill tokenize` wrote"
    if any(each.suffix in _TEXT for each in path.iterdir()):
        return f"holds text, not token shards: {_tokenize(path)}"
    return None


def _instead_of_run(path: Path) -> str | None:
    if _is_checkpoint(path):
        return f"is a checkpoint: name its run folder, {path.parent.parent}"
    if (path / "config.json").is_file():
        return "is a Hugging Face folder, such as an export: name the run folder that it was exported from"
    if path.name == "checkpoints" and _is_run(path.parent):
        return f"is a part of a run: name its folder, {path.parent}"
    if inner := sorted(each for each in path.iterdir() if each.is_dir() and _is_run(each)):
        return f"is not a run folder, but holds some: name {_listed(inner)}"
    if _manifests(path):
        return "holds token shards: name a run folder (run.folder of a recipe)"
    return None


def _is_run(path: Path) -> bool:
    return (path / "recipe.json").is_file() and not (path / "config.json").is_file()


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, in its run or moved away: its manifest lists safetensors, one of data tars."""
    there = path.resolve().parent.name == "checkpoints" or any(path.glob("*.safetensors"))
    return there and (path / "manifest.json").is_file()


def _manifests(path: Path) -> list[Path]:
    """The manifests of data in a folder, and in the splits below."""
    manifests = [path / "manifest.json", *sorted(path.glob("*/manifest.json"))]
    return [each for each in manifests if each.is_file() and not _is_checkpoint(each.parent)]


def _tokenize(path: Path) -> str:
    output = f"data/{path.stem if path.is_file() else path.resolve().name}"
    options = f"--tokenizer TEACHER --sequence-length 2048 --output {output}"
    return f"`megadistill tokenize {shlex.quote(str(path))} {options}`, then write {output}/train/manifest.json"


def _listed(paths: Iterable[Path]) -> str:
    names = [str(path) for path in paths]
    return " or ".join(names[:_MAX_NAMES]) + (" or another" if len(names) > _MAX_NAMES else "")
