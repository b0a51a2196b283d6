"""One line for a file of text that cannot be read, or is damaged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadistill.data.text.compressed import DAMAGED
from megadistill.errors import UserError


@contextmanager
def readable(path: Path, place: str = "") -> Iterator[None]:
    """A context that reads a file, or what lies at `place` in it. Raises UserError: it is unreadable, or damaged."""
    try:
        yield
    except DAMAGED as error:
        raise damaged(path, error, place) from None
    except OSError as error:
        if error.errno is None:  # gzip and pyarrow, for bad bytes
            raise damaged(path, error, place) from None
        raise unreadable(path, error) from None


def unreadable(path: Path | str, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): make it readable, or --exclude it")


def damaged(path: Path, error: object, place: str = "") -> UserError:
    """`error`: the reason, an exception or words."""
    where = f", {place}," if place else ""
    return UserError(
        f"{path}{where} is damaged or cut off ({' '.join(str(error).split())}): copy it again, or --exclude it"
    )
