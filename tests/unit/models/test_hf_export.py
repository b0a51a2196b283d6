"""Export: what transformers loads back is the model, without padding, whole or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megadistill.errors import UserError
from megadistill.models.families import EMBEDDING, HEAD, load_config, stored_buffers
from megadistill.models.hf_export import ExportedTokenizer, NamedReader, export_model
from megadistill.models.hf_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from megadistill.models.module_names import names_here
from tests.unit.models.cases import ALL_CASES, CASES, QUICK, VOCAB, all_cases, whole_model

PADDED = 256
MANY, ONE = 50_000, 10**9


def _padded(tensor: Tensor, name: str) -> Tensor:
    return (
        torch.nn.functional.pad(tensor, (0, 0, 0, PADDED - VOCAB), value=9.0) if name in (EMBEDDING, HEAD) else tensor
    )


def _readers(model: Any, read: Callable[[str], None] = lambda name: None) -> list[NamedReader]:
    """Readers like the training model's: the vocabulary padded, and the tied head under its own name as well."""

    def reader(name: str, tensor: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            read(name)
            return tensor

        return call

    state = {name: tensor for name, tensor in model.state_dict().items() if name not in stored_buffers(model)}
    names = names_here(state, model.config.model_type)
    padded = {name: _padded(state[theirs], name) for name, theirs in names.items()}
    return [(name, tensor.shape, reader(name, tensor)) for name, tensor in padded.items()]


def _export(folder: Path, case: str, tensors: list[NamedReader], **options: Any) -> None:
    defaults: dict[str, Any] = {
        "config": load_config(ALL_CASES[case] | {"vocab_size": PADDED}, what="test"),
        "dtype": torch.float32,
        "true_vocab": VOCAB,
        "max_shard_bytes": MANY,
        "tokenizer": None,
    }
    export_model(folder, tensors=tensors, **(defaults | options))


@pytest.mark.parametrize("case", all_cases(*QUICK, students=True))
@pytest.mark.parametrize("shard", [MANY, ONE])
def test_transformers_loads_the_same_model_without_padding(case: str, shard: int, tmp_path: Path) -> None:
    model = whole_model(case)
    _export(tmp_path / "out", case, _readers(model), max_shard_bytes=shard)
    attention = model.config._attn_implementation  # which transformers 5.17 takes no note of in Gemma 2's folder
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation=attention
    )
    assert not any(info.values()), info
    assert loaded.config.vocab_size == loaded.lm_head.weight.shape[0] == VOCAB
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert loaded.config.architectures == [type(model).__name__]
    tokens = torch.randint(VOCAB, (2, 20))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    stored = SafetensorsFolder(tmp_path / "out")
    assert (HEAD in stored.names) != model.config.tie_word_embeddings


TURNED = {"gpt_neox": ("rotary_pct", 0.5), "cohere2": ("rotary_pct", 1.0), "glm4": ("partial_rotary_factor", 0.5)}
"""Family -> the key of its published configs for the part of a head that is turned, and its value in the case."""


@pytest.mark.parametrize("case", TURNED)
def test_other_readers_find_the_turned_part_of_a_head_under_its_published_key(case: str, tmp_path: Path) -> None:
    if case not in ALL_CASES:
        pytest.skip(f"this transformers has no {case}")
    config = load_config(ALL_CASES[case], what="test")
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    _export(tmp_path / "out", case, _readers(whole_model(case)))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    key, expected = TURNED[case]
    assert (written[key], factor) == (expected, expected)
    again = load_config(tmp_path / "out", what="test")
    assert again.rope_parameters.get("partial_rotary_factor", 1.0) == factor


def test_other_readers_find_gemma_4s_wider_heads_under_their_published_keys(tmp_path: Path) -> None:
    if "gemma4" not in ALL_CASES:
        pytest.skip("this transformers has no gemma4")
    _export(tmp_path / "out", "gemma4", _readers(whole_model("gemma4")))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["global_head_dim"], written["num_global_key_value_heads"]) == (32, 1)
    by_kind = {key: value for key, value in written.items() if key != "per_layer_config"}
    again = AutoConfig.for_model(**by_kind)
    assert [layer.head_dim for layer in again.per_layer_config] == [16, 32, 16, 16, 32]
    assert [layer.num_key_value_heads for layer in again.per_layer_config] == [2, 1, 2, 2, 1]


