"""The doctor of one host, and what it makes of facts."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.doctor import preflight, query
from hvdtrain.doctor.facts import connect_back_error, gather_facts
from hvdtrain.doctor.findings import DoctorFinding, diagnose_host, diagnose_hosts, format_bytes
from hvdtrain.doctor.host_facts import (
    FACTS_MARKER,
    FactsRequest,
    HostFacts,
    dump_request,
    find_facts_line,
    format_facts_line,
    parse_request,
)
from hvdtrain.doctor.network_test import worker
from hvdtrain.doctor.network_test.coordinator import Coordinator
from hvdtrain.doctor.network_test.diagnose import diagnose_network
from hvdtrain.doctor.network_test.links import compute_rate
from hvdtrain.doctor.network_test.measure import (
    AllReduceMeasurement,
    LinkMeasurement,
    NetworkMeasurements,
    choose_extra_pairs,
    choose_pairs,
    outlier_links,
    schedule_rounds,
)
from hvdtrain.doctor.network_test.messages import CpuReply, Failure, MeasureCpu, Pair
from hvdtrain.doctor.network_test.worker import run_worker
from hvdtrain.doctor.nics import parse_routes
from hvdtrain.doctor.query import HostReply
from hvdtrain.doctor.readings import read_disk
from hvdtrain.doctor.report import describe_host, format_verdict, tabulate_differences
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.processes import Child, Deadline, completed_children
from tests.ranks.harness import ROOT
from tests.support.limits import stretch


@pytest.fixture(scope="module")
def facts() -> HostFacts:
    """This host's, with what may be wrong with it put right."""
    return change(gather_facts(FactsRequest()), {"own name": ["10.0.0.7"], "load": 0.1, "memory free": 1 << 34})


def change(facts: HostFacts, changes: dict[str, Any]) -> HostFacts:
    """Facts with other values under some keys of their JSON."""
    found = find_facts_line(FACTS_MARKER + json.dumps(facts.encode_json() | changes))
    assert found is not None
    return found


def texts(found: list[DoctorFinding]) -> list[str]:
    return [str(finding) for finding in found]


