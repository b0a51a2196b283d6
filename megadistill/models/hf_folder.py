"""Reader of a folder of safetensors, tensor by tensor or row by row.

Only safetensors: a pickle can run code, and cannot be read by rows. A file is opened when one of its tensors is read,
so a rank never opens the files of other stages. Tensors are views of the file, mapped into memory: its pages count as
this process's memory until the last view is freed, so copy the tensors that you keep and drop the views. With
`mapped=False` they are copies, read with large calls: on a shared file system faster than page faults, and an error of
the disk is an exception, where a mapped page that cannot be read ends the process.

Quantised tensors (`quantization_config` of the folder's config.json) are read as their numbers in float32, one at a
time; their parts have no names here.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
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
from megadistill.models.quantized.decode import Header, decode_rows, decoded_shape
from megadistill.models.quantized.layout import Quantisation, QuantisedTensor, read_quantisation
from megadistill.redaction import printable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
"""An index has a line of 100 bytes for each tensor, of which large mixtures of experts have 100,000."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPES: Final = _FLOATS | {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8}
"""Types of the tensors that are read: the model's, and the parts of quantised ones."""


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
        self.quantisation = self._read_quantisation()
        """How the weights are quantised; None where config.json does not say that they are."""
        self.quantised: dict[str, QuantisedTensor] = {}
        self._names = set(self._files)
        if self.quantisation is not None:
            self.quantised = self.quantisation.tensors(self._files)
            self._names = self.quantisation.visible(self._files)

    @property
    def names(self) -> list[str]:
        return sorted(self._names)

    @property
    def files(self) -> list[str]:
        return sorted(set(self._files.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> torch.Size:
        if name in self.quantised:
            return self._decoded_shape(name)
        return torch.Size(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The stored floating type of a tensor; float32 of a quantised one.

        Integers, and 8-bit floats without scales, are refused.
        """
        if name in self.quantised:
            self._decoded_shape(name)
            return torch.float32
        stored = self._slice(name).get_dtype()
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
            for part in self.quantised.get(name, (name,)):
                file = self._files[part]
                if file not in opened:
                    opened[file] = self._data(file)
            if name in self.quantised:
                yield self._decoded(name, opened, 0, self.shape(name)[0])
            else:
                yield opened[self._files[name]].get_tensor(name)

    def rows(self, name: str, ranges: Sequence[tuple[int, int]]) -> Tensor:
        """The rows of half-open `ranges`, one range after the other. Only these rows are read."""
        rows = self.shape(name)[0]
        # safetensors, like Python, would cut a range that reaches too far
        assert all(0 <= start <= stop <= rows for start, stop in ranges), f"{name} has {rows} rows, not {ranges}"
        self.dtype(name)
        if name in self.quantised:
            opened = {self._files[part]: self._data(self._files[part]) for part in self.quantised[name]}
            return torch.cat([self._decoded(name, opened, start, stop) for start, stop in ranges or [(0, 0)]])
        stored = self._data(self._files[name]).get_slice(name)
        return torch.cat([stored[start:stop] for start, stop in ranges or [(0, 0)]])

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

    def _read_quantisation(self) -> Quantisation | None:
        try:
            config = read_json(self.folder / "config.json")
        except (OSError, ValueError):
            return None  # `load_config` says what is wrong with it
        value = config.get("quantization_config") if isinstance(config, dict) else None
        return read_quantisation(value, str(self.folder))

    def _decoded_shape(self, name: str) -> torch.Size:
        """The shape of a quantised tensor, whose parts are checked by their headers."""
        parts = self.quantised[name]
        stored = [(part, self._slice(part)) for part in parts]
        headers = [Header(part.get_dtype(), torch.Size(part.get_shape())) for _, part in stored]
        assert self.quantisation is not None
        shape = decoded_shape(self.quantisation, *headers)
        if shape is None:
            held = " and ".join(
                f"{part} {each.type} {list(each.shape)}" for part, each in zip(parts, headers, strict=True)
            )
            raise UserError(
                f"{self.folder}: {held} are no {self.quantisation.format} weight and its scales, as the "
                "quantization_config of config.json says: download the folder again, config.json as well"
            )
        return shape

    def _decoded(self, name: str, opened: Mapping[str, Any], start: int, stop: int) -> Tensor:
        """Rows of a quantised tensor in float32."""
        parts = self.quantised[name]
        values = opened[self._files[parts.values]].get_slice(parts.values)[start:stop]
        scales = opened[self._files[parts.scales]].get_tensor(parts.scales)
        assert self.quantisation is not None
        decoded = decode_rows(self.quantisation, values, scales, self.shape(name), start)
        if not decoded.isfinite().all():
            raise UserError(f"{name} in {self.folder} is not finite times its scales: download the folder again")
        return decoded

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
        """The file, opened once for names, shapes and types: no tensor is read through it."""
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

    def _read(self, begin: int, end: int) -> Tensor:
        content = torch.empty(end - begin, dtype=torch.uint8)
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
    """The rows of a tensor, as a slice of safetensors is."""

    file: _ReadFile
    name: str

    def __getitem__(self, rows: slice) -> Tensor:
        return self.file.rows(self.name, rows.start, rows.stop)
