"""Several teachers: against one dense model in float64, gradients included, and in runs of real models."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megadistill.config.recipe import LossSection, Recipe
from megadistill.data import Manifest
from megadistill.distributed.launch import Launch
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import Divergence, Head, reference
from megadistill.teacher.stage import TeacherStage
from megadistill.train.loop import run
from megadistill.train.setup.setup import prepare
from megadistill.train.step import train_step
from megadistill.train.teacher.live import LiveTeacher
from megadistill.train.teacher.several import Member, RowGroups, SeveralTeachers
from megadistill.types import IGNORED_LABEL, METRIC_NAMES, LossTerms, TeacherSignal, TokenBatch
from tests.ranks import student_cases as cases
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import GLOBAL_BATCH, SEED, SEQUENCE, VOCAB, Case, RunResult, SmallChunks
from tests.ranks.train import test_loop as loops

manifest = loops.manifest  # the fixture

SOURCES = ("books", "code", "web")
WIDTHS = {"general": 48, "coder": 20}
TEACHES = {"general": {"books": 1.0, "web": 0.25}, "coder": {"code": 1.0, "web": 0.75}}


def _batch(step: int) -> TokenBatch:
    """The whole batch of a step. In one of them no row is code; `coder` still has some of the web."""
    rows = [[0, 1, 2, 0, 0, 1, 2, 2], [0, 0, 2, 0, 0, 0, 0, 0], [1, 1, 1, 1, 2, 1, 0, 1]][step]
    return replace(cases.global_batch(step), sources=torch.tensor(rows), peer_sources=torch.tensor(rows).unsqueeze(1))


def _unknown() -> Tensor:
    """Ids that `coder` does not have: none is a label, whose cross-entropy would be infinite."""
    labels = torch.cat([_batch(step).labels.flatten() for step in range(3)])
    return torch.tensor([id_ for id_ in range(VOCAB) if id_ not in set(labels.tolist())][:10])


def _hidden(name: str, slots: Tensor) -> Tensor:
    """[B·S, E]: random numbers keyed by teacher and slot."""
    seeds = [int(slot) + 1000 * WIDTHS[name] for slot in slots]
    rows = [torch.randn(SEQUENCE, WIDTHS[name], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat([torch.empty(0, WIDTHS[name]), *rows])


def _head(name: str) -> tuple[Tensor, Tensor | None]:
    """[V, E] and, of a teacher that does not know all ids, the bias [V]."""
    weight = 0.8 * torch.randn(VOCAB, WIDTHS[name], generator=torch.Generator().manual_seed(WIDTHS[name]))
    bias = torch.zeros(VOCAB).index_fill(0, _unknown(), -torch.inf) if name == "coder" else None
    return weight, bias


class _Pipeline:
    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = 0

    def signals(self, batches: Iterator[TokenBatch]) -> Iterator[TeacherSignal]:
        for batch in batches:
            self.rows += len(batch)
            yield TeacherSignal(_hidden(self.name, batch.slots), batch.slots, batch.digests)


def _member(name: str, vocab: VocabSlice) -> Member:
    ids = vocab.global_ids()[: vocab.true_rows]
    weight, bias = _head(name)
    rows = torch.zeros(vocab.rows, WIDTHS[name])
    rows[: vocab.true_rows] = weight[ids]
    if bias is not None:
        bias = torch.cat([bias[ids], torch.zeros(vocab.rows - vocab.true_rows)])
    pipeline: Any = _Pipeline(name)
    weights = {SOURCES.index(source): share for source, share in TEACHES[name].items()}
    setup: Any = None  # of checks alone
    return Member(name, LiveTeacher(pipeline=pipeline, head=rows, bias=bias), weights, setup)


def _three_steps(topology: Topology, case: Case) -> tuple[RunResult, list[dict[str, Any]], int]:
    student, lines, groups = cases.build(case, topology), [], []
    members = [_member(name, student.head.vocab) for name in WIDTHS]
    names = {name: name for name in ("divergence", "kl", "student_ce", "teacher_ce", "agreement")}
    first = topology.rank - topology.group_rank
    for step in range(3):
        parts = _batch(step).micro_batches(GLOBAL_BATCH // topology.world)
        peers = torch.stack([part.sources for part in parts[first : first + topology.group_size]], dim=1)
        batch = replace(parts[topology.rank], peer_sources=peers)
        outcome = train_step(
            student,
            cases.step_batch(batch, SeveralTeachers(members, len(SOURCES)), accumulation=case.accumulation),
            step=step,
            learning_rate=cases.RATE * (step + 1) / 3,
            objective=SmallChunks(case.loss, length=3, seed=SEED),
            topology=topology,
            recompute=step == 1,
        )
        lines.append({**outcome.metrics, "grad_norm": outcome.grad_norm})
        groups.append(RowGroups(TEACHES, SOURCES, names).means(outcome.by_teacher, labels=outcome.labels))
    rows = sum(member.teacher.pipeline.rows for member in members)  # type: ignore[attr-defined]
    return RunResult(lines, student.gradients, student.full_parameters()), groups, rows


def _terms(student: Head, batch: TokenBatch, weights: Tensor, divergence: Divergence) -> dict[str, dict[str, Any]]:
    """Teacher -> source -> its terms of the source's tokens, by the definition."""
    sources_N = batch.sources.repeat_interleave(SEQUENCE)
    terms: dict[str, dict[str, Any]] = {}
    for name, shares in TEACHES.items():
        weight, bias = _head(name)
        teacher = Head(_hidden(name, batch.slots).double(), weight.double(), None if bias is None else bias.double())
        for source in shares:
            own = weights * (sources_N == SOURCES.index(source))
            labels = batch.labels.flatten()
            how: dict[str, Any] = {"token_weights": own, "divergence": divergence, "vocab_size": VOCAB}
            terms.setdefault(name, {})[source] = reference.distill_loss(student, teacher, labels, **how)
    return terms


