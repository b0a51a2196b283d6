"""Names of modules: GPT-NeoX's are those of every other family here, and its own in a folder."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadistill.errors import UserError
from megadistill.models.families import EMBEDDING, HEAD, build_decoder, load_config, parameter_shapes
from megadistill.models.hf_folder import SINGLE_FILE, SafetensorsFolder
from megadistill.models.module_names import names_here, stored_name
from megadistill.models.weights import check_weights, load_pretrained
from tests.unit.models.cases import ALL_CASES, VOCAB, saved_model

CPU = torch.device("cpu")


def test_names_are_translated_there_and_back() -> None:
    ours = list(parameter_shapes(load_config(ALL_CASES["gpt_neox"], what="test")))
    assert {EMBEDDING, HEAD, "model.norm.bias", "model.layers.4.self_attn.dense.bias"} <= set(ours)
    stored = [stored_name(name, "gpt_neox") for name in ours]
    assert {"gpt_neox.embed_in.weight", "embed_out.weight", "gpt_neox.layers.4.attention.dense.bias"} <= set(stored)
    assert names_here(stored, "gpt_neox") == dict(zip(ours, stored, strict=True))
    assert stored_name(HEAD, "llama") == HEAD


def test_a_published_folder_with_masks_and_either_name_of_the_head_is_read(tmp_path: Path) -> None:
    model = saved_model("gpt_neox", tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    head = next(name for name in ("embed_out.weight", "lm_head.weight") if name in tensors)
    masks = {"attention.bias": torch.ones(1, 1, 8, 8), "attention.masked_bias": torch.tensor(-1e9)}
    for name in ("embed_out.weight", "lm_head.weight"):
        tensors |= {f"gpt_neox.layers.0.{mask}": values for mask, values in masks.items()}
        tensors[name] = tensors.pop(head)
        head = name
        save_file(tensors, tmp_path / SINGLE_FILE)
        check_weights(tmp_path, load_config(tmp_path, what="test"))
        assert torch.equal(next(SafetensorsFolder(tmp_path).tensors([HEAD])), model.get_output_embeddings().weight)
    tokens = torch.randint(VOCAB, (2, 9))
    ours = load_pretrained(tmp_path, what="test", device=CPU)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, model(tokens).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens, **greedy), model.generate(tokens, **greedy))


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    """Which of them was read would be chance."""
    saved_model("gpt_neox", tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    heads = ("embed_out.weight", "lm_head.weight")
    (head,) = (tensors[name] for name in heads if name in tensors)
    save_file({**tensors, heads[0]: head, heads[1]: 2 * head}, tmp_path / SINGLE_FILE)
    with pytest.raises(UserError, match=r"has both 'embed_out\.weight' and 'lm_head\.weight', which are the same"):
        SafetensorsFolder(tmp_path)


def test_a_part_of_the_model_has_the_names_of_all_families() -> None:
    part = build_decoder(load_config(ALL_CASES["gpt_neox"], what="test"), layers=range(1, 3))
    names = {name.split(".")[0] for name, _ in part.named_parameters()}
    assert names == {"embed_tokens", "layers", "norm"}
    assert part.layers[0].self_attn is part.layers[0].attention
