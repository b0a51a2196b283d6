"""Export of a checkpoint of any number of ranks to a folder that transformers loads, and its model card."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill import __version__
from megadistill.config.recipe import Recipe, TargetsSection, TeacherSection
from megadistill.data import Mixture
from megadistill.data.tokenizers.data_files import hashes_in
from megadistill.errors import OperatorFault, UserError
from megadistill.export.export_run import export_run
from megadistill.export.markdown import escape_md
from megadistill.export.model_card import _targets
from megadistill.io import write_json
from megadistill.models.families import EMBEDDING, HEAD, load_config, parameter_shapes
from megadistill.models.fingerprint import teacher_fingerprint
from megadistill.models.flops import flops_per_token, parameter_counts
from megadistill.train.checkpoint.format import commit, write_rank
from megadistill.train.checkpoint.rollback import Rollback, record_rollbacks
from megadistill.train.setup.run_folder import copy_student_config, write_description
from megadistill.types import Cursor
from tests.unit.data.corpora import byte_level_tokenizer
from tests.unit.evaluate.test_evaluation_tables import LARGE
from tests.unit.train.cases import (
    MODEL,
    SEQUENCE,
    VOCAB,
    described_data,
    described_teacher,
    manifest_of,
    recipe,
)

PADDED, STEP, WORLD = 256, 6, 3
TOKENS = STEP * 8 * SEQUENCE
TINY = {"train": {"precision": "float32"}}


def _parameters(seed: int = 1, *, padded: int | None = None) -> dict[str, Tensor]:
    """Parameters of the padded model: no export may hold the rows past the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(load_config(MODEL | {"vocab_size": VOCAB}, what="test"))
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in (EMBEDDING, HEAD):
        values[name] = torch.cat([values[name], torch.full(((padded or PADDED) - VOCAB, MODEL["hidden_size"]), 99.0)])
    return values


def _checkpoint(
    run: Path, made: Recipe, *, step: int = STEP, seed: int = 1, padded: int | None = None, **changes: Any
) -> Path:
    """A checkpoint of `WORLD` ranks: each has a piece of each flattened parameter, uneven ones and empty ones too."""
    folder, beside = run / "checkpoints", run / f".step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    beside.mkdir()
    parameters = _parameters(seed, padded=padded)
    for rank in range(WORLD):
        pieces = {f"master/{name}": _piece(tensor, rank) for name, tensor in parameters.items()}
        write_rank(beside, pieces, rank=rank, world=WORLD)
    order = Mixture.load(made.data).order(made.data.seed)
    cursor = Cursor(order.fingerprint, 8 * step, order=json.dumps(order.description)).state()
    manifest = manifest_of(
        step,
        world=WORLD,
        **{
            "tokens": step * 8 * SEQUENCE,
            "vocab_size": VOCAB,
            "cursor": cursor,
            "parameters": {name: tuple(tensor.shape) for name, tensor in parameters.items()},
            "recipe": made.snapshot(),
            "recipe_sha256": "5" * 64,
            **changes,
        },
    )
    commit(beside, folder / f"step-{step:08d}", manifest)
    return folder / f"step-{step:08d}"