@pytest.mark.parametrize(("world", "p", "accumulation"), [(1, 1, 1), (2, 2, 2), (4, 2, 1), (4, 4, 2)])
def test_several_teachers_teach_as_one_dense_process_does(world: int, p: int, accumulation: int) -> None:
    """Specialists of other widths, one without some ids, and a source with both: three steps, with gradients."""
    loss = LossSection(kd_weight=1.0, ce_weight=0.3, z_loss=1e-3)
    case = Case(accumulation=accumulation, loss=loss)
    divergence, by_step = Divergence(kd_weight=1.0, ce_weight=0.3, z_loss=1e-3), []

    def distilled(student: Head, batch: TokenBatch, weights: Tensor) -> LossTerms:
        batch = _batch(int(batch.slots[0]) // GLOBAL_BATCH)
        terms = _terms(student, batch, weights, divergence)
        by_step.append({name: {s: _numbers(each) for s, each in of.items()} for name, of in terms.items()})
        weighted = [(TEACHES[name][source], each) for name, of in terms.items() for source, each in of.items()]
        return LossTerms(
            **{name: sum(share * getattr(each, name) for share, each in weighted) for name in METRIC_NAMES}
        )

    truth = cases.dense_truth(case, distilled)
    results = run_ranks(world, _three_steps, case, vocab_group=p)
    ours, groups, _ = results[0]
    for step, (line, true) in enumerate(zip(ours.steps, truth.steps, strict=True)):
        assert {name: line[name] for name in true} == pytest.approx(true, rel=2e-5), step
    for step, (gradients, dense) in enumerate(zip(ours.gradients, truth.gradients, strict=True)):
        for name, gradient in dense.items():
            error = gradients[name][: len(gradient)].double() - gradient  # without padding
            assert torch.linalg.vector_norm(error) < 1e-4 * torch.linalg.vector_norm(gradient), (step, name)
    for name, parameter in truth.parameters.items():
        torch.testing.assert_close(ours.parameters[name][: len(parameter)].double(), parameter, rtol=2e-4, atol=2e-5)
    for step, (found, terms) in enumerate(zip(groups, by_step, strict=True)):
        _require_groups(found, terms, _batch(step))
    taught = {name: [SOURCES.index(source) for source in shares] for name, shares in TEACHES.items()}
    needed = sum(
        int(torch.isin(_batch(s).sources, torch.tensor(own)).sum()) for s in range(3) for own in taught.values()
    )
    assert sum(rows for _, _, rows in results) == needed, "a teacher reads its own rows, and no others"


def _numbers(terms: LossTerms) -> dict[str, float]:
    return {name: getattr(terms, name).item() for name in ("kl", "student_ce", "teacher_ce", "agreement")}


def _require_groups(found: dict[str, Any], true: dict[str, Any], batch: TokenBatch) -> None:
    labelled = batch.labels != IGNORED_LABEL
    tokens = {source: int(labelled[batch.sources == number].sum()) for number, source in enumerate(SOURCES)}
    total = sum(tokens.values())
    for source in SOURCES:
        if not tokens[source]:
            assert source not in found["by_source"]
            continue
        shares = {name: of[source] for name, of in TEACHES.items() if source in of}
        group = found["by_source"][source]
        assert group["labels"] == tokens[source]
        for key in ("kl", "student_ce", "teacher_ce", "agreement"):
            mean = sum(share * true[name][source][key] for name, share in shares.items()) * total / tokens[source]
            assert group[key] == pytest.approx(mean, rel=2e-5, abs=1e-7), (source, key)
    for name, of in TEACHES.items():
        count = sum(tokens[source] for source in of)
        assert found["by_teacher"][name]["labels"] == count
        for key in ("kl", "student_ce", "teacher_ce"):
            mean = sum(true[name][source][key] for source in of) * total / count
            assert found["by_teacher"][name][key] == pytest.approx(mean, rel=2e-5), (name, key)


def test_a_mixture_of_divergences_has_the_gradient_of_the_divergence_to_the_mixture() -> None:
    """Forward KL at temperature 1, as docs/teacher.md says. The values differ by what the teachers disagree."""
    logits = torch.randn(7, 30, dtype=torch.float64, requires_grad=True)
    teachers = torch.randn(2, 7, 30, dtype=torch.float64).softmax(dim=-1)
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64).view(2, 1, 1)
    log_q = logits.log_softmax(dim=-1)
    several = (shares * teachers * (teachers.log() - log_q)).sum()
    mixed = (shares * teachers).sum(dim=0)
    to_mixture = (mixed * (mixed.log() - log_q)).sum()
    (one,) = torch.autograd.grad(several, logits, retain_graph=True)
    (other,) = torch.autograd.grad(to_mixture, logits)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert several > to_mixture


