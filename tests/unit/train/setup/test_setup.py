"""Refusals of `prepare` before a run starts: one line, the value, the way out, and nothing written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.config.recipe import Recipe, TeacherSection
from megadistill.distributed.launch import Launch
from megadistill.errors import UserError
from megadistill.models.families import FAMILIES
from megadistill.student.deepspeed_config import active_deepspeed_config
from megadistill.train.setup import preflight
from megadistill.train.setup.run_folder import write_description
from megadistill.train.setup.setup import describe_layout, prepare
from tests.unit.train.cases import (
    MODEL,
    SEQUENCE,
    TOKENIZER,
    VOCAB,
    described_data,
    described_teacher,
    recipe,
    topology,
)


def _launch(world: int = 2) -> Launch:
    return Launch(rank=0, world=world, local_rank=0, local_world=world)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return described_data(tmp_path / "data" / "train")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return described_teacher(tmp_path / "teacher")


def _refused(given: Recipe, *, world: int = 2) -> str:
    with pytest.raises(UserError) as caught:
        prepare(given, _launch(world))
    message = str(caught.value)
    assert "\n" not in message
    assert not Path(given.run.folder).exists()
    return message


def test_a_recipe_that_fits_is_read_and_nothing_is_written(manifest: Path, teacher: Path, tmp_path: Path) -> None:
    setup = prepare(recipe(manifest, tmp_path / "run", teacher=teacher), _launch())
    assert (setup.accumulation, setup.group_size) == (2, 2)
    assert setup.shapes[0].tokens == 8 * SEQUENCE
    assert setup.student_config.vocab_size == VOCAB
    assert setup.teacher_config is not None
    assert setup.deepspeed_config["zero_optimization"]["stage"] == 3
    assert not (tmp_path / "run").exists()
    assert prepare(recipe(manifest, tmp_path / "run"), _launch(1)).teacher_config is None


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"distributed": {"vocab_group": 3}}, ["distributed.vocab_group is 3", "1, 2"]),
        ({"student": {"deepspeed": "none.json"}}, ["student.deepspeed", "none.json"]),
        ({"student": {"config": {**MODEL, "hidden_sizes": 3}}}, ["student.config", "hidden_sizes", "hidden_size"]),
        ({"student": {"config": {**MODEL, "vocab_size": 77}}}, ["student.config", "77", "250", "leave vocab_size out"]),
        ({"student": {"config": {**MODEL, "max_position_embeddings": 16}}}, ["student.config", "16", "32", "raise it"]),
        ({"data": {"manifest": "none/manifest.json"}}, ["none/manifest.json", "tokenize"]),
    ],
)
def test_what_does_not_fit_is_refused(
    manifest: Path, tmp_path: Path, sections: dict[str, Any], says: list[str]
) -> None:
    message = _refused(recipe(manifest, tmp_path / "run", **sections))
    for part in says:
        assert part in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_position_embeddings": 16}, ["teacher.path", "16", "32"]),
        ({"vocab_size": 249}, ["teacher.path", "249", "250", "tokenizer", "teacher.vocab_map"]),
        ({"num_hidden_layers": 1}, ["1 layers", "2 stages"]),
        ({"tokenizer": None}, ["has no tokenizer.json and no", "tokenize ... --tokenizer", "teacher.vocab_map"]),
        ({"tokenizer": b"other pieces"}, ["teacher.path", "sha256", "tokenize ... --tokenizer", "teacher.vocab_map"]),
        ({"model_type": "gpt2"}, ["teacher.path", "gpt2", "llama"]),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    manifest: Path, tmp_path: Path, changes: dict[str, Any], says: list[str]
) -> None:
    unfit = described_teacher(tmp_path / "unfit", **changes)
    message = _refused(recipe(manifest, tmp_path / "run", teacher=unfit))
    for part in says:
        assert part in message
    assert "copy" not in message
    if "teacher.vocab_map" in says:
        assert message.index("--tokenizer") < message.index("teacher.vocab_map"), "first what nearly always is right"


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_named(manifest: Path, tmp_path: Path) -> None:
    """The usual cause: a padding token was added to the tokenizer, and no row to the model."""
    small = described_teacher(tmp_path / "small", vocab_size=VOCAB - 1)
    message = _refused(recipe(manifest, tmp_path / "run", teacher=small))
    for part in ("250 ids, and id 249 can be in the shards", "has 249 rows", "remove the tokens from id 249 on"):
        assert part in message


def test_a_students_folder_with_another_tokenizer_is_refused(manifest: Path, tmp_path: Path) -> None:
    """One without a tokenizer, or with the data's own, is only an architecture."""
    for tokenizer in (None, TOKENIZER):
        folder = described_teacher(tmp_path / f"student-{tokenizer is None}", tokenizer=tokenizer)
        assert prepare(recipe(manifest, tmp_path / "run", student={"config": str(folder)}), _launch())
    other = described_teacher(tmp_path / "other", tokenizer=b"other pieces")
    message = _refused(recipe(manifest, tmp_path / "run", student={"config": str(other)}))
    for part in ("student.config", "sha256", "without a tokenizer"):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 64}, ["hidden_size is 64 there, 32 here"]),
        ({"vocab_size": 249}, ["249", "250", "tokenize the text"]),
        ({"tokenizer": b"other pieces"}, ["sha256", "without a tokenizer"]),
        ({"model_type": "gpt2"}, ["gpt2"]),
    ],
)
def test_weights_that_the_student_cannot_start_from_are_refused(
    manifest: Path, tmp_path: Path, changes: dict[str, Any], says: list[str]
) -> None:
    given = recipe(manifest, tmp_path / "run", student={"weights": str(described_teacher(tmp_path / "w", **changes))})
    message = _refused(given)
    for part in ["student.weights", *says]:
        assert part in message


