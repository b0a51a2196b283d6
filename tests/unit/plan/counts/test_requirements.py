"""Requirements of a recipe, against numbers written out by hand. Memory and traffic have tests of their own."""

from dataclasses import replace
from typing import Any

import pytest

from megadistill.config.recipe import LossSection
from megadistill.distributed.roles import Roles
from megadistill.errors import UserError
from megadistill.models.families import load_config
from megadistill.plan.counts.model_stats import measure_models
from megadistill.plan.counts.requirements import TokenFlops, count_requirements
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.traffic import GATHERS
from tests.unit.plan.cases import LLAMA3_8B_BODY, LLAMA3_8B_TOTAL, TINY, TINY_LAYER, large, recipe, stats, tiny


def test_a_tiny_student_from_labels() -> None:
    required = tiny()
    assert required.tokens == 100 * 8 * 32
    (student,) = required.models
    body, head, attention = 2 * (2 * TINY_LAYER + 32), 2 * 250 * 32, 2 * 2 * 32 * 32
    assert (student.role, student.parameters.total) == ("student", body // 2 + 2 * 250 * 32)
    assert student.work == TokenFlops(3 * body, 3 * head, 3 * attention, recompute=0)
    assert required.flops_per_token == 3 * (body + head + attention)
    assert required.target_bytes is None


def test_the_steps_of_the_run_that_it_begins_from_cost_nothing() -> None:
    run = Sharding(
        recipe(distill=False, precision="float32", global_batch=8, micro_batch=2, vocab_multiple=256),
        replace(stats(), first_step=60),
        vocab_size=250,
        ranks=2,
        ranks_per_node=2,
        group_size=1,
    )
    required = count_requirements(run)
    assert (required.tokens, required.earlier_tokens) == (40 * 8 * 32, 60 * 8 * 32)


def test_llama_3_8b_distilled_on_64_ranks() -> None:
    required = large()
    assert required.tokens == 100 * 256 * 8192
    assert [(model.role, model.parameters.total) for model in required.models] == [
        ("student", LLAMA3_8B_TOTAL),
        ("teacher", LLAMA3_8B_TOTAL),
    ]
    body, head, attention = 2 * LLAMA3_8B_BODY, 2 * 128_256 * 4096, 2 * 32 * 8192 * 4096
    student, teacher = required.models
    assert student.work == TokenFlops(3 * body, 3 * head, 3 * attention, recompute=body + attention)
    assert teacher.work == TokenFlops(body, head, attention, recompute=0)


@pytest.mark.parametrize(
    ("coef", "micro_batch", "passes"),
    [(None, 2, 1), (0.01, 2, 1), (0.0, 2, 0), (None, 4, 0)],
    ids=["by the config", "by the recipe", "without the loss", "without accumulation"],
)
def test_counting_the_load_of_experts_is_a_forward_pass_and_a_gathering(
    coef: float | None, micro_batch: int, passes: int
) -> None:
    mixture = load_config({**TINY, "model_type": "mixtral", "num_local_experts": 4}, what="test")
    made = recipe(distill=False, precision="float32", global_batch=8, micro_batch=micro_batch, vocab_multiple=256)
    run = Sharding(
        made.model_copy(update={"loss": LossSection(router_aux_loss_coef=coef)}),
        measure_models(mixture, None, sequence_length=32),
        vocab_size=250,
        ranks=2,
        ranks_per_node=2,
        group_size=1,
    )
    required = count_requirements(run)
    once = run.student.forward
    assert required.models[0].work.recompute == passes * (once.body + once.attention)
    gathered = (1 + passes) * run.gathered.forward + run.gathered.backward
    persistent = 2 * run.persistent / run.accumulation  # all-reduced
    assert required.traffic[GATHERS].received * run.tokens == pytest.approx(4 * (gathered + persistent) / 2)


def test_looking_for_the_surest_tokens_costs_the_teachers_head_once_more() -> None:
    routed = large(loss={"label_fraction": 0.15})
    assert routed.models[1].work.recompute == 2 * 128_256 * 4096
    assert routed.memory == large().memory


def test_the_phase_that_takes_most_is_what_a_rank_needs() -> None:
    required = large()
    assert sum(required.memory.values()) == max(sum(lines.values()) for lines in required.phases.values())
    assert required.phase == "backward"
    assert tiny(deepspeed_config={"zero_optimization": {"reduce_bucket_size": 1000}}).phase == "loss"


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"32 layers .* 64 stages"):
        large(group_size=64)


def test_a_batch_and_a_vocabulary_that_do_not_divide_are_padded() -> None:
    """Seven ranks: 259 rows of the vocabulary instead of 256, and room for 28 sequences, of which 16 count."""
    uneven, even = tiny(ranks=7, global_batch=16), tiny(ranks=8, global_batch=16)
    assert uneven.tokens == even.tokens, "surplus rows are no tokens"
    assert [each.phases["step"]["head gradient"] for each in (uneven, even)] == [4 * 32 * 259, 4 * 32 * 256]


def test_a_teacher_with_ranks_of_its_own_is_on_none_of_the_students() -> None:
    plain = recipe(distill=True, precision="float32", global_batch=8, micro_batch=2, vocab_multiple=256)
    teacher = plain.teacher.model_copy(update={"placement": "disaggregated", "ranks": 2})  # type: ignore[union-attr]
    run = Sharding(
        plain.model_copy(update={"teacher": teacher}),
        stats(teacher=True),
        vocab_size=250,
        ranks=2,
        ranks_per_node=2,
        group_size=2,
        roles=Roles(4, 2, 2),
    )
    required = count_requirements(run)
    assert "teacher stage" not in required.memory
    assert "teacher head rows" in required.memory
    assert "checkpoint being written" in required.host
    assert required.teacher_memory["teacher stage"] == 4 * (TINY_LAYER + 250 * 32)  # a layer, and the embedding


def test_targets_are_storage_that_a_recipe_may_use() -> None:
    loss: dict[str, Any] = {"targets": LossSection.model_validate({"targets": {}}).targets}
    required = large(loss=loss).target_bytes
    assert required is not None
    assert 36 < required.expected < 48, "50 draws, as published"
    assert required.most == pytest.approx(50 * 3 + 1, rel=0.01)
