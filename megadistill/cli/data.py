"""Commands that write and inspect token shards: tokenize, shards."""

import argparse
from pathlib import Path

from megadistill.cli.common import RESUMES, Commands, add_command, option, print_tables, repeatable, say
from megadistill.errors import OperatorFault, UserError
from megadistill.outputs import require_writable_file, require_writable_folder

TOKENIZE_EPILOG = """\
examples:
  megadistill tokenize ~/text --include '*.txt' --vocab-size 32000 --sequence-length 2048 --output data/mine
  megadistill tokenize crawl/ --include '*.jsonl.zst' --tokenizer teacher/ --sequence-length 4096 --packer bestfit \\
      --output data/crawl

After an interruption or a full disk the same command resumes: finished shards are kept."""

SHARDS_EPILOG = """\
examples:
  megadistill shards info data/mine
  megadistill shards verify data/mine
  megadistill shards index ~/tars --tokenizer teacher/ --member tokens.npy
  megadistill shards index --format megatron corpora/web_text_document --sequence-length 4096 --tokenizer teacher/"""

VERIFY_EPILOG = """\
All faults are reported, not only the first: sizes and hashes of all files, and each sequence's bytes, type, length and
ids. A line per fault: shard, sequence, byte offset, expected and actual value.

example: megadistill shards verify data/mine/train/manifest.json"""

CONVERT_EPILOG = """\
Ranks map the table, so that a start does not depend on the number of shards; `tokenize` and `index` write one for more
than 10,000 shards. Runs that began on one form resume on the other. Earlier releases read the list alone.

example: megadistill shards convert data/mine"""

INDEX_EPILOG = """\
Any WebDataset tar whose samples have one member of tokens, all of one length L: .npy; .npz with one array, or with
several and --member npz:NAME; raw little-endian bytes with --member u16 --dtype uint16. A sequence is then L - 1
tokens, as the last one is only a label. The indices, the tokenizer and manifest.json are written beside the tars. An
optional member bounds.npy lists where documents begin: 0, the starts, the end.

With --format token files of another program are indexed, to be read where they lie: megatron (prefixes of .bin and
.idx, or a folder of them), olmo (OLMo-core's .npy files or a folder of them), raw (files of ids, with --dtype), mds (a
folder of MosaicML's shards), arrow (a folder that `save_to_disk` of datasets wrote), parquet (files or a folder). They
are cut into sequences of S tokens and a last label; every id is read once and checked. The index is a folder below
that of the files, or --output, a folder beside it; one corpus may have several.

examples:
  megadistill shards index ~/tars --tokenizer teacher/ --member tokens.npy
  megadistill shards index --format megatron corpora/web_text_document --sequence-length 4096 --tokenizer teacher/
  megadistill shards index --format olmo corpora/olmo --sequence-length 4096 --tokenizer teacher/"""


VOCAB_MAP_EPILOG = """\
For the simple cases: equal tokens at other ids, a few more or fewer tokens, special tokens of other names. Tokenizers
that cut text differently are refused: the teacher would read another text than it was trained on. With --data, lines
of the data are compared, and the tokens without a teacher's id are counted. docs/vocab-map.md has the rest.

example: megadistill vocab-map --student data/mine/tokenizer --teacher teacher/ --data data/mine/train/manifest.json \\
    --output map.json"""


TOKEN_FORMATS = ("megatron", "olmo", "raw", "mds", "arrow", "parquet")


def add(commands: Commands) -> None:
    _add_tokenize(commands)
    _add_shards(commands)
    _add_vocab_map(commands)


def _add_vocab_map(commands: Commands) -> None:
    summary = "map the ids of one tokenizer to a teacher's, where both cut text alike"
    command = add_command(commands, "vocab-map", summary, VOCAB_MAP_EPILOG, _vocab_map)
    text = "the tokenizer of the shards: a .model, a tokenizer.json, or a folder with one of them"
    option(command, "--student", "PATH", text, kind=Path, required=True)
    option(command, "--teacher", "PATH", "the teacher's tokenizer, such as its folder", kind=Path, required=True)
    option(command, "--output", "FILE", "the JSON file to write, for teacher.vocab_map", kind=Path, required=True)
    option(command, "--data", "MANIFEST", "manifest.json of a split made with the student's tokenizer")


