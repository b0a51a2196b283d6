"""Removing secrets from command lines, messages and URLs.

A secret is recognised by the name of its option, or by the form of its value.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SECRET_NAME = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
_NO_SECRET = re.compile(r"tokens|tokenize", re.IGNORECASE)
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[a-z]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{12,}"
    r"|ASIA[A-Z0-9]{12,}|AIza[\w-]{30,}|xox[a-z]-[\w-]+|eyJ[\w-]{10,}\.[\w-]+\.[\w-]*)"
    # of a header: with a digit, padding or a capital within, or the words after "basic" and "bearer" would be hidden
    r"|(?:(?<=[Bb]earer )|(?<=[Bb]asic ))(?=[\w.~+/-]*(?:[0-9=]|[a-z][A-Z]))[\w.~+/=-]{8,}"
    r"|(?<=AccountKey=)[^;\s'\"]+|(?<=SharedAccessSignature=)[^;\s'\"]+"  # of an Azure connection string
)
"""The forms of well-known keys."""

_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,31})://(?P<user>[^/?#\s'\"<>]+)@")
"""A URL up to the last @ before its path: user and password, or a token."""

_NAMED_USERS = ("abfs", "abfss", "wasb", "wasbs", "ftp", "sftp", "ssh", "scp", "smb", "hdfs", "webhdfs", "arrow_hdfs")
"""Schemes that have a user's or a container's name in that place; elsewhere it is a token."""

_NO_USERS = ("dvc", "file", "git", "github", "hf", "libarchive", "local", "memory", "tar", "zip")
"""fsspec's schemes in which an @ stands before a revision, or is a letter of a name: github://org:repo@main/data."""

_SIGNATURE = re.compile(
    r"(?<=[?&;#])[\w.%-]*(?i:key(?!word)|token(?!s|i[sz]e)|secret|passw|pwd|credential|auth(?!ors?\b|or_)"
    r"|(?<!de)(?<!as)sig(?!nal|ma)|policy(?==)|accessid|x-amz-|x-goog-|session(?==|_?id)|jwt)[\w.%-]*=[^&#;\s'\"<>]+"
)
"""A parameter of a URL's query that lets its bearer in."""


MAX_LETTERS = 4000
"""Letters of a line that is printed."""


def command_line(arguments: list[str]) -> list[str]:
    """Arguments of a command without the values of `--key=value` and `--key value` whose name says a secret."""
    redacted, hide = [], False
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        secret = names_a_secret(name)
        if hide or (separator and secret):
            redacted.append(f"{name}=***" if separator and not hide else "***")
        else:
            redacted.append(without_secrets(argument))
        hide = secret and not separator and argument.startswith("-") and not hide
    return redacted


def without_secrets(value: str) -> str:
    """`value` with everything that has the form of a well-known key or of a URL's password as `***`."""
    return _TOKEN.sub("***", without_url_secrets(value))


def without_url_secrets(value: str) -> str:
    """`value` with the passwords, tokens and signatures of its URLs as `***`."""
    return _SIGNATURE.sub("***", _USER.sub(_without_user, value)) if "://" in value else value


def _without_user(match: re.Match[str]) -> str:
    return match[0] if _user_is_no_secret(match) else f"{match['scheme']}://***@"


def _user_is_no_secret(match: re.Match[str]) -> bool:
    scheme = match["scheme"].lower()
    named = scheme in _NAMED_USERS
    return scheme in _NO_USERS or (named and ":" not in match["user"] and _TOKEN.search(match["user"]) is None)


def url_secret(value: str) -> str | None:
    """The kind of secret in a URL in `value`: `a password`, `a token in the place of a user`, `a signature`; None."""
    for match in _USER.finditer(value):
        if not _user_is_no_secret(match):
            return "a password" if ":" in match["user"] else "a token in the place of a user"
    return "a signature or a key in its query" if "://" in value and _SIGNATURE.search(value) else None


def refusal(url: str, secret: str) -> str:
    """A line on a URL that has a `secret` (`url_secret`) in it: why it is refused, and the way out."""
    return (
        f"{redact_url(url)} has {secret}, which the records of a run, its checkpoints and the list of processes would "
        "show: give the URL without, and the secret to fsspec, in its configuration or the environment (docs/data.md, "
        "Remote shards)"
    )


def redacted(value: Any, by: Callable[[str], str] = without_secrets) -> Any:
    """Nested lists and mappings with every text as `by` gives it."""
    if isinstance(value, str):
        return by(value)
    if isinstance(value, Mapping):
        return {key: redacted(each, by) for key, each in value.items()}
    return [redacted(each, by) for each in value] if isinstance(value, list | tuple) else value


def names_a_secret(name: str) -> bool:
    """Whether an option or a variable of this name holds a secret; `tokens` of a text are none."""
    return _SECRET_NAME.search(_NO_SECRET.sub("", name)) is not None


def redact_url(location: Path | str) -> str:
    """A path unchanged; a URL without user, password and query."""
    scheme, mark, rest = str(location).partition("://")
    if not mark:
        return scheme
    plain = _TOKEN.sub("***", _USER.sub(_without_user, scheme + mark + rest.partition("?")[0].partition("#")[0]))
    return plain.replace("://***@", "://")


def redact(message: str) -> str:
    """A message whose URLs are redacted."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]{0,31}://[^\s'\"<>]+", lambda url: redact_url(url[0]), message)


def printable_line(text: str, *, limit: int = MAX_LETTERS) -> str:
    """`text` of anybody for a line on a terminal or in a log: printable, without secrets, and of a bounded length.

    The middle of a long one is left out: a message says at its end what to do.
    """
    if len(text) > limit:
        text = f"{text[: limit - limit // 4]} … {text[-(limit // 4) :]}"
    return printable(without_secrets(text))


def printable_lines(text: str) -> str:
    """A text of several lines of ours, each as by `printable_line`."""
    return "\n".join(map(printable_line, text.split("\n")))


def printable(text: str) -> str:
    """`text` without what a terminal, XML or UTF-8 cannot take: control characters, halves of surrogate pairs."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