# Runs


@pytest.fixture(scope="module")
def teachers(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """One with the student's ids, and one of other width with its own, which a map translates."""
    described, folder = Manifest.load(manifest), tmp_path_factory.mktemp("teachers")
    plain = loops._teacher(folder / "plain", described, torch.arange(described.vocab_size))
    shuffled = torch.randperm(described.vocab_size + 9, generator=torch.Generator().manual_seed(2))
    ids = shuffled[: described.vocab_size]
    (folder / "map.json").write_text(json.dumps(ids.tolist()), encoding="utf-8")
    other = loops._teacher(folder / "other", described, ids, width=32)
    (other / "tokenizer.model").unlink()
    return {"plain": {"path": str(plain)}, "other": {"path": str(other), "vocab_map": str(folder / "map.json")}}


def _train(topology: Topology, values: dict[str, Any], stop_after: int | None) -> int:
    """Rows that this rank's stages computed."""
    rows = []
    launch = Launch(topology.rank, topology.world, topology.local_rank, topology.world)
    values["train"]["micro_batch"] = loops.BATCH // topology.world
    with pytest.MonkeyPatch.context() as patch:
        forward = TeacherStage.forward

        def watched(self: TeacherStage, x: Tensor, *more: Any) -> Tensor:
            rows.append(len(x))
            return forward(self, x, *more)

        patch.setattr(TeacherStage, "forward", watched)
        run(prepare(Recipe.model_validate(values), launch), topology, stop_after=stop_after)
    return sum(rows)


def _values(manifest: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return {**loops.recipe(manifest, folder).snapshot(), "objective": "distill", **changes}


def _mixture(manifest: Path) -> dict[str, Any]:
    """Two sources, so that some micro-batches have rows of one alone; the second begins after two steps."""
    first = {"tokens": 2 * loops.BATCH * 64, "weights": {"web": 1.0}}
    sources = {"web": str(manifest), "code": str(manifest)}
    return {"sources": sources, "curriculum": [first, {"weights": {"web": 3.0, "code": 1.0}}]}


def test_one_teacher_by_name_is_the_plain_one_to_the_bit(
    manifest: Path, teachers: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    for name, key, value in (
        ("one", "teacher", teachers["plain"]), ("named", "teachers", {"only": teachers["plain"]})
    ):  # fmt: skip
        values = _values(manifest, tmp_path / name, **{key: value}, loss={"ce_weight": 0.2, "diagnostics_every": 2})
        run_ranks(2, _train, values, None)
    named = loops._numbers(tmp_path / "named")
    for line in named:
        by_source, by_teacher = line.pop("by_source"), line.pop("by_teacher")
        assert by_source == {"data": by_teacher["only"]}
        for key in ("kl", "student_ce", "teacher_ce", "agreement"):
            assert by_teacher["only"][key] == pytest.approx(line[key], rel=1e-5), key
    assert named == loops._numbers(tmp_path / "one")
    assert (tmp_path / "named" / "probe-only.safetensors").exists()


def test_specialists_learn_alike_on_any_ranks_and_a_resume_is_bitwise(
    manifest: Path, teachers: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Each source has its teacher; the cost is that of the rows."""
    by_name = {"coder": {**teachers["other"], "sources": ["code"]}, "rest": teachers["plain"]}
    data = {"data": _mixture(manifest), "teachers": by_name}
    computed = {}
    launches: dict[str, list[tuple[int, int | None]]] = {
        "1": [(1, None)],
        "2": [(2, None)],
        "resumed": [(2, 3), (2, None)],
    }
    for name, starts in launches.items():
        for world, stop in starts:
            computed[name] = run_ranks(world, _train, _values(manifest, tmp_path / name, **data), stop)
    lines = {name: loops._numbers(tmp_path / name) for name in computed}
    assert lines["resumed"] == lines["2"]
    for ours, theirs in zip(lines["2"], lines["1"], strict=True):
        assert loops._flat(_leaves(ours)) == pytest.approx(loops._flat(_leaves(theirs)), rel=2e-5, abs=1e-7)
    assert set(lines["2"][0]["by_teacher"]) == {"rest"}, "code comes later"
    assert set(lines["2"][-1]["by_teacher"]) == {"rest", "coder"}
    assert set(lines["2"][-1]["by_source"]) == {"code", "web"}
    # Every row once through each of the two stages, and a micro-batch of each teacher for its check.
    probes = 2 * loops.BATCH * 2
    assert computed["1"] == [loops.STEPS * loops.BATCH + probes // 2]
    assert sum(computed["2"]) == 2 * loops.STEPS * loops.BATCH + probes


@pytest.mark.thorough
def test_stored_targets_may_be_those_of_one_teacher(
    manifest: Path, teachers: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Stored before by a run with that teacher alone, for every row, of which its sources' are read."""
    data, loss = _mixture(manifest), {"targets": {"select": "top_p", "p": 0.8, "max_ids": 20}}
    saving = {**teachers["plain"], "save_targets": str(tmp_path / "targets")}
    run_ranks(2, _train, _values(manifest, tmp_path / "stores", data=data, loss=loss, teacher=saving), None)
    stored = {"source": "stored", "targets": str(tmp_path / "targets"), "sources": ["code"]}
    for name, coder in {"stored": stored, "live": {**teachers["plain"], "sources": ["code"]}}.items():
        by_name = {"coder": coder, "rest": teachers["other"]}
        values = _values(manifest, tmp_path / name, data=data, loss=loss, teachers=by_name)
        run_ranks(2, _train, values, None)
    read, computed = (loops._numbers(tmp_path / name) for name in ("stored", "live"))
    for ours, theirs in zip(read, computed, strict=True):
        assert _leaves(ours) == pytest.approx(_leaves(theirs), rel=1e-3), "but for the digits that are stored"
        assert "kl" not in ours["by_teacher"]["rest"]
    assert set(read[-1]["by_teacher"]) == {"coder", "rest"}


@pytest.mark.parametrize("targets", [{"draws": 4}, {"select": "sampled_distinct", "k": 8}], ids=["draws", "distinct"])
def test_sampled_targets_are_those_of_each_row_whoever_teaches_it(
    manifest: Path, teachers: dict[str, dict[str, str]], tmp_path: Path, targets: dict[str, Any]
) -> None:
    """A micro-batch of a rank may have no row of a teacher of which another rank has one."""
    by_name = {"coder": {**teachers["other"], "sources": ["code"]}, "rest": teachers["plain"]}
    for world in (1, 2):
        values = _values(manifest, tmp_path / str(world), data=_mixture(manifest), teachers=by_name)
        run_ranks(world, _train, {**values, "loss": {"targets": targets}}, None)
    one, two = (loops._numbers(tmp_path / str(world)) for world in (1, 2))
    for ours, theirs in zip(two, one, strict=True):
        assert _leaves(ours) == pytest.approx(_leaves(theirs), rel=2e-5, abs=1e-7)


def _leaves(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "diagnostics":
            flat |= {f"{name}/{key}": each for key, each in _leaves(value).items()}
        else:
            flat[name] = value
    return flat
