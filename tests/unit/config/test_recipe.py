"""Recipes: what is merged, what is refused, and that the refusal names key, value and way out in one line."""

import json
from pathlib import Path

import pytest

from megadistill.config.keys import keys
from megadistill.config.load import RENAMED, load_recipe, validate_recipe
from megadistill.config.recipe import Recipe
from megadistill.errors import UserError
from tests.paths import RECIPES

MINIMAL = """
objective: labels
run: {folder: runs/x}
data: {manifest: data/manifest.json}
student: {config: {model_type: llama}}
train: {steps: 10, global_batch: 8, micro_batch: 2, optimizer: {learning_rate: 1.0e-3}}
"""

ONE_RANK = "smollm2-pruned.yaml"
"""The recipe whose global batch of 2 sequences is one micro-batch: it is measured on two CPU cores."""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


def test_defaults_are_filled_in_and_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.loss.divergence == "forward_kl"
    assert recipe.loss.targets is None
    assert recipe.loss.schedule is None
    assert recipe.train.schedule.kind == "cosine"
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3


MIXTURE = MINIMAL.replace(
    "data: {manifest: data/manifest.json}",
    """
data:
  sources: {web: web/manifest.json, code: s3://bucket/code/manifest.json}
  curriculum:
    - {tokens: 800_000_000, weights: {web: 0.8, code: 0.2}}
    - {weights: {code: 1}}
""",
)


def test_a_mixture_is_sources_and_stages(tmp_path: Path) -> None:
    data = load_recipe(write(tmp_path, MIXTURE)).data
    assert [stage.tokens for stage in data.curriculum] == [800_000_000, None]
    assert data.curriculum[0].weights == {"web": 0.8, "code": 0.2}
    assert load_recipe(write(tmp_path, MIXTURE), ["data.skip=[[3,5],[9,10]]"]).data.skip == [[3, 5], [9, 10]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data.manifest=x/manifest.json", "data: give either manifest, or sources and curriculum"),
        ("data.curriculum=[]", "data: sources and curriculum go together"),
        ("data.curriculum=[{weights: {wbe: 1}}]", "curriculum entry 1 weighs wbe, no such source; did you mean 'web'?"),
        ("data.curriculum=[{tokens: 5, weights: {web: 1}}]", "the last curriculum entry has no end: remove its tokens"),
        ("data.curriculum=[{weights: {web: 1}}, {weights: {web: 1}}]", "curriculum entry 1 needs tokens"),
        ("data.curriculum=[{weights: {web: 0}}]", "data.curriculum.0: the weight of web is 0"),
        ("data.skip=[[5,5]]", "skip has [5, 5]: a range is [first, one behind the last]"),
        ("data.on_corrupt_sample=ignore", "data.on_corrupt_sample: input should be 'fail' or 'mask', found 'ignore'"),
        ("train.optimizer.kind=sgd", "train.optimizer.kind: input should be 'adamw', found 'sgd'"),
    ],
)
def test_data_that_does_not_fit_together_is_refused(tmp_path: Path, change: str, says: str) -> None:
    assert says in refused(write(tmp_path, MIXTURE), change)


