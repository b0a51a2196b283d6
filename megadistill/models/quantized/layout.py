"""The quantisation that a config.json says of a folder's weights: names of each tensor's parts, bits, groups, blocks.

Scales of activations are not needed: activations are not quantised here. Modules that a config leaves out
(`modules_to_not_convert`, `ignore`, `llm_int8_skip_modules`) have plain tensors, and the names alone tell them apart.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from megadistill.errors import UserError
from megadistill.redaction import printable

Format: TypeAlias = Literal[
    "float8", "mxfp4", "gptq", "awq", "pack-quantized", "int-quantized", "llm_int8", "bitsandbytes_4bit"
]
Role: TypeAlias = Literal[
    "values", "scales", "zeros", "groups", "shape", "code", "state", "nested_scales", "nested_code", "form"
]
"""Part of a quantised tensor: `groups` gives the group of each column, `code` the values that 4 bits stand for."""

MAX_BLOCK: Final = 1 << 20
"""Rows or columns that share a scale."""

FORMS: Final[Mapping[str, str]] = {
    "fp8": "float8 e4m3 with a scale for a block, a row or the tensor",
    "fbgemm_fp8": "float8 e4m3 with a scale for a row",
    "compressed-tensors": "float-quantized (float8), mxfp4-pack-quantized, pack-quantized (4 and 8 bits, groups or "
    "rows, zero points, activation order) and int-quantized (int8), one of them for all modules",
    "mxfp4": "e2m1 with an e8m0 scale for 32 numbers",
    "gptq": "2, 4 and 8 bits, formats gptq and gptq_v2, activation order, symmetric or not",
    "awq": "4 bits, version gemm, with zero points",
    "bitsandbytes": "LLM.int8() and 4 bits (nf4, fp4), their scales quantised again or not",
}
"""`quant_method` of a config -> what is read of it."""

_NOT_WEIGHTS: Final = (
    ".input_scale",
    ".output_scale",
    ".activation_scale",
    ".input_scale_ub",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)
"""Ends of the names of scales that belong to activations or to a cache of keys and values."""

QuantisedTensor: TypeAlias = Mapping[Role, str]
"""Names of a quantised tensor's parts: values and scales, and those of the others that the folder has."""


@dataclass(frozen=True)
class Quantisation:
    """The way in which a folder's weights are quantised."""

    format: Format
    parts: Mapping[Role, Sequence[str]]
    """Ends of the parts' names behind a common beginning: writers of one method give them unlike names."""
    own: str = ""
    """End of the tensor's own name behind the same beginning."""
    block: tuple[int, int] | None = None
    """float8: rows and columns that share a scale; None: a scale for a row, or for the tensor."""
    bits: int = 8
    """Bits of a number."""
    group: int | None = None
    """gptq and awq: columns that share a scale; None: all of a row."""
    zeros_less_one: bool = False
    """Stored zero points are one less than they are."""
    turned: bool = False
    """mxfp4: matrices of stacked experts [E, N, K] are stored as [E, K, N]."""

    def tensors(self, names: Collection[str]) -> dict[str, QuantisedTensor]:
        """Name -> parts of each quantised tensor of a folder with tensors of these `names`."""
        known = set(names)
        (values,) = self.parts["values"]
        beginnings = {
            stored.removesuffix(end)
            for end in self.parts["scales"]
            for stored in known
            if stored.endswith(end) and stored.removesuffix(end) + values in known
        }
        return {
            beginning + self.own: {
                role: beginning + end for role, ends in self.parts.items() for end in ends if beginning + end in known
            }
            for beginning in beginnings
        }

    def visible(self, names: Collection[str]) -> set[str]:
        """Names of the model's tensors: without the parts of those that are quantised, and without other scales."""
        quantised = self.tensors(names)
        parts = {part for each in quantised.values() for part in each.values()}
        return {name for name in names if name not in parts and not name.endswith(_NOT_WEIGHTS)} | quantised.keys()


