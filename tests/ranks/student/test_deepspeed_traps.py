"""DeepSpeed's silent traps: each gives a run that looks right and is not. One test each, named by what goes wrong."""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from megadistill.distributed.topology import Topology
from megadistill.errors import UserError
from megadistill.models.families import build_causal_lm
from megadistill.models.initial_weights import initial_tensor
from megadistill.student.deepspeed_config import build_engine_config, load_deepspeed_config
from megadistill.teacher.stage import TeacherStage
from tests.paths import DS_CONFIGS
from tests.ranks.harness import run_ranks
from tests.ranks.student_cases import SEED, VOCAB, Case, build, config_of, run_steps, three_steps, train_section


def _initial(topology: Topology, case: Case) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    student = build(case, topology)
    rotary: Any = student._model.get_submodule("model.rotary_emb")
    return student.full_parameters(), rotary.inv_freq.clone(), student._engine.module.model.rotary_emb.inv_freq.clone()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_initialisation_and_rope_survive_zero_init(precision: str) -> None:
    """Trap 1: inside zero.Init weights come out with std 1.0 (or uninitialised) and RoPE's frequencies in bfloat16."""
    case = Case(precision=precision)
    config = config_of(case)
    torch.manual_seed(0)  # transformers draws the values that the spread is compared with
    plain = build_causal_lm(config, vocab_size=VOCAB, dtype=torch.float32)
    frequencies: Any = plain.base_model.rotary_emb.inv_freq
    per_world = [run_ranks(world, _initial, case)[0] for world in (1, 2)]
    for parameters, *rotary in per_world:
        for buffer in rotary:
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, frequencies)
        for name, parameter in plain.named_parameters():
            values = parameters[name][: parameter.shape[0]]
            expected = initial_tensor(name, parameter.shape, std=config.initializer_range, seed=SEED)
            assert torch.equal(values, expected.to(getattr(torch, precision)).float()), name
            if parameter.ndim == 2:
                assert values.std().item() == pytest.approx(parameter.std().item(), rel=0.05), name
            else:
                assert torch.equal(values, parameter), name
    for name, parameter in per_world[0][0].items():
        assert torch.equal(parameter, per_world[1][0][name]), f"{name} depends on the world size"


def _hyperparameters_after_a_resume(topology: Topology) -> list[dict[str, Any]]:
    case = Case()
    first = build(case, topology)
    run_steps(case, first, topology, range(1))
    state = first.state.snapshot()
    second = build(case, topology)

    def read(key: str, start: int, stop: int) -> Tensor:
        return state[key]  # the same rank of the same world reads back its own piece

    second.state.load(read)
    run_steps(case, second, topology, range(1, 2))
    return [{k: v for k, v in group.items() if k != "params"} for group in second._optimizer.param_groups]


def test_each_groups_hyperparameters_survive_a_resume() -> None:
    """Trap 2: DeepSpeed's universal load gives every optimizer group the first group's weight decay."""
    matrices, vectors = run_ranks(2, _hyperparameters_after_a_resume)[0]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert matrices["betas"] == vectors["betas"] == (0.9, 0.95)
    assert matrices["lr"] == vectors["lr"] > 0


def test_the_heads_gradient_does_not_grow_with_accumulation() -> None:
    """Trap 3: DeepSpeed's tiled logits loss makes the head's gradient as many times too large as there are micros."""
    once = run_ranks(2, three_steps, Case(accumulation=1))[0]
    twice = run_ranks(2, three_steps, Case(accumulation=2))[0]
    for name, gradient in once.gradients[0].items():
        assert torch.allclose(twice.gradients[0][name], gradient, rtol=1e-4, atol=1e-7), name


