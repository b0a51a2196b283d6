"""The kinds of selection: which ids of the teacher's distribution become sparse targets."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Sampled:
    """`draws` independent draws from the teacher's distribution; a target is counts/draws, which is unbiased
    (arXiv:2503.16870). The uniform numbers of the draws are an argument, so the same ones give the same ids again."""

    draws: int

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(
                f"draws is {self.draws}; a target needs at least one draw, and 50 come close to the full KL"
            )


@dataclass(frozen=True)
class SampledDistinct:
    """k distinct ids, drawn without replacement by the teacher's probabilities; all where it knows fewer. A target is
    its probabilities over them, scaled to 1, as the Gemma 3 report (arXiv:2503.19786) describes its own. Biased: a
    likely id is drawn as surely as its probability says only while k is small, and is scaled up nevertheless. The
    uniform number of a token is an argument, so the same one gives the same ids again."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; draw at least one id, or Gemma 3's 256")


@dataclass(frozen=True)
class TopK:
    """The k most likely ids; all of them where the vocabulary has fewer."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; select at least one id")


@dataclass(frozen=True)
class Threshold:
    """Every id with p ≥ epsilon: at most 1/epsilon of them, and none where the teacher is too uncertain."""

    epsilon: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}; it is the lowest probability to select, between 0 and 1")


@dataclass(frozen=True)
class TopP:
    """The fewest ids whose probabilities add up to `p`, the most likely first, and at most `max_ids` of them: 0.95 and
    50 in Peng et al. (arXiv:2410.16215)."""

    p: float
    max_ids: int

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"p is {self.p}; pass a share between 0 and 1, or TopK({self.max_ids}) to select all")
        if self.max_ids < 1:
            raise ValueError(f"max_ids is {self.max_ids}; select at least one id")


Selection = Sampled | SampledDistinct | TopK | Threshold | TopP


def uniforms_per_token(selection: Selection) -> int:
    """Uniform random numbers that a token's targets need."""
    if isinstance(selection, Sampled):
        return selection.draws
    return 1 if isinstance(selection, SampledDistinct) else 0


class SelectedIds(NamedTuple):
    """The targets of some tokens."""

    ids: Tensor
    """[n, W], -1 after the last one of a row."""
    probs: Tensor
    """[n, W]"""
    log_tail: Tensor
    """[n]"""


def pad_columns(rows: Tensor, width: int, fill: float) -> Tensor:
    """[n, width]: cut off, or filled up."""
    return pad(rows, (0, width - rows.shape[1]), value=fill)
