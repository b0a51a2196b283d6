"""A run takes no folder of something else, and says so before anything is written.

A folder is a line of run_folders.yaml.
"""

from pathlib import Path

import pytest
import yaml

from megadistill.cli.main import run_command
from megadistill.config.load import load_recipe
from megadistill.config.paths import wrong_run_folder
from megadistill.errors import UserError
from tests.paths import RECIPES

FOLDERS = yaml.safe_load(Path(__file__).with_name("run_folders.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home, here = tmp_path / "home", tmp_path / "here"
    for file in (
        "project/.git/HEAD",
        "model/config.json",
        "data/mine/train/manifest.json",
        "runs/x/recipe.json",
        "file",
    ):
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).write_text("{}")
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize(("folder", "word"), FOLDERS)
def test_a_folder_of_something_else_is_refused(folder: str, word: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    folder = folder.format(tmp=place, home=place.parent / "home")
    with pytest.raises(UserError, match=r"run\.folder: ") as caught:
        load_recipe(RECIPES / "smoke.yaml", [f"run.folder={folder!r}" if "\0" not in folder else 'run.folder="a\\0b"'])
    assert word in str(caught.value)
    assert "name" in str(caught.value)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "folder", ["runs/new", "runs/x", "new", "/scratch/me/runs/x", "/dev/shm/run", "/tmp/run", "/data"]
)
def test_a_folder_of_its_own_is_taken(folder: str, place: Path) -> None:
    assert wrong_run_folder(Path(folder)) is None


def test_a_command_refuses_it_in_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", str(RECIPES / "smoke.yaml"), "--set", "run.folder=/"]) == 2
    assert capsys.readouterr().err == (
        "megadistill: --set run.folder=/: run.folder: / is a folder of the system: name a folder that the run makes, "
        "such as runs/mine\n"
    )
