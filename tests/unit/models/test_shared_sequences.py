"""Decoders of every family whose sequences are shared, against the same ones on whole sequences; and what is refused.

The ranks are threads, each with a copy of the decoder, and exchange blocks in memory.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.auto import Choice
from megadistill.config.recipe import Recipe
from megadistill.errors import UserError
from megadistill.models.attention.masks import omit_empty_masks
from megadistill.models.attention.sequence import key_copies, share_sequences
from megadistill.models.attention.shared_sequences import check_shared_sequences
from megadistill.models.families import FAMILIES, decoder, forward_inputs, load_config, transformers_attention
from megadistill.types import SequencePart, document_positions
from tests.ranks.student_cases import recipe_for
from tests.unit.models.cases import ALL_CASES, VOCAB, whole_model
from tests.unit.models.test_teacher_only import CASES as TEACHERS
from tests.unit.models.test_unequal_layers import CASES as UNEQUAL

B, S = 2, 16

BY_LENGTH = [name for name, keys in ALL_CASES.items() if "longrope" in str(keys) or "dynamic" in str(keys)]
RECURRENT = [name for name, keys in TEACHERS.items() if FAMILIES[keys["model_type"]].recurrent]
REFUSED = {"falcon_h1": "carry a state", "deepseek_v32": "indexers choose keys", "llama4": "scaled by their place"}


class _Exchange:
    """All-to-all among threads."""

    def __init__(self, ranks: int) -> None:
        self._barrier, self._sent = Barrier(ranks, timeout=120), [torch.empty(0)] * ranks

    def of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def exchange(blocks: Tensor) -> Tensor:
            self._sent[rank] = blocks
            self._barrier.wait()
            received = torch.stack([sent[rank] for sent in self._sent])
            self._barrier.wait()
            return received

        return exchange


def _inputs() -> tuple[Tensor, Tensor]:
    """Tokens, and positions of documents that begin at other places in each row, some at a bound of the parts."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (B, S), generator=generator)
    starts = torch.rand(B, S, generator=generator) < 0.2
    starts[:, 0] = starts[0, S // 2] = True
    return tokens, document_positions(starts)


def _hidden(model: Any, tokens: Tensor, positions: Tensor | None) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = decoder(model)(**forward_inputs(decoder(model), tokens, positions)).last_hidden_state
    return hidden


def _shared(model: Any, ranks: int, tokens: Tensor, positions: Tensor | None) -> Tensor:
    exchange = _Exchange(ranks)

    def of_rank(rank: int) -> Tensor:
        own, part = copy.deepcopy(model), SequencePart(rank, ranks)
        share_sequences(decoder(own), part, exchange.of(rank))
        return _hidden(own, part.of(tokens), positions)

    with ThreadPoolExecutor(ranks) as pool:
        return torch.cat(list(pool.map(of_rank, range(ranks))), dim=1)


def _model(case: str, attention: str) -> Any:
    model = whole_model(case)
    inner: Any = decoder(model)
    inner.config._attn_implementation = transformers_attention(inner.config, attention)
    omit_empty_masks(inner)
    return model


QUICK = ("llama-tied", "mistral", "gemma2", "gemma3")


@pytest.mark.parametrize(
    "case",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough)
        for name in ALL_CASES
        if name not in BY_LENGTH
    ],
)
def test_a_family_computes_the_same_from_parts(case: str) -> None:
    """Documents, windows, softcaps and sinks by the family; four ranks take copies of two key heads."""
    model = _model(case, "flex")
    tokens, positions = _inputs()
    for ranks in (2, 4):
        for given in (None, positions):
            torch.testing.assert_close(_shared(model, ranks, tokens, given), _hidden(model, tokens, given))


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_torchs_attention_repeats_as_many_keys_as_there_are(case: str) -> None:
    model = _model(case, "sdpa")
    tokens, positions = _inputs()
    for ranks in (2, 4):
        torch.testing.assert_close(_shared(model, ranks, tokens, positions), _hidden(model, tokens, positions))


@pytest.mark.parametrize(
    ("heads", "key_heads", "ranks", "copies"),
    [(8, 8, 4, 1), (8, 2, 2, 1), (8, 2, 4, 2), (8, 1, 8, 8), (12, 4, 6, 3), (12, 6, 4, 2), (32, 8, 16, 2)],
)
def test_key_heads_are_copied_as_often_as_ranks_need(heads: int, key_heads: int, ranks: int, copies: int) -> None:
    """Each rank's queries then have the same number of neighbouring key heads, which are those of whole sequences."""
    assert key_copies(heads, key_heads, ranks) == copies
    repeated = [key for key in range(key_heads) for _ in range(copies)]
    each, queries = len(repeated) // ranks, heads // ranks
    for query in range(heads):
        own = repeated[query // queries * each :][:each]
        assert own[query % queries // (queries // each)] == query // (heads // key_heads)


def _recipe(sequence: int, **teacher: Any) -> Recipe:
    distributed = {"sequence": sequence}
    if not teacher:
        return recipe_for("m", "r", distributed=distributed)
    loss: dict[str, Any] = {"targets": {}}
    return recipe_for(
        "m", "r", objective="distill", teacher={"path": "t", **teacher}, loss=loss, distributed=distributed
    )


def _problem(recipe: Recipe, case: str, *, length: int = S, attention: str = "flex") -> str:
    config = load_config((ALL_CASES | UNEQUAL | TEACHERS)[case], what=case)
    try:
        check_shared_sequences(recipe, {"main": length}, {"student.config": (config, Choice(attention, ""))})
    except UserError as error:
        return str(error)
    return ""


def test_what_cannot_be_shared_is_refused_in_one_line() -> None:
    two, eight = _recipe(2), _recipe(8)
    assert _problem(two, "llama") == ""
    assert "sequences have 15 tokens, which do not divide into 2 parts" in _problem(two, "llama", length=15)
    assert "--sequence-length 14" in _problem(two, "llama", length=15)
    assert "has 4 attention heads" in _problem(eight, "llama")
    assert "1, 2, 4" in _problem(eight, "llama")
    assert "student.attention is eager" in _problem(two, "llama", attention="eager")
    for case in BY_LENGTH:
        assert "depend on the length that a rank sees" in _problem(two, case), case
    for case in RECURRENT:
        assert "carry a state" in _problem(two, case), case
    for case, words in REFUSED.items():
        assert words in _problem(two, case), case
    apart = _recipe(2, placement="disaggregated", ranks=1)
    assert "set teacher.placement to colocated" in _problem(apart, "llama")
    assert "leave teacher.save_targets out" in _problem(_recipe(2, save_targets="folder"), "llama")
    assert _problem(_recipe(1), "gemma2", length=15, attention="eager") == ""
