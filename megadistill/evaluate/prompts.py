"""Prompts to sample from a model: typed ones, files, and the first tokens of held-out text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megadistill.data import Manifest, Mixture, TokenStream
from megadistill.data.shards.packing import Ids
from megadistill.data.tokenizers.tokenizer import Tokenizer
from megadistill.errors import UserError
from megadistill.io import read_file, reason_of
from megadistill.types import IGNORED_LABEL

MAX_PROMPT_BYTES = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str
    ids: tuple[int, ...]
    original: tuple[int, ...] | None = None
    """Ids of its continuation in the data; None for a prompt from elsewhere."""


def typed_prompts(texts: Sequence[str], files: Sequence[Path], tokenizer: Tokenizer) -> list[Prompt]:
    """A prompt for each text and each file. It begins as documents of the training data do.

    Raises:
        UserError: a file cannot be read, or is not text.
    """
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    prompts = []
    for text in (*texts, *map(_text_of, files)):
        ids = [*begin, *tokenizer.encode(text).tolist()]
        prompts.append(Prompt(text, tuple(ids or [tokenizer.eos])))  # behind whose end a document begins
    return prompts


def held_out_prompts(
    manifest: Manifest,
    tokenizer: Tokenizer,
    *,
    sequences: int,
    prompt_tokens: int,
    new_tokens: int,
    insert_bos: bool = False,
) -> list[Prompt]:
    """The first tokens of the first sequences of a split, those that are one stretch of text.

    `insert_bos`: with BOS in front where a sequence does not begin with it.

    Raises:
        UserError: a number out of its range, or no sequence has that many tokens.
    """
    for option, value in (("--sequences", sequences), ("--prompt-tokens", prompt_tokens)):
        if value < 1:
            raise UserError(f"{option} {value}: give at least 1")
    stream = TokenStream(Mixture.of(manifest, insert_bos=insert_bos), seed=0, batch_slots=1, rank=0, world_size=1)
    prompts: list[Prompt] = []
    for slot in range(manifest.sequences if prompt_tokens <= manifest.sequence_length else 0):
        read = stream.batch(range(slot, slot + 1))
        if (read.labels[0, :prompt_tokens] != IGNORED_LABEL).all():
            ids, labels = read.tokens[0, :prompt_tokens].tolist(), read.labels[0, prompt_tokens - 1 :][:new_tokens]
            original = labels[labels != IGNORED_LABEL].tolist()
            prompts.append(Prompt(decoded(tokenizer, ids), tuple(ids), tuple(original)))
        if len(prompts) == sequences:
            break
    if not prompts:
        raise UserError(
            f"--prompt-tokens {prompt_tokens}: no sequence of the split begins with so many tokens of text (they have "
            f"{manifest.sequence_length} at most): give fewer"
        )
    return prompts


def _text_of(file: Path) -> str:
    try:
        return read_file(file, max_bytes=MAX_PROMPT_BYTES).decode()
    except OSError as error:
        raise UserError(f"--prompt-file {file} cannot be read ({reason_of(error)}): give a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {file} is not UTF-8 text: give a text file") from None
    except ValueError:
        raise UserError(f"--prompt-file {file} is longer than {MAX_PROMPT_BYTES:,} bytes: give its end alone") from None


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of some ids."""
    decodable: Ids = np.array(ids, dtype=np.int32)
    return tokenizer.decode(decodable)
