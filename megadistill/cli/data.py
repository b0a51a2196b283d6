"""Commands that write and inspect token shards: tokenize, shards."""

import argparse
from pathlib import Path

from megadistill.cli.common import EXIT_CODES, Commands, add_command
from megadistill.errors import OperatorFault

TOKENIZE_EPILOG = f"""\
examples:
  megadistill tokenize ~/text --include '*.txt' --vocab-size 32000 --sequence-length 2048 --output data/mine
  megadistill tokenize crawl/ --include '*.jsonl.zst' --tokenizer teacher/ --sequence-length 4096 --packer bestfit \\
      --output data/crawl

After an interruption or a full disk the same command resumes: finished shards are kept.

{EXIT_CODES}"""

SHARDS_EPILOG = f"""\
examples:
  megadistill shards info data/mine
  megadistill shards verify data/mine
  megadistill shards index ~/tars --tokenizer teacher/ --member tokens.npy

{EXIT_CODES}"""

VERIFY_EPILOG = """\
All faults are reported, not only the first: sizes and hashes of all files, and each sequence's bytes, type, length and
ids. A line per fault: shard, sequence, byte offset, expected and actual value.

example: megadistill shards verify data/mine/train/manifest.json

exit codes: 0 no damage; 2 invalid input; 4 damaged data"""

INFO_EPILOG = f"""\
example: megadistill shards info data/mine

{EXIT_CODES}"""

INDEX_EPILOG = f"""\
Any WebDataset tar whose samples have one member of tokens, all of one length L: .npy; .npz with one array, or with
several and --member npz:NAME; raw little-endian bytes with --member u16 --dtype uint16. A sequence is then L - 1
tokens, as the last one is only a label. The indices, the tokenizer and manifest.json are written beside the tars. An
optional member bounds.npy lists where documents begin: 0, the starts, the end.

example: megadistill shards index ~/tars --tokenizer teacher/ --member tokens.npy

{EXIT_CODES}"""


def add(commands: Commands) -> None:
    _tokenize_parser(commands)
    _shards_parser(commands)


def _tokenize_parser(commands: Commands) -> None:
    command = add_command(
        commands,
        "tokenize",
        "turn text into WebDataset token shards with a manifest, a training and a held-out split",
        TOKENIZE_EPILOG,
    )
    command.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="a file, or a folder of them: .jsonl, .jsonl.gz, .jsonl.zst (a document a line), .parquet (a document a "
        "row), anything else is text (a document a file)",
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where train/, heldout/ and tokenizer/ go"
    )
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a SentencePiece model of N pieces on the text"
    )
    which.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="an existing one: a SentencePiece .model, a tokenizer.json, or a folder that holds one of them",
    )
    command.add_argument("--sequence-length", type=int, required=True, metavar="S", help="tokens of a sequence")
    command.add_argument(
        "--packer",
        choices=("chunk", "bestfit"),
        default="chunk",
        help="chunk concatenates documents and cuts; bestfit keeps whole documents that fit, and pads (default chunk)",
    )
    command.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field of a JSON line, or the column of a table, that holds the text (default text)",
    )
    command.add_argument(
        "--heldout-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of documents held out, by a hash of their text; 0: none (default 0.01)",
    )
    command.add_argument(
        "--include",
        action="append",
        metavar="GLOB",
        help="files of a folder to read, by name (default: '*'); repeatable",
    )
    command.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="relative paths to leave out; repeatable"
    )
    command.add_argument(
        "--shard-mb",
        type=float,
        default=32,
        metavar="MB",
        help="text of a shard, also the unit of work of a process, which holds about two of them (default 32)",
    )
    command.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="worker processes; the output does not depend on them (default: the cores of this machine)",
    )
    command.set_defaults(run=_tokenize)


def _shards_parser(commands: Commands) -> None:
    shards = add_command(commands, "shards", "inspect, verify or index shards", SHARDS_EPILOG)
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    where = "manifest.json, the folder of a split or of a data set, or a URL of a manifest.json"

    verify = add_command(actions, "verify", "check a split against its manifest", VERIFY_EPILOG)
    verify.add_argument("data", metavar="DATA", help=where)
    verify.add_argument(
        "--quick", action="store_true", help="check the manifest, sizes and indices only; no shard is read"
    )
    verify.set_defaults(run=_shards_verify)

    info = add_command(actions, "info", "show the contents of a split, from its manifest alone", INFO_EPILOG)
    info.add_argument("data", metavar="DATA", help=where)
    info.set_defaults(run=_shards_info)

    index = add_command(actions, "index", "index WebDataset tars of tokens, and write their manifest", INDEX_EPILOG)
    index.add_argument("folder", type=Path, metavar="DIR", help="the folder of the tars, which are not changed")
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
    index.add_argument("--dtype", choices=("uint16", "uint32"), help="type of a member of raw bytes")
    index.add_argument(
        "--split", default="train", metavar="NAME", help="name of the split in the manifest (default train)"
    )
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
        f"{options.folder}/manifest.json: {manifest.sequences:,} sequences of {manifest.sequence_length:,} tokens in "
        f"{len(manifest.shards):,} shards"
    )
    return 0
