"""Families whose layers differ, or share what they compute: stages against the unsplit model of transformers.

Gemma 3n and 4 (inputs by layer, shared keys and values, streams of hidden states), Llama 4 (chunks), DeepSeek V3.2 and
GLM 5 (indexers), Falcon-H1 (Mamba and attention in a layer), Apertus (an activation with parameters).
"""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from megadistill.errors import UserError
from megadistill.models.attention.choice import choose_attention
from megadistill.models.configs.unequal_layers import first_layers
from megadistill.models.families import (
    FAMILIES,
    load_config,
    logit_transform,
    refuse_as_student,
    refuse_documents,
    stored_buffers,
    transformers_attention,
)
from megadistill.models.flops import flops_per_token, layer_parameters, parameter_counts
from megadistill.models.forward.llama4_experts import use_own_tokens
from megadistill.models.forward.per_layer_inputs import has_per_layer_inputs
from megadistill.models.hf_folder import SINGLE_FILE
from megadistill.models.initial_weights import check_initial_weights
from megadistill.models.partition import stage_layers
from megadistill.models.weights import check_weights, load_pretrained
from megadistill.plan.counts.activations import count_activations
from megadistill.plan.counts.model_stats import measure_models
from megadistill.teacher.float8 import Float8Module
from megadistill.teacher.stage import TeacherStage
from tests.unit.models.cases import SIZES, VOCAB

CPU = torch.device("cpu")
_SLIDING, _FULL = "sliding_attention", "full_attention"
_KINDS = {"layer_types": [_SLIDING, _FULL, _SLIDING, _SLIDING, _FULL], "sliding_window": 6}
_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}

GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text", **SIZES, **_KINDS, "head_dim": 16, "global_head_dim": 32, "pad_token_id": 0,
    "hidden_size_per_layer_input": 0, "final_logit_softcapping": 3.0,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **SIZES, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 3, "moe_intermediate_size": 40, "first_k_dense_replace": 2, "index_topk": 6,
    "index_head_dim": 16, "index_n_heads": 16,
}  # fmt: skip

