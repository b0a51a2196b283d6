"""The model card of an exported student, from the records of its run."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from megadistill import __version__
from megadistill.config import LossSection, Recipe, ScheduleSection
from megadistill.data import tokenizer_sha256
from megadistill.errors import UserError
from megadistill.events import read_lines
from megadistill.export.data_provenance import DataProvenance
from megadistill.export.markdown import Rows, basename, escape_md, rows_table, table
from megadistill.export.results import results_section
from megadistill.io import read_json
from megadistill.models.families import load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.flops import flops_per_token, parameter_counts
from megadistill.student.optimizer import describe
from megadistill.train.checkpoint.format import Checkpoint
from megadistill.train.setup.run_folder import TOKENIZER_FOLDER

TARGETS = {
    "sampled": "counts of {draws} draws from its distribution",
    "top_k": "its {k} most likely ids",
    "threshold": "ids to which it gives at least {epsilon}",
    "top_p": "its most likely ids, up to {p} of the probability and {max_ids} ids",
}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """Origin of an exported model."""

    checkpoint: Checkpoint
    recipe: Recipe
    run: Path | None
    """The run folder; None for a checkpoint outside of one."""
    config: Any
    """Config of the exported student."""

    @property
    def provenance(self) -> DataProvenance:
        return DataProvenance.of(self.checkpoint.manifest, self.recipe)


def model_card(name: str, origin: Origin) -> str:
    """README.md of the folder `name`: metadata for the Hugging Face hub, and the model's data, teacher and training."""
    provenance = origin.provenance
    results = results_section(origin.run, origin.checkpoint.manifest.step) if origin.run is not None else ""
    sections = {
        "How to load it": _loading(name, with_tokenizer=origin.run is not None),
        "What it was trained on": f"{_sources(provenance)}\n\n{rows_table(_stream(origin, provenance))}",
        "How it was trained": rows_table(_training(origin, provenance)),
        "The teacher": rows_table(_teacher(origin.recipe, provenance)),
        "The model": rows_table(_model(origin.config)),
        "The checkpoint": rows_table(_checkpoint(origin)),
        "Results": results,
        "Limits": _limits(origin.recipe),
    }
    if origin.recipe.teacher is None:
        del sections["The teacher"]
    parts = [f"---\n{_metadata(origin.recipe)}\n---", f"# {escape_md(name)}", _introduction(origin)]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def _metadata(recipe: Recipe) -> str:
    """The hub's metadata. `base_model` is the model whose weights were trained further: a teacher is none."""
    tags = ["megadistill", *(["distillation"] if recipe.objective == "distill" else [])]
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=tags, base_model=_base_model(recipe)
    )
    return data.to_yaml().strip()


def _base_model(recipe: Recipe) -> str | None:
    """The `base_model` of the card in the folder of `student.weights`, where it has one."""
    if recipe.student.weights is None:
        return None
    try:
        name = (metadata_load(Path(recipe.student.weights) / "README.md") or {}).get("base_model")
    except (OSError, ValueError, AttributeError, YAMLError):
        return None
    return name if isinstance(name, str) and HUB_NAME.fullmatch(name) else None


def _introduction(origin: Origin) -> str:
    recipe, tokens = origin.recipe, origin.checkpoint.manifest.tokens
    what = f"{origin.config.architectures[0]} of {parameter_counts(origin.config).total:,} parameters"
    if recipe.student.weights is not None:
        what += f", initialised from the weights of {basename(recipe.student.weights)}"
    made = f"Made by megadistill {__version__}."
    if recipe.teacher is None:
        return f"A {what}, pretrained from labels on {tokens:,} tokens. {made}"
    teacher = f", {basename(recipe.teacher.path)}," if recipe.teacher.path else ""
    return (
        f"A {what}, pretrained by distillation: at each of {tokens:,} tokens it learned from the next-token "
        f"distribution of a teacher{teacher} that read the same text. {made}"
    )


def _loading(name: str, *, with_tokenizer: bool) -> str:
    classes = ["AutoModelForCausalLM", "AutoTokenizer"] if with_tokenizer else ["AutoModelForCausalLM"]
    variables = zip(("model", "tokenizer"), classes, strict=False)
    lines = [f"{variable} = {each}.from_pretrained({json.dumps(name)})" for variable, each in variables]
    return "\n".join(["```python", f"from transformers import {', '.join(classes)}", "", *lines, "```"])