def test_extends_and_overrides_merge_in_order(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.yaml")
    child = write(tmp_path, "extends: base.yaml\ntrain: {steps: 20}\nstudent: {config: {hidden_size: 8}}\n")
    recipe = load_recipe(child, ["train.micro_batch=4", "student.config.num_hidden_layers=3"])
    assert (recipe.train.steps, recipe.train.micro_batch, recipe.train.global_batch) == (20, 4, 8)
    assert recipe.student.config == {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3}


def test_a_recipe_may_refer_to_its_own_keys(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["run.folder=runs/${objective}-${train.steps}"])
    assert recipe.run.folder == "runs/labels-10"


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml") if "base" not in path.name))
def test_every_recipe_that_we_ship_is_valid(name: str) -> None:
    recipe = load_recipe(RECIPES / name)
    for world in (1,) if name == ONE_RANK else (1, 2, 4):
        assert recipe.accumulation(world) * world * recipe.train.micro_batch == recipe.train.global_batch
    assert Recipe.model_validate(json.loads(json.dumps(recipe.snapshot()))) == recipe


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.step=3", ["train.step", "did you mean 'steps'"]),
        ("trian.steps=3", ["trian", "did you mean 'train'"]),
        ("loss.temprature=2", ["loss.temprature", "did you mean 'temperature'"]),
        ("train.steps=many", ["train.steps", "many", "integer"]),
        ("train.steps=0", ["train.steps", "0", "at least 1"]),
        ("train.precision=fp16", ["train.precision", "fp16", "float32"]),
        ("train.optimizer.learning_rate=-1", ["train.optimizer.learning_rate", "-1"]),
        ("train.schedule.kind=wsd", ["train", "wsd", "decay_steps"]),
        ("train.schedule.decay_steps=3", ["train", "decay_steps", "cosine"]),
        ("train.schedule.warmup_steps=11", ["warmup_steps 11", "steps 10"]),
        ("teacher.path=t", ["labels", "teacher", "null"]),
        ("objective=distill", ["distill", "teacher.path"]),
        ("objective=distil", ["objective", "distil", "labels"]),
        ("loss.temperature=2.0", ["labels", "loss.temperature"]),
        ("loss.label_fraction=0.1", ["labels", "loss.label_fraction"]),
        ("loss.diagnostics_every=10", ["labels", "loss.diagnostics_every"]),
        ("loss.targets.select=sampled", ["labels", "loss.targets"]),
        ("loss.schedule.kind=cosine", ["labels", "loss.schedule"]),
        ("loss.chunk_tokens=1024", ["loss.chunk_tokens", "no such key"]),
        ("loss.elementwise=fused", ["loss.elementwise", "fused", "eager"]),
        ("loss.logit_memory_mb=0", ["loss.logit_memory_mb", "0"]),
        ("steps", ["steps", "key=value"]),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, override: str, says: list[str]) -> None:
    message = refused(write(tmp_path, MINIMAL), override)
    for part in says:
        assert part in message


def test_distilling_with_no_weight_on_the_teacher_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert "kd_weight 0" in refused(path, "objective=distill", "teacher.path=t", "loss.kd_weight=0.0")


DISTILL = ("objective=distill", "teacher.path=t")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["loss.divergence=jds"], ["loss.divergence", "jds", "jsd"]),
        (["loss.beta=0.3"], ["loss", "beta is 0.3", "jsd", "forward_kl"]),
        (["loss.divergence=jsd", "loss.alpha=0.3"], ["alpha is 0.3", "skew_kl", "jsd"]),
        (["loss.divergence=skew_kl", "loss.alpha=1.0"], ["loss.alpha", "1.0", "less than 1"]),
        (["loss.divergence=jsd", "loss.beta=1.5"], ["loss.beta", "1.5", "1"]),
        (["loss.label_fraction=1.0"], ["loss.label_fraction", "less than 1"]),
        (["loss.schedule.kind=wsd"], ["loss.schedule.kind wsd", "loss.schedule.decay_steps"]),
        (["loss.schedule.warmup_steps=11"], ["loss.schedule.warmup_steps 11", "steps 10"]),
        (["loss.targets.select=top_k"], ["loss.targets", "select top_k needs k"]),
        (["loss.targets.select=threshold"], ["threshold needs epsilon"]),
        (["loss.targets.select=threshold", "loss.targets.k=3"], ["k is 3", "top_k", "threshold"]),
        (["loss.targets.select=top_k", "loss.targets.k=3", "loss.targets.draws=9"], ["draws is 9", "sampled"]),
        (["loss.targets.select=top_p", "loss.targets.p=0.9"], ["top_p needs max_ids"]),
        (["loss.targets.select=sampled_distinct", "loss.targets.draws=9"], ["draws is 9", "sampled"]),
        (["loss.targets.select=sampled_distinct", "loss.targets.tail=other"], ["tail is other", "remove it"]),
        (["loss.targets.draws=9", "loss.targets.tail=other"], ["tail is other", "remove it"]),
        (["loss.targets.select=top_k", "loss.targets.k=3", "loss.targets.tail=lost"], ["tail", "lost", "dropped"]),
        (["loss.targets.draws=9", "loss.divergence=tvd"], ["targets", "tvd"]),
        (["loss.targets.draws=9", "loss.label_fraction=0.1"], ["label_fraction", "entropy", "0"]),
        (
            ["teacher.source=stored", "teacher.targets=kept", "loss.targets.draws=9", "loss.diagnostics_every=7"],
            ["loss.diagnostics_every is 7", "teacher.source stored", "set it to 0"],
        ),
    ],
)
def test_terms_of_the_loss_that_do_not_fit_are_refused(tmp_path: Path, overrides: list[str], says: list[str]) -> None:
    message = refused(write(tmp_path, MINIMAL), *DISTILL, *overrides)
    for part in says:
        assert part in message


