"""The jobs around a training run: text to shards, a teacher's targets and its own words, and what a student came to."""

import json
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Work


def test_each_task_of_an_array_tokenizes_a_source(cluster: Cluster, work: Work) -> None:
    library, folder = Path(json.__file__).parent, work.folder / "sources"
    (work.folder / "list").write_text(f"one {library}\ntwo {library.parent}/ast.py {library.parent}/tarfile.py\n")
    split = "--sequence-length 32 --heldout-fraction 0 --processes 1 --include '*.py'"
    options = f"(--tokenizer {work.folder}/data/tokenizer {split})"
    settings = {"TOKENIZE_LIST": f"{work.folder}/list", "TOKENIZE_OPTIONS": options, "DATA_FOLDER": str(folder)}
    job = cluster.submit("tokenize", work.folder / "tokenize", "--array=1-2", **settings).ends()
    for name in ("one", "two"):
        assert (folder / name / "train/manifest.json").exists(), job.transcript()


def test_targets_are_stored_and_a_finished_set_is_left_alone(cluster: Cluster, work: Work) -> None:
    targets = work.folder / "targets"
    overrides = work.settings["OVERRIDES"].removesuffix(")") + " --set loss.targets.draws=8 --set train.steps=4)"
    settings = {**work.settings, "OVERRIDES": overrides, "TARGETS_FOLDER": str(targets)}
    job = cluster.submit(
        "store-targets", work.folder / "store-targets", "--nodes=2", "--array=1-2%1", **settings
    ).ends()
    assert (targets / "targets.json").exists(), job.transcript()
    assert "nothing is left to do" in job.log


def test_shares_of_a_teachers_words_become_one_data_set(cluster: Cluster, work: Work) -> None:
    written = work.folder / "written"
    options = f"(--data {work.folder}/data/train/manifest.json --sequences 8 --prompt-tokens 8 --new-tokens 25)"
    settings = {"TEACHER": str(work.teacher), "GENERATE_OPTIONS": options, "GENERATED_FOLDER": str(written)}
    shares = cluster.submit("generate", work.folder / "generate", "--array=0-1", **settings)
    job = cluster.submit("generate", work.folder / "join", f"--dependency=afterany:{shares.number}", **settings).ends()
    assert (written / "train/manifest.json").exists(), shares.transcript() + job.transcript()


def test_a_run_is_exported_and_measured(cluster: Cluster, work: Work) -> None:
    work.reference(2)
    heldout = str(work.folder / "data/heldout/manifest.json")
    settings = {**work.settings, "TEACHER": str(work.teacher), "HELDOUT": heldout}
    job = cluster.submit("evaluate", work.folder / "reference-2", **settings).ends()
    assert job.field("ExitCode") == "0:0", job.transcript()
    (table,) = (work.folder / "reference-2/exports").glob("*.json")
    assert len(json.loads(table.read_text(encoding="utf-8"))) == 2, "the teacher and the student"


def test_a_run_is_followed_to_its_end(cluster: Cluster, work: Work) -> None:
    work.reference(2)
    settings = {**work.settings, "FOLLOW_OPTIONS": "(--prompt def --new-tokens 4)"}
    job = cluster.submit("follow", work.folder / "reference-2", **settings).ends()
    assert job.field("ExitCode") == "0:0", job.transcript()
    rows = (work.folder / "reference-2/follow/follow.jsonl").read_text(encoding="utf-8").splitlines()
    checkpoints = list((work.folder / "reference-2/checkpoints").glob("step-*"))
    assert len(rows) == len(checkpoints) > 0, job.transcript()


def test_the_nodes_are_examined_together(cluster: Cluster, work: Work) -> None:
    job = cluster.submit("doctor", work.folder / "examined", "--nodes=2", **work.settings).ends()
    assert job.field("ExitCode") == "0:0", job.transcript()
    assert "2 ranks on 2 nodes have met" in job.log
