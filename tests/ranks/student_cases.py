"""Shared parts of the student's rank tests: a tiny student, a teacher of random numbers, and the dense truth.

The truth is one process, one dense transformers model in float64, torch's own clipping and AdamW: nothing of ours but
the initial values and the definition of the loss.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from typing_extensions import override

from megadistill.config.recipe import Checkpointing, LossSection, Recipe, StudentSection, TrainSection
from megadistill.distributed.collectives import all_reduce_sum
from megadistill.distributed.topology import Topology
from megadistill.distributed.vocab import VocabSlice
from megadistill.loss import Head, LossOptions, reference
from megadistill.models.experts import RouterCoefs, number_of_experts
from megadistill.models.families import build_causal_lm, family, load_config, logit_transform
from megadistill.models.initial_weights import initial_tensor
from megadistill.student.deepspeed_config import load_deepspeed_config
from megadistill.student.engine import StudentEngine
from megadistill.train.lookahead import StepBatch, StepBatches
from megadistill.train.objective import Objective
from megadistill.train.step import train_step
from megadistill.train.teacher.live import LiveTeacher
from megadistill.train.teacher.protocol import NoTeacher, Teacher
from megadistill.types import Cursor, LossTerms, SequencePart, TeacherSignal, TokenBatch, token_digest
from tests.paths import DS_CONFIGS

VOCAB, MULTIPLE, SEQUENCE, GLOBAL_BATCH, TEACHER_WIDTH, SEED = 250, 256, 16, 8, 48, 3
RATE = 3e-3

EXPERTS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 0.2},
    "granitemoe": {"num_local_experts": 4, "residual_multiplier": 0.3, "embedding_multiplier": 3.0},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 48,
    },
    # Two of the three layers have experts.
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
    },
}
"""Keys of the families with experts."""


@dataclass(frozen=True)
class Case:
    """A student run of a few steps."""

    objective: str = "distill"
    tied: bool = False
    accumulation: int = 1
    precision: str = "float32"
    clip: float = 0.05
    persistence: int = 0
    offload_optimizer: bool = False
    activation_checkpointing: Checkpointing = "none"
    compiled: bool = False
    document_mask: bool = False
    model_type: str = "llama"
    layers: int = 2
    keys: tuple[tuple[str, Any], ...] = ()
    """More keys of the config."""
    attention: str | None = None
    activation_offload: bool = False
    router_coefs: RouterCoefs = field(default_factory=RouterCoefs)
    loss: LossSection = field(default_factory=lambda: LossSection(kd_weight=1.0, ce_weight=0.3, z_loss=1e-3))


class SmallChunks(Objective):
    """Little memory for logits, so that a micro-batch goes through the loss in several chunks."""

    @override  # a helper that overrides a name which nothing reads would weaken its tests in silence
    def options(self, *, diagnostics: bool = False) -> LossOptions:
        return replace(super().options(diagnostics=diagnostics), logit_memory=2 * 4 * 12 * VOCAB)


def config_of(case: Case) -> Any:
    return load_config(
        {
            "model_type": case.model_type,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": case.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "vocab_size": VOCAB,
            "initializer_range": 0.1,
            "tie_word_embeddings": case.tied,
            **EXPERTS.get(case.model_type, {}),
            **dict(case.keys),
        },
        what="test",
    )


def train_section(case: Case, world: int) -> TrainSection:
    return TrainSection.model_validate(
        {
            "steps": 3,
            "global_batch": GLOBAL_BATCH,
            "micro_batch": -(-GLOBAL_BATCH // (world * case.accumulation)),
            "precision": case.precision,
            "max_grad_norm": case.clip,
            "optimizer": {"learning_rate": RATE, "weight_decay": 0.1, "epsilon": 1e-4},
        }
    )


def global_batch(step: int, *, document_mask: bool = False) -> TokenBatch:
    """The whole batch of a step; a few labels are missing, unevenly over the rows; each has documents of its own."""
    generator = torch.Generator().manual_seed(100 + step)
    units = torch.randint(0, VOCAB, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    labels = units[:, 1:].clone()
    labels[0, :5] = -100
    labels[3, 7] = -100
    slots = torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
    tokens = units[:, :-1]
    starts = torch.rand(tokens.shape, generator=generator) < 0.25
    starts[:, 0] = True
    digests = token_digest(tokens)
    return TokenBatch(tokens, labels, slots, digests, starts, document_mask=document_mask)


def rows_of(batch: TokenBatch, topology: Topology, *, accumulation: int = 1) -> TokenBatch:
    """This rank's rows of a global batch, as the stream gives them: surplus ones past its end."""
    count = accumulation * -(-GLOBAL_BATCH // (topology.data_world * accumulation))
    places = torch.arange(topology.data_rank * count, (topology.data_rank + 1) * count)
    surplus, rows = places >= GLOBAL_BATCH, places.clamp(max=GLOBAL_BATCH - 1)
    tensors = {name: getattr(batch, name)[rows] for name in ("tokens", "slots", "digests", "starts", "sources")}
    labels = batch.labels[rows].masked_fill(surplus.unsqueeze(1), -100)
    own = batch.sources[rows].unsqueeze(1)
    return replace(batch, **tensors, labels=labels, peer_sources=own, surplus=surplus)


def teacher_hidden(slots: Tensor) -> Tensor:
    """[B·S, E]: hidden states of a teacher for these slots, as random numbers keyed by slot."""
    rows = [torch.randn(SEQUENCE, TEACHER_WIDTH, generator=torch.Generator().manual_seed(int(s))) for s in slots]
    return torch.cat(rows)


def teacher_head() -> Tensor:
    """[V, E]: sharp enough for a divergence worth learning from."""
    return 0.6 * torch.randn(VOCAB, TEACHER_WIDTH, generator=torch.Generator().manual_seed(9))


class RandomTeacher:
    """Replaces the teacher pipeline, which has tests of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def signals(self, batches: Iterator[TokenBatch]) -> Iterator[TeacherSignal]:
        for batch in batches:
            hidden = teacher_hidden(batch.slots).to(self.dtype)
            hidden = batch.part.of(hidden.view(len(batch), -1, TEACHER_WIDTH)).flatten(0, 1)
            if batch.part.parts > 1:
                batch = replace(batch, digests=token_digest(batch.tokens))
            yield TeacherSignal(hidden=hidden, slots=batch.slots, digests=batch.digests)


def teacher_of(vocab: VocabSlice, dtype: torch.dtype) -> LiveTeacher:
    head = torch.zeros(vocab.rows, TEACHER_WIDTH)
    head[: vocab.true_rows] = teacher_head()[vocab.global_ids()[: vocab.true_rows]]
    pipeline: Any = RandomTeacher(dtype)
    return LiveTeacher(pipeline=pipeline, head=head.to(dtype))


WHOLE = SequencePart()


def step_batch(batch: TokenBatch, teacher: Teacher, *, accumulation: int, part: SequencePart = WHOLE) -> StepBatch:
    """One step's batch of this rank."""
    read = iter([(batch, Cursor("", 0))])
    return next(StepBatches(read, teacher, micro_batch=len(batch) // accumulation, part=part))


class WatchedStudent(StudentEngine):
    """Keeps the full gradients as ZeRO-3 holds them just before each optimizer step (clipping comes after), added up
    over replicas."""

    gradients: list[dict[str, Tensor]]

    @override
    def step(self, learning_rate: float) -> float | None:
        if self._engine.is_gradient_accumulation_boundary():
            whole = {name: safe_get_full_grad(p) for name, p in self._model.named_parameters()}
            across = self._topology.across_group
            self.gradients.append({name: all_reduce_sum(each.cpu().clone(), across) for name, each in whole.items()})
        return super().step(learning_rate)

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: safe_get_full_fp32_param(p).cpu().clone() for name, p in self._model.named_parameters()}


def build(case: Case, topology: Topology, deepspeed_config: dict[str, Any] | None = None) -> WatchedStudent:
    """`deepspeed_config`: other settings of DeepSpeed's than a CPU's."""
    deepspeed_config = deepspeed_config or load_deepspeed_config(DS_CONFIGS / "cpu.json")
    deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = case.persistence
    if case.offload_optimizer:
        deepspeed_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    student = WatchedStudent(
        config_of(case),
        section=StudentSection(
            config={},
            vocab_multiple=MULTIPLE,
            activation_checkpointing=case.activation_checkpointing,
            activation_offload=case.activation_offload,
            compile=case.compiled,
        ),
        train=train_section(case, topology.data_world),
        deepspeed_config=deepspeed_config,
        vocab_size=VOCAB,
        accumulation=case.accumulation,
        topology=topology,
        attention=case.attention or ("flex" if case.document_mask else None),  # as `auto` chooses
    )
    student.draw_weights(SEED)
    student.gradients = []
    return student


def run_steps(
    case: Case, student: WatchedStudent, topology: Topology, steps: range, *, recompute: bool = False
) -> list[dict[str, float]]:
    dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
    teacher = teacher_of(student.head.vocab, dtype) if case.objective == "distill" else NoTeacher()
    lines = []
    for step in steps:
        whole = global_batch(step, document_mask=case.document_mask)
        batch = rows_of(whole, topology, accumulation=case.accumulation)
        outcome = train_step(
            student,
            step_batch(batch, teacher, accumulation=case.accumulation, part=topology.sequence_part),
            step=step,
            learning_rate=RATE * (step + 1) / 3,
            objective=SmallChunks(
                case.loss,
                length=3,
                seed=SEED,
                student_logits=logit_transform(config_of(case)),
                router_coefs=case.router_coefs,
            ),
            topology=topology,
            recompute=recompute,
        )
        experts = {} if outcome.experts is None else outcome.experts.summary()
        lines.append({**outcome.metrics, "grad_norm": outcome.grad_norm, **experts})
    return lines


@dataclass(frozen=True)
class RunResult:
    """Metrics, gradients and parameters of a run of three steps."""

    steps: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    parameters: dict[str, Tensor]


def three_steps(topology: Topology, case: Case) -> RunResult:
    """A rank's whole run; the gradients and parameters are gathered, so every rank returns the same."""
    student = build(case, topology)
    steps = run_steps(case, student, topology, range(3))
    return RunResult(steps=steps, gradients=student.gradients, parameters=student.full_parameters())


def masked(starts_BS: Tensor, window: int | None = None) -> dict[str, Tensor]:
    """Inputs with which a dense model limits attention to documents: a mask [B, 1, S, S], and restarting positions.

    `window`: keys that a token sees, itself included.
    """
    S = starts_BS.shape[1]
    document_BS = starts_BS.long().cumsum(dim=1)
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    sees_BSS = same_BSS & torch.ones(S, S, dtype=torch.bool).tril()
    near_SS = torch.ones(S, S, dtype=torch.bool).triu(1 - (window or S))
    return {"attention_mask": (sees_BSS & near_SS)[:, None], "position_ids": sees_BSS.sum(dim=2) - 1}


def dense_truth(case: Case, distilled: Callable[[Head, TokenBatch, Tensor], LossTerms] | None = None) -> RunResult:
    """The same three steps on one dense model in float64, from the same initial values, without padding.

    `distilled`: the terms of a batch, whose tokens have these weights; None: those of `teacher_head`.
    """
    config = config_of(case)
    model = build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            norms = family(config).norm_init
            parameter.copy_(initial_tensor(name, parameter.shape, std=config.initializer_range, seed=SEED, norm=norms))
    model.double()
    has_experts = case.model_type in EXPERTS
    if has_experts:
        model.set_experts_implementation("eager")
    is_vector = {name: p.ndim < 2 or "norm" in name or "bias" in name for name, p in named.items()}  # [experts, width]
    matrices = [p for name, p in named.items() if not is_vector[name]]
    vectors = [p for name, p in named.items() if is_vector[name]]
    section = train_section(case, 1).optimizer
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
    )
    steps, gradients = [], []
    for step in range(3):
        batch = global_batch(step)
        labels = batch.labels.flatten()
        weights = (labels != -100).double() / batch.valid_tokens
        seen = masked(batch.starts, getattr(config, "sliding_window", None)) if case.document_mask else {}
        routed = {"output_router_logits": True} if has_experts else {}
        outputs = model.base_model(input_ids=batch.tokens, use_cache=False, **seen, **routed)
        hidden = outputs.last_hidden_state.flatten(0, 1)
        head = model.get_output_embeddings().weight
        if distilled is not None:
            terms = distilled(Head(hidden, head), batch, weights)
        elif case.objective == "distill":
            terms = reference.distill_loss(
                Head(hidden, head, transform=logit_transform(config)),
                Head(teacher_hidden(batch.slots).double(), teacher_head().double()),
                labels,
                token_weights=weights,
                divergence=Objective(case.loss, length=3, seed=SEED).divergence(step),
                vocab_size=VOCAB,
            )
        else:
            terms = reference.label_loss(
                Head(hidden, head), labels, token_weights=weights, z_loss=case.loss.z_loss, vocab_size=VOCAB
            )
        loss, routers = terms.loss, {}
        if has_experts:
            aux, z = dense_router_losses(outputs.router_logits, labels != -100, config)
            loss = loss + case.router_coefs.aux * aux + case.router_coefs.z * z
            routers = {"router_aux_loss": aux.item(), "router_z_loss": z.item()}
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), case.clip)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (step + 1) / 3
        optimizer.step()
        steps.append(
            {
                "loss": loss.item(),
                "student_ce": terms.student_ce.item(),
                "kl": terms.kl.item(),
                "grad_norm": norm.item(),
                **routers,
            }
        )
    return RunResult(
        steps=steps, gradients=gradients, parameters={name: p.detach().clone() for name, p in named.items()}
    )


def dense_router_losses(logits: tuple[Tensor, ...], valid_N: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """The load-balancing loss and the z-loss, means of the layers, of the tokens with a label; by transformers."""
    balance = partial(load_balancing_loss_func, num_experts=number_of_experts(config), top_k=config.num_experts_per_tok)
    aux = [balance((layer,), attention_mask=valid_N) for layer in logits]
    z = [layer[valid_N].logsumexp(dim=-1).square().mean() for layer in logits]
    return torch.stack(aux).mean(), torch.stack(z).mean()


def recipe_for(manifest: str, folder: str, **changes: Any) -> Recipe:
    """A small valid recipe for tests that need one."""
    values: dict[str, Any] = {
        "objective": "labels",
        "run": {"folder": folder},
        "data": {"manifest": manifest},
        "student": {"config": {"model_type": "llama"}},
        "train": {"steps": 4, "global_batch": 4, "micro_batch": 2, "optimizer": {"learning_rate": 1e-3}},
    }
    values.update(changes)
    return Recipe.model_validate(values)