def _sources(provenance: DataProvenance) -> str:
    """A row for each source; without the columns that need a manifest where none is at hand."""
    rows = [["source", "sequences", "tokens", "manifest sha256", "epochs", "documents", "text bytes"]]
    for source in provenance.sources:
        manifest, tokens = source.manifest, f"{source.sequences * provenance.sequence_length:,}"
        rows.append([escape_md(source.name), f"{source.sequences:,}", tokens, f"`{source.fingerprint}`", "", "", ""])
        if manifest is not None:
            counts = ("" if count is None else f"{count:,}" for count in (manifest.documents, manifest.text_bytes))
            rows[-1][-3:] = f"{source.sequences / manifest.sequences:.3g}", *counts
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    heading, *rest = zip(*columns, strict=True)
    return table(heading, rest)


def _stream(origin: Origin, provenance: DataProvenance) -> Rows:
    data, manifests = origin.recipe.data, [each.manifest for each in provenance.sources if each.manifest]
    texts = sorted({name for manifest in manifests for name in manifest.source.inputs})
    generated = any(manifest.source.generated for manifest in manifests)
    left_out = sum(stop - start for start, stop in provenance.cursor.skips)
    return {
        "text": ", ".join(map(escape_md, texts)) or None,
        "written by": "a teacher, in part or in whole (sequence-level distillation)" if generated else None,
        "curriculum": _curriculum(provenance.order),
        "sequence length": f"{provenance.sequence_length:,} tokens",
        "packing": ", ".join(sorted({escape_md(manifest.packer.name) for manifest in manifests})) or None,
        "documents": "each by itself" if data.document_mask else "side by side, visible to each other",
        "tokenizer": _tokenizer(origin, provenance),
        "order": f"seed {data.seed}, fingerprint `{provenance.cursor.fingerprint}`",
        "damaged sequences, masked": f"{len(provenance.cursor.masked_slots):,}",
        "sequences skipped after a rollback": f"{left_out:,}",
    }


def _tokenizer(origin: Origin, provenance: DataProvenance) -> str | None:
    """Kind and sha256 by the data's manifest, else by the run folder."""
    for source in provenance.sources:
        if source.manifest is not None:
            record = source.manifest.tokenizer
            return f"{record.kind}, sha256 `{record.sha256}`"
    stored = None if origin.run is None else tokenizer_sha256(origin.run / TOKENIZER_FOLDER, prefer="sentencepiece")
    return None if stored is None else f"{stored[0]}, sha256 `{stored[1]}`"


def _curriculum(order: Mapping[str, Any]) -> str | None:
    if len(order["stages"]) < 2:
        return None
    words = []
    for stage in order["stages"]:
        shares = ", ".join(f"{escape_md(name)} {quota}" for name, quota in stage["quotas"].items())
        words.append(shares + (" parts" if stage["slots"] is None else f" parts of {stage['slots']:,} sequences"))
    return "; then ".join(words)


def _training(origin: Origin, provenance: DataProvenance) -> Rows:
    recipe, manifest = origin.recipe, origin.checkpoint.manifest
    section = recipe.train
    forward = flops_per_token(origin.config, provenance.sequence_length).forward
    weights = recipe.student.weights
    return {
        "objective": _objective(recipe.loss) if recipe.teacher is not None else "cross-entropy of the next token",
        "z-loss": f"{recipe.loss.z_loss:g}" if recipe.loss.z_loss else None,
        "steps": f"{manifest.step:,} of {section.steps:,}",
        "tokens": f"{manifest.tokens:,}",
        "batch": f"{section.global_batch:,} sequences, {section.global_batch * provenance.sequence_length:,} tokens",
        "optimizer": f"{describe(section.optimizer)}; gradient norm clipped at {section.max_grad_norm:g}",
        "learning rate": f"{section.optimizer.learning_rate:g}, {_schedule(section.schedule)}",
        "precision": f"{section.precision}, float32 master weights",
        "starting weights": f"random, seed {recipe.run.seed}" if weights is None else basename(weights),
        "fingerprint of the starting weights": _started_from(origin.run) or _fingerprint(weights),
        "FLOPs of the student": f"{3 * forward * manifest.tokens:.3g}, without what was computed again",
        "ranks": f"{manifest.world:,}",
    }


