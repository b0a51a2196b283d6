"""A GGUF file to a Hugging Face folder: what is refused. The real file is read in tests/real_models."""

from pathlib import Path

import pytest

from megadistill.errors import UserError
from megadistill.models import gguf
from megadistill.models.gguf import convert_gguf


def test_a_missing_package_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "READERS", ("json", "no_such_reader"))
    with pytest.raises(UserError, match=r"takes no_such_reader: pip install 'megadistill\[gguf\]'"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist; name a GGUF file"), (b"", "is not a GGUF file"), (b"{}", "is not a GGUF file")],
)
def test_what_is_no_gguf_file_is_refused(
    content: bytes | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "READERS", ())
    if content is not None:
        (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=words):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "READERS", ())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
