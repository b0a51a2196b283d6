"""Layouts of a recipe: each choice, and that each proposal is a recipe that starts."""

from pathlib import Path

import pytest
import yaml

from megadistill.config.load import load_recipe
from megadistill.distributed.launch import Launch, vocab_group_size
from megadistill.distributed.roles import Roles
from megadistill.errors import UserError
from megadistill.plan.layouts import Layout, divisors, layouts, overrides, place, recipe_with_layout
from tests.unit.plan.tiny import TINY, cluster, plan_input


def test_divisors() -> None:
    assert divisors(1) == [1]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(49) == [1, 7, 49]


def test_every_layout_that_is_not_refused_starts_as_its_overrides_say() -> None:
    """Checked again by the run's own arithmetic, from the text of the overrides."""
    inputs, where = plan_input(), cluster(2, 4)
    started = 0
    for layout in layouts(inputs, where):
        try:
            proposed = place(recipe_with_layout(layout, inputs.recipe, where), inputs, where)
        except UserError:
            continue
        started += 1
        recipe = proposed.recipe
        assert recipe.teacher is not None
        if layout.teacher_ranks:
            assert recipe.teacher.ranks == layout.teacher_ranks
            roles = Roles(8, layout.teacher_ranks, layout.stages)
            assert roles.students % 4 == 0, "nodes have one role each"
            students = roles.students
        else:
            assert recipe.teacher.placement == "colocated"
            students = 8
        assert vocab_group_size(recipe.distributed.vocab_group, Launch(0, students, 0, 4)) == layout.vocab_group
        assert recipe.accumulation(students) * students * layout.micro_batch == 24
    assert started > 20


def test_layouts_keep_a_vocab_group_on_whole_nodes_or_within_one() -> None:
    groups = {layout.vocab_group for layout in layouts(plan_input(train={"global_batch": 96}), cluster(8, 4))}
    assert groups == {1, 2, 4, 8, 16}, "divisors of a node, and of whole nodes up to four"


def test_the_gpus_are_split_by_whole_nodes_where_there_are_several() -> None:
    splits = {layout.teacher_ranks for layout in layouts(plan_input(train={"global_batch": 96}), cluster(4, 4))}
    assert splits == {0, 4, 8, 12}
    assert {layout.teacher_ranks for layout in layouts(plan_input(), cluster(1, 4))} == {0, 1, 2, 3}


def test_no_teacher_no_split() -> None:
    assert {layout.teacher_ranks for layout in layouts(plan_input(teacher=None), cluster(1, 4))} == {0}


def test_overrides_give_the_proposal() -> None:
    inputs, where = plan_input(), cluster(1, 4)
    layout = Layout(vocab_group=2, micro_batch=3, activation_checkpointing="full", teacher_ranks=2, stages=2)
    proposed = recipe_with_layout(layout, inputs.recipe, where)
    assert overrides(proposed, inputs.recipe) == [
        "student.activation_checkpointing=full",
        "train.micro_batch=3",
        "distributed.vocab_group=2",
        "teacher.placement=disaggregated",
        "teacher.ranks=2",
        "teacher.stages=2",
    ]
    assert overrides(inputs.recipe, proposed)[-2:] == ["teacher.ranks=null", "teacher.stages=null"]


def test_overrides_are_read_back_by_the_recipe_loader(tmp_path: Path) -> None:
    inputs, where = plan_input(), cluster(1, 4)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(inputs.recipe.snapshot()))
    layout = Layout(vocab_group=1, micro_batch=2, activation_checkpointing="full", teacher_ranks=2, stages=1)
    proposed = recipe_with_layout(layout, inputs.recipe, where)
    assert load_recipe(path, overrides(proposed, inputs.recipe)) == proposed


def test_enough_is_prefetched_for_all_stages_to_work() -> None:
    inputs, where = plan_input(), cluster(1, 4)
    layout = Layout(vocab_group=1, micro_batch=1, activation_checkpointing="none", teacher_ranks=3, stages=3)
    recipe = recipe_with_layout(layout, inputs.recipe, where)
    assert recipe.teacher is not None
    assert recipe.teacher.queue == 4, "the recipe's own is enough"
    deep = plan_input(teacher={**TINY, "num_hidden_layers": 8}, train={"global_batch": 8})
    layout = Layout(vocab_group=1, micro_batch=1, activation_checkpointing="none", teacher_ranks=7, stages=7)
    recipe = recipe_with_layout(layout, deep.recipe, cluster(1, 8))
    assert recipe.teacher is not None
    assert recipe.teacher.queue == 8, "seven stages and one client: seven on their way, and one in use"


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"distributed": {"vocab_group": 3}}, r"distributed\.vocab_group is 3"),
        ({"placement": {"placement": "disaggregated", "ranks": 4}}, "the launch has 4 processes"),
    ],
)
def test_what_a_run_refuses_is_refused_here(sections: dict[str, dict[str, object]], says: str) -> None:
    inputs = plan_input(**sections)
    with pytest.raises(UserError, match=says):
        place(inputs.recipe, inputs, cluster(1, 4))


def test_more_stages_than_layers_are_refused() -> None:
    inputs = plan_input(teacher={**TINY, "num_hidden_layers": 2})
    with pytest.raises(UserError, match="4 stages, and has 2 layers"):
        place(inputs.recipe, inputs, cluster(1, 4))


def test_an_empty_cluster_is_refused() -> None:
    with pytest.raises(UserError, match="--nodes 0"):
        cluster(0, 8)
    with pytest.raises(UserError, match="--gpus-per-node -1"):
        cluster(1, -1)
