"""Memory by line, against numbers written out by hand. tests/ranks/plan/test_plan.py holds them against runs.

Legend: N parameters, V padded vocabulary, D and E widths, p ranks of a vocab group.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.config.bounds import MAX_MEGABYTES
from megadistill.config.recipe import LossSection
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import Divergence, Head, LossOptions
from megadistill.loss.inputs import LossInputs, exchange_metadata
from megadistill.models.families import load_config
from megadistill.plan.counts.model_stats import measure_models
from megadistill.plan.counts.requirements import count_requirements
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.zero import Zero
from megadistill.teacher.stage import TeacherStage
from tests.unit.models.cases import saved_model
from tests.unit.plan.cases import LLAMA3_8B_BODY, TINY, TINY_LAYER, large, recipe, stats, tiny

TINY_PADDED = 2 * TINY_LAYER + 32 + 2 * 256 * 32
ROWS = 129_024 // 8
"""V is padded to a multiple of 1024."""


def test_states_are_counted_by_pieces_of_the_padded_parameters() -> None:
    each = TINY_PADDED // 2
    step = tiny(deepspeed_config={"zero_optimization": {"reduce_bucket_size": 100}}).phases["step"]
    assert step["ZeRO-3 states"] == 20 * each, "float32: 4 + gradient 4 + master 4 + moments 8"
    assert step["reduce bucket"] == 4 * 100
    parameters = LLAMA3_8B_BODY + 2 * 129_024 * 4096
    assert large().memory["ZeRO-3 states"] == 18 * parameters // 64, "bfloat16: 2 + gradient 4 + master 4 + moments 8"
    assert large(ranks=8).memory["ZeRO-3 states"] == 8 * large().memory["ZeRO-3 states"]


def test_llama_3_8b_distilled_on_64_ranks() -> None:
    loss = large().phases["loss"]
    assert loss["head gradient"] == 4 * ROWS * 4096, "of the slice, which is 8 ranks' pieces"
    assert loss["head rows"] == 2 * ROWS * 4096, "the slice is gathered from 8 ranks' pieces"
    assert loss["teacher head rows"] == 2 * ROWS * 4096
    assert loss["checkpointed layer inputs"] == 2 * 32 * 4096 * 8192, "2·L·D·micro_tokens"
    assert loss["teacher stage"] == 2 * ((LLAMA3_8B_BODY - 4096) // 8 + 128_256 * 4096), "4 layers, and the embedding"
    packet = 2 * 4096 * 8192 + 8
    assert loss["teacher hidden states"] == packet
    assert loss["teacher hidden states in flight"] == 2 * 8 * packet, "what TeacherPipeline.bytes_in_flight says"
    dlogits = loss["logit chunk"] // 9  # in bfloat16, of one chunk and model; float32 logits of two of each
    held = loss["logit chunk"] - dlogits
    assert 0.95 * (512 << 20) < held <= 512 << 20, "what the recipe allows"
    assert large(group_size=4).phases["loss"]["head gradient"] == 2 * loss["head gradient"]


def test_a_group_of_one_gathers_the_whole_head_and_one_of_all_ranks_nothing() -> None:
    alone, all_ranks = tiny(group_size=1).phases["loss"], tiny(group_size=2).phases["loss"]
    assert alone["head rows"] == alone["head gradient"] == 4 * 256 * 32
    assert "head rows" not in all_ranks
    assert "head gradient" not in all_ranks, "the loss adds to ZeRO-3's own"


def test_truncated_targets_hold_one_models_logits_at_a_time() -> None:
    memory: dict[str, Any] = {"logit_memory_mb": MAX_MEGABYTES}
    targets, whole = large(loss={**memory, "targets": {}}), large(loss=memory)
    one = 4 * 8 * 8192 * ROWS  # float32, the micro-batches of 8 ranks; the first slices are full
    dlogits = one // 2
    assert targets.phases["loss"]["logit chunk"] == 2 * one + dlogits, "two chunks are in flight, be there one"
    assert whole.phases["loss"]["logit chunk"] == 2 * 2 * one + dlogits
    assert "targets" not in whole.phases
    assert targets.phases["targets"]["logit chunk"] == one


@pytest.mark.parametrize("tokens", [1, 24, 100])
@pytest.mark.parametrize("megabytes", [1, 2])
def test_a_chunk_is_the_losss_own(tokens: int, megabytes: int) -> None:
    """A group of one rank, which agrees with no other."""
    model = load_config({**TINY, "vocab_size": 7000, "max_position_embeddings": 128}, what="test")
    plain = recipe(distill=False, precision="float32", global_batch=1, micro_batch=1, vocab_multiple=1)
    plain = plain.model_copy(update={"loss": LossSection(logit_memory_mb=megabytes)})
    counted = measure_models(model, None, sequence_length=tokens)
    run = Sharding(plain, counted, 7000, 1, 1, 1)
    labels = torch.zeros(tokens, dtype=torch.int64)
    head = Head(torch.zeros(tokens, 32), torch.zeros(7000, 32))
    vocab = VocabSlice.contiguous(0, 7000, 7000)
    weights = torch.ones(tokens)
    inputs = LossInputs(head, None, labels, weights, Divergence(), vocab, LossOptions(megabytes << 20))
    plan, _ = exchange_metadata(inputs, with_gradient=True)
    assert run.loss_chunks == plan


def test_what_is_offloaded_lies_on_the_host() -> None:
    each = TINY_PADDED // 2

    def held(**zero: Any) -> tuple[int, int]:
        required = tiny(deepspeed_config={"zero_optimization": zero})
        return required.phases["loss"].get("ZeRO-3 states", 0), required.host.get("offloaded ZeRO-3 states", 0)

    assert held() == (20 * each, 0)
    assert held(offload_optimizer={"device": "cpu"}) == (4 * each, 20 * each)
    assert held(offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}) == (0, 24 * each)
    assert held(offload_optimizer={"device": "nvme"}) == (4 * each, 0)
    assert tiny().host == {"checkpoint being written": 12 * each}


def test_copies_of_the_weights_in_a_node() -> None:
    required = large(deepspeed_config={"zero_optimization": {"zero_hpz_partition_size": 8}})
    gathered = LLAMA3_8B_BODY + 129_024 * 4096  # the head is not
    assert required.memory["second partition in the node (hpZ)"] == 2 * gathered // 8


def test_activations_come_with_the_micro_batch_and_go_with_checkpointing() -> None:
    whole, checkpointed = tiny(), tiny(activation_checkpointing="full")
    layers = 2 * 32 * 32 * 4 * 2  # inputs: two sequences of 32 tokens, 32 wide, float32, two layers
    assert checkpointed.phases["loss"]["checkpointed layer inputs"] == layers
    assert "activations" not in checkpointed.phases["loss"]
    assert whole.phases["loss"]["activations"] > 5 * layers
    larger = recipe(distill=False, precision="float32", global_batch=8, micro_batch=4, vocab_multiple=256)
    run = Sharding(larger, stats(), vocab_size=250, ranks=2, ranks_per_node=2, group_size=1)
    twice = count_requirements(run)
    assert twice.phases["loss"]["activations"] == 2 * whole.phases["loss"]["activations"]


def _stage(teacher: dict[str, Any], *, stages: int) -> int:
    """Parameters of the largest stage of a teacher with TINY's vocabulary."""
    plain = recipe(distill=True, precision="float32", global_batch=6, micro_batch=1, vocab_multiple=6)
    student, other = load_config(TINY, what="test"), load_config({**TINY, **teacher}, what="test")
    models = measure_models(student, other, sequence_length=32)
    run = Sharding(plain, models, vocab_size=250, ranks=stages, ranks_per_node=stages, group_size=stages)
    parameters, rest = divmod(count_requirements(run).memory["teacher stage"], 4)
    assert rest == 0
    return parameters


