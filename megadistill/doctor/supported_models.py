"""The models that can teach and learn, from the table of families, and a folder of one in a table."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from rich.table import Table

from megadistill.models.attention.choice import has_sdpa, has_sinks
from megadistill.models.attention.masks import INDEXED_KINDS
from megadistill.models.families import FAMILIES, Family, load_config
from megadistill.models.flops import parameter_counts
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.models.model_keys import config_class_of
from megadistill.models.multimodal.wrappers import NOT_READ, WRAPPERS, Wrapper
from megadistill.models.quantized.layout import FORMS
from megadistill.models.weights import check_weights
from megadistill.units import count

PREFACE = """\
# Models

`megadistill models --markdown` writes this page from the table of families, and a test compares the two. `megadistill
models` shows the table in a terminal, and `megadistill models FOLDER` says what a folder holds, or why it is refused.

## Start from the model that you have

A teacher is a Hugging Face folder: `config.json`, safetensors, a tokenizer. Five commands from there to a student:

    hf download HuggingFaceTB/SmolLM2-135M --local-dir models/teacher
    megadistill models models/teacher
    megadistill tokenize ~/text --include '*.txt' --tokenizer models/teacher \\
        --sequence-length 128 --heldout-fraction 0.05 --output data/mine
    megadistill train mine.yaml
    megadistill export runs/mine --output models/student

