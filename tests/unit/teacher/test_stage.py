"""Stages against the unsplit transformers model, in one process; what a stage reads; the head's rows."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megadistill.distributed.vocab import VocabSlice
from megadistill.errors import UserError
from megadistill.models.families import EMBEDDING, HEAD, load_config, stored_buffers
from megadistill.models.hf_folder import SafetensorsFolder
from megadistill.models.partition import stage_layers, whole_name
from megadistill.teacher.stage import TeacherStage, head_rows, unknown_bias
from tests.unit.models.cases import CASES, QUICK, SIZES, VOCAB, all_cases, final_hidden, saved_model

SHARD_SIZES = {"one file": "5GB", "many files": "30KB"}
CPU = torch.device("cpu")


def _load(folder: Path, stage: int, stages: int, dtype: torch.dtype = torch.float32) -> TeacherStage:
    return TeacherStage.load(folder, stage=stage, stages=stages, dtype=dtype, device=CPU)


@pytest.mark.parametrize("files", SHARD_SIZES)
@pytest.mark.parametrize("case", all_cases(*QUICK))
def test_the_chain_of_stages_is_the_unsplit_model(case: str, files: str, tmp_path: Path) -> None:
    model = saved_model(case, tmp_path, shard_size=SHARD_SIZES[files])
    tokens_BS = torch.randint(VOCAB, (2, 20))
    truth_BSE = final_hidden(model, tokens_BS)
    for stages in (1, 2, 3, 5):
        x = tokens_BS
        for stage in (_load(tmp_path, place, stages) for place in range(stages)):
            x = stage(x)
            assert x.shape == stage.hidden_shape(2, 20)
        assert torch.equal(x, truth_BSE), f"{stages} stages"


@pytest.mark.parametrize("case", all_cases())
def test_bfloat16_stages_are_what_transformers_loads_in_bfloat16(case: str, tmp_path: Path) -> None:
    model = saved_model(case, tmp_path)
    attention = model.config._attn_implementation
    theirs = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=attention).eval()
    tokens_BS = torch.randint(VOCAB, (2, 20))
    x = tokens_BS
    for place in range(2):
        stage = _load(tmp_path, place, 2, dtype=torch.bfloat16)
        layers = stage_layers(theirs.config, 2)[place]
        wide = {name for name, parameter in stage.decoder.named_parameters() if parameter.dtype == torch.float32}
        routers = {name for name, _ in stage.decoder.named_parameters() if ".mlp.gate." in name}
        assert wide == (routers if case == "ernie4_5_moe" else set())
        scales = stored_buffers(stage.decoder) if case in ("apertus", "gemma4") else {}
        for name, buffer in stage.decoder.named_buffers():
            if name in scales:
                assert buffer.dtype == torch.bfloat16
                continue
            assert buffer.dtype == torch.float32, "what stays in float32: rotary frequencies, Gemma's factor, biases"
            whole = whole_name(f"model.{name}", layers).removeprefix("model.")
            assert torch.equal(buffer, model.base_model.get_buffer(whole))
        x = stage(x)
    assert torch.equal(x, final_hidden(theirs, tokens_BS))


@pytest.mark.parametrize("width", [640, 1152, 2304, 2560, 3584, 3840, 4608, 5376])
def test_the_factor_of_gemmas_embedding_is_rounded_as_transformers_rounds_it(width: int, tmp_path: Path) -> None:
    """The widths of published Gemma 2 and 3: in bfloat16, the square root of some is rounded up, of some down."""
    small = {"num_hidden_layers": 1, "intermediate_size": 8, "head_dim": 2, "num_attention_heads": 1}
    config = load_config({**CASES["gemma2"], **small, "num_key_value_heads": 1, "hidden_size": width}, what="test")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        stage = _load(tmp_path, 0, 1, dtype=dtype)
        tokens = torch.arange(VOCAB)
        assert torch.equal(stage.decoder.embed_tokens(tokens), theirs.model.embed_tokens(tokens))


@pytest.mark.parametrize("case", all_cases(*QUICK))
def test_a_packed_document_does_not_depend_on_its_neighbours(case: str, tmp_path: Path) -> None:
    """Every family's masks, windows and rotary embeddings follow the positions, on every stage."""
    model = saved_model(case, tmp_path)
    tokens_BS = torch.randint(VOCAB, (2, 20))
    bounds = [[0, 9, 10, 20], [0, 13, 20, 20]]  # longer than the window of 6, and of one token
    positions_BS = torch.tensor([[*range(9), 0, *range(10)], [*range(13), *range(7)]])
    x = tokens_BS
    for place in range(3):
        x = _load(tmp_path, place, 3)(x, positions_BS)
    for row, ends in enumerate(bounds):
        for start, stop in itertools.pairwise(ends):
            if start < stop:
                alone_1SE = final_hidden(model, tokens_BS[row : row + 1, start:stop])
                torch.testing.assert_close(x[row, start:stop], alone_1SE[0], rtol=1e-4, atol=2e-5)


