"""What a user mistypes: exit code 2, one line that names the value and the way out, no traceback, no folder left."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megadistill.data import Manifest, TokenStream
from tests.e2e.commands import PLAIN, TORCHRUN_2, run, settings
from tests.e2e.conftest import Place


def assert_refused(*command: str, says: tuple[str, ...]) -> None:
    finished = run(*command)
    assert finished.code == 2, finished.said
    lines = [line for line in finished.err.splitlines() if line.startswith("megadistill: ")]
    assert len(lines) == 1, finished.said
    assert "Traceback" not in finished.err
    for part in says:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"train__stpes": 3}, ("train.stpes", "did you mean 'steps'")),
        ({"train__global_batch": 7}, ("train.global_batch 7", "nearest that fit")),
        ({"comm__vocab_group": 3}, ("comm.vocab_group is 3", "must divide")),
        ({"data__manifest": "nowhere.json"}, ("nowhere.json",)),
        ({"student__deepspeed": "nowhere.json"}, ("student.deepspeed", "nowhere.json")),
        ({"student__config__hiden_size": 3}, ("hiden_size", "hidden_size")),
        ({"student__config__model_type": "mamba"}, ("mamba", "llama")),
        ({"student__config__max_position_embeddings": 16}, ("max_position_embeddings", "16", "32")),
        ({"student__config__vocab_size": 77}, ("vocab_size is 77", "400")),
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
    assert_refused(*PLAIN, *command, *settings(**{"comm__vocab_group": 1, **overrides}), says=says)
    assert not folder.exists()


def test_every_rank_refuses_and_one_says_so(place: Place) -> None:
    finished = run(*TORCHRUN_2, *place.distill("refused", steps=2, checkpoint_every=2), *settings(train__clip=-1.0))
    assert finished.code != 0
    assert finished.err.count("megadistill: ") == 1
    assert "train.clip" in finished.err


def test_a_teacher_that_reads_other_words_is_refused(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    other.mkdir()
    for file in place.teacher.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "tokenizer.model").write_bytes(b"another tokenizer")
    command = place.distill("refused", steps=2, checkpoint_every=2)
    assert_refused(*PLAIN, *command, *settings(comm__vocab_group=1, teacher__path=other), says=("sha256", "tokenizer"))


def test_other_verbs_refuse_alike(place: Place, tmp_path: Path) -> None:
    assert_refused(*PLAIN, "export", str(tmp_path), "--output", str(tmp_path / "x"), says=("no run folder",))
    assert_refused(*PLAIN, "export", str(place.folder / "teacher"), "--output", str(tmp_path / "x"), "--step", "5",
                   says=("--step 5", "it has 6"))  # fmt: skip
    assert_refused(*PLAIN, "evaluate", str(tmp_path), "--data", place.heldout, says=("config.json",))
    assert_refused(*PLAIN, "tokenize", str(tmp_path), "--vocab-size", "300", "--sequence-length", "8", "--output",
                   str(tmp_path / "d"), says=(str(tmp_path),))  # fmt: skip
    assert_refused(*PLAIN, "train", str(tmp_path / "no.yaml"), says=("no recipe",))


def test_plan_says_what_a_recipe_needs(place: Place) -> None:
    recipe = place.distill("planned", steps=2, checkpoint_every=2)[1:]
    finished = run(*PLAIN, "plan", *recipe, "--ranks", "2")
    assert finished.code == 0, finished.said
    for part in ("student", "teacher", "ZeRO-3 states", "logit chunk", "FLOP"):
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
    assert f"rank 1: teacher.vocab_map has no teacher's id for {min(alone)}" in finished.err, finished.said


def test_weights_that_are_missing_are_found_before_anything_starts(place: Place, tmp_path: Path) -> None:
    """The second stage's are read by rank 1 alone, but their headers are everybody's."""
    broken = tmp_path / "teacher"
    shutil.copytree(place.teacher, broken)
    weights = load_file(broken / "model.safetensors")
    missing = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != missing}, broken / "model.safetensors")
    command = place.distill("missing", steps=2, checkpoint_every=2)
    finished = run(*TORCHRUN_2, *command, *settings(teacher__path=broken))
    assert finished.code != 0
    assert f"megadistill: {broken} has no tensor '{missing}'" in finished.err, finished.said
    assert not (place.folder / "missing").exists()
    assert_refused(*PLAIN, "evaluate", str(broken), "--data", place.heldout, says=(missing,))


def test_evaluate_refuses_a_model_of_another_tokenizer(place: Place, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(place.teacher, other)
    (other / "tokenizer.model").write_bytes(b"another tokenizer")
    assert_refused(*PLAIN, "evaluate", str(other), "--data", place.heldout, says=("tokenizer.model",))