def test_facts_come_quickly_without_torch_as_one_line() -> None:
    code = (
        "import sys, time; from hvdtrain.doctor.facts import gather_facts\n"
        "from hvdtrain.doctor.host_facts import FactsRequest, format_facts_line\n"
        "tries = []\n"
        "for _ in range(4):\n"
        "    begin = time.perf_counter()\n"
        "    facts = gather_facts(FactsRequest(['runs']))\n"
        "    tries.append(time.perf_counter() - begin)\n"
        "assert not {'torch', 'horovod', 'rich'} & set(sys.modules)\n"
        "print(min(tries)); print(format_facts_line(facts), end='')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, line = done.stdout.splitlines()
    assert float(seconds) < 0.5
    facts = json.loads(line.removeprefix(FACTS_MARKER))
    assert facts["hostname"] == socket.gethostname() and facts["executable"] == sys.executable
    assert facts["torch"] and facts["wheel"].startswith("horovod0.28.1-torch")
    assert facts["cores"] and facts["memory"] > facts["memory free"] > 0 and "lo" in facts["interfaces"]
    found = find_facts_line(line)
    assert found is not None and describe_host(found).startswith(f"host        {facts['hostname']} (")


FULL_KEYS = {
    *("hostname", "python", "executable", "hvdtrain", "torch", "torch cuda", "horovod", "wheel", "built with"),
    *("horovod wrong", "disks", "interfaces", "time", "system", "cpu", "cores", "cores usable", "cores allowed"),
    *("load", "memory", "memory free", "memory allowed", "shared memory", "limits", "mpi", "compiler", "nccl"),
    *("driver cuda", "gpus", "infiniband", "nics", "routes", "own name"),
}


def test_the_keys_of_facts_are_fixed_and_facts_are_read_back() -> None:
    """They are part of `hvdtrain doctor --json`, and of what hosts send to each other."""
    full = gather_facts(FactsRequest())
    assert full.encode_json().keys() == FULL_KEYS
    assert set(full.encode_json()["disks"].popitem()[1]) == {"free", "total", "wrong"}
    short = gather_facts(FactsRequest(back=("127.0.0.1", 9), full=False))
    assert short.encode_json().keys() < FULL_KEYS | {"way back"} and "way back" in short.encode_json()
    for facts in (full, short):
        assert find_facts_line(f"motd\n{format_facts_line(facts)}bye\n") == facts
    request = FactsRequest(["/x"], ("10.0.0.1", 80), full=False)
    assert parse_request(dump_request(request)) == request


def test_facts_of_another_version_do_not_stop_the_doctor(facts: HostFacts) -> None:
    """One sends facts that are unknown here, another knows few."""
    newer = change(facts, {"quantum cores": 3, "nics": {"eth0": {"addresses": [], "colour": "red"}}})
    older = find_facts_line(f'{FACTS_MARKER}{{"time": 1, "hvdtrain": "0.0.1", "gpus": [], "nics": {{}}}}')
    oldest = find_facts_line(f'{FACTS_MARKER}{{"time": 1}}')
    assert older is not None and oldest is not None
    replies = [HostReply("h0", facts), HostReply("h1", newer), HostReply("h2", older), HostReply("h3", oldest)]
    found = [str(finding) for finding in diagnose_hosts(replies) if finding.bad]
    assert found[0].startswith("host h2: hvdtrain 0.0.1, the other 2 have ")
    assert "hostname" in tabulate_differences(replies) and "unknown" in describe_host(oldest)
    for text in ("[]", '{"time": "now"}', '{"time": 1, "gpus": 7}', "{", ""):
        with pytest.raises(ValueError):
            find_facts_line(FACTS_MARKER + text)
    assert find_facts_line("no facts") is None


def test_doctor_without_hosts_reports_the_same_in_text_and_json(tmp_path: Path) -> None:
    """Whatever this machine has, the report holds together, and --json says the same."""
    command = [sys.executable, "-m", "hvdtrain", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == as_json.stderr == ""
    report = json.loads(as_json.stdout)
    assert f"torch       {report['facts']['torch']}" in done.stdout
    assert done.returncode == as_json.returncode == int(any(finding["bad"] for finding in report["findings"]))
    assert (report["verdict"] == "all fine") == (not report["findings"])
    assert done.stdout.splitlines()[-1].startswith(("all fine", "warning: ", "Horovod"))


def test_a_healthy_host_is_all_fine(facts: HostFacts) -> None:
    assert diagnose_host(facts) == [] and format_verdict([]) == "all fine"
    assert diagnose_hosts([HostReply("h0", facts), HostReply("h1", change(facts, {"hostname": "h1"}))], "lo") == []


NOTHING = {"free": 1 << 40, "total": 1 << 41, "wrong": None}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"horovod wrong": "no torch: pip install torch"}, "no torch: pip install torch"),
        ({"built with": None}, "warning: Horovod was not built by hvdtrain: over several hosts it may fail; run `hvd"),
        ({"disks": {"/x": NOTHING | {"free": 4096}}}, "the disk is full: 4 KiB is free in /x"),
        ({"disks": {"/x": NOTHING | {"wrong": "no inode is left"}}}, "cannot write in /x: no inode is left"),
        (
            {"shared memory": NOTHING | {"free": 64 << 20}},
            "warning: only 64 MiB is free in /dev/shm: give",
        ),
        ({"memory free": 1 << 20}, "warning: only 1 MiB of memory is free: stop other processes"),
        ({"load": 999.0}, "warning: it is busy: load 999.0 on "),
        ({"limits": {"nofile": 256, "memlock": None}}, "warning: only 256 files may be open at once: ulimit -n 65536"),
        (
            {"infiniband": ["mlx5_0"], "limits": {"nofile": None, "memlock": 65536}},
            "warning: there is InfiniBand",
        ),
        ({"gpus": ["nvidia-smi fails: no driver"]}, "nvidia-smi fails: no driver: reinstall the driver"),
        (
            {"gpus": ["H200"], "driver cuda": "11.4", "torch cuda": "13.0"},
            "the GPU driver supports CUDA up to 11.4, torch is built for 13.0: install a newer driver",
        ),
        (
            {"own name": [], "built with": None, "horovod": None},
            "warning: its hostname does not resolve; map",
        ),
    ],
)
def test_what_is_wrong_with_one_host_is_reported(facts: HostFacts, changed: dict[str, Any], expected: str) -> None:
    found = diagnose_host(change(facts, changed))
    assert len(found) == 1, found
    assert format_verdict(found).startswith(expected)


def test_the_odd_host_is_named(facts: HostFacts) -> None:
    other = change(facts, {"torch": "2.9.0+cu128", "horovod wrong": "Horovod is built for another torch"})
    usual = change(facts, {"torch": "2.14.1+cu130"})
    well, odd = [HostReply(f"h{number}", usual) for number in range(4)], HostReply("h7", other)
    expected = "host h7: torch 2.9.0, the other 4 have 2.14.1"
    assert texts(diagnose_hosts([*well, odd])) == texts(diagnose_hosts([odd, *well])) == [expected]
    # Of two hosts nobody knows which is right: the first one counts.
    assert texts(diagnose_hosts([well[0], odd])) == ["host h7: torch 2.9.0, h0 has 2.14.1"]
    # A patch of Python makes no difference, a wheel does; one finding for one host.
    usual = change(facts, {"python": "3.11.1"})
    same = HostReply("h8", change(facts, {"python": "3.11.99"}))
    wheel = HostReply("h9", change(facts, {"wheel": "w", "mpi": "MPICH 4"}))
    found = diagnose_hosts([HostReply("h0", usual), HostReply("h1", usual), same, wheel])
    assert [finding.where for finding in found if "Python" not in finding.text] == ["host h9"]
    assert "MPICH 4, the other 3 have" in found[0].text


