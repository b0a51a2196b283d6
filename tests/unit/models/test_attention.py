"""Attention by recipe: every implementation computes what eager computes, forward and backward, for every family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flash_attention import flash_attention_forward

from megadistill.models.attention import blockwise, flex, masks
from megadistill.models.attention.blockwise import blockwise_attention
from megadistill.models.attention.masks import FLEX, attention_inputs, block_mask
from megadistill.models.families import build_causal_lm, build_decoder, decoder, forward_inputs, load_config
from megadistill.models.layers import compile_layers
from megadistill.plan.counts.activations import LiveStorages
from tests.device_double import DEVICE, DeviceDouble, move
from tests.unit.models.cases import ALL_CASES, CASES, VOCAB, all_cases

S = 200
"""More than three blocks on a CPU, more than one of flex_attention's, and a multiple of neither."""

DOCUMENTS = torch.stack([torch.cat([torch.arange(90, 93), *map(torch.arange, (100, 90, 7))]), torch.arange(S)])
"""Positions of two rows, the first of which begins within a document."""

LAYERS = {"gemma3": 4, "exaone4": 4, "qwen3_moe": 2, "mixtral": 2}


def _model(case: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64 if "phi3" in case else 32, "intermediate_size": 16, "max_position_embeddings": 256}
    layers = LAYERS.get(case, 3)
    by_layer = {name: ALL_CASES[case][name][:layers] for name in ("layer_types",) if name in ALL_CASES[case]}
    config = load_config({**ALL_CASES[case], **sizes, **by_layer, "num_hidden_layers": layers}, what=case)
    return build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32, attention=attention).to(dtype)


def _tokens() -> Tensor:
    return torch.randint(VOCAB, DOCUMENTS.shape, generator=torch.Generator().manual_seed(1))


