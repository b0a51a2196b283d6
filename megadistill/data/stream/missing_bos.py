"""Sequences without the BOS that a model expects: Gemma's and Llama's were trained with it in front of every text."""

from pathlib import Path

from megadistill.data.shards.insert_bos import beginnings
from megadistill.data.stream.mixture import Mixture
from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.data.tokenizers.tokenizer_file import tokenizer_files
from megadistill.errors import UserError
from megadistill.units import number_of


def missing_bos(model: Path | None, data: Mixture, *, key: str) -> str | None:
    """A line with numbers and the way out, where the tokenizer of a model's folder puts BOS before a text and not all
    sequences begin with it; None: nothing is missing. `key`: the setting that puts BOS in at reading time.

    `model` None, or a folder without a tokenizer: the data's tokenizer decides. A manifest that does not record that
    its sequences begin with BOS is not believed to say no: its first sequences are looked at.
    """
    try:
        bos = load_tokenizer(model).bos if model is not None and tokenizer_files(model) else data.bos
    except UserError:  # other checks say what is wrong with the folder
        return None
    if bos is None or (data.insert_bos and data.bos == bos):
        return None
    lacking = {}
    for name, manifest in data.sources.items():
        begin, read = beginnings(manifest, bos)
        if begin < read:
            lacking[name] = (begin, read)
    if not lacking:
        return None
    name, (begin, read) = next(iter(lacking.items()))
    of = f" of {name}" if len(data.sources) > 1 else ""
    whose = "the tokenizer" if model is None else f"the tokenizer in {model}"
    others = f" ({number_of(len(lacking) - 1, 'other source')} too)" if len(lacking) > 1 else ""
    tokenizer = "TOKENIZER" if model is None else model
    way_out = f"tokenize the text again (megadistill tokenize ... --tokenizer {tokenizer})"
    if data.bos == bos:
        way_out += f", or have it put in at reading time: {key}"
    return (
        f"{begin:,} of the first {read:,} sequences{of}{others} begin with BOS (id {bos}), which {whose} puts before "
        "every text: a model that was trained with it predicts worse without (Gemma 3 270M: a CE of 2.84 instead of "
        f"2.11): {way_out}"
    )
