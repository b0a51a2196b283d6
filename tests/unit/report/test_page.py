"""The page: whole, bounded, safe, and written where it belongs. A browser looks at it in tests/e2e/test_report.py."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from matplotlib.figure import Figure

from megadistill.errors import UserError
from megadistill.evaluate.evaluation import CalibrationBin, Decile, Evaluation, read_evaluations
from megadistill.report.curves import curves_over_tokens
from megadistill.report.drawing import MAX_RUNS, draw, new_figure, style
from megadistill.report.event_plot import MARKS
from megadistill.report.page import PAGE, compose, report
from megadistill.report.run_record import SERIES, RunRecord, read_runs
from megadistill.report.tables import NOTHING, attempts_table, text
from tests.unit.report.written_run import RECIPE, WrittenRun, run_with_faults, step_line

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>${{7*7}} $\\frac$ \x01"


class _Tags(HTMLParser):
    """The elements of a page, and its text outside of styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _parsed(html: str) -> _Tags:
    parser = _Tags()
    parser.feed(html)
    return parser


def _keep_of_steps(run: WrittenRun, *names: str) -> None:
    """Leaves the other numbers out, so that fewer figures are drawn."""
    run.lines = [{name: line[name] for name in ("time", "step", "tokens", *names)} for line in run.lines]


def _page(*folders: Path) -> str:
    return compose(read_runs(folders), [], now=0.0).html


