"""The shell functions of the sbatch files that need no Slurm."""

import sys
from pathlib import Path

from tests.paths import ROOT
from tests.slurm_double import shell, usable_nodes


def test_a_rank_that_aborts_is_no_reason_to_hold_the_run(tmp_path: Path) -> None:
    """A stand-in for `std::terminate`, with which torch's NCCL watchdog ends a process."""
    abort = 'bash slurm/rank.sh "$PYTHON" -c "import os, sys; print(\'lost\', file=sys.stderr, flush=True); os.abort()"'
    ended = 'bash slurm/rank.sh "$PYTHON" -c "raise SystemExit(3)"'
    script = f"SLURM_PROCID=1 {abort}; SLURM_PROCID=2 {ended}; . slurm/lib.sh; log_ends; first_rank_with 2 4 || echo ok"
    output = shell(script, tmp_path, PYTHON=sys.executable).stdout
    assert (tmp_path / "n1.codes").read_text() == "1 134\n2 3\n"
    assert "rank 2 exit code 3" in output
    assert "rank 1 exit code 134: lost" in output
    assert "exit code 134 is SIGABRT, as torch's NCCL watchdog ends a rank that has lost another one" in output
    assert output.endswith("ok\n"), "such a rank does not hold the run"


def test_a_nodes_file_of_standard_error_has_the_rank_of_each_line(tmp_path: Path) -> None:
    """One that is killed, and leaves a process behind that holds its standard error, loses no line."""
    first = "SLURM_PROCID=0 bash slurm/rank.sh bash -c 'echo one >&2; printf two >&2; exit 2'"
    second = "SLURM_PROCID=11 bash slurm/rank.sh bash -c 'sleep 1 & echo three >&2; kill -9 $$'"
    last = "echo none >$LOGS/n2.err; echo 4 0 >$LOGS/n2.codes; . slurm/lib.sh"
    calls = "first_rank_with 137; first_rank_with 2 4; first_rank_with 3 || echo nobody; exit_code_of 0"
    output = shell(f"{first}; {second}; {last}; {calls}", tmp_path).stdout
    assert (tmp_path / "n1.err").read_text().splitlines()[:3] == ["0: one", "0: two", "11: three"]
    assert output.splitlines() == ["11 exit code 137: three", "0 exit code 2: two", "nobody", "2"]


def test_all_nodes_are_checked_by_one_step(tmp_path: Path) -> None:
    answers = {"n1": "usable", "n2": "unusable: ✗ disk: cannot write to /run", "n3": "down", "n4": "usable"}
    nodes, log, steps = usable_nodes(tmp_path, answers, 2)
    assert nodes == ["n1", "n4"]
    assert steps == 1
    assert "n2 is not used: ✗ disk: cannot write to /run" in log
    assert "n3 is not used: it is down*" in log


def test_the_first_nodes_are_taken_and_the_others_not_awaited(tmp_path: Path) -> None:
    nodes, log, steps = usable_nodes(tmp_path, {"n1": "usable", "n2": "silent", "n3": "usable", "n4": "usable"}, 2)
    assert (nodes, log, steps) == (["n1", "n3"], "", 1)


def test_a_node_that_srun_cannot_reach_is_left_out_of_a_second_step(tmp_path: Path) -> None:
    nodes, log, steps = usable_nodes(tmp_path, {"n1": "usable", "n2": "lost", "n3": "usable"}, 2)
    assert (nodes, steps) == (["n1", "n3"], 2)
    assert "n2 is not used: no route" in log


def test_a_node_that_does_not_answer_in_time_is_not_used(tmp_path: Path) -> None:
    nodes, log, steps = usable_nodes(tmp_path, {"n1": "usable", "n2": "silent"}, 2, seconds=1)
    assert (nodes, steps) == (["n1"], 1)
    assert "n2 is not used: no answer within 1 s" in log


def test_a_job_raises_its_limit_on_open_files(tmp_path: Path) -> None:
    line = next(line for line in (ROOT / "slurm/env.sh.example").read_text().splitlines() if line.startswith("ulimit"))
    soft, hard = shell(f"ulimit -Sn 64; {line}\nulimit -Sn; ulimit -Hn", tmp_path).stdout.split()
    assert soft == hard


def test_a_job_without_a_packed_environment_needs_no_number_of_nodes(tmp_path: Path) -> None:
    """A job of several groups of nodes has one number a group."""
    assert shell(". slurm/lib.sh; unset SLURM_JOB_NUM_NODES; send_environment; echo sent", tmp_path).stdout == "sent\n"


def test_a_packed_environment_is_sent_once_and_unpacked_where_it_is_new(tmp_path: Path) -> None:
    """A double of sbcast copies the archive; a node's check then starts the program of the unpacked folder."""
    (tmp_path / "packed").mkdir()
    program = tmp_path / "packed/program"
    program.write_text("#!/bin/bash\necho $0 runs >>$LOGS/started\n")
    program.chmod(0o755)
    local = tmp_path / "local/environment"
    slurm = 'srun() { shift 7; "$@"; }; sbcast() { cp --preserve "$3" "$4"; }'
    commands = f"{slurm}; tar -C {tmp_path}/packed -cf $A ."
    check = "send_environment; bash slurm/check-node.sh"
    variables = {"A": str(tmp_path / "packed.tar"), "FOLDER": str(tmp_path), "SLURM_JOB_NUM_NODES": "1"}
    env = f"NODE_CHECK=({local}/program) ENVIRONMENT_TAR=$A LOCAL_ENVIRONMENT={local}\n"
    script = f"echo '{env}' >$MEGADISTILL_ENV; . slurm/lib.sh; {commands}"
    assert shell(f"{script}; {check}", tmp_path, **variables).stdout == "usable n1\n"
    (local / "seen").touch()
    assert shell(f"{script.replace('tar -C', ': tar')}; {check}", tmp_path, **variables).stdout == "usable n1\n"
    assert (local / "seen").exists(), "the archive is the one that was unpacked"
    (tmp_path / "started").unlink()
    lost = shell(f"{script}; rm {local}.tar; bash slurm/check-node.sh", tmp_path, **variables).stdout
    assert lost == f"unusable n1: cannot unpack {local}.tar\n"
    assert not (tmp_path / "started").exists()
