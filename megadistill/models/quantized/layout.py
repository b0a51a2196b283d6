"""The quantisation that a config.json says of a folder's weights: names of values and scales, and their blocks.

Read are float8 e4m3 with float32, bfloat16, float16 or e8m0 scales (a tensor, a row, or a block) and MXFP4 (32 numbers
of e2m1 with an e8m0 scale). Scales of activations are not needed: activations are not quantised here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from megadistill.errors import UserError
from megadistill.redaction import printable

Format: TypeAlias = Literal["float8", "mxfp4"]

MAX_BLOCK: Final = 1 << 20
"""Rows or columns that share a scale."""

_METHODS: Final = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4")

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


class QuantisedTensor(NamedTuple):
    """Names of a quantised tensor's parts."""

    values: str
    scales: str


@dataclass(frozen=True)
class Quantisation:
    """The way in which a folder's weights are quantised."""

    format: Format
    values: str
    """End of the name of a tensor's values, behind the tensor's own name."""
    scales: tuple[str, ...]
    """The same of its scales: writers of one method give them unlike names."""
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None: a scale for a row, or for the tensor."""

    def tensors(self, names: Collection[str]) -> dict[str, QuantisedTensor]:
        """Name -> parts of each quantised tensor of a folder with tensors of these `names`."""
        known = set(names)
        return {
            name: QuantisedTensor(name + self.values, stored)
            for end in self.scales
            for stored in known
            if stored.endswith(end) and (name := stored.removesuffix(end)) + self.values in known
        }

    def visible(self, names: Collection[str]) -> set[str]:
        """Names of the model's tensors: without the parts of those that are quantised, and without other scales."""
        quantised = self.tensors(names)
        parts = {part for each in quantised.values() for part in each}
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
    if method == "fp8":
        _require(settings.get("fmt") in (None, "e4m3"), what, "fmt", settings.get("fmt"), "e4m3")
        # Both numbers multiply the weight: "inv" of transformers and DeepSeek, the other of AutoFP8 and vLLM.
        return Quantisation("float8", "", ("_scale_inv", "_scale"), _block(settings.get("weight_block_size"), what))
    if method == "fbgemm_fp8":
        return Quantisation("float8", "", ("_scale",))
    if method == "mxfp4":
        return Quantisation("mxfp4", "_blocks", ("_scales",))
    if method == "compressed-tensors":
        return _compressed(settings, what)
    raise UserError(
        f"{what}: quantization_config.quant_method is {_quoted(method)}; weights may be quantised by "
        f"{', '.join(_METHODS)}: name a folder with bfloat16 or float32 weights"
    )


def _compressed(settings: Mapping[str, Any], what: str) -> Quantisation:
    sparsity = settings.get("sparsity_config") or {}
    dense = isinstance(sparsity, Mapping) and sparsity.get("format") in (None, "dense")
    _require(dense, what, "sparsity_config", sparsity, "dense")
    groups = settings.get("config_groups")
    weights = [_weights(group) for group in groups.values()] if isinstance(groups, Mapping) else []
    # All groups are alike: the tensors do not say which group they belong to.
    kind = settings.get("format")
    bits = {"float-quantized": 8, "mxfp4-pack-quantized": 4}.get(kind if isinstance(kind, str) else "")
    alike = all((each.get("num_bits"), each.get("type")) == (bits, "float") for each in weights)
    if not weights or bits is None or not alike:
        raise UserError(
            f"{what}: quantization_config of compressed-tensors has the format {_quoted(kind)}; supported are "
            "float-quantized with 8-bit and mxfp4-pack-quantized with 4-bit float weights in all groups: name a folder "
            "with bfloat16 or float32 weights"
        )
    _require(all(each.get("symmetric") in (None, True) for each in weights), what, "symmetric", False, "true")
    if bits == 4:
        return Quantisation("mxfp4", "_packed", ("_scale",))
    blocks = {_block(each.get("block_structure"), what) for each in weights if each.get("strategy") == "block"}
    _require(len(blocks) <= 1, what, "block_structure", sorted(map(str, blocks)), "one for all groups")
    return Quantisation("float8", "", ("_scale",), next(iter(blocks), None))


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
