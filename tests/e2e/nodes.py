"""Two nodes on this machine, for launchers that start ranks on several: each has its own network, name and processes.

Namespaces without a name: they are gone with the process that made them, and the nodes of two test runs never meet.
Processes have a namespace of their own because the deepspeed launcher ends what is left with `pkill -f`.
"""

import os
import pwd
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.commands import environment
from tests.paths import ROOT

PACKAGES = ("openssh-server", "pdsh", "iproute2")
COMMANDS = ("/usr/sbin/sshd", "ssh-keygen", "pdsh", "ip", "unshare", "nsenter")
SSHD = """\
Port 22
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
"""
CLIENT = """\
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
NODE = """
hostname {name}
ip link set lo up
mount --bind {folder}/hosts /etc/hosts
mkdir -p /run/sshd {home}
mount --bind {folder}/home {home}
echo up
exec /usr/sbin/sshd -D -e -f {folder}/sshd_config
"""


def missing() -> str | None:
    """Why there can be no nodes here, and what would change that."""
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    if os.geteuid() != 0:
        return "nodes are namespaces, which need root"
    tried = subprocess.run(["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else "no namespaces: a privileged container has them"


@dataclass(frozen=True)
class Node:
    name: str
    init: int
    """Its first process, as this machine counts."""

    def start(self, *command: str, variables: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
        """The command on the node, from the root of the checkout."""
        within = ["nsenter", "--target", str(self.init), "--net", "--uts", "--mount", "--pid", f"--wd={ROOT}"]
        return subprocess.Popen(
            [*within, *command],
            env={**environment(), **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """n1 and n2, with an sshd each that lets root of the other one in."""
    folder.mkdir()
    (folder / "home").mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "home" / "config").write_text(CLIENT.format(folder=folder))
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.0.0.1 n1\n10.0.0.2 n2\n")
    starting = [_start(name, folder) for name in ("n1", "n2")]
    try:
        nodes = [Node(name, _child_of(process)) for name, process in zip(("n1", "n2"), starting, strict=True)]
        first, second = nodes
        link = f"ip link add eth0 netns {first.init} type veth peer name eth0 netns {second.init}"
        subprocess.run(shlex.split(link), check=True)
        for number, node in enumerate(nodes, 1):
            for command in (f"ip addr add 10.0.0.{number}/24 dev eth0", "ip link set eth0 up"):
                subprocess.run(["nsenter", "--target", str(node.init), "--net", *shlex.split(command)], check=True)
        yield first, second
    finally:
        for process in starting:
            process.kill()  # and with it the first process of the node, and with that all others
            process.wait()


def _start(name: str, folder: Path) -> "subprocess.Popen[str]":
    apart = ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
    script = NODE.format(name=name, folder=folder, home=Path(pwd.getpwuid(0).pw_dir) / ".ssh")
    process = subprocess.Popen(
        [*apart, "bash", "-ec", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n", f"{name} did not start"
    return process


def _child_of(process: "subprocess.Popen[str]") -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
