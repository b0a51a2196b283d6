"""Texts in WebDataset tars: what is a document, what is left out, and what is refused with file and place."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from backports import zstd

from megadistill.data.text import compressed, tar_texts
from megadistill.data.text.corpus import Corpus
from megadistill.data.text.left_out import LeftOut
from megadistill.errors import UserError
from tests.unit.data.text.tars import write_tar


def _read(path: Path, text_field: str = "text") -> tuple[list[str], Corpus]:
    read = Corpus([path], text_field=text_field)
    return [document.text for document in read], read


def test_a_sample_without_a_text_is_counted_and_its_members_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {"1.jpg": b"\xff", "1.cls": b"3", "2.json": b'{"caption": "x"}', "3.txt": b" "})
    texts, read = _read(path)
    assert texts == []
    assert read.left_out == {LeftOut.NO_TEXT: 2, LeftOut.EMPTY: 1}
    assert str(read.unread[0]).endswith("its fields are 'jpg', 'cls', 'caption'")
    assert _read(path, text_field="caption")[0] == ["x"]
    write_tar(path, {"README": b"no suffix"})
    assert _read(path)[1].left_out == {LeftOut.NO_TEXT: 1}


def test_a_tar_of_text_files_has_a_document_a_file(tmp_path: Path) -> None:
    """Whose names may have more dots, and what WebDataset takes for one sample then."""
    path = tmp_path / "a.tar"
    write_tar(path, {"v1.0/book.en.txt": b"one", "v1.0/book.de.txt": b"two", "v1.0/other.txt": b"three"})
    assert _read(path)[0] == ["one", "two", "three"]


def test_a_member_above_the_bound_is_counted_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_texts, "MAX_DOCUMENT_BYTES", 1000)
    path, long = tmp_path / "a.tar", bytes(1 << 20)
    members = {"1.txt": long, "2.txt.gz": gzip.compress(long), "3.json.zst": zstd.compress(long), "4.txt": b"kept"}
    write_tar(path, members)
    texts, read = _read(path)
    assert texts == ["kept"]
    assert read.left_out == {LeftOut.TOO_LONG: 3}
    assert read.first_places == {LeftOut.TOO_LONG: f"{path}, sample '1' at byte 0"}


@pytest.mark.parametrize("name", ["2.txt.gz", "2.json.zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another form"])
def test_a_damaged_member_is_refused_with_its_place(name: str, damage: str, tmp_path: Path) -> None:
    checked: dict[int, int] = {zstd.CompressionParameter.checksum_flag: True}
    text = b"".join(b"%d, " % i for i in range(5000))
    whole = gzip.compress(text) if name.endswith("gz") else zstd.compress(text, options=checked)
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:-5],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :],
        "empty": b"",
        "another form": b"plain text",
    }[damage]
    path = tmp_path / "a.tar"
    write_tar(path, {"1.txt": b"one", name: damaged})
    with pytest.raises(UserError) as refused:
        _read(path)
    assert str(refused.value).startswith(f"{path}, sample '2' at byte 1024, its member '{name}', is damaged or cut off")
    assert "\n" not in str(refused.value)


def test_a_few_bytes_that_expand_without_an_end_are_one_long_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_texts, "MAX_DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr(compressed, "_EXPANSION_COUNTS_FROM", 1 << 16)
    monkeypatch.setattr(compressed, "MAX_EXPANSION", 500)
    path = tmp_path / "a.tar"
    write_tar(path, {"1.txt.zst": zstd.compress(bytes(32 << 20)), "2.txt": b"kept"})
    with pytest.raises(UserError, match=r"sample '1' at byte 0, .*expands to more than 500 times its size"):
        _read(path)


def test_a_tar_that_is_cut_off_or_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.txt": b"text %d" % i for i in range(30)})
    whole = path.read_bytes()
    for size in (0, 100, 512, 5000, 512 * 60):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.tar (is not a whole tar|is cut off)") as refused:
            _read(path)
        assert "\n" not in str(refused.value)
    path.write_bytes(b"plain text " * 100)
    with pytest.raises(UserError, match="is not a whole tar"):
        _read(path)


def test_links_and_claimed_sizes_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    link, huge = tarfile.TarInfo("1.txt"), tarfile.TarInfo("2.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(path, "w") as tar:
        tar.addfile(link)
    with pytest.raises(UserError, match=r"sample '1' at byte 0: its member '1.txt' is not a plain file"):
        _read(path)
    huge.size = 1 << 40
    path.write_bytes(huge.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(UserError, match=r"a\.tar is "):
        _read(path)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_a_tar_that_is_compressed_as_a_whole_is_refused(name: str, tmp_path: Path) -> None:
    """Read as one document, it would be text with headers between."""
    write_tar(tmp_path / "a", {"1.txt": b"one"})
    data = (tmp_path / "a").read_bytes()
    (tmp_path / name).write_bytes(zstd.compress(data) if name.endswith("zst") else gzip.compress(data))
    with pytest.raises(UserError, match="compressed as a whole: decompress it"):
        _read(tmp_path / name)


def test_memory_holds_one_member_of_a_large_tar(tmp_path: Path) -> None:
    """Each read is of one member that is a text."""
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.txt": b"x" * 100 for i in range(20)} | {f"{i}.bin": bytes(10_000) for i in range(20, 40)})
    sizes: list[int] = []

    class Counted(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            sizes.append(-1 if size is None else size)
            return super().read(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_texts, "open_regular", lambda name: Counted(name))
        assert _read(path)[0] == ["x" * 100] * 20
    assert sizes == [100] * 20