def _hidden_and_gradients(model: Any, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    inner = decoder(model)
    model.zero_grad()
    hidden = inner(**forward_inputs(inner, _tokens(), positions)).last_hidden_state
    hidden.float().square().mean().backward()
    gradients = [each.grad.float().flatten() for each in inner.parameters() if each.grad is not None]
    return hidden.detach().float(), torch.cat(gradients)


def _error(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("case", all_cases("smollm3"))
def test_blockwise_attention_of_a_whole_model_is_eager_attention(case: str) -> None:
    eager, ours = _model(case, "eager"), _model(case, "flex")
    assert ours.config._attn_implementation == FLEX
    results = {}
    for positions in (None, DOCUMENTS):
        results[positions is None] = _hidden_and_gradients(eager, positions)
        for mine, theirs in zip(_hidden_and_gradients(ours, positions), results[positions is None], strict=True):
            assert _error(mine, theirs) < 2e-6
    assert _error(*(hidden for hidden, _ in results.values())) > 1e-2, "documents matter"


@pytest.mark.parametrize("case", ["gemma2", "mistral", "llama"])
def test_in_bfloat16_blockwise_attention_is_nearer_to_the_truth_than_eager(case: str) -> None:
    """Its scores and their softmax are float32; eager attention rounds them."""
    truth = _hidden_and_gradients(_model(case, "eager"), DOCUMENTS)
    rounded = _hidden_and_gradients(_model(case, "eager", torch.bfloat16), DOCUMENTS)
    ours = _hidden_and_gradients(_model(case, "flex", torch.bfloat16), DOCUMENTS)
    for mine, theirs, exact in zip(ours, rounded, truth, strict=True):
        assert _error(mine, exact) < 1.05 * _error(theirs, exact) < 0.1


def _dense(query: Tensor, key: Tensor, value: Tensor, first_key: Tensor | None, softcap: float | None) -> Tensor:
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    place = torch.arange(query.shape[2])
    hidden = place > place.unsqueeze(1)
    if first_key is not None:
        hidden = hidden | (place < first_key.unsqueeze(-1)).unsqueeze(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def _first_keys(kind: str) -> Tensor | None:
    window = (torch.arange(S) - 99).clamp(min=0).unsqueeze(0)
    documents = masks._document_starts(DOCUMENTS)
    return {"causal": None, "window": window, "documents": documents, "both": documents.maximum(window)}[kind]


@pytest.mark.parametrize("pieces", [1, 1 << 13, 1 << 15, 1 << 30])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kind", ["causal", "window", "documents", "both"])
def test_blocks_of_any_size_give_the_same_attention(
    kind: str, softcap: float | None, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of one head of keys, of several, and of several sequences; in float64, so to the last few bits."""
    monkeypatch.setattr(blockwise, "PIECE_ELEMENTS", pieces)
    torch.manual_seed(0)
    first_key = _first_keys(kind)
    inputs = [torch.randn(2, S, heads, 8, dtype=torch.float64).transpose(1, 2) for heads in (6, 3, 3)]
    given = torch.randn(2, S, 6, 8, dtype=torch.float64)
    results = []
    for attention in (
        lambda q, k, v: blockwise_attention(q, k, v, first_key, 0.3, softcap),
        lambda q, k, v: _dense(q, k, v, first_key, softcap),
    ):
        leaves = [each.detach().requires_grad_() for each in inputs]
        output = attention(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, given)])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_a_key_that_no_query_of_a_block_sees_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "PIECE_ELEMENTS", 1)
    rows = blockwise._Rows.of(*(torch.zeros(2, 2, S, 8) for _ in range(3)), scale=1.0, softcap=None)
    widths = {
        kind: sum(
            (piece.keys.stop - piece.keys.start) * (piece.pairs.stop - piece.pairs.start)
            for piece in blockwise._pieces(rows, _first_keys(kind))
        )
        for kind in ("causal", "window", "both")
    }
    # Blocks of 64 queries begin at 0, 64, 128 and 192; a window of 100 keys begins 99 before the first of them.
    assert widths["causal"] == 4 * (64 + 128 + 192 + 200)
    assert widths["window"] == 4 * (64 + 128 + (192 - 29) + (200 - 93))
    assert widths["both"] < widths["window"]


def test_memory_of_blockwise_attention_grows_with_the_sequence_and_not_with_its_square() -> None:
    def peak(length: int, compute: Callable[..., Any], *more: Tensor) -> int:
        query, key = torch.zeros(1, 4, length, 16), torch.zeros(1, 2, length, 16)
        with LiveStorages() as live:
            compute(*more, query, key, key, None, 0.3, 5.0)
        return int(live.peak)

    for compute, more in ((blockwise.compute, ()), (blockwise.compute_gradients, (16,))):
        short, long = (peak(length, compute, *(torch.zeros(1, length, 4, 16) for _ in more)) for length in (2048, 4096))
        assert long < 2.1 * short
        assert long < 4 * 4096 * 4096, "less than the scores of one head"


def _dense_kernel(*arguments: Any, **keywords: Any) -> Any:
    return torch_flex.flex_attention(*arguments, **keywords)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "exaone4", "olmo2", "gpt_oss"])
def test_flex_attention_of_a_whole_model_is_eager_attention(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of an accelerator, uncompiled: torch computes the same masks and softcap densely."""
    monkeypatch.setattr(masks, "has_flex_kernels", lambda device: True)
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: _dense_kernel)
    eager, ours = _model(case, "eager"), _model(case, "flex")
    for positions in (None, DOCUMENTS):
        theirs = _hidden_and_gradients(eager, positions)
        inner = decoder(ours)
        inner.requires_grad_(False)
        frozen = inner(**forward_inputs(inner, _tokens(), positions)).last_hidden_state
        assert _error(frozen, theirs[0]) < 2e-6
        inner.requires_grad_()
        with monkeypatch.context() as lifted:  # torch refuses the backward pass on a CPU, and has it
            lifted.setattr(torch_flex, "_validate_device", lambda *tensors: None)
            for mine, truth in zip(_hidden_and_gradients(ours, positions), theirs, strict=True):
                assert _error(mine, truth) < 2e-6


@pytest.mark.parametrize("length", [1, 100, 128, 300, 1000])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 400])
@pytest.mark.parametrize("documents", [False, True])
def test_a_block_mask_is_the_one_that_torch_makes_of_a_dense_mask(
    length: int, window: int | None, documents: bool
) -> None:
    positions = torch.stack([torch.arange(length) % 250, (torch.arange(length) + 100) % 300]) if documents else None
    starts = None if positions is None else masks._document_starts(positions)
    first_key = masks._first_keys(starts, (2, length), window=window, device=torch.device("cpu"))
    ours = block_mask(first_key, (2, length), device=torch.device("cpu"))
    theirs = create_block_mask(ours.mask_mod, ours.shape[0], None, length, length, device="cpu")
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for number, index in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        counts, mine, torchs = getattr(ours, number), getattr(ours, index), getattr(theirs, index)
        used = torch.arange(mine.shape[-1]) < counts.unsqueeze(-1)
        assert torch.equal(mine[used], torchs[used])


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Most elements of a tensor that an operator gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("case", ["llama", "gemma2", "exaone4"])
@pytest.mark.parametrize("documents", [False, True])
def test_on_a_device_no_mask_is_dense_and_nothing_waits(
    case: str, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    length, seen = 1024, []

    def kernel(query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Tensor:
        seen.append(keywords["block_mask"])
        return query + 0

    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: kernel)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "max_position_embeddings": length}
    config = load_config({**CASES[case], **sizes}, what=case)
    inner = decoder(build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32, attention="flex"))
    with DeviceDouble() as double, torch.no_grad(), _Largest() as largest:  # type: ignore[no-untyped-call]
        move(inner)
        tokens, positions = (each.to(DEVICE) for each in (torch.zeros(1, length, dtype=torch.int64), DOCUMENTS[:1]))
        restarts = positions.repeat(1, 6)[:, :length] if documents else None
        double.clear()
        largest.elements = 0
        inner(**forward_inputs(inner, tokens, restarts))
        assert double.counts == {}
    assert largest.elements < length * length // 8
    assert len(seen) == config.num_hidden_layers
    assert all(isinstance(mask, BlockMask) for mask in seen)
    windows = {"llama": 1, "gemma2": 2, "exaone4": 2}
    assert len(set(map(id, seen))) == windows[case], "one block mask a window"


