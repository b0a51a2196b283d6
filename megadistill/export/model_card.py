"""Room `export`: the model card of an exported student, made of what its run wrote down. It reads no weights of it."""

import hashlib
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
from megadistill.export.data_provenance import Reading
from megadistill.export.markdown import Rows, last_name, plain, table, table_of
from megadistill.export.results import came_to
from megadistill.models.families import load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.flops import flops_per_token, parameter_counts
from megadistill.train.checkpoint.format import Checkpoint
from megadistill.train.setup.run_folder import TOKENIZER_FOLDER

DIVERGENCES = {
    "forward_kl": "forward KL, KL(teacher ‖ student)",
    "reverse_kl": "reverse KL, KL(student ‖ teacher)",
    "jsd": "generalised Jensen-Shannon divergence",
    "skew_kl": "skew KL",
    "tvd": "total variation distance",
}
TARGETS = {
    "sampled": "counts of {draws} draws from its distribution",
    "top_k": "its {k} most likely ids",
    "threshold": "ids to which it gives at least {epsilon}",
    "top_p": "its most likely ids, up to {p} of the probability and {max_ids} ids",
}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """Where an exported model comes from."""

    checkpoint: Checkpoint
    recipe: Recipe
    run: Path | None
    """The run folder; None where the checkpoint lies alone."""
    config: Any
    """The student's, as it is exported."""

    @property
    def reading(self) -> Reading:
        return Reading.of(self.checkpoint.manifest, self.recipe)


def model_card(name: str, origin: Origin) -> str:
    """README.md of the folder `name`: metadata that the Hugging Face hub reads, and what the model was trained on."""
    reading = origin.reading
    results = came_to(origin.run, origin.checkpoint.manifest.step) if origin.run is not None else ""
    sections = {
        "How to load it": _loading(name, with_tokenizer=origin.run is not None),
        "What it was trained on": f"{_sources(reading)}\n\n{table_of(_stream(origin, reading))}",
        "How it was trained": table_of(_training(origin, reading)),
        "The teacher": table_of(_teacher(origin.recipe, reading)),
        "The model": table_of(_model(origin.config)),
        "The checkpoint": table_of(_checkpoint(origin)),
        "What it came to": results,
        "Limits": _limits(origin.recipe),
    }
    if origin.recipe.teacher is None:
        del sections["The teacher"]
    parts = [f"---\n{_metadata(origin.recipe)}\n---", f"# {plain(name)}", _introduction(origin)]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def _metadata(recipe: Recipe) -> str:
    """`base_model` stands for what weights go on from, so a student from random numbers has none, whoever taught it."""
    tags = ["megadistill", *(["distillation"] if recipe.objective == "distill" else [])]
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=tags, base_model=_base_model(recipe)
    )
    return data.to_yaml().strip()


def _base_model(recipe: Recipe) -> str | None:
    """The hub's name of what `student.weights` were made of, where the card of that folder says it."""
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
    begun = "" if recipe.student.weights is None else f", begun from the weights of {last_name(recipe.student.weights)}"
    made = f"Made by megadistill {__version__}."
    if recipe.teacher is None:
        return f"A {what}{begun}, pretrained from labels on {tokens:,} tokens. {made}"
    named = f", {last_name(recipe.teacher.path)}," if recipe.teacher.path else ""
    return (
        f"A {what}{begun}, pretrained by distillation: at each of {tokens:,} tokens it learned from the next-token "
        f"distribution of a teacher{named} that read the same text. {made}"
    )


def _loading(name: str, *, with_tokenizer: bool) -> str:
    classes = ["AutoModelForCausalLM", "AutoTokenizer"] if with_tokenizer else ["AutoModelForCausalLM"]
    variables = zip(("model", "tokenizer"), classes, strict=False)
    lines = [f"{variable} = {each}.from_pretrained({json.dumps(name)})" for variable, each in variables]
    return "\n".join(["```python", f"from transformers import {', '.join(classes)}", "", *lines, "```"])


