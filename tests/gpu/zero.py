"""ZeRO-3 in a world of one through `megadistill train` in bf16: a distillation with a colocated teacher, stopped by
SIGKILL after its checkpoint and resumed by the same command, against two runs that nothing disturbed.

The two undisturbed runs tell whether the device repeats itself: where they differ, a resume cannot be equal either, and
is held to twice their difference. So that they do not, torch's deterministic algorithms are on: the usual backward pass
of attention adds in the order in which blocks end. All three run side by side, each in a process of its own.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.teacher import write_inputs
from megadistill.cli.main import main
from tests.drill.faults import inject
from tests.gpu.device import Device
from tests.gpu.results import Record
from tests.paths import ROOT

STEPS, CHECKPOINT_EVERY, KILL_AFTER = 20, 8, 11
"""The killed run has a checkpoint of step 8, and was in step 12 or later."""

FAULT = f"crawl:{KILL_AFTER + 1}"
"""Of the run that is killed: without it the run may have ended before."""

RUNS = ("undisturbed", "undisturbed, again", "killed and resumed")


def recipe(device: Device, folder: Path, name: str) -> Path:
    """The recipe of a run, beside the others'; the data and the teacher are common."""
    size = device.size
    student = {
        "model_type": "llama",
        "hidden_size": size(1024, 32),
        "intermediate_size": size(2816, 64),
        "num_hidden_layers": size(8, 2),
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": size(2048, 32),
    }
    values: dict[str, Any] = {
        "objective": "distill",
        "run": {"folder": str(folder / name), "seed": 1},
        "data": {"manifest": str(folder / "data/manifest.json")},
        "student": {"config": student, "vocab_multiple": 64},
        "teacher": {"path": str(folder / "teacher"), "vocab_map": str(folder / "map.json")},
        "distributed": {"vocab_group": 1},
        "train": {
            "steps": STEPS,
            "global_batch": 8,
            "micro_batch": 4,
            "precision": "bfloat16",
            "optimizer": {"learning_rate": 1e-3},
            "checkpoint_every": CHECKPOINT_EVERY,
            "log_every": 1,
        },
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def start(file: Path, *, fault: str = "") -> "subprocess.Popen[bytes]":
    """`megadistill train` of one process; what it prints goes to the check's log."""
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "DRILL_FAULTS": fault}
    return subprocess.Popen([sys.executable, "-m", "tests.gpu.zero", "train", str(file)], cwd=ROOT, env=environment)


def steps(folder: Path) -> dict[int, dict[str, Any]]:
    """The metrics of each step that was logged last."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "step" in values:
            by_step[values["step"]] = values
    return by_step


def kill_after(process: "subprocess.Popen[bytes]", folder: Path, step: int) -> int:
    """Kills the process once that step is logged and a checkpoint is there; returns the last step that was logged.

    Raises:
        RuntimeError: it ended before.
    """
    while step not in steps(folder) or not list(folder.glob("checkpoints/step-*/manifest.json")):
        if process.poll() is not None:
            raise RuntimeError(f"the run that was to be killed ended before, with exit code {process.returncode}")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return max(steps(folder))


def succeeded(process: "subprocess.Popen[bytes]", name: str) -> None:
    code = process.wait()
    if code:
        raise RuntimeError(f"the run '{name}' ended with exit code {code}")


def planned_bytes(file: Path) -> float:
    """`plan`'s memory of the recipe as it stands."""
    command = [sys.executable, "-m", "megadistill", "plan", str(file), "--nodes", "1", "--gpus-per-node", "1"]
    done = subprocess.run([*command, "--gpu", "h200", "--json", "-"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"megadistill plan: {done.stderr.strip().splitlines()[-1]}")
    return float(json.loads(done.stdout)["own"]["memory_bytes"])


def largest_difference(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> float:
    """Of the losses and gradient norms of all steps, relative: 0 where they are equal to the bit."""
    differences = []
    for step in range(1, STEPS + 1):
        for key in ("loss", "grad_norm"):
            a, b = one[step][key], other[step][key]
            differences.append(float(abs(a - b) / max(abs(a), 1e-30)))
    return max(differences)


def run(device: Device, record: Record) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        width = device.size(1536, 48)
        teacher = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": device.size(8, 2)}
        write_inputs(folder, sequence=device.size(2048, 32), vocab=device.size(32_000, 256), teacher=teacher)
        # A run's folder cannot have a comma or a space.
        names = {name: name.replace(", ", "-").replace(" ", "-") for name in RUNS}
        files = {name: recipe(device, folder, short) for name, short in names.items()}
        killed = RUNS[2]
        processes = {name: start(file, fault=FAULT if name == killed else "") for name, file in files.items()}
        reached = kill_after(processes[killed], folder / names[killed], KILL_AFTER)
        record(killed, "killed after step", reached)
        processes[killed] = start(files[killed])
        for name, process in processes.items():
            succeeded(process, name)
        metrics = {name: steps(folder / short) for name, short in names.items()}
        noise = largest_difference(metrics[RUNS[0]], metrics[RUNS[1]])
        record(RUNS[1], "largest relative difference", noise)
        record(killed, "largest relative difference", largest_difference(metrics[RUNS[0]], metrics[killed]))
        beyond = max(0.0, largest_difference(metrics[RUNS[0]], metrics[killed]) - 2 * noise)
        record(killed, "difference beyond twice that of the undisturbed runs", beyond)
        losses = [metrics[RUNS[0]][step]["loss"] for step in (1, STEPS)]
        record(RUNS[0], "loss of the last step to that of the first", losses[1] / losses[0])
        peak, planned = metrics[RUNS[0]][STEPS]["memory_bytes"], planned_bytes(files[RUNS[0]])
        record(RUNS[0], "peak memory", peak / 2**20, "MiB")
        record(RUNS[0], "memory of the plan", planned / 2**20, "MiB")
        record(RUNS[0], "the plan, to the peak", planned / peak)


if __name__ == "__main__":  # the command line of `megadistill`
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    inject(os.environ["DRILL_FAULTS"].split())
    main()
