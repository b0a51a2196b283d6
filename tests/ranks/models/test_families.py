"""Every family as a student under ZeRO-3, on two ranks: one step against transformers' own model, dense, in float64.

The truth shares the initial values and nothing else: transformers' logits and torch's cross-entropy.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.config.recipe import Checkpointing, StudentSection
from megadistill.distributed.topology import Topology
from megadistill.loss import Head, label_loss
from megadistill.models.families import family, load_config, logit_transform, transformers_attention
from megadistill.models.initial_weights import initial_tensor
from megadistill.models.module_names import names_here
from megadistill.student.deepspeed_config import load_deepspeed_config
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import MULTIPLE, SEED, Case, WatchedStudent, train_section
from tests.unit.models.cases import ALL_CASES, CASES, MORE_CASES, STUDENTS, VOCAB

COVERED = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose students and teachers tests/ranks/student and tests/ranks/teacher train and cut."""
NEW = [name for name, config in CASES.items() if config["model_type"] not in COVERED]
FURTHER = [name for name in MORE_CASES if name in STUDENTS and name != "granite"]
"""The families whose test is thorough."""
TOGETHER = 6
"""Students that two processes train one after the other."""
MIXTURES = ["mixtral", "qwen3_moe", "qwen3_moe-step"]

# (rows, length) of each rank's batch. In the second a rank has two tokens, so few that experts are left without.
EVEN = ((2, 16), (2, 16))
TWO_TOKENS = ((2, 16), (1, 2))


@dataclass(frozen=True)
class Step:
    """Outcome of a step: hidden states of each rank's tokens, the loss over all of them, every gradient."""

    hidden: list[Tensor]
    loss: float
    gradients: dict[str, Tensor]


def _batch(shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels, and positions that start again in the middle of the second row, where there is one."""
    generator = torch.Generator().manual_seed(50 + rank)
    tokens, labels = (torch.randint(0, VOCAB, shape, generator=generator) for _ in range(2))
    positions = torch.arange(shape[1]).expand(shape).clone()
    positions[1:, 7:] -= 7
    return tokens, labels, positions


def _student(
    name: str, topology: Topology, *, checkpointing: Checkpointing = "none", precision: str = "float32"
) -> tuple[WatchedStudent, Any]:
    config = load_config(ALL_CASES[name], what="test")
    deepspeed_config = load_deepspeed_config(DS_CONFIGS / "cpu.json")
    deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    student = WatchedStudent(
        config,
        section=StudentSection(config={}, vocab_multiple=MULTIPLE, activation_checkpointing=checkpointing),
        train=train_section(Case(precision=precision), topology.world),
        deepspeed_config=deepspeed_config,
        vocab_size=VOCAB,
        accumulation=1,
        topology=topology,
        attention="flex",  # which `auto` chooses for documents
    )
    student.draw_weights(SEED)
    student.gradients = []
    return student, config


def _step(
    topology: Topology,
    name: str,
    shapes: tuple[tuple[int, int], ...],
    checkpointing: Checkpointing = "none",
    precision: str = "float32",
) -> Step:
    student, config = _student(name, topology, checkpointing=checkpointing, precision=precision)
    tokens, labels, positions = _batch(shapes[topology.rank], topology.rank)
    hidden = student.hidden(tokens, positions)
    terms = label_loss(
        Head(
            hidden,
            student.head.weight(),
            transform=logit_transform(config),
            weight_gradient=student.head.gradient(),
        ),
        labels.flatten(),
        token_weights=torch.full((labels.numel(),), 1 / sum(rows * length for rows, length in shapes)),
        vocab=student.head.vocab,
    )
    student.backward(terms.loss)
    student.step(1e-3)
    return Step([hidden.detach()], float(terms.loss), student.gradients[0])


def _dense_model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    config = load_config(ALL_CASES[name], what="test")
    config.pad_token_id = None  # the embedding of the padding id is trained like the others
    model = AutoModelForCausalLM.from_config(config, attn_implementation=transformers_attention(config, None))
    model.set_experts_implementation("eager")
    norm = family(config).norm_init
    with torch.no_grad():
        for path, parameter in _named_parameters(model).items():
            values = initial_tensor(path, parameter.shape, std=config.initializer_range, seed=SEED, norm=norm)
            parameter.copy_(values)
    return model.to(dtype)


def _truth(name: str, shapes: tuple[tuple[int, int], ...], dtype: torch.dtype = torch.float64) -> Step:
    model = _dense_model(name, dtype)
    hidden, losses = [], []
    for rank, shape in enumerate(shapes):
        tokens, labels, positions = _batch(shape, rank)
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
        if name == "gpt_oss":  # transformers does not look for documents in its positions
            inputs["attention_mask"] = _masks(model.config, positions, dtype)
        inner = model.base_model(**inputs)
        hidden.append(inner.last_hidden_state.detach().flatten(0, 1))
        logits = model(**inputs).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    loss = torch.stack(losses).sum() / sum(rows * length for rows, length in shapes)
    loss.backward()  # type: ignore[no-untyped-call]
    return Step(hidden, loss.item(), {path: parameter.grad for path, parameter in _named_parameters(model).items()})


def _masks(config: Any, positions: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Kind of layer -> [B, 1, S, S]: what is added to scores."""
    place = torch.arange(positions.shape[1])
    first = place.where(positions == 0, 0).cummax(dim=1).values.unsqueeze(-1)
    seen = (place <= place.unsqueeze(1)) & (place >= first)
    within = seen & (place > place.unsqueeze(1) - config.sliding_window)
    kinds = {"full_attention": seen, "sliding_attention": within}
    lowest = torch.finfo(dtype).min
    return {
        kind: torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest).unsqueeze(1)
        for kind, mask in kinds.items()
    }


