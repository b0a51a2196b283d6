"""All faults of a data set are reported at once, and external tars become a split like any other."""

import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from webdataset import TarWriter, WebDataset

from megadistill.cli.main import run_command
from megadistill.data import Manifest, TokenStream
from megadistill.data.prepare import shard_checks
from megadistill.data.prepare.index_external import index
from megadistill.data.prepare.shard_checks import MAX_LINES
from megadistill.data.prepare.verify import VerifyReport, find_manifests, info, verify
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.shards.tar import SAMPLE_FORMAT, index_sequences, write_index, write_shard
from megadistill.errors import UserError
from megadistill.io import file_sha256
from tests.unit.data.servers import serving
from tests.unit.data.splits import Column, random_sequences

LENGTH = 65
IDS = 600


def _silent(stage: str, *, done: int, total: int, tokens: int | None = None) -> None:
    assert 0 <= done <= total


def _verify(location: Path | str, *, quick: bool = False) -> VerifyReport:
    return verify(location, quick=quick, progress=_silent)


@pytest.fixture
def broken(data_set: Path, tmp_path: Path) -> Path:
    """A copy, to be broken."""
    return Path(shutil.copytree(data_set, tmp_path / "set"))


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _text(table: Table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    written = console.file
    assert isinstance(written, io.StringIO)
    return written.getvalue()


@pytest.mark.parametrize("quick", [False, True])
def test_workers_report_what_one_process_does(broken: Path, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the shards, with a bar that climbs and ends at the total once."""
    train = Manifest.load(broken / "train" / "manifest.json")
    (broken / "train" / train.shards[0].index).unlink()
    _flip(broken / "train" / train.shards[2].name, 700)
    _flip(broken / "train" / train.shards[1].index, 200)
    monkeypatch.setattr(shard_checks, "MIN_INDICES", 1)
    monkeypatch.setattr(shard_checks, "MIN_BYTES", 1)
    monkeypatch.setattr(shard_checks, "INDICES_A_JOB", 2)
    shown: list[tuple[int, int]] = []

    def show(stage: str, *, done: int, total: int, tokens: int | None = None) -> None:
        shown.append((done, total))

    one = verify(broken / "train", quick=quick, progress=_silent, processes=1)
    two = verify(broken / "train", quick=quick, progress=show, processes=2)
    assert one.splits == two.splits
    assert [line.partition(":")[0] for line in two.lines()] == ["shard 0", "shard 1"] + (
        [] if quick else ["shard 2"] * 2
    )
    assert shown == sorted(shown)
    assert [done == total for done, total in shown].count(True) == 1


@pytest.mark.parametrize("quick", [False, True])
def test_a_whole_data_set_is_whole_wherever_one_points(data_set: Path, quick: bool) -> None:
    for location, splits in ((data_set, 2), (data_set / "train", 1), (data_set / "train" / "manifest.json", 1)):
        report = _verify(location, quick=quick)
        assert (report.ok, report.lines(), len(report.splits)) == (True, [], splits)
    assert str(data_set / "train" / "manifest.json") in _text(report.table())


def test_shards_without_a_manifest_are_named_with_the_way_out(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (broken / "heldout" / "manifest.json").unlink()
    count = len(list((broken / "heldout").glob("*.tar")))
    problem = f"{broken}/heldout has {count} shard{'s' * (count > 1)} and no manifest.json"
    way_out = f"megadistill shards index {broken}/heldout --tokenizer {broken}/tokenizer"
    report = _verify(broken, quick=True)
    assert not report.ok
    assert report.lines() == [f"{problem}: restore it, or make one: {way_out}"]
    assert run_command(["shards", "info", str(broken)]) == 0
    assert way_out in capsys.readouterr().out
    for location in (broken / "heldout", broken / "heldout" / "manifest.json"):
        with pytest.raises(UserError, match=r"no manifest\.json: restore it, or make one: megadistill shards"):
            find_manifests(location)
    (broken / ".incomplete").touch()
    with pytest.raises(UserError, match="was broken off there: start the same command again"):
        find_manifests(broken / "heldout")


def test_all_faults_are_reported_at_once(broken: Path) -> None:
    train, heldout = (Manifest.load(broken / split / "manifest.json") for split in ("train", "heldout"))
    first, second, third = (broken / "train" / shard.name for shard in train.shards[:3])
    rows = np.load(broken / "train" / train.shards[0].index)
    for sequence in (1, 3):
        _flip(first, int(rows[sequence, Column.START]) + 700)
    second.write_bytes(second.read_bytes()[:-1])
    (broken / "train" / train.shards[2].index).unlink()
    (broken / "heldout" / "stray.txt").touch()
    text = (broken / "heldout" / "manifest.json").read_text()
    (broken / "heldout" / "manifest.json").write_text(text.replace('"vocab_size": 600', '"vocab_size": 601'))
    report = _verify(broken)
    assert not report.ok
    damaged, edited = report.splits[1], report.splits[0]
    assert [line.partition(": expected")[0] for line in damaged.faults] == [
        f"shard 0: {first}",
        *(f"shard 0: {first} sequence {sequence} at byte {rows[sequence, Column.START]}" for sequence in (1, 3)),
        f"shard 1: {second}",
        f"shard 2: {third}.idx.npy",
    ]
    assert "expected sha256" in damaged.faults[0]
    assert damaged.fault_count == 5
    assert len(edited.faults) == 1
    assert "was changed after it was written" in edited.faults[0]
    assert heldout.sequences > 0
    assert report.lines() == [*edited.faults, *damaged.faults]
    quick = _verify(broken, quick=True)
    assert [line for line in report.lines() if "sha256" not in line and " sequence " not in line] == [
        line for line in quick.lines() if "was changed" not in line
    ]


def test_a_byte_behind_the_last_sequence_is_seen_by_the_full_check_alone(broken: Path) -> None:
    shard = broken / "train" / "shard-00000.tar"
    _flip(shard, shard.stat().st_size - 1)
    assert _verify(broken, quick=True).ok
    (line,) = _verify(broken).lines()
    assert line.startswith(f"shard 0: {shard}: expected sha256")


def test_a_wrong_number_of_tokens_is_a_fault(broken: Path) -> None:
    split = broken / "train"
    manifest = Manifest.load(split / "manifest.json")
    values = {name: getattr(manifest, name) for name in Manifest.model_fields} | {"tokens": manifest.tokens - 1}
    Manifest(**values).write(split)
    assert _verify(split, quick=True).ok
    (line,) = _verify(split).lines()
    assert line.endswith(f"expected {manifest.tokens - 1} tokens, as it records, found {manifest.tokens}")


def test_a_tokenizer_that_is_another_one_or_missing_is_a_fault(broken: Path) -> None:
    path = broken / "train" / Manifest.load(broken / "train" / "manifest.json").tokenizer.file
    _flip(path, path.stat().st_size - 1)
    for quick in (True, False):
        (line,) = _verify(broken / "train", quick=quick).lines()
        assert line.startswith("tokenizer: ")
    path.unlink()
    (line,) = _verify(broken / "train", quick=True).lines()
    assert line.endswith("found none")


def test_files_that_no_manifest_lists_are_mentioned_and_no_fault(broken: Path) -> None:
    (broken / "train" / "shard-99999.tar").touch()
    report = _verify(broken, quick=True)
    assert report.ok
    assert report.lines() == [f"{broken / 'train' / 'manifest.json'} does not list shard-99999.tar"]


def test_faults_beyond_a_bound_are_counted(broken: Path) -> None:
    split = broken / "train"
    manifest = Manifest.load(split / "manifest.json")
    count = MAX_LINES + 7
    tokens = np.full(manifest.sequence_length + 1, manifest.vocab_size, dtype=np.int32)
    sequences = [PackedSequence(tokens, np.array([0, len(tokens)], dtype=np.int32))] * count
    shard = write_shard(split / "shard-00000.tar", sequences, dtype="uint16")
    values = {name: getattr(manifest, name) for name in Manifest.model_fields} | {"shards": (shard,), "tokens": 1}
    Manifest(**values).write(split)
    report = _verify(split)
    assert report.splits[0].fault_count == count
    assert len(report.splits[0].faults) == MAX_LINES
    assert any(line.endswith(": 7 further faults") for line in report.lines())


def test_a_split_behind_a_url_is_verified(broken: Path) -> None:
    manifest = Manifest.load(broken / "train" / "manifest.json")
    with serving(broken) as server:
        assert _verify(f"{server.url}/train").ok
        assert _verify(f"{server.url}/train/manifest.json", quick=True).ok
        _flip(broken / "train" / manifest.shards[0].name, 700)
        lines = _verify(f"{server.url}/train").lines()
        with pytest.raises(UserError, match=r"/other holds no manifest\.json \(.*404 Not Found\)"):
            _verify(f"{server.url}/other")
    assert len(lines) == 2
    assert all(line.startswith(f"shard 0: {server.url}/train/shard-00000.tar") for line in lines)


def test_a_place_without_a_manifest_is_refused(tmp_path: Path) -> None:
    for location in (tmp_path, tmp_path / "manifest.json", tmp_path / "other"):
        with pytest.raises(UserError, match=r"holds no manifest\.json"):
            _verify(location)


def test_a_url_whose_package_is_missing_is_refused() -> None:
    with pytest.raises(UserError, match=r"pip install 'megadistill\[remote\]'"):
        _verify("dropbox://a/b")


def test_info_says_what_the_manifest_says(data_set: Path) -> None:
    heldout, train = (_text(table) for table in info(data_set))
    manifest = Manifest.load(data_set / "train" / "manifest.json")
    assert f"{manifest.tokens:,}" in train
    assert manifest.fingerprint in train
    assert manifest.fingerprint not in heldout
    assert len(find_manifests(data_set)) == 2


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


def _npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _tar(path: Path, samples: Sequence[dict[str, bytes]]) -> None:
    with open(path, "wb") as file, TarWriter(file) as tar:
        for number, sample in enumerate(samples):
            tar.write({"__key__": f"{path.stem}/{number}", **sample})


SEQUENCES = random_sequences(12, seed=3, sequence=LENGTH - 1, vocab=IDS)


def _folder(tmp_path: Path, member: Callable[[PackedSequence], dict[str, bytes]]) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(("b.tar", "a.tar")):
        _tar(folder / name, [member(sequence) for sequence in SEQUENCES[6 * number : 6 * number + 6]])
    return folder


def _index(folder: Path, data_set: Path, *, member: str | None = None, dtype: str | None = None) -> Manifest:
    return index(folder, tokenizer=data_set / "tokenizer", member=member, dtype=dtype, split="theirs", progress=_silent)


@pytest.mark.parametrize(
    ("member", "dtype", "sample"),
    [
        (
            None,
            None,
            lambda sequence: {"ids.npy": _npy(sequence.tokens.astype(np.int64)), "txt": b"text", "json": b"{}"},
        ),
        ("ids.npy", None, lambda sequence: {"ids.npy": _npy(sequence.tokens), "mask.npy": _npy(sequence.tokens > 3)}),
        (None, None, lambda sequence: {"npz": _npz(ids=sequence.tokens.astype(np.uint16))}),
        ("npz:ids", None, lambda sequence: {"npz": _npz(ids=sequence.tokens, mask=sequence.tokens > 3)}),
        ("u16", "uint16", lambda sequence: {"u16": sequence.tokens.astype("<u2").tobytes(), "a.npy": _npy([1.0])}),
        ("u32", "uint32", lambda sequence: {"u32": sequence.tokens.astype("<u4").tobytes()}),
        (None, None, lambda sequence: {"tokens.npy": _npy(sequence.tokens), "bounds.npy": _npy(sequence.bounds)}),
    ],
    ids=["npy", "one npy of two", "npz", "one array of two", "uint16", "uint32", "bounds"],
)
def test_tars_of_any_kind_become_a_split_that_a_stream_reads(
    data_set: Path,
    tmp_path: Path,
    member: str | None,
    dtype: str | None,
    sample: Callable[[PackedSequence], dict[str, bytes]],
) -> None:
    folder = _folder(tmp_path, sample)
    before = {path.name: file_sha256(path) for path in folder.iterdir()}
    manifest = _index(folder, data_set, member=member, dtype=dtype)
    assert {name: file_sha256(folder / name) for name in before} == before
    assert Manifest.load(folder / "manifest.json").fingerprint == manifest.fingerprint
    assert (manifest.split, manifest.sequence_length, manifest.vocab_size) == ("theirs", LENGTH - 1, IDS)
    assert [shard.name for shard in manifest.shards] == ["a.tar", "b.tar"]
    report = _verify(folder)
    assert (report.ok, report.lines()) == (True, [])
    stream = TokenStream(manifest, seed=0, batch_slots=1, rank=0, world_size=1)
    batch = stream.batch(range(12))
    rows = np.concatenate([batch.tokens.numpy(), batch.labels.numpy()[:, -1:]], axis=1)
    assert {tuple(row) for row in rows.tolist()} == {tuple(sequence.tokens.tolist()) for sequence in SEQUENCES}
    assert manifest.sample_format.has_documents == ("bounds.npy" in sample(SEQUENCES[0]))
    samples = WebDataset(str(folder / "a.tar"), shardshuffle=False)
    assert [len(members) for members in samples] == [3 + len(sample(SEQUENCES[0]))] * 6


def test_padding_behind_the_last_bound_is_not_counted(data_set: Path, tmp_path: Path) -> None:
    folder = _folder(tmp_path, lambda sequence: {"npy": _npy(sequence.tokens), "bounds.npy": _npy([0, 30, 50])})
    assert _index(folder, data_set).tokens == 12 * 49
    assert _verify(folder).ok


SHORT = random_sequences(1, seed=9, sequence=LENGTH - 2, vocab=IDS)[0]


@pytest.mark.parametrize(
    ("samples", "member", "dtype", "match"),
    [
        (
            [{"a.npy": b"", "b.npy": b""}],
            None,
            None,
            "has 'a.npy', 'b.npy': name the one that holds the tokens with --member",
        ),
        ([{"txt": b""}], None, None, "has 'txt': name the one that holds the tokens with --member"),
        ([{"npy": _npy(SHORT.tokens)}], "tokens.npy", None, "--member tokens.npy: .* has 'npy'"),
        ([{"u16": bytes(130)}], "u16", None, "give --dtype uint16 or uint32"),
        ([{"npy": _npy(SHORT.tokens)}], None, "uint16", "leave --dtype out"),
        ([{"u16": bytes(130)}], "u16", "float32", "raw bytes are uint16 or uint32"),
        ([{"u16": bytes(131)}], "u16", "uint16", "expected uint16 tokens, found 131 bytes"),
        ([{"npy": _npy([1.5, 2.5])}], None, None, "expected an .npy of one row of .*, found"),
        ([{"npy": _npy([1])}], None, None, "has 1 tokens: a sequence has 2 to"),
        ([{"npz": _npz(a=[1, 2], b=[1, 2])}], None, None, "expected one array in the .npz, found 'a.npy', 'b.npy'"),
        ([{"npy": _npy(SHORT.tokens)}, {"npy": _npy(SEQUENCES[0].tokens)}], None, None, "expected 64 tokens, found 65"),
        ([{"npy": _npy([1, IDS])}], None, None, f"expected ids from 0 to {IDS - 1}, found {IDS}"),
        ([{"npy": _npy([1, 2]), "bounds.npy": _npy([0, 3])}], None, None, "expected bounds that climb"),
        (
            [{"npy": _npy([1, 2]), "bounds.npy": _npy([0, 2])}, {"npy": _npy([1, 2])}],
            None,
            None,
            "no member bounds.npy",
        ),
        ([], None, None, "holds no samples"),
    ],
)
def test_tars_that_make_no_split_are_refused_and_left_as_they_were(
    data_set: Path, tmp_path: Path, samples: list[dict[str, bytes]], member: str | None, dtype: str | None, match: str
) -> None:
    _tar(tmp_path / "a.tar", samples)
    with pytest.raises(UserError, match=match) as refused:
        _index(tmp_path, data_set, member=member, dtype=dtype)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_two_lengths_are_refused_with_both_sequences(data_set: Path, tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", [{"npy": _npy(SEQUENCES[0].tokens)}] * 2)
    _tar(tmp_path / "b.tar", [{"npy": _npy(SEQUENCES[0].tokens)}, {"npy": _npy(SHORT.tokens)}])
    with pytest.raises(UserError) as refused:
        _index(tmp_path, data_set)
    for part in (
        f"{tmp_path / 'b.tar'} sequence 1 at byte",
        f"found {LENGTH - 1}",
        f"the first one of {tmp_path / 'a.tar'}, {LENGTH} ids",
    ):
        assert part in str(refused.value)


def test_names_and_folders_that_do_not_do_are_refused(data_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.tar files"):
        _index(tmp_path, data_set)
    _tar(tmp_path / "a b.tar", [{"npy": _npy([1, 2])}])
    with pytest.raises(UserError, match=r"'a b\.tar' is not a name"):
        _index(tmp_path, data_set)
    with pytest.raises(UserError, match="exists, and a manifest is never changed"):
        _index(data_set / "train", data_set)
    with pytest.raises(UserError, match="cannot be read"):
        _index(tmp_path / "none", data_set)


def test_own_tars_indexed_as_external_ones_have_the_same_index(data_set: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SEQUENCES, dtype="uint16")
    own = np.load(tmp_path / "a.tar.idx.npy")
    (tmp_path / "a.tar.idx.npy").unlink()
    manifest = _index(tmp_path, data_set)
    assert manifest.sample_format == SAMPLE_FORMAT
    np.testing.assert_array_equal(np.load(tmp_path / "a.tar.idx.npy"), own)
    np.testing.assert_array_equal(index_sequences(tmp_path / "a.tar", SAMPLE_FORMAT), own)
    assert write_index(tmp_path / "a.tar", own) == manifest.shards[0]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
@pytest.mark.parametrize("change", ["altered", "removed"])
def test_every_file_of_the_tokenizer_is_checked(name: str, change: str, broken: Path) -> None:
    """One that is tampered with beside an intact model would be shipped with every export."""
    path = broken / "tokenizer" / name
    if change == "altered":
        path.write_bytes(path.read_bytes() + b" ")
    else:
        path.unlink()
    for split in _verify(broken, quick=True).splits:
        (fault,) = split.faults
        assert f"tokenizer: {path}: expected sha256 " in fault
        assert fault.endswith("found none") == (change == "removed")


def test_a_split_with_a_table_is_verified_like_any_other(broken: Path) -> None:
    assert run_command(["shards", "convert", str(broken)]) == 0
    assert (broken / "train" / "shards.npy").is_file()
    report = _verify(broken)
    assert report.ok
    assert report.lines() == []
    assert "in shards.npy" in _text(info(broken / "train")[0])
    manifest = Manifest.load(broken / "train" / "manifest.json")
    manifest._recorded_fingerprint = "0" * 64
    path = broken / "train" / "manifest.json"
    path.write_text(path.read_text().replace(manifest.content_sha256(), "0" * 64))
    with pytest.raises(UserError, match="was changed after it was written"):
        Manifest.load(path)
    manifest.write(path.parent, table=True)  # as of a program that computes it otherwise
    report = _verify(broken / "train", quick=True)
    assert "expected content_sha256 000000000000…, as it records, found" in report.lines()[0]
    assert run_command(["shards", "convert", "https://example.org/train/manifest.json"]) == 2
