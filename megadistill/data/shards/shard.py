"""The record of one shard: a tar, and its index beside it."""

from typing import Annotated, Final

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from megadistill.data.shards.hashed_record import Sha256

INDEX_SUFFIX: Final = ".idx.npy"
NAME: Final = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
"""One name below a folder; none begins with a dot, so none is ".."."""
MAX_NAME: Final = 200
MAX_SEQUENCES: Final = 1 << 32
MAX_BYTES: Final = 1 << 50

FileName = Annotated[str, Field(pattern=rf"^{NAME}$", max_length=MAX_NAME)]


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid", strict=True))
class Shard:
    """One tar file; its index lies beside it, under the same name with `INDEX_SUFFIX`."""

    name: FileName
    sequences: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)]
    bytes: Annotated[int, Field(ge=1, le=MAX_BYTES)]
    sha256: Sha256
    index_sha256: Sha256

    @property
    def index(self) -> str:
        return self.name + INDEX_SUFFIX
