"""The record of a finished `tokenize`, which tells the same command from another one."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from megadistill.data.shards.manifest import MANIFEST
from megadistill.errors import UserError
from megadistill.io import read_file, write_file
from megadistill.units import number_of, readable

RECORD_FILE: Final = "tokenize.json"
"""Name of the record in the output folder."""


class InputFiles(BaseModel):
    """The files of the input, without their contents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: int
    bytes: int
    names: str
    """sha256 of their names and sizes."""
    times: str
    """sha256 of their modification times."""

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "InputFiles":
        names, times, files, size = hashlib.sha256(), hashlib.sha256(), 0, 0
        for path in paths:
            status = path.stat()
            files, size = files + 1, size + status.st_size
            names.update(f"{path.name}\0{status.st_size}\0".encode(errors="surrogateescape"))
            times.update(f"{status.st_mtime_ns}\0".encode())
        return cls(files=files, bytes=size, names=names.hexdigest(), times=times.hexdigest())

    def __str__(self) -> str:
        return f"{number_of(self.files, 'file')}, {readable(self.bytes, 'B')}"


class TokenizeRecord(BaseModel):
    """The options and files that decide the output of `tokenize`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    options: dict[str, Any]
    """Name of an option -> its value; of --tokenizer its sha256."""
    input: InputFiles

    def write(self, output: Path) -> None:
        write_file(output / RECORD_FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, output: Path) -> "TokenizeRecord | None":
        """The record in an output folder; None where there is no readable one."""
        try:
            return cls.model_validate_json(read_file(output / RECORD_FILE))
        except (OSError, ValueError):
            return None

    def is_finished(self, output: Path, splits: Sequence[str]) -> bool:
        """Whether the complete data set in `output` was made by this command, from this input.

        Raises:
            UserError: it was made with other options, or the input has changed.
        """
        manifests = [output / split / MANIFEST for split in splits]
        written = TokenizeRecord.read(output)
        if written is None:
            return False
        differing = self._differences(written)
        if differing:
            raise UserError(
                f"{output} holds a data set that was made otherwise: {'; '.join(differing)}: give another --output, or "
                f"delete {output}"
            )
        return all(manifest.is_file() for manifest in manifests)

    def _differences(self, written: "TokenizeRecord") -> list[str]:
        names = dict.fromkeys([*written.options, *self.options])
        differing = [
            f"{name} was {_in_words(written.options.get(name))}, is {_in_words(self.options.get(name))}"
            for name in names
            if written.options.get(name) != self.options.get(name)
        ]
        before, now = written.input, self.input
        if not differing and (before.files, before.bytes, before.names) != (now.files, now.bytes, now.names):
            differing = [f"its input was {before}, is {now}" if str(before) != str(now) else "its input has changed"]
        if not differing and before.times != now.times:
            differing = ["files of its input were written again since, with the same names and sizes"]
        return differing


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)
