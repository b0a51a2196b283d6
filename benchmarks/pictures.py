"""The pictures of docs/images, taken again from what the commands make: `make pictures`, after `make smoke`."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from megadistill.errors import UserError
from megadistill.evaluate.evaluation import read_evaluations
from megadistill.report.sections.evaluation_section import write_plots

if TYPE_CHECKING:
    from playwright.sync_api import Browser

IMAGES = Path("docs/images")
WIDTH, HEIGHT, SCALE = 1280, 1190, 1.5
"""Size of the window whose content is the picture of a report, in CSS pixels, and pixels of the picture for each."""
PHONE_WIDTH, PHONE_HEIGHT = 390, 1190
TENSORBOARD_WIDTH, TENSORBOARD_HEIGHT = 1080, 1190
COLOURS = 256


def chromium() -> str | None:
    """Path of a Chromium of this machine."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def browser() -> Iterator["Browser"]:
    """A Chromium without a window.

    Raises:
        UserError: what is missing, and what brings it.
    """
    path = chromium()
    if path is None:
        raise UserError("no chromium on this machine: `apt-get install chromium` brings one")
    if find_spec("playwright") is None:
        raise UserError("no playwright: `pip install -e .[dev]` brings it")
    from playwright.sync_api import sync_playwright  # noqa: PLC0415  of the extra `dev`

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def photograph_report(page: Path, images: Path) -> None:
    """Writes the upper part of a report, on a screen and on a phone, as PNGs into the folder `images`.

    Raises:
        UserError: there is no such page.
    """
    if not page.is_file():
        raise UserError(f"{page} does not exist: `make smoke` writes it")
    sizes = {"report.png": (WIDTH, HEIGHT), "report-phone.png": (PHONE_WIDTH, PHONE_HEIGHT)}
    with browser() as started:
        for name, (width, height) in sizes.items():
            opened = started.new_page(viewport={"width": width, "height": height}, device_scale_factor=SCALE)
            opened.goto(page.resolve().as_uri())
            opened.screenshot(path=images / name)
            reduce_colours(images / name)


def reduce_colours(picture: Path) -> None:
    """Saves a PNG with a palette that covers every colour: one by frequency gives a run's short line another's."""
    with Image.open(picture) as image:
        image.convert("RGB").quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE).save(picture, optimize=True)


def photograph_tensorboard(logdir: Path, picture: Path) -> None:
    """Writes the first charts of TensorBoard's page "Custom Scalars" for the runs in `logdir` as a PNG.

    Raises:
        UserError: there is no such folder, or its runs have no chart there.
    """
    if not logdir.is_dir():
        raise UserError(f"{logdir} does not exist: `make smoke` writes it")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir.name, "--port", str(port)]
    server = subprocess.Popen([*command, "--load_fast=false"], cwd=logdir.parent, stderr=subprocess.DEVNULL)
    try:
        with browser() as started:
            opened = started.new_page(viewport={"width": TENSORBOARD_WIDTH, "height": TENSORBOARD_HEIGHT})
            for _ in range(60):
                opened.wait_for_timeout(1000)
                with suppress(Exception):  # of playwright, while the server starts
                    opened.goto(f"http://localhost:{port}/#custom_scalars")
                    opened.get_by_text("KL over tokens").wait_for(timeout=10_000)
                    break
            else:
                raise UserError(f"{logdir}: TensorBoard shows no chart 'KL over tokens' of its runs")
            opened.wait_for_timeout(10_000)  # until all runs are loaded
            opened.reload()
            opened.wait_for_timeout(5000)  # the lines are drawn after the frames
            opened.screenshot(path=picture)
    finally:
        server.terminate()
        server.wait()
    reduce_colours(picture)


def main(smoke: Path, images: Path = IMAGES) -> None:
    """Writes the pictures of the smoke runs: report, on a screen and on a phone, evaluation, TensorBoard."""
    photograph_report(smoke / "report.html", images)
    write_plots(read_evaluations(smoke / "evaluation.json"), images)
    photograph_tensorboard(smoke, images / "tensorboard.png")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"pictures: {error}")
