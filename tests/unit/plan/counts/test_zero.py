"""Parameters that DeepSpeed's coordinator gathers, counted by hand; tests/ranks/plan has DeepSpeed's own."""

import pytest

from megadistill.plan.counts.zero import GatheredParams, Zero, count_gathered

# an embedding, two layers of two matrices, a last norm that stays
MODULES = ((10,), (3, 2), (4, 1), (0,))
ALL = 20


def test_nothing_stays_and_nothing_fetched_ahead() -> None:
    zero = Zero(stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)
    gathered = count_gathered(MODULES, zero, recompute=False)
    assert (gathered.forward, gathered.backward) == (ALL, ALL)
    assert (gathered.peak_forward, gathered.at_loss, gathered.at_end) == (10, 0, 10)


def test_a_model_below_the_reuse_distance_stays_as_a_whole() -> None:
    gathered = count_gathered(MODULES, Zero(stage3_max_reuse_distance=1000), recompute=False)
    assert gathered == GatheredParams(
        forward=ALL, backward=0, peak_forward=ALL, at_loss=ALL, peak_backward=ALL, at_end=10
    )


@pytest.mark.parametrize(
    ("distance", "stayed"), [(0, 0), (1, 1), (2, 1), (3, 5), (10, 5), (11, 7), (14, 7), (15, 10), (20, 10), (21, 20)]
)
def test_the_last_modules_of_the_forward_pass_stay(distance: int, stayed: int) -> None:
    """The last one comes again after nothing, the one of 4 after twice 1, the one of 2 after twice 4 + 1."""
    gathered = count_gathered(
        MODULES, Zero(stage3_max_reuse_distance=distance, stage3_prefetch_bucket_size=0), recompute=False
    )
    assert (gathered.at_loss, gathered.backward) == (stayed, ALL - stayed)


def test_a_layer_that_is_computed_again_is_gathered_for_that_and_for_its_way_back() -> None:
    """All but its end, which is not recomputed: 3 twice, 4 twice, 2 and 1 once, and the embedding."""
    gathered = count_gathered(MODULES, Zero(stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0), recompute=True)
    assert (gathered.forward, gathered.backward) == (ALL, 2 * 3 + 2 + 2 * 4 + 1 + 10)


def test_what_is_fetched_ahead_lives_with_what_works() -> None:
    """One module ahead: the embedding's 10 with the 3 after it; the 1 and the 4 again,
    whose use it has seen ahead."""
    gathered = count_gathered(
        MODULES, Zero(stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=1), recompute=False
    )
    assert gathered.peak_forward == 13
    assert gathered.forward + gathered.backward < 2 * ALL


def test_no_more_than_may_live_is_fetched_ahead() -> None:
    gathered = count_gathered(
        MODULES,
        Zero(stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=100, stage3_max_live_parameters=10),
        recompute=False,
    )
    assert gathered.peak_forward <= 13


def test_nothing_stays_where_forward_passes_alone_come_first() -> None:
    zero = Zero(stage3_max_reuse_distance=1000, stage3_prefetch_bucket_size=0)
    gathered = count_gathered(MODULES, zero, recompute=False, forward_first=True)
    assert (gathered.forward, gathered.at_loss, gathered.backward) == (ALL, 0, ALL)


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
    gathered = Zero.of({"zero_optimization": zero, "communication_data_type": "fp32"})
    assert gathered == Zero(
        1, 2, 3, 4, 5, 6, zero_hpz_partition_size=8, offload_optimizer="nvme", reduce_element_bytes=4
    )
    assert Zero.of({}) == Zero()
