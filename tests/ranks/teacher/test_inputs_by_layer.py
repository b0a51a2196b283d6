"""Teachers whose later stages read tokens, and hand on several hidden states a token: both pipelines, on real ranks.

The truth is the chain of the same stages in one process, which unit tests hold against the unsplit model.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.distributed.roles import Roles
from megadistill.models.families import load_config
from megadistill.teacher.stage import TeacherStage
from tests.ranks.harness import run_ranks
from tests.ranks.teacher import test_disaggregated as apart
from tests.ranks.teacher import test_teacher as together
from tests.unit.models.test_unequal_layers import ALL

STAGES = 2


def _saved(case: str, folder: Path) -> list[TeacherStage]:
    """The stages of a teacher that is written to the folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(load_config(ALL[case], what=case)).save_pretrained(folder)
    cpu = torch.device("cpu")
    load = TeacherStage.load
    return [load(folder, stage=stage, stages=STAGES, dtype=torch.float32, device=cpu) for stage in range(STAGES)]


def _hidden(stages: list[TeacherStage], tokens: Tensor, positions: Tensor | None) -> Tensor:
    hidden = tokens
    for stage in stages:
        hidden = stage(hidden, positions, tokens)
    return hidden.flatten(0, 1)


@pytest.mark.parametrize("case", ["gemma4-shared", "gemma3n"])
def test_colocated_stages_give_each_rank_its_own_tokens_hidden_states(case: str, tmp_path: Path) -> None:
    stages = _saved(case, tmp_path)
    for rank, signals in enumerate(run_ranks(STAGES, together._signals, str(tmp_path))):
        for index, signal in enumerate(signals):
            batch = together._batch(rank, index)
            assert torch.equal(signal.hidden_for(batch), _hidden(stages, batch.tokens, batch.positions))


@pytest.mark.parametrize(("case", "masked"), [("gemma4-shared", True), ("gemma3n", False)])
def test_stages_on_ranks_of_their_own_get_the_tokens_with_their_packets(
    case: str, masked: bool, tmp_path: Path
) -> None:
    stages = _saved(case, tmp_path)
    roles = Roles(1 + STAGES, STAGES, STAGES)
    signals, *_ = run_ranks(3, apart._answers, str(tmp_path), masked, False, 2, apart.ROUNDS, roles=roles)
    for index, signal in enumerate(signals):
        batch = apart._batch(0, index, masked=masked)
        assert (batch.positions is not None) == masked
        assert torch.equal(signal.hidden_for(batch), _hidden(stages, batch.tokens, batch.positions))
