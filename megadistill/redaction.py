"""Removing secrets from command lines, messages and URLs.

A secret is recognised by the name of its option, or by the form of its value.
"""

import re
from pathlib import Path

_SECRET_NAME = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
_NO_SECRET = re.compile(r"tokens|tokenize", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|gh[a-z]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[A-Z0-9]{12,}|xox[a-z]-[\w-]+"
    r"|eyJ[\w-]{10,}\.[\w-]+\.[\w-]*)|(?<=://)[^/@\s]+:[^/@\s]+(?=@)"
    r"|(?<=[?&])[\w.-]*(?i:key|token|secret|passw|credential|sig)[\w.-]*=[^&#\s]+"  # of a presigned URL
)

MAX_SHOWN = 4000
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
    return _SECRET_VALUE.sub("***", value)


def names_a_secret(name: str) -> bool:
    """Whether an option or a variable of this name holds a secret; `tokens` of a text are none."""
    return _SECRET_NAME.search(_NO_SECRET.sub("", name)) is not None


def redact_url(location: Path | str) -> str:
    """A path unchanged; a URL without user, password and query."""
    scheme, mark, rest = str(location).partition("://")
    if not mark:
        return scheme
    return scheme + mark + re.sub(r"^[^/]*@", "", rest.partition("?")[0])


def redact(message: str) -> str:
    """A message whose URLs are redacted."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+", lambda url: redact_url(url[0]), message)


def shown(text: str, *, limit: int = MAX_SHOWN) -> str:
    """`text` of anybody for a line on a terminal or in a log: printable, without secrets, and of a bounded length.

    The middle of a long one is left out: a message says at its end what to do.
    """
    if len(text) > limit:
        text = f"{text[: limit - limit // 4]} … {text[-(limit // 4) :]}"
    return printable(without_secrets(text))


def shown_lines(text: str) -> str:
    """A text of several lines of ours, each as by `shown`."""
    return "\n".join(map(shown, text.split("\n")))


def printable(text: str) -> str:
    """`text` without what a terminal, XML or UTF-8 cannot take: control characters, halves of surrogate pairs."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
