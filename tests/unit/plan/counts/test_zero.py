"""What DeepSpeed's coordinator gathers, against walks done by hand; tests/ranks/plan has DeepSpeed's own."""

import pytest

from megadistill.plan.counts.zero import Gathered, Zero, gathered

# an embedding, two layers of two matrices, a last norm that stays
MODULES = ((10,), (3, 2), (4, 1), (0,))
ALL = 20


def test_nothing_is_kept_and_nothing_fetched_ahead() -> None:
    zero = Zero(reuse_distance=0, prefetch=0)
    found = gathered(MODULES, zero, again=False)
    assert (found.forward, found.backward) == (ALL, ALL)
    assert (found.most_forward, found.at_the_loss, found.at_the_end) == (10, 0, 10)


def test_a_model_below_the_reuse_distance_stays_as_a_whole() -> None:
    found = gathered(MODULES, Zero(reuse_distance=1000), again=False)
    assert found == Gathered(
        forward=ALL, backward=0, most_forward=ALL, at_the_loss=ALL, most_backward=ALL, at_the_end=10
    )


@pytest.mark.parametrize(
    ("distance", "kept"), [(0, 0), (1, 1), (2, 1), (3, 5), (10, 5), (11, 7), (14, 7), (15, 10), (20, 10), (21, 20)]
)
def test_the_last_modules_of_the_forward_pass_stay(distance: int, kept: int) -> None:
    """The last one comes again after nothing, the one of 4 after twice 1, the one of 2 after twice 4 + 1."""
    found = gathered(MODULES, Zero(reuse_distance=distance, prefetch=0), again=False)
    assert (found.at_the_loss, found.backward) == (kept, ALL - kept)


def test_a_layer_that_is_computed_again_is_gathered_for_that_and_for_its_way_back() -> None:
    """But for what ends it, which is not computed again: 3 twice, 4 twice, 2 and 1 once, and the embedding."""
    found = gathered(MODULES, Zero(reuse_distance=0, prefetch=0), again=True)
    assert (found.forward, found.backward) == (ALL, 2 * 3 + 2 + 2 * 4 + 1 + 10)


def test_what_is_fetched_ahead_lives_with_what_works() -> None:
    """One module ahead: the embedding's 10 with the 3 after it; the 1 and the 4 again, whose use it has seen ahead."""
    found = gathered(MODULES, Zero(reuse_distance=0, prefetch=1), again=False)
    assert found.most_forward == 13
    assert found.forward + found.backward < 2 * ALL


def test_no_more_than_may_live_is_fetched_ahead() -> None:
    found = gathered(MODULES, Zero(reuse_distance=0, prefetch=100, max_live=10), again=False)
    assert found.most_forward <= 13


def test_deepspeeds_words() -> None:
    zero = {
        "stage3_max_reuse_distance": 1,
        "stage3_prefetch_bucket_size": 2,
        "stage3_max_live_parameters": 3,
        "stage3_param_persistence_threshold": 4,
        "reduce_bucket_size": 5,
        "sub_group_size": 6,
        "zero_hpz_partition_size": 8,
        "offload_optimizer": {"device": "nvme"},
        "offload_param": None,
    }
    found = Zero.of({"zero_optimization": zero, "communication_data_type": "fp32"})
    assert found == Zero(1, 2, 3, 4, 5, 6, node_copies=8, optimizer_on="nvme", gradients_on_wire=4)
    assert Zero.of({}) == Zero()
