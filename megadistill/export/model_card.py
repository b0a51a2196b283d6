"""The model card of an exported student, from the records of its run."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from jinja2 import Environment, PackageLoader, StrictUndefined
from yaml import YAMLError

from megadistill import __version__
from megadistill.config.recipe import WHOLE_DATA, LossSection, Recipe, ScheduleSection, TargetsSection, TeacherSection
from megadistill.data import Manifest, tokenizer_sha256
from megadistill.errors import UserError
from megadistill.evaluate.evaluation import measure_rows, read_evaluations
from megadistill.events import metrics_from_end, read_events
from megadistill.export.data_provenance import DataProvenance
from megadistill.export.markdown import basename, escape_md, table
from megadistill.io import read_json
from megadistill.models.experts import RouterCoefs
from megadistill.models.families import expert_layers, load_config
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.flops import flops_per_token, parameter_counts
from megadistill.student.optimizer import describe
from megadistill.train.checkpoint.format import Checkpoint
from megadistill.train.setup.run_folder import TOKENIZER_FOLDER
from megadistill.units import short

TARGETS = {
    "sampled": "counts of {draws} draws from its distribution",
    "sampled_distinct": "{k} distinct ids drawn by its probabilities, which are scaled to 1",
    "top_k": "its {k} most likely ids",
    "threshold": "ids to which it gives at least {epsilon}",
    "top_p": "its most likely ids, up to {p} of the probability and {max_ids} ids",
}
LOGGED = {
    "loss": "loss",
    "kl": "KL",
    "targets_kl": "KL of the targets",
    "student_ce": "CE",
    "teacher_ce": "CE of the teacher",
    "agreement": "agreement",
    "grad_norm": "gradient norm",
}
"""Key of a line of metrics.jsonl -> heading."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(
    name: str,
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    run: Path | None,
    config: Any,
    tokenizer_class: str = "AutoTokenizer",
) -> str:
    """README.md of the folder `name`: metadata for the Hugging Face hub, and the model's data, teacher and training.

    `run`: the run folder, None for a checkpoint outside of one. `config`: the exported student's Hugging Face config.
    `tokenizer_class`: the class of transformers that loads its tokenizer.
    """
    manifest, weights = checkpoint.manifest, recipe.student.weights
    provenance = DataProvenance.of(manifest, recipe)
    manifests = [each.manifest for each in provenance.sources if each.manifest]
    events = [] if run is None else read_events(run)
    skipped = [each["step"] for each in events if each["event"] == "step_skipped"]
    environment = Environment(  # of Markdown: text from elsewhere goes through `escape_md` or `basename`
        loader=PackageLoader("megadistill.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"escape_md": escape_md, "basename": basename, "commas": "{:,}".format}
    return environment.get_template("model_card.md.j2").render(
        name=name,
        quoted_name=json.dumps(name),
        tokenizer_class=tokenizer_class,
        version=__version__,
        metadata=_metadata(recipe),
        recipe=recipe,
        train=recipe.train,
        manifest=manifest,
        in_run=run is not None,
        config=config,
        counts=parameter_counts(config),
        forward=flops_per_token(config, provenance.sequence_length).forward,
        provenance=provenance,
        sources=_sources(provenance),
        texts=sorted({text for each in manifests for text in each.source.inputs}),
        generated=any(each.source.generated for each in manifests),
        packers=sorted({each.packer.name for each in manifests}),
        curriculum=_curriculum(provenance.order),
        tokenizer=_tokenizer(run, manifests),
        left_out=sum(stop - start for start, stop in provenance.cursor.skips),
        objective=_objective(recipe, config) if recipe.teacher_sections else _label_objective(config),
        optimizer=describe(recipe.train.optimizer),
        batch=_batch(recipe, provenance),
        schedule=_schedule(recipe.train.schedule, recipe.train.unit),
        started_from=_started_from(run) or _fingerprint(weights),
        teachers=[_teacher(recipe, key, provenance.sequence_length) for key in recipe.teacher_sections],
        skipped_steps={step for step in skipped if step <= manifest.step},
        metrics=None if run is None or manifest.average is not None else _metrics(run, manifest.step),
        evaluations=[] if run is None else list(_evaluations(run)),
    )


def _teacher(recipe: Recipe, key: str, sequence_length: int) -> dict[str, Any]:
    """A teacher for the template; `key`: its key in the recipe."""
    section = recipe.teacher_sections[key]
    config, name = _config(section.path), key.partition(".")[2]
    sources = recipe.data.sources or [WHOLE_DATA]
    shares = {source: recipe.teachers_of(source).get(name) for source in sources} if name else {}
    return {
        "name": name,
        "section": section,
        "teaches": [
            source if share == 1 else f"{source} (share {share:.3g})" for source, share in shares.items() if share
        ],
        "targets": _targets(section, recipe.loss.targets),
        "config": config,
        "fingerprint": _fingerprint(section.path),
        "parameters": parameter_counts(config).total if config else None,
        "forward": flops_per_token(config, sequence_length).forward if config else None,
    }


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


def _sources(provenance: DataProvenance) -> str:
    """A row for each source; without the columns that need a manifest where none is at hand."""
    rows = [["source", "sequences", "tokens", "manifest sha256", "epochs", "documents", "text bytes"]]
    for source in provenance.sources:
        manifest, tokens = source.manifest, f"{source.tokens(provenance.sequence_length):,}"
        rows.append([escape_md(source.name), f"{source.sequences:,}", tokens, f"`{source.fingerprint}`", "", "", ""])
        if manifest is not None:
            counts = ("" if count is None else f"{count:,}" for count in (manifest.documents, manifest.text_bytes))
            rows[-1][-3:] = short(source.sequences / manifest.sequences), *counts
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    heading, *rest = zip(*columns, strict=True)
    return table(heading, rest)


def _tokenizer(run: Path | None, manifests: Sequence[Manifest]) -> tuple[str, str] | None:
    """Kind and sha256 by the data's manifest, else by the run folder."""
    if manifests:
        return manifests[0].tokenizer.kind, manifests[0].tokenizer.sha256
    return None if run is None else tokenizer_sha256(run / TOKENIZER_FOLDER, prefer="sentencepiece")


def _curriculum(order: Mapping[str, Any]) -> str | None:
    if len(order["stages"]) < 2:
        return None
    words = []
    for stage in order["stages"]:
        shares = ", ".join(f"{escape_md(name)} {quota}" for name, quota in stage["quotas"].items())
        words.append(shares + (" parts" if stage["slots"] is None else f" parts of {stage['slots']:,} sequences"))
    return "; then ".join(words)


def _started_from(run: Path | None) -> str | None:
    """The fingerprint of the starting weights by recipe.json: the weights may be gone."""
    try:
        written = read_json(run / "recipe.json") if run is not None else {}
        return escape_md(written["started_from"]["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _label_objective(config: Any) -> str:
    return f"cross-entropy of the next token{_router_losses(config)}"


def _router_losses(config: Any) -> str:
    """Losses of the routers of a student with experts, whose config has the weights that it was trained with."""
    coefs = RouterCoefs.of(LossSection(), config) if expert_layers(config) else RouterCoefs()
    named = ((coefs.aux, "load-balancing loss"), (coefs.z, "z-loss"))
    terms = " + ".join(f"{coef:g} × {name}" for coef, name in named if coef)
    return f"; of the routers: {terms}" if terms else ""


def _objective(recipe: Recipe, config: Any) -> str:
    loss = recipe.loss
    what, parameter = loss.divergence.spec.title, loss.divergence.spec.parameter
    if parameter is not None and loss.parameter is not None:
        what += f", {parameter.symbol} {loss.parameter:g}"
    terms = [f"{loss.kd_weight:g} × ({what})"]
    if loss.ce_weight:
        terms.append(f"{loss.ce_weight:g} × cross-entropy of the label")
    text = f"{' + '.join(terms)}, temperature {loss.temperature:g}"
    if loss.schedule is not None:
        text += f"; the divergence's weight: {_schedule(loss.schedule, recipe.train.unit)}; the label has the rest"
    if loss.label_fraction:
        text += f"; the {loss.label_fraction:.0%} of tokens with the lowest teacher entropy learn from the label"
    return text + _router_losses(config)


def _batch(recipe: Recipe, provenance: DataProvenance) -> str:
    batch = recipe.train.global_batch
    if not recipe.has_shaped_entries:
        return f"{batch:,} sequences, {batch * provenance.sequence_length:,} tokens"
    own = [f"{entry.global_batch or batch:,}" for entry in recipe.data.curriculum]
    return f"{', then '.join(own)} sequences, by curriculum entry"


def _schedule(schedule: ScheduleSection, unit: str) -> str:
    up = f"up over {schedule.warmup:,} {unit}, " if schedule.warmup else ""
    if schedule.kind == "wsd":
        return f"{up}constant, down to {schedule.final_ratio:g} of it over the last {schedule.decay:,} {unit}"
    return f"{up}down to {schedule.final_ratio:g} of it along a cosine"


def _targets(teacher: TeacherSection, targets: TargetsSection | None) -> str:
    """Targets of the student. Only of a live teacher the complete distribution is known to be there."""
    origin = teacher.origin + (", its products in float8" if teacher.precision == "float8" else "")
    if targets is None:
        return f"its whole distribution, {origin}" if teacher.is_live else origin
    rest = "" if targets.tail is None else f", the rest {targets.tail}"
    return f"{TARGETS[targets.select].format(**targets.model_dump())}{rest}, {origin}"


def _config(folder: str | None) -> Any | None:
    """The config of a model's folder; None where it is not on this machine."""
    try:
        return load_config(Path(folder or ""), what="teacher.path")
    except UserError:
        return None


def _fingerprint(folder: str | None) -> str | None:
    try:
        return None if folder is None else teacher_fingerprint(Path(folder))
    except UserError:
        return None


def _metrics(run: Path, step: int) -> str | None:
    """The table of the metrics of `step`, where it was logged."""
    line = next((line for _, line in metrics_from_end(run) if line["step"] <= step), {})
    line = line if line.get("step") == step else {}
    metrics = {heading: f"{line[key]:.4f}" for key, heading in LOGGED.items() if isinstance(line.get(key), float)}
    return table(list(metrics), [list(metrics.values())]) if metrics else None


def _evaluations(run: Path) -> Iterator[tuple[str, str]]:
    """Name and table of each `evaluation*.json` in the run folder."""
    for path in sorted(run.glob("evaluation*.json")):
        try:
            evaluations = read_evaluations(path)
        except UserError:  # of another version, or another tool
            continue
        heading, *rows = measure_rows("model", [(basename(each.model), each) for each in evaluations], missing="")
        yield path.stem, table(heading, rows)
