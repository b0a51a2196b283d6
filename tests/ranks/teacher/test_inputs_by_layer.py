"""Teachers whose later stages read tokens, and hand on several hidden states a token: both pipelines, on real ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.distributed.roles import Roles
from megadistill.models.families import load_config
from tests.ranks.harness import run_ranks
from tests.ranks.teacher import test_disaggregated as apart
from tests.ranks.teacher import test_teacher as together
from tests.unit.models.test_unequal_layers import ALL


def _saved(case: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(load_config(ALL[case], what=case), attn_implementation="sdpa")
    model.save_pretrained(folder)
    return model.eval()


def _hidden(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)


@pytest.mark.parametrize("case", ["gemma4-shared", "gemma3n"])
def test_colocated_stages_give_each_rank_its_own_tokens_hidden_states(case: str, tmp_path: Path) -> None:
    model = _saved(case, tmp_path)
    for rank, signals in enumerate(run_ranks(2, together._signals, str(tmp_path))):
        for index, signal in enumerate(signals):
            batch = together._batch(rank, index)
            torch.testing.assert_close(signal.hidden_for(batch), _hidden(model, batch.tokens), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("case", "masked"), [("gemma4-shared", True), ("gemma3n", False)])
def test_stages_on_ranks_of_their_own_get_the_tokens_with_their_packets(
    case: str, masked: bool, tmp_path: Path
) -> None:
    model = _saved(case, tmp_path)
    signals, *_ = run_ranks(3, apart._answers, str(tmp_path), masked, False, 2, apart.ROUNDS, roles=Roles(3, 2, 2))
    for index, signal in enumerate(signals):
        batch = apart._batch(0, index, masked=masked)
        parts = [batch.tokens[:, :4], batch.tokens[:, 4:]] if masked else [batch.tokens]
        hidden = [_hidden(model, part).view(*part.shape, -1) for part in parts]
        truth = torch.cat(hidden, dim=1).flatten(0, 1)
        torch.testing.assert_close(signal.hidden_for(batch), truth, rtol=1e-4, atol=5e-5)
