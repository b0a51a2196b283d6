"""Mixtures: which layers have experts, their routers, what a checkpoint holds of them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config

from megadistill.doctor.tiny import tiny_config
from megadistill.errors import UserError
from megadistill.models.experts import number_of_experts, router_outputs, routers
from megadistill.models.families import build_decoder, expert_layers, load_config, parameter_shapes, refuse_as_student
from megadistill.models.flops import parameter_counts
from megadistill.models.hf_folder import SINGLE_FILE, SafetensorsFolder
from megadistill.models.weights import check_weights, load_pretrained, stored_shapes
from megadistill.teacher.float8 import Float8Experts, Float8Linear, use_float8
from megadistill.teacher.stage import TeacherStage
from tests.unit.models.cases import ALL_CASES, VOCAB, final_hidden, saved_model

CPU = torch.device("cpu")

LAYERS = {
    "ernie4_5_moe": [1, 2, 3],
    "glm4_moe": [2, 3, 4],
    "gpt_oss": [0, 1, 2, 3, 4],
    "granitemoe": [0, 1, 2, 3, 4],
    "olmoe": [0, 1, 2, 3, 4],
    "qwen2_moe": [1, 3],
}
"""Case -> its layers with experts."""


def _config(case: str, **keys: Any) -> Any:
    return load_config({**ALL_CASES[case], **keys}, what="test")


@pytest.mark.parametrize("case", LAYERS)
def test_layers_keep_their_kind_wherever_a_stage_begins(case: str) -> None:
    config = _config(case)
    assert expert_layers(config) == LAYERS[case]
    for start in range(5):
        for stop in range(start + 1, 6):
            part = build_decoder(config, layers=range(start, stop))
            assert [start + place for place in routers(part)] == [n for n in LAYERS[case] if start <= n < stop]


@pytest.mark.parametrize("case", LAYERS)
def test_a_router_gives_logits_weights_and_ids(case: str) -> None:
    """As the losses of routers and the load of experts read them; the ids are those of the largest weights."""
    config = _config(case)
    decoder = build_decoder(config, layers=range(5)).to_empty(device=CPU)
    router = next(iter(routers(decoder).values()))
    for tensor in router.state_dict().values():
        tensor.copy_(torch.randn_like(tensor))
    logits, weights, ids = router_outputs(router(torch.randn(7, 64)))
    assert logits.shape == (7, number_of_experts(config))
    assert weights.shape == ids.shape == (7, config.num_experts_per_tok)
    assert int(ids.max()) < number_of_experts(config)


@pytest.mark.parametrize("case", LAYERS)
def test_a_token_passes_through_its_own_experts_and_all_that_is_shared(case: str) -> None:
    config = _config(case)
    counts = parameter_counts(config)
    shapes = parameter_shapes(config)
    stacked = sum(shape.numel() for name, shape in shapes.items() if ".experts." in name)
    active = stacked * config.num_experts_per_tok // number_of_experts(config)
    assert counts.body - counts.active_body == stacked - active > 0
    shared = {name for name in shapes if "shared_expert" in name}
    assert bool(shared) == (case in ("ernie4_5_moe", "glm4_moe", "qwen2_moe"))


def test_experts_with_biases_are_not_rounded_to_float8() -> None:
    """Float8Experts has neither their biases nor their clamped gates, and takes matrices that are not turned."""
    decoder = build_decoder(_config("gpt_oss", intermediate_size=64), layers=range(2))
    assert use_float8(decoder) == ["layers.0.mlp.experts", "layers.1.mlp.experts"]
    assert isinstance(decoder.layers[0].self_attn.q_proj, Float8Linear)
    rounded = build_decoder(_config("olmoe", intermediate_size=64), layers=range(1))
    assert use_float8(rounded) == []
    assert isinstance(rounded.layers[0].mlp.experts, Float8Experts)


@pytest.mark.parametrize("case", LAYERS)
def test_names_and_shapes_are_those_that_transformers_writes(case: str, tmp_path: Path) -> None:
    saved_model(case, tmp_path)
    stored, config = SafetensorsFolder(tmp_path), load_config(tmp_path, what="test")
    assert {name: stored.shape(name) for name in stored.names} == stored_shapes(config)
    check_weights(tmp_path, config)


@pytest.mark.parametrize("case", LAYERS)
def test_a_tiny_model_of_the_family_has_its_experts(case: str, tmp_path: Path) -> None:
    tiny_config(_config(case), vocab_size=VOCAB, min_layers=2).save_pretrained(tmp_path)
    small = load_config(tmp_path, what="tiny")
    assert number_of_experts(small) == 4
    has_dense_layers = len(LAYERS[case]) < 5
    assert len(expert_layers(small)) == (1 if has_dense_layers else 2)


@pytest.mark.parametrize("case", ["ernie4_5_moe", "glm4_moe"])
def test_routers_of_a_model_in_bfloat16_are_in_float32_where_transformers_keeps_them(case: str, tmp_path: Path) -> None:
    model = saved_model(case, tmp_path).to(torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load_pretrained(tmp_path, what="test", device=CPU, dtype=torch.bfloat16)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
        assert ours.state_dict()[name].dtype == tensor.dtype, name
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.bfloat16, torch.float32}
    stage = TeacherStage.load(tmp_path, stage=0, stages=1, dtype=torch.bfloat16, device=CPU)
    for name, tensor in stage.decoder.state_dict().items():
        assert torch.equal(tensor, theirs.model.state_dict()[name]), name
    assert model.dtype == torch.bfloat16


def test_layers_that_predict_later_tokens_are_left_out(tmp_path: Path) -> None:
    """GLM publishes them behind its last layer, Ernie in a block of their own; transformers reads neither."""
    for case, name in (("glm4_moe", "model.layers.46.eh_proj.weight"), ("ernie4_5_moe", "model.mtp_block.0.mlp.x")):
        folder = tmp_path / case
        saved_model(case, folder)
        tensors = load_file(folder / SINGLE_FILE)
        save_file({**tensors, name: torch.zeros(2)}, folder / SINGLE_FILE, metadata={"format": "pt"})
        config = load_config(folder, what="test")
        check_weights(folder, config)
        save_file({**tensors, "model.layers.9.x": torch.zeros(2)}, folder / SINGLE_FILE, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"model\.layers\.9\.x"):
            check_weights(folder, config)


@pytest.mark.parametrize("case", ["ernie4_5_moe", "glm4_moe"])
def test_a_family_that_is_balanced_by_biases_can_only_teach(case: str) -> None:
    with pytest.raises(UserError, match=rf"^test: a {case} model can only teach: its experts are balanced by"):
        refuse_as_student(_config(case), "test")


@pytest.mark.parametrize(
    ("case", "keys", "words"),
    [
        ("glm4_moe", {"n_group": 3}, "n_group is 3 and topk_group 1, of 8 experts"),
        ("glm4_moe", {"n_group": 8}, "n_group is 8 and topk_group 1, of 8 experts; groups are equal, of two"),
        ("glm4_moe", {"topk_group": 3}, "n_group is 2 and topk_group 3"),
        ("glm4_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, and 1 groups have 4 experts"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts is 0"),
        ("glm4_moe", {"n_routed_experts": 0}, "n_routed_experts is 0; give a number from 1"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, "moe_layer_interval is 2; supported is 1"),
        ("ernie4_5_moe", {"moe_k": 7}, "num_experts_per_tok is 7, of 6 experts"),
        ("gpt_oss", {"num_local_experts": 1}, "num_experts_per_tok is 2, of 1 experts"),
        ("gpt_oss", {"intermediate_size": 44}, "intermediate_size is 44; with experts it must be a multiple of 8"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
        ("granitemoe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    ],
)
def test_sizes_of_experts_that_do_not_fit_are_refused(case: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        _config(case, **keys)
    assert "\n" not in str(refused.value)


def test_a_window_of_0_is_none_where_transformers_writes_it_for_none(tmp_path: Path) -> None:
    config = load_config({**ALL_CASES["qwen2_moe"], "use_sliding_window": False}, what="test")
    assert config.sliding_window == 0
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert set(load_config(tmp_path, what="test").layer_types) == {"full_attention"}
    sliding = {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 5}
    with pytest.raises(UserError, match="has sliding_attention, and sliding_window is 0"):
        _config("qwen2_moe", **sliding)


def _quantised(folder: Path) -> dict[str, Tensor]:
    """A gpt-oss folder as it is published: experts in MXFP4 with blocks and scales of their own, all else plain."""
    saved_model("gpt_oss", folder)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / SINGLE_FILE).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = tensor.shape
            tensors[f"{name}_blocks"] = draw(experts, rows, columns // 32, 16, low=0, high=256)
            tensors[f"{name}_scales"] = draw(experts, rows, columns // 32, low=120, high=126)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantisation = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return tensors


def test_a_published_gpt_oss_in_mxfp4_is_the_model_that_transformers_dequantises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = _quantised(tmp_path)
    assert "model.layers.0.mlp.experts.gate_up_proj_blocks" in tensors
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", quantization_config=Mxfp4Config(dequantize=True)
    )
    theirs = theirs.float().eval()  # transformers 5.17 keeps the experts in bfloat16
    ours = load_pretrained(tmp_path, what="test", device=CPU, dtype=torch.float32)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    tokens = torch.randint(VOCAB, (2, 20))
    truth = final_hidden(theirs, tokens)
    assert torch.equal(final_hidden(ours, tokens), truth)
    # Three experts at a time.
    monkeypatch.setattr("megadistill.models.weights._DECODED_NUMBERS", 3 * 64 * 192)
    x = tokens
    for stage in range(3):
        x = TeacherStage.load(tmp_path, stage=stage, stages=3, dtype=torch.float32, device=CPU)(x)
    assert torch.equal(x, truth)
