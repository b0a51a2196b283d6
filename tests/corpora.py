"""A data set of a few sequences, made by the package itself, for tests that are about something else."""

from pathlib import Path

from megadistill.data import tokenize

VOCAB = 300


def small_data_set(
    folder: Path, *, sequence_length: int, heldout_fraction: float, documents: int = 12, repeats: int = 2
) -> Path:
    """Some lines of Python in `VOCAB` pieces: the folder of tokenizer/, train/ and, of a share held out, heldout/."""
    for number in range(documents):
        text = f"def function_{number}(x):\n    return x * {number} + {number * 7}\n" * repeats
        (folder / f"text{number}.py").write_text(text, encoding="utf-8")
    tokenize(
        [folder],
        folder / "set",
        tokenizer=None,
        vocab_size=VOCAB,
        sequence_length=sequence_length,
        heldout_fraction=heldout_fraction,
        progress=lambda stage, **numbers: None,
    )
    return folder / "set"
