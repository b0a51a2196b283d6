"""Tables of every command at 80 columns and fewer: keys, names and numbers in one piece, or broken at a separator."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megadistill.config.keys import tables as key_tables
from megadistill.data.prepare.verify import SplitCheck, VerifyReport
from megadistill.datagen.generate import GenerateReport
from megadistill.doctor.rank_report import Report, Row, Status
from megadistill.doctor.supported_models import table as families_table
from megadistill.evaluate.evaluation_tables import tables as evaluation_tables
from megadistill.evaluate.lm_eval import Score, TaskScores
from megadistill.plan.output.plan_tables import render
from megadistill.plan.scaling_law import forecast
from megadistill.plan.search import plan
from megadistill.plan.throughput import MfuAssumption
from megadistill.terminal_tables import print_tables
from tests.unit.evaluate.test_evaluation_tables import ALONE, LARGE
from tests.unit.plan.tiny import cluster, plan_input

NAME = "gemma-2-27b-to-gemma-2-2b-from-50-sampled-ids-hf"
TASK = "mmlu_high_school_european_history"
FOLDER = "/scratch/project_465000123/somebody/runs/gemma2-27b-to-2b/data/heldout/manifest.json"


def _doctor() -> list[RenderableType]:
    rows = (
        Row("recipe", Status.OK, "recipes/mine.yaml"),
        Row("matrix products", Status.WARN, f"rank 3 ({NAME}) computes at 0.76 of the median"),
        Row("checkpoints", Status.FAIL, f"{FOLDER}: permission denied; set run.folder to a folder that you can write"),
    )
    return [Report(rows).table()]


def _plan() -> list[RenderableType]:
    result = plan(plan_input(), cluster(2, 4), MfuAssumption())
    assert result.main is not None
    return [render(result, law=forecast(result.main.requirements, teacher_loss=2.5, teacher_tokens=None), price=2.5)]


COMMANDS: dict[str, Callable[[], list[Any]]] = {
    "config-keys": lambda: key_tables(None),
    "models": lambda: [families_table()],
    "evaluate": lambda: evaluation_tables([replace(LARGE, model="teacher-hf"), replace(LARGE, model=NAME)]),
    "evaluate, alone": lambda: evaluation_tables([replace(ALONE, model=FOLDER)]),
    "lm-eval": lambda: [TaskScores(NAME, "0.4.9", (Score(TASK, "acc_norm", 0.25, 0.01, 1234, 5),)).table()],
    "shards verify": lambda: [VerifyReport((SplitCheck(FOLDER, 1234, 567_890),), False, 3.25).table()],
    "generate": lambda: [GenerateReport(Path(FOLDER).parent, True, {"tokens written": 1_234_567}, 7980.0).table()],
    "doctor": _doctor,
    "plan": _plan,
}  # fmt: skip


def _printed(width: int, *renderables: RenderableType) -> str:
    out = io.StringIO()
    print_tables(Console(file=out, width=width, highlight=False), *renderables)
    return out.getvalue()


def _sources(renderable: Any) -> Iterator[str]:
    """Texts of a renderable, before it is printed."""
    if isinstance(renderable, Table):
        for part in (renderable.title, renderable.caption, *(column.header for column in renderable.columns)):
            yield from _sources(part or "")
        for column in renderable.columns:
            for cell in column.cells:
                yield from _sources(cell)
    elif isinstance(renderable, Group):
        for each in renderable.renderables:
            yield from _sources(each)
    elif isinstance(renderable, Padding):
        yield from _sources(renderable.renderable)
    else:
        yield renderable.plain if isinstance(renderable, Text) else str(renderable)


SEPARATORS = "/_=@-."


def _require_unbroken(printed: str, words: set[str]) -> None:
    """Every printed word is one of `words`, or a part of it between separators."""
    for printed_word in re.sub("[│┃━─┏┓┗┛┡┩╇┳┻┴┬├┤┼╞╡╪╘╛╧┌┐└┘]", " ", printed).split():
        if printed_word in words or printed_word.removesuffix(":") in words:
            continue
        assert any(
            (place == 0 or word[place - 1] in SEPARATORS)
            and (place + len(printed_word) == len(word) or printed_word[-1] in SEPARATORS)
            for word in words
            for place in (match.start() for match in re.finditer(re.escape(printed_word), word))
        ), f"{printed_word!r} is a word cut in two"


@pytest.mark.parametrize("width", [100, 80, 60, 40])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_breaks_a_key_or_a_name_inside_a_word(command: str, width: int) -> None:
    tables = COMMANDS[command]()
    texts = [text for table in tables for text in _sources(table)]
    words = {word for text in texts for word in text.split()}
    printed = _printed(width, *tables)
    assert printed.count("…") <= "".join(texts).count("…"), "nothing is cut off"
    _require_unbroken(printed, words)
    if width >= 60:
        assert max(map(len, printed.splitlines())) <= width


def test_a_key_of_a_recipe_is_in_one_piece_at_80_columns() -> None:
    printed = _printed(80, *key_tables(None))
    for name in ("activation_checkpointing", "max_masked_per_million", "temperature_squared", "step_timeout_seconds"):
        assert f"│ {name} " in printed


def test_a_long_name_gets_the_room_that_numbers_leave() -> None:
    usual = {"cross_entropy": 3.5897, "perplexity": 36.22, "bits_per_byte": 1.8865, "kl": 0.1830, "agreement": 0.691}
    named = replace(LARGE, model="distill-from-labels-hf", parameters=395_232, **usual)  # type: ignore[arg-type]
    (first, *_) = evaluation_tables([named])
    lines = _printed(80, first).splitlines()
    names = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert names == ["distill-", "from-labels-", "hf"]


def test_a_table_that_fits_nowhere_is_a_list_with_its_headings() -> None:
    (first, *_) = evaluation_tables([replace(LARGE, model=NAME)])
    lines = _printed(40, first).splitlines()
    assert "gemma-2-27b-to-gemma-2-2b-from-50-" in lines
    assert "  parameters: 405,853,388,800" in lines
    assert "  agree: 100.0%" in lines


def test_names_and_values_that_fit_nowhere_are_a_line_each() -> None:
    table = Table("", "", show_header=False)
    table.add_row("sequence length", "128")
    table.add_row("fingerprint", "7" * 64)
    assert _printed(80, table).splitlines() == ["sequence length: 128", f"fingerprint: {'7' * 64}"]


def test_an_indented_name_that_needs_two_lines_begins_on_the_first() -> None:
    table = Table.grid(padding=(0, 1))
    table.add_row(" runs/smoke/teacher-hf", "5.43")
    assert _printed(24, table).splitlines()[0].split() == ["runs/smoke/", "5.43"]
    assert _printed(13, table).splitlines()[0].split() == ["runs/", "5.43"]


def test_styles_survive_and_brackets_are_no_markup() -> None:
    table = Table()
    table.add_column("name")
    table.add_row(Text.from_markup("[bold]loud[/bold] and quiet words that need two lines"))
    table.add_row("[bold]plain[/]")
    out = io.StringIO()
    print_tables(Console(file=out, width=30, force_terminal=True), table, "[red]a line[/red]")
    assert "\x1b[1mloud\x1b[0m" in out.getvalue()
    assert "[bold]plain[/]" in out.getvalue()
    assert "[red]a line[/red]" in out.getvalue()
