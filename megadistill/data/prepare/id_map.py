"""Making a `teacher.vocab_map` for two tokenizers that cut text alike and number their tokens differently."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megadistill.data.shards.manifest import Manifest
from megadistill.data.stream.stream import TokenStream
from megadistill.data.tokenizers.token_table import SAMPLE_TEXTS, TokenTable
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.data.tokenizers.tokenizer_file import TokenizerFile, no_tokenizer_files, tokenizer_files
from megadistill.errors import UserError
from megadistill.io import write_json

SEQUENCES = 256
"""Sequences of the data that are looked at."""
WORDS = [word for text in SAMPLE_TEXTS for word in text.split()]
"""Texts that are compared where there is no data."""
LEAST_ALIKE = 0.9
"""Share of the texts that both tokenizers must cut alike."""


@dataclass(frozen=True)
class VocabMap:
    """The teacher's id of each of the student's, -1 for none, and how well it fits."""

    ids: list[int]
    teacher_ids: int
    texts_alike: float
    """Share of the texts that both tokenizers cut alike: lines of the data, or words."""
    tokens_mapped: float | None
    """Share of the tokens of the data that have a teacher's id; None: without data."""

    def lines(self) -> list[str]:
        """Lines on the meaning of the map for a run."""
        mapped = sum(id >= 0 for id in self.ids)
        lines = [
            f"{mapped:,} of the student's {len(self.ids):,} ids ({mapped / len(self.ids):.2%}) have one of the "
            f"teacher's {self.teacher_ids:,}; {self.texts_alike:.1%} of the texts that were compared are cut alike"
        ]
        if mapped < len(self.ids):
            lines.append(
                "the teacher's distribution, and with it the KL, is over these ids alone, renormalized: the teacher "
                "gives the others no probability, so reverse KL is refused"
            )
        if self.tokens_mapped is not None:
            lines.append(f"{self.tokens_mapped:.4%} of the tokens of the data have a teacher's id")
        if self.tokens_mapped is not None and self.tokens_mapped < 1:
            lines.append("a run ends at the first token that has none: tokenize the text without those tokens")
        return lines


def make_vocab_map(student: Path, teacher: Path, output: Path, *, data: str | None) -> VocabMap:
    """Writes to `output` the map from the ids of one tokenizer to those of another, by equal tokens.

    The two end-of-document tokens are mapped to each other whatever their names. `data` is the manifest.json of a split
    that was made with the student's tokenizer.

    Raises:
        UserError: a tokenizer cannot be read, or the two cut text differently: the teacher would read another text.
    """
    ours, theirs = (_table(path, option) for path, option in ((student, "--student"), (teacher, "--teacher")))
    by_token = {token: id for id, token in theirs.tokens.items()}
    ids = [by_token.get(ours.tokens.get(id, ""), -1) for id in range(max(ours.tokens) + 1)]
    with suppress(UserError):  # one of them names no end of a document
        own, other = load_tokenizer(student).eos, load_tokenizer(teacher).eos
        if ids[own] < 0 and other not in ids:
            ids[own] = other
    sequences = None if data is None else _sequences(data, len(ids))
    texts = WORDS if sequences is None else _lines(ours, sequences)
    alike = _share_alike(ours, theirs, ids, texts)
    if alike < LEAST_ALIKE:
        raise UserError(
            f"{student} and {teacher} cut {1 - alike:.0%} of {'some words' if data is None else 'the data'} "
            "differently, so a map of ids would make the teacher read another text than it was trained on: tokenize "
            f"the text with the teacher's tokenizer (megadistill tokenize ... --tokenizer {teacher})"
        )
    if not any(id >= 0 for id in ids):
        raise UserError(f"{student} and {teacher} have no token in common")
    tokens_mapped = None
    if sequences is not None:
        tokens = [token for sequence in sequences for token in sequence]
        tokens_mapped = sum(ids[token] >= 0 for token in tokens) / len(tokens)
    write_json(output, ids)
    return VocabMap(ids, max(theirs.tokens) + 1, alike, tokens_mapped)


def _table(path: Path, option: str) -> TokenTable:
    for kind, file in tokenizer_files(path).items():
        return TokenizerFile.read(kind, file).table
    raise UserError(f"{option}: {no_tokenizer_files(path)}: give the folder of a tokenizer")


def _sequences(data: str, ids: int) -> list[list[int]]:
    manifest = Manifest.load(data)
    if manifest.vocab_size != ids:
        raise UserError(
            f"--data: {data} was made with {manifest.vocab_size} ids, the student's tokenizer has {ids}: give data "
            "that was tokenized with it"
        )
    stream = TokenStream(manifest, seed=0, batch_slots=1, rank=0, world_size=1, prefetch=0)
    return list(stream.batch(range(min(SEQUENCES, manifest.sequences))).tokens.tolist())


def _lines(ours: TokenTable, sequences: Sequence[list[int]]) -> list[str]:
    """Lines of text of the sequences, without their first and last, which may be cut."""
    texts = [ours.decode([id for id in sequence if id not in ours.special]) for sequence in sequences]
    lines = [line for text in texts for line in text.split("\n")[1:-1] if line.strip()]
    return lines or texts


def _share_alike(ours: TokenTable, theirs: TokenTable, ids: Sequence[int], texts: Sequence[str]) -> float:
    pairs = zip(ours.encode(texts), theirs.encode(texts), strict=True)
    return sum([ids[id] for id in own] == their for own, their in pairs) / len(texts)