def _flash(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **keywords: Any) -> Any:
    """flash-attn as transformers calls it, on a CPU: from the cumulative lengths alone."""
    assert attention_mask is None
    edges, longest = keywords["cu_seq_lens_q"], keywords["max_length_q"]
    assert edges.dtype == torch.int32
    assert torch.equal(edges, keywords["cu_seq_lens_k"])
    assert keywords["max_length_k"] == longest >= int(edges.diff().max())
    B, _, length, _ = query.shape
    starts = edges[:-1].long()[torch.bucketize(torch.arange(B * length), edges[1:].long(), right=True)]
    first_key = starts.view(B, length) - torch.arange(B).unsqueeze(1) * length
    if (window := keywords.get("sliding_window")) is not None:
        first_key = first_key.maximum(torch.arange(length) - window + 1)
    scale, softcap = keywords["scaling"], keywords.get("softcap")
    return blockwise_attention(query, key, value, first_key, scale, softcap, keywords.get("s_aux")), None


@pytest.mark.parametrize("case", all_cases("smollm3"))
def test_flash_attn_is_called_with_the_lengths_of_documents_and_no_mask(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", _flash)
    eager, ours = _model(case, "eager"), _model(case, "eager")
    decoder(ours).config._attn_implementation_internal = "flash_attention_2"
    assert ours.config._attn_implementation == "flash_attention_2"
    for positions in (None, DOCUMENTS):
        results = [_hidden_and_gradients(model, positions) for model in (ours, eager)]
        windows_are_lost = case == "qwen2_moe"  # whose layers tell flash-attn none: `auto` does not choose it
        assert (_error(results[0][0], results[1][0]) < 2e-6) != windows_are_lost


@pytest.mark.parametrize("documents", [False, True])
def test_flash_attn_waits_for_the_device_once_a_batch_and_for_documents_alone(documents: bool) -> None:
    config = load_config(CASES["mistral"], what="mistral")
    config._attn_implementation_internal = "flash_attention_2"
    with DeviceDouble() as double:
        positions = DOCUMENTS.to(DEVICE) if documents else None
        double.clear()
        shape = (2, S)
        attention_inputs(config, positions, shape, by_kind=False, dtype=torch.bfloat16, device=DEVICE)
        assert sum(double.counts.values()) == documents


def test_another_number_of_documents_compiles_no_call_of_flash_attn_anew() -> None:
    config = load_config(CASES["mistral"], what="mistral")
    config._attn_implementation_internal = "flash_attention_2"
    counter = CompileCounterWithBackend("eager")

    def layer(x: Tensor, *, cu_seq_lens_q: Tensor, max_length_q: int, **_: Any) -> Tensor:
        return x * max_length_q + cu_seq_lens_q.diff().float().mean()

    compiled = torch.compile(layer, backend=counter, dynamic=False, fullgraph=True)
    for documents in (2, 3, 5, 8, 10):
        positions = (torch.arange(S) % (S // documents)).expand(2, S)
        inputs = attention_inputs(
            config, positions, (2, S), by_kind=False, dtype=torch.float32, device=torch.device("cpu")
        )
        compiled(torch.ones(4), **inputs)
    assert counter.frame_count == 1


def _flash_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float = 1.0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """flash_attn_varlen_func of tokens [T, H, D], on a CPU."""
    assert causal
    place = torch.arange(len(query))
    first_key = cu_seqlens_q.long()[torch.bucketize(place, cu_seqlens_q[1:].long(), right=True)]
    if window_size[0] >= 0:
        first_key = first_key.maximum(place - window_size[0])
    query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
    out: Tensor = blockwise_attention(query, key, value, first_key.unsqueeze(0), softmax_scale, softcap or None)
    return out[0]


def test_layers_with_flash_attn_are_compiled_whole_and_once_for_all_layers_of_a_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By transformers' own call of the kernel, its windows and its reading of the lengths included."""
    arguments = flash_utils._lazy_define_process_function(_flash_kernel)
    functions = {"_flash_fn": _flash_kernel, "_flash_varlen_fn": _flash_kernel, "_flash_with_kvcache_fn": _flash_kernel}
    ready = {"_process_flash_kwargs_fn": arguments, "_process_with_kvcache_kwargs_fn": arguments, **functions}
    for name, value in {**ready, "_loaded_implementation": "flash_attention_2"}.items():
        monkeypatch.setattr(flash_utils, name, value, raising=False)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_attention_forward)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **keywords: compiled(function, backend=counter, **keywords))
    torch._dynamo.reset()
    truth, ours = (decoder(_model("gemma2", "flex", torch.bfloat16)).requires_grad_(False) for _ in range(2))
    ours.config._attn_implementation_internal = "flash_attention_2"
    compile_layers(ours)
    graphs = []
    lengths = (90, 50, 30, 20)
    for positions in ((torch.arange(S) % length).expand(2, S) for length in lengths):
        mine, theirs = (
            inner(**forward_inputs(inner, _tokens(), positions)).last_hidden_state for inner in (ours, truth)
        )
        assert _error(mine.float(), theirs.float()) < 1e-2
        graphs.append(counter.frame_count)
    assert graphs[0] == 2 < len(ours.layers), "a graph for sliding layers, and one for full ones"
    assert graphs[-1] == graphs[1], "other numbers of documents compile nothing more"


@pytest.mark.parametrize("case", ["llama", "gemma2", "exaone4"])
def test_layers_with_our_attention_are_compiled_whole_and_once_for_all_batches(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced to the graph and run as it is: fullgraph refuses a graph break, and documents compile nothing anew."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **keywords: compiled(function, backend=counter, **keywords))
    torch._dynamo.reset()
    eager, ours = _model(case, "eager"), _model(case, "flex")
    compile_layers(decoder(ours))
    graphs = []
    for positions in (DOCUMENTS, DOCUMENTS.flip(0), (torch.arange(S) % 50).expand(2, S)):
        for mine, theirs in zip(*(_hidden_and_gradients(model, positions) for model in (ours, eager)), strict=True):
            assert _error(mine, theirs) < 2e-6
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]
    assert graphs[0] <= 2, "layers of a kind are compiled once"


def test_layers_with_flex_attention_are_compiled_whole_and_once_for_all_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masks, "has_flex_kernels", lambda device: True)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **keywords: compiled(function, backend=counter, **keywords))
    torch._dynamo.reset()
    eager, ours = (decoder(_model("gemma2", attention)).requires_grad_(False) for attention in ("eager", "flex"))
    compile_layers(ours)
    graphs = []
    for positions in (DOCUMENTS, DOCUMENTS.flip(0), (torch.arange(S) % 50).expand(2, S)):
        mine, theirs = (
            inner(**forward_inputs(inner, _tokens(), positions)).last_hidden_state for inner in (ours, eager)
        )
        assert _error(mine, theirs) < 2e-6
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]


def test_the_kernel_of_layers_that_are_not_compiled_is_compiled_once_for_a_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masks, "has_flex_kernels", lambda device: True)
    counter = CompileCounterWithBackend("eager")
    kernel = torch.compile(torch_flex.flex_attention, backend=counter, dynamic=False, fullgraph=True)
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: kernel)
    torch._dynamo.reset()
    inner = decoder(_model("gemma2", "flex")).requires_grad_(False)
    for positions in (DOCUMENTS, DOCUMENTS.flip(0), (torch.arange(S) % 50).expand(2, S)):
        inner(**forward_inputs(inner, _tokens(), positions))
    assert counter.frame_count <= 2


def test_a_decoder_is_built_with_the_attention_that_is_named() -> None:
    config = load_config(CASES["gemma2"], what="gemma2")
    names = {name: build_decoder(config, layers=range(1), attention=name) for name in ("eager", "flex")}
    assert {name: model.config._attn_implementation for name, model in names.items()} == {
        "eager": "eager",
        "flex": FLEX,
    }
