"""A plan's memory, traffic and files against those of the run, within a tenth.

Runs of two ranks under the real engine, in sizes that fixed overheads are small beside. Two things of the CPU are added
to the plan, which is for accelerators: the loss keeps its piece of logit memory (`loss/buffers.py`), and gloo copies
what it reduces.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megadistill.loss.buffers import BLOCK_ELEMENTS
from megadistill.models.families import build_causal_lm, load_config
from megadistill.plan.counts import memory
from megadistill.plan.counts.memory import ACTIVATIONS
from megadistill.plan.counts.model_stats import measure_models
from megadistill.plan.counts.requirements import Requirements, count_requirements
from megadistill.plan.counts.sharding import Sharding
from megadistill.plan.counts.step_collectives import count_collectives
from megadistill.plan.counts.traffic import (
    ACROSS,
    ANSWERS,
    GATHERS,
    HEAD,
    REDUCES,
    REQUESTS,
    SHARED,
    STAGES,
    TEACHER_SHARED,
    VOCABULARY,
)
from megadistill.plan.counts.zero import Zero
from tests.ranks.harness import run_ranks
from tests.ranks.plan.plan_cases import SEQUENCE, STEPS, STUDENT, TEACHER, VOCAB, Case, Seen, watched_run

WITHIN = 0.10

DISTILLED = Case()
RECOMPUTED = Case(
    activation_checkpointing="full", vocab_group=1, objective="labels", zero={"zero_hpz_partition_size": 2}
)
SELECTIVE = Case(activation_checkpointing="selective", attention="flex", vocab_group=1, objective="labels")
"""With attention in blocks, as flex is on a CPU."""
IN_BFLOAT16 = Case(precision="bfloat16", student={"tie_word_embeddings": True}, loss={"targets": {}})
APART = Case(
    students=1,
    teachers=2,
    vocab_group=1,
    zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
)
SHARING = Case(sequence=2, vocab_group=1, micro_batch=4, activation_checkpointing="full")
"""Each rank has half of each sequence, and the whole teacher."""
SAVED = (*ACTIVATIONS.values(), "shared by all layers", "last norm")
MIXTURE = Case(
    objective="labels",
    vocab_group=1,
    student={"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 512},
)
REPLICAS = Case(students=4, replicas=2, vocab_group=1, objective="labels", activation_checkpointing="full")
"""Two replicas, each over two ranks."""
COPIES = Case(replicas=2, vocab_group=1, objective="labels", zero={"stage3_param_persistence_threshold": 0})
"""Two replicas of one rank each, which holds all of the student."""
COLOCATED = [DISTILLED, RECOMPUTED, SELECTIVE, IN_BFLOAT16, SHARING, REPLICAS, COPIES]
NAMES = [
    "distilled",
    "recomputed, with copies in the node",
    "selective, attention in blocks",
    "bfloat16, tied, truncated targets",
    "sequences shared, recomputed",
    "two replicas of two ranks",
    "two replicas of one rank",
]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    model = build_causal_lm(load_config(TEACHER, what="test"), vocab_size=VOCAB, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


_RUNS: dict[str, list[Seen]] = {}


def seen(case: Case, teacher: Path) -> list[Seen]:
    """Records of each rank of the launch; each case runs once."""
    if repr(case) not in _RUNS:
        folder = str(teacher) if case.objective == "distill" else None
        world, group, roles = case.students + case.teachers, case.vocab_group, case.roles
        checkpoint = teacher / "checkpoint"
        checkpoint.mkdir(exist_ok=True)
        arguments = (case, folder, str(checkpoint))
        groups: dict[str, int] = {"vocab_group": group, "sequence": case.sequence, "replicas": case.replicas}
        _RUNS[repr(case)] = run_ranks(world, watched_run, *arguments, **groups, roles=roles)
    return _RUNS[repr(case)]


def planned(case: Case) -> Requirements:
    return count_requirements(sharding(case))


def sharding(case: Case) -> Sharding:
    student = load_config({**STUDENT, **case.student}, what="test")
    teacher = load_config(TEACHER, what="test") if case.objective == "distill" else None
    return Sharding(
        case.recipe,
        measure_models(student, teacher, sequence_length=case.length),
        vocab_size=VOCAB,
        ranks=case.students,
        ranks_per_node=case.students + case.teachers,
        group_size=case.vocab_group,
        roles=case.roles,
        zero=Zero.of(case.deepspeed_config),
        replicas=case.replicas,
    )


def peak(ranks: list[Seen], phase: str) -> Counter[str]:
    """Bytes at the peak of a phase, on the rank where the peak was highest."""
    return max((rank.peaks[phase] for rank in ranks), key=lambda lines: sum(lines.values()))


def of_the_cpu(lines: Counter[str], *, in_the_loss: bool = False) -> int:
    """Bytes that exist on a CPU alone."""
    return lines["gloo"] + (0 if in_the_loss else lines["logits"])


@pytest.mark.parametrize("case", COLOCATED, ids=NAMES)
def test_bytes_on_each_link(case: Case, teacher: Path) -> None:
    received = Counter(seen(case, teacher)[-1].received)  # the last stage, which hears from the one before
    tokens = case.accumulation * case.micro_batch * SEQUENCE // case.sequence
    traffic = planned(case).traffic
    if case.sequence > 1:
        shared = traffic[SHARED].received + traffic[TEACHER_SHARED].received
        assert received.pop("all-to-all") == pytest.approx(shared * tokens, rel=WITHIN)
    names = {GATHERS: "weights", REDUCES: "gradients", ACROSS: "across", HEAD: "head", VOCABULARY: "loss"}
    names |= {STAGES: "stages", ANSWERS: "answers"}
    for link, name in names.items():
        expected = traffic[link].received * tokens if link in traffic else 0
        if link == ACROSS:
            expected *= case.replicas / max(1, case.replicas - 1)  # the record leaves out no part of an all-reduce
        if link == ANSWERS:  # the last stage's own part is sent to nobody; a scatter gives it to itself
            assert received[name] in (0, pytest.approx(expected, rel=WITHIN))
            continue
        assert received.pop(name, 0) == pytest.approx(expected, rel=WITHIN), link
    del received["answers"]
    assert received.total() < 1e-3 * tokens * sum(link.received for link in traffic.values()), received


NUMBERS = 1024
"""Bytes that the numbers of a step have at most: a run adds its flags."""


@pytest.mark.parametrize("case", [REPLICAS, COPIES], ids=["2 x 2", "2 x 1"])
def test_each_collective_of_a_step_with_replicas(case: Case, teacher: Path) -> None:
    """Of the first rank those that a plan counts; the others speak across for the gradients alone."""
    kinds = {"allgather_base": "all-gather", "reduce_scatter_base": "reduce-scatter", "allreduce": "all-reduce"}
    ranks = [
        Counter(
            _call(kinds.get(call.name, call.name), call.ranks, call.nbytes) for call in rank.calls if call.ranks > 1
        )
        for rank in seen(case, teacher)
    ]
    run = sharding(case)
    assert ranks[0] == Counter(_call(call.kind, call.ranks, call.nbytes) for call in count_collectives(run))
    across = ("all-reduce", case.replicas, 4 * run.partition_size)
    assert all(rank[across] == 1 for rank in ranks), "float32"
    assert ranks[-1].total() == ranks[0].total() - (2 if run.shard > 1 else 0)


def _call(kind: str, ranks: int, nbytes: int) -> tuple[str, int, int]:
    return kind, ranks, 0 if kind in ("all-reduce", "broadcast") and nbytes <= NUMBERS else nbytes


@pytest.mark.parametrize("bucket", [500_000, 0])
def test_experts_whose_tokens_are_counted_first_are_gathered_once_more(bucket: int, teacher: Path) -> None:
    """In each forward pass, with what was fetched ahead for a backward pass; and in the backward pass all."""
    tokens = MIXTURE.accumulation * MIXTURE.micro_batch * SEQUENCE
    case = replace(MIXTURE, loss={"router_aux_loss_coef": 0.01}, zero={"stage3_prefetch_bucket_size": bucket})
    received = seen(case, teacher)[0].received["weights"]
    assert received == pytest.approx(planned(case).traffic[GATHERS].received * tokens, rel=WITHIN)
    without = replace(case, loss={"router_aux_loss_coef": 0.0})
    assert received > 1.5 * planned(without).traffic[GATHERS].received * tokens


@pytest.mark.parametrize("case", COLOCATED, ids=NAMES)
def test_memory_in_each_phase(case: Case, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TARGET_BLOCK", BLOCK_ELEMENTS)  # a CPU's
    monkeypatch.setattr(memory, "EAGER_BLOCK", BLOCK_ELEMENTS)
    ranks, phases = seen(case, teacher), planned(case).phases
    together = {phase: sum(lines.values()) for phase, lines in phases.items()}
    backward = max(together["backward"], together["embedding"])
    forward = max(together["forward"], together.get("targets", 0))
    for phase, expected in {"loss": together["loss"], "forward": forward, "backward": backward}.items():
        lines = peak(ranks, phase)
        assert sum(lines.values()) - of_the_cpu(lines, in_the_loss=phase == "loss") == pytest.approx(
            expected, rel=WITHIN
        ), phase
    for phase in {"step", "teacher"} & phases.keys():
        lines = peak(ranks, phase)
        assert sum(lines.values()) - of_the_cpu(lines) == pytest.approx(together[phase], rel=WITHIN), phase


@pytest.mark.parametrize("case", COLOCATED, ids=NAMES)
def test_memory_line_by_line(case: Case, teacher: Path) -> None:
    """The loss has all lines; the optimizer's step has none of its own."""
    ranks, plan = seen(case, teacher), planned(case)
    lines, seen_lines = Counter(plan.phases["loss"]), peak(ranks, "loss")
    states = lines["ZeRO-3 states"] + lines["reduce bucket"]
    assert seen_lines["ZeRO-3"] == pytest.approx(states, rel=0.001), "to the byte, but for a few numbers"
    gathered = lines["gathered layers"] + lines["persistent parameters"]
    if case is RECOMPUTED:
        gathered += lines["second partition in the node (hpZ)"]
    assert seen_lines["gathered layers"] == pytest.approx(gathered, rel=WITHIN)
    saved = sum(lines[name] for name in SAVED)
    assert seen_lines["layers"] == pytest.approx(saved, rel=WITHIN)
    gradients = lines["head gradient"] + lines["gradient of the hidden states"]
    assert seen_lines["head gradient"] == pytest.approx(gradients, rel=WITHIN)
    assert seen_lines["logits"] == pytest.approx(lines["logit chunk"], rel=WITHIN)
    for name in ("teacher stage", "teacher head rows", "head rows"):
        assert seen_lines[name] == pytest.approx(lines[name], rel=WITHIN), name
    assert peak(ranks, "step")["ZeRO-3"] == pytest.approx(states, rel=0.001), "no copy of the gradients"


