"""The doctor of one host, and what it makes of facts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.doctor import ask, preflight
from hvdtrain.doctor.ask import HostReply
from hvdtrain.doctor.facts import Facts, FactsRequest, connect_back_error, gather_disk_facts, gather_facts
from hvdtrain.doctor.findings import DoctorFinding, diagnose_host, diagnose_hosts, format_bytes
from hvdtrain.doctor.judge import diagnose_network, outlier_links
from hvdtrain.doctor.measure import (
    LinkMeasurement,
    NetworkMeasurements,
    Pair,
    choose_extra_pairs,
    choose_pairs,
    schedule_rounds,
)
from hvdtrain.doctor.meeting import Coordinator
from hvdtrain.doctor.nics import parse_routes
from hvdtrain.doctor.peer import WORKER_COMMANDS, compute_rate, run_worker
from hvdtrain.doctor.report import describe_host, format_verdict
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.processes import Child, Deadline, completed_children
from tests.ranks.harness import ROOT


@pytest.fixture(scope="module")
def facts() -> Facts:
    """This host's, with what may be wrong with it put right."""
    return gather_facts(FactsRequest()) | {"own name": ["10.0.0.7"], "load": 0.1, "memory free": 1 << 34}


def texts(found: list[DoctorFinding]) -> list[str]:
    return [str(finding) for finding in found]


def test_facts_come_quickly_without_torch_and_can_be_told() -> None:
    code = (
        "import sys, time, json; from hvdtrain.doctor.facts import FactsRequest, gather_facts\n"
        "tries = []\n"
        "for _ in range(4):\n"
        "    begin = time.perf_counter()\n"
        "    facts = gather_facts(FactsRequest(('runs',)))\n"
        "    tries.append(time.perf_counter() - begin)\n"
        "assert not {'torch', 'horovod', 'rich'} & set(sys.modules)\n"
        "print(min(tries)); print(json.dumps(facts))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, told = done.stdout.splitlines()
    assert float(seconds) < 0.5
    facts = json.loads(told)
    assert facts["hostname"] == socket.gethostname() and facts["executable"] == sys.executable
    assert facts["torch"] and facts["wheel"].startswith("horovod0.28.1-torch")
    assert facts["cores"] and facts["memory"] > facts["memory free"] > 0 and "lo" in facts["interfaces"]
    assert describe_host(facts).startswith(f"host        {facts['hostname']} (")


def test_doctor_without_hosts_reports_the_same_in_text_and_json(tmp_path: Path) -> None:
    """Whatever this machine has, the report holds together, and --json says the same."""
    command = [sys.executable, "-m", "hvdtrain", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == told.stderr == ""
    report = json.loads(told.stdout)
    assert f"torch       {report['facts']['torch']}" in done.stdout
    assert done.returncode == told.returncode == int(any(finding["bad"] for finding in report["findings"]))
    assert (report["verdict"] == "all fine") == (not report["findings"])
    assert done.stdout.splitlines()[-1].startswith(("all fine", "warning: ", "Horovod"))


def test_a_healthy_host_is_all_fine(facts: Facts) -> None:
    assert diagnose_host(facts) == [] and format_verdict([]) == "all fine"
    assert diagnose_hosts([HostReply("h0", facts), HostReply("h1", facts | {"hostname": "h1"})], "lo") == []


NOTHING = {"free": 1 << 40, "total": 1 << 41, "wrong": None}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"horovod wrong": "no torch: pip install torch"}, "no torch: pip install torch"),
        ({"built with": None}, "warning: Horovod was not built by hvdtrain: over several hosts it may fail; run `hvd"),
        ({"disks": {"/x": NOTHING | {"free": 4096}}}, "the disk is full: 4 KiB is free in /x"),
        ({"disks": {"/x": NOTHING | {"wrong": "no inode is left"}}}, "nothing can be written in /x: no inode is left"),
        ({"shared memory": NOTHING | {"free": 64 << 20}}, "warning: 64 MiB is free in /dev/shm: give the container"),
        ({"memory free": 1 << 20}, "warning: 1 MiB of memory is free"),
        ({"load": 999.0}, "warning: it is busy: load 999.0 on "),
        ({"limits": {"nofile": 256, "memlock": None}}, "warning: 256 files may be open at once: ulimit -n 65536"),
        ({"infiniband": ["mlx5_0"], "limits": {"nofile": None, "memlock": 65536}}, "warning: InfiniBand, and 64 KiB"),
        ({"gpus": ["nvidia-smi fails: no driver"]}, "nvidia-smi fails: no driver: mend the driver"),
        (
            {"gpus": ["H200"], "driver cuda": "11.4", "torch cuda": "13.0"},
            "the GPU driver knows CUDA 11.4 at most, torch",
        ),
        ({"own name": [], "built with": None, "horovod": None}, "warning: its own name does not resolve"),
    ],
)
def test_what_is_wrong_with_one_host_is_told(facts: Facts, changed: dict[str, Any], expected: str) -> None:
    found = diagnose_host(facts | changed)
    assert len(found) == 1, found
    assert format_verdict(found).startswith(expected)


