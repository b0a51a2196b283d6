"""slurm/replicas.sbatch with doubles of Slurm's commands: a replica that ends is started again, and others go on."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.slurm_double import ReplicaJob


@pytest.fixture
def job(tmp_path: Path) -> ReplicaJob:
    return ReplicaJob(tmp_path)


def test_each_replica_is_a_step_with_a_rendezvous_of_its_own_and_they_share_a_store(job: ReplicaJob) -> None:
    code, log = job.run("finish")
    assert (code, "done" in log) == (0, True), log
    first, second = job.starts()
    assert (first.replica, first.replicas, first.nodes, first.address) == ("0", "2", "n1,n2", "n1")
    assert (second.replica, second.replicas, second.nodes, second.address) == ("1", "2", "n3,n4", "n3")
    assert first.store == second.store
    assert first.store.startswith("localhost:")
    assert len({first.port, second.port, first.store.partition(":")[2]}) == 3
    for options in (first.command, second.command):
        assert {"--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1"} <= set(options.split())
    assert "nodes for" not in log, "all replicas"
    job.await_end_of_stores(1)


def test_a_replica_that_is_killed_starts_again_on_a_spare_and_joins(job: ReplicaJob) -> None:
    """Its own nodes are the job's last choice. The one that goes on sees another start, not an end."""
    code, log = job.run("case $START in 1.2) ends 137 ;; *.3) finish ;; *) until_done ;; esac", nodes=6, spares=2)
    assert code == 0, log
    again = job.starts()[2]
    assert (again.replica, again.nodes, again.address) == ("1", "n5,n6", "n5")
    assert len({start.port for start in job.starts()}) == 3
    assert {start.store for start in job.starts()} == {again.store}
    assert "replica 1 ended on n3 n4" in log
    assert "ranks by exit code: 2 x 137" in log
    assert "the run continues without replica 1" in log
    assert log.count("start 1 on n1 n2 n3 n4") == 1
    assert "start 2" not in log


def test_a_replica_that_starts_again_does_not_take_over_the_run(job: ReplicaJob) -> None:
    job.earlier_attempt()
    code, log = job.run("case $START in 0.1) ends 3 ;; *.3) finish ;; *) until_done ;; esac")
    assert code == 0, log
    assert ["--take-over" in start.command for start in job.starts()] == [True, True, False]


def test_a_lost_node_is_not_used_again_and_its_replica_waits_for_nodes(job: ReplicaJob) -> None:
    """The node leaves the job. The neighbour on the same replica is free, and is not enough."""
    body = "case $START in 1.2) lose n4; ends 143 ;; 0.1) until_log waits; command sleep 1; finish ;; esac"
    code, log = job.run(body)
    assert code == 0, log
    assert len(job.starts()) == 2
    assert log.count("replica 1 waits for 2 free nodes") == 1, "the next look is later"


def test_a_spare_that_fails_its_check_is_not_used(job: ReplicaJob) -> None:
    body = "case $START in 1.2) breaks n3; ends 137 ;; *.3) command sleep 1; finish ;; *) until_done ;; esac"
    code, log = job.run(body, nodes=4, per_replica=1, spares=2, retry_seconds=0)
    assert code == 0, log
    assert [start.nodes for start in job.starts()] == ["n1", "n2", "n4"]
    assert "n3 is not used: broken" in log


def test_nodes_are_used_again_in_the_order_of_their_losses(job: ReplicaJob) -> None:
    """n2, n3 and n2 again are lost: n3 is the better one then."""
    body = "case $START in 1.[23]) ends 137 ;; 1.4) checkpoint 10; ends 137 ;; *.5) finish ;; *) until_done ;; esac"
    code, log = job.run(body, nodes=3, per_replica=1, spares=1)
    assert code == 0, log
    assert [start.nodes for start in job.starts()] == ["n1", "n2", "n3", "n2", "n3"]


def test_a_replica_waits_for_nodes_that_pass_their_check_and_none_of_its_starts_is_counted(job: ReplicaJob) -> None:
    """More checks than it has starts."""
    body = """case $START in
      1.2) breaks n2; ends 137 ;;
      0.1) until_log 'waits for 1 usable nodes' 4; is_mended n2; until_starts 3; finish ;;
      *) until_done ;;
    esac"""
    code, log = job.run(body, nodes=2, per_replica=1, retry_seconds=0)
    assert code == 0, log
    assert [start.nodes for start in job.starts()] == ["n1", "n2", "n2"]
    assert "waits for a checkpoint" not in log


