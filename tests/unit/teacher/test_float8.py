"""A stage in float8 against the rounded operands multiplied in float64; its bytes, names and digests."""

import logging
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megadistill.models import weights
from megadistill.teacher import float8, stage
from megadistill.teacher.float8 import (
    FLOAT8,
    LARGEST,
    Float8Experts,
    Float8Linear,
    grouped_product_is_right,
    multiplies_float8,
    scaled_product_is_right,
    to_float8,
    use_float8,
    weight_to_float8,
)
from megadistill.teacher.stage import TeacherStage
from megadistill.train.resilience.sdc import weights_digest
from tests.unit.models.cases import ALL_CASES, CASES, VOCAB, saved_model

CPU = torch.device("cpu")


def _load(folder: Path, dtype: torch.dtype = torch.bfloat16, stages: int = 1, number: int = 0, **how: Any) -> Any:
    return TeacherStage.load(folder, stage=number, stages=stages, dtype=dtype, device=CPU, **how)


def _rounded(rows: Tensor) -> Tensor:
    """The rows after a way through float8, in float64."""
    values, scales = to_float8(rows)
    return values.double() * scales.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_number_of_a_row_is_the_formats_and_none_is_off_by_a_sixteenth(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(64, 48) * torch.logspace(-20, 20, 64).unsqueeze(1)).to(dtype)
    values, scales = to_float8(rows)
    assert (values.float().abs().amax(dim=1) == LARGEST).all()
    assert scales.dtype == torch.float32
    error = (_rounded(rows) - rows.double()).abs()
    floor = rows.double().abs().amax(dim=1, keepdim=True) * 2**-9 / LARGEST
    assert (error <= (rows.double().abs() / 16).maximum(floor)).all()


def test_rows_of_zeros_stay_zeros_and_of_tiny_numbers_become_zeros_or_themselves() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [1e-25, -1e-25]])
    assert torch.equal(_rounded(rows)[0], torch.zeros(2).double())
    assert _rounded(rows).isfinite().all()
    torch.testing.assert_close(_rounded(rows)[2], rows[2].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_makes_its_token_so_and_no_other(broken: float) -> None:
    """A native product does so too: the check of the hidden states finds it."""
    linear = _linear(32, 48)
    x = torch.randn(3, 32)
    x[1, 5] = broken
    finite = linear(x).isfinite()
    assert finite[[0, 2]].all()
    assert not finite[1].any()


def test_a_weight_is_rounded_alike_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 10, 16)
    whole = weight_to_float8(weight)
    monkeypatch.setattr(float8, "_CHUNK", 64)
    parts = weight_to_float8(weight)
    assert torch.equal(whole[0].float(), parts[0].float())
    assert torch.equal(whole[1], parts[1])
    assert whole[1].shape == (3, 10, 1)


def _linear(K: int, N: int, *, dtype: torch.dtype = torch.float32, bias: bool = False) -> Float8Linear:
    torch.manual_seed(0)
    native = nn.Linear(K, N, bias=bias, dtype=dtype)
    linear = Float8Linear(native)
    linear.place("weight", *weight_to_float8(native.weight.data), dtype=native.weight.dtype)
    linear.native = native.weight.data
    return linear


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_rounded_operands(bias: bool) -> None:
    linear = _linear(64, 48, bias=bias)
    x = torch.randn(2, 7, 64)
    expected = _rounded(x) @ _rounded(linear.native).T  # type: ignore[arg-type]
    if bias:
        expected = expected + linear.bias.double()
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_devices_product_is_the_stand_ins() -> None:
    """`torch._scaled_mm` by rows, where this CPU has it, against the same numbers multiplied in bfloat16."""
    if not scaled_product_is_right(CPU):
        pytest.skip("this torch has no row-wise float8 product on a CPU")
    linear = _linear(64, 48, dtype=torch.bfloat16, bias=True)
    x = torch.randn(2, 7, 64, dtype=torch.bfloat16)
    stand_in = linear(x)
    linear.on_device = True
    torch.testing.assert_close(linear(x), stand_in, rtol=2**-7, atol=2**-7)
    assert not torch.equal(linear(x), nn.functional.linear(x, linear.native, linear.bias))  # type: ignore[arg-type]


def test_a_cpu_multiplies_the_rounded_numbers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not multiplies_float8(CPU)
    monkeypatch.setattr(float8, "_device_product", lambda *operands: torch.zeros(16, 48, dtype=torch.bfloat16))
    assert not scaled_product_is_right(CPU), "a product of wrong numbers is not taken"


