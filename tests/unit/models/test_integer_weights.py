"""Weights of 2 to 8 bits: each way of packing them, exactly; what is read for a few rows, and the memory that it takes.

The truth is packed number by number in `integer_forms`, and by the libraries where they are installed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.models.hf_folder import SINGLE_FILE, SafetensorsFolder
from megadistill.models.quantized import codebook, integer_weights
from megadistill.models.weights import check_weights
from tests.unit.models import integer_forms
from tests.unit.models.cases import saved_model

NOT_INSTALLED = "is not installed: pip install -e '.[oracles]'"
WEAK: Any = StorageWeakRef
NAME = "model.layers.0.mlp.up_proj.weight"

Parts = integer_forms.Parts


def _gptq(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 16, **settings}


def _compressed(form: str, bits: int, *, symmetric: bool = True, strategy: str = "group") -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


def _pack(bits: int = 4, **settings: Any) -> dict[str, Any]:
    return _compressed("pack-quantized", bits, **settings)


FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True}

CASES: dict[str, tuple[dict[str, Any], str, tuple[int, int], dict[str, Any]]] = {
    "gptq": (_gptq(), "gptq", (40, 96), {}),
    "gptq, 2 bits": (_gptq(bits=2), "gptq", (40, 96), {"bits": 2}),
    "gptq, 8 bits": (_gptq(bits=8), "gptq", (40, 96), {"bits": 8}),
    "gptq, symmetric": (_gptq(sym=True), "gptq", (40, 96), {"symmetric": True}),
    "gptq, activation order": (_gptq(desc_act=True), "gptq", (40, 96), {"ordered": True}),
    "gptq, version 2": (_gptq(checkpoint_format="gptq_v2"), "gptq", (40, 96), {"version": 2}),
    "gptq, version 2, named by format": (_gptq(format="gptq_v2"), "gptq", (40, 96), {"version": 2}),
    "gptq, whole rows": (_gptq(group_size=-1), "gptq", (40, 96), {"size": 96}),
    "gptq, a short last group": (_gptq(group_size=40), "gptq", (40, 96), {"size": 40}),
    "gptq, a short last group, not listed": (_gptq(group_size=40), "gptq", (40, 96), {"size": 40, "listed": False}),
    "gptq, modules left out": (_gptq(dynamic={"-:.*mlp.gate": {}}), "gptq", (40, 96), {}),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM"}, "awq", (40, 96), {}),
    "awq, whole rows": ({"quant_method": "awq", "group_size": -1}, "awq", (40, 96), {"size": 96}),
    "packed": (_pack(), "packed_integers", (40, 96), {}),
    "packed, 8 bits": (_pack(8), "packed_integers", (40, 96), {"bits": 8}),
    "packed, rows": (_pack(strategy="channel"), "packed_integers", (40, 96), {"size": None}),
    "packed, zero points": (_pack(symmetric=False), "packed_integers", (42, 96), {"symmetric": False}),
    "packed, activation order": (_pack(), "packed_integers", (40, 96), {"ordered": True}),
    "packed, words filled up": (_pack(symmetric=False), "packed_integers", (3, 100), {"size": 20, "symmetric": False}),
    "packed, float32": (_pack(), "packed_integers", (40, 96), {"dtype": torch.float32}),
    "int8": (_compressed("int-quantized", 8, strategy="channel"), "integers", (40, 96), {}),
    "int8, zero points": (
        _compressed("int-quantized", 8, strategy="channel", symmetric=False),
        "integers",
        (40, 96),
        {"symmetric": False},
    ),
    "int8, whole": (_compressed("int-quantized", 8, strategy="tensor"), "integers", (40, 96), {"whole": True}),
    "LLM.int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "llm_int8", (40, 96), {}),
    "LLM.int8 of 2023": ({"load_in_8bit": True, "load_in_4bit": False}, "llm_int8", (40, 96), {}),
    "nf4": (FOUR, "four_bits", (40, 96), {}),
    "fp4": (FOUR, "four_bits", (40, 96), {"kind": "fp4"}),
    "nf4, nested": (FOUR, "four_bits", (40, 96), {"nested": True}),
    "nf4, in bfloat16": (FOUR, "four_bits", (40, 96), {"storage": torch.bfloat16}),
    "nf4, an odd number of columns": (FOUR, "four_bits", (41, 33), {"nested": True}),
}


def _write(folder: Path, config: dict[str, Any], parts: Parts) -> None:
    save_file({name: part.contiguous() for name, part in parts.items()}, folder / SINGLE_FILE)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))


def _case(kind: str, folder: Path) -> Tensor:
    """A folder of one tensor, and its numbers."""
    config, writer, shape, settings = CASES[kind]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.1 + 0.02
    values: Tensor
    parts, values = getattr(integer_forms, writer)(NAME, weight, **settings)
    _write(folder, config, parts)
    assert (values - weight).abs().max() < 0.2, "the truth is near the weight"
    return values


@pytest.mark.parametrize("kind", CASES)
def test_each_packing_gives_its_numbers_to_the_last_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = _case(kind, tmp_path)
    last = len(values)
    for chunk in (1 << 22, 250):  # the second: a few rows, and a few blocks that are no rows
        monkeypatch.setattr(integer_weights, "CHUNK", chunk)
        monkeypatch.setattr(codebook, "CHUNK", chunk)
        for mapped in (True, False):
            folder = SafetensorsFolder(tmp_path, mapped=mapped)
            assert (folder.names, folder.shape(NAME), folder.dtype(NAME)) == ([NAME], values.shape, torch.float32)
            assert torch.equal(next(folder.tensors([NAME])), values)
            rows = folder.rows(NAME, [(1, last - 1), (last - 1, last), (0, 2), (2, 2)])
            assert torch.equal(rows, torch.cat([values[1:], values[:2]]))
            assert folder.rows(NAME, []).shape == (0, values.shape[1])


def test_the_first_version_of_gptq_stores_zero_points_less_one(tmp_path: Path) -> None:
    """The middle of 4 bits, 8, is a 7: with the second version's reading every number would be one step off."""
    parts, values = integer_forms.gptq(NAME, torch.randn(8, 32), symmetric=True)
    assert set(parts["model.layers.0.mlp.up_proj.qzeros"].flatten().tolist()) == {0x77777777}
    _write(tmp_path, _gptq(checkpoint_format="gptq_v2"), parts)
    step = parts["model.layers.0.mlp.up_proj.scales"].float().T.repeat_interleave(16, dim=1)
    torch.testing.assert_close(next(SafetensorsFolder(tmp_path).tensors([NAME])), values + step)


