"""One recipe under every launcher of docs/launch.md: the same parameters, to the last bit. srun is in tests/slurm."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drill.record import Record
from tests.e2e.commands import BIN, TORCHRUN_2, succeed
from tests.e2e.conftest import Place
from tests.e2e.nodes import Node, missing, two_nodes
from tests.paths import ROOT

PORT = "29531"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with two_nodes(tmp_path_factory.mktemp("nodes") / "of") as both:
        yield both


def _run(place: Place, name: str) -> list[str]:
    return place.distill(name, steps=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def truth(place: Place) -> Record:
    succeed(*TORCHRUN_2, *_run(place, "launched-torchrun"))
    return Record.of(place.folder / "launched-torchrun")


def _ends_well(*launchers: "subprocess.Popen[str]") -> str:
    outputs = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), "\n---\n".join(outputs)
    return "".join(outputs)


def test_deepspeed_over_ssh(place: Place, nodes: tuple[Node, Node], truth: Record, tmp_path: Path) -> None:
    hostfile, variables = tmp_path / "hostfile", tmp_path / "deepspeed_env"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    variables.write_text("OMP_NUM_THREADS=1\n")
    first, _ = nodes
    command = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--master_port", PORT, "--module", "megadistill"]
    launcher = first.start(*command, *_run(place, "launched-ssh"), variables={"DS_ENV_FILE": str(variables)})
    assert "step 4 of 4, done" in _ends_well(launcher)
    Record.of(place.folder / "launched-ssh").require_same(truth)


def test_deepspeed_on_each_node_by_itself(
    place: Place, nodes: tuple[Node, Node], truth: Record, tmp_path: Path
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    command = [str(BIN / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh", "--master_addr", "n1"]
    launchers = [
        node.start(
            *command,
            "--master_port",
            PORT,
            "--node_rank",
            str(rank),
            "--module",
            "megadistill",
            *_run(place, "launched-no-ssh"),
        )
        for rank, node in enumerate(nodes)
    ]
    _ends_well(*launchers)
    Record.of(place.folder / "launched-no-ssh").require_same(truth)


def test_torchrun_on_each_node_by_itself(place: Place, nodes: tuple[Node, Node], truth: Record) -> None:
    command = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "n1"]
    launchers = [
        node.start(
            *command,
            "--master_port",
            PORT,
            "--node_rank",
            str(rank),
            "-m",
            "megadistill",
            *_run(place, "launched-torchrun-2"),
        )
        for rank, node in enumerate(nodes)
    ]
    _ends_well(*launchers)
    Record.of(place.folder / "launched-torchrun-2").require_same(truth)


@pytest.mark.thorough
def test_the_ssh_script_goes_on_after_a_stop(place: Place, nodes: tuple[Node, Node], truth: Record) -> None:
    """STOP without HOLD, after a checkpoint: the nodes end with 3, unless they were done; the script starts again."""
    first, _ = nodes
    run = place.folder / "launched-ssh-script"
    variables = {"HOSTS": "n1 n2", "RUN_FOLDER": str(run), "RANKS_PER_NODE": "1", "MASTER_PORT": PORT, "PAUSE": "0"}
    script = (str(ROOT / "launch" / "ssh.sh"), str(BIN / "megadistill"))
    environment = place.folder / "launched-ssh-script.env"
    environment.write_text("export OMP_NUM_THREADS=1\n", encoding="utf-8")
    launcher = first.start(*script, *_run(place, run.name), variables=variables | {"ENVIRONMENT": str(environment)})
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-00000002").exists():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (run / "STOP").touch()
    output = _ends_well(launcher)
    assert "step 4 of 4, done" in output
    Record.of(run).require_same(truth)
