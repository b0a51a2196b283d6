"""A cluster for all tests of this folder, a tiny text and teacher, and the same runs without Slurm to compare with."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.paths import ROOT
from tests.slurm.cluster import Cluster, environment, missing, started

STEPS, CHECKPOINT_EVERY = 120, 10

TINY = {
    "student.config.hidden_size": 32,
    "student.config.intermediate_size": 64,
    "student.config.num_attention_heads": 2,
    "student.config.num_key_value_heads": 1,
    "student.vocab_multiple": 256,
    "train.schedule.kind": "cosine",
    "train.schedule.decay_steps": "null",
    "train.schedule.warmup_steps": 2,
    "train.log_every": 20,
    "train.micro_batch": 4,
    "train.global_batch": 8,
    "train.steps": STEPS,
    "train.checkpoint_every": CHECKPOINT_EVERY,
    "distributed.timeout_minutes": 0.3,
}
APART = {"teacher.placement": "disaggregated", "teacher.ranks": 1}


def overrides(values: Mapping[str, object]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


PATIENT = {"distributed.timeout_minutes": 3}
FAULTY = f"({sys.executable} -m tests.drill.faulty)"


@dataclass(frozen=True)
class Gate:
    """Ranks wait before a step until it is opened, so that what has to meet a run in a step does so on any machine.

    A rank that waits is not stuck: the time limit of a step is longer.

    Ranks that wait take no notice of signals: see `Work.slowed` for those.
    """

    file: Path

    def open(self, step: int) -> None:
        """Lets the ranks take the steps up to this one."""
        changed = self.file.with_suffix(".new")
        changed.write_text(str(step), encoding="ascii")
        changed.rename(self.file)

    def settings(self, settings: Mapping[str, str], *faults: str) -> dict[str, str]:
        """The lines of an env file, with those for ranks that wait. `faults`: more, of tests/drill/faults.py."""
        names = " ".join(("gated", *faults))
        variables = {"export DRILL_FAULTS": f"'{names}'", "export DRILL_GATE": str(self.file)}
        patient = settings["OVERRIDES"].removesuffix(")") + f" {' '.join(overrides(PATIENT))})"
        return {**settings, "MEGADISTILL": FAULTY, "OVERRIDES": patient, **variables}


@dataclass(frozen=True)
class Work:
    """A folder with `data` and `teacher`; the runs go beside them."""

    folder: Path

    @property
    def settings(self) -> dict[str, str]:
        """The lines of an env file that every training job needs."""
        values = {**TINY, "data.manifest": self.folder / "data/train/manifest.json", "teacher.path": self.teacher}
        return {"RECIPE": "recipes/smoke.yaml", "OVERRIDES": f"({' '.join(overrides(values))})"}

    @property
    def slowed(self) -> dict[str, str]:
        """`settings` with steps that no machine takes faster than a notice arrives: 100 of them are 3 s."""
        return {**self.settings, "MEGADISTILL": FAULTY, "export DRILL_FAULTS": "slow:30"}

    def gate(self, name: str, opens_to: int) -> Gate:
        """A gate for a run, open to a step."""
        gate = Gate(self.folder / f"{name}.gate")
        gate.open(opens_to)
        return gate

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    def weights(self, name: str) -> list[torch.Tensor]:
        """The master weights of the last step, rank after rank."""
        checkpoint = self.folder / name / "checkpoints" / f"step-{STEPS:08d}"
        files = sorted(checkpoint.glob("*.safetensors"))
        assert len(files) == 2
        return [tensor for file in files for _, tensor in sorted(load_file(file).items())]

    def reference(self, world: int, **more: object) -> list[torch.Tensor]:
        """Master weights of the same run without Slurm: processes whose ranks are set in the environment."""
        name = f"reference-{world}"
        if not (self.folder / name).exists():
            self.run_plainly(name, world, more)
        return self.weights(name)

    def run_plainly(self, name: str, world: int, more: Mapping[str, object]) -> None:
        """A run without Slurm, with further settings."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = f"{sys.executable} -m megadistill train $RECIPE ${{OVERRIDES[@]}} {' '.join(overrides(more))}"
        setting = " ".join(f"{key}={value};" for key, value in self.settings.items())
        line = f"{setting} exec {command} --set run.folder={self.folder / name}"
        ranks = []
        for rank in range(world):
            ranks_and_sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            variables = {**ranks_and_sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {**environment(), **{key: str(value) for key, value in variables.items()}}
            ranks.append(subprocess.Popen(["bash", "-c", line], cwd=ROOT, env=env, stdout=subprocess.DEVNULL))
        assert [rank.wait(timeout=400) for rank in ranks] == [0] * world


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(f"needs a Slurm of its own: {reason}")
    with started(nodes=3) as running:
        yield running


@pytest.fixture(autouse=True)
def _idle(request: pytest.FixtureRequest) -> Iterator[None]:
    cluster: Cluster = request.getfixturevalue("cluster")
    cluster.are_idle()
    yield
    cluster.cancel_all()  # the job of a test that has failed


@pytest.fixture(scope="session")
def work(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Work:
    from transformers import LlamaConfig, LlamaForCausalLM

    made = Work(tmp_path_factory.mktemp("slurm"))
    library = Path(json.__file__).parent.parent
    corpus = [str(path) for letter in "ajt" for path in sorted(library.glob(f"{letter}*.py"))]
    split = ["--vocab-size", "400", "--sequence-length", "32", "--heldout-fraction", "0.2"]
    command = [sys.executable, "-m", "megadistill", "tokenize", *corpus, *split, "--output", str(made.folder / "data")]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=120)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(made.teacher)
    shutil.copytree(made.folder / "data/tokenizer", made.teacher, dirs_exist_ok=True)
    return made
