"""An open token file: any ids of its stream, read through its index.

Legend: G segments of the file, T ids of a sequence.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadistill.data.shards.manifest import Manifest, TokenFileFormat
from megadistill.data.shards.opening import open_shard_file
from megadistill.data.shards.token_files.decoded_parts import DecodedParts
from megadistill.data.shards.token_files.token_index import TokenIndex, index_of, open_index, stored
from megadistill.data.storage.base import Bytes, Folder

Range = tuple[int, int]


@dataclass(frozen=True)
class TokenFile:
    """A token file and its index; `parts` where the ids have to be decoded."""

    path: str
    file: Bytes
    index: TokenIndex
    dtype: np.dtype[Any]
    """dtype of the ids in the file, or of decoded ones."""
    parts: DecodedParts | None = None

    def pieces(self, place: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The segments that hold `count` ids from `place` on: number, first id in it, and how many of its ids."""
        ends_G = self.index.ends_G
        segment = bisect_right(ends_G, place)
        while count:
            begin = int(ends_G[segment - 1]) if segment else 0
            here = min(count, int(ends_G[segment]) - place)
            yield segment, place - begin, here
            place, count, segment = place + here, count - here, segment + 1

    def ranges(self, place: int, count: int) -> list[Range]:
        """Start and length in bytes of `count` ids from `place` on; of decoded ids none is known."""
        if self.parts is not None:
            return []
        itemsize = self.dtype.itemsize
        return [
            (int(self.index.begins_G[segment]) + first * itemsize, here * itemsize)
            for segment, first, here in self.pieces(place, count)
        ]

    def read(self, place: int, count: int) -> memoryview:
        """The bytes of `count` ids from `place` on, not copied where they lie in one piece.

        Raises:
            OSError: they cannot be read.
            ValueError: a part cannot be decoded, or has another number of ids than the index says.
        """
        if self.parts is None and len(self.index.ends_G) == 1:  # most files: the hot loop
            itemsize = self.dtype.itemsize
            return self.file.read(int(self.index.begins_G[0]) + place * itemsize, count * itemsize)
        if self.parts is not None:
            pieces = [self._decoded(*piece) for piece in self.pieces(place, count)]
        else:
            pieces = [self.file.read(start, length) for start, length in self.ranges(place, count)]
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def where(self, place: int) -> str:
        """The place of an id in the file, for messages."""
        segment, first, _ = next(self.pieces(place, 1))
        begin = int(self.index.begins_G[segment])
        return f"id {first} of part {begin}" if self.parts else f"byte {begin + first * self.dtype.itemsize}"

    def _decoded(self, segment: int, first: int, count: int) -> memoryview:
        assert self.parts is not None
        number, ends_G = int(self.index.begins_G[segment]), self.index.ends_G
        ids = self.parts.ids(self.path, self.file, number)
        expected = int(ends_G[segment]) - (int(ends_G[segment - 1]) if segment else 0)
        if len(ids) != expected:
            raise ValueError(f"expected {expected} ids in part {number}, found {len(ids)}")
        return np.ascontiguousarray(ids[first : first + count]).data.cast("B")


def open_token_file(manifest: Manifest, record: TokenFileFormat, number: int) -> TokenFile:
    """Shard `number` of a split of token files.

    Raises:
        ShardFault: a file is missing or unreachable, the size or the index is not the manifest's.
    """
    shard = manifest.shards[number]
    file = open_index(manifest.folder, manifest, record, shard)
    index = index_of(file, manifest.folder, manifest, record, shard, verified=False)
    data = data_folder(manifest, record)
    return TokenFile(
        f"{data.location}/{shard.name}", open_shard_file(data, shard), index, stored(record), parts_of(record)
    )


def data_folder(manifest: Manifest, record: TokenFileFormat) -> Folder:
    """The folder of the token files of a split."""
    return manifest.folder.sibling(record.folder)


def parts_of(record: TokenFileFormat) -> DecodedParts | None:
    """The decoded parts of a reader; None: the ids lie in the files as they are."""
    return None if record.decoder is None else DecodedParts(record.decoder, stored(record))
