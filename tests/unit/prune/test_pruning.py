"""Pruning against models whose superfluous parts are known, and scores against formulas written out by hand.

Legend: B sequences, S tokens of a sequence.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.errors import OperatorFault, UserError
from megadistill.models.families import FAMILIES, Family, head_dim, load_config
from megadistill.models.hf_export import export_model
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.prune.cut import pruned_tensors
from megadistill.prune.importance import PruningChoice, choose, measure_importance
from megadistill.prune.sizes import Sizes, pruned_config, pruned_sizes
from megadistill.types import IGNORED_LABEL, TokenBatch, token_digest
from tests.unit.models.cases import ALL_CASES, CASES, MORE_CASES, SIZES, VOCAB

# Live parts of the planted models, out of 64 channels, 96 neurons, 2 groups of 2 heads, and 5 layers.
CHANNELS, NEURONS, LAYERS = 36, 41, [0, 2, 3]


def _is_pruned(family: Family) -> bool:
    return not (family.unpruned or family.experts or family.teacher_only)


DENSE = ["llama-tied", "llama3-rope", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "phi3", "smollm3"]
MORE = [
    name
    for name, keys in MORE_CASES.items()
    # Arcee's neurons are zero for many tokens, those with an effect as well.
    if name not in (*DENSE, "arcee") and "longrope" not in name and _is_pruned(FAMILIES[keys["model_type"]])
]


@dataclass(frozen=True)
class Planted:
    """A model of which only `live` does anything."""

    model: Any
    live: PruningChoice


def _batches(*shapes: tuple[int, int], seed: int = 5) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for shape in shapes:
        tokens, labels = (torch.randint(0, VOCAB, shape, generator=generator) for _ in range(2))
        labels[:, -1] = IGNORED_LABEL
        starts = torch.zeros(shape, dtype=torch.bool)
        batches.append(TokenBatch(tokens, labels, torch.arange(shape[0]), token_digest(tokens), starts))
    return batches


def _model(keys: dict[str, Any]) -> Any:
    """Norms and biases are not one and zero."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(load_config(keys, what="test"), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def _some(count: int, of: int, *, seed: int) -> list[int]:
    return sorted(torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def _silenced(module: Any, rows: list[int]) -> None:
    """These outputs of a linear layer are zero."""
    module.weight[rows] = 0
    if module.bias is not None:
        module.bias[rows] = 0


@torch.no_grad()
def _planted(name: str, **changes: Any) -> Planted:
    # An epsilon so small that it makes no difference over how many channels a mean is taken.
    model = _model({**ALL_CASES[name], "rms_norm_eps": 1e-12, **changes})
    live = PruningChoice(
        hidden=_some(CHANNELS, 64, seed=1),
        layers=LAYERS,
        groups=[_some(1, 2, seed=10 + layer) for layer in LAYERS],
        neurons=[_some(NEURONS, 96, seed=20 + layer) for layer in LAYERS],
    )
    dead = [channel for channel in range(64) if channel not in live.hidden]
    model.model.embed_tokens.weight[:, dead] = 0
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        identity = number not in LAYERS
        for writes in (attention.o_proj, mlp.down_proj):
            _silenced(writes, list(range(64)) if identity else dead)
        if identity:
            continue
        place = LAYERS.index(number)
        idle = [neuron for neuron in range(96) if neuron not in live.neurons[place]]
        if hasattr(mlp, "gate_up_proj"):
            _silenced(mlp.gate_up_proj, [*idle, *(neuron + 96 for neuron in idle)])
        for matrix in ("gate_proj", "up_proj"):
            if hasattr(mlp, matrix):
                _silenced(getattr(mlp, matrix), idle)
        size, (group,) = head_dim(model.config), live.groups[place]
        other = 1 - group
        queries, keys = range(other * 2 * size, (other + 1) * 2 * size), range(other * size, (other + 1) * size)
        if hasattr(attention, "qkv_proj"):
            _silenced(attention.qkv_proj, [*queries, *(row + first * size for first in (4, 6) for row in keys)])
            continue
        _silenced(attention.q_proj, list(queries))
        for projection in (attention.k_proj, attention.v_proj):
            _silenced(projection, list(keys))
    return Planted(model, live)


def _pruned(model: Any, folder: Path, sizes: Sizes, batches: list[TokenBatch]) -> tuple[PruningChoice, Any]:
    """The choice, and the smaller model as transformers loads it."""
    model.save_pretrained(folder / "whole")
    config = load_config(folder / "whole", what="test")
    importance = measure_importance(model, batches)
    choice = choose(importance, config, sizes)
    small = pruned_config(config, sizes, layers=choice.layers)
    export_model(
        folder / "pruned",
        config=small,
        tensors=pruned_tensors(SafetensorsFolder(folder / "whole"), config, small, choice, importance.shares),
        dtype=torch.float32,
        true_vocab=VOCAB,
        max_shard_bytes=10**9,
        tokenizer=None,
    )
    load_config(folder / "pruned", what="test")
    return choice, AutoModelForCausalLM.from_pretrained(folder / "pruned", attn_implementation="eager").eval()


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


SMALL = Sizes(hidden_size=CHANNELS, intermediate_size=NEURONS, heads=2, layers=len(LAYERS))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in DENSE),
        *(pytest.param(name, {}, marks=pytest.mark.thorough) for name in MORE),
        ("gemma2", {"tie_word_embeddings": False}),
    ],
)
def test_parts_without_effect_are_cut_without_loss(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    planted = _planted(name, **changes)
    (batch,) = batches = _batches((3, 16))
    choice, small = _pruned(planted.model, tmp_path, SMALL, batches)
    assert choice == planted.live
    kinds = getattr(planted.model.config, "layer_types", None)
    assert getattr(small.config, "layer_types", None) == (kinds and [kinds[layer] for layer in LAYERS])
    whole = _logits(planted.model, batch.tokens)
    assert whole.std() > 0.05
    torch.testing.assert_close(_logits(small, batch.tokens), whole, rtol=1e-4, atol=2e-5)


def test_one_size_alone_leaves_the_others(tmp_path: Path) -> None:
    model = _model(CASES["llama"])
    batches = _batches((2, 16))
    own = Sizes(hidden_size=64, intermediate_size=96, heads=4, layers=5)
    sizes = pruned_sizes(model.config, layers=4)
    assert sizes == Sizes(64, 96, 4, 4)
    choice, small = _pruned(model, tmp_path, sizes, batches)
    everything = list(range(96))
    assert (choice.hidden, choice.neurons, choice.groups) == (everything[:64], [everything] * 4, [[0, 1]] * 4)
    (dropped,) = set(range(own.layers)) - set(choice.layers)
    del model.model.layers[dropped]
    assert torch.equal(_logits(small, batches[0].tokens), _logits(model, batches[0].tokens))


def test_scores_are_the_formulas(tmp_path: Path) -> None:
    """Activations seen by hooks, put together sequence by sequence, token by token."""
    model = _model({"model_type": "llama", **SIZES, "num_hidden_layers": 2})
    first, second = _batches((2, 7), (1, 5))
    first.labels[1, 2:5] = IGNORED_LABEL
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, given: seen.setdefault(name, []).append(args[0][0])

    for name, module in model.named_modules():
        if name.endswith(("norm", "mlp", "o_proj")):
            module.register_forward_hook(keep(name))
    states = []
    counted = []
    with torch.no_grad():
        for batch in (first, second):
            for tokens, labels in zip(batch.tokens, batch.labels, strict=True):
                given = model.model(input_ids=tokens[None], output_hidden_states=True, use_cache=False)
                states.append([state[0] for state in given.hidden_states[:-1]] + [seen["model.norm"][-1]])
                counted.append([place for place, label in enumerate(labels.tolist()) if label != IGNORED_LABEL])
    seen = {name: list(rows) for name, rows in seen.items()}
    importance = measure_importance(model, [first, second])

    def l2_of_means(sequences: list[Tensor]) -> Tensor:
        means = [
            torch.stack([row[s] for s in places]).abs().mean(0) for row, places in zip(sequences, counted, strict=True)
        ]
        return torch.stack(means).double().square().sum(0).sqrt()

    hidden = torch.zeros(64, dtype=torch.float64)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("norm"):
                x = [row / (row.square().mean(-1, keepdim=True) + 1e-6).sqrt() for row in seen[name][:3]]
                hidden += l2_of_means([row * module.weight for row in x])
                tokens = torch.cat([row[places] for row, places in zip(seen[name], counted, strict=False)])
                shares = tokens.square() / tokens.square().sum(-1, keepdim=True)
                torch.testing.assert_close(importance.shares[name], shares.double().mean(0), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(importance.hidden, hidden, rtol=1e-5, atol=0)
        for number, layer in enumerate(model.model.layers):
            prefix = f"model.layers.{number}"
            mlp = layer.mlp
            products = [torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x) for x in seen[f"{prefix}.mlp"][:3]]
            torch.testing.assert_close(importance.neurons[number], l2_of_means(products), rtol=1e-5, atol=0)
            outputs = seen[f"{prefix}.self_attn.o_proj"][:3]
            norms = [
                torch.stack([row[:, 16 * h : 16 * h + 16].norm(dim=1) for h in range(4)], dim=1) for row in outputs
            ]
            torch.testing.assert_close(importance.heads[number], l2_of_means(norms), rtol=1e-5, atol=0)
            cosines = [
                torch.dot(row[number][s], row[number + 1][s]) / (row[number][s].norm() * row[number + 1][s].norm())
                for row, places in zip(states, counted, strict=True)
                for s in places
            ]
            assert importance.layers[number] == pytest.approx(1 - float(torch.stack(cosines).mean()), rel=1e-4)
    assert (importance.sequences, importance.tokens) == (3, sum(map(len, counted)))


def test_the_highest_stay_and_of_equals_the_first() -> None:
    model = _model({"model_type": "llama", **SIZES, "num_hidden_layers": 2})
    importance = measure_importance(model, _batches((1, 8)))
    importance.heads[1][:] = torch.tensor(
        [4.0, 0.0, 1.0, 2.0]
    )  # the first group scores more, though not its second head
    importance.neurons[1][:] = 1.0
    importance.layers[:] = torch.tensor([0.1, 0.3])
    choice = choose(importance, model.config, Sizes(hidden_size=64, intermediate_size=3, heads=2, layers=1))
    assert choice == PruningChoice(hidden=list(range(64)), layers=[1], groups=[[0]], neurons=[[0, 1, 2]])


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("llama", {"hidden_size": 65}, ["--hidden-size 65", "64"]),
        ("llama", {"intermediate_size": 97}, ["--intermediate-size 97", "96"]),
        ("llama", {"layers": 6}, ["--layers 6", "5"]),
        ("llama", {"heads": 0}, ["--heads 0", "1 to"]),
        ("llama", {"heads": 3}, ["--heads 3", "2 keys", "groups of 2", "2 or 4"]),
        ("llama", {"hidden_size": 50}, ["--hidden-size 50", "4 heads", "48 or 52"]),
        ("llama", {"hidden_size": 63, "heads": 4}, ["60 or 64"]),
        ("llama", {}, ["nothing to prune", "--hidden-size", "--layers"]),
        ("llama", {"layers": 5, "heads": 4}, ["nothing to prune"]),
        ("mixtral", {"layers": 2}, ["mixtral", "experts", "llama", "gemma2"]),
        ("qwen3_moe", {"layers": 2}, ["qwen3_moe", "experts"]),
        ("phi3-longrope", {"hidden_size": 32}, ["--hidden-size 32 and --heads 4", "longrope", "give --hidden-size 64"]),
        ("phi3-longrope", {"heads": 2}, ["--hidden-size 64 and --heads 2", "longrope", "give --hidden-size 32"]),
    ],
)
def test_sizes_that_cannot_be_are_refused(name: str, given: dict[str, int], says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        pruned_sizes(load_config(ALL_CASES[name], what="test"), **given)
    assert "\n" not in str(caught.value)
    for part in says:
        assert part in str(caught.value)


def test_activations_that_say_nothing_are_refused() -> None:
    model = _model({"model_type": "llama", **SIZES, "num_hidden_layers": 2})
    (batch,) = _batches((1, 8))
    batch.labels[:] = IGNORED_LABEL
    with pytest.raises(UserError, match="no token with a label"):
        measure_importance(model, [batch])
    model.model.layers[0].mlp.up_proj.weight.data[3] = torch.nan
    with pytest.raises(OperatorFault, match="not finite"):
        measure_importance(model, _batches((1, 8)))
