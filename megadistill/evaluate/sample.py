"""What a model writes after a prompt. It reads one Hugging Face folder whole, on one device, and measures nothing.

Legend: P tokens of a prompt, N new tokens, C continuations of a prompt.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from megadistill.data import Manifest
from megadistill.data.tokenizers.base import Tokenizer, load_tokenizer
from megadistill.errors import OperatorFault, UserError
from megadistill.evaluate.models import check_model
from megadistill.evaluate.prompts import Prompt, decoded
from megadistill.models.families import load_config
from megadistill.models.sampling import continuations, require_drawable
from megadistill.models.weights import check_weights, load_pretrained
from megadistill.rng import keyed_generator

AT_A_TIME = 32
"""Continuations of a prompt that are drawn together."""


@dataclass(frozen=True)
class Draws:
    """How continuations are drawn. At `temperature` 0 each is the most likely one, token by token.

    Raises:
        UserError: a number out of its range.
    """

    tokens: int
    """N, at most."""
    count: int = 1
    """C."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        require_drawable(self.temperature, self.top_p, {"--tokens": self.tokens, "--count": self.count})


@dataclass(frozen=True)
class Continuation:
    text: str
    tokens: int
    """Those that were drawn, the one that ends the document not counted."""
    ended: bool
    """The model ended the document."""


@dataclass(frozen=True)
class Sample:
    prompt: str
    original: str | None
    """How the text of the data goes on."""
    continuations: tuple[Continuation, ...]


def load_for_sampling(folder: Path, manifest: Manifest | None) -> Tokenizer:
    """The tokenizer of a model that can be sampled from, and that goes with a split; reads no weights.

    Raises:
        UserError: it is a run folder, no model, a model without a tokenizer, or one that does not go with the split.
    """
    if (folder / "recipe.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is a run folder: write its student as a Hugging Face folder first, with "
            f"`megadistill export {folder} --output DIR`, and sample from that"
        )
    config = load_config(folder, what=str(folder))
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: the folder mixes "
            "two models"
        )
    check_weights(folder, config)
    if manifest is not None:
        check_model(folder, manifest)
    return tokenizer


def samples(
    folder: Path, prompts: Sequence[Prompt], tokenizer: Tokenizer, draws: Draws, device: torch.device
) -> Iterator[Sample]:
    """What the model writes after each prompt, one after the other. It depends on the model, the prompt, its place
    among the prompts and the seed alone, but for the rounding of the model's products.

    Raises:
        UserError: a prompt and what follows it are longer than the model reads. OperatorFault: logits are not finite.
    """
    places = load_config(folder, what=str(folder)).max_position_embeddings
    for prompt in prompts:
        if len(prompt.ids) + draws.tokens > places:
            raise UserError(
                f"a prompt of {len(prompt.ids)} tokens and --tokens {draws.tokens} make "
                f"{len(prompt.ids) + draws.tokens}, but {folder} reads {places}: give fewer"
            )
    model = load_pretrained(folder, what=str(folder), device=device)
    for number, prompt in enumerate(prompts):
        drawn: list[Tensor] = []
        for start in range(0, draws.count, AT_A_TIME):
            several = range(start, min(start + AT_A_TIME, draws.count))
            try:
                drawn += continuations(
                    model,
                    torch.tensor(prompt.ids).expand(len(several), -1),
                    torch.stack([_uniforms(draws, number, one) for one in several]),
                    temperature=draws.temperature,
                    top_p=draws.top_p,
                    eos=tokenizer.eos,
                    vocab_size=tokenizer.vocab_size,
                )
            except OperatorFault:
                raise OperatorFault(f"{folder}: its logits are not finite: look at its weights") from None
        original = None if prompt.original is None else _after(tokenizer, prompt.ids, prompt.original)
        yield Sample(prompt.text, original, tuple(_continuation(tokenizer, prompt, new_N) for new_N in drawn))


def show(sample: Sample, console: Console, *, title: str) -> None:
    """The prompt and what follows it, for a person; nothing that a model writes can control the terminal."""
    console.rule(Text(title), align="left")
    console.print(Text(harmless(sample.prompt), style="bold"), soft_wrap=True)
    for number, continuation in enumerate(sample.continuations, start=1):
        many = f"{number} of {len(sample.continuations)}, " if len(sample.continuations) > 1 else ""
        end = ", then the end of the document" if continuation.ended else ""
        console.rule(Text(f"the model: {many}{continuation.tokens} tokens{end}"), align="left", style="dim")
        console.print(Text(harmless(continuation.text)), soft_wrap=True)
    if sample.original is not None:
        console.rule(Text("the data"), align="left", style="dim")
        console.print(Text(harmless(sample.original)), soft_wrap=True)


def write_json(found: Sequence[Sample], path: Path) -> None:
    """A list, one object a prompt; the text as it was written, unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(sample) for sample in found], indent=1) + "\n", encoding="utf-8")


def harmless(text: str) -> str:
    """What is not printable, but for tabs and ends of lines, as an escape: a terminal obeys some of it."""
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
    """The text that `new` adds to the prompt's; a letter whose bytes both share is the new text's."""
    before, whole = decoded(tokenizer, prompt), decoded(tokenizer, [*prompt, *new])
    shared = (number for number, (ours, theirs) in enumerate(zip(before, whole, strict=False)) if ours != theirs)
    return whole[next(shared, min(len(before), len(whole))) :]


def _uniforms(draws: Draws, prompt: int, number: int) -> Tensor:
    """[N] float64 in [0, 1): by the seed and the numbers of prompt and continuation alone."""
    return torch.from_numpy(keyed_generator(draws.seed, f"sample/{prompt}/{number}").random(draws.tokens))