def _piece(tensor: Tensor, rank: int) -> Tensor:
    size = -(-tensor.numel() // WORLD)  # as ZeRO-3 divides it: the last rank's is shorter, or empty
    return tensor.flatten()[rank * size : (rank + 1) * size].clone()


def _run(folder: Path, *, teacher: Path | None = None, **sections: Any) -> tuple[Path, Recipe]:
    """A run folder as far as an export reads it, and its recipe."""
    made = recipe(described_data(folder / "data"), folder / "run", teacher=teacher, **(TINY | sections))
    run = folder / "run"
    write_json(run / "recipe.json", {"recipe": made.snapshot()})
    byte_level_tokenizer(run / "tokenizer", "the text that both models know")
    return run, made


def _export(source: Path, output: Path, **options: Any) -> ModelCard:
    defaults: dict[str, Any] = {"step": None, "max_shard_bytes": 10_000, "dtype": None}
    assert export_run(source, output, **(defaults | options)) == STEP
    card: ModelCard = ModelCard.load(output / "README.md")
    return card


def _metadata(card: ModelCard) -> dict[str, Any]:
    values: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    return values


def _rows(card: ModelCard) -> dict[str, str]:
    """The two-column tables of a card."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.text, flags=re.MULTILINE))


@pytest.mark.parametrize("what", ["run", "checkpoint"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_three_ranks_saved_loads_as_one_model(what: str, dtype: str | None, tmp_path: Path) -> None:
    run, made = _run(tmp_path)
    checkpoint = _checkpoint(run, made)
    _export(run if what == "run" else checkpoint, tmp_path / "out", dtype=dtype)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    numbers = torch.float32 if dtype is None else torch.bfloat16
    truth = _parameters()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, truth[name][: parameter.shape[0]].to(numbers)), name
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (run / "tokenizer" / "tokenizer.json").read_bytes()


def _scalar_in(teacher: Path, run: Path) -> None:
    save_file({"scale": torch.tensor(1.0)}, teacher / "model.safetensors")


def _damaged_teacher(teacher: Path, run: Path) -> None:
    (teacher / "model.safetensors").write_bytes(b"x")
    (teacher / "config.json").write_text('{"model_type": ["llama"]}')


def _strange_records(teacher: Path, run: Path) -> None:
    (run / "evaluation.json").write_text("7")
    (run / "metrics.jsonl").write_text("7\n[]\n")
    (run / "events.jsonl").write_text("7\n")


@pytest.mark.parametrize("damage", [_scalar_in, _damaged_teacher, _strange_records])
def test_what_lies_around_a_run_never_stops_its_export(damage: Callable[[Path, Path], None], tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    described_teacher(teacher)
    run, made = _run(tmp_path, teacher=teacher)
    checkpoint = _checkpoint(run, made)
    damage(teacher, run)
    _export(checkpoint, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == VOCAB


def test_a_model_card_that_cannot_be_made_is_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise IndexError("list index\nout of range")

    run, made = _run(tmp_path)
    _checkpoint(run, made)
    monkeypatch.setattr("megadistill.export.export_run.model_card", fail)
    card = _export(run, tmp_path / "out")
    assert "exported by" in card.text
    assert "no model card, only the sizes of the model: IndexError: list index out of range" in caplog.text


def test_a_mixture_is_exported_with_the_weights_of_its_routers_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**MODEL, "model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True}
    monkeypatch.setattr(f"{__name__}.MODEL", config)
    run, made = _run(tmp_path, student={"config": config}, loss={"router_aux_loss_coef": 0.02})
    _checkpoint(run, made)
    card = _export(run, tmp_path / "out")
    assert _rows(card)["objective"] == "cross-entropy of the next token; of the routers: 0.02 × load-balancing loss"
    exported = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert exported["router_aux_loss_coef"] == 0.02
    assert exported["output_router_logits"] is False
    assert "router_z_loss_coef" not in exported


def test_a_run_is_exported_where_the_folder_of_its_config_is_gone(tmp_path: Path) -> None:
    named = tmp_path / "named"
    described_teacher(named)
    run, made = _run(tmp_path, student={"config": str(named)})
    copy_student_config(run, made.student)
    _checkpoint(run, made)
    shutil.rmtree(named)
    _export(run, tmp_path / "out")
    assert load_config(tmp_path / "out", what="test").num_hidden_layers == MODEL["num_hidden_layers"]


def test_a_checkpoint_alone_is_exported_without_a_tokenizer_and_logs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, made = _run(tmp_path)
    alone = _checkpoint(run, made).rename(tmp_path / "alone")
    card = _export(alone, tmp_path / "out")
    assert "without a tokenizer" in caplog.text
    assert "AutoTokenizer" not in card.text
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_what_is_no_run_and_no_such_step_is_refused(tmp_path: Path) -> None:
    run, made = _run(tmp_path)
    with pytest.raises(UserError, match="no checkpoint yet"):
        _export(run, tmp_path / "out")
    checkpoint = _checkpoint(run, made)
    for source, step, reason in [
        (tmp_path, None, "not a run folder"),
        (run, 5, "it has 6"),
        (checkpoint, 5, "is the checkpoint of step 6"),
    ]:
        with pytest.raises(UserError, match=reason):
            _export(source, tmp_path / "out", step=step)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        _export(run, tmp_path / "there")
    with pytest.raises(UserError, match="at least 1 MB"):
        _export(run, tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(OperatorFault, match="this version reads"):
        _export(tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_rollback_left_is_not_taken_for_the_newest(tmp_path: Path) -> None:
    run, made = _run(tmp_path)
    _checkpoint(run, made)
    record_rollbacks(run, [Rollback(at_step=7, to_step=3, skipped_slots=(30, 50), reason="a spike")])
    with pytest.raises(UserError, match="a rollback abandoned it"):
        _export(run, tmp_path / "out")
    _export(run, tmp_path / "out", step=STEP)


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    run, made = _run(tmp_path)
    path = _checkpoint(run, made) / "rank-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(OperatorFault, match="is damaged"):
        _export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_the_student_was_trained_on(tmp_path: Path) -> None:
    teacher = described_teacher(tmp_path / "big-teacher", num_hidden_layers=5)
    loss = {"kd_weight": 0.9, "ce_weight": 0.1, "z_loss": 1e-4}
    run, made = _run(tmp_path, teacher=teacher, loss=loss)
    _checkpoint(run, made, rollbacks=2)
    for step in (STEP, STEP + 1):
        line = {"step": step, "loss": 0.5 + step, "kl": 0.25, "student_ce": 3.0, "agreement": 0.5}
        with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    evaluated = replace(LARGE, model="runs/x/out", parameters=90, tokens=12345, cross_entropy=3.25, bits_per_byte=None)
    write_json(run / "evaluation.json", [evaluated])
    card = _export(run, tmp_path / "out")

    metadata = _metadata(card)
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert "distillation" in metadata["tags"]
    assert "base_model" not in metadata, "the teacher is none: the student goes on from nobody's weights"

    rows = _rows(card)
    student = load_config(MODEL | {"vocab_size": VOCAB}, what="test")
    counts = parameter_counts(student)
    manifest = Mixture.load(made.data).sources["data"]
    order = Mixture.load(made.data).order(made.data.seed)
    forward = flops_per_token(load_config(teacher, what="test"), SEQUENCE).forward
    for name, value in {
        "objective": "0.9 × (forward KL, KL(teacher ‖ student)) + 0.1 × cross-entropy of the label, temperature 1",
        "z-loss": "0.0001",
        "steps": "6 of 6",
        "tokens": f"{TOKENS:,}",
        "batch": f"8 sequences, {8 * SEQUENCE} tokens",
        "ranks": "3",
        "precision": "float32, float32 master weights",
        "starting weights": "random, seed 1",
        "teacher": "big-teacher",
        "targets": "its whole distribution, computed in the run",
        "fingerprint of its folder today": f"`{teacher_fingerprint(teacher)}`",
        "FLOPs of the teacher": f"{forward * TOKENS:.3g}",
        "FLOPs of the student": f"{3 * flops_per_token(student, SEQUENCE).forward * TOKENS:.3g}, without what",
        "parameters": f"{counts.total:,}, {counts.body:,} of them",
        "vocabulary": f"{VOCAB}, untied head",
        "text": "text",
        "packing": "chunk",
        "tokenizer": f"sentencepiece, sha256 `{manifest.tokenizer.sha256}`",
        "sequence length": f"{SEQUENCE} tokens",
        "order": f"seed 1, fingerprint `{order.fingerprint}`",
        "step": "6",
        "sha256 of the recipe": "`" + "5" * 64,
        "rollbacks after a loss spike": "2",
        "versions": "torch some",
    }.items():
        assert rows[name].startswith(value), (name, rows[name])
    read = f"| data | {8 * STEP} | {TOKENS:,} | `{manifest.fingerprint}` | 6 | 3 | 1,000 |"
    assert read in card.text
    assert "| 6.5000 | 0.2500 | 3.0000 | 0.5000 |" in card.text, "the checkpoint's step, not the last one"
    measures = "90 | 12,345 | 3.2500 | 150,555.25 | 10.4321 | 0.6931 | 100.0% | 45.7% | 12.34%"
    assert f"| out | {measures} |" in card.text
    assert f"megadistill {__version__}" in card.text
    assert f"{counts.total:,} parameters" in card.text


def test_a_branch_names_the_checkpoints_from_which_it_began(tmp_path: Path) -> None:
    run, made = _run(tmp_path)
    parents = [{"run": "fir*st", "step": 1000, "sha256": "1" * 64}, {"run": "second", "step": 2, "sha256": "2" * 64}]
    _checkpoint(run, made, parents=parents)
    rows = _rows(_export(run, tmp_path / "out"))
    state = "with its optimizer state; sha256 of that manifest"
    assert rows["begun from"] == f"step 2 of the run second, {state} `{'2' * 64}`"
    assert rows["which had begun from"].startswith("step 1,000 of the run fir")
    assert rows["starting weights"] == "random", "the seed was that of the first run"


def test_the_targets_of_a_teacher_are_those_that_its_kind_has() -> None:
    """A kind of teacher without a model has no distribution that a card could promise."""
    live, stored = TeacherSection(path="t"), TeacherSection(source="stored", targets="t")
    assert _targets(live, None) == "its whole distribution, computed in the run"
    float8 = live.model_copy(update={"precision": "float8"})
    assert _targets(float8, None) == "its whole distribution, computed in the run, its products in float8"
    assert _targets(stored, TargetsSection()) == "counts of 50 draws from its distribution, stored before the run"
    toy = TeacherSection.model_construct(source="toy")
    assert _targets(toy, None) == "of a teacher of kind toy"


def test_a_student_that_goes_on_from_weights_names_what_they_were_made_of(tmp_path: Path) -> None:
    weights = described_teacher(tmp_path / "pruned")
    run, made = _run(tmp_path, student={"weights": str(weights)})
    _checkpoint(run, made)
    assert "base_model" not in _metadata(_export(run, tmp_path / "unknown"))
    (weights / "README.md").write_text("---\nbase_model: somebody/Model-8B\n---\nx\n", encoding="utf-8")
    card = _export(run, tmp_path / "out")
    assert _metadata(card)["base_model"] == "somebody/Model-8B"
    rows = _rows(card)
    assert rows["starting weights"] == "pruned"
    assert rows["fingerprint of the starting weights"] == f"`{teacher_fingerprint(weights)}`"
    assert rows["objective"] == "cross-entropy of the next token"
    assert "## The teacher" not in card.text
    (weights / "README.md").write_text("---\nbase_model: '../../etc|<b>'\n---\n", encoding="utf-8")
    assert "base_model" not in _metadata(_export(run, tmp_path / "hostile"))
    write_description(run, made.snapshot(), {}, started_from={"weights": "there", "fingerprint": "before"})
    assert _rows(_export(run, tmp_path / "gone"))["fingerprint of the starting weights"] == "`before`"


def test_the_card_gives_away_no_place_no_name_and_no_key(tmp_path: Path) -> None:
    """A recipe may be anybody's: its values become text, and of paths and URLs the last name at most."""
    teacher = described_teacher(tmp_path / "home" / "alice" / "a|b<img src=x>[c](mailto:evil) `d` *e*")
    run, made = _run(tmp_path, teacher=teacher)
    url = "https://alice:hunter2@there.example/data/manifest.json?token=s3cr3t"
    elsewhere = made.model_copy(update={"data": made.data.model_copy(update={"manifest": url})})
    values = elsewhere.snapshot()
    _checkpoint(run, made, recipe=values)
    text = _export(run, tmp_path / "out").text
    assert "epochs" not in text, "the manifest is not looked for behind a URL"
    for secret in ("alice", "hunter2", "s3cr3t", "there.example", str(tmp_path)):
        assert secret not in text
    for markup in ("|b", "<img", "[c](", " `d` ", " *e*", "http:", "mailto:"):
        assert not re.search(r"(?<!\\)" + re.escape(markup), text), markup
    for line in text.splitlines():
        if line.startswith("| teacher |"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, "the row keeps its two cells"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("<script>", r"\<script\>"),
        ("two\nlines \t here", "two lines here"),
        ("\x1b[31mred", "\N{REPLACEMENT CHARACTER}\\[31mred"),
        ("hf_abcdefghijklmnopqrstuv", r"\*\*\*"),
    ],
)
def test_text_from_elsewhere_has_no_effect(text: str, escaped: str) -> None:
    assert escape_md(text) == escaped


