"""The printed plan, and the command that prints it."""

import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from megadistill.cli.main import run_command
from megadistill.plan.output.plan_json import to_json
from megadistill.plan.output.plan_tables import render
from megadistill.plan.plan_input import PlanInput
from megadistill.plan.scaling_law import forecast
from megadistill.plan.search import plan
from megadistill.plan.throughput import MfuAssumption
from megadistill.terminal_tables import print_tables
from megadistill.units import count, spell
from tests.unit.plan.tiny import SLOWER, TINY, cluster, plan_input

BESIDE = {"placement": "disaggregated", "ranks": 2, "stages": 2}


def _rendered(inputs: PlanInput, *, price: float | None = None, slower: float = SLOWER) -> str:
    machines = cluster(2, 4, slower=slower)
    result = plan(inputs, machines, MfuAssumption())
    assert result.main is not None
    law = forecast(result.main.requirements, teacher_loss=2.5, teacher_tokens=None)
    out = io.StringIO()
    print_tables(Console(file=out, width=80, highlight=False), render(result, law=law, price=price))
    return out.getvalue()


@pytest.mark.parametrize(
    "inputs",
    [
        plan_input(),
        plan_input(teacher=None),
        plan_input(placement={**BESIDE, "ranks": 4}),
        plan_input(distributed={"vocab_group": 3}),
    ],
    ids=["colocated", "labels", "apart", "refused"],
)
def test_it_fits_80_columns_and_begins_with_the_summary(inputs: PlanInput) -> None:
    text = _rendered(inputs, price=1234.5)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text, "nothing is cut"
    assert "2 x 4 a GPU of the tests" in text.splitlines()[0]
    summary = text.split("\n\n")[0]
    for part in ("fits", "tokens/s", "GPU-hours", "assumed, not measured", "expected", "optimistic"):
        assert part in summary, part


def test_a_reduction_of_many_gradients_in_16_bits_is_warned_of() -> None:
    inputs = plan_input(teacher=None, train={"global_batch": 96, "precision": "bfloat16"})
    for dtype, warned in (("bf16", True), ("fp32", False)):
        deepspeed_config = {**inputs.deepspeed_config, "communication_data_type": dtype}
        result = plan(replace(inputs, deepspeed_config=deepspeed_config), cluster(12, 8), MfuAssumption())
        out = io.StringIO()
        print_tables(Console(file=out, width=80), render(result, law=None, price=None))
        summary = " ".join(out.getvalue().split("\n\n")[0].split())
        warning = "gradients of 96 ranks are added up in bfloat16"
        assert (warning in summary) is warned
        assert (to_json(result, law=None, price=None)["low_precision_reduction"] is not None) is warned


def test_the_optimistic_costs_are_beside_the_expected_ones() -> None:
    inputs, machines = plan_input(), cluster(2, 4, slower=SLOWER)
    result = plan(inputs, machines, MfuAssumption())
    expected, optimistic = result.main, plan(inputs, machines, MfuAssumption(0.39, 0.39)).main
    assert expected is not None
    assert optimistic is not None
    assert expected.optimistic.times == optimistic.times
    rows = [re.split(r"  +", line.strip()) for line in _rendered(inputs, price=2.0).split("\n\n")[0].splitlines()]
    table = {name: values for name, *values in rows if len(values) == 2}
    both = (expected, optimistic)
    assert table["tokens/s"] == [count(each.tokens_per_second) for each in both]
    assert table["time"] == [spell(each.seconds) for each in both]
    assert table["GPU-hours"] == [f"{each.gpu_hours:,.0f}" for each in both]
    assert table["price, at 2"] == [f"{2 * each.gpu_hours:,.0f}" for each in both]
    assert table["MFU of the student"] == ["18%", "39%"]
    assert table["MFU of the teacher"] == ["18%", "39%"]
    own = to_json(result, law=None, price=2.0)["own"]
    assert own["gpu_hours"] == expected.gpu_hours
    assert own["optimistic"] == {
        "step_seconds": optimistic.times.step,
        "tokens_per_second": optimistic.tokens_per_second,
        "days": optimistic.seconds / 86_400,
        "gpu_hours": optimistic.gpu_hours,
        "price": 2 * optimistic.gpu_hours,
    }


