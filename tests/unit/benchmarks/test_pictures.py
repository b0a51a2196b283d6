"""Pictures of a page, of one size whatever the page; and what is missing where none can be taken."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import pictures
from megadistill.errors import UserError


def test_a_missing_page_names_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: `make smoke` writes it"):
        pictures.main(tmp_path, tmp_path)


def test_a_missing_browser_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("<p>a page</p>")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no chromium on this machine: `apt-get install chromium` brings one"):
        pictures.main(tmp_path, tmp_path)


@pytest.mark.skipif(pictures.chromium() is None, reason="no browser: `apt-get install chromium` brings one")
def test_the_pictures_have_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>a page</p>" * 500)
    pictures.photograph_report(tmp_path / "report.html", tmp_path)
    sizes = {name: Image.open(tmp_path / name).size for name in ("report.png", "report-phone.png")}
    scale = pictures.SCALE
    assert sizes == {
        "report.png": (pictures.WIDTH * scale, pictures.HEIGHT * scale),
        "report-phone.png": (pictures.PHONE_WIDTH * scale, pictures.PHONE_HEIGHT * scale),
    }
