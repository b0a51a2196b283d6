"""Bytes on the links, against numbers written out by hand. tests/ranks/plan/test_plan.py holds them against runs."""

from typing import Any

import pytest

from megadistill.config.recipe import TeacherSection
from megadistill.distributed.roles import Roles
from megadistill.plan.counts.disk_usage import signal_bytes
from megadistill.plan.counts.requirements import Requirements, count_requirements
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.traffic import ANSWERS, GATHERS, HEAD, REDUCES, REQUESTS, STAGES, VOCABULARY
from tests.unit.plan.cases import LLAMA3_8B_BODY, large, recipe, stats

S, D = 8192, 4096
NOTHING_STAYS = {"zero_optimization": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}}
GATHERED = LLAMA3_8B_BODY + 129_024 * 4096
"""All but the head, which is untied."""
NORMS = 65 * 4096


def test_what_a_teacher_says_of_a_token() -> None:
    """The planning arithmetic's own: 27B with 256k ids, and 405B with 128k."""
    assert signal_bytes(vocab_size=256_128, width=4608) == {"logits": 512_256, "hidden states": 9_216}
    assert signal_bytes(vocab_size=128_256, width=16_384) == {"logits": 256_512, "hidden states": 32_768}


def test_zero_gathers_twice_and_reduces_once() -> None:
    """6 N bytes a micro-step, of which a rank has its own 64th already; a layer is recomputed while it is gathered for
    its backward pass."""
    traffic = large(deepspeed_config=NOTHING_STAYS).traffic
    once, norms = 2 * (GATHERED - NORMS) / S, 2 * 2 * NORMS / (4 * S)  # norms are all-reduced after a step
    assert traffic[GATHERS].received == pytest.approx((2 * once + norms) * 63 / 64, rel=1e-9)
    assert traffic[REDUCES].received == pytest.approx(2 * GATHERED / S * 63 / 64, rel=1e-9)


def test_a_ring_leaves_the_node_at_one_of_its_ranks() -> None:
    link = large().traffic[REDUCES]
    assert link.network == pytest.approx(link.received / 8)
    assert large(ranks_per_node=64).traffic[REDUCES].network == 0
    assert large(ranks_per_node=1).traffic[REDUCES].node == 0


def test_the_head_goes_over_ranks_with_the_same_place_once_a_step() -> None:
    link = large().traffic[HEAD]
    window = 4 * S  # four micro-steps
    assert link.received == pytest.approx((2 + 4) * 129_024 // 8 * D / window * 7 / 8)
    assert link.node == 0, "the eighth rank on is on the next node"


def test_a_vocab_group_exchanges_hidden_states_and_small_numbers() -> None:
    link = large().traffic[VOCABULARY]
    token = (2 + 4) * D + 2 * D  # the student's and their gradient, and the teacher's
    small = 8 + 4 + 8 * 2 * 6 * 4  # label and weight, six statistics a model and slice
    assert link.received == pytest.approx(7 * (token + small))
    assert link.network == 0
    assert large(ranks_per_node=4).traffic[VOCABULARY].network == pytest.approx(link.received / 4)


def test_the_surest_tokens_take_the_teachers_hidden_states_once_more() -> None:
    more = large(loss={"label_fraction": 0.1}).traffic[VOCABULARY].received - large().traffic[VOCABULARY].received
    assert more == pytest.approx(7 * (2 * D + 8 * 6 * 4))


def test_packets_go_from_stage_to_stage_and_answers_to_all() -> None:
    packet = 2 * D + 8 / S
    traffic = large().traffic
    assert traffic[STAGES].node == pytest.approx(8 * packet)
    assert traffic[ANSWERS].node == pytest.approx(packet)
    over_nodes = large(ranks_per_node=4).traffic
    assert (over_nodes[STAGES].node, over_nodes[ANSWERS].node) == (0, 0)


def _apart(**teacher: Any) -> Requirements:
    section = {"path": "teacher", "placement": "disaggregated", "ranks": 2, **teacher}
    plain = recipe(distill=True, precision="bfloat16", global_batch=8, micro_batch=2, vocab_multiple=256)
    run = Sharding(
        plain.model_copy(update={"teacher": TeacherSection.model_validate(section)}),
        stats(teacher=True),
        vocab_size=250,
        ranks=2,
        ranks_per_node=2,
        group_size=2,
        roles=Roles(4, 2, 2),
    )
    return count_requirements(run)


def test_a_teacher_apart_sends_over_the_network() -> None:
    required = _apart()
    assert required.traffic[ANSWERS].network == 2 * 32 + 16 * 2 / 64
    assert required.traffic[ANSWERS].node == 0
    assert _apart(transfer_dtype="float8").traffic[ANSWERS].received == 32 + 4 + 16 * 2 / 64
    assert STAGES not in required.traffic
    assert required.teacher_traffic[REQUESTS].received == 8 * (1 + 2 + 64) / 64
    assert required.teacher_traffic[STAGES].received == 2 * 32 + 8 * (1 + 2 + 2) / 64


def test_copies_in_the_node_keep_the_second_gathering_there() -> None:
    copies = {"zero_optimization": {**NOTHING_STAYS["zero_optimization"], "zero_hpz_partition_size": 8}}
    plain, near = (
        large(deepspeed_config=deepspeed_config).traffic[GATHERS] for deepspeed_config in (NOTHING_STAYS, copies)
    )
    assert near.network == pytest.approx(plain.network / 8, rel=0.01), "once in four micro-steps, of two gatherings"


def test_float32_gradients_on_the_wire_are_twice_as_many_bytes() -> None:
    wide = large(deepspeed_config={"communication_data_type": "fp32"}).traffic[REDUCES].received
    assert wide == pytest.approx(2 * large().traffic[REDUCES].received)
