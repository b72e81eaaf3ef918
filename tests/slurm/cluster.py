"""A real two-node Slurm cluster on this machine: munge, slurmctld and two slurmd, each under a host name of its own.

GPUs are symlinks to /dev/null: Slurm schedules them, the jobs compute on the CPU.  Needs root and Debian's packages
(``make test-slurm`` installs them).
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

NODES = {"nodeA": "127.0.0.11", "nodeB": "127.0.0.12"}
#: Slurm knows them and their 32 GPUs, and nobody starts them: jobs for them are queued and wait
ABSENT = "NodeName=absent[1-4] NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=1000 Gres=gpu:8 State=DOWN Reason=absent"
PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged", "unshare")
HOSTS = Path("/etc/hosts")
REPOSITORY = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
#: with it Slurm tracks processes as most clusters do, and sends a signal to its own child alone
FREEZER = Path("/sys/fs/cgroup/freezer")
PATIENCE = 900.0
"""Seconds after which a wait gives up: many times what an idle machine needs, because a busy one needs them."""

SLURM_CONF = """
ClusterName=ladirtest
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=100
PartitionName=large Nodes=absent[1-4] MaxTime=INFINITE State=UP
"""


class Cluster:
    """Commands on the running cluster; every wait has a limit and fails with the state and the end of the logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command from the repository's folder with ``variables`` added to the environment.

        What only asks is asked again where the controller, on a busy machine, has closed the connection.
        """
        for _ in range(5):
            result = subprocess.run(
                command, capture_output=True, text=True, env={**self.environment, **variables}, cwd=REPOSITORY, timeout=60
            )
            if result.returncode != -signal.SIGPIPE or command[:2] not in (("scontrol", "show"), ("squeue", "--noheader")):
                break
            time.sleep(1)
        if check and result.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: status {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def start(self, *command: str, stdout: IO[str]) -> subprocess.Popen[str]:
        """A command from the repository's folder that goes on beside the test."""
        return subprocess.Popen(command, stdout=stdout, text=True, env=self.environment, cwd=REPOSITORY)

    def submit(self, *arguments: str, **variables: str) -> str:
        """``sbatch arguments``; returns the job id."""
        return self.run("sbatch", "--parsable", *arguments, **variables).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job).stdout))

    def known(self) -> set[str]:
        """Ids of all jobs that were ever queued, those that have ended included."""
        return set(self.run("squeue", "--noheader", "--states=all", "--format=%i").stdout.split())

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        start = f"hostname {name} && exec slurmd -N {name} -f {self.folder}/slurm.conf"
        if "proctrack/cgroup" in (self.folder / "slurm.conf").read_text():  # each node has its own, as on a machine of its own
            own = FREEZER / f"{self.folder.name}-{name}"
            own.mkdir(exist_ok=True)
            start = f"mount --bind {own} {FREEZER} && {start}"
        self.run("unshare", "--uts", "--mount", "sh", "-c", start)

    def lose_node(self, name: str) -> None:
        """Kill what runs on a node, as if its power had failed, and have Slurm know at once.

        Those who would tell of another's end go first: the daemon, then the steps' managers, then the jobs.
        """
        doomed: dict[str, list[psutil.Process]] = {"slurmd": [], "slurmstepd": [], "job": []}
        for process in _processes(self):
            with contextlib.suppress(psutil.Error):
                program = process.name()
                if program == "slurmd" and name in process.cmdline():
                    doomed[program].append(process)
                elif program not in doomed and process.environ().get("SLURMD_NODENAME") == name:
                    doomed["job"].append(process)
                    doomed["slurmstepd"] += _managers(process)
        for processes in doomed.values():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(processes, timeout=10)
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

    def state(self, job: str) -> str:
        """Its state, e.g. RUNNING."""
        return self.job(job)["JobState"]

    def wait(self, job: str, seconds: float = PATIENCE) -> str:
        """Wait until the job has ended; returns its state."""
        self.until(lambda: self.state(job) in ENDED, f"job {job} to end", job, seconds)
        return self.state(job)

    def until(self, condition: Callable[[], bool], what: str, job: str, seconds: float = PATIENCE) -> None:
        """Poll ``condition``; fails when it does not hold in time, or when the job has ended without it."""
        end = time.monotonic() + seconds
        while not condition():
            ended = self.state(job) in ENDED and not condition()
            if ended or time.monotonic() > end:
                raise AssertionError(
                    f"{'job ended while waiting' if ended else f'waited {seconds:.0f} s'} for {what}\n{self.report(job)}"
                )
            time.sleep(0.1)

    def report(self, job: str) -> str:
        """A job's state and the end of its log."""
        record = self.run("scontrol", "show", "job", "-o", job, check=False).stdout
        log = Path(self.job(job).get("StdOut", "/nowhere"))
        text = log.read_text(errors="replace") if log.is_file() else ""
        return f"{record}\n{text[-6000:]}"


