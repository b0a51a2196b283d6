"""`megadistill doctor` as it is typed, under a launcher, for a recipe that would run."""

import json
from pathlib import Path

import pytest

from tests.e2e.commands import PLAIN, TORCHRUN_2, succeed
from tests.e2e.conftest import Place
from tests.e2e.nodes import missing, two_nodes


def test_a_recipe_that_would_run_is_well(place: Place) -> None:
    arguments = place.distill("doctor", steps=4, checkpoint_every=4)
    report = place.folder / "doctor.json"
    examine = [*TORCHRUN_2, "doctor", *arguments[1:], "--json", str(report)]
    finished = succeed(*examine)
    rows = {row["check"]: row for row in json.loads(report.read_text())["rows"]}
    assert {check for check, row in rows.items() if row["status"] == "fail"} == set()
    assert {"teacher's weights", "host memory", "disk space", "pairs of ranks", "dry run"} <= rows.keys()
    assert "2 ranks on 1 node" in rows["world"]["detail"]
    assert "dry run" in finished.out
    assert not (place.folder / "doctor").exists()  # it leaves nothing behind


def test_a_node_with_a_run_folder_of_its_own_is_named(place: Place, tmp_path: Path) -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    folder = place.folder / "doctor-on-nodes"
    folder.mkdir()
    examine = [*PLAIN, "doctor", *place.distill(folder.name, steps=4, checkpoint_every=4)[1:]]
    variables = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "29547",
    }
    with two_nodes(tmp_path / "nodes") as nodes:
        assert nodes[1].start("mount", "-t", "tmpfs", "none", str(folder)).wait(timeout=30) == 0
        ranks = [node.start(*examine, variables={**variables, "RANK": str(rank)}) for rank, node in enumerate(nodes)]
        first, _ = (rank.communicate(timeout=120)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 2], first
    assert "2 ranks on 2 nodes have met" in first
    assert "is not the folder that rank 0 sees" in first
    assert first.splitlines()[-1] == "bad nodes: n2"
    assert list(folder.iterdir()) == []
