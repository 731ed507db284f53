"""A Slurm of the tests' own: munged, slurmctld and one slurmd a node, all on this machine and in one temporary folder.

The nodes are called by addresses of the loopback network: names that can be resolved, as those of a cluster can.
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
# 5 is the least that Slurm takes for cred_expire, which is also how long a requeued job waits (120 s by default).
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


def why_no_slurm() -> str | None:
    """What is missing for a cluster on this machine, or None."""
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(name, path=_path())]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd has to be started by root"


class Slurm:
    """A running cluster, whose partition `urgent` preempts the jobs of the default one."""

    def __init__(self, folder: Path) -> None:
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    def run(self, *command: str | Path, folder: Path = ROOT, **more: str) -> str:
        """What one of Slurm's commands prints, called from `folder`; `more` goes to its environment."""
        words, environment = [*map(str, command)], self.environment | more
        found = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert found.returncode == 0, found.stderr
        return found.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED ..."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        fields = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return next(field.removeprefix(f"{name}=") for field in fields if field.startswith(f"{name}="))


def wait_for(what: Callable[[], object], seconds: float = 300) -> None:
    """Until `what()` is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Started in `folder`, and gone with all its jobs at the end."""
    ports = _free_ports(1 + len(NODES))
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
        daemons.enter_context(_daemon(slurm, "munged", "--foreground", "--force", *options))
        wait_for((folder / "munge.socket").exists)
        daemons.enter_context(_daemon(slurm, "slurmctld", "-D"))
        for node in NODES:
            daemons.enter_context(_daemon(slurm, "slurmd", "-D", "-N", node))
        wait_for(lambda: slurm.run("sinfo", "--noheader", "--format=%T %D") == f"idle {len(NODES)}")
        yield slurm
        slurm.run("scancel", "--state=PENDING")
        slurm.run("scancel", "--state=RUNNING")
        wait_for(lambda: not slurm.run("squeue", "--noheader"))


@contextmanager
def _daemon(slurm: Slurm, *command: str) -> Iterator[None]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=slurm.environment, **quiet)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _path() -> str:
    """Debian has the daemons where only root looks."""
    return f"{os.environ['PATH']}:/usr/sbin"
