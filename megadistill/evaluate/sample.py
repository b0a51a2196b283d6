"""Continuations of prompts by a model in a Hugging Face folder, on one device.

Legend: N new tokens.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from megadistill.data import Manifest, Mixture, missing_bos
from megadistill.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megadistill.errors import OperatorFault, UserError
from megadistill.evaluate.models import check_model
from megadistill.evaluate.prompts import Prompt, decoded
from megadistill.models.families import load_config
from megadistill.models.sampling import Sampling, continuations
from megadistill.models.weights import check_weights, load_pretrained

logger = logging.getLogger(__name__)

AT_A_TIME = 32
"""Maximum continuations of a prompt in a batch."""


@dataclass(frozen=True)
class Continuation:
    """One continuation of a prompt."""

    text: str
    tokens: int
    """Sampled tokens, without the one that ends the document."""
    ended: bool
    """Whether the model ended the document."""


@dataclass(frozen=True)
class Sample:
    """A prompt with its continuations."""

    prompt: str
    original: str | None
    """Continuation in the data; None for a prompt from elsewhere."""
    continuations: tuple[Continuation, ...]


def load_for_sampling(folder: Path, manifest: Manifest | None, *, insert_bos: bool = False) -> Tokenizer:
    """The tokenizer of a model that can be sampled from and that fits a split. No weights are read.

    A line is logged where the split's sequences lack the model's BOS. `insert_bos`: it is put in front of them.

    Raises:
        UserError: a run folder, no model, a model without a tokenizer, or one that does not fit the split.
    """
    config = load_config(folder, what=str(folder))
    tokenizer = load_tokenizer(folder)
    largest = tokenizer.largest_text_id
    if largest >= config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer gives ids up to {largest}, the model has {config.vocab_size} rows: the folder "
            "mixes two models"
        )
    check_weights(folder, config)
    if manifest is not None:
        check_model(folder, manifest)
        if problem := missing_bos(folder, Mixture.of(manifest, insert_bos=insert_bos), key="--insert-bos"):
            logger.warning("--data: %s", problem)
    return tokenizer


def samples(
    folder: Path,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    sampling: Sampling,
    *,
    count: int,
    device: torch.device,
) -> Iterator[Sample]:
    """`count` continuations of each prompt, prompt by prompt.

    They depend on the model, the prompt, its place among the prompts and the seed alone, but for the rounding of the
    model's products.

    Raises:
        UserError: a prompt and its continuation are longer than the model's positions.
        OperatorFault: logits are not finite.
    """
    if count < 1:
        raise UserError(f"--count {count}: give at least 1")
    positions = load_config(folder, what=str(folder)).max_position_embeddings
    for prompt in prompts:
        if len(prompt.ids) + sampling.new_tokens > positions:
            raise UserError(
                f"a prompt of {len(prompt.ids)} tokens and --new-tokens {sampling.new_tokens} make "
                f"{len(prompt.ids) + sampling.new_tokens}, but {folder} reads {positions}: give fewer"
            )
    model = load_pretrained(folder, what=str(folder), device=device)
    for place, prompt in enumerate(prompts):
        rows: list[Tensor] = []
        for start in range(0, count, AT_A_TIME):
            numbers = range(start, min(start + AT_A_TIME, count))
            try:
                rows += continuations(
                    model,
                    torch.tensor(prompt.ids).expand(len(numbers), -1),
                    torch.stack([sampling.uniforms(f"sample/{place}/{number}") for number in numbers]),
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    eos=tokenizer.eos,
                    vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
                )
            except OperatorFault:
                raise OperatorFault(f"{folder}: its logits are not finite: look at its weights") from None
        original = None if prompt.original is None else _after(tokenizer, prompt.ids, prompt.original)
        yield Sample(prompt.text, original, tuple(_continuation(tokenizer, prompt, new_N) for new_N in rows))


def show(sample: Sample, console: Console, *, title: str) -> None:
    """Prints the prompt and its continuations; no text of a model can control the terminal."""
    console.rule(Text(title), align="left")
    console.print(Text(escape_control(sample.prompt), style="bold"), soft_wrap=True)
    for number, continuation in enumerate(sample.continuations, start=1):
        many = f"{number} of {len(sample.continuations)}, " if len(sample.continuations) > 1 else ""
        end = ", then the end of the document" if continuation.ended else ""
        console.rule(Text(f"the model: {many}{continuation.tokens} tokens{end}"), align="left", style="dim")
        console.print(Text(escape_control(continuation.text)), soft_wrap=True)
    if sample.original is not None:
        console.rule(Text("the data"), align="left", style="dim")
        console.print(Text(escape_control(sample.original)), soft_wrap=True)


def escape_control(text: str) -> str:
    """`text` with escapes for characters that are not printable, other than tabs and ends of lines."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _continuation(tokenizer: Tokenizer, prompt: Prompt, new_N: Tensor) -> Continuation:
    new = new_N.tolist()
    ended = tokenizer.eos in new
    written = new[: new.index(tokenizer.eos)] if ended else new
    return Continuation(_after(tokenizer, prompt.ids, written), len(written), ended)


def _after(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text that `new` adds to the prompt's; a letter whose bytes both share belongs to the new text."""
    before, whole = decoded(tokenizer, prompt), decoded(tokenizer, [*prompt, *new])
    shared = (number for number, (ours, theirs) in enumerate(zip(before, whole, strict=False)) if ours != theirs)
    return whole[next(shared, min(len(before), len(whole))) :]
