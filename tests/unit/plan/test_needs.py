"""What a recipe needs, against numbers written out by hand.

Legend: N parameters, V padded vocabulary, D and E widths of student and teacher, L layers, p ranks of a vocab group.
"""

import io
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megadistill.comm.roles import Roles
from megadistill.config import LossSection, Recipe
from megadistill.errors import UserError
from megadistill.model.families import load_config
from megadistill.plan.needs import Measured, Needs, measure, needs, rank_memory, read_needs, tables
from tests.unit.model.test_flops import LLAMA3_8B

LLAMA3_8B_TOTAL, LLAMA3_8B_BODY = 8_030_261_248, 6_979_588_096

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 250,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# a layer: q, o 32·32 each; k, v 16·32 each; gate, up, down 32·48 each; two norms of 32
TINY_LAYER = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
TINY_BODY = 2 * TINY_LAYER + 32
TINY_TOTAL = TINY_BODY + 2 * 250 * 32


def _recipe(*, distill: bool, precision: str, global_batch: int, micro_batch: int, **student: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "objective": "distill" if distill else "labels",
            "run": {"folder": "run"},
            "data": {"manifest": "manifest.json"},
            "student": {"config": {"model_type": "llama"}, **student},
            "train": {
                "steps": 100,
                "global_batch": global_batch,
                "micro_batch": micro_batch,
                "precision": precision,
                "adamw": {"learning_rate": 1e-3},
            },
            "teacher": {"path": "teacher"} if distill else None,
        }
    )


def _tiny(*, ranks: int = 2, group_size: int = 1, global_batch: int = 8, **student: Any) -> Needs:
    """A tiny student from labels, in float32."""
    return needs(
        _recipe(
            distill=False,
            precision="float32",
            global_batch=global_batch,
            micro_batch=2,
            **{"vocab_multiple": 256, **student},
        ),
        measure(load_config(TINY, what="test"), None, sequence_length=32),
        vocab_size=250,
        ranks=ranks,
        ranks_per_node=ranks,
        group_size=group_size,
    )


class _Data:
    vocab_size, sequence_length = 250, 32


def _tiny_under(profile: dict[str, Any]) -> Needs:
    """The same under settings of DeepSpeed's."""
    return needs(
        _recipe(distill=False, precision="float32", global_batch=8, micro_batch=2, vocab_multiple=256),
        measure(load_config(TINY, what="test"), None, sequence_length=32),
        vocab_size=250,
        ranks=2,
        ranks_per_node=2,
        group_size=1,
        profile=profile,
    )


@cache
def _llamas() -> Measured:
    llama = load_config(LLAMA3_8B, what="test")
    return measure(llama, llama, sequence_length=8192)


def _large(*, ranks: int = 64, group_size: int = 8, loss: dict[str, Any] | None = None) -> Needs:
    """Llama-3-8B, from another of its size, in bfloat16 with activation checkpointing: 8 nodes of 8."""
    recipe = _recipe(distill=True, precision="bfloat16", global_batch=256, micro_batch=1, activation_checkpointing=True)
    return needs(
        recipe.model_copy(update={"loss": LossSection.model_validate(loss or {})}),
        _llamas(),
        vocab_size=128_256,
        ranks=ranks,
        ranks_per_node=8,
        group_size=group_size,
    )