def test_a_zero_point_of_zero_borrows_from_its_word(tmp_path: Path) -> None:
    """Weights that are all positive have it; gptqmodel subtracts one from each number of a word at once."""
    parts, values = integer_forms.gptq(NAME, torch.rand(16, 32) + 1)
    assert -0x11111111 in parts["model.layers.0.mlp.up_proj.qzeros"].flatten().tolist()
    _write(tmp_path, _gptq(), parts)
    assert torch.equal(next(SafetensorsFolder(tmp_path).tensors([NAME])), values)


@pytest.mark.parametrize(("writer", "word"), [("gptq", 1), ("awq", 8)])
def test_of_weights_stored_by_columns_a_range_of_each_line_is_read(writer: str, word: int, tmp_path: Path) -> None:
    weight = torch.randn(24576, 32)
    parts, values = getattr(integer_forms, writer)(NAME, weight)
    _write(tmp_path, {"quant_method": writer, "bits": 4, "group_size": 16}, parts)
    ranges = [(20000, 20008), (16, 24), (8, 16)]
    folder = SafetensorsFolder(tmp_path, mapped=False)
    assert torch.equal(folder.rows(NAME, ranges), torch.cat([values[start:stop] for start, stop in ranges]))
    stored = parts["model.layers.0.mlp.up_proj.qweight"]
    others = sum(part.nbytes for part in parts.values()) - stored.nbytes
    assert folder.bytes_read == others + (8 + 16) // word * stored.shape[0] * 4
    folder.rows(NAME, [(0, 8), (1000, 1008)])  # less than a page is between them
    if writer == "gptq":
        assert folder.bytes_read == 2 * others + (8 + 16 + 1008) * stored.shape[0] * 4


@pytest.mark.parametrize("kind", ["packed, zero points", "nf4, nested", "LLM.int8"])
def test_of_weights_stored_by_rows_only_those_are_read(kind: str, tmp_path: Path) -> None:
    values = _case(kind, tmp_path)
    bits = 8 if kind == "LLM.int8" else 4
    folder = SafetensorsFolder(tmp_path, mapped=False)
    folder.rows(NAME, [(4, 8)])
    once = folder.bytes_read
    folder.rows(NAME, [(4, 8), (12, 20)])
    assert folder.bytes_read - 2 * once == 8 * values.shape[1] * bits // 8


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are alive at once, of those that operations make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        for each in made if isinstance(made, list | tuple) else [made]:
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self._alive[storage._cdata] = WEAK(storage), storage.nbytes()
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        self.bytes = max(self.bytes, sum(nbytes for _, nbytes in self._alive.values()))
        return made


