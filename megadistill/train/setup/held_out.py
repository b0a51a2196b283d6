"""The held-out splits that a run validates on, read and checked before it starts."""

from collections.abc import Collection, Iterable, Iterator

from torch import Tensor

from megadistill.config.recipe import Recipe
from megadistill.data import Manifest, Mixture, missing_rows
from megadistill.errors import UserError
from megadistill.heldout.splits import Split
from megadistill.train.setup.vocab_map import translated

ROWS = 64
"""Sequences that are read at a time."""


def held_out_splits(recipe: Recipe, data: Mixture) -> tuple[Split, ...]:
    """The splits of `validation.data`, in its order; none without that section. Opens no shard.

    Raises:
        UserError: a manifest cannot be read, or the run's models cannot read the split as they read the training data.
    """
    if recipe.validation is None:
        return ()
    limit, splits = recipe.validation.sequences, []
    lengths = sorted({segment.sequence_length for segment in data.segments})
    for name, location in recipe.validation.data.items():
        try:
            manifest = Manifest.load(location)
        except UserError as error:
            raise UserError(f"validation.data.{name}: {error}") from None
        if problem := next(_problems(manifest, data, lengths), None):
            raise UserError(f"validation.data.{name}: {problem}")
        splits.append(Split(name, manifest, limit, recipe.data.insert_bos))
    return tuple(splits)


def _problems(manifest: Manifest, data: Mixture, lengths: list[int]) -> Iterator[str]:
    """Reasons for which a run on `data` cannot read the split, each with a way out."""
    if manifest.tokens == 0:
        yield "it has no token to predict: give another split"
    if manifest.sequence_length not in lengths:
        theirs = " or ".join(map(str, lengths))
        yield (
            f"its sequences have {manifest.sequence_length} tokens, those of the training data {theirs}: the models of "
            "the run read micro-batches of one shape, so tokenize the held-out text with --sequence-length "
            f"{lengths[-1]}"
        )
    if manifest.tokenizer.sha256 != data.tokenizer.sha256:
        yield (
            f"it was made by another tokenizer (sha256 {manifest.tokenizer.sha256[:12]}…) than the training data "
            f"({data.tokenizer.sha256[:12]}…): tokenize the held-out text with the one of the training data"
        )
    if problem := missing_rows(data.vocab_size, [manifest]):
        yield f"the student cannot read it: {problem}: give a split without such ids"


def refuse_unknown_ids(
    splits: Iterable[Split], ids_U: Tensor, *, sources: Collection[str], document_mask: bool
) -> None:
    """Refuses splits with a token for which the teacher has no id, which would end the run at its first validation.

    Reads the splits, where the map has such ids at all.

    Args:
        ids_U: see `translated`.
        sources: those that one of several teachers teaches, whose splits it reads; empty: it reads all splits.

    Raises:
        UserError: one line.
    """
    if bool((ids_U >= 0).all()):
        return
    for split in splits:
        if sources and split.name not in sources:
            continue
        stream = split.stream(document_mask=document_mask, masks_corrupt=True)
        for start in range(0, split.sequences, ROWS):
            try:
                translated(stream.batch(range(start, min(start + ROWS, split.sequences))), ids_U)
            except UserError as error:
                raise UserError(f"validation.data.{split.name}: {error}") from None


def training_shards_in(splits: tuple[Split, ...], data: Mixture) -> Iterator[str]:
    """A warning for each split of which the run trains on shards too, by the shards' sha256."""
    trained = {shard.sha256: name for name, manifest in data.sources.items() for shard in manifest.shards}
    for split in splits:
        shared = [trained[shard.sha256] for shard in split.manifest.shards if shard.sha256 in trained]
        if shared:
            yield (
                f"validation.data.{split.name}: the run trains on {len(shared)} of its {len(split.manifest.shards)} "
                f"shards ({', '.join(sorted(set(shared)))}): its measures tell what the student has memorised; give a "
                "split that was held out (megadistill tokenize --heldout-fraction)"
            )


def unmasked_splits(splits: tuple[Split, ...], recipe: Recipe) -> Iterator[str]:
    """A line for each split that the run measures otherwise than `megadistill evaluate`."""
    for split in splits:
        if split.documents and not recipe.data.document_mask:
            yield (
                f"validation.data.{split.name}: its documents are packed by best fit, and are read together, as "
                "data.document_mask false trains; `megadistill evaluate` reads each by itself"
            )
