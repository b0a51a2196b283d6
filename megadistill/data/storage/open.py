"""The folder at a path or a URL: a local one, or a remote one where fsspec is installed."""

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from megadistill.data.storage.base import Folder
from megadistill.data.storage.local import LocalFolder
from megadistill.errors import UserError
from megadistill.redaction import redact_url, refusal, url_secret


def refuse_secret(location: str) -> None:
    """Refuses a URL with a password, a token or a signature in it.

    Raises:
        UserError: one line, without them.
    """
    if (secret := url_secret(location)) is not None:
        raise UserError(refusal(location, secret))


def folder_of(location: str) -> Folder:
    """The folder at a path, or at a URL `scheme://...`.

    Raises:
        UserError: a URL has a secret in it, needs a package that is not installed, or its scheme is unknown.
    """
    if location.startswith("file://"):
        location = url2pathname(urlsplit(location).path)
    if "://" not in location:
        return LocalFolder(Path(location))
    refuse_secret(location)
    try:
        from megadistill.data.storage.remote import RemoteFolder  # noqa: PLC0415  an extra; most data is local
    except ImportError:
        raise UserError(
            f"{redact_url(location)} is a URL, which needs fsspec: pip install 'megadistill[remote]'"
        ) from None
    return RemoteFolder(location)