def test_the_optimistic_mfu_is_not_below_the_expected_one() -> None:
    assumed = MfuAssumption(0.35, 0.5)
    assert assumed.optimistic(student_compiled=True, teacher_compiled=True) == MfuAssumption(0.39, 0.5)
    assert assumed.optimistic(student_compiled=False, teacher_compiled=True) == MfuAssumption(0.35, 0.5)


def test_every_part_is_there() -> None:
    text = _rendered(plan_input(), price=2.0)
    parts = (
        "FLOPs of a token",
        "Memory of a GPU",
        "A micro-step",
        "Bytes that a GPU receives",
        "valid layouts",
        "On disk",
    )
    places = [text.index(part) for part in (*parts, "scaling law")]
    assert places == sorted(places)
    for line in (
        "ZeRO-3 states",
        "teacher stage",
        "logit chunk",
        "left",
        "Compute hides ZeRO-3's traffic from",
        "price",
        "the recipe as",
    ):
        assert line in text, line
    assert "A warning light, not a forecast" in text


def test_a_teachers_own_gpus_are_listed_apart() -> None:
    text = _rendered(plan_input(placement={**BESIDE, "ranks": 4}))
    assert "Memory of a teacher's GPU" in text
    assert "4 + 4" in text
    assert "The teacher's ranks are busy" in " ".join(text.split())


def test_a_recipe_that_does_not_start_gives_the_reason_first() -> None:
    text = _rendered(plan_input(distributed={"vocab_group": 3}))
    assert text.index("this recipe cannot start here: distributed.vocab_group is 3") < text.index("fits")


def _recipe(folder: Path) -> list[str]:
    values = plan_input().recipe.snapshot()
    values["student"]["deepspeed"] = "cpu"
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    (folder / "config.json").write_text(json.dumps(TINY))
    return ["plan", str(path), "--sequence-length", "32", "--teacher-config", str(folder), "--gpus-per-node", "2"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = _recipe(tmp_path)
    written = tmp_path / "plan.json"
    assert run_command([*command, "--nodes", "1", "--gpu", "h100", "--json", str(written), "--student-mfu", "0.3"]) == 0
    assert "fits" in capsys.readouterr().out
    values = json.loads(written.read_text())
    assert values["assumed"]["student_mfu"] == 0.3
    assert run_command([*command, "--nodes", "1", "--gpu", "h100", "--json", "-"]) == 0
    by_default = json.loads(capsys.readouterr().out)
    assert by_default["cluster"]["gpu"] == values["cluster"]["gpu"]
    assert by_default["assumed"] == {**asdict(MfuAssumption()), "optimistic": asdict(MfuAssumption(0.39, 0.39))}


def test_the_command_where_nothing_fits_and_where_it_is_mistyped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = _recipe(tmp_path)
    kind = {**cluster().accelerator.model_dump(), "memory_gb": 1e-5}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"small": kind}))
    assert run_command([*command, "--nodes", "1", "--gpu", str(tmp_path / "small.yaml")]) == 2
    text = capsys.readouterr()
    assert "does not fit" in text.out
    assert text.err.startswith("megadistill: no layout fits: the best of")
    for options, reason in (
        (["--nodes", "0", "--gpu", "h100"], "--nodes 0"),
        (["--nodes", "1", "--gpu", "h10"], "did you mean 'h100'"),
        (["--nodes", "1", "--gpu", "h100", "--student-mfu", "40"], "--student-mfu 40"),
        (["--nodes", "1", "--gpu", "h100", "--price", "-1"], "--price -1"),
        (["--nodes", "1", "--gpu", "h100", "--teacher-loss", "0"], "--teacher-loss 0"),
    ):
        assert run_command([*command, *options]) == 2
        err = capsys.readouterr().err
        assert reason in err
        assert err.count("\n") == 1