`mine.yaml` is the recipe of the [quickstart](../README.md#quickstart-your-teacher-your-text); `megadistill init work`
writes a longer one. Tokens of Megatron, OLMo-core, Mosaic or `datasets` are read where they lie, without `tokenize`:
[data](data.md). The first command is another one where the model is no folder of the hub:

| your model | what makes the folder |
|---|---|
| a Hugging Face folder, also quantised (see below) | nothing: name it in place of `models/teacher` |
| Megatron-LM | of Megatron Bridge: `AutoBridge.from_hf_pretrained(NAME).export_ckpt(CHECKPOINT, FOLDER)` |
| NeMo 2 | `nemo.collections.llm.export_ckpt(path=CHECKPOINT, target="hf", output_path=FOLDER)` |
| OLMo-core | `src/examples/huggingface/convert_checkpoint_to_hf.py -i CHECKPOINT -o FOLDER` of its repository |
| an adapter of PEFT | `PeftModel.from_pretrained(MODEL, ADAPTER).merge_and_unload().save_pretrained(FOLDER)` |
| pickled weights (`.bin`) | `AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(FOLDER)` |
| a GGUF file | `megadistill.models.gguf.convert_gguf(FILE, FOLDER)`, as in `recipes/smollm2.yaml` |

The programs of the second to sixth line are those of the other projects; none of them has been run by a test here. The
tokenizer must be in the folder, too. A student's export is a folder of the same kind ([export](export.md)).

## Families

`model_type` of a `config.json`. Every one is tested as a teacher: cut into stages, it gives what the whole model of
transformers gives, and its parameters and FLOPs are counted from that model. A student is also tested under ZeRO-3,
loss and gradients against a dense process, and its export is loaded by transformers. `tests/unit/models` has a table of
`config.json` files as they are published, which are read as transformers reads them. Any other family is refused.

"""

QUANTISED_PREFACE = """\
## Quantised weights

A teacher of any of these families, and the weights that a student begins with, may be stored in one of these forms.
They are read one tensor at a time, as numbers in the run's precision ([teacher](teacher.md)); tests compare them with
what transformers or the form's own library makes of them.

| `quant_method` | what is read |
|---|---|
"""

WRAPPED_PREFACE = """\
## Models with images or sound

Of a folder of these, the language model is read, by the names of its tensors; what reads images and sound is left out.

| `model_type` of the folder | family of its language model |
|---|---|
"""

NOT_READ_PREFACE = """\
## Refused for a reason

| `model_type` | reason |
|---|---|
"""

PUBLISHED: Final[Mapping[str, str]] = {
    "apertus": "Apertus",
    "arcee": "AFM",
    "cohere": "Command R, R+",
    "cohere2": "Command R7B, Command A",
    "cwm": "CWM",
    "deepseek_v3": "DeepSeek V3, R1, Kimi K2",
    "deepseek_v32": "DeepSeek V3.2",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B and 300B",
    "exaone4": "EXAONE 4.0",
    "falcon_h1": "Falcon-H1",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M and 1B",
    "gemma3n_text": "Gemma 3n, without its images and sound",
    "gemma4_text": "Gemma 4, without its images and sound",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4 0414",
    "glm4_moe": "GLM-4.5, 4.6, 4.7",
    "glm_moe_dsa": "GLM 5",
    "gpt_neox": "Pythia, GPT-NeoX",
    "gpt_oss": "gpt-oss",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 1B and 3B A800M",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "llama": "Llama 2, 3, 3.1, 3.2, 3.3, SmolLM 2, Yi, DeepSeek LLM",
    "llama4_text": "Llama 4 Scout and Maverick, without their images",
    "ministral": "Ministral 8B 2410, saved by transformers 5",
    "ministral3": "Ministral 3, without its images",
    "mistral": "Mistral 7B, Nemo, Small",
    "mixtral": "Mixtral",
    "nemotron_h": "Nemotron-H, Nemotron Nano 2 and 3",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "phi3": "Phi-3, Phi-3.5, Phi-4",
    "qwen2": "Qwen 2, Qwen 2.5",
    "qwen2_moe": "Qwen 1.5 MoE, Qwen 2 57B-A14B",
    "qwen3": "Qwen 3 0.6B to 32B",
    "qwen3_5_moe_text": "Qwen 3.5 35B-A3B to 397B-A17B",
    "qwen3_5_text": "Qwen 3.5 0.8B to 27B",
    "qwen3_moe": "Qwen 3 30B-A3B, 235B-A22B, Coder",
    "qwen3_next": "Qwen 3 Next",
    "seed_oss": "Seed-OSS",
    "smollm3": "SmolLM 3",
    "starcoder2": "StarCoder 2",
}
"""Family -> names under which people know its models."""

_WITH_ATTENTION: Final = ("hybrid", *INDEXED_KINDS)
"""Entries of a config's `layer_types` for layers with attention, beside those with windows."""

_LINEAR: Final = "linear_attention"
"""Entry of a config's `layer_types` for layers with a state: of a gated delta rule, or of Mamba."""


@dataclass(frozen=True)
class SupportedFamily:
    """A line of the list."""

    model_type: str
    published: str
    """Names of its models."""
    student: str
    """`yes`, or why it can only teach."""
    prune: str
    """`yes`, or why there is no rule for it."""
    attention: str
    """Kinds of its layers, and what else its attention has."""


def supported_families() -> list[SupportedFamily]:
    """Every family, by name."""
    return [
        SupportedFamily(
            model_type=name,
            published=PUBLISHED.get(name, ""),
            student=_as_student(each),
            prune=f"no: {each.unpruned}" if each.unpruned else "no: experts" if each.experts is not None else "yes",
            attention=attention_kinds(name),
        )
        for name, each in sorted(FAMILIES.items())
    ]


def _as_student(family: Family) -> str:
    if family.teacher_only:
        return f"no: {family.teacher_only}"
    keys = ", ".join(f"`{key}`" for key, _ in family.teacher_only_with)
    return f"yes, but not with {keys}, with which it can only teach" if keys else "yes"


def attention_kinds(model_type: str) -> str:
    """The kinds of attention that a family's layers may have, and what else decides its attention."""
    each, config = FAMILIES[model_type], config_class_of(model_type)
    keys = {field.name for field in fields(config)}
    kinds = {
        "latent" if "kv_lora_rank" in keys else "full": bool(
            {"full_attention", *_WITH_ATTENTION} & {*each.layer_kinds}
        ),
        "windows": "sliding_attention" in each.layer_kinds and "sliding_window" in keys,
        "chunks": "chunked_attention" in each.layer_kinds,
        "keys that an indexer chooses": "index_topk" in keys,
        "Mamba" if keys & {"ssm_state_size", "mamba_d_state"} else "gated delta rule": bool(
            {_LINEAR, "hybrid"} & {*each.layer_kinds}
        ),
        "softcapped scores": not has_sdpa(config) and not has_sinks(config),
        "sinks": has_sinks(config),
        "a part of a head turned": each.partial_rope,
        "no rope on some layers": "no_rope_layers" in each.by_layer,
    }
    return ", ".join(name for name, has in kinds.items() if has)


def markdown() -> str:
    """The page docs/models.md."""
    page = [PREFACE, "| family | its models | teacher | student | `prune` | attention |\n|---|---|---|---|---|---|\n"]
    reasons: dict[str, int] = {}

    def cell(answer: str) -> str:
        short, colon, reason = answer.partition(": ") if answer.startswith("no: ") else answer.partition(", but ")
        return f"{short} ({reasons.setdefault(reason, len(reasons) + 1)})" if colon else answer

    for line in supported_families():
        answers = ("yes", cell(line.student), cell(line.prune))
        page.append(f"| `{line.model_type}` | {line.published} | {' | '.join(answers)} | {line.attention} |\n")
    page += ["\n", *(f"{number}. {reason}\n" for reason, number in reasons.items())]
    page += ["\n", QUANTISED_PREFACE, *(f"| `{method}` | {read} |\n" for method, read in FORMS.items())]
    page += ["\n", WRAPPED_PREFACE]
    page += [f"| `{name}` | {_language_model(wrapper)} |\n" for name, wrapper in sorted(WRAPPERS.items())]
    page += ["\n", NOT_READ_PREFACE, *(f"| `{name}` | {reason} |\n" for name, reason in sorted(NOT_READ.items()))]
    return "".join(page)


def _language_model(wrapper: Wrapper) -> str:
    name = f"`{wrapper.family or wrapper.text_type}`"
    return f"{name}, or another one that its config names" if wrapper.any_type else name


def table() -> Table:
    """The families, for a terminal."""
    table = Table(title="supported models", title_justify="left", show_lines=True)
    for heading in ("family", "its models", "student", "prune", "attention"):
        table.add_column(heading)
    for line in supported_families():
        student = "yes, in part" if line.student.startswith("yes, but") else line.student
        table.add_row(line.model_type, line.published, student, line.prune, line.attention)
    table.caption = "Every family can be a teacher."
    return table


def folder_table(folder: Path) -> Table:
    """The content of a model's folder, checked as a run checks it, by the headers of its files.

    Raises:
        UserError: why it cannot be read.
    """
    what = f"the folder {folder}"
    config = load_config(folder, what=what)
    check_weights(folder, config)
    line = next(each for each in supported_families() if each.model_type == config.model_type)
    counts, form = parameter_counts(config), SafetensorsFolder(folder).quantisation
    active = counts.active_body + counts.embedding + counts.head
    rows = {
        "family": config.model_type,
        "teacher": "yes",
        "student": line.student,
        "prune": line.prune,
        "parameters": count(counts.total) + (f", {count(active)} active" if active < counts.total else ""),
        "layers": f"{config.num_hidden_layers} of width {config.hidden_size:,}",
        "attention": line.attention,
        "rows of the embedding": f"{config.vocab_size:,}",
        "positions": f"{config.max_position_embeddings:,}",
        "weights": "floating point" if form is None else form.format,
    }
    table = Table(title=str(folder), title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table
