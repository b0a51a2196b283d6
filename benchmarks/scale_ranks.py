"""Starts the ranks of one attempt on this machine, and writes how each ended: `python scale_ranks.py SPEC.json`.

A file of its own, which imports nothing of this folder: it measures the `megadistill` of another checkout too. Ranks
are processes of their own, as srun starts them, or forks of one process that has imported everything.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _fork(environment: dict[str, str], arguments: list[str], log: Path) -> int:
    """The process id of a rank that has everything imported."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["megadistill", *arguments]
        from megadistill.cli.main import main  # noqa: PLC0415  only forks import it

        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _spawn(environment: dict[str, str], arguments: list[str], log: Path) -> int:
    with log.open("ab") as file:
        command = [sys.executable, "-m", "megadistill", *arguments]
        return subprocess.Popen(command, env={**os.environ, **environment}, stdout=file, stderr=file).pid


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder, world = Path(spec["folder"]), spec["world"]
    if spec["forked"]:
        import gc  # noqa: PLC0415
        import importlib  # noqa: PLC0415

        importlib.import_module("torch").set_num_threads(1)
        importlib.import_module("megadistill.train.loop")
        gc.collect()
        gc.freeze()  # a collection in a rank would copy the pages of all that was imported
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = _fork if spec["forked"] else _spawn
    began = time.time()
    ranks = {
        start(_environment(rank, world, port), spec["arguments"], folder / f"rank-{rank}.log"): rank
        for rank in range(world)
    }
    written = folder / "began.json.part"
    processes = {rank: pid for pid, rank in ranks.items()}
    written.write_text(json.dumps({"time": began, "processes": processes}), encoding="utf-8")
    written.rename(folder / "began.json")
    ends: list[dict[str, float]] = []
    while len(ends) < world:
        pid, status, usage = os.wait4(-1, 0)
        if pid in ranks:
            code = os.waitstatus_to_exitcode(status)
            ends.append({"rank": ranks[pid], "code": code, "cpu": usage.ru_utime + usage.ru_stime, "time": time.time()})
    result = {"began": began, "ends": ends}
    (folder / "ends.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
