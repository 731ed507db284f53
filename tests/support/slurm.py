"""A Slurm cluster for tests: munged, slurmctld and one slurmd per node, on this machine and in a temporary folder.

The nodes are named by loopback addresses, since node names have to resolve.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
NODES = ("127.0.0.1", "127.0.0.2")
# A requeued job waits for cred_expire (120 s by default); 5 is the minimum.
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SchedulerParameters=sched_interval=1,bf_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES State=UP GraceTime=20
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


def get_missing_requirements() -> str | None:
    """Return what this machine lacks to run a cluster, or None."""
    missing = [
        name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=_build_path())
    ]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd has to be started by root"


class Slurm:
    """A running cluster, whose partition `urgent` preempts the jobs of the default one."""

    def __init__(self, folder: Path) -> None:
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _build_path()}

    def run(self, *command: str | Path, folder: Path = ROOT, **variables: str) -> str:
        """Run a command of Slurm in `folder` and return its output. variables: added to its environment."""
        arguments, environment = [*map(str, command)], self.environment | variables
        result = subprocess.run(
            arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def get_state(self, job: str) -> str:
        """Return the job state: PENDING, RUNNING, COMPLETED ..."""
        return self.get_field(job, "JobState")

    def get_field(self, job: str, name: str) -> str:
        """Return a field of `scontrol show job`."""
        fields = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return next(field.removeprefix(f"{name}=") for field in fields if field.startswith(f"{name}="))


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    """Wait until `condition()` is true; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


@contextmanager
def start_cluster(folder: Path) -> Iterator[Slurm]:
    """Start a cluster in `folder`; at the end cancel all jobs and stop it."""
    ports = _find_free_ports(1 + len(NODES))
    nodes = "".join(
        f"NodeName={node} NodeHostname={socket.gethostname()} CPUs=4 Port={port} State=UNKNOWN\n"
        for node, port in zip(NODES, ports[1:])
    )
    conf = CONF.format(host=socket.gethostname(), port=ports[0], folder=folder) + nodes
    (folder / "slurm.conf").write_text(conf, encoding="utf-8")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)
    slurm = Slurm(folder)
    with ExitStack() as daemons:
        munge = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={folder}/munge.{name}" for option, name in munge.items()]
        daemons.enter_context(_start_daemon(slurm, "munged", "--foreground", "--force", *options))
        wait_for((folder / "munge.socket").exists)
        daemons.enter_context(_start_daemon(slurm, "slurmctld", "-D"))
        for node in NODES:
            daemons.enter_context(_start_daemon(slurm, "slurmd", "-D", "-N", node))
        wait_for(lambda: slurm.run("sinfo", "--noheader", "--format=%T %D") == f"idle {len(NODES)}")
        yield slurm
        slurm.run("scancel", "--state=PENDING")
        slurm.run("scancel", "--state=RUNNING")
        wait_for(lambda: not slurm.run("squeue", "--noheader"))


@contextmanager
def _start_daemon(slurm: Slurm, *command: str) -> Iterator[None]:
    no_output = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=slurm.environment, **no_output)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _find_free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _build_path() -> str:
    """Return PATH with /usr/sbin, where Debian installs the daemons."""
    return f"{os.environ['PATH']}:/usr/sbin"
