"""The file systems of the environment: a fake table of mounts, and this machine's own."""

import sys
from pathlib import Path

import pytest

from megadistill.doctor.file_systems import check_environment, mount_of, nodes_of_job, read_mounts
from megadistill.doctor.rank_report import RankReport, Status

LINE = "36 35 98:0 / {folder} rw,noatime master:1 - {kind} {source} rw,hard"


def _table(folder: Path, *mounts: tuple[str, str, str]) -> Path:
    """A table of the root, and of mounts (folder, kind, source)."""
    lines = [LINE.format(folder=place, kind=kind, source=source) for place, kind, source in (ROOT, *mounts)]
    path = folder / "mountinfo"
    path.write_text("\n".join(lines) + "\n")
    return path


ROOT = ("/", "ext4", "/dev/sda1")


def _status(table: Path, *, nodes: int, ranks: int | None = None) -> tuple[Status, str]:
    own = RankReport(0, "n1")
    check_environment(own, nodes=nodes, ranks=ranks, table=table)
    (result,) = own.results
    return result.status, result.detail


@pytest.mark.parametrize(
    ("kind", "is_network"),
    [
        *((kind, True) for kind in ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "wekafs", "ceph", "fuse.sshfs")),
        *((kind, False) for kind in ("ext4", "xfs", "overlay", "tmpfs", "squashfs", "fuse.squashfuse_ll")),
    ],
)
def test_kinds_of_file_systems(tmp_path: Path, kind: str, is_network: bool) -> None:
    table = _table(tmp_path, (sys.prefix, kind, "server:/home"))
    status, detail = _status(table, nodes=64, ranks=512)
    assert status is (Status.WARN if is_network else Status.OK)
    if is_network:
        assert f"{sys.prefix}) on {kind} of server:/home" in detail or f"{sys.prefix}), torch" in detail
        assert "64 nodes import from it, about 4 million files at each start" in detail
        assert "container" in detail
        assert _status(table, nodes=16, ranks=128)[0] is Status.OK, "16 nodes start from a shared one in seconds"


def test_the_deepest_mount_holds_a_path_and_of_two_at_one_place_the_last(tmp_path: Path) -> None:
    table = _table(
        tmp_path,
        ("/home", "nfs4", "server:/home"),
        ("/home/a\\040b/env", "xfs", "/dev/nvme0"),
        ("/opt", "lustre", "mds@tcp:/opt"),
        ("/opt", "squashfs", "/dev/loop0"),
        ("/homes", "beegfs", "beegfs_nodev"),
    )
    mounts = read_mounts(table)
    kinds = {
        path: mount.kind
        for path in ("/home/x", "/home/a b/env/lib", "/opt/env", "/usr/lib")
        if (mount := mount_of(Path(path), mounts)) is not None
    }
    assert kinds == {"/home/x": "nfs4", "/home/a b/env/lib": "xfs", "/opt/env": "squashfs", "/usr/lib": "ext4"}


def test_a_system_without_the_table_is_not_judged(tmp_path: Path) -> None:
    assert read_mounts(tmp_path / "none") == []
    assert _status(tmp_path / "none", nodes=512)[0] is Status.OK


def test_this_machine_has_mounts() -> None:
    assert mount_of(Path(sys.prefix), read_mounts()) is not None


def test_nodes_of_a_job_are_those_of_all_its_components() -> None:
    assert nodes_of_job({}) == 1
    assert nodes_of_job({"SLURM_JOB_NUM_NODES": "17"}) == 17
    parts = {"SLURM_JOB_NUM_NODES_HET_GROUP_0": "14", "SLURM_JOB_NUM_NODES_HET_GROUP_1": "2"}
    assert nodes_of_job({"SLURM_JOB_NUM_NODES": "14", **parts}) == 16