def test_the_odd_host_is_named(facts: Facts) -> None:
    other = facts | {"torch": "2.9.0+cu128", "horovod wrong": "Horovod is built for another torch"}
    well, odd = (
        [HostReply(f"h{number}", facts | {"torch": "2.14.1+cu130"}) for number in range(4)],
        HostReply("h7", other),
    )
    expected = "host h7: torch 2.9.0, the other 4 have 2.14.1"
    assert texts(diagnose_hosts([*well, odd])) == texts(diagnose_hosts([odd, *well])) == [expected]
    # Of two hosts nobody knows which is right: the first one counts.
    assert texts(diagnose_hosts([well[0], odd])) == ["host h7: torch 2.9.0, h0 has 2.14.1"]
    # A patch of Python makes no difference, a wheel does; one finding for one host.
    same, wheel = (
        HostReply("h8", facts | {"python": "3.11.99"}),
        HostReply("h9", facts | {"wheel": "w", "mpi": "MPICH 4"}),
    )
    python = {"python": "3.11.1"}
    found = diagnose_hosts([HostReply("h0", facts | python), HostReply("h1", facts | python), same, wheel])
    assert [finding.where for finding in found if "Python" not in finding.text] == ["host h9"]
    assert "MPICH 4, the other 3 have" in found[0].text


def test_the_worst_comes_first(facts: Facts) -> None:
    found = diagnose_hosts(
        [
            HostReply("h0", facts, clock_offset=-3.5),
            HostReply("h1", facts | {"way back": "no answer within 3 s"}),
            HostReply("h2", facts | {"own name": ["127.0.1.1"], "hostname": "h2"}),
            HostReply("h3", error="cannot be reached: No route to host"),
        ],
        "lo",
    )
    assert texts(found) == [
        "host h3: cannot be reached: No route to host",
        "host h1: cannot connect to this host: no answer within 3 s; is there a firewall?",
        "host h0: its clock is 4 s behind this host's: set it by NTP",
        "host h2: its own name h2 is 127.0.1.1 there: give it its network address in /etc/hosts",
    ]
    assert [finding.bad for finding in found] == [True, True, False, False]
    assert format_verdict(found[2:]).startswith("warning: host h0: its clock")


def test_a_clock_is_judged_by_when_it_can_have_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for ahead, expected in ((0.0, 0.0), (100.0, 100.0), (-100.0, -100.0)):
        text = (
            f"{ask.parse_facts.__module__}: motd\n##hvdtrain-facts {json.dumps({'time': time.time() + ahead})}\nbye\n"
        )
        with Child(["printf", "%s", text]) as ssh:
            assert list(completed_children([ssh], Deadline(10.0))) == [ssh]
            ssh.started_at -= 0.5
            answer = ask.parse_reply("h1", ssh, Deadline(10.0))
        assert answer.clock_offset == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (
            255,
            "ssh: Could not resolve hostname h9: Name or service not known\n",
            "cannot be reached: Could not resolve",
        ),
        (255, "Connection timed out during banner exchange\r\nConnection to h9 port 22 timed out\r\n", "takes connec"),
        (127, "sh: 1: no\n", "cannot run "),
        (1, "python: No module named hvdtrain.doctor.facts\n", "has no hvdtrain in "),
        (1, "(ModuleNotFoundError: No module named 'hvdtrain')\n", "has no hvdtrain in "),
        (
            1,
            "ImportError: cannot import name 'FactsRequest' from 'hvdtrain.doctor.facts' (x.py)\n",
            "has no hvdtrain in ",
        ),
        (93, "", f"has no folder {Path.cwd()}, which the ranks start in"),
    ],
)
def test_ssh_errors_are_explained(code: int, said: str, expected: str) -> None:
    assert ask.explain_failure(code, said).startswith(expected)


