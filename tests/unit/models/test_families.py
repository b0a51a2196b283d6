"""Configs: what is accepted, what is refused and with which words; the model that comes out."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModelForCausalLM

from megadistill.errors import UserError
from megadistill.models.families import (
    EMBEDDING,
    FAMILIES,
    build_causal_lm,
    decoder,
    load_config,
    logit_transform,
    rebuild_buffers,
    refuse_as_student,
)
from megadistill.types import LogitTransform
from tests.unit.models.cases import CASES, SIZES, VOCAB, whole_model


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


_FACTORS = {"short_factor": [1.0] * 7, "long_factor": [1.0] * 8}


def _content(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "transformers_version"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "lama"}, r"model_type is 'lama'; supported are .*gemma2, .*did you mean 'llama'"),
        ({"model_type": None}, r"model_type is None"),
        ({"hiden_size": 64}, r"no 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": 66}, r"66 is not a multiple of num_attention_heads 4|66\) is not a multiple"),
        ({"model_type": "qwen2", "hidden_size": 66}, r"66 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, r"num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0; give a number from 1"),
        ({"head_dim": 15}, r"a head is 15 wide|even rotary dimension"),
        ({"model_type": "qwen2", "hidden_size": 60}, r"a head is 15 wide"),
        ({"hidden_size": "wide"}, r"'hidden_size' expected int"),
        ({"hidden_act": "sillu"}, r"refuses this llama config: .*sillu"),
        ({"rope_scaling": {"rope_type": "yarrn"}}, r"refuses this llama config: .*yarrn"),
        ({"dtype": "float99"}, r"float99"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, r"num_hidden_layers.*5.*layer_types.*1"),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 5}, r"chunked_attention"),
        ({"quantization_config": {"bits": 4}}, r"quant_method is null"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"a llama model has no 'quantization_config'"),
        ({"model_type": "gemma3"}, r"model_type is 'gemma3'; supported are .*gemma3_text, .*glm[^;]*$"),
        ({"model_type": "llama4"}, r"model_type is 'llama4'; supported are .*gemma3_text, .*glm[^;]*$"),
        ({"model_type": "jamba"}, r"model_type is 'jamba'; supported are .*gemma3_text, .*glm[^;]*$"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            r"language model is a gemma3_text model; such",
        ),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, r"is a mistral model; such a model"),
        ({"model_type": "gemma4_unified"}, r"A gemma4_unified folder is not read: its language model is not that of"),
        ({"model_type": "llama4_text", "attention_chunk_size": None}, r"attention_chunk_size is not set"),
        (
            {"model_type": "glm_moe_dsa", "num_key_value_heads": 4, "indexer_types": ["shared"] * 5},
            r"begins with 'shared'; the first layer",
        ),
        ({"model_type": "falcon_h1", "time_step_limit": [0.0, 0.1]}, r"time_step_limit is \[0\.0, 0\.1\]"),
        ({"model_type": "falcon_h1", "mamba_n_groups": 3}, r"mamba_n_heads 128 is not a multiple of mamba_n_groups 3"),
        ({"model_type": "glm4", "head_dim": 16, "partial_rotary_factor": 0.33}, r"is 0\.33 of heads of 16 columns"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, r"0\.5; a llama model turns whole heads"),
        ({"model_type": "ministral3", "rope_parameters": {"rope_theta": 1e4}}, r"no number 'llama_4_scaling_beta'"),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 5},
            r"no_rope_layers has 2 values, and the model 5 layers",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": 16, **_FACTORS}},
            r"short_factor of longrope has 7 values; a head turns 8 pairs",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 16,
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 9,
                }
            },
            r"long_factor of longrope has 9 values; a head turns 8 pairs",
        ),
        (
            {"model_type": "ministral", "sliding_window": None, "layer_types": ["sliding_attention"] * 5},
            r"has sliding_attention, and sliding_window is None: give the window",
        ),
        ({"model_type": "olmo3", "rope_theta": "far"}, r"refuses this olmo3 config"),
        ({"model_type": "olmo3", "partial_rotary_factor": 0.5}, r"0\.5; a olmo3 model turns whole heads"),
        ({"model_type": "ernie4_5_moe", "moe_layer_end_index": None}, r"refuses this ernie4_5_moe config"),
        ({"model_type": "ernie4_5_moe", "moe_num_shared_experts": None}, r"refuses this ernie4_5_moe config"),
        ({"model_type": "cohere", "logit_scale": 0}, r"logit_scale is 0(\.0)?; give a number from"),
        ({"model_type": "granite", "logits_scaling": 0}, r"logits_scaling is 0(\.0)?; give a number from"),
        ({"model_type": "starcoder2", "residual_dropout": 2.0}, r"residual_dropout is 2\.0; give a number from 0 to 1"),
        ({"model_type": "gpt_neox"}, r"a gpt_neox model has no 'num_key_value_heads'"),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"0": {"intermediate_size": 8}}},
            r"per_layer_config has intermediate_size of .*; it may have head_dim and num_key_value_heads",
        ),
        (
            {"model_type": "gemma4_text", "per_layer_config": {"0": {"head_dim": 32}}},
            r"per_layer_config has head_dim of 32, None for layers of sliding_attention",
        ),
        ({"model_type": "gemma4_text", "global_head_dim": 33}, r"a head is 33 wide|of heads of 33 columns"),
        (
            {"model_type": "gemma4_text", "num_kv_shared_layers": 5},
            r"num_kv_shared_layers is 5; of 5 layers, .* must compute keys and values",
        ),
        ({"model_type": "gemma3text"}, r"did you mean 'gemma3_text'"),
        ({"model_type": ["llama"]}, r"model_type is list"),
        ({"model_type": "qwen2", "hidden_size": 66, "head_dim": 15}, r"a head is 15 wide|even rotary dimension"),
        ({"model_type": "qwen2", "hidden_size": 66, "head_dim": 0}, r"head_dim"),
        ({"attn_implementation": "flash_attention_2"}, r"a llama model has no 'attn_implementation'"),
        ({"output_attentions": True}, r"a llama model has no 'output_attentions'"),
        ({"num_labels": 3}, r"a llama model has no 'num_labels'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, r"use_bidirectional_attention is set"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, r"is 3, of 2 experts"),
        ({"model_type": "mixtral", "intermediate_size": 90}, r"intermediate_size is 90; with experts .* multiple of 8"),
        (
            {"model_type": "qwen3_moe", "hidden_size": 60, "head_dim": 16},
            r"hidden_size is 60; with experts .* multiple of 8",
        ),
        ({"model_type": "mixtral", "num_experts_per_tok": 0}, r"num_experts_per_tok is 0; give a number from 1"),
        ({"model_type": "qwen3_moe", "num_experts": 0}, r"num_experts is 0; give a number from 1"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, r"decoder_sparse_step is 0|division"),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": 0}, r"moe_intermediate_size is 0"),
        ({"model_type": "llama", "sliding_window_pattern": 3}, r"a llama model has no 'sliding_window_pattern'"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_config({"model_type": "llama", **SIZES} | change, what="student.config")
    assert str(error.value).startswith("student.config: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["exaone4", "mistral", "mixtral", "olmo2", "qwen2", "qwen3", "qwen3_moe"])
def test_a_width_that_is_no_multiple_of_the_heads_is_allowed_where_heads_have_their_own(model_type: str) -> None:
    """Gemma's and Llama's classes refuse it themselves."""
    keys = {"model_type": model_type, **SIZES, "num_attention_heads": 6, "head_dim": 16, "num_hidden_layers": 1}
    config = load_config(keys, what="test")
    model = build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32)
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (96, 64)
    assert model(torch.arange(6)[None]).logits.shape == (1, 6, VOCAB)


def test_a_family_that_can_only_teach_is_refused_as_a_student(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(CASES["llama"], what="student.config")
    refuse_as_student(config, "student.config")
    only_teaches = replace(FAMILIES["llama"], teacher_only="its layers keep a state")
    monkeypatch.setitem(FAMILIES, "llama", only_teaches)
    with pytest.raises(UserError, match=r"llama model can only teach: its layers keep a state; .* be .*qwen3") as error:
        refuse_as_student(config, "student.config")
    assert " llama," not in str(error.value).partition("students may be")[2]


def test_a_folder_may_have_keys_that_a_mapping_may_not_have_and_never_names_code_to_run(tmp_path: Path) -> None:
    keys = CASES["llama"] | {"some_trainers_own_key": 1, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = load_config(tmp_path, what="test")
    assert not hasattr(config, "auto_map")
    build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no config.json: name a Hugging Face model folder"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list"),
        (json.dumps(CASES["llama"] | {"quantization_config": {"quant_method": "hqq"}}), "quant_method is 'hqq'"),
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


@pytest.mark.parametrize("case", ["llama", "llama3-rope", "qwen3", "gemma2", "gemma3"])
def test_rebuilt_buffers_are_float32_and_transformers_own(case: str) -> None:
    truth = {name: buffer.clone() for name, buffer in whole_model(case).named_buffers()}
    model = whole_model(case).bfloat16()  # casts the buffers too, as zero.Init does
    assert decoder(model) is model.model
    assert decoder(model.model) is model.model
    assert not all(torch.equal(buffer.float(), truth[name]) for name, buffer in model.named_buffers())
    rebuild_buffers(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    rebuilt = dict(model.named_buffers())
    assert rebuilt.keys() == truth.keys()
    for name, buffer in rebuilt.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, truth[name]), name


def test_gemma3_has_two_rotary_embeddings_and_a_scaled_embedding() -> None:
    """The buffers that the case above has to rebuild differ: else it would compare nothing."""
    buffers = dict(whole_model("gemma3").named_buffers())
    local, globally = (buffers[f"model.rotary_emb.{kind}_attention_inv_freq"] for kind in ("sliding", "full"))
    assert not torch.equal(local, globally)
    assert buffers["model.embed_tokens.embed_scale"] == 8.0


@pytest.mark.parametrize("model_type", [name for name, each in FAMILIES.items() if not each.teacher_only])
def test_no_student_has_parameters_that_must_stay_in_float32(model_type: str) -> None:
    """ZeRO keeps all parameters in one type. transformers says here where it would not."""
    assert not MODEL_MAPPING[CONFIG_MAPPING[model_type]]._keep_in_fp32_modules_strict


@pytest.mark.parametrize("case", ["gemma2", "olmo2"])
def test_the_embedding_of_the_padding_id_is_trained_like_the_others(case: str) -> None:
    config = load_config(CASES[case], what="test")
    model = build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32)
    padding = config.pad_token_id
    assert padding is not None
    decoder(model)(input_ids=torch.tensor([[5, padding, 7]])).last_hidden_state.square().sum().backward()
    gradient = model.get_parameter(EMBEDDING).grad
    assert gradient is not None
    assert gradient[padding].any()


@pytest.mark.parametrize(
    ("model_type", "keys", "transform"),
    [
        ("gemma2", {}, LogitTransform(softcap=30.0)),
        ("gemma2", {"final_logit_softcapping": None}, LogitTransform()),
        ("gemma3_text", {}, LogitTransform()),
        ("gemma3_text", {"final_logit_softcapping": 20.0, "logit_scale": 2.0}, LogitTransform(softcap=20.0)),
        ("cohere", {}, LogitTransform(scale=0.0625)),
        ("cohere", {"logit_scale": None}, LogitTransform()),
        ("granite", {"logits_scaling": 8.0}, LogitTransform(scale=0.125)),
    ],
)
def test_the_logit_transform_is_read_from_the_config(
    model_type: str, keys: dict[str, Any], transform: LogitTransform
) -> None:
    assert logit_transform(CONFIG_MAPPING[model_type](**keys)) == transform


STRAY = {"final_logit_softcapping": 0.5, "logit_scale": 3.0, "logits_scaling": 3.0, "attn_logit_softcapping": 0.5}


@pytest.mark.parametrize("case", ["llama", "mixtral", "olmo2"])
def test_a_stray_key_changes_no_logit_here_or_in_transformers(case: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CASES[case] | STRAY))
    config = load_config(tmp_path, what="test")
    assert not hasattr(config, "final_logit_softcapping")
    assert logit_transform(config) == LogitTransform()
    model = whole_model(case)
    tokens = torch.randint(VOCAB, (1, 9))
    with torch.no_grad():
        truth = model(tokens).logits
        model.config.update(STRAY)
        assert torch.equal(model(tokens).logits, truth)


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
    actual = products * transform.scale
    if transform.softcap is not None:
        actual = transform.softcap * torch.tanh(actual / transform.softcap)
    torch.testing.assert_close(actual, truth)
    assert torch.equal(actual, products) == (model_type == "llama"), "the case must tell the transforms apart"