def test_the_working_memory_of_a_layer(teacher: Path) -> None:
    for case in (DISTILLED, RECOMPUTED, SELECTIVE):
        lines = Counter(planned(case).phases["backward"])
        saved = sum(lines[name] for name in SAVED)
        seen_lines = max(rank.highest["backward"]["layers"] for rank in seen(case, teacher))
        assert seen_lines == pytest.approx(saved + lines["working memory of a layer"], rel=WITHIN)


def test_a_teacher_with_ranks_of_its_own(teacher: Path) -> None:
    plan = planned(APART)
    student, first, last = seen(APART, teacher)
    tokens = APART.micro_batch * SEQUENCE
    step = plan.traffic[ANSWERS].received * APART.accumulation * tokens
    assert student.received["bridge"] == pytest.approx(step, rel=WITHIN)
    requested = STEPS * APART.accumulation + 1  # one more is under way when the student stops
    packets = plan.teacher_traffic[STAGES].received * tokens * (requested + 1)  # and a stop
    assert last.received["bridge"] == pytest.approx(packets, rel=WITHIN)
    assert first.received["bridge"] == pytest.approx(
        plan.teacher_traffic[REQUESTS].received * tokens * (requested + 1), rel=WITHIN
    )
    assert first.peaks["forward"].total() == pytest.approx(sum(plan.teacher_memory.values()), rel=WITHIN)


