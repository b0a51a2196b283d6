"""Megatron's .bin and .idx of every kind: the ids that numpy and Megatron's own readers give, and clear refusals."""

import importlib.util
import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megadistill.data.prepare.token_formats.megatron_files import MEGATRON as FORMAT
from megadistill.data.prepare.token_formats.token_scan import ScanOptions, TokenScan
from megadistill.data.storage.local import LocalFolder
from megadistill.errors import UserError
from tests.unit.data.prepare.token_formats import megatron_written as written
from tests.unit.data.prepare.token_formats.megatron_written import (
    DEEPSPEED,
    MEGATRON,
    flat,
    random_documents,
    starts_of,
)

VOCAB = 120
DOCUMENTS = random_documents(40, vocab=VOCAB)


def scan(prefix: Path, **options: Any) -> TokenScan:
    return FORMAT.scan(LocalFolder(prefix.parent), f"{prefix.name}.bin", ScanOptions(vocab_size=VOCAB, **options))


def ids_of(prefix: Path, scanned: TokenScan) -> np.ndarray:
    data = prefix.with_name(prefix.name + ".bin").read_bytes()
    parts = [np.frombuffer(data, scanned.dtype, count, begin) for begin, count in scanned.segments_G2.tolist()]
    return np.concatenate(parts)


