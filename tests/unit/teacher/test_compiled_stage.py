"""A compiled stage against the eager one: every family, one graph for all layers of a kind, none for a micro-batch."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from megadistill.teacher.cpu_linear import OneDnnLinear, use_onednn
from megadistill.teacher.stage import TeacherStage
from megadistill.train.resilience.sdc import weights_digest
from tests.unit.models.cases import CASES, VOCAB, saved_model

CPU = torch.device("cpu")
ROUNDING: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def _load(folder: Path, stage: int = 0, stages: int = 1, **options: Any) -> TeacherStage:
    options = {"dtype": torch.float32, "compiled": True, **options}
    return TeacherStage.load(folder, stage=stage, stages=stages, device=CPU, **options)


def _tokens(seed: int) -> Tensor:
    return torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that Dynamo captures, which run uncompiled: all that compiling does but the making of kernels."""
    torch._dynamo.reset()
    captured: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        captured.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield captured
    torch._dynamo.reset()


def _most_graphs(stage: TeacherStage) -> int:
    """One for each kind of layer, one for the final norm, one for an embedding that scales.

    Layers that differ in their masks alone, which are inputs, share one.
    """
    decoder = stage.decoder
    attention = getattr(decoder.config, "layer_types", None) or [None] * len(decoder.layers)
    kinds = {(kind, type(layer.mlp)) for kind, layer in zip(attention, decoder.layers, strict=True)}
    scales = stage.is_first and hasattr(decoder.embed_tokens, "embed_scale")
    return len(kinds) + stage.is_last + scales


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_stage_is_the_eager_one_with_one_graph_for_all_layers_of_a_kind(
    case: str, tmp_path: Path, graphs: list[Any]
) -> None:
    saved_model(case, tmp_path)
    eager, compiled = _load(tmp_path, compiled=False), _load(tmp_path)
    torch.testing.assert_close(compiled(_tokens(0)), eager(_tokens(0)), **ROUNDING)
    assert 0 < len(graphs) <= _most_graphs(compiled) < len(compiled.decoder.layers)
    count = len(graphs)
    torch.testing.assert_close(compiled(_tokens(1)), eager(_tokens(1)), **ROUNDING)
    assert len(graphs) == count, "another micro-batch compiles nothing"


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3"])
def test_documents_of_other_lengths_compile_nothing_more(case: str, tmp_path: Path, graphs: list[Any]) -> None:
    saved_model(case, tmp_path)
    eager, compiled = _load(tmp_path, compiled=False), _load(tmp_path)
    counts = []
    for first in (3, 9, 14):
        positions_BS = torch.cat([torch.arange(first), torch.arange(20 - first)]).expand(2, 20)
        out = compiled(_tokens(first), positions_BS)
        torch.testing.assert_close(out, eager(_tokens(first), positions_BS), **ROUNDING)
        counts.append(len(graphs))
    assert counts == [len(graphs)] * 3
    assert len(graphs) <= _most_graphs(compiled)


@pytest.mark.parametrize("precision", ["native", "float8"])
def test_each_stage_compiles_its_own_parts(precision: str, tmp_path: Path, graphs: list[Any]) -> None:
    saved_model("gemma2", tmp_path)
    x = truth = _tokens(2)
    for place in range(3):
        options = {"precision": precision, "dtype": torch.bfloat16}
        stage = _load(tmp_path, place, 3, **options)
        x, truth = stage(x), _load(tmp_path, place, 3, compiled=False, **options)(truth)
        torch.testing.assert_close(x, truth, rtol=0, atol=0)
        assert 0 < len(graphs) <= _most_graphs(stage)
        graphs.clear()
        torch._dynamo.reset()


def test_kernels_of_a_layer_are_one_loop_a_norm_and_a_gate(tmp_path: Path) -> None:
    """Each norm with the sum before it, the gate with its activation. The stage's weights stay where they are hashed:
    a changed one is seen, and computed with."""
    saved_model("llama", tmp_path)
    torch._dynamo.reset()
    eager, compiled = _load(tmp_path, compiled=False), _load(tmp_path)
    out, sources = run_and_get_code(lambda: compiled(_tokens(0)))
    torch.testing.assert_close(out, eager(_tokens(0)), **ROUNDING)
    layer, norm = sorted(sources, key=len, reverse=True)
    kernels = re.findall(r"(cpp_fused\w+) = async_compile", layer)
    assert [sum(part in kernel for kernel in kernels) for part in ("rsqrt", "silu")] == [2, 1]
    assert len(kernels) <= 7, f"two norms, a gate, a sum, and the rotation's copies: {kernels}"
    assert len(re.findall(r"cpp_fused\w+ = async_compile", norm)) == 1

    before = weights_digest(compiled.weights())
    assert torch.equal(weights_digest(eager.weights()), before)
    for stage in (eager, compiled):
        stage.decoder.layers[1].mlp.gate_proj.weight.data[0, 0] += 1
    torch.testing.assert_close(compiled(_tokens(0)), eager(_tokens(0)), **ROUNDING)
    assert (weights_digest(compiled.weights()) != before).sum() == 1


def test_a_torch_without_onednns_operator_keeps_its_own_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Sequential(nn.Linear(2, 3))
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    use_onednn(SimpleNamespace(layers=layers))
    assert type(layers[0]) is nn.Linear
    monkeypatch.undo()
    use_onednn(SimpleNamespace(layers=layers))
    assert type(layers[0]) is (OneDnnLinear if torch.backends.mkldnn.is_available() else nn.Linear)  # type: ignore[no-untyped-call]


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_kernels_of_every_family_compute_what_the_eager_stage_does(case: str, tmp_path: Path) -> None:
    saved_model(case, tmp_path)
    torch._dynamo.reset()
    eager, compiled = _load(tmp_path, compiled=False), _load(tmp_path)
    positions_BS = torch.cat([torch.arange(9), torch.arange(11)]).expand(2, 20)
    for positions in (None, positions_BS):
        out, truth = compiled(_tokens(0), positions), eager(_tokens(0), positions)
        torch.testing.assert_close(out, truth, **ROUNDING)
