"""Parameters that DeepSpeed's coordinator gathers, counted by hand; tests/ranks/plan has DeepSpeed's own."""

import pytest

from megadistill.plan.counts.zero import GatheredParams, Zero, count_gathered

# an embedding, two layers of two matrices, a last norm that stays
LEAVES = ((10,), (3, 2), (4, 1), (0,))
ALL = 20


def test_nothing_stays_and_nothing_fetched_ahead() -> None:
    gathered = count_gathered(LEAVES, Zero(stage3_max_reuse_distance=0), prefetch=0)
    assert (gathered.forward, gathered.backward) == (ALL, ALL)
    assert (gathered.peak_forward, gathered.at_loss, gathered.at_end) == (10, 0, 10)


def test_a_model_below_the_reuse_distance_stays_as_a_whole() -> None:
    gathered = count_gathered(LEAVES, Zero(stage3_max_reuse_distance=1000), prefetch=0)
    assert gathered == GatheredParams(
        forward=ALL, backward=0, peak_forward=ALL, at_loss=ALL, again_at_loss=0, peak_backward=ALL, at_end=10
    )


@pytest.mark.parametrize(("distance", "stayed"), [(0, 0), (1, 5), (5, 5), (6, 10), (10, 10), (11, 20)])
def test_the_last_leaves_of_the_forward_pass_stay(distance: int, stayed: int) -> None:
    """Those with fewer parameters than the distance between them and the end of the forward pass: 0, 5 and 10."""
    gathered = count_gathered(LEAVES, Zero(stage3_max_reuse_distance=distance), prefetch=0)
    assert (gathered.at_loss, gathered.backward) == (stayed, ALL - stayed)


def test_what_is_fetched_ahead_lives_with_what_works() -> None:
    """A parameter ahead: the embedding's 10 with the 3 after it; and what is passed over for a later use stays."""
    gathered = count_gathered(LEAVES, Zero(stage3_max_reuse_distance=0), prefetch=1)
    assert gathered.peak_forward == 13
    assert gathered.forward + gathered.backward < 2 * ALL


def test_no_more_than_may_live_is_fetched_ahead() -> None:
    zero = Zero(stage3_max_reuse_distance=0, stage3_max_live_parameters=10)
    assert count_gathered(LEAVES, zero, prefetch=100).peak_forward <= 13


def test_nothing_stays_where_forward_passes_alone_come_first() -> None:
    zero = Zero(stage3_max_reuse_distance=1000)
    gathered = count_gathered(LEAVES, zero, prefetch=0, forward_first=True)
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