def test_weights_are_not_needed_once_the_run_has_saved(manifest: Path, tmp_path: Path) -> None:
    given = recipe(manifest, tmp_path / "run", student={"weights": str(tmp_path / "gone")})
    assert "gone" in _refused(given)
    (tmp_path / "run" / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert prepare(given, _launch())


@pytest.mark.parametrize(
    ("changes", "world", "says"),
    [
        ({"ranks": 3, "stages": 3}, 4, ["teacher.stages is 3", "2 layers", "2 or less"]),
        ({"ranks": 3, "stages": 2}, 4, ["teacher.ranks 3", "teacher.stages 2", "a multiple of 2"]),
        ({"ranks": 2, "stages": 1}, 5, ["3 ranks of the student", "2 replicas"]),
        ({"ranks": 4}, 4, ["teacher.ranks is 4", "4 processes"]),
    ],
)
def test_a_teachers_own_ranks_that_do_not_fit_are_refused(
    manifest: Path, teacher: Path, tmp_path: Path, changes: dict[str, Any], world: int, says: list[str]
) -> None:
    given = recipe(manifest, tmp_path / "run", teacher=teacher, distributed={"vocab_group": 1})
    assert given.teacher is not None
    section = TeacherSection.model_validate({"path": str(teacher), "placement": "disaggregated", **changes})
    message = _refused(given.model_copy(update={"teacher": section}), world=world)
    for part in says:
        assert part in message


def test_a_teacher_with_padding_rows_is_welcome(manifest: Path, tmp_path: Path) -> None:
    padded = described_teacher(tmp_path / "padded", vocab_size=VOCAB + 6)
    setup = prepare(recipe(manifest, tmp_path / "run", teacher=padded), _launch())
    assert setup.teacher_config is not None


def test_the_folder_of_another_recipe_is_refused(manifest: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_description(run, recipe(manifest, run, train={"max_grad_norm": 7.0}).snapshot(), {})
    with pytest.raises(UserError, match=r"train\.max_grad_norm was 7\.0, is 1\.0"):
        prepare(recipe(manifest, run), _launch())


def _profile(folder: Path, name: str, **zero: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}), encoding="utf-8")
    return path


