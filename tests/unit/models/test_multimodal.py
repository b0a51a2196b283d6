"""Folders of multimodal models: read as their language model, with the logits of transformers' whole model on text."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from megadistill.config.recipe import StudentSection
from megadistill.distributed.vocab import VocabSlice
from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.hf_folder import SINGLE_FILE
from megadistill.models.multimodal.wrappers import WRAPPERS
from megadistill.models.weights import check_weights, load_pretrained
from megadistill.teacher.stage import TeacherStage, head_rows
from megadistill.train.setup.run_folder import copy_student_config, student_config_of
from tests.unit.models.cases import VOCAB

CPU = torch.device("cpu")

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
IMAGES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MROPE = {"rope_type": "default", "type": "mrope", "mrope_section": [2, 1, 1], "rope_theta": 500.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mrope_section": [2, 1, 1]}

WHOLE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 6,
                        "sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "vision_config": IMAGES,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "head_dim": 12, "sliding_window": None, "rope_theta": 1e9},
        "vision_config": {**IMAGES, "model_type": "pixtral"},
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_scaling": MROPE},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_scaling": YARN, "rope_theta": 1000.0, "use_sliding_window": True,
                        "sliding_window": 6, "max_window_layers": 1},
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                          "out_hidden_size": 32, "fullatt_block_indexes": [0]},
    },
    "qwen3_5": {
        "text_config": {**TEXT, "head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                        "linear_key_head_dim": 8, "linear_value_head_dim": 12, "full_attention_interval": 2,
                        "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5}},
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                          "out_hidden_size": 32, "num_position_embeddings": 16},
    },
    "qwen3_vl_moe": {
        "text_config": {**TEXT, "head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                        "mlp_only_layers": [1], "rope_scaling": {**MROPE, "mrope_interleaved": True,
                                                                 "mrope_section": [2, 2, 2]}},
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                          "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 12, "rope_scaling": {**MROPE, "mrope_interleaved": True,
                                                                 "mrope_section": [2, 2, 2]}},
        "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                          "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
}  # fmt: skip

PUBLISHED = {
    "gemma3": ("language_model.model.", "", "language_model.lm_head."),
    "mistral3": ("language_model.model.", "", "language_model.lm_head."),
    "qwen2_vl": ("model.", "", "lm_head."),
    "qwen2_5_vl": ("model.", "", "lm_head."),
    "qwen3_5": ("model.language_model.", "model.", "lm_head."),
    "qwen3_vl_moe": ("model.language_model.", "model.", "lm_head."),
    "qwen3_vl": ("model.language_model.", "model.", "lm_head."),
}
"""Beginnings of names as the models were published first: of the body, of what reads images, of the head."""


def _whole(model_type: str, *, tied: bool) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**copy.deepcopy(WHOLE[model_type]), tie_word_embeddings=tied)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _write(folder: Path, model: Any, model_type: str, *, published: bool, keys: dict[str, Any]) -> None:
    body, other, head = PUBLISHED[model_type]
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not published:
            stored = name
        elif name.startswith("model.language_model."):
            stored = body + name.removeprefix("model.language_model.")
        elif name.startswith("lm_head."):
            stored = head + name.removeprefix("lm_head.")
        else:
            stored = other + name.removeprefix("model.")
        if not (keys.get("tie_word_embeddings") and name.startswith("lm_head.")):
            # Qwen 3 VL's experts were published by columns.
            turned = published and model_type == "qwen3_vl_moe" and ".experts." in name
            tensors[stored] = (tensor.transpose(1, 2) if turned else tensor).clone().contiguous()
    folder.mkdir()
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **keys}))


def _by_stages(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of a run's teacher: two stages, and the head by rows."""
    x = tokens
    with torch.no_grad():
        for stage in range(2):
            x = TeacherStage.load(folder, stage=stage, stages=2, dtype=torch.float32, device=CPU)(x)
        vocab = VocabSlice.contiguous(0, VOCAB, size=VOCAB)
        return x @ head_rows(folder, vocab, dtype=torch.float32, device=CPU).T


def _assert_read(folder: Path, truth: Tensor, tokens: Tensor) -> None:
    check_weights(folder, load_config(folder, what="test"))
    model = load_pretrained(folder, what="test", device=CPU, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(_by_stages(folder, tokens), truth, rtol=1e-5, atol=1e-5)


QUICK = [("gemma3", True), ("mistral3", False), ("qwen2_5_vl", False), ("qwen3_vl_moe", False)]
"""Tests that `make test` runs; those of the other models are thorough."""


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [
        (model_type, tied)
        if (model_type, tied) in QUICK
        else pytest.param(model_type, tied, marks=pytest.mark.thorough)
        for model_type in WHOLE
        for tied in (False, True)
    ],
)
def test_the_language_model_gives_the_logits_of_the_whole_on_text(model_type: str, tied: bool, tmp_path: Path) -> None:
    """Names as published first and as transformers writes them today, and configs of both."""
    whole = _whole(model_type, tied=tied)
    tokens = torch.randint(VOCAB, (2, 24))
    with torch.no_grad():
        truth = whole(input_ids=tokens).logits
    keys = {**WHOLE[model_type], "tie_word_embeddings": tied}
    flat = WRAPPERS[model_type].is_flat
    older = {**keys["text_config"], **{key: keys[key] for key in keys if key != "text_config"}} if flat else keys
    _write(tmp_path / "new", whole, model_type, published=False, keys=keys)
    _write(tmp_path / "older", whole, model_type, published=True, keys=older)
    with torch.no_grad():
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "older", local_files_only=True).eval()
        assert torch.equal(again(input_ids=tokens).logits, truth), "the folder must be one that transformers reads"
    for folder in ("new", "older"):
        _assert_read(tmp_path / folder, truth, tokens)
    if not flat:  # the same config, and the same tensors of the language model, under other names
        assert teacher_fingerprint(tmp_path / "new") == teacher_fingerprint(tmp_path / "older")