def _sources(reading: Reading) -> str:
    """A line each; of what no manifest tells, since none is at hand, there is no column."""
    lines = [["source", "sequences", "tokens", "manifest sha256", "epochs", "documents", "text bytes"]]
    for source in reading.sources:
        held, tokens = source.manifest, f"{source.sequences * reading.sequence_length:,}"
        known = ["", "", ""]
        if held is not None:
            known = [f"{source.sequences / held.sequences:.3g}", _count(held.documents), _count(held.text_bytes)]
        lines.append([plain(source.name), f"{source.sequences:,}", tokens, f"`{source.fingerprint}`", *known])
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    return table(list(line) for line in zip(*columns, strict=True))


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _stream(origin: Origin, reading: Reading) -> Rows:
    data, manifests = origin.recipe.data, [each.manifest for each in reading.sources if each.manifest]
    texts = sorted({name for manifest in manifests for name in manifest.source.inputs})
    generated = any(manifest.source.generated for manifest in manifests)
    left_out = sum(stop - start for start, stop in reading.cursor.skips)
    return {
        "text": ", ".join(map(plain, texts)) or None,
        "written by": "a teacher, in part or in whole (sequence-level distillation)" if generated else None,
        "stages": _stages(reading.order),
        "sequence length": f"{reading.sequence_length:,} tokens",
        "packing": ", ".join(sorted({plain(manifest.packer.name) for manifest in manifests})) or None,
        "documents": "each by itself" if data.document_mask else "side by side, visible to each other",
        "tokenizer": _tokenizer(origin, reading),
        "order": f"seed {data.seed}, fingerprint `{reading.cursor.fingerprint}`",
        "damaged sequences, masked": f"{len(reading.cursor.masked_slots):,}",
        "sequences left out on purpose": f"{left_out:,}",
    }


def _tokenizer(origin: Origin, reading: Reading) -> str | None:
    """As the data says it, else as it lies in the run folder."""
    for source in reading.sources:
        if source.manifest is not None:
            record = source.manifest.tokenizer
            return f"{record.kind}, sha256 `{record.sha256}`"
    found = None if origin.run is None else tokenizer_sha256(origin.run / TOKENIZER_FOLDER, prefer="sentencepiece")
    return None if found is None else f"{found[0]}, sha256 `{found[1]}`"


def _stages(order: Mapping[str, Any]) -> str | None:
    if len(order["stages"]) < 2:
        return None
    words = []
    for stage in order["stages"]:
        shares = ", ".join(f"{plain(name)} {quota}" for name, quota in stage["quotas"].items())
        words.append(shares + (" parts" if stage["slots"] is None else f" parts of {stage['slots']:,} sequences"))
    return "; then ".join(words)


def _training(origin: Origin, reading: Reading) -> Rows:
    recipe, manifest = origin.recipe, origin.checkpoint.manifest
    section, adamw = recipe.train, recipe.train.optimizer
    forward = flops_per_token(origin.config, reading.sequence_length).forward
    weights = recipe.student.weights
    return {
        "objective": _objective(recipe.loss) if recipe.teacher is not None else "cross-entropy of the next token",
        "z-loss": f"{recipe.loss.z_loss:g}" if recipe.loss.z_loss else None,
        "steps": f"{manifest.step:,} of {section.steps:,}",
        "tokens": f"{manifest.tokens:,}",
        "batch": f"{section.global_batch:,} sequences, {section.global_batch * reading.sequence_length:,} tokens",
        "optimizer": (
            f"AdamW, β₁ {adamw.beta1:g}, β₂ {adamw.beta2:g}, ε {adamw.epsilon:g}, weight decay "
            f"{adamw.weight_decay:g} on matrices; gradient norm clipped at {section.max_grad_norm:g}"
        ),
        "learning rate": f"{adamw.learning_rate:g}, {_schedule(section.schedule)}",
        "precision": f"{section.precision}, float32 master weights",
        "starting weights": f"random, seed {recipe.run.seed}" if weights is None else last_name(weights),
        "fingerprint of the starting weights": _started_from(origin.run) or _fingerprint(weights),
        "FLOPs of the student": f"{3 * forward * manifest.tokens:.3g}, without what was computed again",
        "ranks": f"{manifest.world:,}",
    }


