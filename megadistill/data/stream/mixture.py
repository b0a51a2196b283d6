"""Mixtures: the splits that a recipe names, and the curriculum that mixes them.

Legend: S tokens of a sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megadistill.config.recipe import DataSection
from megadistill.data.shards.manifest import Manifest, TokenizerRecord
from megadistill.data.stream.order import CurriculumEntry, Order, Source
from megadistill.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """Splits by name, and the curriculum of their weights; its last entry has no end.

    Raises:
        UserError: the splits do not fit together.
    """

    sources: Mapping[str, Manifest]
    curriculum: Sequence[CurriculumEntry]

    def __post_init__(self) -> None:
        (first_name, first), *others = self.sources.items()
        for name, manifest in others:
            for field in ("sequence_length", "vocab_size"):
                if getattr(manifest, field) != getattr(first, field):
                    raise UserError(
                        f"data.sources: {name} has {field} {getattr(manifest, field)}, {first_name} has "
                        f"{getattr(first, field)}: sources of one mixture must agree, tokenize one of them again"
                    )
            if manifest.tokenizer.sha256 != first.tokenizer.sha256:
                raise UserError(
                    f"data.sources: {name} was made by another tokenizer (sha256 {manifest.tokenizer.sha256[:12]}…) "
                    f"than {first_name} ({first.tokenizer.sha256[:12]}…): tokenize one of them again"
                )

    @classmethod
    def of(cls, manifest: Manifest) -> "Mixture":
        """One split, repeated without an end."""
        return cls({"data": manifest}, (CurriculumEntry(None, {"data": 1}),))

    @classmethod
    def load(cls, section: DataSection) -> "Mixture":
        """The mixture of a recipe's `data` section.

        Raises:
            UserError: a manifest cannot be read, or the sources do not fit together.
        """
        if section.manifest is not None:
            return cls.of(Manifest.load(section.manifest))
        sources = {name: Manifest.load(location) for name, location in section.sources.items()}
        sequence_length = next(iter(sources.values())).sequence_length
        curriculum = [
            CurriculumEntry(None if entry.tokens is None else -(-entry.tokens // sequence_length), entry.weights)
            for entry in section.curriculum
        ]
        return cls(sources, curriculum)

    @property
    def first(self) -> Manifest:
        """The first source; all have its sequence length, vocabulary and tokenizer."""
        return next(iter(self.sources.values()))

    @property
    def sequence_length(self) -> int:
        """S, in tokens."""
        return self.first.sequence_length

    @property
    def vocab_size(self) -> int:
        """Number of ids, without padding."""
        return self.first.vocab_size

    @property
    def tokenizer(self) -> TokenizerRecord:
        return self.first.tokenizer

    def tokenizer_file(self, name: str, *, max_bytes: int) -> bytes:
        """The content of a file beside the tokenizer's own. Raises OSError: there is none."""
        record, folder = self.first.tokenizer, self.first.folder
        return folder.sibling(record.file.rpartition("/")[0] or ".").read_whole(name, max_bytes=max_bytes)

    def order(self, seed: int) -> Order:
        sources = {
            name: Source(manifest.fingerprint, [shard.sequences for shard in manifest.shards])
            for name, manifest in self.sources.items()
        }
        return Order(sources, self.curriculum, seed=seed)
