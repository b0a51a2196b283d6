"""Secrets in command lines, values and URLs are removed; what only looks like one stays."""

from pathlib import Path

import pytest

from megadistill.redaction import command_line, redact, redact_url, url_secret, without_secrets


def test_a_name_that_says_a_secret_hides_a_value_of_any_form() -> None:
    given = ["--token", "one", "--api-key=two", "--password", "three", "s3.secret=four", "data.token_file=five"]
    expected = ["--token", "***", "--api-key=***", "--password", "***", "s3.secret=***", "data.token_file=***"]
    assert command_line(given) == expected


def test_what_only_looks_like_a_secret_is_not_redacted() -> None:
    """Tokens are what this package is about."""
    plain = ["data.tokenizer=a", "--tokens", "100", "train.steps=3", "https://host/data/manifest.json", "sk-7", "a:b@c"]
    assert command_line(plain) == plain


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("https://me:pass@host/x", "https://***@host/x"),
        ("s3://b/x?X-Amz-Signature=ab12&part=3", "s3://b/x?***&part=3"),
        ("https://h/x?part=3&sig=a%2Fb#f", "https://h/x?part=3&***#f"),
        ("https://h/x?token=1&AWSAccessKeyId=2", "https://h/x?***&***"),
    ],
)
def test_a_url_keeps_all_but_its_secrets(url: str, redacted: str) -> None:
    assert without_secrets(f"data.manifest={url}") == f"data.manifest={redacted}"


def test_locations_and_messages_lose_the_credentials_of_their_urls() -> None:
    assert redact_url("https://u:p@h/a/b?sig=1") == "https://h/a/b"
    assert redact_url(Path("/a/b?c@d")) == "/a/b?c@d"
    assert redact("no 'https://u:p@h/a?sig=1' here") == "no 'https://h/a' here"


def test_a_long_text_is_redacted_in_a_time_that_grows_with_its_length() -> None:
    """Each of its letters may begin the scheme of a URL: looking on to the end from each would take minutes."""
    word = "x" * 320_000
    assert url_secret(word) is None
    assert redact(word) == word
    assert redact(f"{word}://user:pass@host/x?key=1").endswith("://host/x")
