"""The report in a browser, on a screen and on a phone: of runs of many kinds, everything can be read."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from megadistill.report.page import report
from tests.unit.report.written_run import RECIPE, WrittenRun, run_with_faults

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PHONE, SCREEN = 390, 1280
LEAST_TEXT = 11.0
"""Height of the smallest text of a chart, in CSS pixels."""

SMALL_TEXT = """least => [...document.querySelectorAll('figure svg')].filter(svg => svg.getClientRects().length)
    .flatMap(svg => { const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
        return [...svg.querySelectorAll('text')].map(text => [text.textContent, parseFloat(
            getComputedStyle(text).fontSize) * scale]); })
    .filter(([, size]) => size < least)"""
CUT_TEXT = """() => [...document.querySelectorAll('figure svg')].filter(svg => svg.getClientRects().length)
    .flatMap(svg => { const frame = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].filter(text => { const box = text.getBoundingClientRect();
            return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
                || box.bottom > frame.bottom + 1; }).map(text => text.textContent); })"""
COVERED_TEXT = """() => [...document.querySelectorAll('figure svg')].filter(svg => svg.getClientRects().length)
    .flatMap(svg => { const texts = [...svg.querySelectorAll('text')].map(text => [
            text.textContent, text.getBoundingClientRect()]);
        return texts.flatMap(([name, box], index) => texts.slice(index + 1).filter(([, other]) =>
            Math.min(box.right, other.right) - Math.max(box.left, other.left) > 2 &&
            Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top) > 3)
            .map(([other]) => [name, other])); })"""
BROKEN_WORDS = r"""() => { const broken = [], range = document.createRange();
    for (const cell of document.querySelectorAll('th, td, label, h1, h3')) {
        const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) for (const word of walker.currentNode.data.matchAll(/[\p{L}\d]+/gu)) {
            range.setStart(walker.currentNode, word.index);
            range.setEnd(walker.currentNode, word.index + word[0].length);
            const lines = new Set([...range.getClientRects()].map(box => Math.round(box.top)));
            if (lines.size > 1) broken.push(word[0]); } }
    return broken; }"""


def _steps(run: WrittenRun, first: int, last: int, *, more: float = 0.0, **values: Any) -> None:
    """Steps whose loss falls from 8 to 0.2, with a first step unlike the others."""
    for step in range(first, last + 1):
        loss = more + 0.2 + 7.8 * math.exp(-step / 15) + 0.02 * math.sin(step)
        unlike = {"grad_norm": 30.0, "tokens_per_second": 2e4} if step == 1 else {}
        run.steps(step, step, loss=loss, **{"kl": loss, **values, **unlike})


def _finished(folder: Path, *, more: float = 0.0) -> Path:
    run = WrittenRun(folder)
    run.begin()
    _steps(run, 1, 120, more=more)
    run.save(120)
    run.event("completed", 120)
    return run.write()


def _going(folder: Path) -> Path:
    run = WrittenRun(folder)
    run.begin()
    _steps(run, 1, 30)
    return run.write()


def _labels(folder: Path) -> Path:
    run = WrittenRun(folder)
    run.begin()
    _steps(run, 1, 120, kl=None, teacher_ce=None, teacher_entropy=None, agreement=None, teacher_seconds=None)
    return run.write({**{key: value for key, value in RECIPE.items() if key != "teacher"}, "objective": "labels"})


def _begun(folder: Path) -> Path:
    run = WrittenRun(folder)
    run.begin()
    return run.write()


def _troubled(folder: Path) -> Path:
    """An event of each kind."""
    run = run_with_faults(folder)
    run.event("checkpoint_failed", 40, reason="No space left on device: 12.1 GB needed, 3.4 GB free", stall_seconds=0.2)
    run.event("checkpoint_quarantined", 40, path="step-00000040.quarantined-2", reason="model.safetensors: a digest")
    run.event("teacher_drift", 40, teacher_ce=5.12, median=3.0, zscore=22.3, slots=[312, 319])
    run.event("samples_masked", 40, slots=[312, 313])
    run.event("straggler", 40, message="straggler: rank 1 (node-0007) computes at 0.76 of the median speed")
    run.event("stop_requested", 40, reason="SIGUSR2")
    run.event("stopped", 40, reason="SIGUSR2")
    return run.write()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of many runs and of each kind of run."""
    folder = tmp_path_factory.mktemp("pages")
    name = "gemma2-27b-to-2b-forward_kl-with-warmup"
    many = [_finished(folder / f"sweep-of-2026-11-of-learning-rates-{i}" / name, more=i / 3) for i in range(10)]
    kinds = {
        "many": many,
        "troubled": [_troubled(folder / "troubled")],
        "going": [_going(folder / "going")],
        "labels": [_labels(folder / "labels-only")],
        "begun": [_begun(folder / "begun")],
    }
    return {kind: report(runs, evaluations=[], output=folder / f"{kind}.html", now=0.0) for kind, runs in kinds.items()}