def test_the_largest_stage_is_what_a_rank_must_hold() -> None:
    embedding, norm = 250 * 32, 32
    assert _stage({"num_hidden_layers": 2}, stages=1) == 2 * TINY_LAYER + norm + embedding
    # 32 layers over 3 stages are 10, 11 and 11: a layer is smaller than the embedding
    assert _stage({"num_hidden_layers": 32}, stages=3) == 10 * TINY_LAYER + embedding
    # 7 over 6 are 1, 1, 1, 1, 1 and 2; a layer of this width is larger than the embedding
    gate_up_down = 3 * 32 * (400 - 48)
    wide = {"num_hidden_layers": 7, "intermediate_size": 400}
    assert _stage(wide, stages=6) == 2 * (TINY_LAYER + gate_up_down) + norm


def test_a_stage_of_a_mixture_is_cut_by_the_experts_that_work_and_holds_them_all() -> None:
    """Layers 0 and 1 are dense, 2 and 3 mixtures of 8 experts, of which one works: the dense ones cost more."""
    mixture = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "head_dim": 8,
        "intermediate_size": 400,
        "mlp_only_layers": [0, 1],
        "moe_intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 1,
    }
    attention = 2 * 32 * 32 + 2 * 16 * 32 + 2 * 8 + 2 * 32  # with a norm each of queries and keys
    dense, sparse = attention + 3 * 32 * 400, attention + 8 * 32 + 8 * 3 * 32 * 40
    # 1, 1 and 2 layers: the mixtures go together, for a token uses an eighth of their experts
    assert _stage(mixture, stages=3) == max(dense + 250 * 32, 2 * sparse + 32)
    assert 2 * sparse + 32 > dense + 250 * 32


