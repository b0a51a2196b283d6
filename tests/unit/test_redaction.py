"""Secrets in command lines and values are not shown; what only looks like one is."""

import pytest

from megadistill.redaction import command_line, without_secrets


def test_a_name_that_says_a_secret_hides_a_value_of_any_form() -> None:
    given = ["--token", "one", "--api-key=two", "--password", "three", "s3.secret=four", "data.token_file=five"]
    shown = ["--token", "***", "--api-key=***", "--password", "***", "s3.secret=***", "data.token_file=***"]
    assert command_line(given) == shown


def test_what_only_looks_like_a_secret_is_shown() -> None:
    """Tokens are what this package is about."""
    plain = ["data.tokenizer=a", "--tokens", "100", "train.steps=3", "https://host/data/manifest.json", "sk-7", "a:b@c"]
    assert command_line(plain) == plain


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pass@host/x", "https://***@host/x"),
        ("s3://b/x?X-Amz-Signature=ab12&part=3", "s3://b/x?***&part=3"),
        ("https://h/x?part=3&sig=a%2Fb#f", "https://h/x?part=3&***#f"),
        ("https://h/x?token=1&AWSAccessKeyId=2", "https://h/x?***&***"),
    ],
)
def test_a_url_keeps_all_but_its_secrets(url: str, shown: str) -> None:
    assert without_secrets(f"data.manifest={url}") == f"data.manifest={shown}"