def _add_tokenize(commands: Commands) -> None:
    summary = "turn text into WebDataset token shards with a manifest, a training and a held-out split"
    command = add_command(commands, "tokenize", summary, TOKENIZE_EPILOG, _tokenize, on_interrupt=RESUMES)
    text = """a file, or a folder of them: .jsonl, .jsonl.gz, .jsonl.zst (a document per line), .parquet, .arrow (a
        document per row), .tar (a document per .txt or .json), anything else is text (a document per file); documents
        above 64 MiB are left out and counted"""
    command.add_argument("inputs", nargs="+", type=Path, metavar="PATH", help=text)
    option(command, "--output", "DIR", "folder of train/, heldout/ and tokenizer/", kind=Path, required=True)
    tokenizer = command.add_mutually_exclusive_group(required=True)
    option(tokenizer, "--vocab-size", "N", "train a SentencePiece model of N pieces on the text", kind=int)
    text = """an existing tokenizer: a SentencePiece .model, a tokenizer.json, a tekken.json, Llama 3's tokenizer.model,
        or a folder with one of them"""
    option(tokenizer, "--tokenizer", "PATH", text, kind=Path)
    option(command, "--sequence-length", "S", "tokens of a sequence", kind=int, required=True)
    text = "chunk: concatenates documents and cuts; bestfit: keeps whole documents that fit, and pads"
    command.add_argument("--packer", choices=("chunk", "bestfit"), default="chunk", help=text)
    text = """begin every sequence with BOS where the tokenizer puts one before a text, as its model expects it
        (default); no: only documents begin with it"""
    command.add_argument("--insert-bos", action=argparse.BooleanOptionalAction, default=True, help=text)
    text = "field of a JSON object, or column of a table, with the text"
    option(command, "--text-field", "NAME", text, default="text")
    text = "fraction of documents held out, by a hash of their text; 0: none"
    option(command, "--heldout-fraction", "F", text, default=0.01)
    repeatable(command, "--include", "GLOB", "files of a folder to read, by name (default: all)")
    repeatable(command, "--exclude", "GLOB", "relative paths to leave out")
    text = """MB of text per shard, also the unit of work of a process, which holds about two of them (default: 32 to
        512, by the size of the input)"""
    option(command, "--shard-mb", "MB", text, kind=float)
    text = "worker processes; the output does not depend on them (default: the cores of this machine)"
    option(command, "--processes", "N", text, kind=int)


def _add_shards(commands: Commands) -> None:
    shards = add_command(commands, "shards", "inspect, verify or index shards", SHARDS_EPILOG)
    actions = shards.add_subparsers(required=True, metavar="ACTION")
    data = "manifest.json, the folder of a split or of a data set, or a URL of a manifest.json"

    summary, codes = "check a split against its manifest", "exit codes: 0 no damage; 2 invalid input; 4 damaged data"
    verify = add_command(actions, "verify", summary, VERIFY_EPILOG, _shards_verify, exit_codes=codes)
    verify.add_argument("data", metavar="DATA", help=data)
    verify.add_argument("--quick", action="store_true", help="check manifest, sizes and indices only; read no shard")
    text = "worker processes; the report does not depend on them (default: the cores of this machine)"
    option(verify, "--processes", "N", text, kind=int)

    summary, epilog = "show the contents of a split, from its manifest", "example: megadistill shards info data/mine"
    info = add_command(actions, "info", summary, epilog, _shards_info)
    info.add_argument("data", metavar="DATA", help=data)

    summary = "write a manifest with its shards in a table, or as a list; its fingerprint stays the same"
    convert = add_command(actions, "convert", summary, CONVERT_EPILOG, _shards_convert)
    convert.add_argument("data", metavar="DATA", help="manifest.json, or the folder of a split or of a data set")
    text = "table: manifest.json and shards.npy, 80 bytes a shard (default); list: manifest.json alone, in JSON"
    convert.add_argument("--to", choices=("table", "list"), default="table", help=text)

    _add_shards_index(actions)


def _add_shards_index(actions: Commands) -> None:
    summary = "index WebDataset tars of tokens, or token files of another program, and write their manifest"
    again = "no manifest was written; the same command starts again, and reads no token file twice that it finished"
    index = add_command(actions, "index", summary, INDEX_EPILOG, _shards_index, on_interrupt=again)
    text = "the folder of the tars; with --format prefixes, files or folders, as the format has them; none is changed"
    index.add_argument("paths", nargs="+", metavar="PATH", help=text)
    text = "the tokenizer that made the ids: a .model, a tokenizer.json, or a folder with one"
    option(index, "--tokenizer", "PATH", text, kind=Path, required=True)
    option(index, "--split", "NAME", "name of the split in the manifest", default="train")
    text = (
        "type of ids without a header: a member of raw bytes, files of --format raw or olmo, or bytes in --format mds"
    )
    index.add_argument("--dtype", choices=("uint16", "uint32", "int32", "int64"), help=text)

    tars = index.add_argument_group("WebDataset tars")
    option(tars, "--member", "SUFFIX", "member of a sample with the tokens, such as tokens.npy or u16")

    files = index.add_argument_group("token files of another program")
    files.add_argument("--format", choices=TOKEN_FORMATS, help="the format of the files, which are read in place")
    option(files, "--sequence-length", "S", "tokens of a sequence", kind=int)
    text = "folder of the index (default: a folder below that of the files, named after them and S)"
    option(files, "--output", "DIR", text, kind=Path)
    option(files, "--column", "NAME", "column or field with the ids (default: input_ids or tokens)")
    text = """where documents begin: format: as the files tell, else behind each EOS; eos: behind each EOS; bos: at
        each BOS"""
    files.add_argument("--documents", choices=("format", "eos", "bos"), help=f"{text} (default: format)")
    option(files, "--processes", "N", "processes that read files (default: the cores of this machine)", kind=int)


