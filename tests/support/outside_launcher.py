"""A launcher and a scheduler of a distribution other than hvdtrain: all that such a distribution has to write.

`spawn` starts the ranks as processes of this host; run as a program, it is what `hvdtrain launch` starts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

from hvdtrain.launch.hosts import Host
from hvdtrain.launch.launcher import Launcher, LaunchPlan, register_launcher
from hvdtrain.launch.output import OutputFormat
from hvdtrain.launch.scheduler import Scheduler, register_scheduler


@register_launcher
class Spawn(Launcher):
    """Labels the lines of its ranks `<0> text`."""

    name = "spawn"
    help = "spawn starts processes of this host."
    output = OutputFormat(
        label=re.compile(rb"<(?P<rank>\d+)> "),
        rank_exits=(re.compile(r"spawn: rank (?P<rank>\d+) ended: (?P<code>\d+)"),),
    )

    def command_line(self, plan: LaunchPlan) -> list[str]:
        return [sys.executable, __file__, str(plan.num_ranks), *plan.command]


@register_scheduler
class Desk(Scheduler):
    """A batch system whose jobs have all in one variable: `DESK_HOSTS="a 2 b 1"`."""

    name = "desk"
    variable = "DESK_HOSTS"
    slots_help = "its seats"

    def read_hosts(self, environ: Mapping[str, str]) -> list[Host]:
        words = environ[self.variable].split()
        return [Host(name, int(slots)) for name, slots in zip(words[::2], words[1::2], strict=True)]


def spawn_ranks(size: int, command: list[str]) -> int:
    """Run a command as `size` ranks that meet at a server here; return 1 if one failed."""
    from hvdtrain.comm.rendezvous import RendezvousServer

    server = RendezvousServer("127.0.0.1", {})
    common = {
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server.port),
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        **{f"HOROVOD_{name}SIZE": str(size) for name in ("", "LOCAL_")},
    }
    ranks, copies = [], []
    for rank in range(size):
        own = {f"HOROVOD_{name}RANK": str(rank) for name in ("", "LOCAL_")}
        process = subprocess.Popen(command, env={**os.environ, **common, **own}, stdout=subprocess.PIPE, text=True)
        copies.append(threading.Thread(target=label_lines, args=[rank, process]))
        copies[-1].start()
        ranks.append(process)
    while None in (codes := [process.poll() for process in ranks]) and not any(codes):
        time.sleep(0.05)
    for rank, process in enumerate(ranks):
        if process.returncode:
            print(f"spawn: rank {rank} ended: {process.returncode}", file=sys.stderr)
        process.terminate()
    for copy in copies:
        copy.join()
    server.stop_serving()
    return int(any(process.wait() for process in ranks))


def label_lines(rank: int, process: subprocess.Popen[str]) -> None:
    """Print each line of a rank behind its number."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(f"<{rank}> {line.lstrip(chr(13))}")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(spawn_ranks(int(sys.argv[1]), sys.argv[2:]))