def test_a_stage_is_whole_where_transformers_partitions_new_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live HfDeepSpeedConfig (trap 6 of the rank tests) answers yes to this question in `from_config`."""
    truth = final_hidden(saved_model("llama", tmp_path), torch.arange(8).unsqueeze(0))
    monkeypatch.setattr("transformers.modeling_utils.is_deepspeed_zero3_enabled", lambda: True)
    stage = _load(tmp_path, 0, 1)
    assert torch.equal(stage(torch.arange(8).unsqueeze(0)), truth)


def test_a_stage_is_frozen(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    stage = _load(tmp_path, 0, 2)
    assert not stage.training
    assert not any(parameter.requires_grad for parameter in stage.parameters())
    assert not stage(torch.zeros(1, 4, dtype=torch.int64)).requires_grad


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3", "mixtral", "qwen3_moe"])
def test_a_stage_reads_and_holds_its_own_tensors_alone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_model(case, tmp_path)
    stored = SafetensorsFolder(tmp_path)
    read: list[str] = []
    tensors = SafetensorsFolder.tensors

    def noted(folder: SafetensorsFolder, names: Sequence[str]) -> Iterator[Tensor]:
        read.extend(names)
        return tensors(folder, names)

    monkeypatch.setattr(SafetensorsFolder, "tensors", noted)
    reads = []
    for place in range(3):
        stage = _load(tmp_path, place, 3)
        held = sum(parameter.numel() for parameter in stage.parameters())
        assert held == sum(stored.shape(name).numel() for name in read)
        reads.append(read.copy())
        read.clear()
    expected = [name for name in stored.names if name != HEAD]
    assert sorted(name for names in reads for name in names) == expected, "each tensor once, and no head"
    assert EMBEDDING in reads[0]
    middle = stage_layers(load_config(tmp_path, what="test"), 3)[1]
    assert {int(name.split(".")[2]) for name in reads[1]} == set(middle)
    assert "model.norm.weight" in reads[2]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("model_type", "files", "dtype"),
    [("llama", "1GB", "float32"), ("llama", "20MB", "bfloat16"), ("mixtral", "1GB", "bfloat16")],
)
def test_loading_a_stage_peaks_at_the_stage_and_one_tensor(
    model_type: str, files: str, dtype: str, tmp_path: Path
) -> None:
    """In a fresh process; files mapped into memory count as well. The whole model is four stages."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_local_experts": 4}
    mapping = {**SIZES, "model_type": model_type, **sizes, "vocab_size": 1000, "tie_word_embeddings": True}
    if model_type == "llama":
        del mapping["num_local_experts"]
        mapping |= {"hidden_size": 1024, "intermediate_size": 3072}
    model = AutoModelForCausalLM.from_config(load_config(mapping, what="test"))
    model.save_pretrained(tmp_path, max_shard_size=files)
    largest = max(parameter.numel() for parameter in model.parameters()) * 4
    stage_bytes, peak = _loaded_elsewhere(tmp_path, dtype)
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert whole > 300e6
    assert stage_bytes == pytest.approx(whole / 4 * (1 if dtype == "float32" else 1 / 2), rel=0.05)
    assert peak > 0.9 * stage_bytes, "what is measured"
    assert peak < stage_bytes + largest + 12e6


