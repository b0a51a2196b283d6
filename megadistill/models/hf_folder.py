"""Reader of a folder of safetensors, tensor by tensor or row by row.

Only safetensors: a pickle can run code, and cannot be read by rows. A file is opened when one of its tensors is read,
so a rank never opens the files of other stages. Tensors are views of the file, mapped into memory: its pages count as
this process's memory until the last view is freed, so copy the tensors that you keep and drop the views. With
`mapped=False` they are copies, read with large calls: on a shared file system faster than page faults, and an error of
the disk is an exception, where a mapped page that cannot be read ends the process.

A multimodal model's folder is read as that of its language model, whose tensors have the names of a causal model here.
Quantised tensors (`quantization_config` of the folder's config.json) are read as their numbers in float32, one at a
time; their parts have no names here.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megadistill.config.paths import wrong_path
from megadistill.errors import RestartFault, UserError, nearest
from megadistill.io import open_regular, read_json, reason_of
from megadistill.models.module_names import names_here
from megadistill.models.multimodal.tensor_names import language_model_names
from megadistill.models.multimodal.wrappers import WRAPPERS
from megadistill.models.quantized.decode import decoded_shape, decoder
from megadistill.models.quantized.layout import QuantisedTensor, Role, read_quantisation
from megadistill.models.quantized.parts import CHUNK, Header, Place
from megadistill.redaction import printable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
"""An index has a line of 100 bytes for each tensor, of which large mixtures of experts have 100,000."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS: Final = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
_TYPES: Final = _FLOATS | _INTEGERS | {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
"""Types of the tensors that are read: the model's, and the parts of quantised ones."""

_GAP_COLUMNS: Final = 1024
"""Columns between two ranges of packed integers that are read with them: a page of 4 KiB."""


_EXPERTS: Final = ("gate_up_proj", "down_proj")
"""Ends of the names of all experts' matrices: [experts, 2 x inner, width] and [experts, width, inner]."""


def has_all_files(folder: Path) -> bool:
    """Whether the weights of a folder are on this machine: not of a config alone, nor of a download that goes on."""
    if (folder / INDEX_FILE).is_file():
        return all((folder / file).exists() for file in SafetensorsFolder(folder).files)
    return (folder / SINGLE_FILE).is_file()


class SafetensorsFolder:
    """The tensors of a Hugging Face model folder, in one file or in many.

    Raises, from every method:
        UserError: the folder, its index or one of its files is missing or broken, or has no such tensor.
    """

    def __init__(self, folder: Path, *, mapped: bool = True) -> None:
        self.folder = folder
        self.bytes_read = 0
        """Bytes of tensors that were read; those of mapped files are not counted."""
        self._mapped = mapped
        self._headers: dict[str, Any] = {}
        self._refuse_adapter()
        single = (folder / SINGLE_FILE).is_file()
        if (folder / INDEX_FILE).is_file():
            self._files = self._read_index()
            if single and set(self._files.values()) != {SINGLE_FILE}:
                raise UserError(
                    f"{folder} has both {SINGLE_FILE} and the {INDEX_FILE} of other files, and some programs read the "
                    "one, some the other: move away those that are not the model"
                )
        elif single:
            self._files = dict.fromkeys(self._header(SINGLE_FILE).keys(), SINGLE_FILE)
        elif any(folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{folder} holds pickled weights only (pytorch_model*.bin), which can run code when read; convert "
                "them once, with transformers' from_pretrained and save_pretrained, where you trust them"
            )
        else:
            others = sorted(path.name for path in folder.glob("*.safetensors"))
            renamed = f" (but {printable(', '.join(others[:3]))}: rename it, if it is the model)" if others else ""
            raise UserError(
                wrong_path(folder, "model")
                or f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{renamed}; name a Hugging Face model folder"
            )
        config = self._read_config()
        wrapper = WRAPPERS.get(str(config.get("model_type")))
        method = config.get("quantization_config")
        if method is None and wrapper is not None and isinstance(text := config.get("text_config"), dict):
            method = text.get("quantization_config")
        self.quantisation = read_quantisation(method, str(folder))
        """How the weights are quantised; None where config.json does not say that they are."""
        quantised = {} if self.quantisation is None else self.quantisation.tensors(self._files)
        self._refuse_both(quantised)
        names = set(self._files) if self.quantisation is None else self.quantisation.visible(self._files)
        self._stored = names_here(names, str(config.get("model_type")), str(folder))
        """Name of each tensor -> its name in the files: another in a folder of a multimodal model, or of GPT-NeoX."""
        if wrapper is not None:
            self._stored = language_model_names(names, str(folder))
        self._turns_experts = wrapper is not None and wrapper.turns_experts
        self.quantised: dict[str, QuantisedTensor] = {
            name: quantised[stored] for name, stored in self._stored.items() if stored in quantised
        }

    @property
    def names(self) -> list[str]:
        return sorted(self._stored)

    @property
    def files(self) -> list[str]:
        return sorted(set(self._files.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def shape(self, name: str) -> torch.Size:
        if name in self.quantised:
            return self._decoded_shape(name)
        shape: list[int] = self._slice(self._stored.get(name, name)).get_shape()
        return torch.Size([*shape[:-2], shape[-1], shape[-2]] if self._is_turned(name) else shape)

    def dtype(self, name: str) -> torch.dtype:
        """The stored floating type of a tensor; float32 of a quantised one.

        Integers, and 8-bit floats without scales, are refused.
        """
        if name in self.quantised:
            self._decoded_shape(name)
            return torch.float32
        stored = self._slice(self._stored.get(name, name)).get_dtype()
        if stored not in _FLOATS:
            raise UserError(
                f"{name} in {self.folder} is stored as {stored}: quantised weights are read only with their scales, "
                "and the quantization_config of config.json that says how"
            )
        return _FLOATS[stored]

    def tensors(self, names: Sequence[str]) -> Iterator[Tensor]:
        """The whole tensors, one after the other, in their stored types: views of the mapped files, on the CPU.

        A quantised one is a copy, in float32.

        Raises:
            RestartFault: the disk, or the file system, cannot read a file that is not mapped.
        """
        opened: dict[str, Any] = {}
        for name in names:
            self.dtype(name)
            stored = self._stored.get(name, name)
            for part in self.quantised[name].values() if name in self.quantised else (stored,):
                file = self._files[part]
                if file not in opened:
                    opened[file] = self._data(file)
            if name in self.quantised:
                yield self._decoded(name, opened, [(0, self.shape(name)[0])])
            else:
                tensor = opened[self._files[stored]].get_tensor(stored)
                yield tensor.transpose(-2, -1) if self._is_turned(name) else tensor

    def rows(self, name: str, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """The rows of half-open `ranges`, one range after the other. Only these rows are read.

        GPTQ and AWQ store columns: of each line of the file, that between the first and the last of the rows is read.
        """
        rows = self.shape(name)[0]
        # safetensors, like Python, would cut a range that reaches too far
        assert all(0 <= start <= stop <= rows for start, stop in ranges), f"{name} has {rows} rows, not {ranges}"
        self.dtype(name)
        if name in self.quantised:
            files = {self._files[part] for part in self.quantised[name].values()}
            return self._decoded(name, {file: self._data(file) for file in files}, ranges)
        stored = self._stored[name]
        values = self._data(self._files[stored]).get_slice(stored)
        read = torch.cat([values[start:stop] for start, stop in ranges or [(0, 0)]])
        return read.transpose(-2, -1) if self._is_turned(name) else read

    def _is_turned(self, name: str) -> bool:
        """Whether the file has the matrices of all experts of a layer by columns, as Qwen 3 VL was published.

        transformers reads and writes them in both forms: by columns the width is on the inside of the second one alone.
        """
        layer, experts, leaf = name.rpartition(".experts.")
        if not self._turns_experts or not experts or leaf not in _EXPERTS or name in self.quantised:
            return False
        names = [f"{layer}.experts.{each}" for each in _EXPERTS]
        gate_up, down = (self._slice(self._stored.get(each, each)).get_shape() for each in names)
        return bool(len(gate_up) == len(down) == 3 and gate_up[2] == 2 * down[1])

    def missing(self, name: str) -> UserError:
        """The error for a tensor that the folder does not have."""
        return UserError(f"{self.folder} has no tensor {name!r}{printable(nearest(name, self._files))}")

    def check_files(self) -> None:
        """Checks that every file is there and whole, and that the index says where each tensor is, and of all.

        A tensor in another file too, or in none of the index, is read by programs that do not ask the index.

        Raises:
            UserError: naming the first that is not where the index says.
        """
        for file in self.files:
            held = set(self._header(file).keys())
            promised = {name for name, place in self._files.items() if place == file}
            if missing := sorted(promised - held):
                self._slice(missing[0])
            for name in sorted(held - promised):
                place = f"places in {self._files[name]}" if name in self._files else "does not have"
                raise UserError(
                    f"{self.folder / file} holds {printable(name[:100])!r}, which {INDEX_FILE} {place}: the folder "
                    "mixes two models; download or write it again, into an empty folder"
                )

    def _refuse_adapter(self) -> None:
        """transformers adds an adapter beside a model to it where peft is installed, and ignores it elsewhere."""
        if (self.folder / "adapter_config.json").exists():
            raise UserError(
                wrong_path(self.folder, "model")
                or f"{self.folder} holds an adapter (adapter_config.json) beside a model: merge it (peft: "
                "merge_and_unload, save_pretrained), or move it out of the folder"
            )

    def _read_config(self) -> dict[str, Any]:
        """The folder's config.json; empty where it cannot be read: `load_config` says what is wrong with it."""
        try:
            config = read_json(self.folder / "config.json", constants=True)
        except (OSError, ValueError):
            return {}
        return config if isinstance(config, dict) else {}

    def _refuse_both(self, quantised: Mapping[str, QuantisedTensor]) -> None:
        """Refuses a tensor that is there quantised and plain: programs differ in which they read."""
        for name, parts in quantised.items():
            if name in self._files and name not in parts.values():
                raise UserError(
                    f"{self.folder} has {printable(name[:100])!r} plain and quantised "
                    f"({printable(parts['values'][:100])!r}): remove the tensors that are not the model"
                )

    def _decoded_shape(self, name: str) -> torch.Size:
        """The shape of a quantised tensor, whose parts are checked by their headers."""
        parts, headers = self.quantised[name], self._part_headers(name)

        def read(role: Role) -> Tensor:
            tensor: Tensor = self._header(self._files[parts[role]]).get_tensor(parts[role])
            return tensor

        assert self.quantisation is not None
        shape = decoded_shape(self.quantisation, headers, read)
        if shape is None:
            held = " and ".join(f"{parts[role]} {each.type} {list(each.shape)}" for role, each in headers.items())
            raise UserError(
                f"{self.folder}: {held} are no {self.quantisation.format} weight and its scales, as the "
                "quantization_config of config.json says: download the folder again, config.json as well"
            )
        return shape

    def _part_headers(self, name: str) -> dict[Role, Header]:
        stored = {role: self._slice(part) for role, part in self.quantised[name].items()}
        return {role: Header(part.get_dtype(), torch.Size(part.get_shape())) for role, part in stored.items()}

    def _decoded(self, name: str, opened: Mapping[str, Any], ranges: Sequence[tuple[int, int]]) -> Tensor:
        """Rows of a quantised tensor in float32."""
        shape, parts = self.shape(name), self.quantised[name]
        ranges = [(start, stop) for start, stop in ranges if start < stop]
        if not ranges:
            return torch.empty(0, *shape[1:])
        others: dict[Role, Tensor] = {
            role: opened[self._files[part]].get_tensor(part) for role, part in parts.items() if role != "values"
        }
        assert self.quantisation is not None
        try:
            decoding = decoder(self.quantisation, others, shape, self._part_headers(name)["values"])
        except ValueError as error:
            raise UserError(f"{name} in {self.folder}: {error}: download the folder again") from None
        values = opened[self._files[parts["values"]]].get_slice(parts["values"])
        places = [decoding.place(start, stop) for start, stop in ranges]
        if places[0].axis == 0:
            pieces: Iterable[Tensor] = (values[place.start : place.stop] for place in places)
        else:
            runs = [(low, values[:, low:high]) for low, high in _runs(places)]
            starts = [low for low, _ in runs]
            covering = [runs[bisect_right(starts, place.start) - 1] for place in places]
            pieces = [
                lines[:, place.start - low : place.stop - low]
                for place, (low, lines) in zip(places, covering, strict=True)
            ]
        decoded = [decoding.rows(piece, *rows) for piece, rows in zip(pieces, ranges, strict=True)]
        if not all(part.isfinite().all() for each in decoded for part in torch.split(each.flatten(), CHUNK)):
            raise UserError(f"{name} in {self.folder} is not finite times its scales: download the folder again")
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)

    def _slice(self, name: str) -> Any:
        file = self._files.get(name)
        if file is None:
            raise self.missing(name)
        try:
            return self._header(file).get_slice(name)
        except SafetensorError as error:
            raise UserError(
                f"{self.folder / file} does not hold {name!r}, which {INDEX_FILE} promises: {error}"
            ) from None

    def _header(self, file: str) -> Any:
        """The file, opened once for names, shapes and types: no tensor is read through it but sizes in a few bytes."""
        if file not in self._headers:
            self._headers[file] = self._opened(file)
        return self._headers[file]

    def _data(self, file: str) -> Any:
        """The file, opened for its tensors."""
        if self._mapped:
            return self._opened(file)
        self._header(file)  # safetensors checks the offsets
        return _ReadFile(self, file)

    def _opened(self, file: str) -> Any:
        """The file, mapped. safetensors reads its header, and checks the tensors' offsets against the file's size."""
        path = self.folder / file
        try:
            open_regular(path).close()  # safetensors would wait for the writer of a pipe
            return safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError:
            raise UserError(f"{path} does not exist, but {INDEX_FILE} names it: the download is not complete") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is not a readable safetensors file, or not a whole one: {error}") from None

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX_FILE
        try:
            files = read_json(path, max_bytes=MAX_INDEX_BYTES)["weight_map"]
            assert all(isinstance(file, str) for file in files.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"{path} is not a safetensors index: {type(error).__name__}: {error}") from None
        for file in files.values():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(f"{path} names {file!r}, which is not a safetensors file of its own folder")
        return dict(files)


def _runs(places: Iterable[Place]) -> list[tuple[int, int]]:
    """Ranges of columns that hold all `places`: one where the gap is less than a page, which is read with any of it."""
    runs: list[tuple[int, int]] = []
    for _, start, stop in sorted(places):
        if runs and start <= runs[-1][1] + _GAP_COLUMNS:
            start, stop = runs[-1][0], max(runs.pop()[1], stop)
        runs.append((start, stop))
    return runs


class _ReadFile:
    """A safetensors file whose tensors are read, not mapped; safetensors has checked its header."""

    def __init__(self, folder: SafetensorsFolder, file: str) -> None:
        self._folder, self._path = folder, folder.folder / file
        try:
            self._file: BufferedReader = open_regular(self._path)
            length = int.from_bytes(self._file.read(8), "little")
            self._header: dict[str, Any] = json.loads(self._file.read(length))
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path} cannot be read: {reason_of(error)}") from None
        self._begin = 8 + length

    def get_tensor(self, name: str) -> Tensor:
        header = self._header[name]
        begin, end = header["data_offsets"]
        return self._read(begin, end).view(_TYPES[header["dtype"]]).view(header["shape"])

    def get_slice(self, name: str) -> "_Rows":
        return _Rows(self, name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        header = self._header[name]
        dtype, shape = _TYPES[header["dtype"]], header["shape"]
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        begin = header["data_offsets"][0]
        content = self._read(begin + start * row_bytes, begin + stop * row_bytes)
        return content.view(dtype).view(stop - start, *shape[1:])

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns of a matrix, with a call for each of its lines."""
        header = self._header[name]
        dtype, (lines, width), begin = _TYPES[header["dtype"]], header["shape"], header["data_offsets"][0]
        if (start, stop) == (0, width):
            return self.get_tensor(name)
        content = torch.empty(lines, (stop - start) * dtype.itemsize, dtype=torch.uint8)
        for line in range(lines):
            first = begin + (line * width + start) * dtype.itemsize
            self._read(first, first + content.shape[1], content[line])
        return content.view(dtype)

    def _read(self, begin: int, end: int, content: Tensor | None = None) -> Tensor:
        """[end - begin] bytes of the tensors' part of the file, written to `content` where it is given."""
        content = torch.empty(end - begin, dtype=torch.uint8) if content is None else content
        buffer, done = content.numpy().data, 0
        while done < len(buffer):
            try:
                count = os.preadv(self._file.fileno(), [buffer[done:]], self._begin + begin + done)
            except OSError as error:
                raise RestartFault(
                    f"{self._path} cannot be read at byte {self._begin + begin + done}: {reason_of(error)}: look at "
                    "the disk, or the file system, of this node"
                ) from None
            if not count:
                raise UserError(f"{self._path} became shorter while it was read: is it being written?")
            done += count
        self._folder.bytes_read += done
        return content


@dataclass(frozen=True)
class _Rows:
    """The rows of a tensor, or the columns of a matrix, as a slice of safetensors is."""

    file: _ReadFile
    name: str

    def __getitem__(self, place: slice | tuple[slice, slice]) -> Tensor:
        if isinstance(place, tuple):
            return self.file.columns(self.name, place[1].start, place[1].stop)
        return self.file.rows(self.name, place.start, place.stop)
