"""Experts of a model: weights of its routers' losses, its layers that have experts."""

from typing import Any

import pytest

from megadistill.config.recipe import LossSection
from megadistill.errors import UserError
from megadistill.models.experts import RouterCoefs, record_router_coefs, routers
from megadistill.models.families import build_decoder, expert_layers, load_config
from tests.unit.models.cases import CASES

BOTH = {"router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.003}


@pytest.mark.parametrize(
    ("config", "loss", "coefs"),
    [
        ({}, {}, RouterCoefs(aux=0.001)),
        ({"router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.003}, {}, RouterCoefs(0.02, 0.003)),
        (
            {"router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.003},
            {"router_aux_loss_coef": 0.0},
            RouterCoefs(0, 0.003),
        ),
        (
            {"router_z_loss_coef": 0.003},
            {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.2},
            RouterCoefs(0.1, 0.2),
        ),
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_weights_of_the_recipe_come_before_those_of_the_config(
    family: str, config: dict[str, Any], loss: dict[str, Any], coefs: RouterCoefs
) -> None:
    loaded = load_config({**CASES[family], **config}, what="test")
    assert RouterCoefs.of(LossSection.model_validate(loss), loaded) == coefs
    record_router_coefs(loaded, coefs)
    assert RouterCoefs.of(LossSection(), loaded) == coefs, "what was trained with is exported"


def test_a_model_without_experts_has_no_weights() -> None:
    config = load_config(CASES["llama"], what="test")
    assert RouterCoefs.of(LossSection(), config) == RouterCoefs()
    assert expert_layers(config) == []


@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen3_moe", "qwen3_moe-step"])
def test_layers_with_experts_are_those_with_a_router(case: str) -> None:
    config = load_config(CASES[case], what="test")
    assert [*routers(build_decoder(config, layers=range(config.num_hidden_layers)))] == expert_layers(config)


@pytest.mark.parametrize("key", ["router_aux_loss_coef", "router_z_loss_coef"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), 1e30])
def test_a_weight_that_is_none_is_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^test: {key} is .*; give a number from 0 to 1,000,000"):
        load_config({**CASES["mixtral"], key: value}, what="test")


def test_no_forward_pass_keeps_the_routers_logits() -> None:
    """transformers returns them by this key, for each token and layer; the losses here read the routers themselves."""
    assert load_config({**CASES["mixtral"], "output_router_logits": True}, what="test").output_router_logits is False