def test_a_lost_replica_of_one_node_takes_its_own_node_where_there_is_no_other(job: ReplicaJob) -> None:
    code, log = job.run("case $START in 1.2) ends 1 ;; *.3) finish ;; *) until_done ;; esac", nodes=2, per_replica=1)
    assert code == 0, log
    assert [start.nodes for start in job.starts()] == ["n1", "n2", "n2"]


@pytest.mark.parametrize("why", [2, 4])
def test_a_replica_that_no_start_mends_is_left_out_and_the_others_finish(job: ReplicaJob, why: int) -> None:
    body = f"case $START in 1.2) ends {why} ;; *) until_log 'started again'; finish ;; esac"
    code, log = job.run(body, nodes=6, spares=2)
    assert code == 0, log
    assert len(job.starts()) == 2
    assert f"without replica 1, which is not started again: rank 0 exit code {why}: megadistill: says {why}" in log


def test_a_fault_of_all_replicas_is_held_for_a_person(job: ReplicaJob) -> None:
    code, log = job.run("until_starts 2; ends 4")
    assert code == 4, log
    assert "exit code 4: megadistill: says 4" in (job.run_folder / "HOLD").read_text(encoding="utf-8")
    assert len(job.starts()) == 2


def test_when_all_have_ended_everything_starts_again_with_a_new_store(job: ReplicaJob) -> None:
    """The attempt is one of replica 1: the run is this job's, whichever replica leads it."""
    code, log = job.run(
        "case $START in *.[12]) until_starts 2; [ $REPLICA = 0 ] || attempt; ends 3 ;; *) finish ;; esac"
    )
    assert code == 0, log
    first, second, third, fourth = job.starts()
    assert first.store == second.store != third.store == fourth.store
    assert "start 2 on n1 n2 n3 n4" in log
    assert "rank 0 exit code 3: megadistill: says 3" in log
    assert "Killed" not in log, "the end of the first store is no event"
    job.await_end_of_stores(2)


def test_a_replica_that_waits_for_nodes_does_not_start_alone_when_the_last_one_ends(job: ReplicaJob) -> None:
    """The nodes of the last one are free then."""
    body = "case $START in 1.2) lose n2; ends 137 ;; 0.1) until_log 'waits for 1 free'; ends 3 ;; *) finish ;; esac"
    code, log = job.run(body, nodes=2, per_replica=1, retry_seconds=0)
    assert code == 0, log
    assert [(start.replica, start.nodes) for start in job.starts()] == [("0", "n1"), ("1", "n2"), ("0", "n1")]
    assert "start 2 on n1" in log


ALONE = "no replica is alive"
"""What one that joins says where the others were lost meanwhile."""


def test_replicas_that_were_to_join_and_have_nobody_left_start_again_together(job: ReplicaJob) -> None:
    """Replica 0 is lost while replica 1 loads, and starts while that one does: neither is one to join."""
    assert ALONE in (ROOT / "megadistill/distributed/members.py").read_text(encoding="utf-8")
    body = f"""case $START in
      1.2) ends 137 ;;
      0.1) until_starts 3; ends 3 ;;
      1.3) until_starts 4; ends 3 '{ALONE}' ;;
      0.4) until_log 'nobody to join'; ends 3 '{ALONE}' ;;
      *) finish ;;
    esac"""
    code, log = job.run(body, nodes=2, per_replica=1)
    assert code == 0, log
    assert [start.replica for start in job.starts()] == ["0", "1", "1", "0", "0", "1"]
    assert "start 2 on n1 n2" in log


def test_a_replica_that_alone_cannot_reach_the_others_starts_again(job: ReplicaJob) -> None:
    body = f"case $START in 1.2) ends 137 ;; 1.3) ends 3 '{ALONE}' ;; *.4) finish ;; *) until_done ;; esac"
    code, log = job.run(body, nodes=2, per_replica=1)
    assert code == 0, log
    assert [start.replica for start in job.starts()] == ["0", "1", "1", "1"]


