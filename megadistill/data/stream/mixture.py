"""What a run reads: the splits that its recipe names, and the stages that mix them. It reads no shard.

Legend: S tokens of a sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megadistill.config import DataSection
from megadistill.data.shards.manifest import Manifest, TokenizerRecord
from megadistill.data.stream.order import Order, Source, Stage
from megadistill.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """Splits by name, and the stages that deal sequences out to them; the last stage has no end.

    Raises:
        UserError: the splits do not fit together.
    """

    sources: Mapping[str, Manifest]
    stages: Sequence[Stage]

    def __post_init__(self) -> None:
        (first_name, first), *others = self.sources.items()
        for name, manifest in others:
            for what in ("sequence_length", "vocab_size"):
                if getattr(manifest, what) != getattr(first, what):
                    raise UserError(
                        f"data.sources: {name} has {what} {getattr(manifest, what)}, {first_name} has "
                        f"{getattr(first, what)}: sources of one mixture must agree, tokenize one of them again"
                    )
            if manifest.tokenizer.sha256 != first.tokenizer.sha256:
                raise UserError(
                    f"data.sources: {name} was made by another tokenizer (sha256 {manifest.tokenizer.sha256[:12]}…) "
                    f"than {first_name} ({first.tokenizer.sha256[:12]}…): tokenize one of them again"
                )

    @classmethod
    def of(cls, manifest: Manifest) -> "Mixture":
        """One split, for ever."""
        return cls({"data": manifest}, (Stage(None, {"data": 1}),))

    @classmethod
    def load(cls, section: DataSection) -> "Mixture":
        """What a recipe's `data` names.

        Raises:
            UserError: a manifest cannot be read, or the sources do not fit together.
        """
        if section.manifest is not None:
            return cls.of(Manifest.load(section.manifest))
        sources = {name: Manifest.load(location) for name, location in section.sources.items()}
        sequence_length = next(iter(sources.values())).sequence_length
        stages = [
            Stage(None if stage.tokens is None else -(-stage.tokens // sequence_length), stage.weights)
            for stage in section.stages
        ]
        return cls(sources, stages)

    @property
    def _any(self) -> Manifest:
        return next(iter(self.sources.values()))

    @property
    def sequence_length(self) -> int:
        """S."""
        return self._any.sequence_length

    @property
    def vocab_size(self) -> int:
        """The true number of ids."""
        return self._any.vocab_size

    @property
    def tokenizer(self) -> TokenizerRecord:
        return self._any.tokenizer

    def tokenizer_file(self, name: str, *, max_bytes: int) -> bytes:
        """A file that lies beside the tokenizer's own. Raises OSError: there is none."""
        record, folder = self._any.tokenizer, self._any.folder
        return folder.sibling(record.file.rpartition("/")[0] or ".").read_whole(name, max_bytes=max_bytes)

    def order(self, seed: int) -> Order:
        sources = {
            name: Source(manifest.fingerprint, [shard.units for shard in manifest.shards])
            for name, manifest in self.sources.items()
        }
        return Order(sources, self.stages, seed=seed)
