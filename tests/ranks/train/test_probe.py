"""The teacher check: recorded at the first start; any other teacher fails it, in every placement."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadistill.config.recipe import Recipe
from megadistill.distributed.collectives import barrier
from megadistill.distributed.launch import Launch
from megadistill.distributed.roles import Roles
from megadistill.distributed.topology import Topology, even_slice
from megadistill.errors import OperatorFault, UserError
from megadistill.models.families import HEAD, load_config, logit_transform
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.teacher.pipeline import TeacherPipeline
from megadistill.teacher.stage import TeacherStage
from megadistill.train.setup.setup import Setup, prepare
from megadistill.train.teacher.placement import live_teacher, run_teacher_server
from megadistill.train.teacher.probe import PROBE_FILE
from megadistill.types import TokenBatch, token_digest
from tests.ranks.harness import run_ranks
from tests.unit.models.cases import final_hidden, saved_model, whole_model
from tests.unit.train.cases import SEQUENCE, TOKENIZER, VOCAB, described_data, recipe

SLOT = 7


def _rows() -> TokenBatch:
    """Two rows, the first of which is masked."""
    tokens = torch.randint(VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0] = -100
    slots = torch.tensor([SLOT - 1, SLOT])
    return TokenBatch(tokens, labels, slots, token_digest(tokens), torch.zeros_like(tokens, dtype=torch.bool))


def _never(_: Any) -> TokenBatch:
    raise AssertionError("only the first rank reads rows, and only where there is no probe")


def _setup(topology: Topology, folder: Path, teacher: str, keys: dict[str, Any], precision: str) -> Setup:
    rank, world = topology.rank, topology.world
    if topology.bridge is not None:
        rank, world = topology.bridge.rank, topology.bridge.roles.world
    train = {"precision": precision}
    base = recipe(folder / "data" / "manifest.json", folder / "run", teacher=folder / teacher, train=train).snapshot()
    given = Recipe.model_validate({**base, "teacher": {**base["teacher"], **keys}})
    return prepare(given, Launch(rank, world, topology.local_rank, world))


def _start(
    topology: Topology, folder: str, teacher: str, keys: dict[str, Any], precision: str, wrong: tuple[str, ...]
) -> list[str]:
    """The line of each start, or its fault. `wrong`: by start, the part that is wrong on the last rank."""
    setup = _setup(topology, Path(folder), teacher, keys, precision)
    if topology.role == "teacher":
        run_teacher_server(setup, topology)
        return []
    vocab = even_slice(VOCAB, topology)
    sound = live_teacher(setup, topology)(vocab)
    pipeline = sound.pipeline
    lines = []
    for part in wrong:
        given = sound
        if topology.rank == topology.world - 1 and part == "head":
            given = replace(sound, head=sound.head.roll(1, dims=0))
        elif topology.rank == topology.world - 1 and part == "stage":
            assert isinstance(pipeline, TeacherPipeline)
            pipeline.stage.decoder.norm.weight[3] += 0.5
        elif topology.is_first and part == "file":
            (setup.folder / PROBE_FILE).write_bytes(b"no probe")
        probed = (setup.folder / PROBE_FILE).exists()
        barrier(topology.world_group)
        rows = (lambda _: _rows()) if topology.is_first and not probed else _never
        try:
            (check,) = given.check(setup, vocab, topology, rows=rows)
            lines.append(check.line if check.float8 is None else f"{check.line}; {check.float8.line}")
        except OperatorFault as fault:
            lines.append(str(fault))
        except UserError as error:  # the check has closed the teacher
            return [*lines, str(error)]
    sound.close()
    return lines


def _starts(
    world: int,
    folder: Path,
    *,
    teacher: str = "teacher",
    keys: dict[str, Any] | None = None,
    precision: str = "float32",
    wrong: tuple[str, ...] = ("",),
    **layout: Any,
) -> list[list[str]]:
    """See `_start`, by rank."""
    return run_ranks(world, _start, str(folder), teacher, keys or {}, precision, wrong, **layout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The data of a run, its empty folder, and two teachers."""
    described_data(tmp_path / "data")
    (tmp_path / "run").mkdir()
    for seed, name in enumerate(("teacher", "other")):
        saved_model("gemma2", tmp_path / name, seed=seed)
        (tmp_path / name / "tokenizer.model").write_bytes(TOKENIZER)
    return tmp_path