def test_nothing_joins_by_a_store_that_has_ended(job: ReplicaJob) -> None:
    body = """case $START in
      0.1) until_starts 2; end_store; ends 3 ;;
      1.2) until_log 'replica 0 ended'; command sleep 4; ends 3 ;;
      *) finish ;;
    esac"""
    code, log = job.run(body, nodes=2, per_replica=1)
    assert code == 0, log
    assert [start.replica for start in job.starts()] == ["0", "1", "0", "1"]
    assert "start 2 on n1 n2" in log


def test_a_run_that_a_person_holds_is_not_started_again(job: ReplicaJob) -> None:
    """Neither the replica that ends first, nor all of them."""
    body = """case $START in
      0.1) until_starts 2; touch "$RUN/HOLD"; ends 3 ;;
      *) until_log 'replica 0 ended'; command sleep 4; ends 3 ;;
    esac"""
    code, log = job.run(body, nodes=2, per_replica=1)
    assert code == 4, log
    assert len(job.starts()) == 2
    assert "HOLD exists" in log


def test_a_replica_that_ends_again_and_again_waits_for_a_checkpoint(job: ReplicaJob) -> None:
    body = """case $START in
      1.[234]) ends 137 ;;
      0.1) until_log 'waits for a'; checkpoint 10; until_starts 5; finish ;;
      *) until_done ;;
    esac"""
    code, log = job.run(body, retry_seconds=0)
    assert code == 0, log
    assert [start.replica for start in job.starts()] == ["0", "1", "1", "1", "1"]
    assert "replica 1 waits for a checkpoint: it ended 3 times after the beginning" in log


def test_the_notice_reaches_every_replica_and_starts_none_again(job: ReplicaJob) -> None:
    running = job.start("case $START in 2.3) ends 3 ;; *) until_notice ;; esac", nodes=4, per_replica=1, spares=1)
    job.wait_for("the replica that ended is seen", lambda: "the run continues without replica 2" in job.log())
    job.wait_for("its next start", lambda: len(list(job.folder.glob("waits.*"))) == 3)
    running.send_signal(signal.SIGUSR2)
    assert job.end(running) == 0, job.log()
    assert sorted(job.notices()) == ["0.1", "1.2", "2.4"]
    assert len(job.starts()) == 4
    assert "the next job of the array or chain resumes" in job.log()


def test_a_notice_before_the_replicas_starts_none(job: ReplicaJob) -> None:
    """They would not see it. The store takes its time here."""
    store = f"{sys.executable} {job.folder}/store.py"
    waits = f'until [ -e {job.folder}/go ]; do sleep 0.05; done; exec {store} "$@"'
    running = job.start("finish", settings=f"STORE_SERVER=(bash -c '{waits}' store)")
    job.wait_for("the store starts", lambda: bool(list(job.run_folder.glob("logs/*/*/store.log"))))
    running.send_signal(signal.SIGUSR2)
    job.wait_for("the notice is seen", lambda: "SIGUSR2" in job.log())
    (job.folder / "go").touch()
    assert job.end(running) == 0, job.log()
    assert job.starts() == []
    assert "stopped at : the next job of the array or chain resumes" in job.log()
    job.await_end_of_stores(1)


def test_a_notice_while_nodes_are_checked_for_a_replica_does_not_start_it(job: ReplicaJob) -> None:
    body = 'case $START in 1.2) rm "$DOUBLE/checks"; touch "$DOUBLE/slow"; ends 137 ;; *) until_notice ;; esac'
    running = job.start(body, nodes=2, per_replica=1)
    slow = job.folder / "slow"
    job.wait_for("nodes are checked again", lambda: slow.exists() and (job.folder / "checks").exists())
    running.send_signal(signal.SIGUSR2)
    job.wait_for("the notice is seen", lambda: "SIGUSR2" in job.log())
    slow.unlink()
    assert job.end(running) == 0, job.log()
    assert job.notices() == ["0.1"]
    assert len(job.starts()) == 2


def test_signals_of_the_job_reach_the_ranks_and_not_the_store(job: ReplicaJob) -> None:
    """Slurm sends TERM to all processes of a job that is cancelled, whose ranks then save."""
    running = job.start("until_notice", nodes=1, per_replica=1)
    job.wait_for("the replica runs", lambda: bool(list(job.folder.glob("waits.*"))))
    (store,) = job.stores()
    (line,) = re.findall(r"SigIgn:\s+(\w+)", Path(f"/proc/{store}/status").read_text(encoding="utf-8"))
    for each in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        assert int(line, 16) >> (each - 1) & 1, each
    running.send_signal(signal.SIGUSR2)
    assert job.end(running) == 0, job.log()