def test_evaluations_that_are_none_of_ours_are_left_out(tmp_path: Path) -> None:
    run, made = _run(tmp_path)
    _checkpoint(run, made)
    for number, content in enumerate(
        ["[", "{}", "[1]", '[{"model": 1}]', '[{"model": "m"}]', '[{"model": "m", "kl": "x"}]']
    ):
        (run / f"evaluation-{number}.json").write_text(content, encoding="utf-8")
    assert "held-out" not in _export(run, tmp_path / "out").text


def test_a_shard_holds_no_more_than_it_may(tmp_path: Path) -> None:
    run, made = _run(tmp_path)
    _checkpoint(run, made)
    _export(run, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 10_000


def test_special_ids_are_those_of_the_datas_tokenizer_not_of_the_template(tmp_path: Path) -> None:
    """Llama's own are 1 and 2; here 0 begins a document and 1 ends it, and a chat ends with 7, too."""
    run, made = _run(tmp_path, student={"config": {**MODEL, "pad_token_id": 100_000}})
    _checkpoint(run, made)
    settings = {"eos_token_id": [7, 1, VOCAB + 9], "temperature": 0.6, "transformers_version": "4.1.0"}
    write_json(run / "tokenizer" / "generation_config.json", settings)
    _export(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, [1, 7], None)
    assert model.generation_config.temperature == 0.6


def test_a_tokenizer_that_was_changed_since_the_run_began_is_not_exported(tmp_path: Path) -> None:
    run, made = _run(tmp_path)
    _checkpoint(run, made)
    write_description(run, made.snapshot(), {}, tokenizer=hashes_in(run / "tokenizer"))
    (run / "tokenizer" / "chat_template.jinja").write_text("not of this tokenizer")
    _export(run, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    (run / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<|b|>"}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json: expected sha256 .*: remove .*tokenizer and"):
        _export(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_student_whose_folder_has_rows_beyond_the_ids_is_exported_with_a_row_for_each_id(tmp_path: Path) -> None:
    """Qwen and OLMo 2 are published so. Padding rows would get probability in transformers' softmax."""
    named = described_teacher(tmp_path / "named", vocab_size=VOCAB + 90)
    run, made = _run(tmp_path, student={"config": str(named)})
    _checkpoint(run, made)
    _export(run, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    whole = AutoModelForCausalLM.from_config(load_config({**MODEL, "vocab_size": PADDED}, what="test"))
    whole.load_state_dict(_parameters())
    ids = torch.arange(1, 31)[None]
    assert exported.config.vocab_size == VOCAB
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, whole(ids).logits[..., :VOCAB])


def test_a_tokenizer_that_cannot_be_read_does_not_stop_the_export_of_a_finished_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, made = _run(tmp_path)
    _checkpoint(run, made)
    (run / "tokenizer" / "tokenizer.json").write_text("[]")
    _export(run, tmp_path / "out")
    assert "the export has no bos_token_id, eos_token_id and pad_token_id" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id is None, "not that of another"


@pytest.mark.parametrize(("model_type", "differs"), [("qwen2", True), ("qwen3", False)])
def test_a_family_whose_rules_replace_those_of_the_tokenizer_is_named_with_the_class_to_load(
    model_type: str, differs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**MODEL, "model_type": model_type}
    monkeypatch.setattr(f"{__name__}.MODEL", config)
    run, made = _run(tmp_path, student={"config": config})
    rules = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|e|>"}  # as tokenize writes it
    (run / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(rules), encoding="utf-8")
    _checkpoint(run, made)
    card = _export(run, tmp_path / "out")
    assert ("AutoTokenizer cuts texts by the rules of a qwen2 model" in caplog.text) == differs
    named = "PreTrainedTokenizerFast" if differs else "AutoTokenizer"
    assert f"import AutoModelForCausalLM, {named}" in card.text
    assert f'tokenizer = {named}.from_pretrained("out")' in card.text
