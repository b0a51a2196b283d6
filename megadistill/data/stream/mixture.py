"""Mixtures: the splits that a recipe names, and the curriculum that mixes them.

Legend: S tokens of a sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from megadistill.config.recipe import CurriculumEntry as EntrySection
from megadistill.config.recipe import DataSection
from megadistill.data.shards.manifest import Manifest, TokenizerRecord
from megadistill.data.stream.order import CurriculumEntry, Order, Source
from megadistill.data.stream.segments import Segment, segment_index
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
        for entry in self.curriculum:
            named, *more = entry.weights
            self._require_same("sequence_length", named, more, what="sources of one curriculum entry")
        for name, manifest in others:
            self._require_same("vocab_size", first_name, [name], what="sources of one mixture")
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

    def _require_same(self, field: str, first: str, others: Sequence[str], *, what: str) -> None:
        expected = getattr(self.sources[first], field)
        for name in others:
            if (value := getattr(self.sources[name], field)) != expected:
                raise UserError(
                    f"data.sources: {name} has {field} {value}, {first} has {expected}: {what} must agree, tokenize "
                    "one of them again"
                )

    @classmethod
    def of(cls, manifest: Manifest, *, insert_bos: bool = False) -> "Mixture":
        """One split, repeated without an end."""
        return cls({"data": manifest}, (CurriculumEntry(None, {"data": 1}),), insert_bos=insert_bos)

    @classmethod
    def load(cls, section: DataSection, *, global_batch: int | None = None) -> "Mixture":
        """The mixture of a recipe's `data` section.

        `global_batch`: sequences of a step of entries that do not say how many; needed where entries differ in shape.

        Raises:
            UserError: a manifest cannot be read, or the sources do not fit together.
        """
        if section.manifest is not None:
            return cls.of(Manifest.load(section.manifest), insert_bos=section.insert_bos)
        sources = {name: Manifest.load(location) for name, location in section.sources.items()}
        lengths = {name: manifest.sequence_length for name, manifest in sources.items()}
        curriculum = curriculum_of(section.curriculum, lengths, global_batch=global_batch)
        return cls(sources, curriculum, insert_bos=section.insert_bos)

    @property
    def first(self) -> Manifest:
        """The first source; all have its vocabulary and tokenizer."""
        return next(iter(self.sources.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """The sources by number, in the order of their names: see `TokenBatch.sources`."""
        return tuple(sorted(self.sources))

    @property
    def sequence_length(self) -> int:
        """S, in tokens; of entries that differ in it, the longest."""
        return max(segment.sequence_length for segment in self.segments)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The spans of slots whose steps have one shape; see `data.stream.segments`."""
        return segments_of(self.curriculum, {name: each.sequence_length for name, each in self.sources.items()})

    def segment_at(self, slot: int) -> Segment:
        """The segment of a slot."""
        return self.segments[segment_index([segment.start for segment in self.segments], slot)]

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


def curriculum_of(
    sections: Sequence[EntrySection], lengths: Mapping[str, int], *, global_batch: int | None
) -> list[CurriculumEntry]:
    """The entries in sequences. Where the shape of the steps changes, an entry ends with a whole step: its tokens are
    rounded up, counted from the entry at which the shape began. `lengths`: tokens of a sequence of each source.

    Raises:
        UserError: an entry's `sequence_length` is not that of its sources.
    """
    entries: list[CurriculumEntry] = []
    shape: tuple[object, ...] = ()
    since, batch = 0, 1  # sequences since the shape began
    for number, section in enumerate(sections, 1):
        length = _length_of(section, lengths, number)
        rope, loss = (repr(each) for each in (section.rope, section.loss))
        own = (length, section.global_batch or global_batch, section.micro_batch, rope, loss)
        begins = bool(entries) and own != shape
        if begins:
            last = entries[-1]
            assert last.slots is not None
            entries[-1] = replace(last, slots=last.slots + -since % batch)
            since = 0
        shape, batch = own, section.global_batch or global_batch or 1
        slots = None if section.tokens is None else -(-section.tokens // length)
        since += slots or 0
        entries.append(CurriculumEntry(slots, section.weights, section.global_batch, begins))
    return entries


def segments_of(curriculum: Sequence[CurriculumEntry], lengths: Mapping[str, int]) -> tuple[Segment, ...]:
    """The segments of a curriculum's entries; `lengths`: tokens of a sequence of each source."""
    segments: list[Segment] = []
    start = 0
    for index, entry in enumerate(curriculum):
        length = lengths[next(iter(entry.weights))]
        stop = None if entry.slots is None else start + entry.slots
        if segments and not entry.begins_segment and segments[-1].sequence_length == length:
            segments[-1] = replace(segments[-1], stop=stop)
        else:
            segments.append(Segment(start, stop, length, entry.batch, index))
        start += entry.slots or 0
    return tuple(segments)


def _length_of(section: EntrySection, lengths: Mapping[str, int], number: int) -> int:
    for name in section.weights:
        length = lengths[name]
        if section.sequence_length not in (None, length):
            raise UserError(
                f"data.curriculum: entry {number} has sequence_length {section.sequence_length}, its source {name} "
                f"sequences of {length} tokens: name sources that were tokenized with --sequence-length "
                f"{section.sequence_length}"
            )
    return length


def _bos_of_files(data: Mixture) -> int | None:
    with TemporaryDirectory() as made:
        try:
            write_files(Path(made), read_files(data.first))
            return load_tokenizer(Path(made) / data.tokenizer.file.rpartition("/")[2]).bos
        except UserError:
            return None