def _named_parameters(model: Any) -> dict[str, Any]:
    """The parameters of a model of transformers, by their names here."""
    parameters = dict(model.named_parameters())
    return {name: parameters[theirs] for name, theirs in names_here(parameters, model.config.model_type).items()}


def _assert_matches(actual: list[Step], true: Step) -> None:
    for step, hidden in zip(actual, true.hidden, strict=True):
        torch.testing.assert_close(step.hidden[0].double(), hidden, rtol=1e-4, atol=1e-5)
    assert sum(step.loss for step in actual) == pytest.approx(true.loss, rel=2e-6)
    gradients = actual[0].gradients
    assert gradients.keys() == true.gradients.keys()
    for path, gradient in true.gradients.items():
        rows = gradient.shape[0]
        error = (gradients[path][:rows] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-5, f"the gradient of {path} is off by {error:.1e}"
        assert not gradients[path][rows:].any(), f"padding rows of {path} have a gradient"


@pytest.mark.parametrize("name", [*NEW, "granite"])
def test_a_step_equals_the_dense_truth(name: str) -> None:
    _assert_matches(run_ranks(2, _step, name, EVEN), _truth(name, EVEN))


def _steps(topology: Topology, names: list[str]) -> dict[str, Step]:
    return {name: _step(topology, name, EVEN) for name in names}


@pytest.mark.thorough
@pytest.mark.parametrize("first", range(0, len(FURTHER), TOGETHER))
def test_a_step_of_each_further_family_equals_the_dense_truth(first: int) -> None:
    names = FURTHER[first : first + TOGETHER]
    by_rank = run_ranks(2, _steps, names)
    for name in names:
        _assert_matches([steps[name] for steps in by_rank], _truth(name, EVEN))


@pytest.mark.parametrize(("name", "mode"), [("gemma3", "selective"), ("mixtral", "full")])
def test_a_step_that_recomputes_its_activations_equals_the_dense_truth(name: str, mode: Checkpointing) -> None:
    _assert_matches(run_ranks(2, _step, name, EVEN, mode), _truth(name, EVEN))


@pytest.mark.parametrize("name", ["gemma2", "mixtral"])
def test_a_step_in_bfloat16_is_the_dense_truth_to_its_precision(name: str) -> None:
    """Direction and length of each gradient, beside what one process of transformers loses in bfloat16.

    Of eight bits of mantissa, and of tokens that take another expert on a tie: of 32, one or two in most layers.
    """
    actual, true = run_ranks(2, _step, name, EVEN, "none", "bfloat16"), _truth(name, EVEN)
    dense = _truth(name, EVEN, torch.bfloat16)
    assert sum(step.loss for step in actual) == pytest.approx(true.loss, rel=0.01)
    for path, gradient in true.gradients.items():
        ours = actual[0].gradients[path][: gradient.shape[0]].double()
        assert torch.cosine_similarity(ours.flatten(), gradient.flatten(), dim=0) > 0.95, path
        length = float(gradient.norm())
        lost = abs(float(dense.gradients[path].double().norm()) - length)
        assert ours.norm() == pytest.approx(length, abs=0.1 * length + lost), path


def _experts_hit(name: str, shapes: tuple[tuple[int, int], ...]) -> list[list[set[int]]]:
    """The experts that get a token, by rank and layer."""
    model = _dense_model(name)
    routers = [module for path, module in model.named_modules() if path.endswith(".mlp.gate")]
    hit: list[set[int]] = []
    for router in routers:
        router.register_forward_hook(lambda _, __, output: hit.append(set(output[2].flatten().tolist())))
    by_rank = []
    for rank, shape in enumerate(shapes):
        hit.clear()
        tokens, _, positions = _batch(shape, rank)
        model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
        by_rank.append(hit.copy())
    return by_rank


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_without_a_token_on_one_rank_is_gathered_and_reduced_all_the_same(name: str) -> None:
    """transformers' fused experts are parameters of one module, gathered whole: no rank waits for another's expert.

    (A module for each expert would need `deepspeed.utils.set_z3_leaf_modules`.)
    """
    everywhere, somewhere = _experts_hit(name, TWO_TOKENS)
    assert any(few < many for many, few in zip(everywhere, somewhere, strict=True)), "the case must leave experts out"
    _assert_matches(run_ranks(2, _step, name, TWO_TOKENS), _truth(name, TWO_TOKENS))


def _initial(topology: Topology, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    student, _ = _student(name, topology)
    return student.full_parameters(), {path: buffer.clone() for path, buffer in student._model.named_buffers()}


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mixtral"])
def test_zero_init_changes_neither_initial_values_nor_buffers(name: str) -> None:
    truth = _dense_model(name)
    buffers = {path: buffer.float() for path, buffer in truth.named_buffers()}
    for parameters, actual in run_ranks(2, _initial, name):
        for path, parameter in truth.named_parameters():
            assert torch.equal(parameters[path][: parameter.shape[0]], parameter.float()), path
        assert actual.keys() == buffers.keys()
        for path, buffer in actual.items():
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, buffers[path]), path
