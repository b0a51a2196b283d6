"""Kinds of GPU with their peaks, memory and bandwidths, from a data file."""

import reprlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from megadistill.errors import UserError, nearest
from megadistill.io import read_file, reason_of

GB, TFLOP = 1e9, 1e12
MAX_FILE_BYTES = 1 << 20


class Accelerator(BaseModel):
    """One GPU, in the units of the vendors' data sheets; the properties are in bytes, FLOP/s and bytes/s."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1)
    devices: list[str] = []
    """Parts of the device's name that the driver reports."""
    peak_tflops: dict[str, float] = Field(min_length=1)
    """Precision of the recipe, or float8 -> dense peak, TFLOP/s."""
    memory_gb: float = Field(gt=0)
    memory_gb_per_s: float = Field(gt=0)
    """GB/s of its own memory."""
    node_gb_per_s: float = Field(gt=0)
    """GB/s one way to the GPUs of the same node."""
    network_gb_per_s: float = Field(gt=0)
    """GB/s one way to other nodes."""
    latency_us: dict[Literal["all_gather", "all_reduce"], dict[PositiveInt, PositiveFloat]] = {}
    """Time of a small collective over consecutive ranks, by their number, as `megadistill doctor` measures it."""
    source: str = Field(min_length=1)
    """Source of these numbers."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * GB)

    @property
    def memory_bandwidth(self) -> float:
        return self.memory_gb_per_s * GB

    @property
    def multiplies_float8(self) -> bool:
        """Whether it has matrix units for the e4m3 of `teacher.precision`."""
        return "float8" in self.peak_tflops

    @property
    def node_bandwidth(self) -> float:
        return self.node_gb_per_s * GB

    @property
    def network_bandwidth(self) -> float:
        return self.network_gb_per_s * GB

    def peak_flops(self, precision: str) -> float:
        """Dense peak, FLOP/s.

        Raises:
            UserError: it has no such matrix units, or their peak is not known.
        """
        if precision not in self.peak_tflops:
            known = ", ".join(each for each in self.peak_tflops if each != "float8")
            raise UserError(
                f"train.precision is {precision}, and for {self.name} only the peaks of {known} are known: describe "
                "it in a file of your own (--gpu FILE)"
            )
        return self.peak_tflops[precision] * TFLOP


def accelerators() -> dict[str, Accelerator]:
    """The kinds that come with the package, by the name that `--gpu` takes."""
    with files("megadistill").joinpath("accelerators.yaml").open(encoding="utf-8") as file:
        return _validated(yaml.safe_load(file), "accelerators.yaml")


def accelerator(kind: str) -> Accelerator:
    """The kind that `--gpu` names: one that comes with the package, or the only one of a YAML file.

    Raises:
        UserError: no such kind, or the file does not describe one kind.
    """
    known = accelerators()
    if kind in known:
        return known[kind]
    if not kind.endswith((".yaml", ".yml")):
        raise UserError(
            f"--gpu {kind}: no such kind{nearest(kind, known)}; known are {', '.join(known)}, or a YAML file"
        )
    described = _validated(_read(Path(kind)), kind)
    if len(described) != 1:
        raise UserError(f"--gpu {kind}: describes {len(described)} kinds ({', '.join(described)}): leave one")
    return next(iter(described.values()))


def accelerator_of(device: str) -> Accelerator | None:
    """The kind of a device by the name that its driver reports; of several matching parts, the longest decides."""
    fitting = [(len(part), kind) for kind in accelerators().values() for part in kind.devices if part in device]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def _read(path: Path) -> Any:
    try:
        return yaml.load(read_file(path, max_bytes=MAX_FILE_BYTES).decode("utf-8-sig"), Loader=_WithoutAliases)
    except FileNotFoundError:
        raise UserError(f"--gpu {path}: no such file (paths are relative to {Path.cwd()})") from None
    except RecursionError:
        raise UserError(f"--gpu {path}: cannot be read as YAML: nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        text = reason_of(error) if isinstance(error, OSError | ValueError) else str(error).splitlines()[0]
        raise UserError(f"--gpu {path}: cannot be read as YAML: {text}") from None


class _WithoutAliases(yaml.SafeLoader):
    """A loader that refuses aliases, with which a short file may name a value without an end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name): write the value itself")
        return super().compose_node(parent, index)


def _validated(values: Any, source: str) -> dict[str, Accelerator]:
    if not isinstance(values, Mapping) or not values:
        raise UserError(
            f"--gpu {source}: holds no kind: write NAME: and below it {', '.join(Accelerator.model_fields)}"
        )
    kinds = {}
    for kind, described in values.items():
        try:
            kinds[str(kind)] = Accelerator.model_validate(described)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join([str(kind), *map(str, first["loc"])])
            value = reprlib.repr(first["input"])
            raise UserError(f"--gpu {source}: {place}: {first['msg'].lower()}, found {value}") from None
    return kinds
