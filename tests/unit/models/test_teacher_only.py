"""Families that can only teach: latent attention, linear attention. Stages against the unsplit transformers model."""

import itertools
import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.errors import UserError
from megadistill.models.attention.choice import choose_attention
from megadistill.models.families import load_config, refuse_as_student, refuse_documents
from megadistill.models.flops import flops_per_token, layer_costs, parameter_counts
from megadistill.models.hf_folder import SINGLE_FILE
from megadistill.models.sampling import continuations
from megadistill.models.weights import check_weights, load_pretrained
from megadistill.plan.counts.model_stats import measure_models
from megadistill.teacher.float8 import Float8Module
from megadistill.teacher.stage import TeacherStage
from tests.unit.models.cases import SIZES, VOCAB

CPU = torch.device("cpu")
_LINEAR, _FULL = "linear_attention", "full_attention"

DEEPSEEK: dict[str, Any] = {
    **SIZES, "model_type": "deepseek_v3", "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16, "n_routed_experts": 8, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "first_k_dense_replace": 2,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
                     "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1},
}  # fmt: skip
DELTA: dict[str, Any] = {
    **SIZES, "max_position_embeddings": 256, "head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12, "layer_types": [_LINEAR, _FULL, _LINEAR, _LINEAR, _FULL],
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "deepseek_v3": DEEPSEEK,
    # As Moonlight: queries are not compressed, and all layers but the first are sparse.
    "deepseek_v3-queries": {**DEEPSEEK, "q_lora_rank": None, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
                            "rope_scaling": None, "tie_word_embeddings": True},
    # Layer 3 alone is dense, so that places count.
    "qwen3_next": {**DELTA, "model_type": "qwen3_next", "num_experts": 6, "num_experts_per_tok": 3,
                   "moe_intermediate_size": 40, "shared_expert_intermediate_size": 24, "mlp_only_layers": [3]},
    "qwen3_5_text": {**DELTA, "model_type": "qwen3_5_text", "tie_word_embeddings": True, "rope_parameters": {
                     "rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True,
                     "partial_rotary_factor": 0.5}},
}  # fmt: skip
RECURRENT = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "nemotron_h")
CASES["qwen3_5_moe_text"] = {
    **{key: value for key, value in CASES["qwen3_5_text"].items() if key != "intermediate_size"},
    "model_type": "qwen3_5_moe_text",
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 24,
}
# One module a layer: Mamba, experts without a gate in a narrower space, attention without rotations, a dense MLP.
CASES["nemotron_h"] = {
    **{key: value for key, value in SIZES.items() if key != "num_hidden_layers"},
    "model_type": "nemotron_h",
    "head_dim": 24,
    "layers_block_type": [_LINEAR, "moe", _FULL, "mlp", _LINEAR],
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 12,
    "n_groups": 2,
    "chunk_size": 32,
    "n_routed_experts": 8,
    "n_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "moe_latent_size": 48,
    "moe_shared_expert_intermediate_size": 24,
}
SOME = [
    case if case in ("deepseek_v3", "nemotron_h") else pytest.param(case, marks=pytest.mark.thorough) for case in CASES
]
"""All cases; `make test` runs two of them."""
TOKENS = 90
"""Of a row: more than a chunk of the delta rule, whose state then crosses from one to the next."""


Saved: TypeAlias = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The unsplit model of a case, and its folder, which is not to be written to.

    Its norms, biases of routers and decays are not one and zero.
    """

    @cache
    def write(case: str) -> tuple[Any, Path]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(load_config(CASES[case], what=case), attn_implementation="sdpa")
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.ndim == 1 and "inv_freq" not in name:
                    tensor.add_(0.3 * torch.randn_like(tensor))
        folder = tmp_path_factory.mktemp(case)
        model.save_pretrained(folder)
        return model.eval(), folder

    return write


def _tokens() -> Tensor:
    return torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def _truth(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def _stages(folder: Path, stages: int, x: Tensor, positions: Tensor | None = None, **options: Any) -> Tensor:
    options = {"dtype": torch.float32, **options}
    for stage in range(stages):
        x = TeacherStage.load(folder, stage=stage, stages=stages, device=CPU, **options)(x, positions)
    return x


@pytest.mark.parametrize("case", CASES)
def test_the_chain_of_stages_is_the_unsplit_model(case: str, saved: Saved) -> None:
    model, folder = saved(case)
    truth = _truth(model, _tokens())
    check_weights(folder, load_config(folder, what="test"))
    for stages in (2, 3, 5):
        assert torch.equal(_stages(folder, stages, _tokens()), truth), f"{stages} stages"


@pytest.mark.parametrize("case", SOME)
def test_a_whole_model_computes_the_same_and_continues_with_its_cache(case: str, saved: Saved) -> None:
    theirs, folder = saved(case)
    model = load_pretrained(folder, what="test", device=CPU, dtype=torch.float32)
    assert torch.equal(_truth(model, _tokens()), _truth(theirs, _tokens()))
    ids = prompts = _tokens()[:, :12]
    choices: dict[str, Any] = {"temperature": 0, "top_p": 1.0, "eos": -1, "vocab_size": VOCAB}
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, theirs(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(continuations(model, prompts, torch.zeros(2, 4, dtype=torch.float64), **choices), ids[:, 12:])


@pytest.mark.parametrize("case", SOME)
def test_bfloat16_stages_are_what_transformers_loads_in_bfloat16(case: str, saved: Saved) -> None:
    """The biases of DeepSeek's routers stay in float32 there."""
    _, folder = saved(case)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()
    assert torch.equal(_stages(folder, 2, _tokens(), dtype=torch.bfloat16), _truth(theirs, _tokens()))