def _started_from(run: Path | None) -> str | None:
    """The fingerprint of the starting weights by recipe.json: the weights may be gone."""
    try:
        written = read_json(run / "recipe.json") if run is not None else {}
        return f"`{escape_md(written['started_from']['fingerprint'])}`"
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _objective(loss: LossSection) -> str:
    what, parameter = loss.divergence.spec.title, loss.divergence.spec.parameter
    if parameter is not None and loss.parameter is not None:
        what += f", {parameter.symbol} {loss.parameter:g}"
    terms = [f"{loss.kd_weight:g} × ({what})"]
    if loss.ce_weight:
        terms.append(f"{loss.ce_weight:g} × cross-entropy of the label")
    text = f"{' + '.join(terms)}, temperature {loss.temperature:g}"
    if loss.schedule is not None:
        text += f"; the divergence's weight: {_schedule(loss.schedule)}; the label has the rest"
    if loss.label_fraction:
        text += f"; the {loss.label_fraction:.0%} of tokens with the lowest teacher entropy learn from the label"
    return text


def _schedule(schedule: ScheduleSection) -> str:
    up = f"up over {schedule.warmup_steps:,} steps, " if schedule.warmup_steps else ""
    if schedule.kind == "wsd":
        return f"{up}constant, down to {schedule.final_ratio:g} of it over the last {schedule.decay_steps:,} steps"
    return f"{up}down to {schedule.final_ratio:g} of it along a cosine"


def _teacher(recipe: Recipe, provenance: DataProvenance) -> Rows:
    section, targets = recipe.teacher, recipe.loss.targets
    if section is None:
        return {}
    select = "its whole distribution" if targets is None else TARGETS[targets.select].format(**targets.model_dump())
    rest = "" if targets is None or targets.tail is None else f", the rest {targets.tail}"
    origin = "stored before the run" if section.source == "stored" else "computed in the run"
    rows: Rows = {
        "teacher": "not named by the recipe" if section.path is None else basename(section.path),
        "targets": f"{select}{rest}, {origin}",
        "vocabulary": None if section.vocab_map is None else "another one, mapped id by id",
        "fingerprint of its folder today": _fingerprint(section.path),
    }
    try:
        config = load_config(Path(section.path or ""), what="teacher.path")
    except UserError:  # the teacher may be on another machine
        return rows
    forward = flops_per_token(config, provenance.sequence_length).forward
    return rows | {
        "architecture": escape_md(config.model_type),
        "size": f"{config.num_hidden_layers} layers, width {config.hidden_size:,}",
        "parameters": f"{parameter_counts(config).total:,}",
        "FLOPs of the teacher": f"{forward * provenance.tokens:.3g}" if section.source == "live" else None,
    }


def _fingerprint(folder: str | None) -> str | None:
    try:
        return None if folder is None else f"`{teacher_fingerprint(Path(folder))}`"
    except UserError:
        return None


def _model(config: Any) -> Rows:
    counts = parameter_counts(config)
    return {
        "architecture": config.architectures[0],
        "parameters": f"{counts.total:,}, {counts.body:,} of them without embedding and head",
        "layers": f"{config.num_hidden_layers}",
        "width": f"{config.hidden_size:,}, of the MLP {config.intermediate_size:,}",
        "attention": f"{config.num_attention_heads} heads, {config.num_key_value_heads} of keys and values",
        "vocabulary": f"{config.vocab_size:,}, {'tied' if config.tie_word_embeddings else 'untied'} head",
        "positions": f"{config.max_position_embeddings:,}",
        "numbers": str(config.dtype).removeprefix("torch."),
    }


def _checkpoint(origin: Origin) -> Rows:
    manifest = origin.checkpoint.manifest
    skipped = set()
    if origin.run is not None:
        events = read_lines(origin.run / "events.jsonl")
        skipped = {each["step"] for each in events if each["event"] == "step_skipped" and each["step"] <= manifest.step}
    return {
        "step": f"{manifest.step:,}",
        "sha256 of its manifest": f"`{manifest.sha256}`",
        "sha256 of the recipe": f"`{manifest.recipe_sha256}`",
        "attempts until then": f"{manifest.attempt}",
        "rollbacks after a loss spike": f"{manifest.rollbacks}",
        "skipped steps": f"{len(skipped)}" if skipped else None,
        "versions": ", ".join(f"{escape_md(name)} {escape_md(number)}" for name, number in manifest.versions.items()),
    }


def _limits(recipe: Recipe) -> str:
    of_models = "" if recipe.teacher is None and recipe.student.weights is None else " and from the models it came from"
    limits = [
        "A base model: it continues text. It was not trained to follow or refuse instructions, and its text may be "
        "wrong or harmful, as its training text may be.",
        "It has read sequences of the length above, and no longer ones.",
        f"Licence and language are not named here: they follow from the text{of_models}.",
    ]
    if recipe.teacher is not None:
        limits.append("Errors and biases of the teacher are what it learned from.")
    return "\n".join(f"* {each}" for each in limits)