def test_experts_are_on_a_device_only_where_it_has_their_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of NVIDIA's with float8 products by rows, some have none of groups: that would end the first step."""

    def grouped(x_MK: Tensor, columns_EKN: Tensor, x_M: Tensor, w_EN: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
        rows, ends = x_MK.float() * x_M.unsqueeze(1), offs.tolist()
        spans = zip([0, *ends[:-1]], ends, strict=True)
        products = [rows[start:stop] @ (columns_EKN[e].float() * w_EN[e]) for e, (start, stop) in enumerate(spans)]
        return (torch.cat(products) * wrong).bfloat16()

    wrong = 1.0
    monkeypatch.setattr(torch, "_scaled_grouped_mm", grouped)
    assert grouped_product_is_right(CPU)
    wrong = 2.0
    assert not grouped_product_is_right(CPU)
    monkeypatch.undo()
    assert not grouped_product_is_right(CPU), "a CPU has none"
    monkeypatch.setattr(float8, "multiplies_float8", lambda device: True)
    float8.multiplies_float8_groups.cache_clear()
    experts = Float8Experts.__new__(Float8Experts)
    linear = Float8Linear.__new__(Float8Linear)
    assert (linear.multiplies(CPU), experts.multiplies(CPU)) == (True, False)
    float8.multiplies_float8_groups.cache_clear()


def test_experts_are_each_tokens_own_products(tmp_path: Path) -> None:
    """Experts without a token, and with all of them, against a loop in float64."""
    saved_model("mixtral", tmp_path)
    native, rounded = (
        _load(tmp_path, torch.float32, precision=precision).decoder.layers[0].mlp.experts
        for precision in ("native", "float8")
    )
    assert isinstance(rounded, Float8Experts)
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 64), torch.rand(9, 2)
    for expert in (torch.tensor([[0, 3]]).expand(9, 2), torch.stack([torch.randperm(4)[:2] for _ in range(9)])):
        expected = torch.zeros(9, 64, dtype=torch.float64)
        for token in range(9):
            for place in range(2):
                e = expert[token, place]
                products = _rounded(hidden[token : token + 1]) @ _rounded(native.gate_up_proj[e]).T
                gate, up = products.float().chunk(2, dim=-1)
                inner = _rounded(nn.functional.silu(gate) * up) @ _rounded(native.down_proj[e]).T
                expected[token] += weight[token, place] * inner[0]
        # A number of the inner activations may be rounded to its other neighbour after sums in another order.
        torch.testing.assert_close(rounded(hidden, expert, weight).double(), expected, rtol=0.02, atol=0.02)
        error = torch.linalg.vector_norm(rounded(hidden, expert, weight) - expected) / expected.norm()
        assert error < 2e-3


@pytest.mark.parametrize("case", CASES)
def test_the_products_of_every_familys_layers_are_in_float8_and_nothing_else(case: str, tmp_path: Path) -> None:
    saved_model(case, tmp_path)
    native, rounded = _load(tmp_path), _load(tmp_path, precision="float8")
    small = CASES[case].get("moe_intermediate_size", 16) % 16 != 0  # then an expert's two matrices stay as they are
    products = {
        name: parameter
        for name, parameter in native.decoder.layers.named_parameters()
        if parameter.ndim > 1 and ".gate.weight" not in name and not (small and ".experts." in name)
    }
    assert products
    in_float8 = {name for name, tensor in rounded.decoder.layers.named_buffers() if tensor.dtype == FLOAT8}
    assert in_float8 == products.keys()
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16} == {rounded.dtype}
    saved = sum(tensor.numel() - 4 * tensor.shape[:-1].numel() for tensor in products.values())
    assert _bytes(native) - _bytes(rounded) == saved
    tokens = torch.randint(VOCAB, (2, 20))
    error = torch.linalg.vector_norm((rounded(tokens) - native(tokens)).float()) / native(tokens).float().norm()
    assert 0 < error < 0.3, "these weights are ten times those of a trained model"


def _bytes(part: Any) -> int:
    return sum(tensor.nbytes for _, tensor in part.weights())


