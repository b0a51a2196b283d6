"""The ids that can occur in a data set. A model needs a row of its vocabulary for these, and for no others.

Published tokenizers name ids beyond the rows of their model: Gemma 3's has 262,145, its text models have 262,144 rows,
and no text gives the last one, that of an image.
"""

from collections.abc import Iterable

from megadistill.data.shards.manifest import Manifest
from megadistill.data.tokenizers.model_tokenizer import file_of_data


def largest_id(manifest: Manifest) -> int:
    """The largest id that can occur in a split: as its manifest records it.

    Where it records none, the largest id that a text can give, or that stands around a document. Of shards of another
    program, whose ids need not come from text, it is the tokenizer's last one.
    """
    frame = [id for id in (manifest.packer.bos, manifest.packer.eos) if id is not None]
    if manifest.largest_id is not None:
        return max(manifest.largest_id, *frame)
    file = None if manifest.packer.name == "external" else file_of_data(manifest, manifest.tokenizer.kind)
    if file is None:
        return manifest.vocab_size - 1
    return max([*(file.table.tokens.keys() - file.table.special), *frame], default=manifest.vocab_size - 1)


def missing_rows(rows: int, manifests: Iterable[Manifest]) -> str | None:
    """A difference that keeps a model of so many `rows` from reading splits, in words; None: there is none.

    A model may have fewer rows than the tokenizer has ids, where those beyond the rows cannot occur.
    """
    for manifest in manifests:
        if rows >= manifest.vocab_size or (largest := largest_id(manifest)) < rows:
            continue
        occurs = "is in the shards" if manifest.largest_id is not None else "can be in the shards"
        return (
            f"its vocabulary has {rows} rows, the tokenizer of the shards {manifest.vocab_size} ids, and id {largest} "
            f"{occurs}"
        )
    return None