@pytest.mark.parametrize("first", ["finish", 'touch "$RUN/DONE"'])
def test_starts_that_do_not_end_with_the_run_are_ended(job: ReplicaJob, first: str) -> None:
    """One of them, or all."""
    code, log = job.run(f"[ $START != 0.1 ] || {first}; while :; do sleep 0.1; done", last_seconds=1)
    assert code == 0, log


def test_a_start_that_ends_a_while_after_the_run_is_left_to_it(job: ReplicaJob) -> None:
    code, log = job.run(
        "case $START in 0.1) finish ;; *) until [ -e $RUN/DONE ]; do sleep 0.05; done; command sleep 2; ends 0 ;; esac"
    )
    assert code == 0, log
    assert log.count("ranks by exit code: 2 x 0") == 2


def test_a_start_that_does_not_stop_with_the_others_is_ended(job: ReplicaJob) -> None:
    body = """case $START in
      0.1) until_notice ;;
      *) trap '' USR2; touch "$DOUBLE/waits.$START"; while :; do sleep 0.05; done ;;
    esac"""
    running = job.start(body, last_seconds=1)
    job.wait_for("both run", lambda: len(list(job.folder.glob("waits.*"))) == 2)
    running.send_signal(signal.SIGUSR2)
    assert job.end(running) == 0, job.log()
    assert job.notices() == ["0.1"]


def test_too_few_nodes_are_fewer_replicas(job: ReplicaJob) -> None:
    code, log = job.run("finish", bad_nodes=("n2",))
    assert code == 0, log
    (start,) = job.starts()
    assert (start.replica, start.replicas, start.nodes) == ("0", "1", "n1,n3")
    assert "nodes for 1 of 2 replicas" in log
    assert "n2 is not used: broken" in log


@pytest.mark.parametrize(("bad_nodes", "settings"), [(("n2",), "MIN_REPLICAS=2"), (("n1", "n2", "n3"), "")])
def test_below_the_least_number_of_replicas_nothing_starts(
    job: ReplicaJob, bad_nodes: tuple[str, ...], settings: str
) -> None:
    code, log = job.run("finish", bad_nodes=bad_nodes, settings=settings)
    assert (code, job.starts()) == (3, [])
    assert "too few usable nodes" in log


@pytest.mark.parametrize(("nodes", "spares"), [(5, 0), (2, 2)])
def test_nodes_are_a_whole_number_of_replicas(job: ReplicaJob, nodes: int, spares: int) -> None:
    code, log = job.run("finish", nodes=nodes, spares=spares)
    assert (code, job.starts()) == (2, [])
    assert f"{nodes} nodes without SPARES={spares} are no multiple of REPLICA_NODES=2" in log


@pytest.mark.parametrize(("nodes", "spares"), [(4, 1), (5, 0)])
def test_a_job_that_is_requeued_without_its_lost_node_has_as_many_replicas(
    job: ReplicaJob, nodes: int, spares: int
) -> None:
    code, log = job.run("finish", nodes=nodes, spares=spares, settings="SLURM_RESTART_COUNT=1")
    assert code == 0, log
    assert "nodes for" not in log
    assert [start.nodes for start in job.starts()] == ["n1,n2", "n3,n4"]


def test_a_store_that_does_not_start_is_named(job: ReplicaJob) -> None:
    code, log = job.run("finish", settings="STORE_SERVER=(bash -c 'echo the port is taken >&2')")
    assert (code, job.starts()) == (4, [])
    assert log.count("the store of the replicas did not start: the port is taken") == 3


def test_the_store_is_a_module_of_the_same_package(job: ReplicaJob) -> None:
    script = ". slurm/lib.sh; MEGADISTILL=(run image python -m megadistill); unset STORE_SERVER; . slurm/replicas.sh"
    done: subprocess.CompletedProcess[str] = job.shell(f'{script}; echo "${{STORE_SERVER[@]}}"')
    assert done.stdout == "run image python -m megadistill.distributed.store_server\n"