WRITERS: dict[str, tuple[dict[str, Any], Callable[[Tensor], tuple[Parts, Tensor]]]] = {
    "gptq": (_gptq(group_size=128), lambda weight: integer_forms.gptq(NAME, weight, size=128, ordered=True)),
    "awq": ({"quant_method": "awq", "group_size": 128}, lambda weight: integer_forms.awq(NAME, weight, size=128)),
    "packed": (_pack(symmetric=False), lambda w: integer_forms.packed_integers(NAME, w, size=128, symmetric=False)),
    "nf4": (FOUR, lambda weight: integer_forms.four_bits(NAME, weight, block=256)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_memory_is_the_tensor_and_a_chunk(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, writer = WRITERS[kind]
    parts, values = writer(torch.randn(512, 512))
    _write(tmp_path, config, parts)
    chunk = 1 << 13
    monkeypatch.setattr(integer_weights, "CHUNK", chunk)
    monkeypatch.setattr(codebook, "CHUNK", chunk)
    monkeypatch.setattr("megadistill.models.hf_folder.CHUNK", chunk)
    tensors = SafetensorsFolder(tmp_path).tensors([NAME])
    with _Peak() as peak:
        tensor = next(tensors)
    assert torch.equal(tensor, values)
    stored = sum(part.nbytes for part in parts.values())
    # Scales and zero points of a chunk, and the chunk in 1, 4 and 8 bytes a number.
    assert tensor.nbytes < peak.bytes < tensor.nbytes + 2 * stored + 24 * chunk


UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj.weight"

DAMAGES: list[tuple[str, dict[str, Tensor | None], str]] = [
    ("gptq", {f"{UP}.scales": None}, "has no tensor .*up_proj.weight"),
    ("gptq", {f"{UP}.qzeros": None}, r"qweight I32 \[8, 96\] and .*scales F16 \[4, 96\] and .* are no gptq weight"),
    ("gptq", {f"{UP}.qzeros": torch.zeros(4, 13, dtype=torch.int32)}, r"I32 \[4, 13\]"),
    ("gptq", {f"{UP}.qzeros": torch.zeros(4, 12, dtype=torch.int64)}, r"I64 \[4, 12\]"),
    ("gptq", {f"{UP}.scales": torch.ones(2, 96)}, r"F32 \[2, 96\]"),
    ("gptq", {f"{UP}.scales": torch.ones(4, 96, dtype=torch.int32)}, r"I32 \[4, 96\] and .* are no gptq weight"),
    ("gptq", {f"{UP}.qweight": torch.zeros(8, 96, dtype=torch.int16)}, r"I16 \[8, 96\]"),
    ("gptq", {f"{UP}.qweight": torch.zeros(8, 0, dtype=torch.int32)}, r"I32 \[8, 0\]"),
    ("gptq", {f"{UP}.qweight": torch.zeros(768, dtype=torch.int32)}, r"I32 \[768\]"),
    ("gptq", {f"{UP}.g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx I32 \[63\]"),
    ("gptq", {f"{UP}.g_idx": torch.zeros(64)}, r"g_idx F32 \[64\]"),
    ("gptq", {f"{UP}.weight": torch.zeros(96, 64)}, r"up_proj.weight' plain and quantised \(.*qweight'\)"),
    ("gptq", {f"{UP}.bias": torch.full((96,), 0.1)}, "does not have: .*up_proj.bias"),
    ("awq", {f"{UP}.qzeros": None}, "are no awq weight"),
    ("awq", {f"{UP}.scales": torch.ones(3, 96).half()}, r"F16 \[3, 96\]"),
    ("awq", {f"{UP}.bias": torch.zeros(96)}, "does not have: .*up_proj.bias"),
    ("packed", {f"{UP}.weight_shape": None}, "are no pack-quantized weight"),
    ("packed", {f"{UP}.weight_shape": torch.tensor([96, 1 << 40])}, "weight_shape I64"),
    ("packed", {f"{UP}.weight_shape": torch.tensor([96, -64])}, "weight_shape I64"),
    ("packed", {f"{UP}.weight_shape": torch.tensor([64, 64])}, "weight_shape I64"),
    ("packed", {f"{UP}.weight_shape": torch.tensor([96, 64, 1])}, r"weight_shape I64 \[3\]"),
    ("packed", {f"{UP}.weight_shape": torch.tensor([96.0, 64.0])}, r"weight_shape F32"),
    ("packed", {f"{UP}.weight_shape": torch.tensor([96, 60])}, r"is \[96, 60\], but its config.json says \[96, 64\]"),
    ("packed", {f"{UP}.weight_scale": torch.ones(96, 5)}, r"F32 \[96, 5\]"),
    ("packed", {f"{UP}.weight_zero_point": torch.zeros(12, 4, dtype=torch.int32)}, "does not have: .*zero_point"),
    ("int8", {f"{UP}.weight_zero_point": torch.zeros(96, 1)}, r"zero_point F32 \[96, 1\]"),
    (
        "int8",
        {
            f"{UP}.weight_scale": torch.ones(1, 1, 1),
            f"{UP}.weight_zero_point": torch.zeros(1, 1, 1, dtype=torch.int8),
        },
        r"F32 \[1, 1, 1\]",
    ),
    ("LLM.int8", {f"{UP}.SCB": torch.ones(95)}, r"SCB F32 \[95\]"),
    ("LLM.int8", {f"{UP}.SCB": None}, "stored as I8: quantised weights are read only with their scales"),
    ("LLM.int8", {f"{UP}.weight_format": torch.tensor(1, dtype=torch.uint8)}, "weight_format U8"),
    ("LLM.int8", {f"{UP}.weight_format": torch.zeros(1 << 10, dtype=torch.uint8)}, "weight_format U8"),
    ("nf4", {f"{UP}.weight.quant_state.bitsandbytes__nf4": None}, "are no bitsandbytes_4bit weight"),
    ("nf4", {f"{UP}.weight.absmax": torch.ones(95)}, r"absmax F32 \[95\]"),
    ("nf4", {f"{UP}.weight.quant_map": torch.ones(15)}, r"quant_map F32 \[15\]"),
    ("nf4", {f"{UP}.weight": torch.zeros(3073, 1, dtype=torch.uint8)}, r"weight U8 \[3073, 1\]"),
    ("nf4", {f"{UP}.weight": torch.zeros(3072, dtype=torch.uint8)}, r"weight U8 \[3072\]"),
]  # fmt: skip
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"
STATES = [
    b"",
    b"{",
    b"[]",
    b"[" * 4000,
    b"{}",
    b'{"shape": [96, 64]}',
    b'{"shape": [96, 64], "blocksize": 0}',
    b'{"shape": [96, 64], "blocksize": true}',
    b'{"shape": [96, 64], "blocksize": -64}',
    b'{"shape": [96, 64], "blocksize": 1e2}',
    b'{"shape": [96, 0], "blocksize": 64}',
    b'{"shape": [96, -64], "blocksize": 64}',
    b'{"shape": [6144], "blocksize": 64}',
    b'{"shape": "96", "blocksize": 64}',
    b'{"shape": [1e999, 1], "blocksize": 64}',
    b'{"shape": [99999999999999999999, 9999999999999999], "blocksize": 64}',
    b'{"shape": [96, 64], "blocksize": 64, "nested_blocksize": 256, "nested_offset": NaN}',
    b'{"shape": [96, 64], "blocksize": 64, "nested_blocksize": 256, "nested_offset": "0"}',
    b'{"shape": [96, 64], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.5}',
    b" " * 5000 + b'{"shape": [96, 64], "blocksize": 64}',
    b"\xff\xfe",
]
"""Texts beside a weight that are none, or that say another weight."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Parts]]:
    """A small model in each of the forms that `DAMAGES` changes."""
    made: dict[str, tuple[Path, Parts]] = {}
    for kind in ("gptq", "awq", "packed", "int8", "LLM.int8", "nf4"):
        folder = tmp_path_factory.mktemp("model")
        saved_model("llama", folder)
        quantise = getattr(integer_forms, CASES[kind][1])
        tensors = load_file(folder / SINGLE_FILE)
        for name in (f"{UP}.weight", DOWN):
            tensors |= quantise(name, tensors.pop(name), **CASES[kind][3])[0]
        made[kind] = folder, tensors
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CASES[kind][0]}))
    return made


def _check(folders: dict[str, tuple[Path, Parts]], kind: str, changes: dict[str, Tensor | None]) -> SafetensorsFolder:
    folder, tensors = folders[kind]
    changed = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / SINGLE_FILE)
    check_weights(folder, load_config(folder, what="test"))
    return SafetensorsFolder(folder)


@pytest.mark.parametrize(("kind", "changes", "words"), DAMAGES)
def test_parts_that_do_not_fit_are_refused_by_their_headers(
    folders: dict[str, tuple[Path, Parts]], kind: str, changes: dict[str, Tensor | None], words: str
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        _check(folders, kind, changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", STATES)
def test_a_text_that_says_another_weight_is_refused(folders: dict[str, tuple[Path, Parts]], content: bytes) -> None:
    changes: dict[str, Tensor | None] = {STATE: torch.tensor(list(content), dtype=torch.uint8)}
    with pytest.raises(UserError, match="are no bitsandbytes_4bit weight") as refused:
        _check(folders, "nf4", changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["gptq", "awq", "packed", "int8", "LLM.int8", "nf4"])
def test_a_folder_as_it_is_passes_and_a_bias_of_zeros_of_gptq_is_left_out(
    folders: dict[str, tuple[Path, Parts]], kind: str
) -> None:
    folder = _check(folders, kind, {f"{UP}.bias": torch.zeros(96).half()} if kind == "gptq" else {})
    assert sorted(folder.quantised) == [DOWN, f"{UP}.weight"]


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (4, "a column has the group 4, of groups 0 to 3"),
        (-1, "the group -1, of groups 0 to 3"),
        (0, "all columns have the group 0, of groups 0 to 3"),
    ],
)
def test_a_group_that_is_none_is_refused_when_it_is_read(
    folders: dict[str, tuple[Path, Parts]], group: int, words: str
) -> None:
    changes: dict[str, Tensor | None] = {f"{UP}.g_idx": torch.tensor([0, group] * 32, dtype=torch.int32)}
    folder = _check(folders, "gptq", changes)
    with pytest.raises(UserError, match=f"up_proj.weight in .*: .*{words}: download") as refused:
        next(folder.tensors([f"{UP}.weight"]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["gptq", "packed", "LLM.int8", "nf4"])
def test_a_scale_that_is_not_finite_is_refused_when_it_is_read(
    folders: dict[str, tuple[Path, Parts]], kind: str
) -> None:
    ends = (".scales", "_scale", ".SCB", ".absmax")
    (scales,) = [name for name in folders[kind][1] if name.startswith(UP) and name.endswith(ends)]
    damaged = folders[kind][1][scales].clone(memory_format=torch.contiguous_format)
    damaged.flatten()[-1:] = torch.inf
    assert not damaged.isfinite().all()
    folder = _check(folders, kind, {scales: damaged})
    with pytest.raises(UserError, match="is not finite times its scales"):
        next(folder.tensors([f"{UP}.weight"]))


def test_columns_without_a_group_are_in_order(tmp_path: Path) -> None:
    """compressed-tensors: a weight that was quantised without an order keeps the -1 that its groups began with."""
    parts, values = integer_forms.packed_integers(NAME, torch.randn(8, 64))
    _write(tmp_path, _pack(), parts | {f"{NAME}_g_idx": torch.full((64,), -1, dtype=torch.int32)})
    assert torch.equal(next(SafetensorsFolder(tmp_path).tensors([NAME])), values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers_are_those_of_compressed_tensors(bits: int, symmetric: bool, tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors", reason=f"compressed-tensors {NOT_INSTALLED}")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    assert library
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    weight = torch.randn(40, 96)
    shift = 1 << bits - 1
    groups = integer_forms.column_groups(96, 16, shuffled=False)
    _, scales, zeros = integer_forms.grouped(weight, groups, bits, torch.bfloat16, symmetric=symmetric)
    state = {"weight": weight.bfloat16(), "weight_scale": scales}
    if not symmetric:
        state["weight_zero_point"] = (zeros - shift).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress(state, scheme)
    theirs = compressor.decompress(stored, scheme)["weight"]
    _write(tmp_path, _pack(bits, symmetric=symmetric), {f"{NAME[:-6]}{name}": part for name, part in stored.items()})
    assert torch.equal(next(SafetensorsFolder(tmp_path).tensors([NAME])).bfloat16(), theirs)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_four_bits_are_those_of_bitsandbytes(kind: str, nested: bool, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason=f"bitsandbytes {NOT_INSTALLED}")
    weight = torch.randn(96, 64)
    values, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    parts = {NAME: values} | {f"{NAME}.{key}": part for key, part in state.as_dict(packed=True).items()}
    _write(tmp_path, FOUR, parts)
    ours = next(SafetensorsFolder(tmp_path).tensors([NAME]))
    assert torch.equal(ours, functional.dequantize_4bit(values, state))


def test_eight_bits_are_those_of_bitsandbytes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason=f"bitsandbytes {NOT_INSTALLED}")
    values, scales, _ = functional.int8_vectorwise_quant(torch.randn(96, 64).half())
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    _write(tmp_path, config, {NAME: values, f"{NAME.removesuffix('.weight')}.SCB": scales})
    ours = next(SafetensorsFolder(tmp_path).tensors([NAME]))
    assert torch.equal(ours, functional.int8_vectorwise_dequant(values, scales))
