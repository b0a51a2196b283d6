"""Ranks and sizes from a launcher's environment; the size of a vocab group."""

import resource

import pytest

from megadistill.distributed.launch import Launch, raise_open_files, vocab_group_size
from megadistill.errors import UserError

EVERY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
COMMON = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER}
# As srun 22.05 sets them for a rank of the second component of a heterogeneous job, of nodes with 2, 2 and 4 tasks.
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),4",
    **MASTER,
}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*EVERY, *STEP}:
        monkeypatch.delenv(name, raising=False)


def _launched(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Launch:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Launch.from_environment()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        (MASTER, (0, 1, 0, 1)),
        ({**COMMON, "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),
        ({**COMMON, "LOCAL_SIZE": "2"}, (5, 8, 1, 2)),
        ({**COMMON, "LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, (5, 8, 1, 4)),
        (COMMON, (5, 8, 1, 8)),
        (STEP, (5, 8, 1, 4)),
        ({**STEP, "SLURM_NODEID": "1"}, (5, 8, 1, 2)),
        ({**STEP, **COMMON, "RANK": "3", "LOCAL_WORLD_SIZE": "2"}, (3, 8, 1, 2)),
        ({**STEP, "SLURM_STEP_ID": str(0xFFFFFFFA)}, (0, 1, 0, 1)),
        ({**STEP, "SLURM_STEP_ID": ""}, (0, 1, 0, 1)),
    ],
    ids=[
        "plain python",
        "an address alone",
        "torchrun",
        "deepspeed",
        "both",
        "no size of a node",
        "srun",
        "srun, a node with fewer",
        "torchrun under srun",
        "salloc's shell",
        "a batch script",
    ],
)
def test_each_launcher_is_understood(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int, int, int]
) -> None:
    launch = _launched(monkeypatch, **variables)
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == expected


@pytest.mark.parametrize("missing", COMMON)
def test_half_an_environment_is_refused_with_the_missing_names(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    with pytest.raises(UserError, match=f"but not {missing}: start this with torchrun or deepspeed, or unset"):
        _launched(monkeypatch, **{name: value for name, value in COMMON.items() if name != missing})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_word_in_place_of_a_number_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(UserError, match=r"whole numbers.*'two'"):
        _launched(monkeypatch, **{**COMMON, name: "two"})


def test_one_process_in_an_allocation_of_many_tasks_is_pointed_to_srun(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _launched(monkeypatch, SLURM_NTASKS="8", SLURM_PROCID="0")
    assert "one process in a Slurm allocation of 8 tasks: to start one process a task" in caplog.text
    caplog.clear()
    _launched(monkeypatch, SLURM_NTASKS="1")
    assert caplog.text == ""


def test_a_step_without_a_meeting_point_is_refused_unless_it_is_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name in MASTER:
        del alone[name]
    assert _launched(monkeypatch, **alone).world == 1
    with pytest.raises(UserError, match=r"8 tasks, and .* does not set MASTER_ADDR and MASTER_PORT: export"):
        _launched(monkeypatch, SLURM_NTASKS="8")


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"])
def test_a_step_without_usable_ranks_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(UserError, match=r"step of a Slurm job, .*'two'.* start it with srun"):
        _launched(monkeypatch, **{**STEP, name: "two"})


def _launch(world: int, local_world: int) -> Launch:
    return Launch(rank=0, world=world, local_rank=0, local_world=local_world)


@pytest.mark.parametrize(
    ("configured", "world", "local_world", "size"),
    [(None, 8, 4, 4), (None, 1, 1, 1), (2, 8, 4, 2), (8, 8, 4, 8), (1, 6, 3, 1)],
)
def test_a_vocab_group_is_a_node_unless_configured_otherwise(
    configured: int | None, world: int, local_world: int, size: int
) -> None:
    assert vocab_group_size(configured, _launch(world, local_world)) == size


@pytest.mark.parametrize(
    ("configured", "world", "local_world", "error"),
    [
        (3, 8, 4, r"distributed\.vocab_group is 3, .* 8 processes: .* one of 1, 2, 4, 8;"),
        (2, 1, 1, r"distributed\.vocab_group is 2, .* 1 process: start it on a multiple of 2 ranks .*vocab_group=1$"),
        (16, 8, 4, r"distributed\.vocab_group is 16, .* 8 processes"),
        (None, 6, 4, r"distributed\.vocab_group is 4, .* 6 processes: .* one of 1, 2, 3, 6;"),
    ],
)
def test_a_vocab_group_that_does_not_divide_is_refused_with_those_that_do(
    configured: int | None, world: int, local_world: int, error: str
) -> None:
    with pytest.raises(UserError, match=error):
        vocab_group_size(configured, _launch(world, local_world))


@pytest.mark.parametrize(
    ("configured", "sequence", "world", "local_world", "size"),
    [(None, 2, 8, 8, 4), (None, 8, 8, 8, 1), (None, 16, 32, 8, 1), (None, 3, 24, 8, 8), (2, 4, 8, 8, 2)],
)
def test_ranks_that_share_sequences_are_of_one_node_by_default(
    configured: int | None, sequence: int, world: int, local_world: int, size: int
) -> None:
    assert vocab_group_size(configured, _launch(world, local_world), sequence=sequence) == size


def test_a_vocab_group_too_large_for_shared_sequences_is_refused_with_those_that_fit() -> None:
    with pytest.raises(UserError, match=r"vocab_group 4 times distributed\.sequence 4 is 16, .*vocab_group to 1 or 2"):
        vocab_group_size(4, _launch(8, 8), sequence=4)
    with pytest.raises(UserError, match=r"vocab_group to 1, and distributed\.sequence to a number that divides them"):
        vocab_group_size(1, _launch(8, 8), sequence=3)


def test_the_limit_on_open_files_is_raised_to_the_hard_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        assert raise_open_files() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("world", "per_node", "files"), [(8, 8, 529), (4096, 8, 9216), (10, 4, 535)])
def test_open_files_of_the_process_with_the_store(world: int, per_node: int, files: int) -> None:
    assert Launch(0, world, 0, per_node).open_files == files