def _tokenize(options: argparse.Namespace) -> None:
    from megadistill.data import tokenize
    from megadistill.progress import console_progress

    require_writable_folder(options.output, "--output")
    with console_progress() as show:
        report = tokenize(
            options.inputs,
            options.output,
            tokenizer=options.tokenizer,
            vocab_size=options.vocab_size,
            sequence_length=options.sequence_length,
            packer=options.packer,
            insert_bos=options.insert_bos,
            text_field=options.text_field,
            heldout_fraction=options.heldout_fraction,
            include=options.include or ["*"],
            exclude=options.exclude,
            shard_mb=options.shard_mb,
            processes=options.processes,
            progress=show,
        )
    say(report.heading())
    print_tables(report.table())
    for note in report.notes():
        say(note)


def _vocab_map(options: argparse.Namespace) -> None:
    from megadistill.data.prepare.id_map import make_vocab_map

    require_writable_file(options.output, "--output")
    made = make_vocab_map(options.student, options.teacher, options.output, data=options.data)
    for line in made.lines():
        say(line)
    say(
        f"{options.output}: write teacher.vocab_map: {options.output} into the recipe, or --set "
        f"teacher.vocab_map={options.output}"
    )


def _shards_verify(options: argparse.Namespace) -> int:
    from megadistill.data.prepare.verify import verify
    from megadistill.progress import console_progress

    with console_progress() as show:
        report = verify(options.data, quick=options.quick, processes=options.processes, progress=show)
    for line in report.lines():
        say(line)
    print_tables(report.table())
    return 0 if report.ok else OperatorFault.exit_code


def _shards_convert(options: argparse.Namespace) -> None:
    from megadistill.data.prepare.convert_manifest import convert

    for line in convert(options.data, to=options.to):
        say(line)


def _shards_info(options: argparse.Namespace) -> None:
    from megadistill.data.prepare.verify import info, unlisted_shards

    print_tables(*info(options.data))
    for _, line in unlisted_shards(options.data):
        say(line)


def _shards_index(options: argparse.Namespace) -> None:
    if options.format is None:
        _index_tars(options)
    else:
        _index_token_files(options)


def _index_tars(options: argparse.Namespace) -> None:
    from megadistill.data.prepare.index_external import index
    from megadistill.progress import console_progress
    from megadistill.units import number_of

    for name in ("sequence_length", "output", "column", "documents", "processes"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for token files: give their --format, or leave it out")
    if len(options.paths) > 1:
        raise UserError(f"{len(options.paths)} paths: give one folder of tars, or the --format of token files")
    folder = Path(options.paths[0])
    require_writable_folder(folder, "PATH")
    names = {name: getattr(options, name) for name in ("tokenizer", "member", "dtype", "split")}
    with console_progress() as show:
        manifest = index(folder, **names, progress=show)
    say(
        f"{folder}/manifest.json: {number_of(manifest.sequences, 'sequence')} of "
        f"{manifest.sequence_length:,} tokens in {number_of(len(manifest.shards), 'shard')}"
    )


def _index_token_files(options: argparse.Namespace) -> None:
    from megadistill.data.prepare.token_formats.index_token_files import index_token_files
    from megadistill.progress import console_progress

    if options.member is not None:
        raise UserError("--member is for tars: leave it out, or --format")
    if options.sequence_length is None:
        raise UserError(f"--format {options.format} needs --sequence-length S: the tokens of a sequence")
    with console_progress() as show:
        report = index_token_files(
            options.paths,
            format=options.format,
            sequence_length=options.sequence_length,
            tokenizer=options.tokenizer,
            dtype=options.dtype,
            column=options.column,
            documents=options.documents or "format",
            split=options.split,
            output=options.output,
            processes=options.processes,
            progress=show,
        )
    for line in report.lines():
        say(line)
