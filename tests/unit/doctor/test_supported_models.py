"""The list of supported models is the table of families; docs/models.md is up to date; a folder is described."""

import json
import re
from pathlib import Path

import pytest

from megadistill.cli.main import run_command
from megadistill.doctor.supported_models import PUBLISHED, attention_kinds, markdown
from megadistill.models.families import FAMILIES
from tests.documented import commands
from tests.paths import ROOT
from tests.unit.models.cases import saved_model

PAGE = ROOT / "docs" / "models.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "renew it: megadistill models --markdown > docs/models.md"


def test_every_family_has_the_names_of_its_models() -> None:
    assert set(FAMILIES) <= set(PUBLISHED)


def test_a_model_is_started_from_within_five_commands() -> None:
    """Each of which is run: by the test of the quickstart, or with those of the other pages."""
    beginning = [command.line.split()[:2] for command in commands(PAGE)]
    assert 1 <= len(beginning) <= 5
    assert ["megadistill", "models"] in beginning


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", "full"),
        ("mistral", "full, windows"),
        ("gemma2", "full, windows, softcapped scores"),
        ("gemma3_text", "full, windows"),
        ("mixtral", "full, windows"),
        ("smollm3", "full, windows, no rope on some layers"),
    ],
)
def test_kinds_of_attention_are_those_of_the_family(family: str, kinds: str) -> None:
    assert attention_kinds(family) == kinds


def test_the_families_in_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_command(["models"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert set(FAMILIES) <= set(re.findall(r"\w+", out))


def test_a_folder_is_described_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    model = saved_model("mixtral", folder)
    assert run_command(["models", str(folder)]) == 0
    out = capsys.readouterr().out
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{total / 1000:.0f}k" in out
    assert "mixtral" in out
    assert "no: experts" in out
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 104}), encoding="utf-8")
    assert run_command(["models", str(folder)]) == 2
    assert "but its config.json says" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "jamba"}), encoding="utf-8")
    assert run_command(["models", str(folder)]) == 2
    assert "model_type is 'jamba'; supported are " in capsys.readouterr().err
