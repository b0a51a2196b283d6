"""The main job at a small size, by the commands that a user types: every launcher, a stop, a kill, a table."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.commands import (
    DEEPSPEED_2,
    PLAIN,
    TORCHRUN_2,
    environment,
    forked,
    in_process,
    run,
    settings,
    succeed,
    succeeded,
)
from tests.e2e.conftest import TINY, Place
from tests.paths import ROOT

CLOCK = {
    "time", "seconds", "tokens_per_second", "data_seconds", "student_seconds", "loss_seconds", "teacher_seconds",
    "wait_seconds", "memory_bytes", "mfu", "student_mfu", "teacher_mfu",
}  # fmt: skip
DISTILL_METRICS = {
    "step", "tokens", "loss", "divergence", "kl", "student_ce", "teacher_ce", "student_entropy", "teacher_entropy",
    "agreement", "log_z", "learning_rate", "grad_norm", "labels",
} | CLOCK  # fmt: skip


def without_clock(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> list[dict[str, float]]:
    """Twelve steps under torchrun that nothing interrupts."""
    succeed(*TORCHRUN_2, *place.distill("undisturbed", steps=12, checkpoint_every=4))
    return place.metrics("undisturbed")


def test_every_step_is_logged_with_what_the_field_looks_at(undisturbed: list[dict[str, float]]) -> None:
    assert [line["step"] for line in undisturbed] == list(range(1, 13))
    for line in undisturbed:
        assert set(line) == DISTILL_METRICS
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["loss"] == line["kl"] == line["divergence"] > 0
        assert line["teacher_ce"] >= line["teacher_entropy"] * 0.5 > 0
        assert 0 <= line["agreement"] <= 1
    assert undisturbed[-1]["kl"] < undisturbed[0]["kl"]


def test_the_deepspeed_launcher_stops_half_way_resumes_and_ends_alike(
    place: Place, undisturbed: list[dict[str, float]]
) -> None:
    command = (*DEEPSPEED_2, *place.distill("deepspeed", steps=12, checkpoint_every=4))
    first = succeed(*command, "--stop-after", "6")
    assert "stopped at --stop-after 6; rerun without it to continue" in first.out
    assert "INFO rank 0 megadistill.train.loop: device: cpu; world size 2;" in first.out
    assert "student.attention and teacher.attention sdpa (causal alone, which needs no mask);" in first.out
    assert [line["step"] for line in place.metrics("deepspeed")] == list(range(1, 7))
    second = succeed(*command)
    assert "resuming from step 6 of 12" in second.out
    assert "step 12 of 12, done" in second.out
    assert without_clock(place.metrics("deepspeed")) == without_clock(undisturbed)
    folder = place.folder / "deepspeed"
    before = contents(folder)
    arguments = command[len(DEEPSPEED_2) :]
    for again in (forked(*arguments), run(*TORCHRUN_2, *arguments)):  # whatever launches how many ranks
        succeeded(again)
        assert again.out.count(f"{folder}: done, step 12 of 12: nothing to do") == 1
        assert "INFO" not in again.transcript, "before anything is built"
    past = succeeded(in_process(*arguments, "--stop-after", "6"))
    assert "nothing to do" in past.out, "a finished run is finished, whatever it should stop after"
    assert contents(folder) == before, "no attempt, no event, no metric, nothing in TensorBoard"


def test_a_killed_run_goes_on_to_the_last_digit(place: Place, undisturbed: list[dict[str, float]]) -> None:
    """From step 7 on it crawls, so that the kill comes between two checkpoints on the fastest machine."""
    arguments, folder = place.distill("killed", steps=12, checkpoint_every=4), place.folder / "killed"
    with subprocess.Popen(
        (*TORCHRUN_2[:-1], "tests.drill.faulty", *arguments),
        cwd=ROOT,
        env={**environment(), "DRILL_FAULTS": "crawl:7"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        metrics, saved = folder / "metrics.jsonl", folder / "checkpoints" / "step-00000004"
        end = time.monotonic() + 120
        while not (saved.exists() and len(metrics.read_text().splitlines()) >= 6):
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < end
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        _kill_children_of(str(folder))
    assert 6 <= len(place.metrics("killed")) < 12, "the kill must land between two checkpoints"
    resumed = succeed(*TORCHRUN_2, *arguments)
    assert "resuming from step" in resumed.out
    assert without_clock(place.metrics("killed")) == without_clock(undisturbed)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _kill_children_of(mark: str) -> None:
    """torchrun's workers are in sessions of their own: end those whose command line names this run's folder."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    line = file.read()
                if mark.encode() in line:
                    os.kill(int(entry), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                continue


def test_one_plain_process_gives_the_same_losses(place: Place, undisturbed: list[dict[str, float]]) -> None:
    command = (*PLAIN, *place.distill("plain", steps=12, checkpoint_every=3), *settings(distributed__vocab_group=1))
    succeed(*command, "--stop-after", "3")
    for ours, theirs in zip(place.metrics("plain"), undisturbed[:3], strict=True):
        for name in ("loss", "student_ce", "teacher_ce", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name


def test_export_evaluate_and_what_a_run_folder_holds(place: Place, undisturbed: list[dict[str, float]]) -> None:
    run_folder, exported = place.folder / "undisturbed", place.folder / "student-hf"
    succeed(*PLAIN, "export", str(run_folder), "--output", str(exported))
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 400, "padding rows are removed"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "def f(x):\n\treturn x  # twice\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    with torch.no_grad():
        assert model(torch.arange(10)[None]).logits.isfinite().all()

    results = place.folder / "evaluation.json"
    sources = ["--teacher", str(place.teacher), "--data", place.heldout]
    finished = succeeded(in_process("evaluate", str(exported), *sources, "--json", str(results)))
    teacher, student = json.loads(results.read_text())
    assert "student-hf" in finished.out
    assert teacher["kl"] == pytest.approx(0, abs=1e-6)
    assert teacher["agreement"] == 1
    assert student["kl"] > 0
    assert student["perplexity"] == pytest.approx(torch.tensor(student["cross_entropy"]).exp().item(), rel=1e-5)
    assert 0 < student["bits_per_byte"] < 8

    recipe = json.loads((run_folder / "recipe.json").read_text())
    assert recipe["recipe"]["train"]["steps"] == 12
    assert recipe["versions"]["torch"] == torch.__version__
    for folder, tags in {
        ".": ("loss/kl", "loss/cross_entropy", "optimizer/learning_rate"),
        "teacher": ("loss/cross_entropy",),
        "by_tokens": ("by_tokens/cross_entropy",),
    }.items():
        board = EventAccumulator(str(run_folder / folder))
        board.Reload()
        for tag in tags:
            steps = [event.step for event in board.Scalars(tag)]
            per_step = 1 if folder != "by_tokens" else undisturbed[0]["tokens"]
            assert sorted({*steps}) == [per_step * step for step in range(1, 13)], tag
    assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == [
        "step-00000004", "step-00000008", "step-00000012",
    ]  # fmt: skip


def test_another_recipe_in_the_same_folder_is_refused_with_what_differs(
    place: Place, undisturbed: list[dict[str, float]]
) -> None:
    changed = in_process(*place.distill("undisturbed", steps=12, checkpoint_every=5),
                         *settings(distributed__vocab_group=1, train__max_grad_norm=0.5))  # fmt: skip
    assert changed.code == 2
    message = changed.err.strip().splitlines()[-1]
    assert "train.max_grad_norm was 1.0, is 0.5" in message
    assert "checkpoint_every" not in message
    assert "distributed.vocab_group" not in message, "the layout follows the ranks of today"
    assert "Traceback" not in changed.err


def test_a_damaged_checkpoint_is_named_and_nothing_starts_from_scratch(place: Place) -> None:
    command = ["train", "recipes/smoke-labels.yaml", *TINY, *place.data, *place.run_folder("damaged"),
               *settings(train__steps=4, train__checkpoint_every=2)]  # fmt: skip
    succeeded(forked(*command, "--stop-after", "2"))
    (file,) = (place.folder / "damaged" / "checkpoints" / "step-00000002").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    refused = run(*PLAIN, *command)
    assert refused.code == 4, refused.transcript
    assert file.name in refused.err
    assert "damaged" in refused.err
    assert "does not start from scratch" in refused.err.splitlines()[-1], "slurm/lib.sh shows this line"
    folder, last = place.folder / "damaged", refused.out.splitlines()[-1]
    assert last.startswith(f"{folder}: ended after step 2; once the cause is mended, `megadistill train")
    assert len(place.metrics("damaged")) == 2