def _evaluation(model: str = "student") -> Evaluation:
    return Evaluation(
        model=model, parameters=10, tokens=100, cross_entropy=2.5, perplexity=12.2, bits_per_byte=None,
        calibration_error=0.02, kl=0.3, jsd=0.05, agreement=0.7, acceptance=0.8,
        calibration=tuple(CalibrationBin(1, place / 21, place / 21) for place in range(21)),
        by_decile=tuple(Decile((0.0, 1.0), 10, 2.5, 0.1 * place, 0.7) for place in range(10)),
        by_source=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def eventful(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run in which much happened, its evaluation beside it, and its page as the command writes it."""
    folder = run_with_faults(tmp_path_factory.mktemp("report") / "run").write()
    (folder / "evaluation.json").write_text(json.dumps([asdict(_evaluation())]))
    (folder / "evaluation-old.json").write_text("[{}]")
    return folder, report([folder], evaluations=[], output=None, now=0.0).read_text(encoding="utf-8")


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A run without a step yet, of which there is little to draw."""
    run = WrittenRun(tmp_path / "started")
    run.begin()
    return run.write()


def test_the_page_needs_nothing_but_itself(eventful: tuple[Path, str]) -> None:
    _, html = eventful
    parsed = _parsed(html)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("href", "src", "xlink:href"):
                assert value is not None
                assert value.startswith(("#", "data:,")), f"<{tag} {name}={value}>"
    assert not re.search(r"url\((?!#)|@import", html)


def test_the_page_says_what_happened(eventful: tuple[Path, str]) -> None:
    parsed = _parsed(eventful[1])
    words = " ".join(" ".join(parsed.text).split())
    figures = {attributes.get("id") for tag, attributes in parsed.tags if tag == "figure"}
    assert {"loss", "kl", "cross_entropy", "entropy", "agreement", "learning_rate", "grad_norm"} <= figures
    assert {"progress", "throughput", "waiting", "memory", "events", "goodput"} <= figures
    assert {"evaluation-1-calibration", "evaluation-1-deciles"} <= figures
    assert "mfu" not in figures, "nobody knows the peak of a CPU"
    for part in ("40 of 40", "41k", "rank 1 is gone", "the loss left the range", "llama, 2 × 96", "teacher-hf"):
        assert part in words, part
    assert "2,048" in words, "tokens/s as the run's own lines write it"
    assert "step skipped, loss spike, rollback, attempt failed" in words
    assert "evaluation-old.json: no evaluations of this version" in words
    assert "train.optimizer.beta2" in words


def test_a_summary_is_of_the_last_steps(eventful: tuple[Path, str]) -> None:
    losses = [step_line(step, 0.5)["loss"] for step in (*range(1, 31), *range(32, 41))]
    assert f"{np.mean(losses):.4f}" in eventful[1], "fewer than 50 steps: all of them"


def test_no_two_elements_have_one_id(eventful: tuple[Path, str]) -> None:
    ids = [attributes["id"] for _, attributes in _parsed(eventful[1]).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = set(re.findall(r'(?:url\(#|xlink:href="#|href="#)([^")]+)', eventful[1]))
    assert pointed <= set(ids)


def test_figures_lie_beside_the_page(eventful: tuple[Path, str]) -> None:
    folder, html = eventful
    figures = {attributes["id"] for tag, attributes in _parsed(html).tags if tag == "figure"}
    assert {path.stem for path in (folder / "report").iterdir()} == figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "report").iterdir())


def test_every_kind_of_event_has_a_mark_of_its_own() -> None:
    """Shapes with six and eight corners are circles at this size."""
    alike = [{"8": "o", "h": "o", "H": "o"}.get(mark, mark) for mark in MARKS.values()]
    assert len(set(alike)) == len(alike)


def test_every_time_on_the_page_is_written_alike() -> None:
    times = "2026-11-28T21:18:08+00:00", "2026-11-28T22:18:08+01:00", "yesterday", 3, None
    run = SimpleNamespace(name="run", attempts=[{"number": 1, "time": time} for time in times])
    started = [row[2] for row in attempts_table([cast("RunRecord", run)], limit=9).rows]
    assert started == ["2026-11-28 21:18:08 UTC"] * 2 + ["yesterday", "3", NOTHING]


def test_a_later_report_takes_the_place_of_an_earlier_one(started: Path) -> None:
    folder = started
    report([folder], evaluations=[], output=None, now=0.0)
    (folder / "report" / "mine.txt").write_text("kept")
    (folder / "report" / "mfu.png").write_text("stale")
    assert "1970-01-02" in report([folder], evaluations=[], output=None, now=86400.0).read_text(encoding="utf-8")
    assert {path.name for path in (folder / "report").iterdir()} == {"mine.txt", "events.png", "goodput.png"}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "nothing half-written is left"


def test_anybodys_words_are_words(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "").replace("\x00", "")
    run = WrittenRun(folder)
    run.begin()
    run.event("attempt_failed", 3, **{HOSTILE: HOSTILE, "reason": HOSTILE})
    run.write({**RECIPE, HOSTILE: HOSTILE, "objective": HOSTILE, "student": {"config": {"model_type": HOSTILE}}})
    (folder / "attempts").mkdir()
    (folder / "attempts" / "1.json").write_text(json.dumps({"command": [HOSTILE], "versions": {HOSTILE: HOSTILE}}))
    (folder / "evaluation.json").write_text(json.dumps([asdict(_evaluation(HOSTILE))]))
    (folder / f"evaluation{HOSTILE.replace('/', '')}.json").write_text(HOSTILE)
    html = _page(folder)
    tags = {tag for tag, _ in _parsed(html).tags}
    assert not tags & {"script", "img"}
    assert html.count("&lt;script&gt;") > 10
    assert "\x01" not in html


def test_a_name_in_a_figures_legend_is_a_name() -> None:
    def figure_of(width: float) -> Figure:
        figure, axes = new_figure(width)
        axes.plot([1, 2])
        return figure

    with style():
        drawing = draw(figure_of, "name", HOSTILE, "", runs=[HOSTILE, "_hidden", "$\\frac$"])
    assert drawing.png.startswith(b"\x89PNG")
    assert "<script" not in drawing.svg


def test_a_run_that_just_began(started: Path, tmp_path: Path) -> None:
    assert "No steps yet" in _page(started)
    run = WrittenRun(tmp_path / "run")
    run.begin()
    run.steps(1, 1)
    _keep_of_steps(run, "loss", "seconds", "tokens_per_second")
    html = _page(run.write())
    assert "No steps yet" not in html
    assert 'id="loss"' in html
    assert 'id="throughput"' in html


def test_a_run_from_labels_shows_no_teacher(tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.steps(1, 30)
    _keep_of_steps(run, "loss", "student_ce", "seconds", "data_seconds")
    recipe = {name: value for name, value in RECIPE.items() if name != "teacher"}
    html = _page(run.write({**recipe, "objective": "labels"}))
    assert 'id="kl"' not in html
    assert 'id="cross_entropy"' in html
    assert "data wait</th>" in html
    assert "teacher wait</th>" not in html
    assert "teacher</th>" not in html


def test_runs_side_by_side(tmp_path: Path) -> None:
    """Each with a class of its own, and what differs between their recipes."""
    first, second = run_with_faults(tmp_path / "first"), WrittenRun(tmp_path / "second")
    second.steps(1, 200)
    for run in (first, second):
        _keep_of_steps(run, "loss", "seconds")
    first.write()
    second.write({**RECIPE, "loss": {"temperature": 2.0}, "run": {"folder": "elsewhere"}})
    html = _page(first.folder, second.folder)
    loss = html[html.index('<figure id="loss">') :].partition("</figure>")[0]
    assert 'class="run-0"' in loss
    assert 'class="run-1"' in loss
    differing = html[html.index("Differences") :].partition("</table>")[0]
    assert re.findall(r"loss\.[a-z_]+|run\.folder|train\.[a-z]+", differing) == ["loss.temperature"]


def test_a_million_steps_fit_on_a_page(tmp_path: Path) -> None:
    for runs, steps, bytes_of_a_figure in ((1, 1_000_000, 40_000), (MAX_RUNS, 10_000, 350_000)):
        values = np.random.default_rng(0).random(steps)
        series = {name: np.full(steps, np.nan) for name in SERIES}
        series |= {"step": np.arange(1.0, steps + 1), "tokens": np.arange(1.0, steps + 1) * 4e6}
        series |= {"student_ce": values, "teacher_ce": values}
        nothing: dict[str, Any] = {"recipe": {}, "versions": {}, "events": [], "attempts": [], "notes": []}
        record = RunRecord(folder=tmp_path, name="run", series=series, modified=0.0, **nothing)
        with style():
            (drawing,) = curves_over_tokens([record] * runs)
        assert drawing.name == "cross_entropy"
        assert len(drawing.svg) < bytes_of_a_figure


def test_where_the_page_goes(tmp_path: Path, started: Path) -> None:
    (tmp_path / "odd.html").mkdir()
    for output, page in (
        (tmp_path / "new" / "dir", tmp_path / "new" / "dir" / PAGE),
        (tmp_path / "mine.html", tmp_path / "mine.html"),
        (tmp_path / "odd.html", tmp_path / "odd.html" / PAGE),
    ):
        assert report([started], evaluations=[], output=output, now=0.0) == page
        assert page.is_file()
        assert (page.with_suffix("") / "events.png").is_file()


def test_what_is_refused(tmp_path: Path, started: Path) -> None:
    def refused(*runs: Path, evaluations: tuple[Path, ...] = (), output: Path | None = None) -> str:
        with pytest.raises(UserError) as caught:
            report(runs, evaluations=evaluations, output=output, now=0.0)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "give one, as in --output" in refused(started, started)
    assert "name fewer" in refused(*[started] * (MAX_RUNS + 1), output=tmp_path)
    for file in (started / "recipe.json", started / "recipe.json" / "page.html"):
        assert "recipe.json is a file: give --output a folder" in refused(started, output=file)
    assert "evaluate --json FILE` writes one" in refused(started, evaluations=(tmp_path / "none.json",))


WRONG: list[dict[str, Any]] = [{"tokens": 0}, {"calibration": []}, {"kl": float("nan")}, {"parameters": "many"}]


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "[3]", '[{"model": "m"}]', "[" * 200_000]
    + [json.dumps([{**asdict(_evaluation()), **wrong}]) for wrong in WRONG],
    ids=lambda content: content[:20],
)
def test_what_is_no_evaluation_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"evaluation.*`megadistill evaluate --json FILE` writes one") as caught:
        read_evaluations(path)
    assert "\n" not in str(caught.value)


def test_a_page_keeps_the_password_of_a_url_to_itself() -> None:
    assert text("s3://me:pass@bucket/manifest.json") == "s3://***@bucket/manifest.json"
    assert text({"web": "https://h/x?token=1"}) == '{"web": "https://h/x?***"}'
