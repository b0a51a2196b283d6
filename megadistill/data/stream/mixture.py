"""Mixtures: the splits that a recipe names, and the curriculum that mixes them.

Legend: S tokens of a sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from megadistill.config.recipe import DataSection
from megadistill.data.shards.manifest import Manifest, TokenizerRecord
from megadistill.data.stream.order import CurriculumEntry, Order, Source
from megadistill.data.tokenizers.data_files import read_files, write_files
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """Splits by name, and the curriculum of their weights; its last entry has no end.

    Raises:
        UserError: the splits do not fit together.
    """

    sources: Mapping[str, Manifest]
    curriculum: Sequence[CurriculumEntry]
    rows: int | None = None
    """Rows of the vocabulary of the models that read the data, where they decide; see `for_models`."""
    insert_bos: bool = False
    """Whether BOS is put in front of sequences that do not begin with it, when they are read (see `insert_bos`)."""

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
        if self.insert_bos and self.bos is None:
            raise UserError(
                f"insert_bos: the tokenizer of {first.folder.location} puts no BOS before a text: leave it out, or "
                "tokenize the text with the model's own (megadistill tokenize ... --tokenizer MODEL)"
            )

    @classmethod
    def of(cls, manifest: Manifest, *, insert_bos: bool = False) -> "Mixture":
        """One split, repeated without an end."""
        return cls({"data": manifest}, (CurriculumEntry(None, {"data": 1}),), insert_bos=insert_bos)

    @classmethod
    def load(cls, section: DataSection) -> "Mixture":
        """The mixture of a recipe's `data` section.

        Raises:
            UserError: a manifest cannot be read, or the sources do not fit together.
        """
        if section.manifest is not None:
            return cls.of(Manifest.load(section.manifest), insert_bos=section.insert_bos)
        sources = {name: Manifest.load(location) for name, location in section.sources.items()}
        sequence_length = next(iter(sources.values())).sequence_length
        curriculum = [
            CurriculumEntry(None if entry.tokens is None else -(-entry.tokens // sequence_length), entry.weights)
            for entry in section.curriculum
        ]
        return cls(sources, curriculum, insert_bos=section.insert_bos)

    @property
    def first(self) -> Manifest:
        """The first source; all have its sequence length, vocabulary and tokenizer."""
        return next(iter(self.sources.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """The sources by number, in the order of their names: see `TokenBatch.sources`."""
        return tuple(sorted(self.sources))

    @property
    def sequence_length(self) -> int:
        """S, in tokens."""
        return self.first.sequence_length

    @property
    def vocab_size(self) -> int:
        """Number of ids, without padding: the tokenizer's, or the rows of a model that has fewer."""
        ids = self.first.vocab_size
        return ids if self.rows is None else min(ids, self.rows)

    def for_models(self, *rows: int | None) -> "Mixture":
        """The mixture for models with so many `rows` (None: any number): the fewest of them bound its ids.

        Rows that are missing for an id which can occur are for the caller to refuse, see `missing_rows`.
        """
        known = [number for number in rows if number is not None]
        return replace(self, rows=min(known, default=None))

    @property
    def tokenizer(self) -> TokenizerRecord:
        return self.first.tokenizer

    @cached_property
    def bos(self) -> int | None:
        """The id that the tokenizer puts before a text; None: it puts none there, or its files are not at hand.

        Manifests of other programs' shards by earlier releases do not record it.
        """
        recorded = next((one.packer.bos for one in self.sources.values() if one.packer.bos is not None), None)
        return _bos_of_files(self) if recorded is None else recorded

    @property
    def begins_with_bos(self) -> bool:
        """Whether every sequence begins with BOS, as it was packed or because it is put in."""
        return self.insert_bos or all(manifest.packer.sequence_bos for manifest in self.sources.values())

    def order(self, seed: int) -> Order:
        sources = {
            name: Source(manifest.fingerprint, manifest.shards.sequences) for name, manifest in self.sources.items()
        }
        return Order(sources, self.curriculum, seed=seed)


def _bos_of_files(data: Mixture) -> int | None:
    with TemporaryDirectory() as made:
        try:
            write_files(Path(made), read_files(data.first))
            return load_tokenizer(Path(made) / data.tokenizer.file.rpartition("/")[2]).bos
        except UserError:
            return None