def test_settings_that_need_a_gpu_are_disabled_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _profile(tmp_path, "gpu.json", overlap_comm=True, reduce_scatter=True, zero_quantized_weights=True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    used, disabled = active_deepspeed_config(str(path))
    assert disabled == ("overlap_comm", "zero_quantized_weights")
    zero = used["zero_optimization"]
    assert (zero["overlap_comm"], zero["zero_quantized_weights"], zero["reduce_scatter"]) == (False, False, True)
    plain = _profile(tmp_path, "plain.json", reduce_scatter=True)
    assert active_deepspeed_config(str(plain)) == (json.loads(plain.read_text()), ())
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert active_deepspeed_config(str(path)) == (json.loads(path.read_text()), ())


def test_one_line_describes_the_layout(manifest: Path, tmp_path: Path) -> None:
    precise = prepare(recipe(manifest, tmp_path / "run", train={"precision": "float32"}), _launch(1))
    line = describe_layout(precise, topology())
    assert line == "device: cpu; world size 1; vocab group 1; float32; disabled on a CPU: overlap_comm"
    short = prepare(recipe(manifest, tmp_path / "run", train={"precision": "bfloat16"}), _launch(1))
    assert "bfloat16; slow: bfloat16 is emulated on a CPU" in describe_layout(short, topology())


def test_any_number_of_ranks_trains_and_the_shapes_follow(tmp_path: Path) -> None:
    """Neither the batch of 8 nor a vocabulary that is padded to 256 divides over three ranks, or five."""
    manifest = described_data(tmp_path / "data" / "train")
    given = recipe(manifest, tmp_path / "run")  # micro-batches of 2
    shares = {}
    for world in (1, 2, 3, 4, 5):
        setup = prepare(given, Launch(0, world, 0, world))
        assert (setup.ranks, setup.data_world, setup.replicas) == (world, world, 1)
        (shape,) = setup.shapes
        assert shape.accumulation == setup.accumulation == -(-8 // (2 * world))
        assert setup.rows_at(100) == 2 * setup.accumulation
        shares[world] = shape.surplus(world)
    assert shares == {1: 0, 2: 0, 3: pytest.approx(1 / 3), 4: 0, 5: pytest.approx(1 / 5)}


def test_a_set_up_is_derived_for_another_number_of_replicas(tmp_path: Path) -> None:
    """As if the run had been started on so many ranks; the rest of the set-up is the same."""
    manifest = described_data(tmp_path / "data" / "train")
    plain = recipe(manifest, tmp_path / "run", distributed={"shard": 2}).model_dump()
    teachers = {"a": {"path": str(described_teacher(tmp_path / "teacher"))}}
    given = Recipe.model_validate({**plain, "objective": "distill", "teachers": teachers})
    four = prepare(given, Launch(0, 8, 0, 2))
    for replicas in (4, 3, 1, 5):
        derived, started = four.with_replicas(replicas), prepare(given, Launch(0, 2 * replicas, 0, 2))
        for ours, theirs in ((derived, started), (derived.teachers["a"], started.teachers["a"])):
            for name in ("shapes", "ranks", "replicas", "group_size", "accumulation", "data_world", "recipe"):
                assert getattr(ours, name) == getattr(theirs, name), name


def test_a_deepspeed_file_with_another_stage_is_refused_before_anything_starts(tmp_path: Path) -> None:
    manifest = described_data(tmp_path / "data" / "train")
    deepspeed_config = tmp_path / "ds.json"
    deepspeed_config.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    with pytest.raises(UserError, match="stage must be 3, found 2"):
        prepare(recipe(manifest, tmp_path / "run", student={"deepspeed": str(deepspeed_config)}), Launch(0, 1, 0, 1))


def test_attention_dropout_is_refused(tmp_path: Path) -> None:
    manifest = described_data(tmp_path / "data" / "train")
    config = {**MODEL, "attention_dropout": 0.1}
    with pytest.raises(UserError, match=r"attention_dropout is 0\.1.*set attention_dropout to 0"):
        prepare(recipe(manifest, tmp_path / "run", student={"config": config}), _launch(1))


def test_any_dropout_is_refused(tmp_path: Path) -> None:
    """Seed-OSS has both by default."""
    manifest = described_data(tmp_path / "data" / "train")
    config = {**MODEL, "model_type": "seed_oss"}
    with pytest.raises(UserError, match=r"attention_dropout is 0\.1.*set attention_dropout and residual_dropout to 0"):
        prepare(recipe(manifest, tmp_path / "run", student={"config": config}), _launch(1))


def test_a_student_of_a_family_that_can_only_teach_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = described_data(tmp_path / "data" / "train")
    family = FAMILIES[MODEL["model_type"]]
    monkeypatch.setitem(FAMILIES, MODEL["model_type"], dataclasses.replace(family, teacher_only="it forgets"))
    with pytest.raises(UserError, match=r"^student\.config: a llama model can only teach: it forgets; students may be"):
        prepare(recipe(manifest, tmp_path / "run"), _launch(1))


def test_a_recurrent_teacher_is_refused_where_documents_are_kept_apart(
    manifest: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[MODEL["model_type"]]
    monkeypatch.setitem(FAMILIES, MODEL["model_type"], dataclasses.replace(family, recurrent=True))
    student = {"config": {**MODEL, "model_type": "qwen3"}}
    apart = recipe(manifest, tmp_path / "run", student=student, teacher=teacher, data={"document_mask": True})
    assert _refused(apart).startswith("teacher.path: recurrent layers of a llama model carry their state over")
    assert prepare(recipe(manifest, tmp_path / "run", teacher=teacher), _launch()).recipe


MIXTURE = {**MODEL, "model_type": "mixtral", "num_local_experts": 4}


def test_noise_of_the_routers_is_refused(tmp_path: Path) -> None:
    """transformers multiplies the experts' inputs by it in place, which ended in a traceback at the first step."""
    manifest = described_data(tmp_path / "data" / "train")
    config = {**MIXTURE, "router_jitter_noise": 0.1}
    with pytest.raises(UserError, match=r"^student\.config: router_jitter_noise is 0\.1;.*set it to 0"):
        prepare(recipe(manifest, tmp_path / "run", student={"config": config}), _launch(1))


def test_clipped_queries_are_refused_where_selective_checkpointing_keeps_them(tmp_path: Path) -> None:
    """transformers clips them in place, which torch refuses at the first step."""
    manifest = described_data(tmp_path / "data" / "train")
    config = {**MODEL, "model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 8.0}
    assert prepare(recipe(manifest, tmp_path / "run", student={"config": config}), _launch(1)).recipe
    student = {"config": config, "activation_checkpointing": "selective"}
    with pytest.raises(UserError, match=r"^student\.config: clip_qkv is 8\.0, .*: take full or none"):
        prepare(recipe(manifest, tmp_path / "run", student=student), _launch(1))


@pytest.mark.parametrize("key", ["router_aux_loss_coef", "router_z_loss_coef"])
def test_a_weight_of_routers_that_are_not_there_is_refused(tmp_path: Path, key: str) -> None:
    manifest = described_data(tmp_path / "data" / "train")
    student = {"config": MIXTURE}
    assert prepare(recipe(manifest, tmp_path / "run", loss={key: 0.1}, student=student), _launch(1)).recipe
    with pytest.raises(UserError, match=rf"^loss\.{key} is 0\.1, but the llama model .* has no experts: remove it"):
        prepare(recipe(manifest, tmp_path / "run", loss={key: 0.1}), _launch(1))


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        prepare(recipe(described_data(tmp_path / "data" / "train"), tmp_path / "run"), _launch(1))


def _mapped(manifest: Path, folder: Path, ids: list[int], **loss: Any) -> Recipe:
    """A teacher of another tokenizer with 90 ids, and a map to them."""
    other = described_teacher(folder / "other", tokenizer=None, vocab_size=90)
    (folder / "map.json").write_text(json.dumps(ids), encoding="utf-8")
    made = recipe(manifest, folder / "run", teacher=other, loss=loss)
    teacher = TeacherSection(path=str(other), vocab_map=str(folder / "map.json"))
    return made.model_copy(update={"teacher": teacher})


def test_a_map_of_the_vocabulary_replaces_the_comparison_of_tokenizers(manifest: Path, tmp_path: Path) -> None:
    ids = [*range(89, -1, -1), *[-1] * (VOCAB - 90)]
    setup = prepare(_mapped(manifest, tmp_path, ids, divergence="jsd"), _launch())
    assert setup.vocab_map is not None
    assert setup.vocab_map.tolist() == ids


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_compiled_layers_need_a_compiler(
    key: str, manifest: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe(manifest, tmp_path / "run", teacher=teacher).model_dump()
    changed = Recipe.model_validate({**values, key: {**values[key], "compile": True}})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = _refused(changed)
    for part in (f"{key}.compile is true", "no-such-compiler", "CXX", f"set {key}.compile to false"):
        assert part in message


@pytest.mark.parametrize("loss", [{"divergence": "reverse_kl"}, {"divergence": "jsd", "beta": 1.0}])
def test_reverse_kl_needs_a_teacher_that_knows_every_id(manifest: Path, tmp_path: Path, loss: dict[str, Any]) -> None:
    message = _refused(_mapped(manifest, tmp_path, [0, *[-1] * (VOCAB - 1)], **loss))
    assert "reverse KL, KL(student ‖ teacher), is infinite" in message
    assert f"{VOCAB - 1} ids" in message


def test_a_model_is_compiled_as_the_log_says(manifest: Path, teacher: Path, tmp_path: Path) -> None:
    """On a CPU by the recipe alone, and a teacher that is not loaded never."""
    setup = prepare(recipe(manifest, tmp_path / "run", teacher=teacher), _launch())
    assert (setup.compiles("student"), setup.compiles("teacher")) == (False, False)
    assert setup.recipe.teacher is not None
    compiled = setup.recipe.model_copy(update={"teacher": setup.recipe.teacher.model_copy(update={"compile": True})})
    assert dataclasses.replace(setup, recipe=compiled).compiles("teacher")
    assert not dataclasses.replace(setup, recipe=compiled).compiles("student")
    assert not dataclasses.replace(setup, recipe=compiled, teacher_config=None).compiles("teacher")


def test_a_compiled_loss_needs_a_compiler(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = recipe(manifest, tmp_path / "run", loss={"elementwise": "compiled"})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = _refused(changed)
    for part in ("loss.elementwise", "no-such-compiler", "CXX", "eager"):
        assert part in message
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "g++ is not on the PATH" in _refused(changed)
    (tmp_path / "g++").write_bytes(b"")
    (tmp_path / "g++").chmod(0o755)
    assert prepare(changed, _launch()).recipe.loss.elementwise == "compiled"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    (tmp_path / "g++").unlink()
    monkeypatch.setattr(preflight, "has_triton", lambda: True)
    prepare(changed, _launch())
    monkeypatch.setattr(preflight, "has_triton", lambda: False)
    message = _refused(changed)
    for part in ("loss.elementwise", "needs Triton", "pip install triton", "auto or eager"):
        assert part in message
    prepare(recipe(manifest, tmp_path / "run"), _launch())  # auto makes do with eager arithmetic