@pytest.fixture
def page(browser: "Browser") -> Iterator["Page"]:
    opened = browser.new_page()
    yield opened
    opened.close()


@pytest.mark.parametrize("kind", ["many", "troubled", "going", "labels", "begun"])
@pytest.mark.parametrize("width", [PHONE, SCREEN])
def test_everything_can_be_read(width: int, kind: str, pages: dict[str, Path], page: "Page") -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(pages[kind].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(SMALL_TEXT, LEAST_TEXT) == []
    assert page.evaluate(CUT_TEXT) == []
    assert page.evaluate(COVERED_TEXT) == []
    assert page.evaluate(BROKEN_WORDS) == []


def test_on_a_phone_a_run_is_a_card(pages: dict[str, Path], page: "Page") -> None:
    page.set_viewport_size({"width": PHONE, "height": 900})
    page.goto(pages["many"].as_uri())
    cards = page.locator("table").first.locator("tbody tr")
    assert cards.count() == 10
    boxes = [card.bounding_box() for card in cards.all()]
    assert all(box is not None and box["x"] >= 0 and box["x"] + box["width"] <= PHONE for box in boxes)
    assert cards.first.evaluate("card => getComputedStyle(card).display") == "block"
    names = cards.first.locator("td").evaluate_all("cells => cells.map(cell => cell.dataset.label)")
    assert {"run", "state", "loss", "tokens/s"} <= set(names)
    for cell in cards.first.locator("td").all()[1:]:
        heading = cell.evaluate("cell => getComputedStyle(cell, '::before').content")
        assert heading == f'"{cell.get_attribute("data-label")}"', "each number has its name beside it"
    for scroller in page.locator(".scroll").all():
        assert scroller.evaluate("box => box.scrollWidth <= box.clientWidth + 1"), "no table scrolls sideways"


def test_an_outlier_is_marked_and_named(pages: dict[str, Path], page: "Page") -> None:
    page.goto(pages["going"].as_uri())
    for figure, value in (("grad_norm", "30"), ("throughput", "20k")):
        assert f"▲ above the axis: as far as {value} (step 1)" in page.locator(f"#{figure} figcaption").inner_text()


def test_text_is_seen_in_light_and_in_dark(pages: dict[str, Path], page: "Page") -> None:
    page.goto(pages["troubled"].as_uri())
    colours: dict[str, list[str]] = {}
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        fills = [page.locator(f"{figure} .wide text").first for figure in ("#loss", "#events")]
        colours[scheme] = [text.evaluate("text => getComputedStyle(text).fill") for text in fills]
        paragraph = page.locator("#summary + p")
        colours[scheme].append(paragraph.evaluate("text => getComputedStyle(text).color"))
    assert len({*colours["light"]}) == len({*colours["dark"]}) == 1, "figures are in the page's colour"
    assert colours["light"] != colours["dark"]
