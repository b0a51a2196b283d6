"""Pictures of a page, of one size whatever the page; and what is missing where none can be taken."""

import shutil
from pathlib import Path

import numpy as np
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


def test_a_short_line_of_a_run_keeps_its_colour(tmp_path: Path) -> None:
    """Among thousands of shades that are each more frequent."""
    green = (0, 0x9E, 0x73)
    pixels = np.full((900, 585, 3), 255, np.uint8)
    pixels[:600] = (np.arange(600) * 255 // 600)[:, None, None]
    shades, rows = np.arange(585) * 120 // 585, np.arange(0, 600, 2)
    pixels[:600:2, :, 0] = shades
    pixels[:600:2, :, 1] = 60 + (rows // 4 % 120)[:, None]
    pixels[:600:2, :, 2] = 130 + shades
    pixels[700:704, 100:142] = green
    picture = tmp_path / "picture.png"
    Image.fromarray(pixels).save(picture)
    pictures.reduce_colours(picture)
    with Image.open(picture) as reduced:
        drawn = np.asarray(reduced.convert("RGB"))[702, 120].astype(int)
    assert np.abs(drawn - green).max() < 8, drawn
