"""MDS folders, written byte by byte after the published layout (docs.mosaicml.com, "Shard file formats")."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CODES = {"uint8": 8, "int8": 9, "uint16": 16, "int16": 17, "float16": 18, "uint32": 32, "int32": 33, "int64": 65}
SIZES = {"int": 8}


def encoded(encoding: str, value: Any) -> bytes:
    """The bytes of a value in a column of an encoding."""
    kind, _, rest = encoding.partition(":")
    dtype, _, shape = rest.partition(":")
    if kind == "ndarray":
        head = b"" if dtype else bytes([CODES[value.dtype.name]])
        if not shape:
            code = 0 if len(value) < 1 << 8 else 1 if len(value) < 1 << 16 else 2
            head += bytes([value.ndim << 2 | code]) + b"".join(
                length.to_bytes(1 << code, "little") for length in value.shape
            )
        return head + bytes(value.tobytes())
    return struct.pack("<q", value) if kind == "int" else value if isinstance(value, bytes) else value.encode()


def size_of(encoding: str) -> int | None:
    """Bytes of every value of an encoding; None: not fixed."""
    kind, *rest = encoding.split(":")
    if kind == "ndarray" and len(rest) == 2:
        return int(np.prod([int(length) for length in rest[1].split(",")])) * np.dtype(rest[0]).itemsize
    return SIZES.get(kind)


def shard_bytes(encodings: Mapping[str, str], samples: Sequence[Mapping[str, Any]]) -> bytes:
    """A shard of the samples, whose columns lie in the order of their names."""
    names = sorted(encodings)
    description = json.dumps({**_columns(encodings), "version": 2, "format": "mds", "size_limit": 1 << 26}).encode()
    bodies = []
    for sample in samples:
        values = [encoded(encodings[name], sample[name]) for name in names]
        sizes = [len(value) for name, value in zip(names, values, strict=True) if size_of(encodings[name]) is None]
        bodies.append(struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(values))
    begin = 4 * (len(bodies) + 2) + len(description)
    offsets = np.cumsum([begin, *map(len, bodies)]).tolist()
    head = struct.pack(f"<{len(offsets) + 1}I", len(bodies), *offsets)
    return head + description + b"".join(bodies)


def write_mds(folder: Path, encodings: Mapping[str, str], shards: Sequence[Sequence[Mapping[str, Any]]]) -> Path:
    """A folder of shards and their index.json."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, samples in enumerate(shards):
        name, content = f"shard.{number:05d}.mds", shard_bytes(encodings, samples)
        (folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {}}
        common = {"version": 2, "format": "mds", "compression": None, "hashes": [], "size_limit": 1 << 26}
        entries.append({**common, **_columns(encodings), "raw_data": raw, "zip_data": None, "samples": len(samples)})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def _columns(encodings: Mapping[str, str]) -> dict[str, Any]:
    names = sorted(encodings)
    return {
        "column_names": names,
        "column_encodings": [encodings[name] for name in names],
        "column_sizes": [size_of(encodings[name]) for name in names],
    }