def read_quantisation(value: Any, what: str) -> Quantisation | None:
    """The `quantization_config` of a config; None where there is none.

    Raises:
        UserError: a method, or a setting of one, that is not supported; `what` is the config.
    """
    if value is None:
        return None
    settings = value if isinstance(value, Mapping) else {}
    method = settings.get("quant_method")
    if method is None and any(settings.get(key) is True for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"  # transformers of 2023 wrote no method
    if method == "fp8":
        _require(settings.get("fmt") in (None, "e4m3"), what, "fmt", settings.get("fmt"), "e4m3")
        # Both numbers multiply the weight: "inv" of transformers and DeepSeek, the other of AutoFP8 and vLLM.
        return _float8(("_scale_inv", "_scale"), _block(settings.get("weight_block_size"), what))
    if method == "fbgemm_fp8":
        return _float8(("_scale",))
    if method == "mxfp4":
        return Quantisation("mxfp4", {"values": ("_blocks",), "scales": ("_scales",)}, bits=4, turned=True)
    if method == "compressed-tensors":
        return _compressed(settings, what)
    if method == "gptq":
        return _gptq(settings, what)
    if method == "awq":
        return _awq(settings, what)
    if method == "bitsandbytes":
        return _bitsandbytes(settings, what)
    raise UserError(
        f"{what}: quantization_config.quant_method is {_quoted(method)}; weights may be quantised by "
        f"{', '.join(FORMS)}: name a folder with bfloat16 or float32 weights"
    )


def _float8(scales: Sequence[str], block: tuple[int, int] | None = None) -> Quantisation:
    return Quantisation("float8", {"values": ("",), "scales": scales}, block=block)


def _gptq(settings: Mapping[str, Any], what: str) -> Quantisation:
    # The older key wins, as in transformers.
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format"):
        form = "marlin"
    _require(form in ("gptq", "gptq_v2"), what, "checkpoint_format", form, "gptq or gptq_v2")
    bits: Any = settings.get("bits")
    _require(type(bits) is int and bits in (2, 4, 8), what, "bits", bits, "2, 4 or 8")
    pack = settings.get("pack_dtype")
    _require(pack in (None, "int32"), what, "pack_dtype", pack, "int32")
    # "-:PATTERN" leaves modules plain, any other pattern gives them other bits or groups.
    dynamic = settings.get("dynamic") or {}
    left_out = isinstance(dynamic, Mapping) and all(str(pattern).startswith("-:") for pattern in dynamic)
    _require(left_out, what, "dynamic", dynamic, "the same bits and groups for all quantised modules")
    parts: dict[Role, Sequence[str]] = {
        "values": (".qweight",),
        "scales": (".scales",),
        "zeros": (".qzeros",),
        "groups": (".g_idx",),
    }
    group = _group(settings, what)
    return Quantisation("gptq", parts, ".weight", bits=bits, group=group, zeros_less_one=form == "gptq")


def _awq(settings: Mapping[str, Any], what: str) -> Quantisation:
    form = settings.get("version") or settings.get("format") or "gemm"
    _require(isinstance(form, str) and form.lower() == "gemm", what, "version", form, "gemm")
    bits = settings.get("bits", 4)
    _require(type(bits) is int and bits == 4, what, "bits", bits, "4")
    _require(settings.get("zero_point") in (None, True), what, "zero_point", settings.get("zero_point"), "true")
    _require(settings.get("backend") != "llm-awq", what, "backend", settings.get("backend"), "autoawq")
    parts: dict[Role, Sequence[str]] = {"values": (".qweight",), "scales": (".scales",), "zeros": (".qzeros",)}
    return Quantisation("awq", parts, ".weight", bits=4, group=_group(settings, what))


def _group(settings: Mapping[str, Any], what: str) -> int | None:
    """Columns that share a scale; transformers' default is 128, and -1 is a whole row."""
    size = settings.get("group_size", 128)
    sound = type(size) is int and (size == -1 or 1 <= size <= MAX_BLOCK)
    _require(sound, what, "group_size", size, "a number such as 128, or -1 for a whole row")
    return None if size == -1 else size


def _bitsandbytes(settings: Mapping[str, Any], what: str) -> Quantisation:
    by_bits = {bits: settings.get(f"load_in_{bits}bit", settings.get(f"_load_in_{bits}bit")) for bits in (4, 8)}
    chosen = [bits for bits, value in by_bits.items() if value is True]
    _require(len(chosen) == 1, what, "load_in_4bit, load_in_8bit", list(by_bits.values()), "one of them, true")
    if chosen == [8]:
        eight: dict[Role, Sequence[str]] = {"values": (".weight",), "scales": (".SCB",), "form": (".weight_format",)}
        return Quantisation("llm_int8", eight, ".weight")
    four: dict[Role, Sequence[str]] = {
        "values": ("",),
        "scales": (".absmax",),
        "code": (".quant_map",),
        "state": (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
        "nested_scales": (".nested_absmax",),
        "nested_code": (".nested_quant_map",),
    }
    return Quantisation("bitsandbytes_4bit", four, bits=4)


_COMPRESSED: Final[Mapping[str, tuple[str, Collection[int]]]] = {
    "float-quantized": ("float", (8,)),
    "mxfp4-pack-quantized": ("float", (4,)),
    "pack-quantized": ("int", (4, 8)),
    "int-quantized": ("int", (8,)),
}
"""Format of compressed-tensors -> type and bits of its weights."""


def _compressed(settings: Mapping[str, Any], what: str) -> Quantisation:
    sparsity = settings.get("sparsity_config") or {}
    dense = isinstance(sparsity, Mapping) and sparsity.get("format") in (None, "dense")
    _require(dense, what, "sparsity_config", sparsity, "dense")
    transform = settings.get("transform_config")
    _require(not transform, what, "transform_config", transform, "no transform of the weights")
    groups = settings.get("config_groups")
    groups = [*groups.values()] if isinstance(groups, Mapping) else []
    weights = [_weights(group) for group in groups]
    # All groups are alike: the tensors do not say which group they belong to.
    kind = settings.get("format")
    numbers, bits = _COMPRESSED.get(kind if isinstance(kind, str) else "", ("", ()))
    alike = all(
        each.get("type") == numbers
        and type(each.get("num_bits")) is int
        and each["num_bits"] in bits
        and each["num_bits"] == weights[0].get("num_bits")
        for each in weights
    )
    own = [group.get("format") for group in groups if isinstance(group, Mapping)]
    if not weights or not alike or any(each not in (None, kind) for each in own):
        raise UserError(
            f"{what}: quantization_config of compressed-tensors has the format {_quoted(kind)}; supported are "
            "float-quantized with 8-bit float weights in all groups, mxfp4-pack-quantized with 4-bit float, "
            "pack-quantized with 4-bit or 8-bit int, int-quantized with 8-bit int: name a folder with bfloat16 or "
            "float32 weights"
        )
    if numbers == "int":
        return _compressed_int(kind, weights, what)
    _require(all(each.get("symmetric") in (None, True) for each in weights), what, "symmetric", False, "true")
    if kind != "float-quantized":
        return Quantisation("mxfp4", {"values": ("_packed",), "scales": ("_scale",)}, bits=4)
    blocks = {_block(each.get("block_structure"), what) for each in weights if each.get("strategy") == "block"}
    _require(len(blocks) <= 1, what, "block_structure", sorted(map(str, blocks)), "one for all groups")
    return _float8(("_scale",), next(iter(blocks), None))


def _compressed_int(kind: Any, weights: Sequence[Mapping[str, Any]], what: str) -> Quantisation:
    strategies = sorted({str(each.get("strategy")) for each in weights})
    _require(set(strategies) <= {"group", "channel", "tensor"}, what, "strategy", strategies, "group, channel, tensor")
    parts: dict[Role, Sequence[str]] = {
        "values": ("_packed",) if kind == "pack-quantized" else ("",),
        "scales": ("_scale",),
        "groups": ("_g_idx",),
    }
    symmetric = [each.get("symmetric", True) for each in weights]
    alike = all(each in (True, False) and each == symmetric[0] for each in symmetric)
    _require(alike, what, "symmetric", symmetric, "true or false, the same in all groups")
    if kind == "int-quantized":
        return Quantisation("int-quantized", parts | {"zeros": ("_zero_point",)})
    parts["shape"] = ("_shape",)
    if not symmetric[0]:
        _require("tensor" not in strategies, what, "strategy", "tensor", "group or channel with zero points")
        parts["zeros"] = ("_zero_point",)
    return Quantisation("pack-quantized", parts, bits=weights[0]["num_bits"])


def _weights(group: Any) -> Mapping[str, Any]:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return weights if isinstance(weights, Mapping) else {}


def _block(value: Any, what: str) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = value if isinstance(value, list) else []
    sound = len(sides) == 2 and all(type(side) is int and 1 <= side <= MAX_BLOCK for side in sides)
    _require(sound, what, "weight_block_size", value, "two numbers such as [128, 128]")
    return sides[0], sides[1]


def _require(holds: bool, what: str, key: str, value: Any, supported: str) -> None:
    if not holds:
        raise UserError(f"{what}: quantization_config has {key} {_quoted(value)}; supported is {supported}")


def _quoted(value: Any) -> str:
    return repr(printable(str(value)[:64])) if value is not None else "null"
