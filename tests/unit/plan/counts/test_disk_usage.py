"""Bytes on disk, against the files themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.config.recipe import Recipe, TargetsSection
from megadistill.data.targets.target_manifest import TargetKey
from megadistill.data.targets.target_writer import TargetWriter, finish_targets
from megadistill.plan.counts.disk_usage import (
    bytes_with,
    checkpoint_bytes,
    final_checkpoints,
    local_bytes,
    target_bytes,
)
from megadistill.plan.counts.sharding import Sharding
from megadistill.train.checkpoint.local_tier import KEEP
from megadistill.types import SparseTargets, Tail
from tests.unit.data.targets.test_targets_store import _order
from tests.unit.plan.cases import recipe as plan_recipe
from tests.unit.plan.cases import stats
from tests.unit.train.cases import recipe

S, SLOTS = 2048, 4
SELECTIONS = {
    "draws": {"select": "sampled", "draws": 50},
    "distinct": {"select": "sampled_distinct", "k": 40},
    "top_k": {"select": "top_k", "k": 64},
    "renormalised": {"select": "top_k", "k": 64, "tail": "renormalised"},
    "threshold": {"select": "threshold", "epsilon": 0.01},
    "top_p": {"select": "top_p", "p": 0.95, "max_ids": 300},
}


def _key(targets: TargetsSection, vocab: int) -> TargetKey:
    return TargetKey(
        tokenizer="0" * 64,
        order=_order((None, {"only": 1})),
        teacher="1" * 64,
        vocab_map=None,
        targets=targets,
        temperature=1.0,
        seed=1,
        sequence_length=S,
        vocab_size=vocab,
        document_mask=False,
    )


def _targets(key: TargetKey, number: int) -> SparseTargets:
    """The same `number` ids for each token."""
    ids = torch.randperm(key.vocab_size)[:number].sort().values.repeat(SLOTS * S, 1)
    draws = key.targets.draws
    counts = torch.ones(number)
    counts[0] = (draws or number) - number + 1
    probs = (counts.double() / (draws or number)).float().repeat(SLOTS * S, 1)
    log_tail = torch.full((SLOTS * S,), -torch.inf if key.tail is Tail.RENORMALISED else -1.0)
    return SparseTargets(ids=ids, probs=probs, log_tail=log_tail, tail=key.tail, temperature=1.0)


@pytest.mark.parametrize("vocab", [32_000, 256_128])
@pytest.mark.parametrize("name", SELECTIONS)
def test_stored_targets(name: str, vocab: int, tmp_path: Path) -> None:
    targets = TargetsSection.model_validate(SELECTIONS[name])
    key, ids = _key(targets, vocab), 12
    writer = TargetWriter(tmp_path, key)
    slots = torch.arange(SLOTS)
    writer.add(slots, slots, _targets(key, ids))
    writer.flush()
    stored = finish_targets(tmp_path, key).bytes_per_token
    ends = 10_240 / (SLOTS * S)  # a tar is filled up to a multiple of this, however much is in it
    expected = bytes_with(targets, ids, vocab_size=vocab, sequence_length=S)
    assert expected - 0.01 <= stored <= expected + ends


def test_the_most_bytes_of_a_token() -> None:
    def most(section: dict[str, Any]) -> float:
        targets = TargetsSection.model_validate(section)
        return target_bytes(targets, vocab_size=256_128, sequence_length=1 << 20).most

    assert most(SELECTIONS["draws"]) == pytest.approx(50 * 3 + 1, rel=0.001)
    assert most(SELECTIONS["top_k"]) == pytest.approx(64 * (3 + 4) + 1 + 4, rel=0.001)
    assert most(SELECTIONS["renormalised"]) == pytest.approx(64 * 7 + 1, rel=0.001)
    assert most(SELECTIONS["threshold"]) == pytest.approx(101 * 7 + 1 + 4, rel=0.001)
    assert most(SELECTIONS["top_p"]) == pytest.approx(300 * 7 + 2 + 4, rel=0.001)


def test_fifty_draws_are_expected_to_find_twelve_ids() -> None:
    """36 to 48 bytes a token: 36 to 48 TB for 1T tokens, where all logits are 512 PB."""
    expected = target_bytes(TargetsSection(), vocab_size=256_128, sequence_length=8192).expected
    assert expected == pytest.approx(12 * 3 + 1, rel=0.01)
    one = target_bytes(TargetsSection(draws=1), vocab_size=256_128, sequence_length=1 << 20)
    assert one.expected == pytest.approx(one.most)


@pytest.mark.parametrize("decay_steps", [None, 1, 12, 65])
@pytest.mark.parametrize("keep_last", [1, 3, 50])
@pytest.mark.parametrize("keep_every", [0, 4, 6, None])
@pytest.mark.parametrize(
    ("first_step", "steps", "every"),
    [(0, 1, 4), (0, 8, 4), (0, 90, 1), (0, 97, 2), (0, 100, 7), (24, 90, 1), (25, 97, 2), (99, 100, 7)],
)
def test_the_checkpoints_of_a_complete_run_are_counted_as_the_saver_keeps_them(
    first_step: int, steps: int, every: int, keep_every: int | None, keep_last: int, decay_steps: int | None
) -> None:
    section = {"keep_last": keep_last, "keep_every": keep_every}
    decays = decay_steps is not None and decay_steps <= steps
    schedule = {"kind": "wsd", "warmup_steps": 0, "decay_steps": decay_steps} if decays else {}
    train = {"steps": steps, "checkpoint_every": every, "schedule": schedule}
    run = recipe(Path("m.json"), Path("run"), train=train, checkpoint=section)
    milestone, stable = run.checkpoint.keep_every, steps - decay_steps if decays and decay_steps else 0
    saved = sorted(step for step in {*range(every, steps + 1, every), steps, stable} if step > first_step)
    others = (step for step in saved if step == stable or (milestone and step % milestone == 0))
    final = {*saved[-keep_last:], *others}
    assert final_checkpoints(run, first_step=first_step) == len(final)


@pytest.mark.parametrize(("ranks", "files"), [(4, 4), (8, 8), (16, 8 * 2), (24, 8 * 2)])
def test_local_saves_of_a_node_are_its_own_and_those_of_the_node_before(ranks: int, files: int) -> None:
    plain = plan_recipe(distill=False, precision="float32", global_batch=48, micro_batch=1, vocab_multiple=768)
    values = {**plain.snapshot(), "checkpoint": {"local": {"every": 10, "folder": "/dev/shm/saves"}}}
    for made, saves in ((Recipe.model_validate(values), KEEP + 1), (plain, 0)):
        run = Sharding(made, stats(), vocab_size=250, ranks=ranks, ranks_per_node=8, group_size=1)
        assert local_bytes(run) == saves * files * -(-checkpoint_bytes(run) // ranks)