def test_a_live_teacher_is_diagnosed_with_truncated_targets_too(tmp_path: Path) -> None:
    overrides = [*DISTILL, "loss.targets.draws=9", "loss.diagnostics_every=7"]
    assert load_recipe(write(tmp_path, MINIMAL), overrides).loss.diagnostics_every == 7


@pytest.mark.parametrize(
    ("overrides", "targets"),
    [
        (["loss.targets.select=sampled"], {"draws": 50}),
        (["loss.targets.draws=9"], {"draws": 9}),
        (["loss.targets.select=sampled_distinct"], {"k": 256}),
        (["loss.targets.select=top_k", "loss.targets.k=12"], {"k": 12, "tail": "other"}),
        (
            ["loss.targets.select=threshold", "loss.targets.epsilon=1.0e-3", "loss.targets.tail=dropped"],
            {"epsilon": 1e-3, "tail": "dropped"},
        ),
        (
            ["loss.targets.select=top_p", "loss.targets.p=0.95", "loss.targets.max_ids=50"],
            {"p": 0.95, "max_ids": 50, "tail": "other"},
        ),
    ],
)
def test_targets_say_what_they_keep_in_the_snapshot_too(
    tmp_path: Path, overrides: list[str], targets: dict[str, object]
) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), [*DISTILL, *overrides])
    given = {key: value for key, value in recipe.snapshot()["loss"]["targets"].items() if value is not None}
    assert given.pop("select") in ("sampled", "sampled_distinct", "top_k", "threshold", "top_p")
    assert given == targets
    assert Recipe.model_validate(json.loads(json.dumps(recipe.snapshot()))) == recipe


def test_a_schedule_of_the_weight_has_the_shapes_of_the_learning_rates(tmp_path: Path) -> None:
    overrides = ["loss.schedule.kind=wsd", "loss.schedule.warmup_steps=2", "loss.schedule.decay_steps=3"]
    schedule = load_recipe(write(tmp_path, MINIMAL), [*DISTILL, *overrides]).loss.schedule
    assert schedule is not None
    assert (schedule.kind, schedule.warmup_steps, schedule.decay_steps) == ("wsd", 2, 3)


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    assert "no recipe" in refused(tmp_path / "missing.yaml")
    (tmp_path / "mine.yaml").touch()
    assert f"did you mean {tmp_path / 'mine.yaml'}?" in refused(tmp_path / "min.yaml")
    assert "mapping" in refused(write(tmp_path, "- a\n- b\n"))
    assert "YAML" in refused(write(tmp_path, "a: [1\n"))
    with pytest.raises(UserError, match="4 mistakes\n  run: is required\n  data: is required"):
        load_recipe(write(tmp_path, "objective: labels\n"))
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    assert "extends itself" in refused(write(tmp_path, "extends: a.yaml\n", "b.yaml"))