def _accumulation_dtypes(topology: Topology) -> tuple[set[torch.dtype], torch.dtype | None, torch.dtype]:
    """Dtypes of the sums over ranks, of the accumulated gradients, and of the head's gradient."""
    case = Case(precision="bfloat16", accumulation=2)
    student = build(case, topology)
    reduced, all_reduce = set(), deepspeed.comm.all_reduce

    def recording(source: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.add(source.dtype)
        return all_reduce(source, *args, **kwargs)

    deepspeed.comm.all_reduce = recording
    run_steps(case, student, topology, range(1))
    deepspeed.comm.all_reduce = all_reduce
    zero = student._engine.optimizer
    assert {gradient.dtype for group in zero.averaged_gradients.values() if group for gradient in group} <= {
        torch.float32
    }
    return reduced, student._engine.get_data_types()[1], student.head.gradient().memory.dtype


def test_bfloat16_gradients_accumulate_in_float32() -> None:
    """Trap 4: under bf16 DeepSpeed sums the gradients of ranks and of micro-batches in bf16 unless told otherwise."""
    reduced, accumulated, head = run_ranks(2, _accumulation_dtypes)[0]
    assert reduced == {torch.float32}
    assert accumulated == torch.float32
    assert head == torch.float32
    deepspeed_config = load_deepspeed_config(DS_CONFIGS / "zero3.json")
    build_engine_config(deepspeed_config, train_section(Case(), 1), accumulation=1, ranks=1)
    with pytest.raises(UserError, match="grad_accum_dtype must be 'fp32'"):
        build_engine_config({**deepspeed_config, "data_types": {}}, train_section(Case(), 1), accumulation=1, ranks=1)


def test_bfloat16_training_stays_near_the_float32_truth() -> None:
    truth = run_ranks(2, three_steps, Case(accumulation=2))[0]
    result = run_ranks(2, three_steps, Case(accumulation=2, precision="bfloat16"))[0]
    for step in range(3):
        assert result.steps[step]["loss"] == pytest.approx(truth.steps[step]["loss"], rel=0.02)
        assert result.steps[step]["grad_norm"] == pytest.approx(truth.steps[step]["grad_norm"], rel=0.05)
    for name, gradient in truth.gradients[0].items():
        error = (result.gradients[0][name] - gradient).norm() / gradient.norm()
        assert error < 0.05, f"{name} is off by {error:.1%}"


def _names(topology: Topology, case: Case) -> list[str]:
    student = build(case, topology)
    run_steps(case, student, topology, range(1))
    return sorted(key.removeprefix("master/") for key in student.state.snapshot() if key.startswith("master/"))


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_hold_hugging_faces_names(tied: bool) -> None:
    """Trap 5: a wrapper module prefixes every name of the checkpoint."""
    plain = build_causal_lm(config_of(Case(tied=tied)), vocab_size=VOCAB, dtype=torch.float32)
    assert run_ranks(2, _names, Case(tied=tied))[0] == sorted(name for name, _ in plain.named_parameters())


def _teacher_beside_a_student(topology: Topology, folder: str) -> tuple[bool, bool, Tensor]:
    linear = nn.functional.linear
    build(Case(), topology)
    stage = TeacherStage.load(Path(folder), stage=0, stages=1, dtype=torch.float32, device=topology.device)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        hidden = stage(tokens)
    partitioned = any(hasattr(parameter, "ds_id") for parameter in stage.parameters())
    return partitioned, nn.functional.linear is linear, hidden


def test_the_teacher_is_not_partitioned_and_linear_is_not_patched(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trap 6: a live ZeRO-3 configuration partitions the teacher too, and leaves torch's `linear` replaced."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    whole = build_causal_lm(config_of(Case()), vocab_size=VOCAB, dtype=torch.float32)
    whole.save_pretrained(folder)
    with torch.no_grad():
        true = whole.base_model(input_ids=torch.arange(12).reshape(2, 6), use_cache=False).last_hidden_state
    for partitioned, linear_is_torchs, hidden in run_ranks(2, _teacher_beside_a_student, str(folder)):
        assert not partitioned
        assert linear_is_torchs
        assert torch.allclose(hidden, true, atol=1e-6)
    deepspeed_config = load_deepspeed_config(DS_CONFIGS / "zero3.json")
    deepspeed_config["zero_optimization"].pop("memory_efficient_linear")
    with pytest.raises(UserError, match="memory_efficient_linear must be false"):
        build_engine_config(deepspeed_config, train_section(Case(), 1), accumulation=1, ranks=1)


def _whole_from_pieces(topology: Topology) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    student = build(Case(), topology)
    run_steps(Case(), student, topology, range(1))
    whole = {name: safe_get_full_fp32_param(p).clone() for name, p in student._model.named_parameters()}
    return whole, {key: value for key, value in student.state.snapshot().items() if key.startswith("master/")}


def test_what_is_saved_is_the_whole_model() -> None:
    """Trap 8: DeepSpeed's `save_16bit_model` writes nothing, and says so only in a return value nobody reads."""
    ranks = run_ranks(4, _whole_from_pieces)
    for name, parameter in ranks[0][0].items():
        pieces = torch.cat([state[f"master/{name}"] for _, state in ranks])
        assert torch.equal(pieces, parameter.flatten()), name


def _head_gathers(topology: Topology) -> int:
    student = build(Case(), topology)
    head: Any = student.head._parameter
    gathers = 0
    original = head.all_gather

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal gathers
        gathers += 1
        return original(*arguments, **named)

    head.all_gather = counted
    run_steps(Case(), student, topology, range(2))
    return gathers


def test_the_head_is_never_gathered() -> None:
    """Touching lm_head through the module would gather [V, D] on every rank, every micro-batch."""
    assert run_ranks(2, _head_gathers) == [0, 0]


def _a_step_with_an_infinite_gradient(topology: Topology, precision: str) -> tuple[float, bool, float]:
    """Its norm, whether it moved nothing, and the norm of the next step."""
    case = Case(precision=precision)
    student = build(case, topology)
    before = student.full_parameters()
    flush = student.head.flush_gradient

    def spoilt() -> None:
        student.head.gradient().memory.mul_(torch.inf)
        flush()

    student.head.flush_gradient = spoilt  # type: ignore[method-assign]
    (step,) = run_steps(case, student, topology, range(1))
    after = student.full_parameters()
    unmoved = all(torch.equal(parameter, after[name]) for name, parameter in before.items())
    student.head.flush_gradient = flush  # type: ignore[method-assign]
    (sound,) = run_steps(case, student, topology, range(1, 2))
    return step["grad_norm"], unmoved, sound["grad_norm"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_moves_nothing(precision: str) -> None:
    """Clipping by an infinite norm would turn every weight into NaN; DeepSpeed skips the step, and its norm says so."""
    for norm, unmoved, next_norm in run_ranks(2, _a_step_with_an_infinite_gradient, precision):
        assert norm == torch.inf
        assert unmoved
        assert 0 < next_norm < torch.inf, "nothing of the gradient is left in the next step's"


def _start_and_two_steps(topology: Topology) -> tuple[bool, int]:
    """Whether torch's compiler was loaded, and the processes that were started."""
    processes = []
    sys.addaudithook(lambda event, arguments: processes.append(arguments) if event == "subprocess.Popen" else None)
    run_steps(Case(accumulation=2), build(Case(accumulation=2), topology), topology, range(2))
    return "torch._inductor.compile_fx" in sys.modules, len(processes)


def test_a_start_loads_no_compiler_and_a_step_starts_no_process() -> None:
    """DeepSpeed compiles the functions of its Muon optimizer when an engine is made, a fifth of a start on a CPU, and
    counts the devices of a CPU by a process whenever it reduces gradients."""
    ((compiler, processes),) = run_ranks(1, _start_and_two_steps)
    assert not compiler or deepspeed.__version__ == "0.19.0", "which loads it when it is imported"
    assert processes <= 1
