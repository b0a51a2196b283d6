"""The best layouts, against all of them, and the message where none fits."""

import json
from itertools import pairwise

import pytest

from megadistill.errors import UserError
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.layouts import Cluster, layouts, place, recipe_with_layout
from megadistill.plan.output.plan_json import to_json
from megadistill.plan.plan_input import PlanInput
from megadistill.plan.scaling_law import forecast, supervised_loss
from megadistill.plan.search import MAX_COST_RATIO, Plan, plan, remedies
from megadistill.plan.shards import TIGHT
from megadistill.plan.throughput import FLOAT8_SPEEDUP, MfuAssumption
from tests.unit.plan.tiny import TINY, cluster, plan_input


def _all(inputs: PlanInput, machines: Cluster) -> list[Estimate]:
    estimates = []
    for layout in layouts(inputs, machines):
        try:
            proposed = place(recipe_with_layout(layout, inputs.recipe, machines), inputs, machines)
        except UserError:
            continue
        estimates.append(estimate(proposed, machines, MfuAssumption()))
    return estimates


def test_nothing_that_fits_is_cheaper_than_the_best() -> None:
    """Two nodes and a tiny model: traffic shows, so larger micro-batches are better, and searched last."""
    inputs, machines = plan_input(), cluster(2, 4)
    everything = _all(inputs, machines)
    result = plan(inputs, machines, MfuAssumption())
    assert len({round(each.gpu_hours * 1e12) for each in everything}) > 10
    assert result.best[0].layout.micro_batch > 1
    assert result.best[0].gpu_hours == pytest.approx(min(each.gpu_hours for each in everything), rel=0.01)
    assert all(each.fits for each in result.best)
    colocated = [each for each in result.best if each.sharding.roles is None]
    apart = [each for each in result.best if each.sharding.roles is not None]
    assert colocated
    assert apart, "both placements are shown"
    for before, after in pairwise(result.best[:-1]):
        assert before.gpu_hours <= after.gpu_hours * 1.01 < MAX_COST_RATIO * 1.01 * result.best[0].gpu_hours


@pytest.mark.parametrize("memory", [1.0, 0.5, 0.25])
def test_no_pair_of_a_layout_and_a_shard_is_cheaper_than_the_best(memory: float) -> None:
    """Four slow nodes, where a replica within a node is the fastest if it fits. With less memory its layout differs."""
    whole = plan_input(teacher=None)
    everything = [
        each
        for shard in (None, 4, 8)
        for each in _all(plan_input(teacher=None, distributed={"shard": shard}), cluster(4, 4))
        if (shard or 0) == each.layout.shard
    ]
    assert {each.layout.shard for each in everything} == {0, 4, 8}
    sizes = sorted(each.memory for each in everything)
    device = sizes[round(memory * (len(sizes) - 1))] / 1e9 / (1 - TIGHT)
    comfortable = [each for each in everything if each.memory <= (1 - TIGHT) * device * 1e9]
    cheapest = min(comfortable, key=lambda each: each.gpu_hours)
    result = plan(whole, cluster(4, 4, memory_gb=device), MfuAssumption())
    assert result.best[0].gpu_hours <= 1.01 * cheapest.gpu_hours
    copies = [each.gpu_hours for each in comfortable if each.layout.shard == 0]
    if memory == 1.0:
        assert cheapest.gpu_hours < 0.9 * min(copies), "a search among copies alone misses it"
        assert result.best[0].layout.shard == cheapest.layout.shard
    settings = " ".join(result.settings(result.best[0]))
    assert (f"distributed.shard={result.best[0].layout.shard}" in settings) == (result.best[0].layout.shard > 0)


