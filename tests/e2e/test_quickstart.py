"""The quickstart of README, word for word: by its own commands somebody's teacher teaches a student on their text.

The names lead to something small. HOME has a `text/` of some files. `make install` and `hf download` are programs of
the test, which put the environment of the tests and a tiny teacher where the real ones would; all other commands are
the package's. The current directory is an empty one, outside of the checkout.
"""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.models.families import load_config
from tests.documented import quickstart
from tests.e2e.commands import BIN, Finished, environment
from tests.e2e.conftest import Place

DOCUMENTS, CHARACTERS = 60, 6_000

MAKE = """\
[ "$*" = install ] || exit 1
mkdir -p .venv/bin
echo 'export PATH={shims}:{bin}:$PATH' > .venv/bin/activate
"""
HF = """\
[ "$1 $3" = "download --local-dir" ] || exit 1
mkdir -p "$(dirname "$4")"
cp -r {teacher} "$4"
"""


def _write_text(folder: Path) -> str:
    library = Path(json.__file__).parent.parent
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))[:40])
    folder.mkdir()
    for number in range(DOCUMENTS):
        part = text[number * CHARACTERS : (number + 1) * CHARACTERS]
        (folder / f"{number:02}.txt").write_text(part, encoding="utf-8")
    return text[: DOCUMENTS * CHARACTERS]


def _write_bigram_teacher(folder: Path, *, text: str, like: Path) -> float:
    """A llama of two layers that add nothing, so that the next id depends on the last one alone, as it does in `text`.

    Returns:
        Its cross-entropy on `text`, nats per token.
    """
    shutil.copytree(like, folder)
    ids = torch.tensor(load_tokenizer(like).encode(text), dtype=torch.int64)
    size = int(json.loads((like / "config.json").read_text())["vocab_size"])
    hidden_size = -(-size // 8) * 8  # an id for each number of a hidden state; even heads
    keys = {
        "model_type": "llama",
        "vocab_size": size,
        "hidden_size": hidden_size,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "tie_word_embeddings": False,
    }
    pairs = torch.full((size, size), 0.01)
    pairs.index_put_((ids[:-1], ids[1:]), torch.ones(()), accumulate=True)
    log_p = (pairs / pairs.sum(1, keepdim=True)).log()
    model = AutoModelForCausalLM.from_config(load_config(keys, what="test"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, hidden_size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :size] = log_p.T / math.sqrt(hidden_size)  # the norm makes a one of it the root
    model.save_pretrained(folder)
    return float(-log_p[ids[:-1], ids[1:]].mean())


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\nset -e\n{script}", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def day(place: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished, float]:
    """The folder in which the quickstart was run, what it printed, and the teacher's cross-entropy."""
    outside = tmp_path_factory.mktemp("quickstart")
    home, shims, folder = outside / "home", outside / "shims", outside / "here"
    for each in (home, shims, folder):
        each.mkdir()
    text = _write_text(home / "text")
    teacher_ce = _write_bigram_teacher(outside / "teacher", text=text, like=place.teacher)
    _program(shims / "make", MAKE.format(shims=shims, bin=BIN))
    _program(shims / "hf", HF.format(teacher=outside / "teacher"))
    there = {**environment(), "HOME": str(home), "PATH": f"{shims}:/usr/bin:/bin", "COLUMNS": "80"}
    there = {name: value for name, value in there.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = ["bash", "-euo", "pipefail", "-c", quickstart()]
    done = subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True, timeout=900)
    return folder, Finished(done.returncode, done.stdout, done.stderr), teacher_ce


def test_every_command_of_it_succeeds(day: tuple[Path, Finished, float]) -> None:
    _, finished, _ = day
    assert finished.code == 0, finished.transcript
    assert "Traceback" not in finished.out + finished.err
    assert "✗" not in finished.out


def test_the_student_learns(day: tuple[Path, Finished, float]) -> None:
    """From a uniform guess more than half of the way to the teacher."""
    folder, _, teacher_ce = day
    lines = [json.loads(line) for line in (folder / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    uniform = math.log(json.loads((folder / "models/teacher/config.json").read_text())["vocab_size"])
    assert lines[0]["student_ce"] == pytest.approx(uniform, rel=0.05)
    assert lines[-1]["student_ce"] < (uniform + teacher_ce) / 2
    assert lines[-1]["kl"] < lines[0]["kl"] / 3


def test_the_export_is_a_model_of_transformers(day: tuple[Path, Finished, float]) -> None:
    folder, _, _ = day
    (exported,) = (path.parent for path in folder.glob("**/config.json") if path.parent.name != "teacher")
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    logits = model(**tokenizer("import os", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer)
    assert torch.isfinite(logits).all()
    assert "distill" in (exported / "README.md").read_text(encoding="utf-8")


def test_it_is_measured_and_sampled_and_has_a_report(day: tuple[Path, Finished, float]) -> None:
    folder, finished, teacher_ce = day
    _, _, measured = finished.out.partition("held-out, ")
    table, _, _ = measured.partition("└")
    rows = [re.findall(r"[\w.,-]+", line) for line in table.splitlines() if line.startswith("│")]
    numbers = {row[0]: [float(cell.replace(",", "")) for cell in row[1:3]] for row in rows}
    teacher, student = numbers["teacher"], next(row for name, row in numbers.items() if name != "teacher")
    assert teacher[1] == pytest.approx(teacher_ce, abs=0.5), "another part of the text"
    assert teacher[1] < student[1] < math.log(400)
    assert (folder / "runs/mine/report.html").stat().st_size > 10_000
    _, _, sample = finished.out.rpartition("the model: 40 tokens ")
    caption, *text = sample.splitlines()
    assert set(caption) == {"─"}
    assert len(" ".join(text).split()) > 3, "a sample, whose last line may be empty"
