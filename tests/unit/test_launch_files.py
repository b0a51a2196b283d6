"""The files of launch/: manifests by the fields of their schedulers, scripts with commands that stand in for the ranks.

`FIELDS` names the fields of JobSet v1alpha2 and SkyPilot that the manifests use, and their types; both manifests were
checked against the complete schemas too (JobSet of August 2026 by its CRD, in which an unknown field was an error).
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadistill.distributed import store_server
from megadistill.errors import OperatorFault, RestartFault, UserError
from tests.paths import ROOT

LAUNCH = ROOT / "launch"
POD = "spec.replicatedJobs[].template.spec.template.spec"
JOB = "spec.replicatedJobs[].template.spec"
FIELDS: dict[str, dict[str, type]] = {
    "jobset.yaml": {
        "apiVersion": str,
        "kind": str,
        "metadata.name": str,
        "spec.failurePolicy.maxRestarts": int,
        "spec.failurePolicy.restartStrategy": str,
        "spec.failurePolicy.rules[].name": str,
        "spec.failurePolicy.rules[].action": str,
        "spec.failurePolicy.rules[].onJobFailureReasons[]": str,
        "spec.network.enableDNSHostnames": bool,
        "spec.network.publishNotReadyAddresses": bool,
        "spec.replicatedJobs[].name": str,
        "spec.replicatedJobs[].replicas": int,
        f"{JOB}.completionMode": str,
        f"{JOB}.completions": int,
        f"{JOB}.parallelism": int,
        f"{JOB}.backoffLimit": int,
        f"{JOB}.podFailurePolicy.rules[].action": str,
        f"{JOB}.podFailurePolicy.rules[].onExitCodes.containerName": str,
        f"{JOB}.podFailurePolicy.rules[].onExitCodes.operator": str,
        f"{JOB}.podFailurePolicy.rules[].onExitCodes.values[]": int,
        f"{POD}.restartPolicy": str,
        f"{POD}.terminationGracePeriodSeconds": int,
        f"{POD}.containers[].name": str,
        f"{POD}.containers[].image": str,
        f"{POD}.containers[].command[]": str,
        f"{POD}.containers[].env[].name": str,
        f"{POD}.containers[].env[].value": str,
        f"{POD}.containers[].env[].valueFrom.fieldRef.fieldPath": str,
        f"{POD}.containers[].resources.limits.nvidia.com/gpu": int,
        f"{POD}.containers[].volumeMounts[].name": str,
        f"{POD}.containers[].volumeMounts[].mountPath": str,
        f"{POD}.volumes[].name": str,
        f"{POD}.volumes[].persistentVolumeClaim.claimName": str,
        f"{POD}.volumes[].emptyDir.medium": str,
    },
    "skypilot.yaml": {
        "name": str,
        "num_nodes": int,
        "resources.infra": str,
        "resources.accelerators": str,
        "resources.image_id": str,
        "resources.job_recovery.max_restarts_on_errors": int,
        "resources.job_recovery.recover_on_exit_codes[]": int,
        "volumes./shared": str,
        "envs.RUN_FOLDER": str,
        "envs.OMP_NUM_THREADS": str,
        "run": str,
    },
}
FIELDS["jobset-replicas.yaml"] = FIELDS["jobset.yaml"] | {
    "spec.successPolicy.operator": str,
    "spec.successPolicy.targetReplicatedJobs[]": str,
}


def _manifest(name: str) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))
    return manifest


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in _leaves(part, f"{path}.{key}".removeprefix("."))]
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part, f"{path}[]")]
    return [(path, value)]


def _pod() -> dict[str, Any]:
    pod: dict[str, Any] = _job()["template"]["spec"]
    return pod


def _job() -> dict[str, Any]:
    job: dict[str, Any] = _manifest("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job


def _pod_variables() -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in _pod()["containers"][0]["env"] if "value" in entry}


@pytest.mark.parametrize("name", FIELDS)
def test_a_manifest_has_the_fields_of_its_scheduler(name: str) -> None:
    for path, value in _leaves(_manifest(name)):
        assert type(value) is FIELDS[name].get(path), f"{path}: {value}"


def test_schedulers_act_on_the_exit_codes_of_the_package() -> None:
    for_good = sorted((UserError.exit_code, OperatorFault.exit_code))
    (rule,) = _job()["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
    assert rule["onExitCodes"]["values"] == for_good
    assert rule["onExitCodes"]["containerName"] == _pod()["containers"][0]["name"]
    (answer,) = _manifest("jobset.yaml")["spec"]["failurePolicy"]["rules"]
    assert (answer["action"], answer["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", answer["name"]), "what the controller accepts"
    recovery = _manifest("skypilot.yaml")["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [RestartFault.exit_code]}


def test_the_parts_of_the_jobset_agree() -> None:
    manifest, job, pod = _manifest("jobset.yaml"), _job(), _pod()
    assert job["completions"] == job["parallelism"] == int(_pod_variables()["NODES"])
    assert (job["completionMode"], job["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    name, replicated = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"][0]
    assert replicated["replicas"] == 1
    assert _pod_variables()["MASTER_ADDR"] == f"{name}-{replicated['name']}-0-0.{name}", "the first pod's host name"
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_replicas_are_jobs_like_that_of_one_launch_which_start_again_by_themselves() -> None:
    """Their pods differ in nothing but what tells them their replica."""
    manifest, single = _manifest("jobset-replicas.yaml"), _manifest("jobset.yaml")
    store, replica = manifest["spec"]["replicatedJobs"]
    assert manifest["spec"]["successPolicy"] == {"operator": "All", "targetReplicatedJobs": [replica["name"]]}
    assert manifest["spec"]["failurePolicy"] == single["spec"]["failurePolicy"]
    (container,) = replica["template"]["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(variables.pop("MEGADISTILL_REPLICAS")) == replica["replicas"]
    (server,) = store["template"]["spec"]["template"]["spec"]["containers"]
    name = manifest["metadata"]["name"]
    assert variables.pop("MEGADISTILL_STORE") == f"{name}-{store['name']}-0-0.{name}:{server['command'][-1]}"
    assert server["command"][:3] == ["python", "-m", store_server.__name__]
    order = [entry["name"] for entry in container["env"]]
    assert order.index("MEGADISTILL_REPLICA") < order.index("MASTER_ADDR"), "a variable names those before it"
    address = f"{name}-{replica['name']}-$(MEGADISTILL_REPLICA)-0.{name}"
    assert variables.pop("MASTER_ADDR") == address, "the first pod of the same Job"
    assert variables.pop("MEGADISTILL_REPLICA") is None, "the downward API's"
    its, job = replica["template"]["spec"], _job()
    assert its.pop("backoffLimit") > its["completions"], "a lost node costs a pod of each of its replica's"
    assert job.pop("backoffLimit") == 0
    pod = job["template"]["spec"]["containers"][0]
    others = {entry["name"]: entry.get("value") for entry in pod.pop("env")}
    assert variables == {name: value for name, value in others.items() if name != "MASTER_ADDR"}
    del container["env"]
    assert its == job


def test_a_store_that_is_deleted_with_its_node_has_failed() -> None:
    """A Job whose pod ends with 0 is complete, so the JobSet would not start the replicas again, with a new store."""
    command = [sys.executable, "-m", store_server.__name__, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as store:
        assert store.stdout is not None
        assert "listening" in store.stdout.readline()
        store.terminate()
        assert store.wait(timeout=60) == 128 + signal.SIGTERM


def test_the_image_has_the_script_that_the_manifests_start() -> None:
    dockerfile = (ROOT / "container" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^WORKDIR /opt/src$", dockerfile, re.MULTILINE)
    assert re.search(r"^COPY launch launch$", dockerfile, re.MULTILINE)
    assert _pod()["containers"][0]["command"][0] == "/opt/src/launch/node.sh"
    assert "exec /opt/src/launch/node.sh " in _manifest("skypilot.yaml")["run"]


STAND_IN = """#!/bin/bash
# megadistill's place: notes its arguments and variables, waits where it is told to, ends with the code of its rank
printf '%s\\n' "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*" >>"$LOG"
trap 'echo "$RANK stopped" >>"$LOG"; stopped=1' USR2
if [ -e "$WAIT" ]; then
  touch "$LOG.up.$RANK"
  until [ -n "${stopped:-}" ]; do sleep 0.05; done
  for _ in {1..10}; do sleep 0.05; done # time for a second signal
  exit 3
