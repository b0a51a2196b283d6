"""Paths and URLs to folders; what cannot be read is refused."""

from pathlib import Path

import pytest

from megadistill.data.storage.open import folder_of
from megadistill.errors import UserError


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    assert folder_of((tmp_path / "a b").as_uri()).location == str(tmp_path / "a b")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("dropbox://a/b", r"needs a package .* pip install 'megadistill\[remote\]'"),
        ("nonsense://a/b", "Protocol not known: nonsense"),
    ],
)
def test_a_scheme_that_cannot_be_read_is_refused_in_one_line(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        folder_of(url)
    assert "\n" not in str(error.value)