def missing() -> list[str]:
    """What this machine lacks for a cluster."""
    lacks = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        lacks.append("root (slurmd starts jobs as other users)")
    return lacks


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start the cluster, wait until both nodes are idle; stop every daemon at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ladir-slurm-"))
    folder.chmod(0o755)  # munge refuses sockets behind closed folders
    with _host_names():
        cluster = Cluster(folder)
        try:
            _start(cluster)
            yield cluster
        finally:
            _stop(cluster)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _host_names() -> Iterator[None]:
    own = [f"{address} {name}" for name, address in NODES.items()]
    HOSTS.write_text("\n".join([*HOSTS.read_text().splitlines(), *own]) + "\n")
    try:
        yield
    finally:
        lines = HOSTS.read_text().splitlines()
        for line in own:  # once each: another cluster may need the same
            lines.remove(line)
        HOSTS.write_text("\n".join(lines) + "\n")


def _start(cluster: Cluster) -> None:
    folder = cluster.folder
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    for number in range(8):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    ports = _free_ports(2 + len(NODES))
    nodes = [
        f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs=8 RealMemory=1000 Gres=gpu:8 State=UNKNOWN"
        for (name, address), port in zip(NODES.items(), ports[2:], strict=True)
    ]
    nodes.append(ABSENT.format(port=ports[1]))
    proctrack = "cgroup" if _has_freezer() else "linuxproc"
    facts = {"host": socket.gethostname(), "port": ports[0], "folder": folder, "proctrack": proctrack}
    conf = SLURM_CONF.format(**facts, names=",".join(NODES), nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={FREEZER.parent}\n")
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    cluster.run("munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", *files)
    cluster.run("slurmctld", "-f", str(folder / "slurm.conf"))
    for name in NODES:
        (folder / f"spool-{name}").mkdir()
        cluster.start_node(name)
    end = time.monotonic() + 30
    while (
        cluster.run("sinfo", "--noheader", "--Node", "--format=%T", "--partition=gpu", check=False).stdout.split() != ["idle"] * 2
    ):
        if time.monotonic() > end:
            logs = [file.read_text()[-2000:] for file in sorted(folder.glob("*.log"))]
            raise AssertionError("the cluster did not start:\n" + "\n".join(logs))
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _stop(cluster: Cluster) -> None:
    """Cancel all jobs, wait until they are gone, end the daemons; by force what is left of them after that."""
    cluster.run("scancel", "--user=root", check=False)
    _wait_while(lambda: cluster.run("squeue", "--noheader", check=False).stdout != "", seconds=20)
    for process in _processes(cluster):
        process.terminate()
    _wait_while(lambda: bool(_processes(cluster)), seconds=10)
    for process in _processes(cluster):
        process.kill()
    _wait_while(lambda: bool(_processes(cluster)), seconds=10)
    groups = sorted(FREEZER.glob(f"{cluster.folder.name}-*/**/"), reverse=True)
    _wait_while(lambda: _killed(groups) > 0, seconds=10)
    for group in groups:
        group.rmdir()


def _killed(groups: list[Path]) -> int:
    """Kill what is left in control groups (a killed manager leaves its job frozen or half begun); returns its number."""
    left = [int(pid) for group in groups for pid in (group / "cgroup.procs").read_text().split()]
    for group in groups:
        if (group / "freezer.state").is_file():  # not in the root
            (group / "freezer.state").write_text("THAWED")
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(left)


def _has_freezer() -> bool:
    """Whether processes can be tracked by cgroups here; told where they cannot."""
    probe = FREEZER / f"ladir-probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        warnings.warn(f"{error}: this cluster sends signals to all processes of a step, others do not", stacklevel=2)
        return False
    return True


def _processes(cluster: Cluster) -> list[psutil.Process]:
    """Daemons, steps' managers and job processes of this cluster, known by the configuration in their environment.

    A manager has written its title over its environment: it is known by the processes that it started.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == cluster.environment["SLURM_CONF"] and process.pid != os.getpid():
                found[process.pid] = process
                found |= {manager.pid: manager for manager in _managers(process)}
    return list(found.values())


def _managers(process: psutil.Process) -> list[psutil.Process]:
    """Those of the step that a process belongs to."""
    return [parent for parent in process.parents() if parent.name() == "slurmstepd"]


def _wait_while(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while condition() and time.monotonic() < end:
        time.sleep(0.2)
