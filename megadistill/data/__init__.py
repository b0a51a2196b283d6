"""The data: text to shards, shards to a token stream, and stored targets.

`tokenize` writes a data set, `Manifest` describes one of its splits, `Mixture` joins splits, `TokenStream` reads them.
"""

from megadistill.data.prepare.tokenize import tokenize
from megadistill.data.prepare.tokenize_report import TokenizeReport
from megadistill.data.shards.manifest import Manifest
from megadistill.data.shards.opening import ShardFault
from megadistill.data.stream.missing_bos import missing_bos
from megadistill.data.stream.mixture import Mixture
from megadistill.data.stream.stream import TokenStream
from megadistill.data.tokenizers.model_tokenizer import tokenizer_difference
from megadistill.data.tokenizers.occurring_ids import missing_rows
from megadistill.data.tokenizers.tokenizer import tokenizer_sha256
from megadistill.data.tokenizers.tokenizer_file import no_tokenizer_files, tokenizer_files

__all__ = [
    "Manifest",
    "Mixture",
    "ShardFault",
    "TokenStream",
    "TokenizeReport",
    "missing_bos",
    "missing_rows",
    "no_tokenizer_files",
    "tokenize",
    "tokenizer_difference",
    "tokenizer_files",
    "tokenizer_sha256",
]