def test_preflight_leaves_this_host_alone_and_knows_the_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "Child", None)
    preflight.check_hosts(["localhost", socket.gethostname()], nic="lo")
    with pytest.raises(UserError, match="has no network interface 'nic9' with an IPv4 address"):
        preflight.check_hosts(["h-nowhere"], nic="nic9")
    assert preflight.parse_run_dir(["bench", "step"]) == []
    assert preflight.parse_run_dir(["train", "digits"]) == ["runs"]
    assert preflight.parse_run_dir(["train", "digits", "--run-dir", "a", "--lr", "1"]) == ["a"]
    assert preflight.parse_run_dir(["train", "digits", "--run-dir=b"]) == ["b"]


def test_preflight_names_a_host_that_does_not_resolve() -> None:
    with pytest.raises(RunError, match=r"^host nowhere\.invalid: cannot be reached: \S.*$"):
        preflight.check_hosts(["localhost", "nowhere.invalid"])


def test_sizes_routes_disks_and_connections_are_described(tmp_path: Path) -> None:
    sizes = [format_bytes(count) for count in (0, 1000, 1023 << 10, 64 << 20, 3 << 40)]
    assert sizes == ["0 B", "1000 B", "1023 KiB", "64 MiB", "3 TiB"]
    lines = ["Iface ...", "eth0 00000000 010200C0 3 0 0 0 00000000 0", "eth0 000200C0 00000000 1 0 0 0 00FFFFFF 0"]
    if sys.byteorder == "little":
        assert parse_routes("\n".join(lines)) == ["default via 192.0.2.1 dev eth0", "192.0.2.0/24 dev eth0"]
    assert gather_disk_facts(tmp_path / "not" / "there") == gather_disk_facts(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert connect_back_error(*server.getsockname()) is None
        port = server.getsockname()[1]
    assert connect_back_error("127.0.0.1", port) == "Connection refused"


NAMES = [f"h{number}" for number in range(9)]


def ways(hosts: int, changed: dict[Pair, LinkMeasurement]) -> dict[Pair, LinkMeasurement]:
    """All ways of some hosts at about 1 Gbit/s; those changed given one way round or both."""
    pairs = [(one, other) for one in range(hosts) for other in range(hosts) if one != other]
    return {pair: changed.get(pair, LinkMeasurement(1e-4, 9.3e8 - 1e7 * sum(pair))) for pair in pairs}


def both(*pairs: Pair, way: LinkMeasurement) -> dict[Pair, LinkMeasurement]:
    return {ends: way for one, other in pairs for ends in ((one, other), (other, one))}


SLOW, LATE, CUT = LinkMeasurement(1e-4, 9.4e6), LinkMeasurement(40e-3, 9e8), LinkMeasurement(error="no answer")


@pytest.mark.parametrize(
    ("hosts", "changed", "expected"),
    [
        (4, {}, []),
        (4, both((1, 3), way=SLOW), ["link h1-h3: 9.4 Mbit/s, the others 900"]),
        (4, {(1, 3): SLOW}, ["link h1-h3: 9.4 Mbit/s, the others 900"]),
        (4, both((0, 2), (1, 2), (2, 3), way=SLOW), ["host h2: 9.4 Mbit/s, the others 900"]),
        (3, both((0, 2), (1, 2), way=SLOW), ["host h2: 9.4 Mbit/s, the others 920"]),
        (4, {(2, 0): SLOW, (2, 1): SLOW, (2, 3): SLOW}, ["host h2: sends 9.4 Mbit/s, the others 900"]),
        (4, {(0, 2): SLOW, (1, 2): SLOW, (3, 2): SLOW}, ["host h2: receives 9.4 Mbit/s, the others 900"]),
        (2, {(0, 1): SLOW}, ["link h0-h1: 9.4 Mbit/s, the others 920"]),
        (4, both((1, 3), way=LATE), ["link h1-h3: a round trip takes 40 ms, on the others 0.1"]),
        (
            4,
            both((1, 3), way=CUT),
            ["link h1-h3: h1 and h3 cannot connect to each other: no answer; is there a firewall?"],
        ),
        (4, {(3, 1): CUT}, ["link h1-h3: h3 cannot connect to h1: no answer; is there a firewall?"]),
        (
            4,
            both((0, 3), (1, 3), (2, 3), way=CUT) | {(0, 1): SLOW},
            [
                "host h3: 6 of its connections fail, the first from h0 to h3: no answer; is there a firewall?",
                "link h0-h1: 9.4 Mbit/s, the others 910",
            ],
        ),
    ],
)
def test_the_bad_host_or_link_is_named(hosts: int, changed: dict[Pair, LinkMeasurement], expected: list[str]) -> None:
    measured = NetworkMeasurements(dict.fromkeys(range(hosts), 1.1), ways(hosts, changed))
    assert texts(diagnose_network(measured, NAMES)) == expected
    assert set(outlier_links(measured.links)) == set(changed)


def test_a_busy_host_explains_its_slow_links() -> None:
    slow = both((0, 2), (1, 2), (2, 3), way=SLOW)
    measured = NetworkMeasurements(
        {0: 1.0, 1: 1.2, 2: 4.0, 3: 1.1}, ways(4, slow), {(1, 2): (9.0, True), (0, 1): (0.01, True)}
    )
    expected = ["host h2: it is busy: work takes 4.0 times as long as alone, on the others 1.1"]
    assert texts(diagnose_network(measured, NAMES)) == expected
    # All are busy alike where hosts share their cores, as in a test.
    assert diagnose_network(NetworkMeasurements(dict.fromkeys(range(4), 4.0), ways(4, {})), NAMES) == []


def test_all_reduces_are_judged() -> None:
    fine = dict.fromkeys(choose_pairs(4), (0.001, True))
    found = diagnose_network(
        NetworkMeasurements({}, ways(4, {}), fine | {(1, 2): (0.5, True), (0, 3): (0.001, False)}, {2: "lost"}), NAMES
    )
    assert texts(found) == [
        "host h2: its rank cannot all-reduce: lost",
        "link h0-h3: the sum of an all-reduce is wrong",
        "link h1-h2: an all-reduce takes 500 ms, over the others 1",
    ]
    assert [finding.bad for finding in found] == [True, True, False]


def test_an_answer_that_comes_too_late_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nap(_: socket.socket) -> dict[str, Any]:
        time.sleep(0.5)
        return {"slept": True}

    monkeypatch.setitem(WORKER_COMMANDS, "nap", nap)
    room = Coordinator(1, "127.0.0.1")
    where = ("127.0.0.1", room.listener.getsockname()[1])
    rank = threading.Thread(target=run_worker, args=(where, room.secret.encode(), 0, None))
    rank.start()
    with Child(["sleep", "60"]) as launcher:
        assert room.accept_workers(launcher) == []
    assert room.run_commands({0: {"do": "nap"}}, 0.1) == {0: {"error": "no answer within 0.1 s"}}
    assert list(room.run_commands({0: {"do": "burn"}}, 10)[0]) == ["ratio"]
    # Both answers at once.
    assert "error" in room.run_commands({0: {"do": "nap"}}, 0.1)[0]
    time.sleep(1)
    assert list(room.run_commands({0: {"do": "burn"}}, 10)[0]) == ["ratio"]
    room.close()
    rank.join(10)
    assert not rank.is_alive()


def test_each_pair_of_hosts_is_measured_in_disjoint_rounds() -> None:
    assert len(choose_pairs(6)) == 15 and len(choose_pairs(7)) == 7 and choose_pairs(1) == []
    for hosts in (2, 5, 6, 9):
        assert sorted(pair for together in schedule_rounds(choose_pairs(hosts)) for pair in together) == sorted(
            choose_pairs(hosts)
        )
        assert all(
            len({rank for pair in one for rank in pair}) == 2 * len(one) for one in schedule_rounds(choose_pairs(hosts))
        )
    # Link 3-4 of a ring is odd: either end with three of the others, but for what is known.
    assert choose_extra_pairs(9, [(3, 4)], choose_pairs(9)) == [(0, 3), (0, 4), (1, 3), (1, 4), (2, 4)]
    ring = {pair: way for pair, way in ways(9, {}).items() if tuple(sorted(pair)) in choose_pairs(9)}
    assert diagnose_network(NetworkMeasurements({}, ring), NAMES) == []


def test_a_rate_is_that_of_the_later_part() -> None:
    # A burst of a megabyte at first, then a megabyte a second.
    come = [(0.0, 0), (0.01, 1_000_000), *((second / 10, 1_000_000 + second * 100_000) for second in range(1, 11))]
    assert compute_rate(come) == pytest.approx(8e6)
    assert compute_rate([(0.0, 0)]) == 0.0 and compute_rate([(0.0, 0), (1.0, 100)]) == pytest.approx(800)