SENTENCES = [sentence for document in DOCUMENTS for sentence in document]
MODES = [0] * len(SENTENCES)
FORMS: dict[str, tuple[str, Callable[..., Path], dict[str, Any]]] = {
    **{f"Megatron's {dtype}": (dtype, written.write_new, {}) for dtype in MEGATRON if not dtype.startswith("float")},
    **{f"DeepSpeed's {dtype}": (dtype, written.write_new, {"codes": DEEPSPEED}) for dtype in DEEPSPEED},
    "text modes": ("int32", written.write_new, {"modes": MODES}),
    "the old index": ("int32", written.write_old, {"code": 4}),
    "the old index of uint16": ("uint16", written.write_old, {"code": 8}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_ids_and_documents_that_were_written(form: str, tmp_path: Path) -> None:
    dtype, write, options = FORMS[form]
    prefix = write(tmp_path / "web", DOCUMENTS, dtype, **options)
    scanned = scan(prefix)
    assert scanned.dtype == dtype
    np.testing.assert_array_equal(ids_of(prefix, scanned), flat(DOCUMENTS))
    assert len(scanned.segments_G2) == 1, "what touches is one segment"
    assert scanned.starts_D is not None
    assert scanned.starts_D.tolist() == starts_of(DOCUMENTS)
    assert scanned.decoder is None


def test_items_of_an_index_without_documents_are_documents(tmp_path: Path) -> None:
    prefix = written.write_old(tmp_path / "web", DOCUMENTS, "int32", code=4, with_documents=False)
    scanned = scan(prefix)
    np.testing.assert_array_equal(ids_of(prefix, scanned), flat(DOCUMENTS))
    assert scanned.starts_D is not None
    assert scanned.starts_D.tolist() == starts_of([[sentence] for sentence in SENTENCES])


def test_items_in_another_order_than_their_bytes_are_segments(tmp_path: Path) -> None:
    """An index may name the items of a .bin in any order."""
    sentences = [np.arange(5), np.arange(20, 27), np.arange(40, 43)]
    prefix = written.write_new(tmp_path / "web", [[one] for one in sentences], "uint16")
    index = bytearray((tmp_path / "web.idx").read_bytes())
    index[34 : 34 + 12] = np.array([3, 5, 7], "<i4").tobytes()
    index[46 : 46 + 24] = np.array([24, 0, 10], "<i8").tobytes()
    (tmp_path / "web.idx").write_bytes(index)
    scanned = scan(prefix)
    assert scanned.segments_G2.tolist() == [[24, 3], [0, 12]]
    np.testing.assert_array_equal(ids_of(prefix, scanned), np.concatenate([sentences[2], *sentences[:2]]))
    assert scanned.starts_D is not None
    assert scanned.starts_D.tolist() == [0, 3, 8]


def _deepspeed_module() -> ModuleType:
    """DeepSpeed's copy of Megatron-LM's readers of both kinds, without the rest of DeepSpeed."""
    package = importlib.util.find_spec("deepspeed")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "runtime" / "data_pipeline" / "data_sampling" / "indexed_dataset.py"
    spec = importlib.util.spec_from_file_location("deepspeed_indexed_dataset", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint16", "uint32"])
def test_deepspeeds_files_have_the_ids_that_its_reader_gives(dtype: str, tmp_path: Path) -> None:
    theirs = _deepspeed_module()
    builder = theirs.MMapIndexedDatasetBuilder(str(tmp_path / "web.bin"), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        for sentence in document:
            builder.add_item(torch.from_numpy(sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "web.idx"))
    scanned = scan(tmp_path / "web")
    ids = ids_of(tmp_path / "web", scanned)
    dataset = theirs.MMapIndexedDataset(str(tmp_path / "web"), skip_warmup=True)
    places = np.concatenate(([0], np.cumsum(dataset.sizes)))
    for item in np.random.default_rng(1).integers(0, len(dataset), 20).tolist():
        np.testing.assert_array_equal(ids[places[item] : places[item + 1]], dataset[item])
    assert scanned.dtype == dtype
    assert scanned.starts_D is not None
    assert scanned.starts_D.tolist() == starts_of(DOCUMENTS)


def test_old_files_have_the_ids_that_deepspeeds_old_reader_gives(tmp_path: Path) -> None:
    prefix = written.write_old(tmp_path / "web", DOCUMENTS, "int32", code=4)
    dataset = _deepspeed_module().IndexedDataset(str(prefix))
    ids = ids_of(prefix, scan(prefix))
    places = np.concatenate(([0], np.cumsum(dataset.sizes)))
    for item in range(len(SENTENCES)):
        np.testing.assert_array_equal(ids[places[item] : places[item + 1]], dataset[item])
    starts = scan(prefix).starts_D
    assert starts is not None
    assert starts.tolist() == [
        places[first] for first, end in itertools.pairwise(dataset.doc_idx) if places[end] > places[first]
    ]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
@pytest.mark.filterwarnings("ignore")
def test_megatrons_files_have_the_ids_that_its_reader_gives(dtype: str, tmp_path: Path) -> None:
    theirs = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset",
        reason="megatron-core is not installed: pip install -e '.[oracles]'",
        exc_type=ImportError,
    )
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "web.bin"), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        builder.add_document(np.concatenate(document), [len(sentence) for sentence in document])
    builder.finalize(str(tmp_path / "web.idx"))
    scanned = scan(tmp_path / "web")
    ids = ids_of(tmp_path / "web", scanned)
    dataset = theirs.IndexedDataset(str(tmp_path / "web"))
    places = np.concatenate(([0], np.cumsum(dataset.sequence_lengths)))
    random = np.random.default_rng(1)
    for item in random.integers(0, len(dataset), 20).tolist():
        offset = int(random.integers(0, dataset.sequence_lengths[item] + 1))
        np.testing.assert_array_equal(ids[places[item] + offset : places[item + 1]], dataset.get(item, offset))
    assert scanned.dtype == dtype
    assert scanned.starts_D is not None
    assert scanned.starts_D.tolist() == np.unique(places[dataset.document_indices[:-1]]).tolist()


def _changed(at: int, new: bytes) -> Callable[[bytes], bytes]:
    return lambda index: index[:at] + new + index[at + len(new) :]


ITEMS = len(SENTENCES)
BOUNDS_AT = 34 + 12 * ITEMS
IDS = len(flat(DOCUMENTS))
DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another file": (lambda index: b"PK\x03\x04" + index, "expected an index that begins with MMIDIDX or TNTIDX"),
    "a header that is cut off": (lambda index: index[:20], "expected a header of 34 bytes, found 20"),
    "cut off": (lambda index: index[:-1], "bounds of documents, found"),
    "longer": (lambda index: index + b"1234567", "bounds of documents, found"),
    "version 2": (_changed(9, struct.pack("<Q", 2)), "expected version 1, found 2"),
    "no dtype": (_changed(17, b"\x09"), "expected the number of a dtype from 1 to 8, found 9"),
    "another dtype": (_changed(17, b"\x08"), rf"expected {2 * IDS} or {8 * IDS} bytes in its \.bin"),
    "a count past the file": (_changed(18, b"\xff" * 8), "sequences and"),
    "a negative length": (_changed(34, struct.pack("<i", -5)), "sequence 0: expected a length, found -5"),
    "a sequence past the end": (_changed(34 + 4 * ITEMS, struct.pack("<q", 4 * IDS)), "expected sequences inside"),
    "a sequence before the beginning": (_changed(34 + 4 * ITEMS, struct.pack("<q", -4)), "expected sequences inside"),
    "documents that do not climb": (_changed(BOUNDS_AT + 8, struct.pack("<q", 1 << 40)), "bounds of documents that"),
    "documents whose differences overflow": (
        _changed(BOUNDS_AT + 8, struct.pack("<qq", (1 << 63) - 1, -2)),
        "bounds of documents that",
    ),
    "documents that end early": (lambda index: index[:-8] + struct.pack("<q", ITEMS - 1), "bounds of documents that"),
    "pictures": (lambda index: index + bytes(ITEMS - 1) + b"\x01", "expected sequences of text alone"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_index_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGED[damage]
    prefix = written.write_new(tmp_path / "web", DOCUMENTS, "int32")
    index = tmp_path / "web.idx"
    index.write_bytes(change(index.read_bytes()))
    with pytest.raises(UserError, match=message) as refused:
        scan(prefix)
    assert str(refused.value).startswith(str(index))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("old", [False, True])
def test_any_bytes_of_an_index_give_ids_inside_the_file_or_one_line(old: bool, tmp_path: Path) -> None:
    """Flipped, repeated and cut off at random: no exception but the refusal, and no range past the end of the .bin."""
    if old:
        prefix = written.write_old(tmp_path / "web", DOCUMENTS[:5], "int32", code=4)
    else:
        prefix = written.write_new(tmp_path / "web", DOCUMENTS[:5], "int32")
    path, random = tmp_path / "web.idx", np.random.default_rng(3)
    whole, size = path.read_bytes(), (tmp_path / "web.bin").stat().st_size
    refusals = 0
    for _ in range(200):
        data = bytearray(whole)
        for at in random.integers(0, len(data), int(random.integers(1, 4))).tolist():
            data[at] = int(random.integers(0, 256))
        path.write_bytes(data[: int(random.integers(1, len(data)))] if random.random() < 0.2 else data)
        try:
            scanned = scan(prefix)
        except UserError:
            refusals += 1
            continue
        begins, counts = scanned.segments_G2.T
        assert (begins >= 0).all()
        assert (counts > 0).all()
        assert (begins + counts * np.dtype(scanned.dtype).itemsize <= size).all()
    assert refusals > 100


@pytest.mark.parametrize("damage", ["cut off", "longer", "empty", "missing"])
def test_a_bin_of_another_size_than_its_index_says_is_refused(damage: str, tmp_path: Path) -> None:
    prefix = written.write_new(tmp_path / "web", DOCUMENTS, "int32")
    data = tmp_path / "web.bin"
    content = data.read_bytes()
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes({"cut off": content[:-4], "longer": content + bytes(4), "empty": b""}[damage])
    message = rf"expected {4 * IDS} bytes in its \.bin" if damage in ("cut off", "longer") else "web.bin cannot be read"
    with pytest.raises(UserError, match=message) as refused:
        scan(prefix)
    assert "\n" not in str(refused.value)


def test_floats_are_no_ids(tmp_path: Path) -> None:
    prefix = written.write_new(tmp_path / "web", DOCUMENTS, "float64")
    with pytest.raises(UserError, match="expected ids, which are integers, found float64"):
        scan(prefix)


def test_a_dtype_beside_an_index_is_refused(tmp_path: Path) -> None:
    prefix = written.write_new(tmp_path / "web", DOCUMENTS, "int32")
    with pytest.raises(UserError, match=r"--dtype uint16: .*web\.idx tells the type of its ids: leave it out"):
        scan(prefix, dtype="uint16")


def test_prefixes_with_and_without_a_suffix_and_folders_name_the_same_files(tmp_path: Path) -> None:
    for name in ("b_text_document", "a_text_document"):
        written.write_new(tmp_path / name, DOCUMENTS, "int32")
    prefix = tmp_path / "a_text_document"
    for given in (str(prefix), f"{prefix}.bin", f"{prefix}.idx"):
        assert FORMAT.files(given) == [f"{prefix}.bin"]
    assert FORMAT.files(str(tmp_path)) == [f"{prefix}.bin", str(tmp_path / "b_text_document.bin")]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"holds no \.bin files"):
        FORMAT.files(str(tmp_path / "none"))
