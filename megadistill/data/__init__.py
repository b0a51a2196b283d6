"""The token stream: text to shards, shards to batches. It knows no models, no ranks' groups, no recipe.

`tokenize` writes a data set, `Manifest` describes one of its splits, `TokenStream` reads it.
"""

from megadistill.data.shards import Manifest, ShardFault
from megadistill.data.stream import TokenStream
from megadistill.data.tokenize import TokenizeReport, tokenize

__all__ = ["Manifest", "ShardFault", "TokenStream", "TokenizeReport", "tokenize"]
