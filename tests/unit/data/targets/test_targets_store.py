"""Stored targets: what is read is what was stored, to the bit; and nothing that belongs to another run is read."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from megadistill.config.recipe import TargetsSection
from megadistill.data import ShardFault
from megadistill.data.shards.npy import MemberError
from megadistill.data.shards.shard import Shard
from megadistill.data.shards.tar import Index, write_index
from megadistill.data.targets import target_writer
from megadistill.data.targets.target_codec import TargetCodec
from megadistill.data.targets.target_manifest import (
    SlotMap,
    TargetKey,
    TargetManifest,
    TargetShard,
    key_differences,
    split_into_ranges,
)
from megadistill.data.targets.target_reader import TargetReader
from megadistill.data.targets.target_writer import TargetWriter, finish_targets
from megadistill.distributed.vocab import VocabSlice
from megadistill.errors import UserError
from megadistill.loss import Head
from megadistill.loss.sparse import sparse_targets, uniforms_per_token
from megadistill.train.objective import selection, uniforms
from megadistill.types import SparseTargets
from tests.unit.data.servers import serving

SEQUENCE, VOCAB, WIDTH = 16, 500, 12

SELECTIONS: dict[str, dict[str, Any]] = {
    "sampled": {"draws": 50},
    "sampled-once": {"draws": 1},
    "sampled-often": {"draws": 300},
    "sampled_distinct": {"select": "sampled_distinct", "k": 8},
    "top_k": {"select": "top_k", "k": 8},
    "top_k-renormalised": {"select": "top_k", "k": 8, "tail": "renormalised"},
    "top_k-all": {"select": "top_k", "k": 1000, "tail": "dropped"},
    "threshold": {"select": "threshold", "epsilon": 0.01},
    "threshold-of-nothing": {"select": "threshold", "epsilon": 0.99},
    "top_p": {"select": "top_p", "p": 0.9, "max_ids": 40, "tail": "renormalised"},
}


def _order(*stages: tuple[int | None, dict[str, int]], seed: int = 3) -> str:
    names = {name for _, quotas in stages for name in quotas}
    description = {
        "version": 2,
        "seed": seed,
        "sources": {name: name * 16 for name in names},
        "stages": [{"slots": slots, "quotas": quotas} for slots, quotas in stages],
    }
    return json.dumps(description, sort_keys=True)


def _key(**changes: Any) -> TargetKey:
    values = {
        "tokenizer": "1" * 64,
        "order": _order((None, {"data": 1})),
        "teacher": "2" * 64,
        "vocab_map": None,
        "targets": TargetsSection(),
        "temperature": 1.0,
        "seed": 5,
        "sequence_length": SEQUENCE,
        "vocab_size": VOCAB,
        "document_mask": False,
    }
    return TargetKey(**values | changes)


def _digests(slots: Tensor) -> Tensor:
    return slots * 977 - (1 << 40)


def _live(slots: Tensor, key: TargetKey) -> SparseTargets:
    """The targets of a live teacher for `slots`; each slot has hidden states of its own."""
    hidden = torch.cat(
        [torch.randn(SEQUENCE, WIDTH, generator=torch.Generator().manual_seed(slot)) for slot in slots.tolist()]
    )
    head = torch.randn(key.vocab_size, WIDTH, generator=torch.Generator().manual_seed(0))
    choice, tail = selection(key.targets)
    numbers = uniforms_per_token(choice)
    return sparse_targets(
        Head(hidden, head),
        selection=choice,
        tail=tail,
        vocab=VocabSlice(ranges=((0, key.vocab_size),), size=key.vocab_size, group=None),
        temperature=key.temperature,
        uniforms=uniforms(slots, sequence=SEQUENCE, per_token=numbers, seed=key.seed) if numbers > 0 else None,
    )


def _add(writer: TargetWriter, slots: list[int], key: TargetKey) -> None:
    tensor = torch.tensor(slots)
    writer.add(tensor, _digests(tensor), _live(tensor, key))


def _stored(folder: Path, slots: list[int], key: TargetKey, **options: int) -> TargetManifest:
    writer = TargetWriter(folder, key, **options)
    _add(writer, slots, key)
    writer.flush()
    return finish_targets(folder, key)


def _read(reader: TargetReader, slots: list[int]) -> SparseTargets:
    tensor = torch.tensor(slots)
    return reader.read(tensor, _digests(tensor))


def _require_equal(actual: SparseTargets, expected: SparseTargets) -> None:
    assert (actual.tail, actual.temperature) == (expected.tail, expected.temperature)
    for name in ("ids", "probs", "log_tail"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("vocab", [VOCAB, 70_000])
def test_what_is_read_is_what_the_live_run_has_to_the_bit(tmp_path: Path, name: str, vocab: int) -> None:
    key = _key(targets=TargetsSection(**SELECTIONS[name]), temperature=1.5, vocab_size=vocab)
    _stored(tmp_path / "set", [6, 2, 3, 9, 4], key)
    reader = TargetReader(tmp_path / "set", key)
    for slots in ([9, 2], [4], [3, 6, 9, 2, 4]):  # K is that of these slots, as it is in a live micro-batch
        _require_equal(_read(reader, slots), _live(torch.tensor(slots), key))


@pytest.mark.parametrize("vocab", [49_152, 128_256, 256_128])
def test_fifty_draws_of_twelve_ids_take_36_to_48_bytes_a_token(tmp_path: Path, vocab: int) -> None:
    sequence = 1024
    random = np.random.default_rng(1)
    ids = np.full((sequence, 50), -1)
    probs = np.zeros((sequence, 50), dtype=np.float32)
    ranks = np.arange(1, vocab + 1) ** -1.77  # a teacher of 2.0 nats
    for place, drawn in enumerate(random.choice(vocab, (sequence, 50), p=ranks / ranks.sum())):
        distinct, counts = np.unique(drawn * 7919 % vocab, return_counts=True)
        ids[place, : len(distinct)], probs[place, : len(distinct)] = distinct, counts / 50
    assert (ids >= 0).sum() / sequence == pytest.approx(12, abs=0.5)
    key = _key(sequence_length=sequence, vocab_size=vocab)
    writer = TargetWriter(tmp_path / "set", key)
    tail = torch.full((sequence,), -torch.inf)
    writer.add(
        torch.tensor([0]), torch.tensor([1]), SparseTargets(torch.tensor(ids), torch.tensor(probs), tail, key.tail)
    )
    writer.flush()
    manifest = finish_targets(tmp_path / "set", key)
    assert manifest.shards[0].file.bytes < 48 * sequence + 10_240  # a tar is filled up to 10 KiB
    assert 36 < manifest.bytes_per_token - 10_240 / sequence < 48


def test_a_plain_webdataset_reader_reads_them(tmp_path: Path) -> None:
    key = _key()
    manifest = _stored(tmp_path / "set", [8, 7], key)
    path = tmp_path / "set" / manifest.shards[0].file.name
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{slot:016d}" for slot in (7, 8)]
    expected = _live(torch.tensor([7]), key)
    num_ids, codes = samples[0]["num_ids.npy"], samples[0]["codes.npy"].astype(np.int64)
    numbers = (codes * 256 ** np.arange(codes.shape[1])).sum(axis=1)
    assert num_ids.tolist() == (expected.ids >= 0).sum(dim=1).tolist()
    assert (numbers // 50).tolist() == expected.ids[expected.ids >= 0].tolist()
    counts = (expected.probs[expected.ids >= 0] * 50).round().long()
    assert (numbers % 50 + 1).tolist() == counts.tolist()


DIFFERENCES: list[tuple[str, Any, str]] = [
    ("tokenizer", "9" * 64, "the tokenizer was 111111111111…, is 999999999999…"),
    ("order", _order((None, {"data": 1}), seed=4), "the seed was 3, is 4"),
    (
        "order",
        _order((4, {"data": 1}), (None, {"other": 1})),
        "curriculum entry 1 was data 1 parts, is data 1 parts for 4",
    ),
    ("teacher", "9" * 64, "the teacher was 222222222222…, is 999999999999…"),
    ("teacher_precision", "float8", "teacher.precision was native, is float8"),
    ("vocab_map", "9" * 64, "teacher.vocab_map was None, is 999999999999…"),
    ("targets", TargetsSection(draws=51), "loss.targets was select sampled, draws 50, is select sampled, draws 51"),
    ("targets", TargetsSection(select="top_k", k=5), "is select top_k, k 5, tail other"),
    ("temperature", 2.0, "loss.temperature was 1.0, is 2.0"),
    ("seed", 6, "the seed of the draws was 5, is 6"),
    ("sequence_length", 17, "the sequence length was 16, is 17"),
    ("vocab_size", 501, "the vocabulary size was 500, is 501"),
    ("document_mask", True, "data.document_mask was False, is True"),
    ("insert_bos", True, "data.insert_bos was False, is True"),
]


@pytest.mark.parametrize(("field", "value", "words"), DIFFERENCES)
def test_a_run_that_differs_is_refused_with_the_difference(tmp_path: Path, field: str, value: Any, words: str) -> None:
    _stored(tmp_path / "set", list(range(6)), _key())
    with pytest.raises(UserError) as refused:
        TargetReader(tmp_path / "set", _key(**{field: value}))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_field_of_a_key_is_compared() -> None:
    assert {field for field, _, _ in DIFFERENCES} == set(TargetKey.model_fields)


def test_a_run_may_differ_in_what_its_slots_do_not_need(tmp_path: Path) -> None:
    _stored(tmp_path / "set", list(range(6)), _key())
    later = _order((6, {"data": 1}), (None, {"other": 1}))
    TargetReader(tmp_path / "set", _key(order=later))
    TargetReader(tmp_path / "set", _key(teacher=None))
    TargetReader(tmp_path / "set", _key(teacher=None, teacher_precision="float8"))
    top_k = TargetsSection(select="top_k", k=5)
    _stored(tmp_path / "top", list(range(6)), _key(targets=top_k))
    TargetReader(tmp_path / "top", _key(targets=top_k, seed=6))


def test_the_ranks_shards_are_one_set_that_any_world_reads(tmp_path: Path) -> None:
    key, folder = _key(), tmp_path / "set"
    writers = [TargetWriter(folder, key, rank=rank) for rank in range(3)]
    for batch in range(4):
        for rank, writer in enumerate(writers):
            _add(writer, [batch * 6 + rank * 2, batch * 6 + rank * 2 + 1], key)
    for writer in writers:
        writer.flush()
    manifest = finish_targets(folder, key)
    assert [shard.slots for shard in manifest.shards] == [((2 * rank, 2, 6, 4),) for rank in range(3)]
    assert (manifest.slots, manifest.stop) == (24, 24)
    reader = TargetReader(folder, key)
    assert reader.first_missing(0, 30) == 24
    for start in range(0, 24, 8):
        slots = list(range(start, start + 8))
        _require_equal(_read(reader, slots), _live(torch.tensor(slots), key))


def _store_by_fours(folder: Path, key: TargetKey) -> None:
    writer = TargetWriter(folder, key)
    for slot in range(20):
        _add(writer, [slot], key)
        if slot % 4 == 3:
            writer.flush()


def test_a_killed_writer_resumes_after_its_last_whole_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, folder = _key(), tmp_path / "set"
    shards = itertools.count()

    def fatal(path: Path, rows: Index) -> Shard:
        """The tar of the third shard is there, and nothing beside it."""
        if next(shards) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_index(path, rows)

    monkeypatch.setattr(target_writer, "write_index", fatal)
    child = multiprocessing.get_context("fork").Process(target=_store_by_fours, args=(folder, key))
    child.start()
    child.join(60)
    monkeypatch.undo()
    assert child.exitcode == -signal.SIGKILL
    assert len(list(folder.glob("*.tar"))) == 3  # the last has no record
    writers = [TargetWriter(folder, key, rank=rank) for rank in range(2)]  # in a world of another size
    assert {writer.first_missing(0, 20) for writer in writers} == {8}
    _add(writers[0], [6, 7, 8, 9, 10, 11], key)  # from a checkpoint that is older than the shards
    _add(writers[1], [12, 13], key)
    for writer in writers:
        writer.flush()
    manifest = finish_targets(folder, key)
    assert manifest.slots == 14
    _require_equal(_read(TargetReader(folder, key), list(range(14))), _live(torch.arange(14), key))
    listed = {name for shard in manifest.shards for name in (shard.file.name, shard.file.index)}
    assert {path.name for path in folder.iterdir()} == {TargetManifest.FILE, *listed}


def test_a_shard_that_was_cut_off_since_is_written_again(tmp_path: Path) -> None:
    key, folder = _key(), tmp_path / "set"
    _store_by_fours(folder, key)
    tar = folder / "shard-00000-000001.tar"
    os.truncate(tar, tar.stat().st_size - 512)
    writer = TargetWriter(folder, key)
    assert writer.first_missing(0, 20) == 4
    _add(writer, list(range(20)), key)
    writer.flush()
    assert finish_targets(folder, key).slots == 20
    assert not tar.exists()
    _require_equal(_read(TargetReader(folder, key), list(range(20))), _live(torch.arange(20), key))


def test_distinct_ids_are_of_their_seed_and_the_most_likely_of_none() -> None:
    drawn, ranked = TargetsSection(select="sampled_distinct", k=5), TargetsSection(select="top_k", k=5)
    for targets, lines in ((drawn, ["the seed of the draws was 5, is 6"]), (ranked, [])):
        assert key_differences(_key(targets=targets), _key(targets=targets, seed=6), stop=1) == lines


def test_a_shard_is_written_when_it_is_full(tmp_path: Path) -> None:
    key = _key()
    manifest = _stored(tmp_path / "set", list(range(12)), key, shard_bytes=2500)
    assert len(manifest.shards) > 2
    _require_equal(_read(TargetReader(tmp_path / "set", key), list(range(12))), _live(torch.arange(12), key))


def test_a_folder_takes_only_the_targets_that_it_was_made_for(tmp_path: Path) -> None:
    writer = TargetWriter(tmp_path, _key())
    _add(writer, [0], _key())
    writer.flush()
    with pytest.raises(UserError, match="the seed of the draws was 5, is 6"):
        TargetWriter(tmp_path, _key(seed=6))
    with pytest.raises(UserError, match="the seed of the draws was 5, is 6"):
        finish_targets(tmp_path, _key(seed=6))
    finish_targets(tmp_path, _key())
    with pytest.raises(UserError, match="never changed"):
        TargetWriter(tmp_path, _key())
    with pytest.raises(UserError, match="no stored targets"):
        finish_targets(tmp_path / "elsewhere", _key())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """Token shards have nearly the same names."""
    tokens = tmp_path / "tokens" / "shard-00000.tar"
    tokens.parent.mkdir()
    tokens.write_bytes(b"tokens")
    for folder in (tokens.parent, tokens):
        with pytest.raises(UserError, match="holds something other than targets: give another folder"):
            TargetWriter(folder, _key())
    with pytest.raises(UserError, match="no stored targets"):
        finish_targets(tokens.parent, _key())
    writer = TargetWriter(tmp_path / "set", _key())
    _add(writer, [0], _key())
    writer.flush()
    (tmp_path / "set" / "shard-00000.tar").write_bytes(b"tokens")
    finish_targets(tmp_path / "set", _key())
    assert (tmp_path / "set" / "shard-00000.tar").exists()


def test_what_is_no_target_of_the_key_is_not_stored(tmp_path: Path) -> None:
    key = _key()
    writer = TargetWriter(tmp_path, key)
    slots = torch.tensor([0])
    targets = _live(slots, key)
    wrong = {
        "not counts": replace(targets, probs=targets.probs * 0.99),
        "not targets of this key": replace(targets, ids=targets.ids + VOCAB),
        "float32": replace(targets, probs=targets.probs.double()),
        "not those of the key": replace(targets, temperature=2.0),
    }
    for words, other in wrong.items():
        with pytest.raises(ValueError, match=words):
            writer.add(slots, _digests(slots), other)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_sample_is_named_and_its_neighbours_are_read(tmp_path: Path) -> None:
    key = _key()
    manifest = _stored(tmp_path / "set", [5, 6, 7], key)
    path = tmp_path / "set" / manifest.shards[0].file.name
    index = np.load(tmp_path / "set" / manifest.shards[0].file.index)
    start, length = index[1, 2:4].tolist()
    _flip(path, start + length - 600)
    reader = TargetReader(tmp_path / "set", key)
    with pytest.raises(ShardFault, match=rf"{path.name} slot 6 at byte {start}: expected crc32") as fault:
        _read(reader, [5, 6])
    assert "\n" not in str(fault.value)
    _require_equal(_read(reader, [5, 7]), _live(torch.tensor([5, 7]), key))


def test_targets_behind_a_url_are_the_same(tmp_path: Path) -> None:
    key = _key()
    _stored(tmp_path / "set", list(range(12)), key, shard_bytes=2500)
    with serving(tmp_path) as server:
        reader = TargetReader(f"{server.url}/set", key)
        _require_equal(_read(reader, [3, 11, 0]), _live(torch.tensor([3, 11, 0]), key))
        with pytest.raises(UserError, match="finished target set"):
            TargetReader(server.url, key)


def test_missing_slots_other_tokens_and_broken_files_are_faults(tmp_path: Path) -> None:
    key, folder = _key(), tmp_path / "set"
    manifest = _stored(folder, [5, 6, 8], key)
    tar, index = folder / manifest.shards[0].file.name, folder / manifest.shards[0].file.index
    reader = TargetReader(folder, key)
    for slot in (4, 7, 9):
        with pytest.raises(ShardFault, match=f"no targets of slot {slot}"):
            _read(reader, [5, slot])
    with pytest.raises(ShardFault, match=r"slot 6 at byte .* expected the targets of the tokens in that slot"):
        reader.read(torch.tensor([6]), torch.tensor([77]))
    _require_equal(reader.read(torch.tensor([6]), torch.tensor([0])), _live(torch.tensor([6]), key))

    whole = index.read_bytes()
    _flip(index, len(whole) - 3)
    with pytest.raises(ShardFault, match="expected the index"):
        _read(TargetReader(folder, key), [5])
    index.write_bytes(whole[:-8])
    with pytest.raises(ShardFault, match="bytes, found"):
        _read(TargetReader(folder, key), [5])
    index.write_bytes(whole)
    os.truncate(tar, tar.stat().st_size - 512)
    with pytest.raises(ShardFault, match=f"expected {manifest.shards[0].file.bytes} bytes"):
        _read(TargetReader(folder, key), [5])
    tar.unlink()
    with pytest.raises(ShardFault, match="No such file"):
        _read(TargetReader(folder, key), [5])


def _forged(folder: Path, manifest: TargetManifest, rows: Index) -> None:
    """The set after a change of an index and of its hash in the manifest."""
    shard = manifest.shards[0]
    np.save(folder / shard.file.index, rows)
    file = replace(shard.file, index_sha256=hashlib.sha256((folder / shard.file.index).read_bytes()).hexdigest())
    TargetManifest(version=2, key=manifest.key, shards=(TargetShard(file, shard.slots),)).write(folder)


@pytest.mark.parametrize(
    ("row", "column", "value", "words"),
    [
        (1, 0, 9, "slot 6 .* found slot 9"),
        (1, 2, 1 << 40, "expected places in"),
        (1, 3, 1 << 29, "expected places in"),
        (1, 3, -1, "expected places in"),
        (1, 6, 1 << 62, "expected places in"),
        (0, 7, 1 << 20, "expected places in"),
        (1, 6, 9000, "codes.npy member inside|num_ids.npy member inside"),
        (1, 2, 0, "sequences that touch each other"),
    ],
)
def test_an_index_that_points_elsewhere_is_a_fault(
    tmp_path: Path, row: int, column: int, value: int, words: str
) -> None:
    key = _key()
    manifest = _stored(tmp_path / "set", [5, 6, 7], key)
    rows = np.load(tmp_path / "set" / manifest.shards[0].file.index)
    _forged(tmp_path / "set", manifest, rows)
    _read(TargetReader(tmp_path / "set", key), [5, 6, 7])
    rows[row, column] = value
    _forged(tmp_path / "set", manifest, rows)
    with pytest.raises(ShardFault, match=words):
        _read(TargetReader(tmp_path / "set", key), [6])


def _bytes_of(member: NDArray[Any]) -> memoryview:
    stream = io.BytesIO()
    np.save(stream, member)
    return memoryview(stream.getvalue())


TOP_K = TargetsSection(select="top_k", k=8)


def _with_last(member: NDArray[Any], value: Any) -> NDArray[Any]:
    changed = member.copy()
    changed[-1] = value
    return changed


@pytest.mark.parametrize(
    ("targets", "name", "change", "words"),
    [
        (TargetsSection(), "codes", lambda codes: codes[1:], "codes.npy to be an .npy"),
        (TargetsSection(), "codes", lambda codes: _with_last(codes, [0, 0]), "50 draws of token 15"),
        (TargetsSection(), "codes", lambda codes: _with_last(codes, [255, 255]), "draws|ids below"),
        (TargetsSection(), "num_ids", lambda num_ids: num_ids[1:], "num_ids.npy to be an .npy"),
        (TargetsSection(), "num_ids", lambda num_ids: _with_last(num_ids, 51), "at most 50 ids a token, found 51"),
        (TargetsSection(), "num_ids", lambda num_ids: num_ids.astype(np.int64), "num_ids.npy to be an .npy"),
        (TOP_K, "ids", lambda ids: _with_last(ids, [244, 1]), "ids below 500, found 500"),
        (TOP_K, "probs", lambda probs: _with_last(probs, np.nan), "probabilities"),
        (TOP_K, "probs", lambda probs: _with_last(probs, 1.01), "probabilities"),
        (TOP_K, "log_tail", lambda log_tail: _with_last(log_tail, np.nan), "tail"),
        (TOP_K, "log_tail", lambda log_tail: _with_last(log_tail, 0.01), "tail"),
    ],
)
def test_a_sample_that_holds_something_else_is_refused(
    targets: TargetsSection, name: str, change: Callable[[NDArray[Any]], NDArray[Any]], words: str
) -> None:
    key = _key(targets=targets)
    live, codec = _live(torch.tensor([3]), key), TargetCodec(key)
    members = codec.encode(live.ids.numpy(), live.probs.numpy(), live.log_tail.numpy())
    codec.decode({suffix: _bytes_of(member) for suffix, member in members.items()})
    members[f"{name}.npy"] = change(members[f"{name}.npy"])
    with pytest.raises(MemberError, match=words):
        codec.decode({suffix: _bytes_of(member) for suffix, member in members.items()})


def test_a_manifest_that_was_changed_or_is_none_is_refused(tmp_path: Path) -> None:
    _stored(tmp_path / "set", [5], _key())
    path = tmp_path / "set" / TargetManifest.FILE
    text = path.read_text()
    path.write_text(text.replace('"seed": 5', '"seed": 6'))
    with pytest.raises(UserError, match="was changed after it was written"):
        TargetReader(tmp_path / "set", _key())
    path.write_text(text.replace('"version": 2', '"version": 1', 1))
    with pytest.raises(UserError, match="format version 1; this release reads version 2: store the targets again"):
        TargetReader(tmp_path / "set", _key())
    path.write_text(text.replace('"name": "shard', '"name": "../shard'))
    with pytest.raises(UserError, match="name"):
        TargetReader(tmp_path / "set", _key())
    path.unlink()
    with pytest.raises(UserError, match="finished target set"):
        TargetReader(tmp_path / "set", _key())


def _shard(number: int, slots: list[int]) -> TargetShard:
    file = Shard(name=f"s{number}.tar", sequences=len(slots), bytes=1, sha256="0" * 64, index_sha256="0" * 64)
    return TargetShard(file, split_into_ranges(slots))


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=80), st.integers(1, 7))
def test_a_slot_is_located_in_whichever_shard_has_it(owners: list[int], scale: int) -> None:
    """`owners` names which of four shards has each slot, -1 none; in groups of `scale`, as ranks have them."""
    dealt = [owner for owner in owners for _ in range(scale)]
    held = {number: [slot for slot, owner in enumerate(dealt) if owner == number] for number in range(4)}
    held = {number: slots for number, slots in held.items() if slots}
    if not held:
        return
    numbers = list(held)
    places = SlotMap([_shard(number, held[number]) for number in numbers])
    expected = [
        [numbers.index(owner), held[owner].index(slot)] if owner >= 0 else [-1, -1] for slot, owner in enumerate(dealt)
    ]
    assert places.locate(np.arange(len(dealt))).tolist() == expected
    missing = [slot for slot, owner in enumerate(dealt) if owner < 0]
    for start in range(len(dealt)):
        first = next((slot for slot in missing if slot >= start), len(dealt))
        assert places.first_missing(start, len(dealt)) == first