def test_a_config_that_does_not_say_whether_the_head_is_tied_is_judged_by_the_weights(tmp_path: Path) -> None:
    """As Mistral Small 3.1 was published: transformers' default is a tied head, and it has one of its own."""
    tokens = torch.randint(VOCAB, (2, 24))
    for tied in (False, True):
        whole, folder = _whole("mistral3", tied=tied), tmp_path / str(tied)
        _write(folder, whole, "mistral3", published=True, keys=WHOLE["mistral3"])
        if tied:
            (folder / SINGLE_FILE).unlink()
            body = {f"language_model.{name}": each for name, each in whole.model.language_model.state_dict().items()}
            save_file(body, folder / SINGLE_FILE, metadata={"format": "pt"})
        with torch.no_grad():
            truth = whole(input_ids=tokens).logits
        assert load_config(folder, what="test").tie_word_embeddings is tied
        _assert_read(folder, truth, tokens)
        run, section = tmp_path / f"run of {tied}", StudentSection(config=str(folder))
        copy_student_config(run, section)  # an export reads this copy, which has no weights
        copied = load_config(student_config_of(run, section), what="test")
        assert copied.to_dict() == load_config(folder, what="test").to_dict()
    (tmp_path / "True" / SINGLE_FILE).unlink()
    assert load_config(tmp_path / "True", what="test").tie_word_embeddings is False, "a plan without weights"


def test_keys_of_the_whole_are_those_of_the_language_model_where_it_has_none(tmp_path: Path) -> None:
    keys = {"model_type": "gemma3", **WHOLE["gemma3"], "torch_dtype": "bfloat16", "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = load_config(tmp_path, what="test")
    assert (config.model_type, config.dtype, config.eos_token_id) == ("gemma3_text", torch.bfloat16, [1, 106])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"text_config": {"model_type": "mamba"}}, "model_type is 'mistral3'"),
        ({"text_config": None}, "model_type is 'mistral3'"),
        ({"text_config": {**TEXT, "rope_scaling": {"rope_type": "yarrn"}}}, "refuses this mistral config: .*yarrn"),
        ({"text_config": {**TEXT, "num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
        ({"quantization_config": {"quant_method": "unheard-of"}}, "quant_method is 'unheard-of'"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights names another file"),
        ({"model_type": "qwen2_vl", "text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000"),
        ({"model_type": "qwen3_vl", "text_config": {"hidden_size": "wide"}}, "refuses this qwen3_vl_text config"),
        ({"model_type": "gemma4_unified"}, "not read: its language model is not that of gemma4"),
        ({"model_type": "internvl", "text_config": {"model_type": "qwen2"}}, "is a qwen2 model; such a model is read"),
    ],
)
def test_a_folder_that_is_not_read_is_refused_in_one_line(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3", **WHOLE["mistral3"], **keys}))
    with pytest.raises(UserError, match=words) as error:
        load_config(tmp_path, what="test")
    assert "\n" not in str(error.value)


def test_a_mapping_is_told_to_name_the_folder() -> None:
    with pytest.raises(UserError, match="is a gemma3_text model; such a model is read from a folder of gemma3, "):
        load_config({"model_type": "gemma3", **WHOLE["gemma3"]}, what="student.config")


@pytest.mark.parametrize(
    ("new", "words"),
    [
        ("language_model.lm_head.weight", "language_model.lm_head.weight.*same tensor of its language model"),
        ("model.norm.weight", "has both .*model.norm.weight.*same tensor of its language model"),
        ("depth_tower.layers.0.weight", "does not have: depth_tower.layers.0.weight"),
        ("model.language_model.layers.0.self_attn.q_proj.lora_A.weight", "does not have: .*lora_A"),
    ],
)
def test_tensors_that_are_no_part_of_the_model_are_refused(new: str, words: str, tmp_path: Path) -> None:
    whole = _whole("mistral3", tied=False)
    state = {**whole.state_dict(), new: torch.ones(4, 4)}
    whole.state_dict = lambda: state
    _write(
        tmp_path / "model", whole, "mistral3", published=False, keys=WHOLE["mistral3"] | {"tie_word_embeddings": False}
    )
    with pytest.raises(UserError, match=words) as error:
        check_weights(tmp_path / "model", load_config(tmp_path / "model", what="test"))
    assert "\n" not in str(error.value)
