"""A real SLURM cluster of two nodes on this machine: munged, slurmctld, a slurmd a node in its own namespaces."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "unshare")
NODES = {"node1": "127.0.0.11", "node2": "127.0.0.12"}

SLURM_CONF = """
ClusterName=pairwise
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.0.11 Port={node1_port} CPUs=128 RealMemory=10000 Gres=gpu:8
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.0.12 Port={node2_port} CPUs=128 RealMemory=10000 Gres=gpu:8
PartitionName=normal Nodes=ALL Default=YES PriorityTier=2 PreemptMode=OFF
PartitionName=spot Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
"""


class Cluster:
    """Starts with the object; :meth:`stop` ends every process of it."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        self.processes: dict[str, subprocess.Popen] = {}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment = kept | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._write_files()
        try:
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D")
            for node in NODES:
                self.start_node(node)
            self.wait(lambda: self.node_states() == {"idle"}, 60, "idle nodes")
        except BaseException:
            self.stop()
            raise

    def start_node(self, node: str) -> None:
        """A slurmd with its own host name and processes: ending it is a node's power failure."""
        script = f"hostname {node} && mount --bind {self.folder}/hosts /etc/hosts && exec slurmd -D -N {node}"
        namespaces = ("--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._start(node, "unshare", *namespaces, "sh", "-c", script)

    def kill_node(self, node: str) -> None:
        """End all processes of a node at once."""
        process = self.processes.pop(node)
        process.kill()
        process.wait(timeout=30)

    def stop(self) -> None:
        """End all daemons, and with the nodes' all that runs on them."""
        for process in reversed(list(self.processes.values())):
            process.send_signal(signal.SIGKILL)
        for process in self.processes.values():
            process.wait(timeout=30)

    def client(self, *command: object, check: bool = True, **environment: str) -> str:
        """Run a client's command in the repository, in 60 s at most; returns what it prints."""
        done = subprocess.run(
            ["timeout", "60", *map(str, command)],
            cwd=self.repository,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def sbatch(self, *command: object, **environment: str) -> str:
        """Submit; returns the job's number. The job writes to ``job-NUMBER.out`` in the cluster's folder."""
        name = "%A_%a" if any(str(word).startswith("--array") for word in command) else "%j"
        output = f"--output={self.folder}/job-{name}.out"
        return self.client("sbatch", "--parsable", output, *command, **environment).split()[-1]

    def output(self, job: str) -> str:
        """What the job has printed, over all its starts."""
        path = self.folder / f"job-{job}.out"
        return path.read_text() if path.exists() else ""

    def show(self, job: str) -> dict[str, str]:
        """The job as scontrol shows it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.client("scontrol", "--oneliner", "show", "job", job)))

    def state(self, job: str) -> str:
        """The job's state, such as RUNNING."""
        return self.show(job)["JobState"]

    def node_states(self) -> set[str]:
        """The nodes' states, such as idle."""
        return set(self.client("sinfo", "--noheader", "--Node", "--format=%T", check=False).split())

    def finish(self, job: str, seconds: float = 240) -> str:
        """Wait until the job is done; returns its state."""
        running = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")
        self.wait(lambda: self.state(job) not in running, seconds, f"the end of job {job}", job)
        return self.state(job)

    def wait(self, done: Callable[[], bool], seconds: float, what: str, job: str = "") -> None:
        """Wait for a condition; fails with what is known after ``seconds``."""
        deadline = time.monotonic() + seconds
        while not done():
            logs = self.output(job) if job else (self.folder / "slurmctld.log").read_text()
            assert time.monotonic() < deadline, f"no {what} in {seconds} s; {logs[-3000:]}"
            time.sleep(0.3)

    def _write_files(self) -> None:
        folder = self.folder
        for name in ("state", "spool-node1", "spool-node2"):
            (folder / name).mkdir()
        for index in range(8):
            (folder / f"gpu{index}").touch()  # SLURM counts the GPUs by their files, and looks no further
        host = socket.gethostname().split(".")[0]
        ports = {f"{name}_port": _free_port() for name in ("ctld", "node1", "node2")}
        (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, folder=folder, **ports))
        (folder / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={folder}/gpu[0-7]\n")
        names = "".join(f"{address} {node}\n" for node, address in NODES.items())
        (folder / "hosts").write_text(f"127.0.0.1 localhost {host}\n{names}")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *options)
        self.wait_for_socket()

    def wait_for_socket(self) -> None:
        """Wait until munged answers."""
        deadline = time.monotonic() + 20
        while not (self.folder / "munge.socket").exists():
            assert time.monotonic() < deadline, (self.folder / "munged.out").read_text()
            time.sleep(0.05)

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("a") as output:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, cwd=self.folder
            )


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    programs = [name for name in PROGRAMS if not shutil.which(name)]
    if programs:
        return f"{', '.join(programs)} not installed: apt-get install slurm-wlm munge slurm-wlm-basic-plugins"
    if os.geteuid() != 0:
        return "a cluster on one machine needs root"
    done = subprocess.run(
        ["unshare", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    return f"this machine allows no namespaces: {done.stderr.strip()}" if done.returncode else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
