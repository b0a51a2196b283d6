"""Only keys of a foreign config.json that decide the computation reach transformers, which runs nothing of a folder."""

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.integrations import hub_kernels

from megadistill.models.families import FAMILIES, build_causal_lm, load_config
from megadistill.models.model_keys import read_keys
from tests.paths import ROOT
from tests.unit.models.cases import CASES, VOCAB

FOREIGN: dict[str, Any] = {
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "flash_attention_2",
    "_attn_implementation_internal": "evil/kernel",
    "experts_implementation": "evil/kernel",
    "_experts_implementation": "sonicmoe",
    "_experts_implementation_internal": "evil/kernel",
    "attribute_map": {"hidden_size": "evil"},
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "base_model_tp_plan": {"layers.*": "evil"},
    "custom_generate": "evil/generate",
    "custom_pipelines": {"evil": {"impl": "evil.Pipeline"}},
    "gradient_checkpointing": True,
    "kernel_config": {"RMSNorm": "evil/kernel"},
    "num_labels": 10**9,
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "text_config": {"model_type": "llama", "attn_implementation": "evil/kernel"},
    "trust_remote_code": True,
    "use_flash_attn": True,
    "use_kernels": True,
}


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("qwen3_moe", "router_aux_loss_coef", 0),
        ("mixtral", "router_jitter_noise", 0),
        ("gemma2", "final_logit_softcapping", 30),
        ("llama", "initializer_range", 1),
    ],
)
def test_an_integer_is_a_number(case: str, key: str, value: int) -> None:
    config = load_config({**CASES[case], key: value}, what="test")
    assert isinstance(getattr(config, key), float)
    assert getattr(config, key) == value


@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma3", "mixtral", "qwen3_moe"])
def test_no_foreign_setting_reaches_transformers(case: str, tmp_path: Path) -> None:
    plain = load_config(CASES[case], what="test")
    (tmp_path / "config.json").write_text(json.dumps({**CASES[case], **FOREIGN}))
    config = load_config(tmp_path, what="test")
    assert config.to_dict() == plain.to_dict()
    assert vars(config).keys() == vars(plain).keys()
    model = build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32)
    assert model.config._attn_implementation == ("eager" if config.model_type == "gemma2" else "sdpa")
    assert "/" not in (model.config._experts_implementation or "")


OWN_SETTERS = {"torch_dtype", "rope_scaling", "per_layer_config"}
"""Keys that transformers reads by a property's setter, of its own making."""


def test_no_key_that_is_read_is_a_method_or_a_property_of_transformers() -> None:
    for model_type, family in FAMILIES.items():
        for key in read_keys(CONFIG_MAPPING[model_type], family.more_keys) - OWN_SETTERS:
            attribute = getattr(PretrainedConfig, key, None)
            assert not callable(attribute), key
            assert not isinstance(attribute, property), key


def test_transformers_fetches_no_kernel() -> None:
    assert os.environ["USE_HUB_KERNELS"] == "NO"
    assert not hub_kernels._kernels_enabled


CALLS = {
    "from_pretrained": {"trust_remote_code": False, "local_files_only": True},
    "from_config": {"trust_remote_code": False},
}
"""Method of transformers' classes -> the values that every call of it gives."""


def test_every_call_of_transformers_keeps_code_and_network_out() -> None:
    """A call that is new must say so as well; `AutoModel` and its kin run code of a folder that asks for it."""
    calls = [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node.func.attr, node.keywords)
        for path in sorted((ROOT / "megadistill").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS
    ]
    assert len(calls) >= 3
    for place, method, keywords in calls:
        given = {each.arg: each.value.value for each in keywords if isinstance(each.value, ast.Constant)}
        for name, value in CALLS[method].items():
            assert given.get(name) is value, f"{place}: {method} without {name}={value}"