def test_offloaded_states_lie_on_the_host(teacher: Path) -> None:
    """The host is the device of these runs."""
    student, plan = seen(APART, teacher)[0], planned(APART)
    on_host = plan.host["offloaded ZeRO-3 states"]
    always = plan.phases["step"]["reduce bucket"] + plan.phases["step"]["teacher head rows"]
    assert student.built.total() == pytest.approx(on_host + always, rel=WITHIN)
    lines, on_device = student.peaks["loss"], plan.phases["loss"]
    expected = on_host + sum(on_device.values()) - on_device["head rows"]  # copied from the host to the device
    assert lines.total() - of_the_cpu(lines, in_the_loss=True) == pytest.approx(expected, rel=WITHIN)


@pytest.mark.parametrize("case", [DISTILLED, IN_BFLOAT16, APART], ids=["float32", "bfloat16, tied", "one rank"])
def test_a_checkpoint_to_the_byte(case: Case, teacher: Path) -> None:
    assert sum(rank.checkpoint for rank in seen(case, teacher)) == planned(case).checkpoint_bytes


@pytest.mark.thorough
def test_activations_fall_with_the_ranks_that_share_sequences(teacher: Path) -> None:
    whole, half = (replace(SHARING, objective="labels", students=ranks, sequence=ranks) for ranks in (1, 2))
    of_whole, of_half = (peak(seen(case, teacher), "loss")["layers"] for case in (whole, half))
    assert of_half == pytest.approx(of_whole / 2, rel=0.01)
    assert max(rank.highest["backward"]["layers"] for rank in seen(half, teacher)) == pytest.approx(
        max(rank.highest["backward"]["layers"] for rank in seen(whole, teacher)) / 2, rel=WITHIN
    )


LONG = Case(
    sequence=2,
    length=65_536,
    vocab_group=1,
    micro_batch=1,
    accumulation=1,
    activation_checkpointing="full",
    attention="flex",
    objective="labels",
    student={
        "model_type": "mistral",
        "sliding_window": 512,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 65_536,
    },
)


@pytest.mark.thorough
def test_a_sequence_of_65536_tokens_trains_on_two_ranks_within_the_planned_memory(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "EAGER_BLOCK", BLOCK_ELEMENTS)  # a CPU's
    ranks, phases = seen(LONG, teacher), planned(LONG).phases
    most = max(sum(lines.values()) for lines in phases.values())
    for phase in ("forward", "loss", "backward"):
        lines = peak(ranks, phase)
        assert sum(lines.values()) - of_the_cpu(lines, in_the_loss=phase == "loss") < (1 + WITHIN) * most, phase
    assert most < 0.6 * max(sum(lines.values()) for lines in planned(replace(LONG, sequence=1)).phases.values())
