"""Configs: what is accepted, what is refused and with which words; the model that comes out."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megadistill.errors import UserError
from megadistill.model.families import build_causal_lm, decoder, load_config, logit_transform, rebuild_rotary
from megadistill.records import LogitTransform
from tests.unit.model.cases import CASES, SIZES, VOCAB, whole_model


@pytest.mark.parametrize("case", CASES)
def test_a_mapping_and_the_folder_saved_from_it_are_the_same_config(case: str, tmp_path: Path) -> None:
    config = load_config(CASES[case], what="test")
    config.save_pretrained(tmp_path)
    assert _content(load_config(tmp_path, what="test")) == _content(config)


def test_the_recipes_own_mapping_is_not_changed() -> None:
    mapping = CASES["llama"] | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    before = copy.deepcopy(mapping)
    load_config(mapping, what="test")
    assert mapping == before


def _content(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "transformers_version"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, r"model_type is 'lama'; supported are llama, .*did you mean 'llama'"),
        ({"model_type": None}, r"model_type is None"),
        ({"hiden_size": 64}, r"no 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": 66}, r"66 is not a multiple of num_attention_heads 4|66\) is not a multiple"),
        ({"model_type": "qwen2", "hidden_size": 66}, r"66 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, r"refuses this llama config"),
        ({"head_dim": 15}, r"even rotary dimension"),
        ({"model_type": "qwen2", "hidden_size": 60}, r"a head is 15 wide"),
        ({"hidden_size": "wide"}, r"'hidden_size' expected int"),
        ({"hidden_act": "sillu"}, r"refuses this llama config: .*sillu"),
        ({"rope_scaling": {"rope_type": "yarrn"}}, r"refuses this llama config: .*yarrn"),
        ({"dtype": "float99"}, r"float99"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, r"num_hidden_layers.*5.*layer_types.*1"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 5}, r"chunked_attention"),
        ({"quantization_config": {"bits": 4}}, r"quantised weights"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_config({"model_type": "llama", **SIZES} | change, what="student.config")
    assert str(error.value).startswith("student.config: ")
    assert "\n" not in str(error.value)


def test_a_folder_keeps_keys_that_a_mapping_may_not_have_and_never_names_code_to_run(tmp_path: Path) -> None:
    keys = CASES["llama"] | {"some_trainers_own_key": 1, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = load_config(tmp_path, what="test")
    assert not hasattr(config, "auto_map")
    build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "config.json does not exist"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list"),
        (json.dumps(CASES["llama"] | {"quantization_config": {"quant_method": "fp8"}}), "quantised"),
        (json.dumps(CASES["llama"] | {"per_layer_config": {"0": {"intermediate_size": 8}}}), "per_layer_config"),
    ],
)
def test_a_wrong_folder_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        load_config(tmp_path, what="teacher.path")


def test_the_model_has_the_padded_vocabulary_and_the_callers_config_is_untouched() -> None:
    config = load_config(CASES["llama"], what="test")
    before = config.to_dict()
    model = build_causal_lm(config, vocab_size=256, dtype=torch.bfloat16)
    assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (256, 64)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache is False
    assert config.to_dict() == before


@pytest.mark.parametrize("case", ["llama", "llama3-rope", "qwen3"])
def test_a_rebuilt_rotary_embedding_is_float32_and_transformers_own(case: str) -> None:
    truth = whole_model(case).model.rotary_emb.inv_freq.clone()
    model = whole_model(case).bfloat16()  # casts the buffers too, as zero.Init does
    assert decoder(model) is model.model
    assert decoder(model.model) is model.model
    assert not torch.equal(model.model.rotary_emb.inv_freq.float(), truth)
    rebuild_rotary(model)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, truth)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("keys", "transform"),
    [
        ({}, LogitTransform()),
        ({"final_logit_softcapping": None, "logit_scale": None, "logits_scaling": None}, LogitTransform()),
        ({"final_logit_softcapping": 30.0}, LogitTransform(softcap=30.0)),
        ({"logit_scale": 0.0625}, LogitTransform(scale=0.0625)),
        ({"logits_scaling": 8.0}, LogitTransform(scale=0.125)),
    ],
)
def test_the_logit_transform_is_read_from_the_config(keys: dict[str, Any], transform: LogitTransform) -> None:
    assert logit_transform(SimpleNamespace(**keys)) == transform


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 0.5, "head_dim": 16}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 3.0}),
    ],
)
def test_the_logit_transform_is_transformers_own(model_type: str, keys: dict[str, Any]) -> None:
    """Against the logits of the families that have one, supported or not."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[model_type](**sizes, **keys)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        products = model.base_model(input_ids=tokens).last_hidden_state @ model.get_output_embeddings().weight.T
        truth = model(input_ids=tokens).logits
    transform = logit_transform(config)
    found = products * transform.scale
    if transform.softcap is not None:
        found = transform.softcap * torch.tanh(found / transform.softcap)
    torch.testing.assert_close(found, truth)
    assert torch.equal(found, products) == (model_type == "llama"), "the case must tell the transforms apart"
