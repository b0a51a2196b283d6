"""The formats of token files that `shards index` reads in place."""

from typing import Final

from megadistill.data.prepare.token_formats.arrow import ARROW
from megadistill.data.prepare.token_formats.flat_files import OLMO, RAW
from megadistill.data.prepare.token_formats.mds import MDS
from megadistill.data.prepare.token_formats.megatron_files import MEGATRON
from megadistill.data.prepare.token_formats.parquet import PARQUET
from megadistill.data.prepare.token_formats.token_scan import TokenFormat
from megadistill.data.shards.manifest import TokenFormatName

FORMATS: Final[dict[TokenFormatName, TokenFormat]] = {
    each.name: each for each in (MEGATRON, OLMO, RAW, MDS, ARROW, PARQUET)
}
