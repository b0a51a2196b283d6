"""Vocabulary sizes as models are published: ids without a row, which no text gives, and rows without an id.

Gemma 3's tokenizer has one id more than its text models have rows; Qwen's and OLMo 2's models have rows beyond the ids.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.data import Manifest, Mixture, tokenize
from megadistill.data.prepare.index_external import index
from megadistill.data.shards.packing import PackedSequence
from megadistill.data.tokenizers.occurring_ids import largest_id
from megadistill.datagen.generate import generate
from megadistill.distributed.launch import Launch
from megadistill.doctor.recipe_check import _for_models
from megadistill.errors import UserError
from megadistill.evaluate.evaluate import evaluate
from megadistill.evaluate.prompts import typed_prompts
from megadistill.evaluate.sample import load_for_sampling, samples
from megadistill.heldout.splits import load_splits
from megadistill.models.families import load_config
from megadistill.models.sampling import Sampling
from megadistill.teacher.tokenizer_check import require_same_ids
from megadistill.train.setup.setup import prepare
from tests.unit.data.corpora import BODY, byte_level_tokenizer
from tests.unit.data.splits import write_split
from tests.unit.train.cases import MODEL, recipe, topology

ROWS, IDS, SEQUENCE = 300, 301, 32
LAUNCH = Launch(rank=0, world=1, local_rank=0, local_world=1)
SAMPLING = Sampling(8, temperature=1.0, top_p=1.0, seed=1)


def _silent(stage: str, *, done: int, total: int, tokens: int | None = None) -> None:
    pass


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 rows whose tokenizer adds an id 300, that of an image."""
    folder = byte_level_tokenizer(tmp_path_factory.mktemp("published") / "teacher", BODY)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"].append({**values["added_tokens"][0], "id": ROWS, "content": "<image>"})
    (folder / "tokenizer.json").write_text(json.dumps(values))
    torch.manual_seed(1)
    _model(folder, vocab_size=ROWS)
    return folder


def _model(folder: Path, **keys: Any) -> None:
    AutoModelForCausalLM.from_config(load_config({**MODEL, **keys}, what="test")).save_pretrained(folder)