def test_a_tiny_student_from_labels() -> None:
    found = _tiny()
    assert (found.ranks, found.group_size, found.accumulation) == (2, 1, 2)
    assert found.tokens == 100 * 8 * 32
    (student,) = found.models
    assert (student.role, student.parameters.total) == ("student", TINY_TOTAL)
    assert found.flops_per_token == 3 * (2 * TINY_BODY + 2 * 250 * 32 + 2 * 2 * 32 * 32)
    assert found.memory == {
        "ZeRO-3 states": 20 * TINY_TOTAL // 2,  # float32: 4 + gradient 4 + master 4 + moments 8
        "gathered layers (two)": 2 * 4 * (TINY_BODY // 2),
        "head gradient": 256 * 32 * 4,
        "logit chunk": 4 * (2 * 32) * 256,  # the micro-batch's own: less than the recipe allows
        "head rows": 4 * 256 * 32,  # a group of one gathers the whole head
    }
    assert found.wire == {"ZeRO-3 (two gathers, one reduce-scatter)": 3 * 4 * (TINY_TOTAL - 250 * 32) // (2 * 32)}


def test_llama_3_8b_distilled_on_64_ranks() -> None:
    found = _large()
    assert found.accumulation == 4
    assert found.tokens == 100 * 256 * 8192
    assert [(model.role, model.parameters.total) for model in found.models] == [
        ("student", LLAMA3_8B_TOTAL),
        ("teacher", LLAMA3_8B_TOTAL),
    ]
    body, head, attention = 2 * LLAMA3_8B_BODY, 2 * 128_256 * 4096, 2 * 32 * 8192 * 4096
    recomputed = 3 * (body + head + attention) + body + attention  # 3·fwd, and the body once more
    assert found.flops_per_token == recomputed + body + head + attention
    assert found.memory == {
        "ZeRO-3 states": 2_258_510_976,  # bfloat16: 2 + gradient 4 + master 4 + moments 8 = 18 N / 64
        "gathered layers (two)": 2 * 2 * LLAMA3_8B_BODY // 32,
        "head gradient": 4 * 16_128 * 4096,  # V is padded to 129,024, an eighth of it is 16,128 rows
        "logit chunk": 512 << 20,  # what the recipe allows: less than 2·4·V/p for the micro-batches of 8 ranks
        "checkpointed activations": 2 * 32 * 4096 * 8192,  # 2·L·D·micro_tokens
        # 4 of 32 layers, and the first one's embedding
        "teacher stage": 2 * ((LLAMA3_8B_BODY - 4096) // 8 + 128_256 * 4096),
        "head rows": 2 * 16_128 * 4096,  # the slice is gathered from 8 ranks' pieces
        "teacher head rows": 2 * 16_128 * 4096,  # 2·V·E/p
        "teacher hidden states": 2 * 4096 * 8192 * 8,
    }
    assert found.wire == {
        "ZeRO-3 (two gathers, one reduce-scatter)": 6
        * (LLAMA3_8B_TOTAL - 128_256 * 4096)
        // 8192,  # 6 N; the head stays
        "student hidden states, and their gradient": (2 + 4) * 4096 * 8,
        "teacher hidden states": 2 * 4096 * (1 + 8),
    }


def test_looking_for_the_surest_tokens_costs_the_teachers_head_once_more() -> None:
    routed = _large(loss={"label_fraction": 0.15})
    assert routed.flops_per_token == _large().flops_per_token + 2 * 128_256 * 4096
    assert routed.memory == _large().memory


def test_truncated_targets_hold_one_models_logits_at_a_time() -> None:
    room: dict[str, Any] = {"logit_memory_mb": 1 << 20}
    targets, whole = _large(loss={**room, "targets": {}}), _large(loss=room)
    assert targets.memory["logit chunk"] == 4 * 8 * 8192 * 16_128
    assert whole.memory["logit chunk"] == 2 * targets.memory["logit chunk"]
    assert targets.flops_per_token == whole.flops_per_token


def _stage(teacher: dict[str, Any], *, stages: int) -> int:
    """Parameters of the largest stage of a teacher with TINY's vocabulary."""
    recipe = _recipe(distill=True, precision="float32", global_batch=6, micro_batch=1, vocab_multiple=6)
    found = needs(
        recipe,
        measure(load_config(TINY, what="test"), load_config({**TINY, **teacher}, what="test"), sequence_length=32),
        vocab_size=250,
        ranks=stages,
        ranks_per_node=stages,
        group_size=stages,
    )
    parameters, rest = divmod(found.memory["teacher stage"], 4)
    assert rest == 0
    return parameters


def test_the_largest_stage_is_what_a_rank_must_hold() -> None:
    embedding, norm = 250 * 32, 32
    assert _stage({"num_hidden_layers": 2}, stages=1) == TINY_BODY + embedding
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


def test_states_shrink_with_the_ranks_and_the_head_with_the_group() -> None:
    few, many = _large(ranks=8), _large(ranks=64)
    assert few.memory["ZeRO-3 states"] == 8 * many.memory["ZeRO-3 states"]
    assert few.memory["logit chunk"] == many.memory["logit chunk"]
    smaller_group = _large(group_size=4).memory
    assert smaller_group["head gradient"] == 2 * many.memory["head gradient"]
    assert smaller_group["logit chunk"] == many.memory["logit chunk"], "the recipe's word; chunks get shorter"


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.global_batch 8 .* 3 ranks"):
        _tiny(ranks=3)
    with pytest.raises(UserError, match=r"32 layers .* 64 stages"):
        _large(group_size=64)
    with pytest.raises(UserError, match="padded vocabulary of 256"):
        _tiny(ranks=7, global_batch=14)
    with pytest.raises(UserError, match="--ranks 0"):
        read_needs(Path("recipe.yaml"), [], ranks=0)


def test_the_tables_say_all_of_it() -> None:
    out = io.StringIO()
    for table in tables(_large()):
        Console(file=out, width=80).print(table)
    said = out.getvalue()
    for part in ("8.03 G", "6.98 G", "64 ranks", "209,715,200 tokens", *_large().memory, *_large().wire):
        assert part in said, part
    assert "2.26 GB" in said, "the ZeRO-3 states"
    assert "5.5 MB" in said, "ZeRO-3's traffic"


def test_what_is_offloaded_lies_on_the_host() -> None:
    def held(**zero: Any) -> tuple[int, int]:
        found = _tiny_under({"zero_optimization": zero})
        return found.memory["ZeRO-3 states"], found.host.get("offloaded ZeRO-3 states", 0)

    each = TINY_TOTAL // 2
    assert held() == (20 * each, 0)
    assert held(offload_optimizer={"device": "cpu"}) == (4 * each, 16 * each)
    assert held(offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}) == (0, 20 * each)
    assert held(offload_optimizer={"device": "nvme"}) == (4 * each, 0)
    assert _tiny_under({}).host == {"checkpoint on its way to the disk": 12 * TINY_TOTAL // 2}


def test_a_teacher_with_ranks_of_its_own_is_on_none_of_the_students() -> None:
    recipe = _recipe(distill=True, precision="float32", global_batch=8, micro_batch=2, vocab_multiple=256)
    model = load_config(TINY, what="test")

    def memory(rank: int) -> dict[str, int]:
        return rank_memory(
            recipe,
            student=model,
            teacher=model,
            data=_Data(),  # type: ignore[arg-type]
            rank=rank,
            ranks=2,
            group_size=2,
            roles=Roles(4, 2, 2),
            profile={},
        )["device"]

    assert "teacher stage" not in memory(0)
    assert "teacher head rows" in memory(0)
    assert memory(2) == {"teacher stage": 4 * (TINY_LAYER + 250 * 32)}  # a layer, and the embedding
