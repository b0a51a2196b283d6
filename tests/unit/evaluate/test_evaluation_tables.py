"""An evaluation's tables at 80 columns, and its JSON."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from megadistill.evaluate.evaluation import CalibrationBin, Decile, Evaluation, SourceResult
from megadistill.evaluate.evaluation_tables import tables
from megadistill.io import write_json
from megadistill.terminal_tables import print_tables

LARGE = Evaluation(
    model="teachers/a-model-with-quite-a-long-name-of-its-own/step-00100000",
    parameters=405_853_388_800,
    tokens=1_000_000_000,
    cross_entropy=11.9221,
    perplexity=150_555.25,
    bits_per_byte=12.3456,
    calibration_error=0.1234,
    kl=10.4321,
    jsd=0.6931,
    agreement=1.0,
    acceptance=0.4567,
    calibration=(CalibrationBin(1_000_000_000, 0.5, 0.25), *[CalibrationBin(0, None, None)] * 20),
    by_decile=(
        *(Decile((1.0 * n, n + 0.987), 111_111_111, 10.5 + n, 0.125 * n, 0.11 * n) for n in range(9)),
        Decile(None, 0, None, None, None),
    ),
    by_source=(
        SourceResult(10_000_000, 11.9221, 150_555.25, 12.3456, 0.1, 10.4321, 0.6931, 1.0, 0.4567, "web"),
        SourceResult(990_000_000, 0.5, 1.6487, None, 0.1, 10.4321, 0.6931, 1.0, 0.4567, "code"),
    ),
)
ALONE = replace(
    LARGE,
    model="s",
    kl=None,
    jsd=None,
    agreement=None,
    acceptance=None,
    by_decile=None,
    by_source=LARGE.by_source[:1],
)


def _printed(*results: Evaluation) -> str:
    out = io.StringIO()
    print_tables(Console(file=out, width=80), *tables(results))
    return out.getvalue()


def test_the_tables_fit_a_terminal_and_hide_nothing() -> None:
    text = _printed(LARGE, replace(LARGE, model="student"))
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    for part in ("1,000,000,000 tokens of 2 sources", "405,853,388,800", "11.9221", "150,555.25", "12.3456", "10.4321"):
        assert part in text, part
    for part in ("12.34%", "0.6931", "45.7%", "990,000,000 tokens", "web", "code", "1.987", "18.50", "1.000", "88%"):
        assert part in text, part
    first = text.split("calibration and distance")[0]
    assert LARGE.model in first, "a table that has no room for its names is a list"


def test_a_short_name_is_in_one_piece() -> None:
    usual = {"cross_entropy": 3.5897, "perplexity": 36.22, "bits_per_byte": 1.8865, "kl": 0.1830, "agreement": 1.0}
    model = replace(LARGE, model="distill-hf", parameters=1_447_520, by_source=LARGE.by_source[:1], **usual)  # type: ignore[arg-type]
    for table in tables([model])[:2]:
        out = io.StringIO()
        print_tables(Console(file=out, width=80), table)
        assert "distill-hf" in out.getvalue()


def test_without_a_teacher_and_with_one_source_there_are_fewer() -> None:
    text = _printed(ALONE)
    assert "by decile" not in text
    assert len(tables([ALONE])) == 2, "no table of its one source"
    assert text.count(" - ") == 4, "no teacher, no number"


def test_the_json_is_the_record(tmp_path: Path) -> None:
    path = tmp_path / "new" / "evaluation.json"
    write_json(path, [LARGE])
    (written,) = json.loads(path.read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(asdict(LARGE)))
    assert written["calibration"][0] == {"count": 1_000_000_000, "confidence": 0.5, "accuracy": 0.25}
    assert written["by_decile"][1]["bounds"] == [1.0, 1.987]