def _loaded_elsewhere(folder: Path, dtype: str) -> tuple[int, int]:
    """Bytes of the third of four stages, and by how much the peak of a process's memory rose while it was loaded."""
    code = """if True:
        import sys
        from pathlib import Path
        import torch
        from megadistill.teacher.stage import TeacherStage

        def load(stages, stage):
            return TeacherStage.load(folder, stage=stage, stages=stages, dtype=dtype, device=torch.device("cpu"))

        def kilobytes(key):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

        folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
        load(8, 0)  # one layer, so that what is imported and compiled on first use is there
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is there now
        before = kilobytes("VmRSS")
        stage = load(4, 2)
        held = sum(parameter.nbytes for parameter in stage.parameters())
        print(held, 1024 * (kilobytes("VmHWM") - before))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), dtype],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        # What the first load has freed would be taken again, and not be measured.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    held, peak = done.stdout.split()[-2:]
    return int(held), int(peak)


def test_a_stage_needs_no_file_but_its_own(tmp_path: Path) -> None:
    saved_model("llama", tmp_path, shard_size="1KB")  # a file for each tensor
    whole = SafetensorsFolder(tmp_path)
    keep = {whole._files[name] for name in whole.names if name.startswith(("model.layers.1.", "model.layers.2."))}
    truth = _load(tmp_path, 1, 3)
    for path in tmp_path.glob("*.safetensors"):
        if path.name not in keep:
            path.unlink()
    hidden_BSE = torch.randn(truth.hidden_shape(2, 7))
    assert torch.equal(_load(tmp_path, 1, 3)(hidden_BSE), truth(hidden_BSE))
    with pytest.raises(UserError, match="does not exist"):
        _load(tmp_path, 0, 3)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path)
    with pytest.raises(UserError, match="5 layers cannot be cut into 6 stages"):
        _load(tmp_path, 0, 6)
    model.config.intermediate_size = 128
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"proj\.weight in .* is \[.*\], but its config\.json says"):
        _load(tmp_path, 0, 1)
    model.config.intermediate_size, model.config.num_hidden_layers = 96, 6
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no tensor 'model\.layers\.5\."):
        _load(tmp_path, 0, 1)


@pytest.mark.parametrize("files", SHARD_SIZES)
@pytest.mark.parametrize("case", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    "ranges", [((0, 256),), ((0, 64), (128, 192)), ((64, 128), (192, 256)), ((250, 256),), ((3, 3),), ()]
)
def test_head_rows_are_the_slice_and_padding_is_zero(
    case: str, files: str, ranges: tuple[tuple[int, int], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_model(case, tmp_path, shard_size=SHARD_SIZES[files])
    monkeypatch.delattr(SafetensorsFolder, "tensors")  # rows alone are read
    vocab = VocabSlice(ranges=ranges, size=VOCAB)
    padded = torch.nn.functional.pad(model.lm_head.weight.detach(), (0, 0, 0, 6))
    rows = head_rows(tmp_path, vocab, dtype=torch.float32, device=CPU)
    assert torch.equal(rows, padded[vocab.global_ids().long()])


def test_a_larger_vocabulary_of_the_teacher_is_cut_and_a_smaller_one_refused(tmp_path: Path) -> None:
    model = saved_model("llama", tmp_path)

    def rows(size: int) -> Any:
        return head_rows(tmp_path, VocabSlice.contiguous(0, 256, size), dtype=torch.float32, device=CPU)

    first = rows(240)
    assert torch.equal(first[:240], model.lm_head.weight[:240])
    assert not first[240:].any()
    with pytest.raises(UserError, match="250 vocabulary rows, the student's tokenizer has 251 ids"):
        rows(251)


@pytest.mark.parametrize("ranges", [((0, 256),), ((0, 64), (128, 192)), ((64, 128), (192, 256)), ((250, 256),), ()])
def test_head_rows_follow_a_map_of_the_vocabulary(ranges: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    """Stretches of consecutive ids, ids alone, the last row, and ids that the teacher does not have."""
    model = saved_model("llama", tmp_path)
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))[:240]
    ids[3:100] = torch.arange(0, 97)
    ids[100:200] = -1
    ids[200:240] = torch.arange(VOCAB - 40, VOCAB).flip(0)
    vocab = VocabSlice(ranges=ranges, size=240)
    whole = torch.zeros(256, 64)
    whole[:240][ids >= 0] = model.lm_head.weight.detach()[ids[ids >= 0]]
    rows = head_rows(tmp_path, vocab, dtype=torch.float32, device=CPU, ids=ids)
    assert torch.equal(rows, whole[vocab.global_ids().long()])
    bias = unknown_bias(vocab, ids, device=CPU)
    assert bias is not None
    unknown = torch.nn.functional.pad(ids < 0, (0, 16))[vocab.global_ids().long()]
    assert torch.equal(bias == -torch.inf, unknown)
    assert not bias[~unknown].any()


def test_a_map_without_gaps_needs_no_bias_and_one_past_the_teacher_is_refused(tmp_path: Path) -> None:
    saved_model("llama", tmp_path)
    vocab = VocabSlice.contiguous(0, 4, 3)
    assert unknown_bias(vocab, torch.tensor([5, 0, 3]), device=CPU) is None
    with pytest.raises(UserError, match=r"vocab_map: holds id 250, .* has 250 vocabulary rows"):
        head_rows(tmp_path, vocab, dtype=torch.float32, device=CPU, ids=torch.tensor([5, 250, -1]))