@pytest.fixture
def truth(folder: Path) -> dict[str, torch.Tensor]:
    """The unsplit model's output for the row."""
    model = whole_model("gemma2", seed=0)
    row = _rows().tokens[1:]
    with torch.no_grad():
        logits = model(row).logits[0, :-1].double()
    entropy = torch.nn.functional.cross_entropy(logits, row[0, 1:])
    return {
        "slot": torch.tensor(SLOT),
        "tokens": row[0],
        "hidden": final_hidden(model, row)[0],
        "cross_entropy": entropy,
    }


OTHER = "this is not the teacher that the run was started with"


def test_the_record_is_the_unsplit_models_output_and_each_start_compares(
    folder: Path, truth: dict[str, torch.Tensor]
) -> None:
    entropy = f"CE {truth['cross_entropy'].item():.4f}"
    ranks = _starts(2, folder, wrong=("", "", "head", "stage", "file"))
    for rank, (recorded, again, head, stage, file) in enumerate(ranks):
        assert recorded == f"teacher check: recorded reference output (sample {SLOT}, {entropy})"
        assert again == f"teacher check passed: bitwise identical to the first start ({entropy})"
        # A wrong slice spoils the cross-entropy of all ranks, and a wrong last stage their hidden states.
        assert head.startswith(f"rank {rank}: {OTHER}")
        assert "hidden states differ by 0.0e+00" in head
        assert stage.startswith(f"rank {rank}: {OTHER}")
        assert "hidden states differ by 0.0e+00" not in stage
        assert "remove the file" in file
        assert ("rank 0 reports" in file) == (rank != 0)
    (folder / "run" / PROBE_FILE).unlink()
    _starts(1, folder)
    written = load_file(folder / "run" / PROBE_FILE)
    assert written.keys() == truth.keys()
    for name in ("slot", "tokens"):
        assert torch.equal(written[name], truth[name])
    for name in ("hidden", "cross_entropy"):
        torch.testing.assert_close(written[name], truth[name], rtol=0, atol=1e-5)


def test_other_layouts_and_roundings_pass_and_another_teacher_fails(
    folder: Path, truth: dict[str, torch.Tensor]
) -> None:
    """The teacher on ranks of its own; its answers in eight bits; all of it in bfloat16."""
    save_file(truth, folder / "run" / PROBE_FILE)
    apart = {"placement": "disaggregated", "ranks": 2, "stages": 2, "queue": 2}
    client, *_ = _starts(3, folder, keys=apart, roles=Roles(3, 2, 2))
    assert "teacher check passed" in client[0]
    short = {"placement": "disaggregated", "ranks": 1, "transfer_dtype": "float8"}
    for keys, precision, roles in ((short, "float32", Roles(2, 1, 1)), ({}, "bfloat16", None)):
        world = 2 if roles else 1
        same, *_ = _starts(world, folder, keys=keys, precision=precision, roles=roles)
        assert "teacher check passed" in same[0]
        assert "bitwise" not in same[0]
        other, *_ = _starts(world, folder, teacher="other", keys=keys, precision=precision, roles=roles)
        assert OTHER in other[0]


def test_the_first_start_compares_the_replicas(folder: Path) -> None:
    """Each of two ranks has a teacher of its own, and one of them is wrong: nothing is kept."""
    (first,), (second,) = _starts(2, folder, wrong=("stage",), vocab_group=1)
    assert first.startswith(
        "teacher check failed on another rank: rank 1 reports: rank 1: the teacher's output for one"
    )
    assert second.startswith("rank 1: the teacher's output for one row differs from rank 0's: hidden states differ by")
    assert not (folder / "run" / PROBE_FILE).exists()