ALL: dict[str, dict[str, Any]] = {
    # As E2B and E4B: the last two layers take keys and values of layers 1 and 2, which stay with them.
    "gemma4-shared": {**GEMMA4, **_INPUTS, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "gemma4-inputs": {**GEMMA4, **_INPUTS},
    # As 26B-A4B: an MLP and experts side by side; keys are values in layers of full attention.
    "gemma4-experts": {
        **GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True,
        "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 40,
    },
    "gemma3n": {
        "model_type": "gemma3n_text", **SIZES, **_KINDS, **_INPUTS, "head_dim": 16, "num_kv_shared_layers": 2,
        "laurel_rank": 8, "activation_sparsity_pattern": [0.9, 0.0, 0.5, 0.0, 0.0], "pad_token_id": 0,
    },
    # Experts on layers 1 and 3; no rotations on layers 2 and 4, which see whole documents.
    "llama4": {
        "model_type": "llama4_text", **SIZES, "head_dim": 16, "intermediate_size_mlp": 80, "num_local_experts": 4,
        "num_experts_per_tok": 1, "attention_chunk_size": 6, "no_rope_layers": [1, 1, 0, 1, 0],
        "interleave_moe_layer_step": 2, "floor_scale": 21, "attn_scale": 0.5,
    },
    "deepseek_v32": {"model_type": "deepseek_v32", **_LATENT},
    "glm_moe_dsa": {
        "model_type": "glm_moe_dsa", **_LATENT, "indexer_types": ["full", "full", "shared", "full", "shared"],
    },
    "falcon_h1": {
        "model_type": "falcon_h1", **SIZES, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8,
        "mamba_n_groups": 2, "mamba_d_state": 12, "mamba_chunk_size": 8, "lm_head_multiplier": 0.5,
        "embedding_multiplier": 3.0, "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9], "key_multiplier": 0.5,
        "mlp_multipliers": [0.7, 0.9], "mamba_rms_norm": True,
    },
    "apertus": {"model_type": "apertus", **SIZES},
}  # fmt: skip
CASES = {name: keys for name, keys in ALL.items() if keys["model_type"] in FAMILIES}
CASE = pytest.mark.parametrize("case", CASES)
SOME = pytest.mark.parametrize(
    "case", [name if name == "gemma4-shared" else pytest.param(name, marks=pytest.mark.thorough) for name in CASES]
)
Saved = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The unsplit model of a case, whose norms and scales of layers are not one, and its folder."""

    @cache
    def write(case: str) -> tuple[Any, Path]:
        torch.manual_seed(0)
        config = load_config(CASES[case], what=case)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=transformers_attention(config, None))
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *stored_buffers(model).items()]:
                if tensor.ndim < 2 and not name.endswith(".eps"):
                    tensor.add_(0.3 * torch.randn_like(tensor))
        folder = tmp_path_factory.mktemp(case)
        model.save_pretrained(folder)
        return model.eval(), folder

    return write


def _tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


def _truth(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def _stages(folder: Path, stages: int, tokens: Tensor, positions: Tensor | None = None, **options: Any) -> Tensor:
    options = {"dtype": torch.float32, **options}
    x = tokens
    for number in range(stages):
        stage = TeacherStage.load(folder, stage=number, stages=stages, device=CPU, **options)
        x = stage(x, positions, tokens if stage.reads_tokens else None)
        shape = stage.hidden_shape if stage.is_last else stage.packet_shape
        assert x.shape == shape(*tokens.shape)
    return x


def _rounded_as(model: Any, stages: list[range]) -> Any:
    """The unsplit model with products of the same shapes as its stages': of their rows of the projection of inputs."""
    model = copy.deepcopy(model)
    inner = model.model
    if model.config.model_type == "llama4_text":
        use_own_tokens(inner)
    elif has_per_layer_inputs(model.config):
        parts = inner.per_layer_model_projection.weight.split([len(stage) * 8 for stage in stages])
        inner.per_layer_model_projection.forward = lambda x: torch.cat([linear(x, part) for part in parts], dim=-1)
    return model


@CASE
def test_the_chain_of_stages_is_the_unsplit_model(case: str, saved: Saved) -> None:
    model, folder = saved(case)
    config = load_config(folder, what="test")
    check_weights(folder, config)
    for stages in range(1, len(first_layers(config)) + 1):
        truth = _truth(_rounded_as(model, stage_layers(config, stages)), _tokens())
        assert torch.equal(_stages(folder, stages, _tokens()), truth), f"{stages} stages"


@pytest.mark.skipif("llama4" not in CASES, reason="this transformers lacks llama4")
def test_llama_4s_experts_on_their_own_tokens_give_what_all_experts_on_all_tokens_do(saved: Saved) -> None:
    model = saved("llama4")[0].model
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    theirs = copy.deepcopy(model.layers[1].feed_forward).double()
    own = copy.deepcopy(model)
    use_own_tokens(own)
    with torch.no_grad():
        truth, logits = theirs(x.double())
        hidden, own_logits = own.layers[1].feed_forward(x)
    torch.testing.assert_close(hidden, truth.float())
    torch.testing.assert_close(own_logits, logits.float())


@SOME
def test_bfloat16_stages_are_what_transformers_loads_in_bfloat16(case: str, saved: Saved) -> None:
    model, folder = saved(case)
    options: dict[str, Any] = {"local_files_only": True, "attn_implementation": model.config._attn_implementation}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    hidden, truth = _stages(folder, 2, _tokens(), dtype=torch.bfloat16), _truth(theirs, _tokens())
    if has_per_layer_inputs(model.config) or case == "llama4":  # products of other shapes
        assert (hidden - truth).norm() < 0.02 * truth.norm()
    else:
        assert torch.equal(hidden, truth)


@SOME
def test_a_whole_model_computes_the_same(case: str, saved: Saved) -> None:
    theirs, folder = saved(case)
    model = load_pretrained(folder, what="test", device=CPU, dtype=torch.float32)
    torch.testing.assert_close(_truth(model, _tokens()), _truth(theirs, _tokens()), rtol=1e-5, atol=1e-5)
    transform = logit_transform(model.config)
    with torch.no_grad():
        products = _truth(theirs, _tokens()) @ theirs.lm_head.weight.T * transform.scale
        logits = theirs(input_ids=_tokens(), use_cache=False).logits
    softcap = transform.softcap
    actual = products if softcap is None else softcap * torch.tanh(products / softcap)
    torch.testing.assert_close(actual, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "falcon_h1"])
