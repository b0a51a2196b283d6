"""benchmarks.step: products are recorded as they run, run alone as they were recorded, and become rows and a figure."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import conv1d, linear, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import Report
from benchmarks.step import questions
from benchmarks.step.contenders import CALLS, OURS, PLAIN, PRODUCTS, SCRIPT, SENT, timed, without_leaf_settings
from benchmarks.step.growth_plot import Point, draw
from benchmarks.step.products import BareProducts, Product, record_products
from benchmarks.step.questions import Measurement
from benchmarks.step.sizes import DEVICE_SIZES, IN_TURN, SIZES, Features
from megadistill.student.deepspeed_config import PERSISTENCE
from megadistill.teacher.cpu_linear import OneDnnLinear


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The names of the operators inside, in their order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def flops(products: list[Product]) -> int:
    return sum(product.flops for product in products)


def test_products_of_a_linear_layer_forward_and_backward() -> None:
    x, weight = torch.randn(2, 5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    products = record_products(lambda: torch.autograd.grad(linear(x, weight).square().sum(), (x, weight)))
    assert [product.flops for product in products] == 3 * [2 * 10 * 3 * 7]
    forward, *backward = products
    assert forward == Product(((10, 3), (3, 1)), ((3, 7), (1, 3)))
    assert any(product.left[1][0] == 1 for product in backward), "a product with a transposed operand is recorded so"


def test_products_of_the_teacher_s_linear_layers_on_a_cpu() -> None:
    """They are executed by oneDNN, as in the step."""
    x, layer = torch.randn(2, 5, 3), torch.nn.Linear(3, 7, bias=False)
    by_mm, by_onednn = (record_products(partial(each, x)) for each in (layer, OneDnnLinear(layer)))
    assert by_onednn == [replace(each, onednn=True) for each in by_mm]
    bare = BareProducts(by_onednn, dtype=torch.float32, device=torch.device("cpu"))
    with Operators() as executed:
        bare()
    assert executed.names == ["mkldnn::_linear_pointwise"]
    ((_, _, left, weight),) = bare._runs
    assert (left.shape, weight.shape, weight.is_contiguous()) == ((10, 3), (7, 3), True)


def test_a_product_that_adds_adds_when_it_runs_alone() -> None:
    a, b, out = torch.randn(4, 3), torch.randn(3, 2), torch.zeros(4, 2)
    products = record_products(lambda: torch.addmm(out, a, b, beta=1, out=out))
    products += record_products(lambda: torch.addmm(out, a, b, beta=0, out=out))
    bare = BareProducts(products, dtype=torch.float32, device=torch.device("cpu"))
    bare()
    (adds, first, left, right), (replaces, *_) = bare._runs
    assert (adds, replaces) == (1, 0)
    assert first is not None
    torch.testing.assert_close(first, left @ right)


def test_plain_calls_are_the_same_products_into_memory_of_their_own() -> None:
    a, b, out = torch.randn(4, 3), torch.randn(3, 2), torch.zeros(4, 2)
    products = record_products(lambda: torch.mm(a, b))
    products += record_products(lambda: torch.addmm(out, a, b, beta=1, out=out))
    plain = BareProducts(products, dtype=torch.float32, device=torch.device("cpu"), allocates=True)
    with Operators() as executed:
        plain()
    assert executed.names == ["aten::mm", "aten::addmm.out"]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_causal_attention_is_the_products_on_and_below_its_diagonal(kv_heads: int) -> None:
    B, H, S, d = 2, 4, 32, 8
    query = torch.randn(B, H, S, d, requires_grad=True)
    key, value = (torch.randn(B, kv_heads, S, d, requires_grad=True) for _ in range(2))
    key, value = (each.repeat_interleave(H // kv_heads, dim=1) if kv_heads < H else each for each in (key, value))

    def attend() -> None:
        torch.autograd.grad(scaled_dot_product_attention(query, key, value, is_causal=True).sum(), query)

    products = record_products(attend)
    whole = 2 * B * H * S * S * d
    assert flops(products) == 7 * whole * 9 // 16, "two products forward and five backward, in eight blocks of rows"
    BareProducts(products, dtype=torch.float32, device=torch.device("cpu"))()


def test_products_that_are_not_known_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="convolution"):
        record_products(lambda: conv1d(torch.randn(1, 1, 8), torch.randn(1, 1, 3)))
    x = torch.randn(1, 2, 8, 8)
    with pytest.raises(NotImplementedError, match="not causal"):
        record_products(lambda: scaled_dot_product_attention(x, x, x))


def test_compiled_functions_are_recorded_too() -> None:
    compiled = torch.compile(lambda a, b: (a @ b).relu() @ b, backend="eager")
    a = torch.randn(4, 4)
    compiled(a, a)
    assert len(record_products(lambda: compiled(a, a))) == 2


def test_each_feature_is_switched_on_by_itself() -> None:
    rows = list(IN_TURN.values())[:-2]
    for before, after in itertools.pairwise(rows):
        changed = [name for name in vars(before) if getattr(before, name) != getattr(after, name)]
        assert len(changed) == 1
    assert rows[-1] == Features(), "the last one is what is measured elsewhere"


def test_engines_without_leaves_keep_small_parameters_gathered_as_deepspeed_does() -> None:
    ours = json.loads(Path("ds_configs/cpu.json").read_text(encoding="utf-8"))
    theirs = without_leaf_settings(ours)
    assert ours["zero_optimization"].items() - theirs["zero_optimization"].items() == {(PERSISTENCE, 0)}
    assert {**theirs, "zero_optimization": {**theirs["zero_optimization"], PERSISTENCE: 0}} == ours


SECONDS = {
    OURS: 0.3,
    PRODUCTS: 0.2,
    PLAIN: 0.25,
    SCRIPT: 0.6,
    "peak": 100.0,
    CALLS: 40.0,
    SENT: 8e6,
    **dict.fromkeys(IN_TURN, 0.4),
}


@pytest.fixture
def measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    """Measurements whose ranks answer at once."""

    @contextmanager
    def ranks(world: int, make: Any, *arguments: Any, vocab_group: int = 2, replicas: int = 1) -> Iterator[Any]:
        yield lambda name: SECONDS[name] * (2 if SCRIPT in arguments else 1) / replicas

    monkeypatch.setattr(questions, "ranks", ranks)
    monkeypatch.setattr(questions, "write_files", lambda folder, size: folder)
    monkeypatch.setattr(questions, "others", lambda: (SCRIPT,))
    return Measurement(tmp_path, Report(threads=1, repeats=2, measured=()), "wall")


def rows(measurement: Measurement) -> dict[str, tuple[str, str]]:
    """Contender -> (ratio, what to)."""
    return {str(row["contender"]): (str(row.get("ratio")), str(row["ratio_to"])) for row in measurement.report.rows}


def test_ours_is_held_to_its_products_and_the_script_to_ours(measurement: Measurement) -> None:
    questions.step(measurement, "tiny", SIZES["tiny"], world=2)
    assert rows(measurement) == {
        OURS: ("1.5000", PRODUCTS),
        PRODUCTS: ("1.0000", PRODUCTS),
        PLAIN: ("1.2500", PRODUCTS),
        SCRIPT: ("2.0000", OURS),
    }


def test_memory_is_held_to_the_script_s(measurement: Measurement) -> None:
    questions.memory(measurement, "tiny", SIZES["tiny"], world=2)
    assert rows(measurement) == {SCRIPT: ("1.0000", SCRIPT), OURS: ("0.5000", SCRIPT)}


def test_each_feature_has_a_row(measurement: Measurement) -> None:
    questions.features(measurement, "tiny", SIZES["tiny"], world=2)
    assert rows(measurement) == {**dict.fromkeys(IN_TURN, ("2.0000", PRODUCTS)), PRODUCTS: ("1.0000", PRODUCTS)}


def test_two_replicas_are_held_to_two_ranks_that_share_a_student(measurement: Measurement) -> None:
    questions.replicas(measurement, "tiny", SIZES["tiny"])
    shared, whole_heads, replicas = questions.LAYOUTS
    times = {shared: ("1.0000", shared), whole_heads: ("1.0000", shared), replicas: ("0.5000", shared)}
    counts = {f"{layout}: {count}": ("None", "") for layout in times for count in (CALLS, SENT)}
    assert rows(measurement) == times | counts
    units = [row["unit"] for row in measurement.report.rows]
    assert units == 3 * ["s", "calls", "bytes"]


def test_growth_is_a_time_a_token_and_a_figure(measurement: Measurement, tmp_path: Path) -> None:
    points = questions.growth(measurement, "sequence", {32: SIZES["tiny"]}, world=2)
    assert points == [Point(32, 0.3 / 64, 0.2 / 64)]
    draw({"sequence": points, "vocabulary": points}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without accelerators says that it has none")
def test_rows_of_a_device_wait_for_one(measurement: Measurement, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (size, bar) in DEVICE_SIZES.items():
        questions.device(measurement, name, size, bar=bar)
    assert not measurement.report.rows
    assert "8B to 4B: waits for a machine with accelerators (at least 7,000 tokens/s each)" in capsys.readouterr().out


def test_a_timed_call_answers_with_its_seconds() -> None:
    seconds = timed({"one": lambda: None}, "cpu", torch.device("cpu"))["one"]()
    assert isinstance(seconds, float)
    assert 0 <= seconds < 1