def test_the_files_are_shards_with_an_index_or_one_file_and_nothing_is_left_beside_them(tmp_path: Path) -> None:
    model = whole_model("llama")
    _export(tmp_path / "many", "llama", _readers(model))
    _export(tmp_path / "one", "llama", _readers(model), max_shard_bytes=ONE, dtype=torch.bfloat16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]
    index = json.loads((tmp_path / "many" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(parameter.numel() * 4 for parameter in model.parameters())
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    for path in (tmp_path / "many").glob("*.safetensors"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= MANY
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"README.md", SINGLE_FILE, "config.json"}
    assert {tensor.dtype for tensor in load_file(tmp_path / "one" / SINGLE_FILE).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "one" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "250" in (tmp_path / "one" / "README.md").read_text()


def test_a_tensor_is_read_once_and_only_when_its_shard_is_written(tmp_path: Path) -> None:
    reads: list[tuple[str, int]] = []
    parent = tmp_path / "runs"

    def note(name: str) -> None:
        reads.append((name, len(list(parent.rglob("*.safetensors")))))

    _export(parent / "out", "llama", _readers(whole_model("llama"), note))
    files = SafetensorsFolder(parent / "out")
    assert sorted(name for name, _ in reads) == files.names
    shards = len(list((parent / "out").glob("*.safetensors")))
    assert {written for _, written in reads} == set(range(shards)), "each shard is on disk before the next is read"


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    pieces, template = tmp_path / "pieces", tmp_path / "template"
    ids = {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": None}
    with pytest.raises(UserError, match="tokenizer to export has no files"):
        _export(tmp_path / "out", "llama", _readers(whole_model("llama")), tokenizer=ExportedTokenizer({}, ids))
    assert not (tmp_path / "out").exists()
    pieces.write_bytes(b"pieces")
    template.write_text("{{ messages }}")
    files = {"tokenizer.model": pieces, "additional_chat_templates/tools.jinja": template}
    tokenizer = ExportedTokenizer(files, {**ids, "temperature": 0.6})
    _export(tmp_path / "out", "llama", _readers(whole_model("llama")), tokenizer=tokenizer)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: getattr(model.config, name) for name in ids} == ids
    assert {name: getattr(model.generation_config, name) for name in ids} == ids
    assert model.generation_config.temperature == 0.6


def test_a_padding_id_without_a_row_is_left_out(tmp_path: Path) -> None:
    config = load_config({**CASES["llama"], "vocab_size": PADDED, "pad_token_id": VOCAB}, what="test")
    tensors = _readers(whole_model("llama"))
    _export(tmp_path / "out", "llama", tensors, config=config)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.pad_token_id is None


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        _export(tmp_path / "out", "llama", _readers(whole_model("llama")))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(name: str) -> None:
        if name == "model.norm.weight":
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _export(tmp_path / "out", "llama", _readers(whole_model("llama"), fail))
    assert list(tmp_path.iterdir()) == []


def _without(tensors: list[NamedReader]) -> list[NamedReader]:
    return [tensor for tensor in tensors if tensor[0] != "model.norm.weight"]


def _with_another(tensors: list[NamedReader]) -> list[NamedReader]:
    return [*tensors, ("model.layers.5.mlp.up_proj.weight", (96, 64), tensors[0][2])]


def _twice(tensors: list[NamedReader]) -> list[NamedReader]:
    return [*tensors, tensors[0]]


def _wrong_shape(tensors: list[NamedReader]) -> list[NamedReader]:
    return [(name, (32,) if name == "model.norm.weight" else shape, read) for name, shape, read in tensors]


def _short_vocabulary(tensors: list[NamedReader]) -> list[NamedReader]:
    return [(name, (249, 64) if name == HEAD else shape, read) for name, shape, read in tensors]


@pytest.mark.parametrize("change", [_without, _with_another, _twice, _wrong_shape, _short_vocabulary])
def test_tensors_of_another_model_are_refused(
    change: Callable[[list[NamedReader]], list[NamedReader]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="export"):
        _export(tmp_path / "out", "llama", change(_readers(whole_model("llama"))))
    assert list(tmp_path.iterdir()) == []