def test_a_stage_is_half_as_large_where_products_are_most_of_it(tmp_path: Path) -> None:
    """Rows of 512 as in small models: a scale is a 128th of its row."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    _write(tmp_path, {**CASES["llama"], **sizes})
    native = _load(tmp_path, stages=2, number=1)
    rounded = _load(tmp_path, stages=2, number=1, precision="float8")
    assert _bytes(rounded) < 0.51 * _bytes(native)


def _write(folder: Path, config: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    from megadistill.models.families import load_config

    AutoModelForCausalLM.from_config(load_config(config, what="test")).save_pretrained(folder)


def test_one_native_weight_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model("mixtral", tmp_path)
    read: list[tuple[str, weakref.ref[Tensor]]] = []

    def read_parameter(folder: Any, config: Any, name: str, *rest: Any, **how: Any) -> Tensor:
        alive = [name for name, tensor in read if tensor() is not None and ("proj" in name or "experts" in name)]
        assert not alive, f"{alive} while {name} is read"
        tensor = weights.read_parameter(folder, config, name, *rest, **how)
        read.append((name, weakref.ref(tensor)))
        return tensor

    monkeypatch.setattr(stage, "read_parameter", read_parameter)
    _load(tmp_path, precision="float8")
    assert sum("proj" in name for name, _ in read) == 5 * 6


def test_a_side_that_is_no_multiple_of_16_stays_native_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _write(tmp_path, {**CASES["llama"], "intermediate_size": 100})
    layer = _load(tmp_path, precision="float8").decoder.layers[0]
    assert isinstance(layer.self_attn.q_proj, Float8Linear)
    assert type(layer.mlp.up_proj) is type(layer.mlp.down_proj) is nn.Linear
    assert "20 modules of this rank's stage" in caplog.text
    expected = (
        "15 stay native, with a side that is no multiple of 16 or with experts that have biases, no gate or columns "
        "for rows: "
    )
    assert f"{expected}layers.0.mlp.gate_proj, layers.0.mlp.up_proj" in caplog.text


@pytest.mark.parametrize("case", ["gemma2", "mixtral"])
def test_a_layer_is_one_graph_for_the_compiler(case: str, tmp_path: Path) -> None:
    saved_model(case, tmp_path)
    layer = _load(tmp_path, torch.float32, precision="float8").decoder.layers[0].mlp
    x = torch.randn(1, 8, 64)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        compiled_x = compiled(x)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(compiled_x, layer(x), rtol=0.05, atol=0.05)


def test_a_bit_of_a_rounded_weight_or_of_a_scale_changes_the_digests(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    rounded = _load(tmp_path, precision="float8")
    before = weights_digest(rounded.weights())
    projection = rounded.decoder.layers[3].mlp.up_proj
    for tensor, bits in ((projection.weight, torch.uint8), (projection.weight_scales, torch.int32)):
        tensor.view(bits)[5, 0] ^= 1
        assert (weights_digest(rounded.weights()) != before).sum() == 1
        tensor.view(bits)[5, 0] ^= 1


def test_stages_in_float8_are_the_unsplit_float8_model(tmp_path: Path) -> None:
    saved_model("qwen2", tmp_path)
    tokens = torch.randint(VOCAB, (2, 20))
    whole = _load(tmp_path, precision="float8")(tokens)
    x = tokens
    for number in range(3):
        x = _load(tmp_path, stages=3, number=number, precision="float8")(x)
    assert torch.equal(x, whole)


@pytest.mark.skipif("ernie4_5_moe" not in ALL_CASES, reason="this transformers lacks the family")
def test_a_stage_hands_on_the_runs_type_where_a_wider_router_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Ernie's layers without biases the router's matrix, in float32, is the first that is no float8 buffer."""
    monkeypatch.setitem(ALL_CASES, "ernie4_5_moe", {**ALL_CASES["ernie4_5_moe"], "use_bias": False})
    saved_model("ernie4_5_moe", tmp_path)
    layer = _load(tmp_path, stages=5, number=1, precision="float8")
    assert next(layer.parameters()).dtype == torch.float32
    hidden = layer(torch.randn(layer.hidden_shape(2, 20), dtype=torch.bfloat16))
    assert hidden.dtype == layer.dtype == torch.bfloat16
    assert hidden.nbytes == math.prod(layer.packet_shape(2, 20)) * layer.dtype.itemsize


def test_replacement_happens_before_anything_is_allocated(tmp_path: Path) -> None:
    from megadistill.models.families import build_decoder, load_config

    decoder = build_decoder(load_config(CASES["llama"], what="test"), layers=range(2))
    assert use_float8(decoder) == []
    assert all(tensor.is_meta for name, tensor in decoder.layers.named_buffers())
