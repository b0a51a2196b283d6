"""Operators that a call of the loss launches, each a kernel on an accelerator, and the kernels that are compiled.

Legend: w ranks whose pieces of the vocabulary a slice holds; n tokens, v rows of the vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megadistill.config import auto as choices
from megadistill.distributed.vocab import VocabSlice, block_cyclic_ranges
from megadistill.loss import Divergence, DivergenceKind, Elementwise, buffers, pointwise
from megadistill.loss.softmax import Logits
from megadistill.types import LogitTransform, Tail
from tests.unit.loss.problems import problem, run, sparse

VIEWS = {"view", "slice", "select", "unsqueeze", "expand", "t", "transpose", "alias", "detach", "unbind", "split", "_"}
"""Operators that move no data; `as_strided` and others count, which is on the safe side."""

CHUNK_KERNELS = {"forward KL": 210, "JSD": 265, "sparse targets": 220}
"""Bounds of a chunk in one block, eager: its products, statistics, divergence and gradients."""


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run, but for views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        self.counts[name] += name not in VIEWS
        return func(*args, **(kwargs or {}))


def launches(case: str, vocab: VocabSlice, chunks: int) -> int:
    """Operators of a call of the loss and its backward, whose tokens take so many chunks."""
    p = problem(3, tokens=4 * chunks, rows=2048, size=2047).cast(torch.float32)
    divergence = Divergence(DivergenceKind.JSD if case == "JSD" else DivergenceKind.FORWARD_KL, z_loss=1e-4)
    targets = sparse(p, Tail.OTHER, kept=5) if case == "sparse targets" else None
    models = 1 if targets is not None else 2
    with Launches() as mode:
        run(p, divergence, vocab=vocab, targets=targets, logit_memory=4 * models * 4 * 2047)
    return sum(mode.counts.values())


@pytest.mark.parametrize("case", CHUNK_KERNELS)
def test_a_chunk_launches_as_many_kernels_for_any_world(case: str) -> None:
    """A slice of the 2,048 pieces that 2,048 ranks store costs what a slice of 64 pieces does."""
    launches(case, VocabSlice.contiguous(0, 2048, 2047), 3)  # the buffer of logits is made once, for all
    first_call, chunk = {}, {}
    for world in (1, 64, 512, 2048):
        vocab = VocabSlice(block_cyclic_ranges(2048, world, 1, 0), 2047)
        assert len(vocab.ranges) == world
        first_call[world] = launches(case, vocab, 1)
        chunk[world] = launches(case, vocab, 3) - launches(case, vocab, 2)
    assert len(set(first_call.values())) == 1, first_call
    assert len(set(chunk.values())) == 1, chunk
    assert chunk[1] <= CHUNK_KERNELS[case], chunk


@pytest.mark.parametrize("elementwise", [Elementwise.EAGER, Elementwise.COMPILED])
def test_an_accelerator_takes_a_chunk_at_once(elementwise: Elementwise) -> None:
    """A chunk of 8 nodes: 256 blocks for a CPU's cache would be 17,000 launches."""
    logits = Logits(torch.empty(2048, 32_000, device="meta"), 1.0, elementwise)
    assert logits.blocks() == [slice(0, 2048)]
    assert len(Logits(torch.empty(64, 32_000), 1.0, Elementwise.EAGER).blocks()) == 8


def test_auto_is_compiled_where_a_compiler_of_kernels_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, device = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(choices, "has_triton", lambda: True)
    assert (Elementwise.AUTO.on(cpu), Elementwise.AUTO.on(device)) == (Elementwise.EAGER, Elementwise.COMPILED)
    monkeypatch.setattr(choices, "has_triton", lambda: False)
    assert Elementwise.AUTO.on(device) is Elementwise.EAGER
    for explicit in (Elementwise.EAGER, Elementwise.COMPILED):
        assert explicit.on(cpu) is explicit.on(device) is explicit


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Times that each function of `pointwise` is compiled; it runs as torch's own operations all the same."""
    counts: Counter[str] = Counter()
    compile_ = torch.compile

    def counted(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def backend(graph: torch.fx.GraphModule, _: list[Tensor], **_options: Any) -> Callable[..., Any]:
            counts[function.__name__] += 1
            return graph.forward

        return compile_(function, backend=backend, **options)

    torch._dynamo.reset()
    pointwise.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", counted)
    yield counts
    pointwise.compiled.cache_clear()
    torch._dynamo.reset()


def test_sizes_and_temperatures_compile_nothing_anew(compilations: Counter[str]) -> None:
    """Ten vocabularies, temperatures and softcaps; chunks of 5, 5 and 3 tokens, of 4 and 3, and of 4 and 2."""
    compiled = partial(run, elementwise=Elementwise.COMPILED)
    for i in range(10):
        size, tokens = 20 + i, (13, 7, 6)[i % 3]
        p = problem(i, tokens=tokens, rows=size + 3, size=size).cast(torch.float32)
        capped = replace(p, student_logits=LogitTransform(softcap=3.0 + i), teacher_logits=LogitTransform(softcap=5.0))
        vocab, memory = VocabSlice.contiguous(0, size + 3, size), 5 * 2 * size * 4
        compiled(capped, Divergence(temperature=1.5 + i), vocab=vocab, logit_memory=memory)
        jsd = Divergence(DivergenceKind.JSD, parameter=0.05 * (i + 1), temperature=1.5 + i)
        compiled(capped, jsd, vocab=vocab, logit_memory=memory)
    functions = ("apply_transform_", "slice_stats", "forward_kl", "mean_centred_stats", "write_mean_centred_dlogits")
    assert compilations == dict.fromkeys(functions, 1)


def test_a_process_may_compile_more_variants_than_torchs_limit(compilations: Counter[str]) -> None:
    def variant(z: Tensor, name: str) -> Tensor:
        return z + len(name)

    for length in range(12):
        pointwise.compiled(variant)(torch.zeros(3), "x" * length)
    assert compilations["variant"] == 12


@pytest.mark.parametrize("size", [21, 23, 32])
def test_logits_begin_at_addresses_that_a_kernel_takes_as_they_are(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the slice: a matrix elsewhere would be copied by the compiled kernel."""
    begins = []
    stats = Logits.stats

    def seen(logits: Logits, *arguments: Any) -> Tensor:
        begins.append(logits.z_nv.data_ptr() % buffers.ROW_BYTES)
        return stats(logits, *arguments)

    monkeypatch.setattr(Logits, "stats", seen)
    p = problem(1, tokens=13, rows=size, size=size).cast(torch.float32)
    run(p, Divergence(), vocab=VocabSlice.contiguous(0, size, size), logit_memory=5 * 2 * size * 4)
    assert begins == [0] * 6