def _float8_truth(folder: Path, unknown: int | None = None) -> list[float]:
    """KL to the native teacher, its cross-entropy and that in float8, of the row in one process, in float64."""
    tokens = _rows().tokens[1:]
    transform = logit_transform(load_config(folder / "teacher", what="test"))
    logs, entropies = [], []
    weights = SafetensorsFolder(folder / "teacher")
    head = next(weights.tensors([HEAD if HEAD in weights else "model.embed_tokens.weight"])).double()
    for precision in ("native", "float8"):
        place: dict[str, Any] = {"stage": 0, "stages": 1, "dtype": torch.float32, "device": torch.device("cpu")}
        hidden = TeacherStage.load(folder / "teacher", **place, precision=precision)(tokens)[0, :-1].double()
        assert transform.softcap is not None
        logits = transform.softcap * torch.tanh(hidden @ head.T / transform.softcap)
        if unknown is not None:
            logits[:, unknown] = -math.inf
        logs.append(logits.log_softmax(dim=-1))
        entropies.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item())
    native, float8 = logs
    return [(native.exp() * (native - float8)).nan_to_num().sum(dim=-1).mean().item(), *entropies]


def test_a_float8_teacher_is_compared_with_the_native_one_once(folder: Path) -> None:
    """Over two stages and two slices; the result is that of one process, and later starts read it."""
    keys = {"precision": "float8"}
    ranks = _starts(2, folder, keys=keys, wrong=("", "", "stage"))
    kl, native, float8 = _float8_truth(folder)
    assert kl > 1e-4
    expected = f"float8 teacher: KL to the native one {kl:.5f} nats a token, cross-entropy {float8:.4f} instead of "
    for first, again, stage in ranks:
        assert first.startswith("teacher check: recorded reference output")
        assert first.endswith(f"{expected}{native:.4f}")
        passed = f"teacher check passed: bitwise identical to the first start (CE {float8:.4f})"
        assert again == f"{passed}; {expected}{native:.4f}"
        assert OTHER in stage
    written = load_file(folder / "run" / PROBE_FILE)["float8"]
    torch.testing.assert_close(written, torch.tensor([kl, native, float8]).double(), rtol=1e-4, atol=1e-6)


def test_a_float8_teacher_above_the_bound_is_refused_on_every_rank(folder: Path) -> None:
    """Ranks of its own end as well; nothing is recorded. An id is one that the teacher does not know."""
    unknown = next(id_ for id_ in range(VOCAB) if id_ not in set(_rows().tokens[1].tolist()))
    ids = [-1 if id_ == unknown else id_ for id_ in range(VOCAB)]
    (folder / "ids.json").write_text(json.dumps(ids))
    apart = {"placement": "disaggregated", "ranks": 2, "stages": 2, "precision": "float8", "float8_max_kl": 1e-6}
    keys = {**apart, "vocab_map": str(folder / "ids.json")}
    (first,), (second,), *teachers = _starts(4, folder, keys=keys, roles=Roles(4, 2, 2))
    kl, native, float8 = _float8_truth(folder, unknown)
    assert first == (
        f"teacher.precision float8: the KL to the native teacher is {kl:.4g} nats a token on the first tokens of the "
        f"data, above teacher.float8_max_kl 1e-06 (cross-entropy {float8:.4f} instead of {native:.4f}): set "
        "teacher.precision to native and name another run.folder, or raise the bound"
    )
    assert second == "the float8 teacher is refused: rank 0 says why"
    assert teachers == [[], []]
    assert not (folder / "run" / PROBE_FILE).exists()
    _starts(1, folder, keys={"precision": "float8", "float8_max_kl": 1.0})
    (lowered,), _ = _starts(2, folder, keys={"precision": "float8", "float8_max_kl": 1e-6})
    assert "above teacher.float8_max_kl" in lowered, "also where the values are recorded"
