"""Naming the rank behind a slow link, from what kernels count of the ranks' connections."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from hvdtrain.diagnosis.links import find_slow_link
from hvdtrain.diagnosis.straggler import CORE, STOLEN_INDEX, StepTimes, find_straggler, group_steps
from hvdtrain.system.tcp_info import TcpMonitor, TcpTraffic
from tests.support.limits import stretch

STEPS, STEP = 20, 0.1


def build_times(ranks: int, wait: float) -> StepTimes:
    """(steps, ranks, parts): all ranks wait alike."""
    return np.tile([0.0, STEP - wait, wait, 0.0, 0.0], (STEPS, ranks, 1))


def build_ring(ranks: int, slow: set[int], busy: float) -> list[list[TcpTraffic]]:
    """Each rank sends 1 MB a step to the next one, and little back; `slow` ranks keep bytes under way for `busy`."""
    traffic: list[list[TcpTraffic]] = [[] for _ in range(ranks)]
    for rank in range(ranks):
        other = (rank + 1) % ranks
        near, far = f"10.0.0.{rank}:{1000 + other}", f"10.0.0.{other}:{2000 + rank}"
        seconds = busy if {rank, other} & slow else 0.01
        if rank in slow:
            seconds *= 1.2
        traffic[rank].append(TcpTraffic(near, far, STEPS * 10**6, seconds, STEPS * 10**6 / seconds))
        traffic[other].append(TcpTraffic(far, near, 1000, seconds, 1e5))
        traffic[rank].append(TcpTraffic(f"10.0.0.{rank}:9", "10.9.9.9:22", 10**9, 2.0, 1e9))  # of another program
    return traffic


@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_the_rank_behind_a_slow_link_is_named(ranks: int) -> None:
    rank = random.randrange(ranks)
    found = find_slow_link(build_times(ranks, 0.08), build_ring(ranks, {rank}, 1.5))
    assert found is not None and (found.rank, found.cause) == (rank, "link")
    assert found.cost == pytest.approx(0.08) and "Mbit/s, the others 1.6e+04" in found.detail


@pytest.mark.parametrize(
    "wait, slow, busy",
    [(0.001, {1}, 1.5), (0.08, set(), 1.5), (0.08, {0, 1, 2, 3}, 1.5), (0.08, {1}, 0.2)],
    ids=["nobody waits", "all are fast", "all are slow", "it explains little of the wait"],
)
def test_nobody_is_named_without_reason(wait: float, slow: set[int], busy: float) -> None:
    assert find_slow_link(build_times(4, wait), build_ring(4, slow, busy)) is None


def test_a_rank_that_is_kept_from_running_is_named_even_if_it_waits() -> None:
    """Time is stolen wherever the rank is, also while it waits, and is noticed a step late at times."""
    times = build_times(4, 0.06)
    times[:, 2, STOLEN_INDEX] = [0.0 if step % 2 else 0.12 for step in range(STEPS)]
    found = find_straggler(group_steps(times))
    assert found is not None and (found.rank, found.cause) == (2, CORE)
    times[:, 2, STOLEN_INDEX] = 0
    times[3, 2, STOLEN_INDEX] = 2.0  # once
    assert find_straggler(group_steps(times)) is None


def test_traffic_of_this_process_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            monitor = TcpMonitor()
            client.sendall(b"x" * 1000)
            assert len(accepted.recv(2000)) > 0
            port = client.getsockname()[1]
            own = next(one for one in monitor.read_changes() if one.local == f"127.0.0.1:{port}")
            assert own.delivered == 1000 and own.busy >= 0
            assert not any(one.local == f"127.0.0.1:{port}" for one in monitor.read_changes())


STOPPED = """
import sys, threading, time
from hvdtrain.system.stolen_time import StolenTimeMonitor
monitor, stop = StolenTimeMonitor(), threading.Event()
def beat():
    while not monitor.sleep(stop, 0.02): pass
thread = threading.Thread(target=beat); thread.start()
time.sleep(0.1); monitor.take()
print("ready", flush=True); sys.stdin.readline()
time.sleep(0.2); stop.set(); thread.join()
print(monitor.take())
"""


def test_the_time_of_a_stopped_process_is_stolen() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGCONT)
        out, _ = process.communicate("\n", timeout=stretch(30))
        assert float(out) > 0.4
