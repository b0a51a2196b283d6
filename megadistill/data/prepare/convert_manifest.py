"""Converting a manifest between its two forms: one that lists its shards, and one with a table of them."""

import os
from pathlib import Path
from typing import Literal

from megadistill.data.prepare.verify import find_manifests
from megadistill.data.shards.manifest import Manifest
from megadistill.data.shards.shard_table import TABLE_FILE
from megadistill.errors import UserError
from megadistill.redaction import redact_url
from megadistill.units import number_of

Form = Literal["table", "list"]


def convert(location: Path | str, *, to: Form) -> list[str]:
    """Writes each manifest at a local `location` (see `verify`) in another form; a line each on what it is now.

    The fingerprint stays the same: runs that began on one form resume on the other.

    Raises:
        UserError: there is no manifest, it is behind a URL, its folder cannot be written to, or a list would be larger
            than what is read.
    """
    if "://" in str(location):
        raise UserError(f"{redact_url(location)} is a URL: convert the manifest where it was made, and copy it there")
    return [_convert(Path(where), to) for where in find_manifests(location)]


def _convert(path: Path, to: Form) -> str:
    manifest = Manifest.load(path)
    table = path.parent / TABLE_FILE
    place = f"in {table}" if to == "table" else f"listed in {path.name}"
    same = f"{path}: {number_of(len(manifest.shards), 'shard')} {place}"
    if manifest.has_table == (to == "table"):
        return f"{same} already"
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent} cannot be written to: convert the manifest as its owner")
    manifest.write(path.parent, table=to == "table")
    return f"{same}, fingerprint {manifest.fingerprint[:12]}… as before"
