"""Mistakes of a recipe: all of them are shown, a line each, with file and line, and with what to write.

A new case is a line of one of the lists: what somebody types, and words that the answer has.
"""

from pathlib import Path

import pytest

from megadistill.config.load import load_recipe
from megadistill.config.other_names import EXPLAINED, OTHER_NAMES, OTHER_VALUES, key_names
from megadistill.config.recipe import Recipe
from megadistill.errors import UserError

RECIPE = """\
objective: distill
run: {folder: runs/x}
data: {manifest: data/manifest.json}
student:
  config: {model_type: llama}
teacher: {path: models/t}
loss: {temperature: 2.0}
train:
  steps: 100
  global_batch: 8
  micro_batch: 2
  optimizer:
    learning_rate: 1.0e-3
"""


def answer(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the refusal of a recipe, without the folder of its file."""
    path = folder / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    lines = str(caught.value).replace(f"{folder}/", "").splitlines()
    assert lines[0] == f"x.yaml: {len(lines) - 1} mistakes" or len(lines) == 1
    return lines


def test_the_recipe_of_these_tests_is_valid(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(RECIPE)
    assert load_recipe(tmp_path / "x.yaml").train.steps == 100


SYNTAX = [
    ("steps: 100", "steps: 100\n  steps: 200", ["line 10, column 3", "train.steps is there twice (first in line 9)"]),
    ("run: {folder: runs/x}", "run: {folder: runs/x, folder: y}", ["line 2, column 23", "run.folder is there twice"]),
    ("  global_batch", "    global_batch", ["line 10, column 5", "`global_batch: 8`", "indentation is deeper"]),
    ("  global_batch", " global_batch", ["line 10, column 2", "`global_batch: 8`", "indentation is that of no line"]),
    ("  global_batch", "\tglobal_batch", ["line 10, column 1", "a tab", "spaces"]),
    ("steps: 100", "steps:100", ["line 9, column 8", "`steps:100`", "a space is missing after the colon"]),
    ("steps: 100", "steps 100", ["line 9, column 3", "`steps 100`", "a key without a colon"]),
    ("  global_batch: 8", "  global_batch", ["line 10, column 3", "`global_batch`", "a key without a colon"]),
    ("run: {folder: runs/x}", "run: {folder: 'runs/x}", ["line 2, column 15", "a quote is opened here"]),
    ("run: {folder: runs/x}", "run: {folder: runs/x", ["line 2, column 6", "{ is opened here and not closed"]),
    ("run: {folder: runs/x}", "run: {folder: a seed: 1}", ["line 2, column 6", "a comma is missing"]),
    ("train:\n", "train: steps: 5\n", ["line 8, column 13", "two keys in one line"]),
    ("{path: models/t}", "{path: @t}", ["line 6, column 17", "cannot begin with @", "quotes"]),
    ("{path: models/t}", "{path: *t}", ["line 6, column 17", "quotes"]),
    ("train:\n", "---\ntrain:\n", ["line 8, column 1", "a second document"]),
    ("  steps: 100", "  - steps: 100", ["a list item between keys: take the - away"]),
    ("run: {", "- run: {", ["line 2, column 1", "a list item between keys: take the - away"]),
]


@pytest.mark.parametrize(("before", "after", "says"), SYNTAX)
def test_a_mistake_of_yaml_has_line_column_and_text(tmp_path: Path, before: str, after: str, says: list[str]) -> None:
    assert before in RECIPE
    (line,) = answer(tmp_path, RECIPE.replace(before, after, 1))
    for part in ("x.yaml, line ", *says):
        assert part in line, line


_ALIASES = "".join(f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}' if n else 'x'])}]\n" for n in range(9))
TOO_LARGE = [
    ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    ("\n".join(" " * depth + "a:" for depth in range(400)), "nested too deeply"),
    (_ALIASES, "more than 100,000 keys and items"),
    ("#" * (1 << 20) + "\n", "more than 1,048,576 bytes"),
]


@pytest.mark.parametrize(("text", "says"), TOO_LARGE)
def test_a_file_that_no_recipe_needs_is_refused_before_it_costs(tmp_path: Path, text: str, says: str) -> None:
    (line,) = answer(tmp_path, text)
    assert says in line


OVERRIDES = [
    ("train.step=5", ["--set train.step=5: train.step: no such key", "did you mean 'steps'?"]),
    ("trian.steps=5", ["did you mean 'train'?"]),
    ("train.Steps=5", ["did you mean 'steps'?"]),
    ("train.global-batch=5", ["did you mean 'global_batch'?"]),
    # names of other trainers
    ("train.lr=3e-4", ["use train.optimizer.learning_rate"]),
    ("lr=3e-4", ["use train.optimizer.learning_rate"]),
    ("train.warmup=10", ["use train.schedule.warmup_steps"]),
    ("train.epochs=3", ["measured in steps", "train.steps", "train.global_batch"]),
    ("train.batch_size=8", ["use train.global_batch"]),
    ("train.per_device_train_batch_size=8", ["use train.micro_batch"]),
    ("train.max_steps=8", ["use train.steps"]),
    ("train.grad_accumulation=8", ["follows from train.global_batch", "leave it out"]),
    ("data.seq_len=2048", ["tokenize --sequence-length"]),
    ("train.save_steps=10", ["use train.checkpoint_every"]),
    ("train.bf16=true", ["use train.precision"]),
    ("output_dir=x", ["use run.folder"]),
    ("teacher.model=x", ["use teacher.path"]),
    ("student.path=x", ["use student.config"]),
    ("alpha=0.5", ["loss.kd_weight", "loss.ce_weight"]),
    ("train.resume_from_checkpoint=true", ["the same command resumes"]),
    # the right key in the wrong place
    ("train.learning_rate=3e-4", ["use train.optimizer.learning_rate"]),
    ("steps=5", ["use train.steps"]),
    ("train.temperature=2", ["use loss.temperature"]),
    ("distributed.seed=2", ["use run.seed or data.seed"]),
    ("train.warmup_steps=5", ["use train.schedule.warmup_steps"]),
    ("optimizer.learning_rate=5", ["optimizer: no such key", "use train.optimizer"]),
    ("data.train=x", ["use data.manifest"]),
    ("data.loss=x", ["data.loss: no such key; loss is a section of its own", "without indentation"]),
    # what other trainers do
    ("train.do_eval=true", ["set validation.every, and name the splits in validation.data"]),
    ("train.report_to=wandb", ["use track"]),
    ("distributed.context_parallel_size=2", ["use distributed.sequence"]),
    # no near name
    ("checkpoint.frobnicate=1", ["checkpoint has keep_last, keep_every, asynchronous"]),
    # types
    ("train.steps=many", ["give an integer", "the text 'many'"]),
    ("train.steps=2.5", ["give an integer", "found 2.5"]),
    ("train.steps=1e3", ["give an integer", "write 1000"]),
    ("train.steps='1000'", ["the text '1000'", "write 1000, without quotes"]),
    ("train.steps=10k", ["the text '10k': write 10000"]),
    ("train.steps=1,000", ["write 1000"]),
    ("train.steps=", ["train.steps: is required"]),
    ("teacher=models/t", ["write teacher: {path: models/t}"]),
    ("train.optimizer=AdamW", ["write optimizer: {kind: AdamW}"]),
    ("train.log_every=", ["found nothing: give it a value, or remove the key"]),
    ("train.precision=no", ["found false"]),
    # texts that a shell would expand
    ("run.folder=~/x", ["run.folder: ~ is not expanded here: write /"]),
    ("teacher.path=$HOME/t", ["environment variables are not read", '--set "teacher.path=$HOME/t"']),
    ("run.folder='${HOME}/x'", ["run.folder", "HOME", "environment variables are not read"]),
    ("train.optimizer.learning_rate='3e-4'", ["give a number", "the text '3e-4'", "write 3.0e-4, without quotes"]),
    ("train.schedule=cosine", ["give a section", "the text 'cosine'"]),
    ("data.document_mask=1", ["give true or false", "found 1", "write true"]),
    ("data.document_mask='yes'", ["write true, without quotes"]),
    ("run.folder=5", ["give text, found 5", "write '5'"]),
    ("run.folder=on", ["give text, found true", "quotes"]),
    ("run.timeline=5", ["give a list", "write [5]"]),
    ("student.config=3", ["student.config", "found 3"]),
    # values of enumerations
    ("loss.divergence=forward_kL", ["did you mean 'forward_kl'?"]),
    ("loss.divergence=kl", ["did you mean 'forward_kl'?"]),
    ("student.activation_checkpointing=true", ["'none', 'selective' or 'full'", "found true; did you mean 'full'?"]),
    ("student.activation_checkpointing=false", ["found false; did you mean 'none'?"]),
    ("train.schedule.kind=wsdd", ["found 'wsdd'", "did you mean 'wsd'?"]),
    ("train.precision=bf16", ["did you mean 'bfloat16'?"]),
    ("train.optimizer.kind=Adam", ["train.optimizer.kind", "did you mean 'adamw'?"]),
    ("objective=distillation", ["did you mean 'distill'?"]),
    # values out of range, references, the form of --set
    ("train.steps=0", ["at least 1", "found 0"]),
    ("run.folder=${run.sed}", ["run.folder", "run.sed"]),
    ("run.timeline=[1,2", ["--set run.timeline=[1,2: the value cannot be read as YAML", "brackets"]),
    ('run.folder="x', ["cannot be read as YAML", "quotes"]),
    ("Train.Steps=5", ["--set Train.Steps=5: Train: no such key"]),
    ("train..steps=5", ["not of the form key=value"]),
    ("train.steps", ["key=value"]),
]


@pytest.mark.parametrize(("override", "says"), OVERRIDES)
def test_a_mistake_of_a_key_is_one_line_with_what_to_write(tmp_path: Path, override: str, says: list[str]) -> None:
    (line,) = answer(tmp_path, RECIPE, override)
    for part in says:
        assert part in line, line


def test_all_mistakes_are_listed_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
objective: labels
run: {folder: 5}
run: {folder: y}
data: {manifest: d, curiculum: []}
student: {config: {model_type: llama}}
teacher: {path: t}
train:
  epochs: 3
  lr: '3e-4'
  global_batch: '64'
  micro_batch: 0
  schedule: {kind: wsd}
  optimizer: {betas: [0.9, 0.95]}
"""
    lines = answer(tmp_path, text, "train.log_every=often")
    expected = [
        *("line 2: run.folder: ", "line 3, column 1: run is there twice", "line 4: data.curiculum: "),
        *("line 8: train.epochs: ", "line 9: train.lr: ", "line 10: train.global_batch: "),
        *("line 11: train.micro_batch: ", "line 13: train.optimizer.betas: "),
        *("--set train.log_every=often: train.log_every: ",),
    ]
    for each in expected:
        assert len([line for line in lines if line.startswith(f"  {each}")]) == 1, (each, lines)
    assert any("train.steps: is required" in line for line in lines)
    order = [next(n for n, line in enumerate(lines) if line.startswith(f"  {each}")) for each in expected]
    assert order == sorted(order)


def test_mistakes_of_several_sections_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    """Each section's check stops at its first mistake; those of other sections, and of the whole, are shown too."""
    overrides = ["loss.beta=0.5", "train.schedule.kind=wsd", "teacher.queue=9", "run.timeline=[5,1]"]
    lines = answer(tmp_path, RECIPE, *overrides)
    for part in ("beta is 0.5", "decay_steps", "queue belongs to", "timeline is [5, 1]"):
        assert any(part in line for line in lines), (part, lines)


def test_a_correction_makes_no_further_mistakes(tmp_path: Path) -> None:
    """`teacher.pth` is not listed again as a missing `teacher.path`, a bad `steps` not as missing steps."""
    assert len(answer(tmp_path, RECIPE.replace("path:", "pth:"))) == 1
    assert len(answer(tmp_path, RECIPE.replace("teacher:", "techer:"))) == 1
    assert len(answer(tmp_path, RECIPE, "train.steps=many")) == 1
    assert len(answer(tmp_path, RECIPE, "train.schedule.kind=wsd", "train.schedule.decay_steps=soon")) == 1


def test_a_section_that_a_correction_makes_is_not_listed_as_missing(tmp_path: Path) -> None:
    before, after = "run: {folder: runs/x}", "output_dir: runs/x"
    (line,) = answer(tmp_path, RECIPE.replace(before, after))
    assert "use run.folder" in line
    (line,) = answer(tmp_path, RECIPE.replace("  optimizer:\n    learning_rate", "  lr"))
    assert "use train.optimizer.learning_rate" in line


def test_a_shorter_recipe_has_no_mistake_of_a_key_that_it_does_not_have(tmp_path: Path) -> None:
    """The warm-up of a run of 100,000 steps does not fit into a recipe of 100, which is refused as another one."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text('{"recipe": {"train": {"schedule": {"warmup_steps": 500}}}}')
    (tmp_path / "x.yaml").write_text(RECIPE)
    assert load_recipe(tmp_path / "x.yaml", [f"run.folder={run}"]).train.schedule.warmup_steps == 5
    longer = load_recipe(tmp_path / "x.yaml", [f"run.folder={run}", "train.steps=200000"])
    assert longer.train.schedule.warmup_steps == 500


def test_a_value_that_a_base_leaves_open_is_required(tmp_path: Path) -> None:
    (line,) = answer(tmp_path, RECIPE.replace("folder: runs/x", "folder: '???'"))
    assert "run.folder: is required" in line


def test_the_record_of_a_run_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"recipe": {}, "versions": {}}')
    with pytest.raises(UserError, match="the record of a run, not a recipe: name the YAML file"):
        load_recipe(tmp_path / "recipe.json")


def test_a_mistake_names_the_file_that_holds_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(RECIPE.replace("steps:", "stpes:"), encoding="utf-8")
    (line,) = answer(tmp_path, "extends: base.yaml\nrun: {folder: y}\n")
    assert line.startswith("base.yaml, line 9: train.stpes: ")
    lines = answer(tmp_path, "extends: base.yaml\nrun: {foldr: y}\n")
    assert lines[1].startswith("  base.yaml, line 9: train.stpes: ") or lines[2].startswith("  base.yaml, line 9")
    assert any(line.startswith("  line 2: run.foldr: ") for line in lines)
    (line,) = answer(tmp_path, "extends: bse.yaml\n")
    assert "bse.yaml, which x.yaml extends" in line


def test_what_comes_from_a_file_is_printed_without_control_characters(tmp_path: Path) -> None:
    for text in ('"a\\e[31mb": 1\n', '"a\\e[31mb": 1\n"a\\e[31mb": 1\n', 'objective: "\\e[31m"\n'):
        assert "\x1b" not in "".join(answer(tmp_path, RECIPE.replace("objective: distill\n", "") + text))


def test_a_folder_is_answered_with_its_recipes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.raises(UserError, match=r"is a folder: name one of its recipes, a\.yaml"):
        load_recipe(tmp_path)


def test_the_other_names_lead_to_keys_that_exist_and_are_no_keys_themselves() -> None:
    known = set(key_names(Recipe, ""))
    assert known >= set(OTHER_NAMES)
    names = [name for others in (OTHER_NAMES, EXPLAINED) for group in others.values() for name in group]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
    assert not known & set(names)
    for text in EXPLAINED:
        for word in text.replace("(", " ").replace(")", " ").replace(":", " ").replace(",", " ").split():
            assert "." not in word or word in known, word
    members = [name for group in OTHER_VALUES.values() for name in group]
    assert len(members) == len(set(members))


@pytest.mark.parametrize(("content", "shown"), [("7", "found 7"), ("true", "found true"), ("2026-01-01", "2026-01-01")])
def test_a_recipe_that_is_one_value_is_refused(content: str, shown: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"a mapping of keys is needed, .*{shown}"):
        load_recipe(path)


def test_a_recipe_that_links_to_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.symlink_to(path.name)
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        load_recipe(path)
