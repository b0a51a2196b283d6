"""First values out of a folder: any range of any parameter is what transformers loads, and another model is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.errors import UserError
from megadistill.models.families import EMBEDDING, HEAD, load_config
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.models.initial_weights import InitialWeights, check_initial_weights
from tests.unit.models.cases import CASES, SIZES, VOCAB, saved_model

PADDED = 256
PIECES = 7
"""Ranks that share a parameter: few of its rows, or experts, begin where a piece does."""


def _padded(name: str, parameter: torch.Tensor) -> torch.Tensor:
    rows = PADDED if name in (EMBEDDING, HEAD) else parameter.shape[0]
    whole = torch.zeros(rows, *parameter.shape[1:])
    whole[: parameter.shape[0]] = parameter
    return whole


def _require_equal(folder: Path, model: Any) -> None:
    weights = InitialWeights(folder, load_config(folder, what="test"), vocab_size=VOCAB)
    for name, parameter in model.named_parameters():
        expected = _padded(name, parameter.detach())
        length = -(-expected.numel() // PIECES)
        ends = [(start, min(start + length, expected.numel())) for start in range(0, expected.numel(), length)]
        read = [weights.read(name, expected.shape, start, stop) for start, stop in ends]
        assert all(piece.dtype == torch.float32 for piece in read)
        assert torch.equal(torch.cat(read), expected.flatten()), name
        assert weights.read(name, expected.shape, 3, 3).numel() == 0


@pytest.mark.parametrize("case", ["llama-tied", "gemma2", "mixtral", "qwen3_moe", "olmo2"])
def test_pieces_are_what_transformers_has(case: str, tmp_path: Path) -> None:
    _require_equal(tmp_path, saved_model(case, tmp_path, shard_size="30KB"))


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    saved_model("llama", tmp_path / "wide").to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    _require_equal(tmp_path / "narrow", model)


def test_only_the_rows_around_a_piece_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_model("mixtral", tmp_path)
    weights = InitialWeights(tmp_path, load_config(tmp_path, what="test"), vocab_size=VOCAB)
    reads: list[tuple[str, Any]] = []
    read = SafetensorsFolder.rows

    def rows(self: SafetensorsFolder, name: str, ranges: Any) -> torch.Tensor:
        reads.append((name.removeprefix("model.layers.0.block_sparse_moe.experts."), ranges))
        return read(self, name, ranges)

    monkeypatch.setattr(SafetensorsFolder, "rows", rows)
    # gate and up of an expert are 96 rows of 64 each: from row 95 of expert 0's up to row 1 of expert 1's gate
    weights.read("model.layers.0.mlp.experts.gate_up_proj", (4, 192, 64), 191 * 64 + 5, 193 * 64 + 1)
    assert reads == [("0.w3.weight", [(95, 96)]), ("1.w1.weight", [(0, 2)])]


def test_rows_beyond_the_datas_vocabulary_stay_out(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path)
    config = load_config(tmp_path, what="test")
    check_initial_weights(tmp_path, config, vocab_size=VOCAB - 9)
    weights = InitialWeights(tmp_path, config, vocab_size=VOCAB - 9)
    values = weights.read(EMBEDDING, (PADDED, 64), 0, PADDED * 64).view(PADDED, 64)
    assert torch.equal(values[: VOCAB - 9], model.get_parameter(EMBEDDING)[: VOCAB - 9])
    assert not values[VOCAB - 9 :].any()


@pytest.mark.parametrize("case", CASES)
def test_the_same_model_in_a_recipes_words_is_no_other(case: str, tmp_path: Path) -> None:
    saved_model(case, tmp_path)
    inline = load_config({**CASES[case], "initializer_range": 0.02}, what="test")
    check_initial_weights(tmp_path, inline, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 32}, ["hidden_size is 64 there, 32 here"]),
        ({"intermediate_size": 64}, ["intermediate_size is 96 there, 64 here"]),
        ({"num_attention_heads": 8, "head_dim": 16}, ["num_attention_heads is 4 there, 8 here"]),
        ({"head_dim": 8, "num_hidden_layers": 2}, ["head_dim is 16 there, 8 here", "num_hidden_layers is 5 there"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings is False there, True here"]),
        ({"rope_theta": 7e5}, ["rope_parameters", "500000", "700000"]),
        ({"rms_norm_eps": 1e-5}, ["rms_norm_eps is 1e-06 there, 1e-05 here"]),
        ({"model_type": "mistral"}, ["model_type is llama there, mistral here"]),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], says: list[str], tmp_path: Path) -> None:
    """Those of the same shapes, too: they would be read without a word, and compute something else."""
    saved_model("llama", tmp_path)
    other = load_config({**CASES["llama"], **changes}, what="test")
    with pytest.raises(UserError) as caught:
        check_initial_weights(tmp_path, other, vocab_size=VOCAB)
    assert "\n" not in str(caught.value)
    for part in ["student.weights", str(tmp_path), *says]:
        assert part in str(caught.value)


def test_a_smaller_vocabulary_is_refused(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    with pytest.raises(UserError, match=f"{VOCAB} ids, the shards were made with {VOCAB + 1}"):
        check_initial_weights(tmp_path, load_config({"model_type": "llama", **SIZES, "rope_theta": 5e5}, what="test"),
                               vocab_size=VOCAB + 1)  # fmt: skip
