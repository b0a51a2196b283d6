"""Flat files of ids: OLMo-core's without a header, true .npy, raw ones; what they cannot be is refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadistill.data.prepare.token_formats.flat_files import OLMO, RAW
from megadistill.data.prepare.token_formats.token_scan import ScanOptions, TokenFormat, TokenScan
from megadistill.data.storage.local import LocalFolder
from megadistill.errors import UserError

IDS = np.random.default_rng(0).integers(0, 50_000, 300)


def scan(path: Path, *, format: TokenFormat = OLMO, vocab_size: int = 50_000, dtype: str | None = None) -> TokenScan:
    return format.scan(LocalFolder(path.parent), path.name, ScanOptions(vocab_size=vocab_size, dtype=dtype))


def _written(path: Path, dtype: str) -> Path:
    path.write_bytes(IDS.astype(dtype).tobytes())
    return path


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "expected"),
    [
        (50_000, None, "uint16"),
        (100_278, None, "uint32"),
        (65_536, None, "uint16"),
        *((50_000, dtype, dtype) for dtype in ("uint32", "int32", "int64")),
    ],
)
def test_ids_without_a_header_have_the_narrowest_type_of_the_tokenizer(
    vocab_size: int, dtype: str | None, expected: str, tmp_path: Path
) -> None:
    scanned = scan(_written(tmp_path / "a.npy", expected), vocab_size=vocab_size, dtype=dtype)
    assert (scanned.dtype, scanned.segments_G2.tolist(), scanned.starts_D) == (expected, [[0, 300]], None)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("format", [OLMO, RAW], ids=["olmo", "raw"])
def test_a_header_tells_the_type_and_the_place(format: TokenFormat, dtype: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IDS.astype(dtype))
    given = None if format is OLMO else "uint16"
    if given:
        with pytest.raises(UserError, match=r"--dtype uint16: .*a\.npy has a header"):
            scan(tmp_path / "a.npy", format=format, dtype=given)
        return
    scanned = scan(tmp_path / "a.npy", format=format)
    ((begin, count),) = scanned.segments_G2.tolist()
    assert (scanned.dtype, count) == (dtype, 300)
    np.testing.assert_array_equal(np.frombuffer((tmp_path / "a.npy").read_bytes(), dtype, count, begin), IDS)


def _npy(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(values), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (bytes(301), {}, "has 301 bytes, no whole number of uint16: it was cut off"),
        (bytes(302), {"vocab_size": 70_000}, "has 302 bytes, no whole number of uint32"),
        (IDS.astype("<u4").tobytes(), {}, "every second uint16 is the upper half of an id: give --dtype uint32"),
        (IDS.astype("<i8").tobytes(), {"dtype": "int32"}, "every second int32 is the upper half of an id: .* int64"),
        (_npy(IDS.astype("<u2"))[:-1], {}, "expected 728 bytes, as its header says, found 727"),
        (_npy(IDS.astype("<u2").reshape(3, 100)), {}, "expected an .npy of one row"),
        (_npy(IDS.astype("<f4")), {}, "expected an .npy of one row"),
        (_npy(IDS.astype(">u2")), {}, "expected an .npy of one row"),
        (_npy(np.array([{"a": 1}])), {}, "expected an .npy of one row"),
        (b"\x93NUMPY\x01\x00\xff\xff", {}, "expected an .npy of integers"),
        (b"", {}, "cannot be read"),
        (IDS.astype("<u2").tobytes(), {"format": RAW}, "--format raw: .* give --dtype, such as uint16 or uint32"),
    ],
)
def test_what_is_no_flat_file_is_refused_in_one_line(
    content: bytes, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        scan(tmp_path / "a.npy", **options)
    assert "\n" not in str(refused.value)


def test_a_folder_of_olmo_is_its_npy_files_without_those_of_an_index(tmp_path: Path) -> None:
    for name in ("part-1.npy", "part-0.npy", "part-0.npy.idx.npy", "notes.txt"):
        (tmp_path / name).write_bytes(bytes(8))
    assert OLMO.files(str(tmp_path)) == [str(tmp_path / "part-0.npy"), str(tmp_path / "part-1.npy")]
    assert OLMO.files("corpora/a.npy") == ["corpora/a.npy"]
    with pytest.raises(UserError, match=r"holds no \.npy files"):
        OLMO.files(str(tmp_path / ".."))
    with pytest.raises(UserError, match="is a folder: give the files of ids"):
        RAW.files(str(tmp_path))