@pytest.mark.parametrize("attention", ["sdpa", "flex", "eager"])
def test_documents_of_latent_attention_are_kept_apart(attention: str, saved: Saved) -> None:
    """Its values are narrower than its queries, which our blockwise attention pads."""
    model, folder = saved("deepseek_v3")
    tokens, bounds = _tokens()[:1, :20], [0, 9, 10, 20]
    positions = torch.tensor([[*range(9), 0, *range(10)]])
    hidden = _stages(folder, 2, tokens, positions, attention=attention)
    for start, stop in itertools.pairwise(bounds):
        alone = _truth(model, tokens[:, start:stop])
        torch.testing.assert_close(hidden[:, start:stop], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", RECURRENT)
def test_documents_of_recurrent_layers_are_refused(case: str, tmp_path: Path) -> None:
    config = load_config(CASES[case], what="test")
    with pytest.raises(UserError, match=r"teacher\.path: recurrent layers of a .* data\.document_mask keeps apart: "):
        refuse_documents(config, "teacher.path")
    refuse_documents(load_config(DEEPSEEK, what="test"), "teacher.path")
    (tmp_path / "config.json").write_text(json.dumps(CASES[case]))
    with pytest.raises(UserError, match="best-fit packing keeps apart: take data that are packed by chunk"):
        load_pretrained(tmp_path, what="test", device=CPU, documents=True)


def _round_by_hand(linear: Any) -> None:
    """Makes a linear layer multiply numbers of e4m3, with a scale for each row of its weight and each token."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    linear.forward = lambda x: torch.nn.functional.linear(rounded(x), rounded(linear.weight), linear.bias)


@pytest.mark.parametrize("case", SOME)
def test_a_float8_stage_has_rounded_projections_and_nothing_else(case: str, saved: Saved) -> None:
    """Convolutions, decays and routers are as they were. Experts without a gate are, too."""
    options: dict[str, Any] = {"stage": 0, "stages": 1, "dtype": torch.float32, "device": CPU}
    native = TeacherStage.load(saved(case)[1], **options)
    float8 = TeacherStage.load(saved(case)[1], **options, precision="float8")
    names = [name for name, module in float8.decoder.named_modules() if isinstance(module, Float8Module)]
    ends = ("self_attn.kv_b_proj", "linear_attn.out_proj", "mixer.out_proj")
    assert any(name.endswith(ends) for name in names)
    for name in names:
        if name.endswith(".experts"):  # tests/unit/teacher/test_float8.py has them
            native.decoder.set_submodule(name, float8.decoder.get_submodule(name))
        else:
            _round_by_hand(native.decoder.get_submodule(name))
    errors = []
    for layer, other in zip(native.decoder.layers, float8.decoder.layers, strict=True):

        def compare(_: Any, args: Any, kwargs: Any, output: Tensor, other: Any = other) -> None:
            errors.append(float((other(*args, **kwargs) - output).norm() / output.norm()))

        layer.register_forward_hook(compare, with_kwargs=True)
    unrounded = _truth(saved(case)[0], _tokens())
    assert not torch.allclose(native(_tokens()), unrounded, rtol=1e-2, atol=1e-2)
    assert len(errors) == len(native.decoder.layers)
    assert max(errors) < 3e-3, errors  # a number of e4m3 that another order of sums rounds to the next one


@pytest.mark.parametrize(
    "case", [case if case == "nemotron_h" else pytest.param(case, marks=pytest.mark.thorough) for case in CASES]
)
def test_a_plan_counts_the_memory_of_their_layers(case: str) -> None:
    student = load_config({"model_type": "llama", **SIZES}, what="test")
    teacher = measure_models(student, load_config(CASES[case], what="test"), sequence_length=TOKENS).teacher
    assert teacher is not None
    for attention in ("sdpa", "flex"):
        assert teacher.activations("bfloat16", masked=False, attention=attention).forward > TOKENS * 64 * 2
    assert sum(teacher.stage_bytes(2, itemsize=2)) > sum(teacher.stage_bytes(2, itemsize=2, float8=True))


@pytest.mark.parametrize("case", CASES)
def test_students_are_refused(case: str) -> None:
    with pytest.raises(UserError, match=r"student\.config: a .* model can only teach: .*; students may be .*llama"):
        refuse_as_student(load_config(CASES[case], what="test"), "student.config")


def test_experts_are_read_fused_as_they_are_published_and_one_by_one(saved: Saved, tmp_path: Path) -> None:
    model, folder = saved("qwen3_5_moe_text")
    assert any(".experts.0.gate_proj." in name for name in load_file(folder / SINGLE_FILE))
    fused = {name: each.clone() for name, each in model.state_dict().items() if name != "lm_head.weight"}
    assert any(name.endswith(".experts.gate_up_proj") for name in fused)
    save_file(fused, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path)
    check_weights(tmp_path, load_config(tmp_path, what="test"))
    assert torch.equal(_stages(tmp_path, 2, _tokens()), _truth(model, _tokens()))


@pytest.mark.parametrize(
    ("case", "extra"),
    [("qwen3_next", "mtp.layers.0.self_attn.q_proj.weight"), ("deepseek_v3", "model.layers.61.eh_proj.weight")],
)
def test_layers_that_predict_further_tokens_are_not_read(case: str, extra: str, saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved(case)[1], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / SINGLE_FILE)
    save_file({**tensors, extra: torch.ones(4, 4)}, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    check_weights(tmp_path, load_config(tmp_path, what="test"))


def test_flash_attn_is_not_chosen_where_it_cannot_compute_the_family() -> None:
    for case, words in (("deepseek_v3", "one width for queries and values"), ("qwen3_next", "recurrent layers")):
        config = load_config(CASES[case], what="test")
        options: dict[str, Any] = {"accelerator": True, "precision": "bfloat16", "documents": False, "flash": True}
        assert choose_attention("auto", config, triton=True, **options).value == "sdpa"
        with pytest.raises(UserError, match=words):
            choose_attention("flash", config, triton=True, **options)


DEEPSEEK_V3 = {"model_type": "deepseek_v3"}  # transformers' own defaults are the published sizes
QWEN3_NEXT = {"model_type": "qwen3_next"}


def test_published_parameters_and_flops() -> None:
    """DeepSeek V3: 671 B, 37 B active (2412.19437). Qwen3-Next-80B-A3B: 80 B, 3 B active, its head aside."""
    config = load_config(DEEPSEEK_V3, what="test")
    counts, flops = parameter_counts(config), flops_per_token(config, 4096)
    assert counts.total / 1e9 == pytest.approx(671.03, abs=0.01)
    assert (counts.active_body + counts.head) / 1e9 == pytest.approx(36.6, abs=0.1)
    assert flops.attention == 61 * 4096 * 128 * (128 + 64 + 128)
    assert layer_costs(config)[2] != layer_costs(config)[3], "three dense layers come first"
    config = load_config(QWEN3_NEXT, what="test")
    counts, flops = parameter_counts(config), flops_per_token(config, 4096)
    assert counts.total / 1e9 == pytest.approx(79.67, abs=0.02)
    assert counts.active_body / 1e9 == pytest.approx(3.2, abs=0.2)
    assert flops.attention == 12 * 4096 * 16 * 2 * 256 + 36 * 6 * 32 * 128 * 128


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("deepseek_v3", {"num_key_value_heads": 2}, "in latent attention they are equal"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "a head is 7 wide|even"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group 5"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "linear_num_value_heads 3 is not a multiple"),
        ("qwen3_next", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0"),
        ("qwen3_next", {"layer_types": [*DELTA["layer_types"][:4], "sliding_attention"]}, "sliding_attention"),
        ("qwen3_next", {"partial_rotary_factor": 0.3}, "partial_rotary_factor is 0.3"),
        ("nemotron_h", {"n_groups": 3}, "mamba_num_heads 4 is not a multiple of n_groups 3"),
        ("nemotron_h", {"tie_word_embeddings": True}, "a nemotron_h model has a head of its own"),
        ("nemotron_h", {"layers_block_type": ["lstm"] * 5}, "lstm"),
        ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "M?"}, "refuses this nemotron_h config"),
        ("qwen3_5_text", {"linear_key_head_dim": "wide"}, "linear_key_head_dim"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(case: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_config({**CASES[case], **change}, what="test")
    assert "\n" not in str(error.value)


def test_older_names_of_keys_are_read(tmp_path: Path) -> None:
    """And `Infinity`, which JSON does not have, in a key that has no effect."""
    old = {"mamba_n_groups": 4, "mamba_d_conv": 3, "mamba_chunk_size": 16, "hybrid_override_pattern": "M*E-"}
    keys = {
        key: value
        for key, value in CASES["nemotron_h"].items()
        if key not in ("n_groups", "chunk_size", "layers_block_type")
    }
    (tmp_path / "config.json").write_text(json.dumps({**keys, **old, "time_step_limit": [0.0, float("inf")]}))
    config = load_config(tmp_path, what="test")
    assert (config.n_groups, config.conv_kernel, config.num_hidden_layers) == (4, 3, 4)
    assert config.layer_types == [_LINEAR, _FULL, "moe", "mlp"]


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["deepseek_v3", "qwen3_next", "nemotron_h"])
def test_a_layer_is_one_graph_of_the_compiler(case: str, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as `teacher.compile` traces it, and run without kernels of C++, which take a minute a case."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, folder = saved(case)
    compiled = _stages(folder, 2, _tokens(), compiled=True)
    torch.testing.assert_close(compiled, _truth(model, _tokens()), rtol=1e-3, atol=1e-3)