def test_a_document_does_not_depend_on_its_neighbours(case: str, attention: Any, saved: Saved) -> None:
    model, folder = saved(case)
    if attention == "auto":
        config = load_config(folder, what="test")
        facts: dict[str, Any] = {"accelerator": False, "precision": "float32", "documents": True}
        attention = choose_attention("auto", config, **facts).value
    tokens, positions = _tokens()[:1], torch.tensor([[*range(9), *range(11)]])
    hidden = _stages(folder, 2, tokens, positions, attention=attention)
    for start, stop in ((0, 9), (9, 20)):
        alone = _truth(model, tokens[:, start:stop])
        torch.testing.assert_close(hidden[:, start:stop], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("case", [name for name in ("gemma3n", "glm_moe_dsa", "llama4") if name in CASES])
def test_compiled_stages_compute_the_same(case: str, saved: Saved) -> None:
    model, folder = saved(case)
    hidden = _stages(folder, 2, _tokens(), compiled=True)
    torch.testing.assert_close(hidden, _truth(model, _tokens()), rtol=1e-4, atol=5e-5)


@CASE
def test_parameters_and_flops_are_those_of_the_model(case: str, saved: Saved) -> None:
    model, folder = saved(case)
    config = load_config(folder, what="test")
    counts, shapes = parameter_counts(config), {name: each.shape for name, each in model.named_parameters()}
    assert counts.total == sum(shape.numel() for shape in shapes.values())
    chosen = getattr(config, "top_k_experts", None) or getattr(config, "num_experts_per_tok", 1)
    idle = sum(shape.numel() // shape[0] * (shape[0] - chosen) for name, shape in shapes.items() if ".experts." in name)
    looked_up = sum(shape.numel() for name, shape in shapes.items() if "embed_tokens_per_layer" in name)
    assert counts.body - counts.active_body == idle + looked_up
    seen: list[int] = []  # widths of queries and values of each layer, as attention gets them
    for layer in model.model.layers:
        attention = layer.self_attn
        width = attention.o_proj.weight.shape[1]
        seen.append((getattr(attention, "q_proj", None) or attention.q_b_proj).weight.shape[0] + width)
        if getattr(attention, "indexer", None) is not None:
            seen.append(attention.indexer.wq_b.weight.shape[0])
    state = 5 * 4 * 6 * 8 * 12 if case == "falcon_h1" else 0
    assert flops_per_token(config, 64).attention == 64 * sum(seen) + state


@SOME
def test_a_plan_counts_the_stages(case: str, saved: Saved) -> None:
    student = load_config({"model_type": "llama", **SIZES}, what="test")
    config = load_config(saved(case)[1], what="test")
    teacher = measure_models(student, config, sequence_length=20).teacher
    assert teacher is not None
    assert teacher.activations("float32", masked=False, attention="sdpa").forward > 20 * 64 * 4
    for stages in (1, 2):
        for number, planned in enumerate(teacher.stage_bytes(stages, itemsize=4)):
            stage = TeacherStage.load(saved(case)[1], stage=number, stages=stages, device=CPU, dtype=torch.float32)
            held = sum(each.nbytes for each in stage.parameters())
            assert planned == pytest.approx(held, abs=4 * 64 * 8), "but for norms of inputs, and streams' projections"


def test_a_plan_counts_the_wider_mlps_of_layers_that_share() -> None:
    keys = {**ALL["gemma4-shared"], "intermediate_size": 512}
    how: dict[str, Any] = {"dtype": torch.bfloat16, "masked": False, "attention": "sdpa"}
    forward = [
        count_activations(load_config({**keys, "use_double_wide_mlp": wide}, what="test"), 20, **how).forward
        for wide in (False, True)
    ]
    # The last layers' gate and up have as many columns more, each of two bytes a token.
    assert forward[1] - forward[0] >= 20 * 2 * 2 * 512


@pytest.mark.parametrize("case", [name for name in ("deepseek_v32", "glm_moe_dsa") if name in CASES])
def test_indexers_stay_native_beside_float8(case: str, saved: Saved) -> None:
    """What they give chooses keys, as routers choose experts; and they read the type of their weights."""
    folder = saved(case)[1]
    stage = TeacherStage.load(folder, stage=0, stages=1, device=CPU, dtype=torch.bfloat16, precision="float8")
    rounded = {name for name, module in stage.named_modules() if isinstance(module, Float8Module)}
    assert rounded
    assert not [name for name in rounded if "indexer" in name]
    assert stage(_tokens()).isfinite().all()


def test_layers_that_share_keys_and_values_stay_in_one_stage() -> None:
    config = load_config(ALL["gemma4-shared"], what="test")
    assert first_layers(config) == [0, 1]
    assert stage_layers(config, 2) == [range(0, 1), range(1, 5)]
    with pytest.raises(UserError, match=r"5 layers cannot be cut into 3 stages: some of them .*: give 1 to 2"):
        stage_layers(config, 3)
    assert first_layers(load_config(ALL["gemma4-inputs"], what="test")) == [0, 1, 2, 3, 4]


@pytest.mark.skipif("glm_moe_dsa" not in CASES, reason="this transformers lacks glm_moe_dsa")
def test_a_stage_begins_with_an_indexer() -> None:
    assert first_layers(load_config(ALL["glm_moe_dsa"], what="test")) == [0, 1, 3]


def test_each_stage_reads_its_layers_columns_of_the_table(saved: Saved) -> None:
    folder = saved("gemma4-inputs")[1]
    whole = load_file(folder / SINGLE_FILE)["model.embed_tokens_per_layer.weight"]
    parts = []
    for number in range(3):
        stage = TeacherStage.load(folder, stage=number, stages=3, device=CPU, dtype=torch.float32)
        parts.append(stage.decoder.embed_tokens_per_layer.weight)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert [part.shape[1] for part in parts] != [whole.shape[1]] * 3
    per_layer = layer_parameters(load_config(folder, what="test"))
    assert min(per_layer) > VOCAB * 8, "a layer's columns are counted with it"


def test_keys_and_values_that_layers_do_not_use_may_be_stored(saved: Saved, tmp_path: Path) -> None:
    """As in the published folders of Gemma 3n and 4."""
    folder = saved("gemma4-shared")[1]
    tensors = load_file(folder / SINGLE_FILE)
    extra = {
        "model.layers.4.self_attn.k_proj.weight": torch.ones(4, 4),
        "model.layers.3.self_attn.k_norm.weight": torch.ones(4),
    }
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({**tensors, **extra}, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    check_weights(tmp_path, load_config(tmp_path, what="test"))
    save_file({**tensors, "model.layers.0.self_attn.k_extra.weight": torch.ones(4)}, tmp_path / SINGLE_FILE)
    with pytest.raises(UserError, match="k_extra"):
        check_weights(tmp_path, load_config(tmp_path, what="test"))


def test_weights_whose_constants_are_not_a_students_are_refused_as_its_start(tmp_path: Path) -> None:
    config = load_config({**GEMMA4, "num_hidden_layers": 2, "layer_types": [_SLIDING, _FULL]}, what="test")
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    check_initial_weights(tmp_path, config, vocab_size=VOCAB)
    model.model.layers[1].layer_scalar.fill_(0.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"layers\.1\.layer_scalar in .* is 0\.5, and a student's is 1"):
        check_initial_weights(tmp_path, config, vocab_size=VOCAB)


@pytest.mark.parametrize("case", [name for name in CASES if name != "apertus"])
def test_who_can_only_teach_is_no_student(case: str) -> None:
    way_out = r"; a student's \w+ is (0|false)$" if case.startswith("gemma4") else "; students may be"
    with pytest.raises(UserError, match=rf"student\.config: a .* can only teach: .*{way_out}"):
        refuse_as_student(load_config(CASES[case], what="test"), "student.config")


def test_documents_that_would_see_each_others_length_are_refused() -> None:
    long = {"rope_type": "dynamic", "factor": 4.0}
    config = load_config({"model_type": "llama", **SIZES, "rope_scaling": long}, what="test")
    refuse_documents(config, "student.config", sequence_length=64)
    with pytest.raises(UserError, match=r"type dynamic stretch with the longest .* 65 tokens are longer than 64"):
        refuse_documents(config, "student.config", sequence_length=65)
    if "llama4" in CASES:
        config = load_config(CASES["llama4"], what="test")
        refuse_documents(config, "teacher.path", sequence_length=20)
        with pytest.raises(UserError, match=r"scales its queries by the place in a row.* from token 21 on"):
            refuse_documents(config, "teacher.path", sequence_length=21)
    if "falcon_h1" in CASES:
        with pytest.raises(UserError, match="carry their state over the bounds of documents"):
            refuse_documents(load_config(CASES["falcon_h1"], what="test"), "teacher.path")


@pytest.mark.parametrize("case", [name for name in ("deepseek_v32", "glm_moe_dsa") if name in CASES])
def test_indexers_get_dense_masks(case: str) -> None:
    config = load_config(CASES[case], what="test")
    facts: dict[str, Any] = {"accelerator": True, "precision": "bfloat16", "documents": True, "flash": True}
    assert choose_attention("auto", config, triton=True, **facts).value == "sdpa"
    with pytest.raises(UserError, match="attention is flex, which has no dense masks"):
        choose_attention("flex", config, triton=True, **facts)


@pytest.mark.parametrize("case", [name for name in ("falcon_h1", "llama4") if name in CASES])
def test_flash_attn_is_not_chosen_where_it_would_mislead_a_layer(case: str) -> None:
    """Mamba would take the lengths of rows that flash-attn is given; chunks are in masks alone."""
    config = load_config(CASES[case], what="test")
    facts: dict[str, Any] = {"accelerator": True, "precision": "bfloat16", "documents": False, "flash": True}
    assert choose_attention("auto", config, triton=True, **facts).value != "flash"
    with pytest.raises(UserError, match="attention is flash, and flash-attn"):
        choose_attention("flash", config, triton=True, **facts)
