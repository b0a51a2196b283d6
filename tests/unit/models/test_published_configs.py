"""Published config.json files (published_configs.yaml): each is read as transformers reads it, or refused.

Nothing that decides what is computed is lost on the way, the stages have the parameters of the whole model, and the
counted FLOPs are those of its parameters.
"""

import functools
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Size
from torch.nn import Parameter
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig, PretrainedConfig

from megadistill.errors import UserError
from megadistill.models.families import EMBEDDING, FAMILIES, HEAD, load_config, logit_transform, refuse_as_student
from megadistill.models.flops import flops_per_token
from megadistill.models.forward.per_layer_inputs import TABLE, is_by_layer
from megadistill.models.module_names import names_here
from megadistill.models.partition import stage_decoder

PUBLISHED: dict[str, Any] = yaml.safe_load(
    Path(__file__).with_name("published_configs.yaml").read_text(encoding="utf-8")
)
MODELS: dict[str, dict[str, Any]] = PUBLISHED["models"]
DROPPED = {key for keys in PUBLISHED["dropped"].values() for key in keys}
REFUSED = [name for name, model in MODELS.items() if not model["is"].startswith("teacher")]


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config, and that of its language model."""
    return [config, config.get("text_config", config)]


def _is_known(config: dict[str, Any]) -> bool:
    """Whether the installed transformers has its classes: older ones lack some."""
    return all(each["model_type"] in CONFIG_MAPPING for each in _parts(config))


READ = [name for name, model in MODELS.items() if name not in REFUSED and _is_known(model["config"])]

QUICK = (
    *("meta-llama/Llama-3.1-8B-Instruct", "lmsys/vicuna-13b-v1.5-16k", "NousResearch/Yarn-Llama-2-7b-128k"),
    *("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-8B", "mistralai/Mistral-Nemo-Base-2407", "allenai/OLMo-2-1124-7B"),
    *("google/gemma-2-27b", "google/gemma-3-1b-pt", "google/gemma-3-4b-pt", "LGAI-EXAONE/EXAONE-4.0-32B"),
    *("microsoft/Phi-4-mini-instruct", "mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B-FP8", "openai/gpt-oss-20b"),
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4",
)
"""Models that `make test` reads; `make test-all` reads all."""

read_models = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.thorough) for name in READ]
)

OF_THE_WHOLE = ("dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
"""Keys that a multimodal model's config may have in place of its language model's."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its config.json for each model."""
    parent = tmp_path_factory.mktemp("published")
    for name, model in MODELS.items():
        (parent / name).mkdir(parents=True)
        (parent / name / "config.json").write_text(json.dumps(model["config"]), encoding="utf-8")
    return parent


@functools.cache
def _ours(folder: Path) -> PretrainedConfig:
    return load_config(folder, what="the teacher")


@functools.cache
def _theirs(folder: Path) -> PretrainedConfig:
    """The config that transformers reads, of a multimodal model that of its language model."""
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return config.get_text_config()


@read_models
def test_a_config_is_read_as_transformers_reads_it(name: str, folders: Path) -> None:
    """All that transformers reads of the file, but for the keys of `dropped`, of which no field may be."""
    ours, theirs = _ours(folders / name), _theirs(folders / name)
    is_wrapped = MODELS[name]["config"]["model_type"] != ours.model_type
    declared = {field.name for field in fields(theirs)} - {field.name for field in fields(PretrainedConfig)}
    allowed = DROPPED - declared | {"output_router_logits", *(OF_THE_WHOLE if is_wrapped else ())}
    if type(ours) is not type(theirs):  # another class of transformers that computes the same on text
        allowed |= {"architectures", "model_type", "rope_parameters", "max_window_layers"}
        rope, our_rope = theirs.rope_parameters, ours.rope_parameters
        assert {key: rope[key] for key in our_rope} == our_rope
    expected, actual = theirs.to_dict(), ours.to_dict()
    lost = [key for key in expected if expected[key] != actual.get(key) and key not in allowed]
    assert not lost, {key: (expected[key], actual.get(key)) for key in lost}
    assert logit_transform(ours) == logit_transform(theirs)


@read_models
def test_two_stages_have_the_parameters_of_the_whole_model_and_its_flops_are_counted(name: str, folders: Path) -> None:
    """Against transformers' own model of the same file, on meta."""
    ours, whole = _ours(folders / name), _whole(_theirs(folders / name))
    shapes: dict[str, Size] = {}
    for stage in range(2):
        decoder, names = stage_decoder(ours, stage=stage, stages=2)
        tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
        shapes |= {whole_name: tensors[own].shape for whole_name, own in names.items()}
    here = names_here(whole, ours.model_type)
    for name in filter(is_by_layer, shapes):  # each stage has its layers' part
        shapes[name] = whole[here[name]].shape
    head = whole[here[HEAD]]
    assert shapes | {HEAD: head.shape} == {each: whole[stored].shape for each, stored in here.items()}
    parameters = {name: whole[here[name]] for name in shapes if isinstance(whole[here[name]], Parameter)}
    used = sum(
        each.numel() - _idle(ours, name, each.shape)
        for name, each in parameters.items()
        if name not in (EMBEDDING, TABLE)
    )
    flops = flops_per_token(ours, 128)
    assert (flops.body, flops.head) == (2 * used, 2 * head.numel())
    assert flops.attention > 0


def _whole(config: PretrainedConfig) -> dict[str, Any]:
    """Name -> tensor of transformers' model: parameters, and buffers that a checkpoint has; the head tied or not."""
    with torch.device("meta"):
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return dict(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).state_dict(keep_vars=True))
        body = MODEL_MAPPING[type(config)](config).state_dict(keep_vars=True)
    return {**{f"model.{name}": tensor for name, tensor in body.items()}, HEAD: body["embed_tokens.weight"]}


def _idle(config: Any, name: str, shape: Size) -> int:
    """Numbers of the experts of a layer that a token does not go through."""
    if ".experts." not in name:
        return 0
    return shape.numel() // shape[0] * (shape[0] - int(config.num_experts_per_tok))


@read_models
def test_who_can_only_teach_is_no_student(name: str, folders: Path) -> None:
    config = _ours(folders / name)
    if MODELS[name]["is"] == "teacher":
        with pytest.raises(UserError, match=f"student.config: a {config.model_type} model can only teach: "):
            refuse_as_student(config, "student.config")
    else:
        refuse_as_student(config, "student.config")


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_config_is_refused_in_one_line(name: str, folders: Path) -> None:
    with pytest.raises(UserError, match=re.escape(MODELS[name]["is"])) as error:
        load_config(folders / name, what="the teacher")
    assert "\n" not in str(error.value)


def test_the_table_has_twenty_families_and_no_idle_key() -> None:
    families = {_parts(MODELS[name]["config"])[-1]["model_type"] for name in READ} & set(FAMILIES)
    assert set(QUICK) <= set(READ)
    assert len(families) >= 20, sorted(families)
    assert {MODELS[name]["is"] for name in READ} == {"teacher", "teacher and student"}
    written = {key for model in MODELS.values() for each in _parts(model["config"]) for key in each}
    assert not DROPPED - written, "no file of the table has these keys"
