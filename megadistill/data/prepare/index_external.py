"""Indexing external shards: a split of WebDataset tars that another program wrote, and that stay as they are."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import TypeAdapter, ValidationError

from megadistill.data.shards.manifest import (
    FORMAT_VERSION,
    Manifest,
    PackerRecord,
    SampleFormat,
    SourceRecord,
    TokenDtype,
    token_dtype,
)
from megadistill.data.shards.npy import MAX_LENGTH, MemberError, row_of
from megadistill.data.shards.reader import SequenceReader
from megadistill.data.shards.shard import FileName, Shard
from megadistill.data.shards.tar import Sample, index_path, index_sequences, map_tar, member_of, samples, write_index
from megadistill.data.storage.open import folder_of
from megadistill.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, tokenizer_record
from megadistill.errors import UserError
from megadistill.progress import ShowProgress

TAR: Final = ".tar"
BOUNDS: Final = "bounds.npy"
TOKENIZER_FOLDER: Final = "tokenizer"


def index(
    folder: Path,
    *,
    tokenizer: Path,
    member: str | None,
    dtype: str | None,
    split: str,
    progress: ShowProgress,
) -> Manifest:
    """Makes a split of the tars in `folder`: an index beside each, the tokenizer, and manifest.json, last.

    `member` is the suffix of the tokens' member, `npz:NAME` for one array of several; None: the only .npy or .npz of a
    sample. `dtype`, uint16 or uint32, is that of a member of raw little-endian bytes. A member `bounds.npy` holds the
    bounds of documents. Every sequence is read and checked, and whether all begin with the tokenizer's BOS is recorded.

    Raises:
        UserError: there are no tars, one is damaged, or a sequence is not like the others; no manifest was written.
    """
    Manifest.refuse_finished(folder)
    tars = _tars(folder)
    _check_name(split, "--split")
    model = load_tokenizer(tokenizer)
    describe = _description(tars[0], split, model, member, dtype)
    try:
        content = _index_all(tars, split, describe, progress)
    except BaseException:
        for path in tars:
            index_path(path).unlink(missing_ok=True)
        raise
    model.write(folder / TOKENIZER_FOLDER)
    written = tokenizer_record(model, TOKENIZER_FOLDER, folder / TOKENIZER_FOLDER)
    manifest = describe(tokenizer=written, **content)
    manifest.write(folder)
    return manifest.lying_in(folder_of(str(folder)))


def _tars(folder: Path) -> list[Path]:
    try:
        tars = sorted(path for path in folder.iterdir() if path.suffix == TAR)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): give a folder of tars") from None
    if not tars:
        raise UserError(f"{folder} holds no {TAR} files: give a folder of uncompressed WebDataset tars")
    for path in tars:
        _check_name(path.name, str(path))
    return tars


def _check_name(name: str, what: str) -> None:
    try:
        TypeAdapter(FileName).validate_python(name)
    except ValidationError:
        raise UserError(
            f"{what}: {name!r} is not a name for a manifest: use letters, digits, '.', '_' and '-', and begin with a "
            "letter, a digit or '_'"
        ) from None


def _description(tar: Path, split: str, model: Tokenizer, member: str | None, dtype: str | None) -> "partial[Manifest]":
    """The manifest but for shards and tokens, after the first sample of the first tar."""
    sample = next(samples(tar), None)
    if sample is None:
        raise UserError(f"{tar} holds no samples: leave it out of the folder")
    where = f"{tar} sample {sample.key[:200]!r}"
    sample_format, dtype_on_disk = _sample_format(sample, member, dtype, token_dtype(model.vocab_size), where)
    tokens = member_of(sample, sample_format.tokens, where)
    try:
        row = row_of(
            map_tar(tar).read(tokens.offset_data, tokens.size), sample_format, dtype=dtype_on_disk, length=None
        )
    except MemberError as error:
        raise UserError(f"{where} member {sample_format.tokens}: {error}: name another --member") from None
    if not 2 <= len(row) <= MAX_LENGTH:
        raise UserError(f"{where} has {len(row)} tokens: a sequence has 2 to {MAX_LENGTH} with the last label")
    return partial(
        Manifest,
        version=FORMAT_VERSION,
        split=split,
        sequence_length=len(row) - 1,
        dtype=dtype_on_disk,
        vocab_size=model.vocab_size,
        sample_format=sample_format,
        tokenizer=tokenizer_record(model, TOKENIZER_FOLDER),
        packer=PackerRecord(name="external", version=1, bos=model.bos, eos=None),
        documents=None,
        text_bytes=None,
        source=SourceRecord(inputs=(tar.resolve().parent.name,)),
    )


def _sample_format(
    sample: Sample, member: str | None, dtype: str | None, narrowest: TokenDtype, where: str
) -> tuple[SampleFormat, TokenDtype]:
    """The format of the samples, and the dtype of raw bytes, or the one that the ids are read into."""
    candidates = [name for name in sample.members if name.endswith(("npy", "npz")) and name != BOUNDS]
    has = f"{where} has {sample.suffixes}"
    if member is None and len(candidates) != 1:
        raise UserError(f"{has}: name the one that holds the tokens with --member")
    suffix, _, array = (candidates[0] if member is None else member).partition(":")
    kind: Literal["npy", "npz", "raw"] = "npy" if suffix.endswith("npy") else "npz" if suffix.endswith("npz") else "raw"
    if (kind == "raw") != (dtype is not None):
        raise UserError(
            f"--member {suffix} is raw bytes: give --dtype uint16 or uint32"
            if kind == "raw"
            else f"--dtype {dtype} is for raw bytes, and {suffix} has its own: leave --dtype out"
        )
    if dtype not in (None, "uint16", "uint32"):
        raise UserError(f"--dtype {dtype}: raw bytes are uint16 or uint32")
    if suffix.lower() not in sample.members:
        raise UserError(f"--member {suffix}: {has}")
    bounds = BOUNDS if BOUNDS in sample.members and suffix.lower() != BOUNDS else None
    try:
        record = SampleFormat(kind=kind, tokens=suffix.lower(), bounds=bounds, array=array or None)
    except ValidationError:
        raise UserError(f"--member {member}: give a suffix such as tokens.npy, u16, or npz:tokens") from None
    return record, "uint16" if dtype == "uint16" else "uint32" if dtype == "uint32" else narrowest


def _index_all(tars: Sequence[Path], split: str, describe: "partial[Manifest]", show: ShowProgress) -> dict[str, Any]:
    """Reads every sequence, as a training run will. The fields of the manifest that tell of all of them."""
    folder = folder_of(str(tars[0].parent))
    total = sum(path.stat().st_size for path in tars)
    shards: list[Shard] = []
    packer: PackerRecord = describe.keywords["packer"]
    with_bos = packer.bos is not None
    tokens = largest_id = done = read = 0
    show(split, done=0, total=total, tokens=0)
    for path in tars:
        shard = write_index(path, index_sequences(path, describe.keywords["sample_format"]))
        manifest = describe(shards=(shard,), tokens=0)
        for batch in SequenceReader(manifest.lying_in(folder)).read_shard(0):
            if batch.faults:
                fault = batch.faults[min(batch.faults)]
                raise UserError(
                    f"{fault}: all sequences must be like the first one of {tars[0]}, {manifest.sequence_length + 1} "
                    "ids of the tokenizer"
                )
            tokens += batch.predicted_tokens(across_documents=True)
            largest_id = max(largest_id, int(batch.tokens.max()))
            with_bos = with_bos and bool((batch.tokens[:, 0] == packer.bos).all())
        shards.append(shard)
        done += shard.bytes
        read += shard.sequences * manifest.sequence_length
        show(split, done=done, total=total, tokens=read)
    packer = packer.model_copy(update={"sequence_bos": with_bos})
    return {"shards": tuple(shards), "tokens": tokens, "largest_id": largest_id, "packer": packer}
