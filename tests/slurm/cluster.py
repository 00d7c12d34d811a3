"""A real Slurm on the hosts of a cluster: a controller on the first, slurmd on all, and nothing of it on disk.

Partitions: `all`, the default; `safe`, the first host; `spot`, the others, whose jobs are requeued, 5 seconds after a
notice, for those of `urgent`. A host that does not answer for 5 s is down, and a requeued job waits for 5 s, not for
minutes.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.hosts import cluster as machine
from tests.hosts import furnish
from tests.hosts.cluster import Host
from tests.support.limits import stretch

GRACE = 5  # seconds from the notice of a preemption to the end
PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"}
SETTINGS = "/etc/slurm"
MUNGE = [f"--{name}-file=/run/munge/{name}" for name in ("key", "pid", "log", "seed")]
CONFIGURATION = """
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
MailProg=/bin/true
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=5
KillWait=5
NodeName=DEFAULT CPUs=2
NodeName={nodes}
PartitionName=all Nodes={nodes} Default=YES PreemptMode=OFF
PartitionName=safe Nodes={first} PreemptMode=OFF
PartitionName=spot Nodes={others} PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes={others} PriorityTier=10 PreemptMode=OFF
"""


@contextlib.contextmanager
def slurm(hosts: Sequence[Host]) -> Iterator[None]:
    """Slurm on two hosts or more; all of it ends at the latest with the hosts.

    Raises RuntimeError, with what its daemons say, if they do not come up.
    """
    names = [host.name for host in hosts]
    text = CONFIGURATION.format(first=names[0], others=",".join(names[1:]), nodes=",".join(names), grace=GRACE)
    key = secrets.token_bytes(128)
    daemons = []
    try:
        for host in hosts:
            settle(host, text, key)
            daemons.append(daemon(host, "munged", "--foreground", "--force", *MUNGE))
        daemons.append(daemon(hosts[0], "slurmctld", "-D"))
        daemons += [daemon(host, "slurmd", "-D") for host in hosts]
        try:
            wait_for(lambda: idle(hosts[0]) == len(hosts), 20, "idle nodes")
        except AssertionError as error:
            raise RuntimeError(f"{error}\n{said(hosts)}") from None
        yield
    finally:
        for process in daemons:
            process.kill()
            process.wait(stretch(30))


def settle(host: Host, configuration: str, key: bytes) -> None:
    """What Slurm and munge need on a host, in its own memory."""
    furnish.do(host.first.pid, ["mount", "-t", "tmpfs", "tmpfs", SETTINGS])
    root = furnish.root(host.first.pid)
    (root / SETTINGS.lstrip("/") / "slurm.conf").write_text(configuration)
    for folder in ("munge", "slurm", "slurm/state", "slurm/spool"):
        (root / "run" / folder).mkdir()
    (root / "run/munge/key").touch(mode=0o600)
    (root / "run/munge/key").write_bytes(key)


def daemon(host: Host, name: str, *options: str) -> subprocess.Popen[bytes]:
    """Start a daemon, which says what it says in the host's own memory."""
    program = furnish.program(name)
    assert program is not None
    with (furnish.root(host.first.pid) / "run/slurm" / f"{name}.said").open("wb") as output:
        return host.popen([program, *options], cwd="/", stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def said(hosts: Sequence[Host]) -> str:
    """What the daemons of the hosts that are up have said."""
    logs = [log for host in hosts for log in furnish.root(host.first.pid).glob("run/slurm/*.said")]
    return "\n".join(f"--- {log}\n{log.read_text()}" for log in logs)


def idle(host: Host) -> int:
    """How many nodes are idle."""
    return host.run(["sinfo", "-h", "-N", "-p", "all", "-t", "idle", "-o", "%N"]).stdout.count("\n")


def wait_for(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Return once something is true. Raises AssertionError if it is not within so many seconds."""
    until = time.monotonic() + stretch(seconds)
    while not true():
        assert time.monotonic() < until, f"no {what} within {stretch(seconds)} s"
        time.sleep(0.1)


def submit(host: Host, environ: Mapping[str, str], folder: Path, *line: str) -> str:
    """sbatch on a host, in a folder; the number of the job."""
    done = host.run(["sbatch", "--parsable", *line], environ, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def job(host: Host, number: str) -> dict[str, str]:
    """What Slurm knows of a job."""
    done = host.run(["scontrol", "--oneliner", "show", "job", number])
    assert done.returncode == 0, done.stderr
    return dict(word.partition("=")[::2] for word in done.stdout.split() if "=" in word)


def missing() -> str | None:
    """What this machine lacks for a Slurm, in words; None if nothing."""
    for name, package in PROGRAMS.items():
        if furnish.program(name) is None:
            return f"Slurm needs the program {name} (package {package})"
    return machine.missing()
