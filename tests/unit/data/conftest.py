"""One small data set for the tests of this folder: the standard library's own email package."""

import sysconfig
from pathlib import Path

import pytest

from megadistill.data import Manifest, TokenizeReport, tokenize

SEQUENCE = 64
VOCAB = 600
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def run_tokenize(output: Path) -> TokenizeReport:
    return tokenize(
        [STDLIB / "email"],
        output,
        tokenizer=None,
        vocab_size=VOCAB,
        sequence_length=SEQUENCE,
        heldout_fraction=0.2,
        include=["*.py"],
        shard_mb=0.06,
        progress=lambda stage, **numbers: None,
    )


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds train/, heldout/ and tokenizer/. Not to be written to."""
    output = tmp_path_factory.mktemp("data") / "set"
    run_tokenize(output)
    return output


@pytest.fixture(scope="session")
def manifest(data_set: Path) -> Manifest:
    return Manifest.load(data_set / "train" / "manifest.json")
