"""Whether transformers' `AutoTokenizer` reads a tokenizer.json beside a config by its own rules."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from megadistill.data.tokenizers.folder_files import TOKENIZER_FILE
from megadistill.data.tokenizers.token_table import SAMPLE_TEXTS


def auto_tokenizer_differs(files: Mapping[str, Path], *, model_type: str) -> bool:
    """Whether a folder with these files and a config of `model_type` gives other ids than its tokenizer.json.

    For some families (qwen2) transformers replaces the rules that split words and digits by those of the family.
    A tokenizer that cannot be read has no ids to compare: False. `files`: the tokenizer's, by their names.
    """
    if TOKENIZER_FILE not in files:
        return False
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, Path(folder) / name)
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        try:
            own = Backend.from_file(str(files[TOKENIZER_FILE]))
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception:  # the libraries raise nothing more special; another message names an unreadable tokenizer
            return False
        return any(
            loaded(text, add_special_tokens=False).input_ids != own.encode(text, add_special_tokens=False).ids
            for text in SAMPLE_TEXTS
        )