fi
codes=($CODES)
[ -z "${SAVE:-}" ] || mkdir -p "$RUN_FOLDER/checkpoints/step-$(grep -c "^0 .*: train" "$LOG")"
exit "${codes[RANK]:-0}"
"""


class Place:
    """A folder with the stand-in, and the environment of a node."""

    def __init__(self, folder: Path) -> None:
        self.run, self.log, self.wait, self.bin = folder / "run", folder / "log", folder / "wait", folder / "bin"
        self.bin.mkdir()
        self.command("megadistill", STAND_IN)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "RUN_FOLDER": str(self.run),
            "LOG": str(self.log),
            "WAIT": str(self.wait),
            "CODES": "",
            "HOSTNAME": "here",
        }

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def start(self, *command: str, **variables: str) -> "subprocess.Popen[str]":
        environment = self.environment | variables
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=self.bin.parent)

    def finish(self, *command: str, **variables: str) -> tuple[int, str]:
        process = self.start(*command, **variables)
        _, error = process.communicate(timeout=60)
        return process.returncode, error

    def lines(self) -> list[str]:
        return sorted(self.log.read_text(encoding="utf-8").splitlines()) if self.log.exists() else []

    def wait_for_ranks(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.log.parent.glob("log.up.*"))) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


NODE = (str(LAUNCH / "node.sh"), "megadistill", "train", "my recipe.yaml")


def test_a_node_has_a_process_for_each_gpu(place: Place) -> None:
    place.command("nvidia-smi", "#!/bin/bash\necho 'GPU 0: a'; echo 'GPU 1: a'\n")
    assert place.finish(*NODE, NODES="3", NODE_RANK="1", MASTER_ADDR="n1") == (0, "")
    set_ = f"train my recipe.yaml --set run.folder={place.run}"
    assert place.lines() == [f"2 6 0 2 n1 29500: {set_}", f"3 6 1 2 n1 29500: {set_}"]


@pytest.mark.parametrize(
    ("codes", "code"),
    [("0 0 0", 0), ("0 2 3", 2), ("3 4 3", 4), ("3 3 3", 3), ("0 137 0", 3), ("1 0 0", 3), ("4 2 3", 2), ("0 0 42", 3)],
)
def test_the_exit_code_of_a_node_says_who_acts(place: Place, codes: str, code: int) -> None:
    found, error = place.finish(*NODE, RANKS_PER_NODE="3", CODES=codes)
    assert found == code
    assert not code or f"exit codes of the ranks: {codes}; ending with {code}" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_reaches_each_rank_once(place: Place, number: signal.Signals) -> None:
    place.wait.touch()
    process = place.start(*NODE, RANKS_PER_NODE="2")
    place.wait_for_ranks(2)
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.1)
    assert process.wait(timeout=60) == 3
    assert [line for line in place.lines() if "stopped" in line] == ["0 stopped", "1 stopped"]


def test_a_start_takes_over_from_the_same_launch_alone(place: Place) -> None:
    for launch, takes_over in (("a", False), ("a", True), ("b", False), ("", False)):
        place.log.unlink(missing_ok=True)
        assert place.finish(*NODE, RANKS_PER_NODE="1", LAUNCH_ID=launch)[0] == 0
        assert ("--take-over" in place.lines()[0]) == takes_over, launch


def test_what_was_refused_takes_nothing_over(place: Place) -> None:
    assert place.finish(*NODE, RANKS_PER_NODE="1", LAUNCH_ID="a", CODES="2")[0] == 2
    assert place.finish(*NODE, RANKS_PER_NODE="1", LAUNCH_ID="a")[0] == 0
    assert not any("--take-over" in line for line in place.lines())


def test_a_node_that_cannot_start_says_why(place: Place) -> None:
    place.command("nvidia-smi", "#!/bin/bash\nexit 1\n")
    for variables in ({}, {"RANKS_PER_NODE": "0"}, {"RANKS_PER_NODE": "all"}):
        code, error = place.finish(*NODE, **variables)
        assert (code, "set RANKS_PER_NODE" in error) == (2, True)
    code, error = place.finish(str(LAUNCH / "node.sh"))
    assert (code, "node.sh COMMAND" in error) == (2, True)
    place.run.mkdir()
    (place.run / "HOLD").write_text("a disk is full\n", encoding="utf-8")
    code, error = place.finish(*NODE, RANKS_PER_NODE="1")
    assert (code, "a disk is full" in error) == (4, True)
    assert place.lines() == []


def test_pods_of_the_jobset_start_the_ranks_of_one_launch(place: Place, tmp_path: Path) -> None:
    """The container's command with its variables; the downward API's come from the scheduler."""
    command = [word.replace("/opt/src", str(ROOT)) for word in _pod()["containers"][0]["command"]]
    variables = _pod_variables() | {"RUN_FOLDER": str(tmp_path / "run")}
    for index in range(4):
        process = place.finish(*command, **variables, NODE_RANK=str(index), LAUNCH_ID="uid", RANKS_PER_NODE="1")
        assert process[0] == 0
    place_of = [line.split(":")[0].split() for line in place.lines()]
    assert [(rank, world, address) for rank, world, _, _, address, _ in place_of] == [
        (str(rank), "4", "distill-node-0-0.distill") for rank in range(4)
    ]


def test_pods_of_a_replica_start_the_ranks_of_its_launch(place: Place, tmp_path: Path) -> None:
    (_, replica) = _manifest("jobset-replicas.yaml")["spec"]["replicatedJobs"]
    (container,) = replica["template"]["spec"]["template"]["spec"]["containers"]
    command = [word.replace("/opt/src", str(ROOT)) for word in container["command"]]
    variables = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    variables |= {"RUN_FOLDER": str(tmp_path / "run"), "MEGADISTILL_REPLICA": "1"}
    variables["MASTER_ADDR"] = variables["MASTER_ADDR"].replace("$(MEGADISTILL_REPLICA)", "1")  # as Kubernetes does
    for index in range(4):
        code, _ = place.finish(*command, **variables, NODE_RANK=str(index), LAUNCH_ID="uid", RANKS_PER_NODE="1")
        assert code == 0
    ranks = [line.split(":")[0].split() for line in place.lines()]
    assert [(rank, world, address) for rank, world, _, _, address, _ in ranks] == [
        (str(rank), "4", "distill-node-1-0.distill") for rank in range(4)
    ]


def test_nodes_of_skypilot_start_the_ranks_of_one_launch(place: Place, tmp_path: Path) -> None:
    script = _manifest("skypilot.yaml")["run"].replace("/opt/src", str(ROOT))
    its = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    for rank in range(2):
        code, _ = place.finish("bash", "-c", script, **its, SKYPILOT_NODE_RANK=str(rank), SKYPILOT_TASK_ID="t")
        assert code == 0
    assert [line.split(":")[0].split()[0] for line in place.lines()] == ["0", "1", "2", "3"]
    assert all("4 " in line and "10.0.0.1 29500" in line for line in place.lines())


SSH = (str(LAUNCH / "ssh.sh"), "megadistill", "train", "my recipe.yaml")
TWO = {"HOSTS": "n1 n2", "RANKS_PER_NODE": "1", "PAUSE": "0"}


@pytest.fixture
def ssh(place: Place) -> Place:
    """`ssh` runs the line in a shell of its own, which has none of the caller's shell variables but the stand-in's."""
    keep = "PATH LOG WAIT CODES SAVE"
    place.command("ssh", f'#!/bin/bash\nset -- "${{@: -2}}"\necho "ssh $1" >>"$LOG"\n'
        f'variables=(); for name in {keep}; do variables+=("$name=${{!name:-}}"); done\n'
        'exec env -i "${variables[@]}" bash -c "$2"\n')  # fmt: skip
    return place


def test_ssh_starts_all_nodes_and_ends_when_they_are_done(ssh: Place) -> None:
    assert ssh.finish(*SSH, **TWO, MASTER_PORT="29511") == (0, "")
    assert [line for line in ssh.lines() if line.startswith("ssh")] == ["ssh n1", "ssh n2"]
    ranks = [line for line in ssh.lines() if not line.startswith("ssh")]
    expected = f"train my recipe.yaml --set run.folder={ssh.run}"
    assert ranks[0] == f"0 2 0 1 n1 29511: {expected}"
    assert ranks[1].removesuffix(" --take-over") == f"1 2 0 1 n1 29511: {expected}"


@pytest.mark.parametrize("code", [2, 4])
def test_ssh_does_not_repeat_what_a_start_cannot_mend(ssh: Place, code: int) -> None:
    assert ssh.finish(*SSH, **TWO, CODES=f"3 {code}")[0] == code
    assert sum(line.startswith("ssh") for line in ssh.lines()) == 2


def test_ssh_gives_up_after_three_starts_without_a_checkpoint(ssh: Place) -> None:
    code, error = ssh.finish(*SSH, **TWO, CODES="3 137")
    assert code == 4
    assert error.count("starting again") == 2
    assert "three starts without a new checkpoint" in (ssh.run / "HOLD").read_text(encoding="utf-8")
    assert ssh.finish(*SSH, **TWO)[0] == 4, "until the file is deleted"


def test_ssh_goes_on_while_there_are_new_checkpoints(ssh: Place) -> None:
    process = ssh.start(*SSH, **TWO, CODES="3 3", SAVE="1")
    deadline = time.monotonic() + 60
    while not (ssh.run / "checkpoints" / "step-5").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(timeout=60) == 4
    assert (ssh.run / "STOP").exists()
    assert "stopped by a signal" in (ssh.run / "HOLD").read_text(encoding="utf-8")