def test_a_smaller_device_leaves_fewer_layouts_and_the_same_order() -> None:
    inputs = plan_input()
    sizes = sorted(each.memory for each in _all(inputs, cluster(1, 4)))
    result = plan(inputs, cluster(1, 4, memory_gb=sizes[len(sizes) // 2] / 1e9), MfuAssumption())
    assert result.best
    assert all(each.memory <= sizes[len(sizes) // 2] for each in result.best)


def test_the_recipes_own_layout_needs_no_settings() -> None:
    result = plan(plan_input(), cluster(1, 4), MfuAssumption())
    assert result.own is not None
    assert result.settings(result.own) == []
    assert result.main is result.own
    assert all(result.settings(each) for each in result.best if each.layout != result.own.layout)


def test_less_recomputation_that_fits_is_named_and_more_where_only_that_fits() -> None:
    student = {"config": TINY, "vocab_multiple": 48}
    full = plan_input(student={**student, "activation_checkpointing": "full"})
    result = plan(full, cluster(1, 4), MfuAssumption())
    assert result.checkpointing is not None
    assert result.checkpointing.layout.activation_checkpointing == "none"
    plain = plan(plan_input(), cluster(1, 4), MfuAssumption())
    assert plain.own is not None
    assert plain.checkpointing is None
    tight = plan(plan_input(), cluster(1, 4, memory_gb=0.999 * plain.own.memory / 1e9), MfuAssumption())
    assert tight.checkpointing is not None
    assert tight.checkpointing.layout.activation_checkpointing == "selective"


def test_a_recipe_that_cannot_start_gets_proposals_and_the_reason() -> None:
    result = plan(plan_input(distributed={"vocab_group": 3}), cluster(1, 4), MfuAssumption())
    assert result.own is None
    assert "distributed.vocab_group is 3" in str(result.refused)
    assert result.main is result.best[0]


def _nothing_fits(**sections: dict[str, object]) -> Plan:
    inputs = plan_input(**sections)
    least = min(each.memory for each in _all(inputs, cluster(1, 4)))
    return plan(inputs, cluster(1, 4, memory_gb=0.999 * least / 1e9), MfuAssumption())


def test_where_nothing_fits_the_nearest_is_named_and_what_was_tried() -> None:
    result = _nothing_fits()
    assert not result.best
    assert result.nearest is not None
    assert -result.nearest.margin == pytest.approx(0.001 * result.nearest.memory, rel=0.05)
    message = remedies(result)
    assert "\n" not in message
    assert f"the best of {result.searched}" in message
    assert "it fits on 2 nodes" in message
    assert "student.deepspeed=zero3-offload" in message


def test_a_teacher_whose_stages_fit_no_gpu_is_named_in_bytes() -> None:
    """The recipe's own vocab group is refused on one GPU, which is not inputs stands against the run."""
    result = plan(plan_input(distributed={"vocab_group": 2}), cluster(1, 1, memory_gb=1e-5), MfuAssumption())
    assert result.own is None
    assert result.nearest is not None
    message = remedies(result)
    assert f"no layout fits: the best of {result.searched} needs" in message
    assert "teacher stage 0.0 GB" in message
    assert "vocab_group" not in message
    assert "\n" not in message
    assert "take more nodes" in message or "it fits on" in message


def test_a_teacher_beside_the_student_has_its_own_memory_and_pace() -> None:
    inputs = plan_input(teacher=None)
    alone = plan(inputs, cluster(1, 3), MfuAssumption()).own
    beside = {"placement": "disaggregated", "ranks": 1, "stages": 1}
    apart = plan(plan_input(placement=beside), cluster(1, 4), MfuAssumption()).own
    assert alone is not None
    assert apart is not None
    assert apart.sharding.ranks == alone.sharding.ranks == 3
    assert apart.times.clients == 3
    assert apart.times.micro_step >= alone.times.micro_step
    assert apart.gpu_hours == pytest.approx(apart.seconds / 3600 * 4)
    assert apart.tokens_per_second == pytest.approx(24 * 32 / apart.times.step)


def test_a_float8_teacher_is_faster_where_the_gpu_multiplies_float8() -> None:
    """In float32 the rounded numbers are multiplied as they are without such units."""

    def seconds(teacher: str, *, precision: str = "bfloat16", units: bool = True) -> float:
        machines = cluster(1, 4)
        peaks = machines.accelerator.peak_tflops | ({"float8": 0.02} if units else {})
        machines = Cluster(1, 4, machines.accelerator.model_copy(update={"peak_tflops": peaks}))
        inputs = plan_input(placement={"precision": teacher}, train={"precision": precision})
        return max(estimate(place(inputs.recipe, inputs, machines), machines, MfuAssumption()).times.stages)

    assert seconds("native") == pytest.approx(FLOAT8_SPEEDUP * seconds("float8"))
    assert seconds("float8", units=False) == seconds("native")
    assert seconds("float8", precision="float32") == seconds("native", precision="float32")


def test_values_are_json_and_carry_the_plan() -> None:
    result = plan(plan_input(), cluster(1, 4), MfuAssumption())
    assert result.own is not None
    law = forecast(result.own.requirements, teacher_loss=None, teacher_tokens=1e9)
    values = json.loads(json.dumps(to_json(result, law=law, price=2.0), allow_nan=False))
    assert values["fits"] is True
    assert values["own"]["price"] == pytest.approx(2 * result.own.gpu_hours)
    assert values["own"]["margin_bytes"] == 80_000_000_000 - values["own"]["memory_bytes"]
    assert [each["gpu_hours"] for each in values["best"]] == [each.gpu_hours for each in result.best]
    assert values["best"][0]["set"] == result.settings(result.best[0])
    body = result.own.requirements.models[1].parameters.body
    assert values["scaling_law"]["teacher_nats_per_token"] == supervised_loss(body, 1e9)
    assert values["tokens"] == 100 * 24 * 32


def test_the_teachers_quality_is_given_once_and_in_range() -> None:
    own = plan(plan_input(), cluster(1, 4), MfuAssumption()).own
    assert own is not None
    assert forecast(own.requirements, teacher_loss=None, teacher_tokens=None) is None
    with pytest.raises(UserError, match="give one"):
        forecast(own.requirements, teacher_loss=2.0, teacher_tokens=1e9)
    with pytest.raises(UserError, match="--teacher-loss -1"):
        forecast(own.requirements, teacher_loss=-1.0, teacher_tokens=None)
    labels = plan(plan_input(teacher=None), cluster(1, 4), MfuAssumption()).own
    assert labels is not None
    assert forecast(labels.requirements, teacher_loss=2.0, teacher_tokens=None) is None
