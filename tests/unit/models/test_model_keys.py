"""Only keys of a foreign config.json that decide the computation reach transformers, which runs nothing of a folder."""

import ast
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, GenerationConfig, PretrainedConfig
from transformers.integrations import hub_kernels

from megadistill.errors import UserError
from megadistill.models.families import FAMILIES, build_causal_lm, load_config
from megadistill.models.model_keys import read_keys
from megadistill.models.weights import load_pretrained
from tests.paths import ROOT
from tests.unit.data.corpora import byte_level_tokenizer
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


def test_no_key_that_is_read_is_a_method_or_a_property_of_transformers() -> None:
    for model_type, family in FAMILIES.items():
        for key in read_keys(CONFIG_MAPPING[model_type], family.more_keys) - {"torch_dtype", "rope_scaling"}:
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


def _documented_script() -> str:
    """The script of docs/teacher.md that takes the language model out of a multimodal folder."""
    page = (ROOT / "docs" / "teacher.md").read_text(encoding="utf-8")
    section = page.split("### The text half of a multimodal model")[1].split("\n## ")[0]
    return "\n".join(line.removeprefix("    ") for line in section.splitlines() if line.startswith("    ") or not line)


TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "text", "vision"),
    [("gemma3", {"model_type": "gemma3_text"}, {}), ("mistral3", {"model_type": "mistral"}, {"model_type": "pixtral"})],
)
def test_the_documented_script_takes_the_text_half_out(
    model_type: str, text: dict[str, Any], vision: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "whole", tmp_path / "text"
    configs: dict[str, Any] = {"text_config": {**TEXT, **text}, "vision_config": {**VISION, **vision}}
    whole = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](**configs)).eval()
    whole.generation_config = GenerationConfig(eos_token_id=[1, 7], do_sample=True, top_k=64)  # ends of a chat
    whole.save_pretrained(source)
    byte_level_tokenizer(tmp_path / "tokenizer", "a text that the model knows")
    shutil.copytree(tmp_path / "tokenizer", source, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"The text half of a multimodal model' in docs/teacher.md"):
        load_config(source, what="test")
    monkeypatch.setattr(sys, "argv", ["take_text.py", str(source), str(target)])
    exec(compile(_documented_script(), "take_text.py", "exec"), {})
    model = load_pretrained(target, what="test", device=torch.device("cpu"))
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(input_ids=tokens).logits)
    assert (target / "tokenizer.json").is_file()
    settings = GenerationConfig.from_pretrained(target)
    assert (settings.eos_token_id, settings.top_k) == ([1, 7], 64)