def test_the_worst_comes_first(facts: HostFacts) -> None:
    found = diagnose_hosts(
        [
            HostReply("h0", facts, clock_offset=-3.5),
            HostReply("h1", change(facts, {"way back": "no answer within 3 s"})),
            HostReply("h2", change(facts, {"own name": ["127.0.1.1"], "hostname": "h2"})),
            HostReply("h3", error="cannot be reached: No route to host"),
        ],
        "lo",
    )
    assert texts(found) == [
        "host h3: cannot be reached: No route to host",
        "host h1: cannot connect to this host: no answer within 3 s; is there a firewall?",
        "host h0: its clock is 4 s behind this host's: synchronize it by NTP",
        "host h2: its hostname resolves to 127.0.1.1; map it to its network address in /etc/hosts",
    ]
    assert [finding.bad for finding in found] == [True, True, False, False]
    assert format_verdict(found[2:]).startswith("warning: host h0: its clock")


def test_a_clock_is_judged_by_when_it_can_have_been_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for ahead, expected in ((0.0, 0.0), (100.0, 100.0), (-100.0, -100.0)):
        text = f"motd\n##hvdtrain-facts {json.dumps({'time': time.time() + ahead})}\nbye\n"
        with Child(["printf", "%s", text]) as ssh:
            assert list(completed_children([ssh], Deadline(10.0))) == [ssh]
            ssh.started_at -= 0.5
            answer = query.read_host_reply("h1", ssh, Deadline(10.0))
        assert answer.clock_offset == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (
            255,
            "ssh: Could not resolve hostname h9: Name or service not known\n",
            "cannot be reached: Could not resolve",
        ),
        (
            255,
            "Connection timed out during banner exchange\r\nConnection to h9 port 22 timed out\r\n",
            "accepts co",
        ),
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
    assert query.explain_failure(code, said).startswith(expected)


def test_preflight_leaves_this_host_alone_and_knows_the_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "Child", None)
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
    disk = read_disk(tmp_path / "not" / "there")
    assert (disk.total, disk.error) == (shutil.disk_usage(tmp_path).total, None)
    assert 0 <= (disk.free or -1) <= (disk.total or 0)  # others write on this disk meanwhile
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
    reduced = {(1, 2): AllReduceMeasurement(9.0, True), (0, 1): AllReduceMeasurement(0.01, True)}
    measured = NetworkMeasurements({0: 1.0, 1: 1.2, 2: 4.0, 3: 1.1}, ways(4, slow), reduced)
    expected = ["host h2: it is busy: CPU slowdown 4.0, on the others 1.1"]
    assert texts(diagnose_network(measured, NAMES)) == expected
    # All are busy alike where hosts share their cores, as in a test.
    assert diagnose_network(NetworkMeasurements(dict.fromkeys(range(4), 4.0), ways(4, {})), NAMES) == []


def test_all_reduces_are_judged() -> None:
    fine = dict.fromkeys(choose_pairs(4), AllReduceMeasurement(0.001, True))
    bad = {(1, 2): AllReduceMeasurement(0.5, True), (0, 3): AllReduceMeasurement(0.001, False)}
    found = diagnose_network(NetworkMeasurements({}, ways(4, {}), fine | bad, {2: "lost"}), NAMES)
    assert texts(found) == [
        "host h2: its rank cannot all-reduce: lost",
        "link h0-h3: the sum of an all-reduce is wrong",
        "link h1-h2: an all-reduce takes 500 ms, on the others 1",
    ]
    assert [finding.bad for finding in found] == [True, True, False]


def test_a_late_reply_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    naps = [0.5, 0.0, 0.5, 0.0]  # seconds that each command takes

    def nap() -> float:
        seconds = naps.pop(0)
        time.sleep(seconds)
        return seconds

    monkeypatch.setattr(worker, "measure_cpu", nap)
    coordinator = Coordinator(1, "127.0.0.1")
    meet = ("127.0.0.1", coordinator.listener.getsockname()[1])
    rank = threading.Thread(target=run_worker, args=(meet, coordinator.secret.encode(), 0, None))
    rank.start()
    with Child(["sleep", "60"]) as launcher:
        assert coordinator.accept_workers(launcher) == []
    assert coordinator.run_commands({0: MeasureCpu()}, 0.1) == {0: Failure("no answer within 0.1 s")}
    assert coordinator.run_commands({0: MeasureCpu()}, 10) == {0: CpuReply(0.0)}
    # Both replies at once.
    assert coordinator.run_commands({0: MeasureCpu()}, 0.1) == {0: Failure("no answer within 0.1 s")}
    time.sleep(1)
    assert coordinator.run_commands({0: MeasureCpu()}, 10) == {0: CpuReply(0.0)}
    coordinator.end_test()
    rank.join(stretch(10))
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
