"""The held-out splits of an evaluation, by name, and the batches that each rank reads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import PurePosixPath

from megadistill.data import Manifest, Mixture, TokenStream
from megadistill.data.shards.shard_cache import ShardCache
from megadistill.errors import UserError

_NAMED = re.compile(r"([A-Za-z0-9_.-]+)=(.+)")


@dataclass(frozen=True)
class Split:
    """One source of an evaluation."""

    name: str
    manifest: Manifest
    limit: int | None = None
    """Number of sequences that are read at most; None: all."""
    insert_bos: bool = False
    """Whether BOS is put in front of sequences that do not begin with it."""

    @property
    def sequences(self) -> int:
        """Number of sequences that are read: the first ones in the order of the stream."""
        return self.manifest.sequences if self.limit is None else min(self.limit, self.manifest.sequences)

    @property
    def data(self) -> Mixture:
        return Mixture.of(self.manifest, insert_bos=self.insert_bos)

    @property
    def documents(self) -> bool:
        """Whether attention is limited to documents: side by side by best fit, they were packed together by chance."""
        return self.manifest.packer.name == "bestfit"

    def stream(
        self, *, document_mask: bool = True, masks_corrupt: bool = False, cache: ShardCache | None = None
    ) -> TokenStream:
        """Its sequences, by slot: range(0, manifest.sequences) visits each once.

        Args:
            document_mask: whether attention is limited to documents where `documents` says so; False: nowhere.
            masks_corrupt: damaged sequences get no labels, instead of a `ShardFault`.
            cache: bounds the open files of several splits together.
        """
        return TokenStream(
            self.data,
            seed=0,
            batch_slots=1,
            rank=0,
            world_size=1,
            document_mask=self.documents and document_mask,
            on_corrupt_sample="mask" if masks_corrupt else "fail",
            max_masked_per_million=1_000_000,
            cache=cache,
        )


def load_splits(given: Sequence[str], limit: int | None = None, *, insert_bos: bool = False) -> list[Split]:
    """The splits of `--data`, each `MANIFEST` or `NAME=MANIFEST`; one without a name has its folder's.

    `limit`: sequences of each that are read at most. `insert_bos`: see `Split`.

    Raises:
        UserError: a manifest cannot be read, has no token to predict, or does not fit the first one; or two splits
            have the same name.
    """
    named = [match.groups() if (match := _NAMED.fullmatch(text)) else (None, text) for text in given]
    unnamed = [PurePosixPath(location).parent.parts for name, location in named if name is None]
    folders = iter(short_names(unnamed))
    splits = [Split(name or next(folders), Manifest.load(location), limit, insert_bos) for name, location in named]
    first = splits[0]
    for split in splits:
        if split.manifest.tokens == 0:
            raise UserError(f"--data {split.name}: it has no token to predict: give another split")
        for what, its, firsts in (
            ("a vocabulary of", split.manifest.vocab_size, first.manifest.vocab_size),
            ("the tokenizer", split.manifest.tokenizer.sha256[:12], first.manifest.tokenizer.sha256[:12]),
        ):
            if its != firsts:
                raise UserError(
                    f"--data {split.name} has {what} {its}, {first.name} has {firsts}: models are compared on one "
                    "tokenizer's ids, so tokenize one of the two again"
                )
    names = [split.name for split in splits]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--data: two splits are called {twice}: give them names, as in --data web=MANIFEST")
    return splits


def own_batches(splits: Sequence[Split], size: int, *, rank: int, world: int) -> list[tuple[int, range]]:
    """Split number and slots of each of a rank's batches: its consecutive share of all batches of `size` sequences."""
    batches = [
        (number, range(start, min(start + size, split.sequences)))
        for number, split in enumerate(splits)
        for start in range(0, split.sequences, size)
    ]
    return batches[len(batches) * rank // world : len(batches) * (rank + 1) // world]


def short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Paths, given as parts, without the leading parts that all share; a single one is its last part."""
    parts = zip(*(path[:-1] for path in paths), strict=False)
    shared = len(list(takewhile(lambda each: len(set(each)) == 1, parts)))
    return ["/".join(path[shared:]) or "." for path in paths]
