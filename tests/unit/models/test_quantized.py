"""Folders of quantised weights are read as their numbers: those of transformers, where it has them on a CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.hf_folder import SINGLE_FILE, SafetensorsFolder
from megadistill.models.initial_weights import InitialWeights
from megadistill.models.weights import check_weights, load_pretrained
from megadistill.teacher.stage import TeacherStage
from tests.unit.models import integer_forms
from tests.unit.models.cases import VOCAB, final_hidden, saved_model

CPU = torch.device("cpu")
FLOAT8 = torch.float8_e4m3fn
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of the format: a second source of the table, from its definition (OCP MX 1.0, section 5.3.3)."""

Parts = dict[str, Tensor]


def _float8(name: str, weight: Tensor, scales: Tensor, block: tuple[int, int], suffix: str) -> tuple[Parts, Tensor]:
    rows, columns = block
    whole = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: len(weight), : weight.shape[1]]
    values = (weight / whole).to(FLOAT8)
    return {name: values, f"{name}{suffix}": scales}, values.float() * whole


def _blocks(name: str, weight: Tensor, suffix: str = "_scale_inv") -> tuple[Parts, Tensor]:
    """fp8: blocks of 48 x 32, which do not divide all of the sides; scales in bfloat16, as Qwen 3 has them."""
    grid = (-(-len(weight) // 48), -(-weight.shape[1] // 32))
    scales = (torch.rand(grid) * 0.002 + 0.001).bfloat16()
    return _float8(name, weight, scales, (48, 32), suffix)


def _exponents(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
    """fp8 with scales that are powers of two (e8m0): DeepSeek's ue8m0."""
    grid = (-(-len(weight) // 48), -(-weight.shape[1] // 32))
    scales = (2.0 ** torch.randint(-9, -6, grid)).to(torch.float8_e8m0fnu)
    return _float8(name, weight, scales, (48, 32), "_scale_inv")


def _rows(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
    """fbgemm_fp8, and compressed-tensors by channel."""
    scales = weight.abs().amax(dim=1, keepdim=True) / 448
    return _float8(name, weight, scales, (1, weight.shape[1]), "_scale")


def _whole(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
    """compressed-tensors by tensor, and AutoFP8, with the scale of its inputs."""
    scale = (weight.abs().amax() / 448).reshape(1)
    parts, values = _float8(name, weight, scale.reshape(1, 1), (weight.shape[0], weight.shape[1]), "_scale")
    module = name.removesuffix(".weight")
    return {**parts, f"{name}_scale": scale, f"{module}.input_scale": torch.ones(1)}, values


def _mxfp4(name: str, weight: Tensor, *, packed: bool) -> tuple[Parts, Tensor]:
    groups = weight.reshape(*weight.shape[:-1], -1, 32)
    exponents = (groups.abs().amax(dim=-1) / 6).log2().ceil().clamp(-127, 127)
    scaled = groups * 2 ** -exponents.unsqueeze(-1)
    place = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(dim=-1)
    values = torch.copysign(E2M1[place], scaled) * 2 ** exponents.unsqueeze(-1)
    codes = (place + 8 * scaled.signbit()).to(torch.uint8)
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    scales = (exponents + 127).to(torch.uint8)
    if packed:
        return {f"{name}_packed": pairs.flatten(-2), f"{name}_scale": scales}, values.view(weight.shape)
    return {f"{name}_blocks": pairs, f"{name}_scales": scales}, values.view(weight.shape)


def _compressed(**weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", **weights}}
    kind = "mxfp4-pack-quantized" if weights.get("num_bits") == 4 else "float-quantized"
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


def _int4(**weights: Any) -> dict[str, Any]:
    return {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, **weights}}


def _mixed(**group: Any) -> dict[str, Any]:
    first = _compressed()
    return first | {"config_groups": {**first["config_groups"], "group_1": first["config_groups"]["group_0"] | group}}


INT4 = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": _int4()}}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}

FORMATS: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], tuple[Parts, Tensor]]]] = {
    "fp8": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 32]}, _blocks),
    "fp8, e8m0": ({"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [48, 32]}, _exponents),
    "fp8, AutoFP8": ({"quant_method": "fp8", "activation_scheme": "static"}, _whole),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, _rows),
    "compressed-tensors, rows": (_compressed(), _rows),
    "compressed-tensors, blocks": (
        _compressed(strategy="block", block_structure=[48, 32]),
        lambda name, weight: _blocks(name, weight, "_scale"),
    ),
    "compressed-tensors, tensor": (_compressed(strategy="tensor"), _whole),
    "compressed-tensors, mxfp4": (
        _compressed(num_bits=4, strategy="group", group_size=32),
        lambda name, weight: _mxfp4(name, weight, packed=True),
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, lambda name, weight: _mxfp4(name, weight, packed=False)),
    "gptq": (GPTQ, lambda name, weight: integer_forms.gptq(name, weight, ordered=True)),
    "awq": (AWQ, integer_forms.awq),
    "pack-quantized": (
        INT4 | {"config_groups": {"group_0": _int4(symmetric=False)}},
        lambda name, weight: integer_forms.packed_integers(name, weight, symmetric=False),
    ),
    "nf4": (
        {"quant_method": "bitsandbytes", "_load_in_4bit": True},
        lambda name, weight: integer_forms.four_bits(name, weight, nested=True),
    ),
}


def _write(folder: Path, kind: str, case: str = "llama") -> Parts:
    """A folder whose layers' matrices are quantised, beside one (`plain`) with their numbers; these."""
    saved_model(case, folder)
    config, quantise = FORMATS[kind]
    stored: Parts = {}
    plain: Parts = {}
    torch.manual_seed(1)
    for name, tensor in load_file(folder / SINGLE_FILE).items():
        matrix = name.startswith("model.layers.") and tensor.ndim == 2 and ".gate.weight" not in name
        parts, plain[name] = quantise(name, tensor) if matrix else ({name: tensor}, tensor)
        stored |= parts
    (folder / "plain").mkdir()
    save_file(plain, folder / "plain" / SINGLE_FILE, metadata={"format": "pt"})
    (folder / "plain" / "config.json").write_text((folder / "config.json").read_text())
    save_file(
        {name: part.contiguous() for name, part in stored.items()}, folder / SINGLE_FILE, metadata={"format": "pt"}
    )
    _configure(folder, config)
    return plain


def _configure(folder: Path, quantization: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_reader_reads_the_numbers(kind: str, tmp_path: Path) -> None:
    plain = _write(tmp_path, kind)
    config = load_config(tmp_path, what="test")
    check_weights(tmp_path, config)
    folder = SafetensorsFolder(tmp_path)
    assert folder.names == sorted(plain)
    for name, tensor in zip(folder.names, folder.tensors(folder.names), strict=True):
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=0)
        assert folder.shape(name) == plain[name].shape
        assert folder.dtype(name) == torch.float32
        last = len(tensor) - 1
        rows = folder.rows(name, [(3, last), (0, 1)])
        assert torch.equal(rows, torch.cat([tensor[3:last], tensor[:1]]))
        assert folder.rows(name, []).shape == (0, *tensor.shape[1:])
    tokens = torch.randint(VOCAB, (2, 20))
    model = load_pretrained(tmp_path, what="test", device=CPU, dtype=torch.float32)
    truth = final_hidden(load_pretrained(tmp_path / "plain", what="test", device=CPU, dtype=torch.float32), tokens)
    torch.testing.assert_close(final_hidden(model, tokens), truth, rtol=1e-5, atol=1e-5)
    x = tokens
    for stage in range(2):
        x = TeacherStage.load(tmp_path, stage=stage, stages=2, dtype=torch.float32, device=CPU)(x)
    torch.testing.assert_close(x, truth, rtol=1e-5, atol=1e-5)
    name, shape = "model.layers.2.mlp.up_proj.weight", (96, 64)
    start = InitialWeights(tmp_path, config, vocab_size=VOCAB).read(name, shape, 100, 5000)
    torch.testing.assert_close(start, plain[name].flatten()[100:5000], rtol=1e-6, atol=0)


def test_each_expert_has_its_own_scales_and_the_folder_its_own_fingerprint(tmp_path: Path) -> None:
    plain = _write(tmp_path, "fp8", "mixtral")
    layer = TeacherStage.load(tmp_path, stage=0, stages=1, dtype=torch.float32, device=CPU).decoder.layers[1]
    block = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(layer.mlp.experts.down_proj[2], plain[f"{block}.w2.weight"])
    assert torch.equal(layer.mlp.experts.gate_up_proj[2, 96:], plain[f"{block}.w3.weight"])
    before = teacher_fingerprint(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    tensors[f"{block}.w3.weight_scale_inv"] *= 2
    save_file(tensors, tmp_path / SINGLE_FILE)
    assert teacher_fingerprint(tmp_path) != before


def test_float8_is_dequantised_as_transformers_does() -> None:
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(finegrained, "Fp8Dequantize"):
        pytest.skip("this transformers dequantises elsewhere")
    theirs = finegrained.Fp8Dequantize(None)._dequantize_one
    weight = torch.randn(96, 64) * 0.1
    for quantise, suffix in ((_blocks, "_scale_inv"), (_rows, "_scale")):
        parts, ours = quantise("w", weight)
        torch.testing.assert_close(theirs(parts["w"], parts[f"w{suffix}"], torch.float32), ours, rtol=1e-6, atol=0)


def test_mxfp4_is_dequantised_as_transformers_does() -> None:
    """Theirs are an expert's matrices, which gpt-oss has turned."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts, ours = _mxfp4("w", torch.randn(3, 8, 96) * 0.1, packed=False)
    theirs = convert_moe_packed_tensors(parts["w_blocks"], parts["w_scales"], dtype=torch.float32)
    assert torch.equal(theirs.transpose(1, 2), ours)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({}, "quant_method is null; weights may be quantised by fp8, fbgemm_fp8, compressed-tensors, mxfp4"),
        ([], "quant_method is null"),
        (
            {"quant_method": "hqq"},
            "quant_method is 'hqq'; weights may be .* mxfp4, gptq, awq, bitsandbytes: name",
        ),
        ({"quant_method": ["fp8"]}, "quant_method is"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'; supported is e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size '\[0, 128\]'"),
        ({"quant_method": "fp8", "weight_block_size": [True, 128]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [1 << 62, 1]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
        (_compressed() | {"format": "pack-quantized"}, "has the format 'pack-quantized'"),
        (_compressed() | {"format": "mixed-precision"}, "has the format 'mixed-precision'; supported are"),
        (_compressed(num_bits="8"), "has the format 'float-quantized'; supported are"),
        (_mixed(format="pack-quantized"), "has the format 'float-quantized'; supported are"),
        (_mixed(weights={"num_bits": 8, "type": "int"}), "has the format 'float-quantized'; supported are"),
        (_compressed() | {"transform_config": {"config_groups": {"R1": {}}}}, "has transform_config"),
        (INT4 | {"config_groups": {"a": _int4(), "b": _int4(symmetric=False)}}, "has symmetric"),
        (INT4 | {"config_groups": {"a": _int4(symmetric="no")}}, "has symmetric"),
        (INT4 | {"config_groups": {"a": _int4(), "b": _int4(num_bits=8)}}, "supported are"),
        (INT4 | {"config_groups": {"a": _int4(num_bits=3)}}, "supported are"),
        (INT4 | {"config_groups": {"a": _int4(strategy="block")}}, "strategy .*block.*; supported is group, channel"),
        (INT4 | {"config_groups": {"a": _int4(strategy="tensor", symmetric=False)}}, "strategy 'tensor'"),
        (INT4 | {"format": "int-quantized"}, "has the format 'int-quantized'; supported are"),
        (INT4 | {"format": "marlin-24"}, "has the format 'marlin-24'; supported are"),
        (GPTQ | {"bits": 3}, "has bits '3'; supported is 2, 4 or 8"),
        (GPTQ | {"bits": True}, "has bits 'True'"),
        (GPTQ | {"bits": [4]}, "has bits"),
        (GPTQ | {"group_size": 0}, "has group_size '0'; supported is a number such as 128, or -1"),
        (GPTQ | {"group_size": 1 << 40}, "has group_size"),
        (GPTQ | {"checkpoint_format": "marlin"}, "has checkpoint_format 'marlin'; supported is gptq or gptq_v2"),
        (GPTQ | {"is_marlin_format": True}, "has checkpoint_format 'marlin'"),
        (GPTQ | {"pack_dtype": "int16"}, "has pack_dtype 'int16'; supported is int32"),
        (GPTQ | {"dynamic": {"-:.*mlp": {}, "+:.*attn": {"bits": 8}}}, "has dynamic .*; supported is the same bits"),
        (AWQ | {"version": "gemv"}, "has version 'gemv'; supported is gemm"),
        (AWQ | {"version": 4}, "has version '4'"),
        (AWQ | {"bits": 8}, "has bits '8'; supported is 4"),
        (AWQ | {"zero_point": False}, "has zero_point 'False'; supported is true"),
        (AWQ | {"backend": "llm-awq"}, "has backend 'llm-awq'"),
        ({"quant_method": "bitsandbytes"}, "has load_in_4bit, load_in_8bit .*; supported is one of them, true"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True}, "has load_in_4bit"),
        (_compressed() | {"format": {"a": 1}}, "has the format"),
        (_compressed() | {"config_groups": None}, "has the format 'float-quantized'; supported are"),
        (_compressed() | {"config_groups": {"group_0": "x"}}, "supported are"),
        (_compressed(num_bits=4) | {"format": "float-quantized"}, "supported are"),
        (_compressed(num_bits=[8]), "supported are"),
        (_compressed(symmetric=False), "symmetric 'False'"),
        (_compressed(strategy="block", block_structure=[-1, 128]), "weight_block_size"),
        (_compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ],
)
def test_another_quantisation_is_refused_in_one_line(quantization: Any, words: str, tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    _configure(tmp_path, quantization)
    for read in (lambda: load_config(tmp_path, what="teacher.path"), lambda: SafetensorsFolder(tmp_path)):
        with pytest.raises(UserError, match=words) as refused:
            read()
        assert "\n" not in str(refused.value)


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"

DAMAGES: list[tuple[str, dict[str, Tensor | None], str]] = [
    ("fp8", {f"{UP}_scale_inv": None}, f"{UP} in .* is stored as F8_E4M3: quantised weights are read only with their"),
    ("fp8", {f"{UP}_scale_inv": torch.ones(2, 3)}, r"F8_E4M3 \[96, 64\] and .*F32 \[2, 3\] are no float8 weight"),
    ("fp8", {f"{UP}_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, "I32"),
    ("fp8", {f"{UP}_scale_inv": torch.ones(())}, r"F32 \[\]"),
    ("fp8", {UP: torch.ones(96, 64)}, r"up_proj.weight F32 \[96, 64\]"),
    ("fp8", {UP: torch.ones(96 * 64).to(FLOAT8)}, r"F8_E4M3 \[6144\]"),
    ("fp8", {UP: torch.ones(96, 32).to(FLOAT8)}, "are no float8 weight"),
    ("fbgemm_fp8", {f"{UP}_scale": torch.ones(64, 1)}, r"F32 \[64, 1\]"),
    ("compressed-tensors, tensor", {f"{UP}_zero_point": torch.zeros(1)}, "does not have: .*zero_point"),
    ("mxfp4", {f"{UP}_scales": None}, "has no tensor .*up_proj.weight"),
    ("mxfp4", {f"{UP}_scales": torch.zeros(96, 3, dtype=torch.uint8)}, r"U8 \[96, 3\] are no mxfp4 weight"),
    ("mxfp4", {f"{UP}_blocks": torch.zeros(96, 2, 17, dtype=torch.uint8)}, r"\[96, 2, 17\]"),
    (
        "mxfp4",
        {f"{UP}_scales": torch.zeros(64, 2, dtype=torch.uint8), f"{UP}_blocks": torch.zeros(64, 2, 16).byte()},
        r"is \[64, 64\], but its config.json says \[96, 64\]",
    ),
    ("mxfp4", {f"{UP}_scales": torch.zeros((), dtype=torch.uint8)}, r"U8 \[\]"),
    (
        "mxfp4",  # of one axis: its rows would be single numbers
        {NORM: None, f"{NORM}_blocks": torch.zeros(2, 16).byte(), f"{NORM}_scales": torch.zeros(2).byte()},
        r"U8 \[2\] are no mxfp4 weight",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "words"), DAMAGES)
def test_parts_that_do_not_fit_are_refused_by_their_headers(
    kind: str, changes: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    _write(tmp_path, kind)
    tensors: dict[str, Tensor | None] = {**load_file(tmp_path / SINGLE_FILE), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / SINGLE_FILE)
    with pytest.raises(UserError, match=words) as refused:
        check_weights(tmp_path, load_config(tmp_path, what="test"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "part", "value"),
    [
        ("fp8", f"{UP}_scale_inv", torch.full((2, 2), torch.nan)),
        ("fp8", f"{UP}_scale_inv", torch.full((2, 2), 3e38)),
        ("fp8", UP, torch.full((96, 64), torch.nan).to(FLOAT8)),
        ("mxfp4", f"{UP}_scales", torch.full((96, 2), 255, dtype=torch.uint8)),
    ],
)
def test_numbers_that_are_not_finite_are_refused_when_they_are_read(
    kind: str, part: str, value: Tensor, tmp_path: Path
) -> None:
    _write(tmp_path, kind)
    save_file({**load_file(tmp_path / SINGLE_FILE), part: value}, tmp_path / SINGLE_FILE)
    folder = SafetensorsFolder(tmp_path)
    reads: list[Callable[[], object]] = [lambda: next(folder.tensors([UP])), lambda: folder.rows(UP, [(0, 4)])]
    for read in reads:
        with pytest.raises(UserError, match=f"{UP} in .* is not finite times its scales"):
            read()


def test_a_config_that_says_quantised_where_nothing_is_is_refused(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    _configure(tmp_path, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(UserError, match="has a quantization_config, but no tensor is quantised"):
        check_weights(tmp_path, load_config(tmp_path, what="test"))


def test_one_quantised_tensor_is_in_float32_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, "fp8", "mixtral")
    sizes: list[int] = []
    real = SafetensorsFolder._decoded

    def decoded(self: SafetensorsFolder, *arguments: Any) -> Tensor:
        sizes.append(real(self, *arguments).numel())
        return real(self, *arguments)

    monkeypatch.setattr(SafetensorsFolder, "_decoded", decoded)
    TeacherStage.load(tmp_path, stage=1, stages=5, dtype=torch.bfloat16, device=CPU)
    assert max(sizes) == 96 * 64, "an expert's matrix, not the layer's"
    assert len(sizes) == 4 + 3 * 4
