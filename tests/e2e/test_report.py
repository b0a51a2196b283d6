"""The report in a real browser, from a file, without a network: on a run of the trainer and on a troubled one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.commands import in_process, succeeded
from tests.e2e.conftest import Place
from tests.unit.report.written_run import run_with_faults

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request, Route

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def written(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on both runs, and an evaluation, as the commands write them."""
    folder = tmp_path_factory.mktemp("report")
    troubled = run_with_faults(folder / "troubled <b>").write()
    evaluation = folder / "evaluation.json"
    models = (str(place.teacher), "--teacher", str(place.teacher), "--data", place.heldout)
    succeeded(in_process("evaluate", *models, "--json", str(evaluation)))
    assert len(json.loads(evaluation.read_text(encoding="utf-8"))) == 1
    runs = (str(place.folder / "teacher"), str(troubled))
    done = succeeded(in_process("report", *runs, "--output", str(folder), "--evaluation", str(evaluation)))
    page = folder / "report.html"
    assert done.out.strip() == str(page)
    return page


@pytest.fixture
def page(browser: "Browser", written: Path) -> Iterator["Page"]:
    """The page, opened; whatever it asks for but itself, and whatever the browser complains of, fails the test."""
    requested: list[str] = []
    complaints: list[str] = []

    def alone(route: "Route", request: "Request") -> None:
        if request.url == written.as_uri():
            route.continue_()
        else:
            requested.append(request.url)
            route.abort()

    context = browser.new_context(viewport={"width": WIDTHS[0], "height": 900})
    context.set_offline(True)
    context.route("**/*", alone)
    opened = context.new_page()
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(written.as_uri())
    yield opened
    context.close()
    assert requested == []
    assert complaints == []


def test_everything_is_to_be_seen(page: "Page") -> None:
    for heading in ("Summary", "Over tokens", "Over time", "Events", "Evaluation", "Recipe", "Versions and attempts"):
        assert page.get_by_role("heading", name=heading, exact=True).is_visible(), heading
    figures = page.locator("figure").all()
    assert len(figures) >= 14
    for figure in figures:
        box = figure.locator(".wide svg").bounding_box()
        assert box is not None
        assert box["width"] > 300
        assert box["height"] > 100
    summary = page.locator("table").first
    assert summary.is_visible()
    assert "troubled <b>" in summary.inner_text()
    assert page.get_by_text("rank 1 is gone").first.is_visible()


def test_a_run_can_be_hidden_without_a_script(page: "Page") -> None:
    hidden, shown = page.locator("#loss .wide .run-1"), page.locator("#loss .wide .run-0")
    assert hidden.count() > 0
    assert shown.count() > 0
    assert all(line.is_visible() for line in hidden.all())
    page.get_by_label("troubled <b>").uncheck()
    assert not any(line.is_visible() for line in page.locator(".run-1").all()), "its lines, its bars, its rows"
    assert all(line.is_visible() for line in shown.all())
    page.get_by_label("troubled <b>").check()
    assert all(line.is_visible() for line in hidden.all())


def test_lines_have_the_colours_of_their_runs_in_light_and_in_dark(page: "Page") -> None:
    colours = "element => getComputedStyle(element).stroke"
    line = page.locator("#loss .wide .run-1 path").first
    for scheme, stroke in (("light", "rgb(213, 94, 0)"), ("dark", "rgb(255, 133, 64)")):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert line.evaluate(colours) == stroke
        assert page.locator("label svg path").nth(1).evaluate(colours) == stroke


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_window(width: int, page: "Page") -> None:
    from io import BytesIO

    from PIL import Image

    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB")
    assert picture.width == width
    counted = picture.getcolors(maxcolors=1 << 24)
    assert counted is not None
    assert len(counted) > 100, "a blank page has one colour"
