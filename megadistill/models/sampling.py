"""Sampling of continuations from a causal language model.

Legend: B prompts, P tokens of each, N new tokens of each, V ids of the true vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megadistill.config.bounds import MAX_TEMPERATURE, MIN_TEMPERATURE
from megadistill.errors import OperatorFault, UserError
from megadistill.rng import keyed_generator


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn. At `temperature` 0 each is the most likely one, token by token.

    Raises:
        UserError: a number is out of its range.
    """

    new_tokens: int
    """Maximum tokens of a continuation."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise UserError(f"--new-tokens {self.new_tokens}: give at least 1")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise UserError(
                f"--temperature {self.temperature}: give 0 for the most likely token, or from {MIN_TEMPERATURE} to "
                f"{MAX_TEMPERATURE:,}"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: give a share above 0, up to 1 for the whole distribution")

    def uniforms(self, name: str) -> Tensor:
        """[new_tokens] float64 in [0, 1), by the seed and the continuation's name alone."""
        return torch.from_numpy(keyed_generator(self.seed, name).random(self.new_tokens))


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    prompts_BP: Tensor,
    uniforms_BN: Tensor,
    *,
    temperature: float,
    top_p: float,
    eos: int,
    vocab_size: int,
) -> Tensor:
    """[B, N] int64 on the host: the model's continuation of each prompt, and `eos` in every place after an `eos`.

    The keys and values of what was read are kept, so each token is read once. A prompt's continuation depends on its
    own row of `uniforms_BN` (float64 in [0, 1), on the host) and of `prompts_BP` alone, but for the rounding of the
    model's products, which may vary with B. A device sync a token.

    Raises:
        OperatorFault: the model's logits are not finite.
    """
    N = uniforms_BN.shape[1]
    uniforms_BN = uniforms_BN.to(model.device)
    ids, cache = prompts_BP.to(model.device), None
    new_BN = torch.full(uniforms_BN.shape, eos, device=model.device)
    ended_B = torch.zeros(len(prompts_BP), dtype=torch.bool, device=model.device)
    for place in range(N):
        output: Any = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits_BV = output.logits[:, -1, :vocab_size].double()
        chosen_B = draw_ids(logits_BV, uniforms_BN[:, place], temperature=temperature, top_p=top_p)
        new_BN[:, place] = torch.where(ended_B, eos, chosen_B)
        ended_B |= new_BN[:, place] == eos
        all_ended, finite = torch.stack([ended_B.all(), logits_BV.isfinite().all()]).tolist()
        if not finite:
            raise OperatorFault("the model's logits are not finite: check its weights and its dtype")
        if all_ended:
            break
        ids = new_BN[:, place : place + 1]
    return new_BN.cpu()


def draw_ids(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """[B]: for each row the id at which the most likely ids, one after the other, add up to more than its uniform
    number of what the fewest of them hold that reach `top_p`. Of equals the lowest id comes first.

    At temperature 0 the most likely id. `logits_BV` and `uniforms_B` are float64.
    """
    if temperature == 0:
        return logits_BV.argmax(dim=1)
    z_BV, ids_BV = logits_BV.sort(dim=1, descending=True, stable=True)
    cdf_BV = (z_BV / temperature).softmax(dim=1).cumsum(dim=1)
    last_B1 = torch.searchsorted(cdf_BV, top_p * cdf_BV[:, -1:])  # rounding may put the end of the sum below 1
    last_B1.clamp_(max=cdf_BV.shape[1] - 1)  # a NaN lies behind every number: the caller refuses it, an index may not
    point_B1 = uniforms_B.unsqueeze(1) * cdf_BV.gather(1, last_B1)
    place_B1 = torch.minimum(torch.searchsorted(cdf_BV, point_B1, right=True), last_B1)
    return ids_BV.gather(1, place_B1).squeeze(1)