def _started_from(run: Path | None) -> str | None:
    """What the run wrote down of the weights that it began from, which may be gone."""
    try:
        kept = json.loads((run / "recipe.json").read_text(encoding="utf-8")) if run is not None else {}
        return f"`{plain(kept['started_from']['fingerprint'])}`"
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _objective(loss: LossSection) -> str:
    what = DIVERGENCES[loss.divergence]
    for letter, value in (("β", loss.beta), ("α", loss.alpha)):
        what += f", {letter} {value:g}" if value is not None else ""
    terms = [f"{loss.kd_weight:g} × ({what})"]
    if loss.ce_weight:
        terms.append(f"{loss.ce_weight:g} × cross-entropy of the label")
    said = f"{' + '.join(terms)}, temperature {loss.temperature:g}"
    if loss.schedule is not None:
        said += f"; the divergence's weight: {_schedule(loss.schedule)}; the label has the rest"
    if loss.label_fraction:
        said += f"; the {loss.label_fraction:.0%} of tokens where the teacher is surest learn from the label"
    return said


def _schedule(schedule: ScheduleSection) -> str:
    up = f"up over {schedule.warmup_steps:,} steps, " if schedule.warmup_steps else ""
    if schedule.kind == "wsd":
        return f"{up}constant, down to {schedule.final_ratio:g} of it over the last {schedule.decay_steps:,} steps"
    return f"{up}down to {schedule.final_ratio:g} of it along a cosine"


def _teacher(recipe: Recipe, reading: Reading) -> Rows:
    section, targets = recipe.teacher, recipe.loss.targets
    if section is None:
        return {}
    kept = "its whole distribution" if targets is None else TARGETS[targets.select].format(**targets.model_dump())
    rest = "" if targets is None or targets.tail is None else f", the rest {targets.tail}"
    rows: Rows = {
        "teacher": "not named by the recipe" if section.path is None else last_name(section.path),
        "targets": f"{kept}{rest}, {'stored before the run' if section.source == 'stored' else 'computed in the run'}",
        "vocabulary": None if section.vocab_map is None else "another one, mapped id by id",
        "fingerprint of its folder today": _fingerprint(section.path),
    }
    try:
        config = load_config(Path(section.path or ""), what="teacher.path")
    except UserError:  # a card is written where the teacher may not be
        return rows
    forward = flops_per_token(config, reading.sequence_length).forward
    return rows | {
        "architecture": f"{plain(config.model_type)}, {config.num_hidden_layers} layers, width {config.hidden_size:,}",
        "parameters": f"{parameter_counts(config).total:,}",
        "FLOPs of the teacher": f"{forward * reading.tokens:.3g}" if section.source == "live" else None,
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
    manifest, folder = origin.checkpoint.manifest, origin.checkpoint.folder
    skipped = set()
    if origin.run is not None:
        events = read_lines(origin.run / "events.jsonl")
        skipped = {each["step"] for each in events if each["event"] == "step_skipped" and each["step"] <= manifest.step}
    content = manifest.sha256 or hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    return {
        "step": f"{manifest.step:,}",
        "sha256 of its manifest": f"`{content}`",
        "sha256 of the recipe": f"`{manifest.recipe_sha256}`" if manifest.recipe_sha256 else None,
        "starts of the run until then": f"{manifest.attempt}" if manifest.attempt else None,
        "rollbacks after a loss spike": f"{manifest.rollbacks}",
        "steps that moved nothing": f"{len(skipped)}" if skipped else None,
        "versions": ", ".join(f"{plain(name)} {plain(number)}" for name, number in manifest.versions.items()),
    }


def _limits(recipe: Recipe) -> str:
    alone = recipe.teacher is None and recipe.student.weights is None
    terms = "they follow from the text" + ("" if alone else ", and from the terms of the models that it was made from")
    said = [
        "A base model: it continues text. It was not trained to follow instructions, nor to refuse them, and what it "
        "says may be wrong or harmful, as the text that it was trained on may be.",
        "It has read sequences of the length above, and no longer ones.",
        f"Neither licence nor language is named here: {terms}.",
    ]
    if recipe.teacher is not None:
        said.append("Errors and biases of the teacher are what it learned from.")
    return "\n".join(f"* {each}" for each in said)
