"""Records of whole shards: a command that was broken off, started again, reuses the shards that have one.

The record of `shard-00012.tar` is `.shard-00012.json`. It is written after its shard, and deleted when the data set is
complete.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

from megadistill.data.shards.manifest import Count
from megadistill.data.shards.shard import Shard
from megadistill.io import file_sha256, read_file, write_file


def record_path(tar: Path) -> Path:
    return tar.with_name(f".{tar.stem}.json")


class ShardRecord(BaseModel):
    """Counts of a whole shard; a subclass has the digests of what it was made from, too."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    shard: Shard | None
    """None: nothing fills a sequence."""
    documents: Count
    tokens: Count
    """Predicted tokens of the shard."""
    text_bytes: Count
    """UTF-8 bytes of the text of those tokens."""

    @classmethod
    def load(cls, tar: Path, **digests: str) -> Self | None:
        """The record beside `tar`, if it has these digests, and the files on disk are those that it names."""
        try:
            record = cls.model_validate_json(read_file(record_path(tar)))
            if any(getattr(record, name) != digest for name, digest in digests.items()):
                return None
            shard = record.shard
            files = () if shard is None else ((shard.name, shard.sha256), (shard.index, shard.index_sha256))
            is_whole = all(file_sha256(tar.with_name(name)) == sha256 for name, sha256 in files)
            return record if is_whole else None
        except (OSError, ValueError):
            return None

    def write(self, tar: Path) -> None:
        write_file(record_path(tar), self.model_dump_json())


def remove_unlisted(folder: Path, pattern: str, shards: Iterable[Shard]) -> None:
    """Deletes the records in `folder`, and the whole and partial shards named like `pattern` that are not `shards`."""
    listed = {name for shard in shards for name in (shard.name, shard.index)}
    for path in [*folder.glob(f"{pattern}.tar*"), *folder.glob(f".{pattern}.*")]:
        if path.name not in listed:
            path.unlink()
