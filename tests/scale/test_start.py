"""The files that each rank opens at its start, before it reads any of the run's."""

import json
import subprocess
import sys

from tests.paths import ROOT

COUNTED = """
import collections, json, sys
counts, opened = collections.Counter(), set()
def count(event, arguments):
    if event in ("open", "os.scandir", "os.listdir", "subprocess.Popen"):
        counts[event] += 1
        if event == "open":
            opened.add(str(arguments[0]))
sys.addaudithook(count)
import megadistill.cli.main, megadistill.train.loop
packages = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"counts": counts, "files": len(opened), "packages": packages}))
"""


def test_imports_of_a_rank_open_few_files_and_start_no_process() -> None:
    """transformers opens each of its 1,660 model files, twice; the other opens are modules, one file each."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTED], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    start = json.loads(done.stdout.splitlines()[-1])
    assert start["counts"].get("subprocess.Popen", 0) == 0, "DeepSpeed would try a compiler"
    assert start["counts"]["open"] < 8_000
    assert start["files"] < 6_000
    needless = {"tensorboard", "distutils", "matplotlib", "wandb", "pyarrow", "lm_eval"}
    assert not needless & set(start["packages"]), start