@pytest.fixture(scope="module")
def manifest(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    (folder / "text.txt").write_text(BODY * 2, encoding="utf-8")
    tokenize(
        [folder / "text.txt"],
        folder / "out",
        tokenizer=teacher,
        vocab_size=None,
        sequence_length=SEQUENCE,
        heldout_fraction=0,
        progress=_silent,
    )
    return folder / "out" / "train" / "manifest.json"


def _earlier(manifest: Path, folder: Path, **changes: Any) -> Path:
    """The same data as an earlier release, or another program, wrote it: the largest id is not recorded."""
    (folder / "train").mkdir(parents=True)
    (folder / "tokenizer").symlink_to(manifest.parent.parent / "tokenizer")
    for path in manifest.parent.glob("*.tar*"):
        (folder / "train" / path.name).symlink_to(path)
    values = {**Manifest.load(manifest).model_dump(mode="json"), "largest_id": None, **changes}
    Manifest.model_validate_json(json.dumps(values)).write(folder / "train")
    return folder / "train" / "manifest.json"


def test_a_corpus_that_the_teachers_own_tokenizer_made_is_read_by_all(
    teacher: Path, manifest: Path, tmp_path: Path
) -> None:
    data = Manifest.load(manifest)
    assert (data.vocab_size, data.largest_id is not None and data.largest_id < ROWS) == (IDS, True)
    given = recipe(manifest, tmp_path / "run", teacher=teacher)
    setup = prepare(given, LAUNCH)
    assert (setup.data.vocab_size, setup.student_config.vocab_size) == (ROWS, ROWS)
    assert _for_models(given, Mixture.of(data)).vocab_size == ROWS
    (result,) = evaluate(
        [teacher], load_splits([str(manifest)], 4), teacher=None, batch=2, topology=topology(), progress=_silent
    )
    assert result.cross_entropy < 8
    tokenizer = load_for_sampling(teacher, data)
    prompts = typed_prompts(["def"], [], tokenizer)
    assert list(samples(teacher, prompts, tokenizer, SAMPLING, count=1, device=torch.device("cpu")))
    report = generate(
        teacher,
        Mixture.of(data),
        tmp_path / "written",
        slots=range(4),
        order_seed=1,
        prompt_tokens=4,
        sampling=SAMPLING,
        batch=4,
        device=torch.device("cpu"),
        progress=_silent,
    )
    assert report.finished
    written = Manifest.load(tmp_path / "written" / "train" / "manifest.json")
    assert (written.vocab_size, largest_id(written) < ROWS) == (IDS, True)


def test_data_of_an_earlier_release_has_the_ids_that_its_tokenizer_can_give(
    teacher: Path, manifest: Path, tmp_path: Path
) -> None:
    earlier = _earlier(manifest, tmp_path / "earlier")
    assert largest_id(Manifest.load(earlier)) == ROWS - 1
    assert prepare(recipe(earlier, tmp_path / "run", teacher=teacher), LAUNCH).data.vocab_size == ROWS


def test_an_id_without_a_row_that_is_in_the_data_is_refused_with_the_reason(
    teacher: Path, manifest: Path, tmp_path: Path
) -> None:
    occurring = _earlier(manifest, tmp_path / "images", largest_id=ROWS)
    packer = {**Manifest.load(manifest).packer.model_dump(), "name": "external"}
    foreign = _earlier(manifest, tmp_path / "foreign", packer=packer)
    for data, says in ((occurring, "id 300 is in the shards"), (foreign, "id 300 can be in the shards")):
        with pytest.raises(UserError, match=f"teacher.path: its vocabulary has 300 rows, .* 301 ids, and {says}"):
            prepare(recipe(data, tmp_path / "run", teacher=teacher), LAUNCH)
        with pytest.raises(UserError, match=says):
            require_same_ids(teacher, load_config(teacher, what="test"), Mixture.of(Manifest.load(data)))
        with pytest.raises(UserError, match=says):
            load_for_sampling(teacher, Manifest.load(data))
        student = recipe(data, tmp_path / "run", student={"config": str(teacher)})
        with pytest.raises(UserError, match=rf"student\.config: .* {says}"):
            prepare(student, LAUNCH)


def test_rows_of_a_students_folder_beyond_the_ids_are_padding(teacher: Path, manifest: Path, tmp_path: Path) -> None:
    """Qwen 2.5 and 3 and OLMo 2 are published so; a folder with fewer rows than ids decides how many there are."""
    for rows, expected in ((IDS + 50, IDS), (ROWS, ROWS)):
        keys = {**MODEL, "vocab_size": rows}
        (tmp_path / str(rows)).mkdir()
        (tmp_path / str(rows) / "config.json").write_text(json.dumps(keys))
        for config in (str(tmp_path / str(rows)), keys):
            setup = prepare(recipe(manifest, tmp_path / "run", student={"config": config}), LAUNCH)
            assert (setup.data.vocab_size, setup.student_config.vocab_size) == (expected, expected)


def test_the_largest_id_of_indexed_shards_is_recorded(teacher: Path, tmp_path: Path) -> None:
    bounds = np.array([0, SEQUENCE + 1], dtype=np.int32)
    rows = [PackedSequence(np.full(SEQUENCE + 1, ROWS - 7 + n, dtype=np.int32), bounds) for n in range(3)]
    write_split(tmp_path / "made", rows, vocab=IDS)
    for path in tmp_path.glob("made/*"):
        if path.suffix != ".tar":
            path.unlink()
    made = index(tmp_path / "made", tokenizer=teacher, member="tokens.npy", dtype=None, split="train", progress=_silent)
    assert made.largest_id == ROWS - 5


@pytest.mark.parametrize("pad", [300, 100_000, -1])
def test_a_padding_id_without_a_row_is_no_traceback(pad: int, manifest: Path, tmp_path: Path) -> None:
    config = {**MODEL, "pad_token_id": pad}
    assert load_config(config, what="test").pad_token_id in (None, pad)
    prepare(recipe(manifest, tmp_path / "run", student={"config": config}), LAUNCH)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    assert load_config(tmp_path / "model", what="test").pad_token_id is None
