"""`prune` as a whole: what it writes, that it writes the same again, and what it refuses before it reads a weight."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megadistill.cli.main import run_command
from megadistill.data import Manifest, Mixture
from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.prune import prune as module
from megadistill.prune.prune import PruneReport, prune
from tests.corpora import VOCAB as IDS
from tests.corpora import small_data_set

ROWS, SEQUENCE = 304, 32


def _silent(stage: str, **numbers: int | None) -> None:
    pass


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer/ and train/. Not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    return small_data_set(folder, sequence_length=SEQUENCE, heldout_fraction=0)


@pytest.fixture(scope="module")
def teacher(data_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in bfloat16, with padding rows."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = {
        "model_type": "llama",
        "vocab_size": ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    model = AutoModelForCausalLM.from_config(load_config(config, what="test"))
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in (data_set / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


def _prune(teacher: Path, data_set: Path, output: Path, **options: Any) -> PruneReport:
    return prune(
        teacher,
        Mixture.of(Manifest.load(data_set / "train" / "manifest.json")),
        output,
        device=torch.device("cpu"),
        progress=_silent,
        **{"sequences": 6, "batch": 4, **options},
    )


def test_the_folder_is_a_model_and_says_where_it_comes_from(teacher: Path, data_set: Path, tmp_path: Path) -> None:
    report = _prune(teacher, data_set, tmp_path / "pruned", hidden_size=20, intermediate_size=30, heads=2, layers=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert model.lm_head.weight.shape == (IDS, 20)
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned").vocab_size == IDS
    record = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert record["teacher"] == {"name": teacher.name, "fingerprint": teacher_fingerprint(teacher)}
    assert record["calibration"]["sequences"] == 6
    assert record["sizes"] == {"hidden_size": 20, "intermediate_size": 30, "heads": 2, "layers": 2}
    indices = record["kept"]
    whole = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    first = whole.get_parameter(f"model.layers.{indices['layers'][0]}.mlp.up_proj.weight")
    expected = first[indices["neurons"][0]][:, indices["hidden"]]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)
    assert str(data_set) not in json.dumps(record), "a path of this machine"


def test_the_same_again_and_in_other_batches(teacher: Path, data_set: Path, tmp_path: Path) -> None:
    for name, batch in (("one", 4), ("again", 4), ("singly", 1)):
        _prune(teacher, data_set, tmp_path / name / "pruned", hidden_size=20, layers=2, batch=batch)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one" / "pruned").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again" / "pruned").iterdir()}
    records = [json.loads((tmp_path / name / "pruned" / "pruning.json").read_text()) for name in ("one", "singly")]
    assert records[0]["kept"] == records[1]["kept"]


def _changed(teacher: Path, folder: Path, **keys: Any) -> Path:
    shutil.copytree(teacher, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **keys}))
    return folder


def _other_tokenizer(teacher: Path, folder: Path) -> Path:
    shutil.copytree(teacher, folder)
    (folder / "tokenizer.model").unlink()
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    values["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (None, {}, ["nothing to prune"]),
        (None, {"hidden_size": 40}, ["--hidden-size 40", "32"]),
        (None, {"layers": 2, "sequences": 0}, ["--sequences 0"]),
        (None, {"layers": 2, "batch": 0}, ["--batch 0"]),
        (_other_tokenizer, {"layers": 2}, ["tokenizer", "not that of the data"]),
        (lambda teacher, to: _changed(teacher, to, max_position_embeddings=16), {"layers": 2}, ["16", "32 tokens"]),
        (lambda teacher, to: _changed(teacher, to, vocab_size=299), {"layers": 2}, ["299 rows", "300"]),
        (lambda teacher, to: _changed(teacher, to, model_type="gpt2"), {"layers": 2}, ["gpt2"]),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(
    teacher: Path,
    data_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    options: dict[str, Any],
    says: list[str],
) -> None:
    monkeypatch.delattr(module, "load_pretrained")
    given = change(teacher, tmp_path / "changed") if change else teacher
    with pytest.raises(UserError) as caught:
        _prune(given, data_set, tmp_path / "out" / "pruned", **options)
    assert "\n" not in str(caught.value)
    for part in says:
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_command(teacher: Path, data_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = str(data_set / "train" / "manifest.json")
    command = ["prune", str(teacher), "--data", manifest, "--output", str(tmp_path / "pruned"), "--layers", "2"]
    assert run_command([*command, "--sequences", "4"]) == 0
    text = capsys.readouterr().out
    for part in ("parameters", "hidden size", "without layers", "4 sequences"):
        assert part in text
    assert run_command(command) == 2
    assert "exists already" in capsys.readouterr().err
