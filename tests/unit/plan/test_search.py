"""The best layouts, against asking all of them, and what is said where none fits."""

import json
from itertools import pairwise

import pytest

from megadistill.errors import UserError
from megadistill.plan.counts.model_stats import measure
from megadistill.plan.estimate import Estimate, estimate
from megadistill.plan.forecast import forecast
from megadistill.plan.layouts import Cluster, layouts, placed, recipe_of
from megadistill.plan.output.plan_json import values
from megadistill.plan.plan_input import Subject
from megadistill.plan.scaling_law import supervised_loss
from megadistill.plan.search import DEAR, Plan, plan, what_would_help
from megadistill.plan.throughput import Assumed
from tests.unit.plan.tiny import cluster, subject


def _all(what: Subject, machines: Cluster) -> list[Estimate]:
    measured = measure(what.student, what.teacher, sequence_length=what.sequence_length)
    found = []
    for layout in layouts(what, machines):
        try:
            proposed = placed(recipe_of(layout, what.recipe, machines), what, machines)
        except UserError:
            continue
        found.append(estimate(proposed, what, measured, machines, Assumed()))
    return found


def test_nothing_that_fits_is_cheaper_than_the_best() -> None:
    """Two nodes and a tiny model: traffic shows, so larger micro-batches are better, and asked last."""
    what, machines = subject(), cluster(2, 4)
    everything = _all(what, machines)
    found = plan(what, machines, Assumed())
    assert len({round(each.gpu_hours * 1e12) for each in everything}) > 10
    assert found.best[0].layout.micro_batch > 1
    assert found.best[0].gpu_hours == pytest.approx(min(each.gpu_hours for each in everything), rel=0.01)
    assert all(each.fits for each in found.best)
    colocated = [each for each in found.best if each.placed.roles is None]
    apart = [each for each in found.best if each.placed.roles is not None]
    assert colocated
    assert apart, "both placements are shown"
    for before, after in pairwise(found.best[:-1]):
        assert before.gpu_hours <= after.gpu_hours * 1.01 < DEAR * 1.01 * found.best[0].gpu_hours


def test_a_smaller_device_leaves_fewer_layouts_and_the_same_order() -> None:
    what = subject()
    sizes = sorted(each.memory for each in _all(what, cluster(1, 4)))
    found = plan(what, cluster(1, 4, memory_gb=sizes[len(sizes) // 2] / 1e9), Assumed())
    assert found.best
    assert all(each.memory <= sizes[len(sizes) // 2] for each in found.best)


def test_the_recipes_own_layout_needs_no_settings() -> None:
    found = plan(subject(), cluster(1, 4), Assumed())
    assert found.own is not None
    assert found.settings(found.own) == []
    assert found.shown is found.own
    assert all(found.settings(each) for each in found.best if each.layout != found.own.layout)


def test_a_recipe_that_cannot_start_gets_proposals_and_the_reason() -> None:
    found = plan(subject(comm={"vocab_group": 3}), cluster(1, 4), Assumed())
    assert found.own is None
    assert "comm.vocab_group is 3" in str(found.refused)
    assert found.shown is found.best[0]


def _nothing_fits(**sections: dict[str, object]) -> Plan:
    what = subject(**sections)
    least = min(each.memory for each in _all(what, cluster(1, 4)))
    return plan(what, cluster(1, 4, memory_gb=0.999 * least / 1e9), Assumed())


def test_where_nothing_fits_the_nearest_is_named_and_what_was_tried() -> None:
    found = _nothing_fits()
    assert not found.best
    assert found.nearest is not None
    assert -found.nearest.margin == pytest.approx(0.001 * found.nearest.memory, rel=0.05)
    said = what_would_help(found)
    assert "\n" not in said
    assert f"the best of {found.asked}" in said
    assert "it fits on 2 nodes" in said
    assert "offload_optimizer" in said


def test_a_teacher_whose_stages_fit_no_gpu_is_named_in_bytes() -> None:
    """The recipe's own vocab group is refused on one GPU, which is not what stands against the run."""
    found = plan(subject(comm={"vocab_group": 2}), cluster(1, 1, memory_gb=1e-5), Assumed())
    assert (found.own, found.nearest) == (None, None)
    said = what_would_help(found)
    assert "no layout fits: in as many stages as 1 GPUs allow, the teacher's largest has" in said
    assert "vocab_group" not in said
    assert "\n" not in said
    assert "more nodes, or a smaller teacher" in said or "it fits on" in said


def test_a_teacher_beside_the_student_has_its_own_memory_and_pace() -> None:
    what = subject(teacher=None)
    alone = plan(what, cluster(1, 3), Assumed()).own
    beside = {"placement": "disaggregated", "ranks": 1, "stages": 1}
    apart = plan(subject(placement=beside), cluster(1, 4), Assumed()).own
    assert alone is not None
    assert apart is not None
    assert apart.placed.students == alone.placed.students == 3
    assert apart.times.clients == 3
    assert apart.times.micro_step >= alone.times.micro_step
    assert apart.gpu_hours == pytest.approx(apart.seconds / 3600 * 4)
    assert apart.tokens_per_second == pytest.approx(24 * 32 / apart.times.step)


def test_values_are_json_and_carry_the_plan() -> None:
    found = plan(subject(), cluster(1, 4), Assumed())
    assert found.own is not None
    law = forecast(found.own.needs, teacher_loss=None, teacher_tokens=1e9)
    said = json.loads(json.dumps(values(found, law=law, price=2.0), allow_nan=False))
    assert said["fits"] is True
    assert said["own"]["price"] == pytest.approx(2 * found.own.gpu_hours)
    assert said["own"]["margin_bytes"] == 80_000_000_000 - said["own"]["memory_bytes"]
    assert [each["gpu_hours"] for each in said["best"]] == [each.gpu_hours for each in found.best]
    assert said["best"][0]["set"] == found.settings(found.best[0])
    body = found.own.needs.models[1].parameters.body
    assert said["scaling_law"]["teacher_nats_per_token"] == supervised_loss(body, 1e9)
    assert said["tokens"] == 100 * 24 * 32


def test_how_good_the_teacher_is_is_said_once_and_sensibly() -> None:
    own = plan(subject(), cluster(1, 4), Assumed()).own
    assert own is not None
    assert forecast(own.needs, teacher_loss=None, teacher_tokens=None) is None
    with pytest.raises(UserError, match="give one"):
        forecast(own.needs, teacher_loss=2.0, teacher_tokens=1e9)
    with pytest.raises(UserError, match="--teacher-loss -1"):
        forecast(own.needs, teacher_loss=-1.0, teacher_tokens=None)
    labels = plan(subject(teacher=None), cluster(1, 4), Assumed()).own
    assert labels is not None
    assert forecast(labels.needs, teacher_loss=2.0, teacher_tokens=None) is None
