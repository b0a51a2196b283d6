"""Invalid input: exit code 2, one line that names the value and the way out, no traceback, no folder left behind.

A command that is refused starts nothing, so most of these run in the tests' own process.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from megadistill.data import Manifest, TokenStream
from tests.e2e.commands import PLAIN, TORCHRUN_2, Finished, in_process, run, settings, succeeded
from tests.e2e.conftest import Place


def _refusal(finished: Finished) -> str:
    assert finished.code == 2, finished.transcript
    lines = [line for line in finished.err.splitlines() if line.startswith("megadistill: ")]
    assert len(lines) == 1, finished.transcript
    assert "Traceback" not in finished.err
    return lines[0]


def assert_refused(*arguments: str, says: tuple[str, ...]) -> None:
    line = _refusal(in_process(*arguments))
    for part in says:
        assert part in line, line


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"train__stpes": 3}, ("train.stpes", "did you mean 'steps'")),
        ({"distributed__vocab_group": 3}, ("distributed.vocab_group is 3", "a multiple of 3 ranks")),
        ({"data__manifest": "nowhere.json"}, ("nowhere.json",)),
        ({"student__deepspeed": "nowhere.json"}, ("student.deepspeed", "nowhere.json")),
        ({"student__config__hiden_size": 3}, ("hiden_size", "hidden_size")),
        ({"student__config__model_type": "mamba"}, ("mamba", "llama")),
        ({"student__config__max_position_embeddings": 16}, ("max_position_embeddings", "16", "32")),
        ({"student__config__vocab_size": 77}, ("its vocabulary has 77 rows", "400 ids", "leave vocab_size out")),
        ({"teacher__path": "nowhere"}, ("teacher.path", "nowhere")),
        ({"teacher__vocab_map": "nowhere.json"}, ("teacher.vocab_map", "nowhere.json does not exist")),
        ({"loss__beta": 0.3}, ("beta is 0.3", "jsd", "forward_kl")),
        ({"loss__chunk_tokens": 1024}, ("loss.chunk_tokens", "no such key")),
        ({"loss__targets__select": "top_k"}, ("loss.targets", "top_k needs k")),
    ],
)
def test_a_recipe_that_cannot_run_is_refused(place: Place, overrides: dict[str, object], says: tuple[str, ...]) -> None:
    folder = place.folder / "refused"
    command = place.distill("refused", steps=2, checkpoint_every=2)
    assert_refused(*command, *settings(**{"distributed__vocab_group": 1, **overrides}), says=says)
    assert not folder.exists()


def test_a_process_that_refuses_ends_with_2(place: Place) -> None:
    command = place.distill("refused", steps=2, checkpoint_every=2)
    assert "distributed.vocab_group is 2, but this run has 1 process" in _refusal(run(*PLAIN, *command))


def test_every_rank_refuses_and_one_says_so(place: Place) -> None:
    finished = run(
        *TORCHRUN_2, *place.distill("refused", steps=2, checkpoint_every=2), *settings(train__max_grad_norm=-1.0)
    )
    assert finished.code != 0
    assert finished.err.count("megadistill: ") == 1
    assert "train.max_grad_norm" in finished.err


OTHER_TOKENIZER = ("1 of 400 ids stand for other tokens", "'another' in", "--tokenizer")


def _other_tokenizer(folder: Path) -> None:
    """A tokenizer.model alone, with another token."""
    path = folder / "tokenizer.model"
    proto = ModelProto.FromString(path.read_bytes())
    proto.pieces[-1].piece = "another"
    path.write_bytes(proto.SerializeToString())
    (folder / "tokenizer.json").unlink()


def test_a_teacher_that_reads_other_words_is_refused(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    other.mkdir()
    for file in place.teacher.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    _other_tokenizer(other)
    command = place.distill("refused", steps=2, checkpoint_every=2)
    assert_refused(*command, *settings(distributed__vocab_group=1, teacher__path=other), says=OTHER_TOKENIZER)


def test_other_commands_refuse_alike(place: Place, tmp_path: Path) -> None:
    assert_refused("export", str(tmp_path), "--output", str(tmp_path / "x"), says=("not a run folder",))
    assert_refused("export", str(place.folder / "teacher"), "--output", str(tmp_path / "x"), "--step", "5",
                   says=("--step 5", "it has 6"))  # fmt: skip
    assert_refused("evaluate", str(tmp_path), "--data", place.heldout, says=("config.json",))
    assert_refused("tokenize", str(tmp_path), "--vocab-size", "300", "--sequence-length", "8", "--output",
                   str(tmp_path / "d"), says=(str(tmp_path),))  # fmt: skip
    assert_refused("train", str(tmp_path / "no.yaml"), says=("no recipe",))


def test_plan_says_what_a_recipe_needs(place: Place) -> None:
    recipe = place.distill("planned", steps=2, checkpoint_every=2)[1:]
    finished = succeeded(in_process("plan", *recipe, "--nodes", "1", "--gpus-per-node", "2", "--gpu", "h100"))
    for part in ("a toy", "student", "teacher", "reduce bucket", "smaller ones", "FLOP"):  # of a toy, few are large
        assert part in finished.out


def test_a_rank_that_alone_meets_wrong_input_says_so(place: Place, tmp_path: Path) -> None:
    """A token that the teacher has no id for, in the rows that rank 1 reads."""
    data = Manifest.load(place.folder / "data" / "train" / "manifest.json")
    stream = TokenStream(data, seed=1, batch_slots=8, rank=0, world_size=1)
    first = stream.batch(range(8))
    ids = list(range(data.vocab_size))
    alone = set(first.tokens[4:6].flatten().tolist()) - {
        id for rows in (first.tokens[:4], first.labels[:4]) for id in rows.flatten().tolist()
    }
    ids[min(alone)] = -1
    (tmp_path / "map.json").write_text(json.dumps(ids))
    command = place.distill("refused", steps=2, checkpoint_every=2)
    finished = run(*TORCHRUN_2, *command, *settings(teacher__vocab_map=tmp_path / "map.json"))
    assert finished.code != 0
    assert f"rank 1: teacher.vocab_map has no teacher's id for {min(alone)}" in finished.err, finished.transcript


def test_missing_weights_are_reported_before_anything_starts(place: Place, tmp_path: Path) -> None:
    """The second stage's are read by rank 1 alone, but their headers are everybody's."""
    broken = tmp_path / "teacher"
    shutil.copytree(place.teacher, broken)
    weights = load_file(broken / "model.safetensors")
    missing = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != missing}, broken / "model.safetensors")
    command = place.distill("missing", steps=2, checkpoint_every=2)
    finished = run(*TORCHRUN_2, *command, *settings(teacher__path=broken))
    assert finished.code != 0
    assert f"megadistill: {broken} has no tensor '{missing}'" in finished.err, finished.transcript
    assert not (place.folder / "missing").exists()
    assert_refused("evaluate", str(broken), "--data", place.heldout, says=(missing,))


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_shard(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def _other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 65}))


def _fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


def _head_of_its_own(folder: Path) -> None:
    """The head that the weights have beside the embedding, which a config says to be the head."""
    config = json.loads((folder / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))


OTHER_MODELS: list[tuple[Callable[[Path], None], str]] = [
    (_fewer_layers, "has tensors that a llama model of its config.json does not have: model.layers.1."),
    (_head_of_its_own, "but lm_head.weight is there too and differs"),
]


@pytest.mark.parametrize(
    "command",
    ["train", "store-targets", "generate", "evaluate", "sample", "prune", "plan", "doctor", "weights"],
)
@pytest.mark.parametrize(("change", "says"), OTHER_MODELS)
def test_weights_that_their_config_does_not_describe_are_refused_by_every_command(
    place: Place, tmp_path: Path, command: str, change: Callable[[Path], None], says: str
) -> None:
    """train learned from a part of these, and evaluate from another."""
    teacher, output = tmp_path / "teacher", tmp_path / "output"
    shutil.copytree(place.teacher, teacher)
    change(teacher)
    finished = in_process(*_reads(command, place, teacher, output))
    if command == "doctor":  # lists what it finds
        assert finished.code == 2, finished.transcript
        assert says in " ".join(finished.out.replace("│", " ").split()), finished.transcript
    else:
        assert says in _refusal(finished)
    assert not output.exists()


FLASH = {"attn_implementation": "flash_attention_2", "_attn_implementation": "evil/kernel", "use_kernels": True}


@pytest.mark.parametrize("command", ["evaluate", "sample", "plan"])
def test_settings_of_a_folder_that_are_not_weights_change_nothing(place: Place, tmp_path: Path, command: str) -> None:
    """They were a traceback, and would have fetched a kernel where the packages for that are installed."""
    teacher = tmp_path / "teacher"
    shutil.copytree(place.teacher, teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, **FLASH}))
    succeeded(in_process(*_reads(command, place, teacher, tmp_path / "output")))


DAMAGES: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (_missing_shard, ("has neither model.safetensors nor",)),
    (_cut_shard, ("model.safetensors", "not a whole one")),
    (_other_shape, ("[64, 32]", "its config.json says [65, 32]")),
    (_other_tokenizer, OTHER_TOKENIZER),
]


@pytest.mark.parametrize("command", ["train", "store-targets", "generate"])
@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_a_damaged_teacher_is_refused_by_whoever_reads_it(
    place: Place, tmp_path: Path, command: str, damage: Callable[[Path], None], says: tuple[str, ...]
) -> None:
    teacher, output = tmp_path / "teacher", tmp_path / "output"
    shutil.copytree(place.teacher, teacher)
    damage(teacher)
    assert_refused(*_reads(command, place, teacher, output), says=says)
    assert not output.exists()


def _reads(command: str, place: Place, teacher: Path, output: Path) -> list[str]:
    """The arguments of a command that reads a teacher and writes to `output`, as one process."""
    data = str(place.folder / "data" / "train" / "manifest.json")
    match command:
        case "generate":
            return _generate(place, output, teacher=teacher)
        case "evaluate":
            return ["evaluate", str(teacher), "--data", place.heldout, "--limit", "8"]
        case "sample":
            return ["sample", str(teacher), "--data", place.heldout, "--new-tokens", "4"]
        case "prune":
            return ["prune", str(teacher), "--data", data, "--intermediate-size", "32", "--output", str(output)]
        case "weights":
            start = settings(student__config=teacher, student__weights=teacher, distributed__vocab_group=1)
            return [*place.distill("refused", steps=2, checkpoint_every=2), *start, "--set", f"run.folder={output}"]
    changes = settings(teacher__path=teacher, distributed__vocab_group=1, run__folder=output)
    recipe = [*place.distill("refused", steps=2, checkpoint_every=2)[1:], *changes]
    if command == "plan":
        return ["plan", *recipe, "--nodes", "1", "--gpus-per-node", "2", "--gpu", "h100"]
    return _store_targets(recipe, output) if command == "store-targets" else [command, *recipe]


def _store_targets(recipe: list[str], output: Path) -> list[str]:
    return ["store-targets", *recipe, *settings(loss__targets__draws=5), "--output", str(output)]


def _generate(place: Place, output: Path, **options: object) -> list[str]:
    data = place.folder / "data" / "train" / "manifest.json"
    values = {"data": data, "sequences": 4, "prompt_tokens": 8, "new_tokens": 8, "output": output, **options}
    teacher = values.pop("teacher", place.teacher)
    return ["generate", str(teacher), *(f"--{key.replace('_', '-')}={value}" for key, value in values.items())]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 0}, ("--batch 0", "at least 1")),
        ({"top_p": 0}, ("--top-p 0.0", "above 0")),
        ({"top_p": 1.5}, ("--top-p 1.5", "up to 1")),
        ({"temperature": -1}, ("--temperature -1",)),
        ({"sequences": 0}, ("--sequences 0", "at least 1")),
        ({"prompt_tokens": 33}, ("--prompt-tokens 33", "have 32 tokens")),
        ({"job": 2, "jobs": 2}, ("job 2 of 2",)),
        ({"data": "nowhere/manifest.json"}, ("nowhere/manifest.json",)),
        ({"teacher": Path("nowhere")}, ("nowhere",)),
    ],
)
def test_generate_refuses(place: Place, tmp_path: Path, options: dict[str, object], says: tuple[str, ...]) -> None:
    assert_refused(*_generate(place, tmp_path / "output", **options), says=says)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss__targets": "null"}, ("store-targets stores loss.targets of a live teacher",)),
        ({"objective": "labels", "teacher": "null"}, ("objective labels does not use loss.targets",)),
        ({"data__manifest": "nowhere.json"}, ("nowhere.json",)),
        ({"loss__targets__draws": 0}, ("loss.targets.draws", "at least 1")),
    ],
)
def test_store_targets_refuses(place: Place, tmp_path: Path, changes: dict[str, object], says: tuple[str, ...]) -> None:
    recipe = [*place.distill("refused", steps=2, checkpoint_every=2)[1:], *settings(distributed__vocab_group=1)]
    assert_refused(*_store_targets(recipe, tmp_path / "output"), *settings(**changes), says=says)
    assert not (tmp_path / "output").exists()
    assert_refused(*_store_targets(recipe, tmp_path / "output"), "--steps", "0", says=("--steps 0", "at least 1"))


@pytest.mark.parametrize("command", ["store-targets", "generate"])
def test_a_folder_that_is_not_theirs_is_left_alone(place: Place, tmp_path: Path, command: str) -> None:
    (tmp_path / "shard-00000.tar").write_bytes(b"somebody's")
    assert_refused(*_reads(command, place, place.teacher, tmp_path), says=(str(tmp_path), "exists", "folder"))
    assert not torch.distributed.is_initialized(), "it was refused too late"
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("shard-00000.tar", b"somebody's")]


@pytest.mark.parametrize(
    ("world", "changes", "says"),
    [
        (4, {"distributed__vocab_group": 4}, ("distributed.vocab_group is 4", "2 layers", "2 or less")),
        (4, {"distributed__vocab_group": 3}, ("distributed.vocab_group is 3", "must divide")),
        (4, {"teacher__placement": "disaggregated", "teacher__ranks": 3}, ("teacher.stages is 3", "2 layers")),
        (
            5,
            {"teacher__placement": "disaggregated", "teacher__ranks": 2, "teacher__stages": 1},
            ("3 ranks of the student", "2 replicas"),
        ),
    ],
)
def test_stages_that_do_not_fit_are_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, world: int, changes: dict[str, object], says: tuple[str, ...]
) -> None:
    """Asked as the first rank of a launch, which refuses before it looks for the others."""
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    launch = {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in launch.items():
        monkeypatch.setenv(name, str(value))
    command = [*place.distill("unfit", steps=2, checkpoint_every=2), *settings(train__global_batch=120)]
    assert_refused(*command, *settings(**{"distributed__vocab_group": 1, **changes}), says=says)
    assert not (place.folder / "unfit").exists()


def test_evaluate_refuses_a_model_of_another_tokenizer(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(place.teacher, other)
    _other_tokenizer(other)
    assert_refused("evaluate", str(other), "--data", place.heldout, says=OTHER_TOKENIZER)
