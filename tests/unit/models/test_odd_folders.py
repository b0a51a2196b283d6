"""Odd folders of a model (odd_folders.yaml): every reader gives the logits of transformers, or every reader refuses."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from megadistill.distributed.vocab import VocabSlice
from megadistill.errors import UserError
from megadistill.models.families import load_config, logit_transform, parameter_shapes
from megadistill.models.hf_folder import INDEX_FILE, SINGLE_FILE
from megadistill.models.initial_weights import InitialWeights
from megadistill.models.weights import check_weights, load_pretrained
from megadistill.teacher.stage import TeacherStage, head_rows
from tests.unit.models.cases import VOCAB, saved_model

ENTRIES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "odd_folders.yaml").read_text())
CPU = torch.device("cpu")
DROPPED = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation",
           "auto_map", "attribute_map", "base_model_tp_plan", "base_model_pp_plan", "output_attentions",
           "return_dict", "num_labels")  # fmt: skip
"""Keys that transformers would follow: it reads the folder without them, to say what the weights are."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by model, written when an entry first needs them. Not to be written to."""
    return {"": tmp_path_factory.mktemp("models")}


def _folder(saved: dict[str, Path], model: str) -> Path:
    if model not in saved:
        saved[model] = saved[""] / model
        saved_model(model, saved[model])
    return saved[model]


def _write(folder: Path, source: Path, entry: dict[str, Any]) -> None:
    """The folder of an entry, from the whole one of its model."""
    changes = entry.get("do", {})
    config = json.loads((source / "config.json").read_text())
    for key, value in changes.get("config", {}).items():
        config = {name: each for name, each in config.items() if name != key}
        if value is not None:
            config[key] = value
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / SINGLE_FILE)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    for pattern, change in changes.get("tensors", {}).items():
        tensors = _changed(tensors, pattern, change)
    for name, shape in changes.get("new", {}).items():
        tensors[name] = torch.full(shape, 3.0)
    weight_map = _save(folder, tensors, entry.get("shards", 1))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    for name, file in changes.get("index", {}).items():
        place = index if name in index else weight_map
        place.pop(name) if file is None else place.update({name: file})
    if entry.get("shards", 1) > 1:
        (folder / INDEX_FILE).write_text(json.dumps(index))
    for name, content in changes.get("files", {}).items():
        (folder / name).unlink(missing_ok=True) if content != "also the first" else None
        _write_file(folder / name, content, tensors, other)
    if changes.get("links"):
        _link(folder)


def _changed(tensors: dict[str, Tensor], pattern: str, change: Any) -> dict[str, Tensor]:
    """The tensors after a change of those whose name `pattern` finds."""
    changed = dict(tensors)
    for name in [each for each in tensors if re.search(pattern, each)]:
        if change == "remove":
            del changed[name]
            continue
        if "cast" in change:
            changed[name] = changed[name].to(getattr(torch, change["cast"]))
        if "add" in change:
            changed[name] = changed[name] + change["add"]
        if "shape" in change:
            changed[name] = torch.ones(change["shape"])
        if "copy" in change:
            changed[change["copy"]] = changed[name].clone()
        if "rename" in change:
            changed[re.sub(pattern, change["rename"], name)] = changed.pop(name)
    return changed


def _save(folder: Path, tensors: dict[str, Tensor], shards: int) -> dict[str, Any]:
    """Writes the tensors into so many files; tensor -> its file."""
    names = sorted(tensors)
    weight_map: dict[str, Any] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else SINGLE_FILE
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    return weight_map


def _write_file(path: Path, content: str, tensors: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    match content:
        case "nothing":
            pass
        case "other weights" | "same weights":
            save_file(other if content == "other weights" else tensors, path, metadata={"format": "pt"})
        case "index of the same weights":
            path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SINGLE_FILE)}))
        case "also the first":
            first = sorted(tensors)[0]
            save_file({**load_file(path), first: other[first]}, path, metadata={"format": "pt"})
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "broken link":
            path.symlink_to("nowhere")
        case _:
            path.write_text(content)


def _link(folder: Path) -> None:
    """Makes links of the files, to files in another folder, as in the cache of huggingface_hub."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))


def _transformers(folder: Path, tokens: Tensor, place: Path) -> Tensor:
    """The logits of transformers' own reading of a copy at `place`."""
    shutil.copytree(folder, place)
    keys = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({key: keys[key] for key in keys if key not in DROPPED}))
    if (place / INDEX_FILE).is_file():  # it cannot read one without metadata, which it has no use for
        index = json.loads((place / INDEX_FILE).read_text())
        (place / INDEX_FILE).write_text(json.dumps({"metadata": {}, **index}))
    attention = "eager" if keys["model_type"] == "gemma2" else "sdpa"
    model, info = AutoModelForCausalLM.from_pretrained(
        place, dtype=torch.float32, attn_implementation=attention, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens).logits
    return logits


def _by_stages(folder: Path, config: PretrainedConfig, tokens: Tensor) -> Tensor:
    """Logits of a run's teacher: two stages, and the head by rows."""
    x = tokens
    with torch.no_grad():
        for stage in range(2):
            x = TeacherStage.load(folder, stage=stage, stages=2, dtype=torch.float32, device=CPU)(x)
        vocab = VocabSlice.contiguous(0, VOCAB, size=VOCAB)
        products = x @ head_rows(folder, vocab, dtype=torch.float32, device=CPU).T
    transform = logit_transform(config)
    logits = products * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry["name"]))
def test_every_reader_gives_the_logits_of_transformers_or_refuses(
    entry: dict[str, Any], saved: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    _write(folder, _folder(saved, entry.get("model", "llama")), entry)
    if entry["is"] != "read":
        with pytest.raises(UserError, match=re.escape(entry["is"])) as error:
            check_weights(folder, load_config(folder, what="test"))
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=re.escape(entry["is"])):
            load_pretrained(folder, what="test", device=CPU)
        return
    config = load_config(folder, what="test")
    check_weights(folder, config)
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (1, 20))
    truth = _transformers(folder, tokens, tmp_path / "copy")
    model = load_pretrained(folder, what="test", device=CPU, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, truth)
    torch.testing.assert_close(_by_stages(folder, config, tokens), truth, rtol=1e-5, atol=1e-5)
    start = InitialWeights(folder, config, vocab_size=VOCAB)
    for name, shape in parameter_shapes(config).items():
        assert torch.equal(start.read(name, shape, 0, shape.numel()), model.get_parameter(name).flatten()), name