@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen3_moe"])
def test_a_float8_stage_is_counted_as_it_is_loaded(case: str, tmp_path: Path) -> None:
    """Its matrices at a byte a number and their scales at four a row; a small model's experts may stay as they are."""
    saved_model(case, tmp_path)
    model = load_config(tmp_path, what="test")
    teacher = measure_models(model, model, sequence_length=32).student
    for precision in ("native", "float8"):
        place: dict[str, Any] = {"stages": 2, "dtype": torch.bfloat16, "device": torch.device("cpu")}
        loaded = [TeacherStage.load(tmp_path, stage=stage, precision=precision, **place) for stage in range(2)]
        held = [sum(tensor.nbytes for name, tensor in stage.weights() if "rotary_emb" not in name) for stage in loaded]
        assert list(teacher.stage_bytes(2, itemsize=2, float8=precision == "float8")) == held


def test_a_float8_teacher_is_a_rank_s_own_stage() -> None:
    plain = recipe(distill=True, precision="bfloat16", global_batch=6, micro_batch=1, vocab_multiple=6)
    assert plain.teacher is not None
    float8 = plain.model_copy(update={"teacher": plain.teacher.model_copy(update={"precision": "float8"})})
    run = Sharding(float8, stats(teacher=True), vocab_size=250, ranks=1, ranks_per_node=1, group_size=1)
    rows, norms = 2 * 32 + 2 * 16 + 2 * 48 + 32, 2 * 32
    layer = (TINY_LAYER - norms) + 4 * rows + 2 * norms
    assert count_requirements(run).memory["teacher stage"] == 2 * layer + 2 * (250 * 32 + 32)


def test_norms_of_updates_hold_a_copy_of_what_is_stepped_at_once() -> None:
    plain = recipe(distill=False, precision="float32", global_batch=8, micro_batch=2, vocab_multiple=256)
    with_norms = plain.model_copy(update={"train": plain.train.model_copy(update={"norms_every": 100})})

    def held(**zero: Any) -> tuple[int, int]:
        run = Sharding(
            with_norms,
            stats(),
            vocab_size=250,
            ranks=2,
            ranks_per_node=2,
            group_size=1,
            zero=Zero.of({"zero_optimization": zero}),
        )
        counted, name = count_requirements(run), "weights before the update"
        return counted.phases["step"].get(name, 0), counted.host.get(name, 0)

    whole = 4 * TINY_PADDED // 2
    assert held() == (whole, 0)
    assert held(sub_group_size=1000) == (4000, 0)
    assert held(offload_optimizer={"device": "cpu"}) == (0, whole)
    assert "weights before the update" not in tiny().phases["step"]
