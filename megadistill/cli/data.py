"""Verbs that make and look at shards: tokenize, shards."""

import argparse
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Verbs, add_verb
from megadistill.errors import OperatorFault

TOKENIZE_EPILOG = f"""\
examples:
  megadistill tokenize ~/text --include '*.txt' --vocab-size 32000 --sequence-length 2048 --output data/mine
  megadistill tokenize crawl/ --include '*.jsonl.zst' --tokenizer teacher/ --sequence-length 4096 --packer bestfit \\
      --output data/crawl

A run that was stopped, or that met a full disk, goes on by the same command: finished shards are kept.

{EXIT_CODES}"""

VERIFY_EPILOG = """\
Everything is checked, not just until the first fault: sizes and hashes of all files, and each sequence's bytes, type,
length and ids. One line a fault: shard, sequence, byte offset, what was expected and what was found.

exit codes: 0 all is well; 2 wrong input; 4 something is damaged"""

INDEX_EPILOG = f"""\
Any WebDataset tar whose samples have one member of tokens, all of one length L: .npy; .npz with one array, or with
several and --member npz:NAME; raw little-endian bytes with --member u16 --dtype uint16. A sequence is then L - 1
tokens, as the last one is only a label. The indices, the tokenizer and manifest.json go beside the tars. A member
bounds.npy, if there is one, says where documents begin: 0, the starts, the end.

example: megadistill shards index ~/tars --tokenizer teacher/ --member tokens.npy

{EXIT_CODES}"""


def add(verbs: Verbs) -> None:
    _tokenize_parser(verbs)
    _shards_parser(verbs)


def _tokenize_parser(verbs: Verbs) -> None:
    verb = add_verb(
        verbs,
        "tokenize",
        "turn text into WebDataset token shards with a manifest, a training and a held-out split",
        TOKENIZE_EPILOG,
    )
    verb.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="a file, or a folder of them: .jsonl, .jsonl.gz, .jsonl.zst (a document a line), .parquet (a document a "
        "row), anything else is text (a document a file)",
    )
    verb.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where train/, heldout/ and tokenizer/ go"
    )
    which = verb.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a SentencePiece model of N pieces on the text"
    )
    which.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="use this one: a SentencePiece .model, a tokenizer.json, or a folder that holds one of them",
    )
    verb.add_argument("--sequence-length", type=int, required=True, metavar="S", help="tokens of a sequence")
    verb.add_argument(
        "--packer",
        choices=("chunk", "bestfit"),
        default="chunk",
        help="chunk lays documents end to end and cuts; bestfit keeps those whole that fit, and pads (default chunk)",
    )
    verb.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field of a JSON line, or the column of a table, that holds the text (default text)",
    )
    verb.add_argument(
        "--heldout-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of documents held out, by a hash of their text; 0: none (default 0.01)",
    )
    verb.add_argument(
        "--include",
        action="append",
        metavar="GLOB",
        help="files of a folder to read, by name (default: '*'); repeatable",
    )
    verb.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="relative paths to leave out; repeatable"
    )
    verb.add_argument(
        "--shard-mb",
        type=float,
        default=32,
        metavar="MB",
        help="text of a shard, which is also a worker's piece of work; each process holds about two (default 32)",
    )
    verb.add_argument(
        "--processes", type=int, metavar="N", help="that tokenize; the bytes are the same (default: this one's cores)"
    )
    verb.set_defaults(run=_tokenize)


def _shards_parser(verbs: Verbs) -> None:
    shards = add_verb(verbs, "shards", "look at shards, verify them, or index those that somebody else made")
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    where = "manifest.json, the folder of a split or of a data set, or a URL of a manifest.json"

    verify = add_verb(actions, "verify", "check a split against its manifest", VERIFY_EPILOG)
    verify.add_argument("data", metavar="DATA", help=where)
    verify.add_argument("--quick", action="store_true", help="manifest, sizes and indices alone; reads no shard")
    verify.set_defaults(run=_shards_verify)

    info = add_verb(actions, "info", "say what a split holds, from its manifest alone")
    info.add_argument("data", metavar="DATA", help=where)
    info.set_defaults(run=_shards_info)

    index = add_verb(actions, "index", "index WebDataset tars that hold tokens, and write their manifest", INDEX_EPILOG)
    index.add_argument("folder", type=Path, metavar="DIR", help="the folder of the tars, which stay as they are")
    index.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="PATH",
        help="the tokenizer that made the ids: a .model, a tokenizer.json, or a folder that holds one",
    )
    index.add_argument(
        "--member", metavar="SUFFIX", help="the member of a sample with the tokens, such as tokens.npy or u16"
    )
    index.add_argument("--dtype", choices=("uint16", "uint32"), help="of a member of raw bytes")
    index.add_argument("--split", default="train", metavar="NAME", help="what the manifest calls it (default train)")
    index.set_defaults(run=_shards_index)


def _tokenize(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.data import tokenize

    report = tokenize(
        options.inputs,
        options.output,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        sequence_length=options.sequence_length,
        packer=options.packer,
        text_field=options.text_field,
        heldout_fraction=options.heldout_fraction,
        include=options.include or ["*"],
        exclude=options.exclude,
        shard_mb=options.shard_mb,
        processes=options.processes,
    )
    Console().print(report.table())
    return 0


def _shards_verify(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.data.prepare.verify import verify

    report = verify(options.data, quick=options.quick)
    for line in report.lines():
        print(line)
    Console().print(report.table())
    return 0 if report.ok else OperatorFault.exit_code


def _shards_info(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megadistill.data.prepare.verify import info

    for table in info(options.data):
        Console().print(table)
    return 0


def _shards_index(options: argparse.Namespace) -> int:
    from megadistill.data.prepare.index_external import index

    manifest = index(
        options.folder, tokenizer=options.tokenizer, member=options.member, dtype=options.dtype, split=options.split
    )
    print(
        f"{options.folder}/manifest.json: {manifest.units:,} sequences of {manifest.sequence_length:,} tokens in "
        f"{len(manifest.shards):,} shards"
    )
    return 0