def test_a_recipe_cannot_read_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    text = MINIMAL.replace("runs/x", "'${oc.env:A_SECRET}'")
    message = refused(write(tmp_path, text))
    assert "resolver" in message
    assert "hunter2" not in message
    assert "resolver" in refused(write(tmp_path, MINIMAL), "run.folder=${oc.env:A_SECRET}")
    assert "resolver" in refused(write(tmp_path, MINIMAL), "run.folder=${train.steps}${oc.env:A_SECRET}")


def test_accumulation_is_what_the_global_batch_needs(tmp_path: Path) -> None:
    """8 sequences in micro-batches of 2: three ranks take two each, and a part of them is surplus."""
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert [recipe.accumulation(world) for world in (1, 2, 3, 4, 5, 100)] == [4, 2, 2, 1, 1, 1]
    shared = recipe.model_copy(update={"distributed": recipe.distributed.model_copy(update={"sequence": 2})})
    assert [shared.accumulation(world) for world in (2, 4, 6, 8)] == [4, 2, 2, 1]
    with pytest.raises(UserError, match=r"distributed\.sequence is 2, but this run has 3 ranks"):
        shared.accumulation(3)


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL.replace("runs/x", "'${oc.${objective}:A_SECRET}'"),
        "extends: ${oc.env:A_SECRET}/base.yaml\n",
    ],
)
def test_a_nested_resolver_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    message = refused(write(tmp_path, text), "objective=env")
    assert "resolver" in message
    assert "hunter2" not in message


def _nested(key: str, value: object) -> dict[str, object]:
    """`a.b` and 1 -> {"a": {"b": 1}}."""
    head, _, rest = key.partition(".")
    return {head: _nested(rest, value) if rest else value}


@pytest.mark.parametrize(("former", "now"), RENAMED.items())
def test_former_names_are_refused_with_the_new_one(tmp_path: Path, former: str, now: str) -> None:
    """Former names in a file, in `--set`, and in the recipe.json of a run folder."""
    key, _, value = former.partition("=")
    if former in ("comm", "faults"):
        key, former, now = f"{key}.x", f"{former}.x", f"{now}.x"
    line = f"{former} is now {now}: use the new name"
    assert refused(write(tmp_path, MINIMAL), f"{key}={value or 3}") == f"--set {key}={value or 3}: {line}"
    with pytest.raises(UserError) as caught:
        validate_recipe(_nested(key, value or 3), source="runs/x/recipe.json")
    assert str(caught.value) == f"runs/x/recipe.json: {line}"
    path = write(tmp_path, json.dumps(_nested(key, value or 3)))
    assert refused(path) == f"{path}, line 1: {line}"


def test_a_former_name_is_no_key_and_its_new_name_is_one() -> None:
    known = {key.name: key.type for key in keys()}
    sections = {key.section for key in keys()}
    for former, now in RENAMED.items():
        key, _, value = now.partition("=")
        assert key in known or key in sections, now
        assert former not in known.keys() | sections, former
        if value:
            assert f"`{value}`" in known[key]
            assert f"`{former.partition('=')[2]}`" not in known[key]


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ("{every: 2}", "validation.data: is required"),
        ("{every: 2, data: {}}", "validation.data"),
        ("{every: 2, data: {all: m.json}}", "and not all, which is the name of all of them together"),
        ("{every: 2, data: {a/b: m.json}}", "data has a split 'a/b': name splits with letters"),
        ("{every: 2, data: {a: m.json}, stop: true}", "stop is true without a patience"),
        ("{every: 0, data: {a: m.json}}", "validation.every"),
    ],
)
def test_a_validation_that_measures_nothing_is_refused(section: str, reason: str, tmp_path: Path) -> None:
    assert reason in refused(write(tmp_path, f"{MINIMAL}validation: {section}\n"))
