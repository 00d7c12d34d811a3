"""`hvdtrain discover`, run as a launcher runs it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.preemption.membership_folder import DrainNotice, HostRecord, write_drain_notice, write_host_record
from tests.support.limits import stretch
from tests.unit.http_server import serving


def run(kind: str, *args: object, **environ: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `hvdtrain discover KIND`."""
    line = [sys.executable, "-m", "hvdtrain", "discover", kind, *map(str, args)]
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=stretch(30), check=False, env=os.environ | environ
    )
    assert done.returncode == 0 or (done.stdout == "" and done.stderr.count("\n") == 1), done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["membership", "slurm", "kubernetes"])
def test_discovery_imports_nothing_heavy(kind: str, tmp_path: Path) -> None:
    """It is started once a second."""
    code = (
        "import sys; from hvdtrain.cli.main import main\n"
        "try: main(['discover', *sys.argv[1:]])\n"
        "except SystemExit as left: assert left.code in (0, 1), left.code\n"
        "heavy = {'torch', 'numpy', 'horovod', 'rich', 'psutil'} & set(sys.modules)\n"
        "assert not heavy and not [name for name in sys.modules if name.startswith('hvdtrain.comm')], heavy\n"
    )
    options = {"membership": [str(tmp_path)], "slurm": [], "kubernetes": ["--selector", "a=b"]}[kind]
    subprocess.run([sys.executable, "-c", code, kind, *options], check=True, timeout=stretch(30))


def test_the_command_needs_a_kind() -> None:
    done = subprocess.run([sys.executable, "-m", "hvdtrain", "discover"], capture_output=True, text=True)
    error = "hvdtrain: error: `hvdtrain discover` needs a command: membership, slurm or kubernetes\n"
    assert (done.returncode, done.stderr) == (2, error)


# --- membership


class Folder:
    """A membership folder whose hosts beat when told to."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path, self.count = path, 0

    def beat(self, *hosts: str, boot: str = "boot1", slots: int = 2) -> None:
        self.count += 1
        for host in hosts:
            write_host_record(self.path, HostRecord(host, slots, boot, 1, 1.0, self.count, "live"))

    def drain(self, host: str, boot: str = "boot1") -> None:
        write_drain_notice(self.path, DrainNotice(host, boot, 1.0, 1.0, "aws", "test"))

    def ask(self, *options: object, settle: float = 0, **environ: str) -> tuple[int, str, str]:
        state = [] if environ else ["--state", self.path.with_name("state")]
        return run("membership", self.path, "--settle", settle, *state, *options, **environ)

    def offered(self, *options: object, settle: float = 0) -> str:
        code, output, error = self.ask(*options, settle=settle)
        assert (code, error) == (0, "")
        return output

    def seen(self, *hosts: str, boot: str = "boot1") -> str:
        """What is offered after these hosts were seen to beat."""
        self.beat(*hosts, boot=boot)
        self.offered()
        self.beat(*hosts, boot=boot)
        return self.offered()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "members")


def test_membership_offers_who_beats(folder: Folder) -> None:
    assert folder.offered() == ""
    folder.beat("a", "b")
    folder.beat("dead")
    assert folder.offered() == ""  # how old that is nobody knows
    folder.beat("b", "a")
    assert folder.offered() == "a:2\nb:2\n"
    folder.beat("a", slots=5)
    assert folder.offered() == "a:5\nb:2\n"


def test_membership_default_state_is_nobody_elses(folder: Folder, tmp_path: Path) -> None:
    for _ in range(2):
        folder.beat("a")
        answer = folder.ask(TMPDIR=str(tmp_path))
    assert answer == (0, "a:2\n", "")
    [own] = tmp_path.glob("hvdtrain-discovery-*")
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    assert folder.ask(TMPDIR=str(tmp_path))[0] == 1


def test_membership_drops_who_beats_no_more(folder: Folder) -> None:
    assert folder.seen("a", "b") == "a:2\nb:2\n"
    end, last = time.monotonic() + stretch(30), ""
    while last != "a:2\n":
        assert time.monotonic() < end
        folder.beat("a")
        last = folder.offered("--stale", 0.8)
        assert "a:2\n" in last


def test_membership_waits_until_a_host_has_settled(folder: Folder) -> None:
    begin, last = time.monotonic(), ""
    while not last:
        assert time.monotonic() < begin + 20
        folder.beat("a")
        last = folder.offered(settle=1)
        waited = time.monotonic() - begin
    assert last == "a:2\n"
    assert waited > 1


def test_membership_without_those_that_drain(folder: Folder) -> None:
    assert folder.seen("a", "b") == "a:2\nb:2\n"
    folder.drain("a")
    assert folder.seen("a", "b") == "b:2\n"
    folder.beat("a", boot="boot2")  # booted: the notice was for its life before
    assert folder.seen("a", "b", boot="boot2").startswith("a:2\n")
    (folder.path / "b.draining").write_text("{")  # whatever it was, it was there to keep the host out
    assert folder.seen("a", "b", boot="boot2") == "a:2\n"


@pytest.mark.parametrize("skew", [-1e8, 1e8])
def test_membership_heeds_no_clock_but_its_own(folder: Folder, skew: float) -> None:
    for _ in range(3):
        folder.beat("a")
        for path in (folder.path, *folder.path.iterdir()):
            os.utime(path, (time.time() + skew, time.time() + skew))
        answer = folder.offered()
        skew = -skew  # a clock that is set back, too
    assert answer == "a:2\n"


def test_membership_leaves_out_who_flaps(folder: Folder) -> None:
    for _ in range(3):
        assert folder.seen("a", "b") == "a:2\nb:2\n"
        (folder.path / "a.json").unlink()
        assert folder.offered() == "b:2\n"
    assert folder.seen("a", "b") == "a:2\nb:2\n"
    assert folder.offered("--flaps", 2) == "b:2\n"
    (folder.path / "a.json").unlink()
    folder.offered()
    assert folder.seen("a", "b") == "b:2\n"
    assert folder.offered("--within", 0.0001) == "a:2\nb:2\n"


def test_membership_going_by_notice_or_a_reboot_by_notice_is_no_flap(folder: Folder) -> None:
    for life in range(5):
        assert folder.seen("a", boot=f"boot{life}") == "a:2\n"
        folder.drain("a", boot=f"boot{life}")
        assert folder.seen("a", boot=f"boot{life}") == ""
        (folder.path / "a.json").unlink()
        assert folder.offered() == ""


def test_membership_a_reboot_without_notice_is_a_flap(folder: Folder) -> None:
    for life in range(6):
        folder.beat("a", boot=f"boot{life}")
        folder.offered()
    assert folder.offered() == ""
    assert folder.offered("--flaps", 9) == "a:2\n"


def test_membership_passes_over_junk(folder: Folder) -> None:
    good = {"host": "a", "slots": 1, "boot_id": "x", "pid": 1, "started": 1.0, "beat": 1}
    junk: list[tuple[str, Any]] = [
        ("a", good | {"host": "b"}),
        ("b", good | {"host": "b", "slots": "2"}),
        ("c", good | {"host": "c", "slots": 0}),
        ("d", {"host": "d", "slots": 1}),
        ("e", [1]),
        ("f;rm", good | {"host": "f;rm"}),
        ("-oProxyCommand=x", good | {"host": "-oProxyCommand=x"}),
    ]
    for beat in range(3):
        for name, record in junk:
            record = record | {"beat": beat} if isinstance(record, dict) else record
            (folder.path / f"{name}.json").write_text(json.dumps(record))
        (folder.path / "g.json").write_text('{"host": "g"')
        (folder.path / ".h.json.new").write_text("")
        folder.beat("z")
        answer = folder.offered()
    assert answer == "z:2\n"


def test_membership_when_the_file_system_hangs(folder: Folder) -> None:
    os.mkfifo(folder.path / "b.json")  # whoever opens it waits
    begin = time.monotonic()
    code, output, error = folder.ask("--limit", 0.5)
    assert (code, output) == (1, "")
    assert error == f"hvdtrain: error: {folder.path}: no answer from the file system within 0.5 s\n"
    (folder.path / "b.json").unlink()
    assert folder.seen("a") == "a:2\n"
    os.mkfifo(folder.path / "b.json")
    begin = time.monotonic()
    assert folder.offered() == "a:2\n"
    assert time.monotonic() - begin < 30
    for _ in range(3):  # longer than --stale, in which no heartbeat could be seen
        assert folder.offered("--limit", 0.5, "--stale", 1) == "a:2\n"
    (folder.path / "b.json").unlink()
    assert folder.offered("--stale", 1) == "a:2\n"
    with folder.path.with_name("state.lock").open() as lock:  # its readers have ended
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_membership_while_an_earlier_reader_hangs_for_ever(folder: Folder) -> None:
    assert folder.seen("a") == "a:2\n"
    with folder.path.with_name("state.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begin = time.monotonic()
        assert folder.offered("--limit", 0.3) == "a:2\n"
        assert time.monotonic() - begin < 30


def test_membership_folder_that_is_not_there(tmp_path: Path) -> None:
    code, _, error = run("membership", tmp_path / "none", "--state", tmp_path / "state")
    assert (code, error) == (1, f"hvdtrain: error: {tmp_path / 'none'}: No such file or directory\n")


def test_membership_state_of_another_boot_or_junk_is_dropped(folder: Folder) -> None:
    state = folder.path.with_name("state")
    assert folder.seen("a") == "a:2\n"
    record = json.loads(state.read_text())
    for junk in ("{", json.dumps(record | {"boot": "other"}), json.dumps(record | {"called": -1000.0})):
        state.write_text(junk)
        assert folder.offered() == ""
        assert folder.seen("a") == "a:2\n"


def test_membership_a_pause_of_the_launcher_drops_nobody(folder: Folder) -> None:
    state = folder.path.with_name("state")
    assert folder.seen("a") == "a:2\n"
    record = json.loads(state.read_text())
    state.write_text(json.dumps(record | {"called": record["called"] - 30}))
    assert folder.offered() == "a:2\n"


def test_membership_of_a_real_agent(folder: Folder) -> None:
    line = [sys.executable, "-m", "hvdtrain", "agent", "--source", "signal", "--membership", str(folder.path)]
    line += ["--host", "n1", "--slots", "4", "--interval", "0.1"]
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as agent:
        try:
            end = time.monotonic() + stretch(20)
            while folder.offered() != "n1:4\n":
                assert time.monotonic() < end
            agent.send_signal(signal.SIGTERM)
            while folder.offered() != "":
                assert time.monotonic() < end
            assert agent.poll() is None
        finally:
            agent.kill()


# --- slurm

# Written from the documented output of squeue (its man page, --Format): each field in a column of the width asked for.
SQUEUE = """#!{python}
import os, sys, time
time.sleep(float(os.environ.get("SQUEUE_SLEEP", "0")))
options = dict(word.partition("=")[::2] for word in sys.argv[1:])
assert options["--states"] == "RUNNING" and "--noheader" in options and "--array" in options
if options.get("--jobs") == "404":
    sys.exit("slurm_load_jobs error: Invalid job id specified")
if "--name" in options:
    assert options["--user"]
jobs = [
    {{"JobID": "71", "NumTasks": "2", "NodeList": "gpu[01-02]", "tres-alloc": "cpu=8,gres/gpu=8,gres/gpu:a100=8"}},
    {{"JobID": "81", "NumTasks": "1", "NodeList": "n7", "tres-alloc": "cpu=4,mem=8G,node=1,billing=4", "name": "pool"}},
    {{"JobID": "82", "NumTasks": "2", "NodeList": "n[1-2]", "tres-alloc": "cpu=4,node=2", "name": "pool"}},
    {{"JobID": "83", "NumTasks": "1", "NodeList": "n7", "tres-alloc": "cpu=4,node=1", "name": "pool"}},
    {{"JobID": "84", "NumTasks": "1", "NodeList": "", "tres-alloc": "", "name": "pool"}},
    {{"JobID": "91", "NumTasks": "3", "NodeList": "n[1-2]", "tres-alloc": "cpu=3,node=2"}},
    {{"JobID": "92", "NumTasks": "1", "NodeList": "x" * 20000, "tres-alloc": "cpu=3,node=1"}},
]
for job in jobs:
    if options.get("--jobs") == job["JobID"] or options.get("--name") == job.get("name", ""):
        fields = [word.split(":") for word in options["--Format"].split(",")]
        print("".join(job[name][:int(width)].ljust(int(width)) for name, width in fields))
"""


def slurm(tmp_path: Path, *options: object, **environ: str) -> tuple[int, str, str]:
    (tmp_path / "squeue").write_text(SQUEUE.format(python=sys.executable))
    (tmp_path / "squeue").chmod(0o755)
    return run("slurm", *options, PATH=f"{tmp_path}:{os.environ['PATH']}", **environ)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--job", "71"], "gpu01:4\ngpu02:4\n"),
        (["--job", "71", "--slots", "1"], "gpu01:1\ngpu02:1\n"),
        (["--job", "91", "--slots", "2"], "n1:2\nn2:2\n"),
        (["--name", "pool"], "n1:1\nn2:1\nn7:2\n"),
        (["--name", "ended"], ""),
    ],
)
def test_slurm_nodes_of_running_tasks(tmp_path: Path, options: list[str], expected: str) -> None:
    assert slurm(tmp_path, *options) == (0, expected, "")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--job", "404"], "squeue: slurm_load_jobs error: Invalid job id specified"),
        (["--job", "91"], "job 91: 3 GPUs or tasks on 2 nodes; give --slots"),
        (["--job", "92"], "squeue: a column is full: 92 "),
        ([], "not within a Slurm job (SLURM_JOB_NODELIST is not set); give --job or --name"),
    ],
)
def test_slurm_script_exits_1_and_names_the_failure(tmp_path: Path, options: list[str], error: str) -> None:
    code, _, said = slurm(tmp_path, *options)
    assert code == 1
    assert said.startswith(f"hvdtrain: error: {error}")


def test_slurm_squeue_that_hangs_or_is_missing(tmp_path: Path) -> None:
    begin = time.monotonic()
    assert slurm(tmp_path, "--job", "71", "--limit", "0.3", SQUEUE_SLEEP="20")[2] == (
        "hvdtrain: error: squeue has not answered within 0.3 s\n"
    )
    assert time.monotonic() - begin < 15
    assert "No such file" in run("slurm", "--job", "71", PATH=str(tmp_path / "none"))[2]


@pytest.mark.parametrize(
    ("nodes", "environ", "expected"),
    [
        ("node[1-3,7]", {}, "node1:1\nnode2:1\nnode3:1\nnode7:1\n"),
        ("a,b[08-10],c", {}, "a:1\nb08:1\nb09:1\nb10:1\nc:1\n"),
        ("rack[0-1]n[2,4]-ib", {}, "rack0n2-ib:1\nrack0n4-ib:1\nrack1n2-ib:1\nrack1n4-ib:1\n"),
        ("n[1-3]", {"SLURM_TASKS_PER_NODE": "4(x2),1"}, "n1:4\nn2:4\nn3:1\n"),
        ("n[1-2]", {"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "8"}, "n1:8\nn2:8\n"),
    ],
)
def test_slurm_within_a_job(tmp_path: Path, nodes: str, environ: dict[str, str], expected: str) -> None:
    assert slurm(tmp_path, SLURM_JOB_NODELIST=nodes, **environ) == (0, expected, "")


@pytest.mark.parametrize("nodes", ["n[1-", "n[3-1]", "n[a]", "n[1-99999999]", "a;b", "n]", "-oX=1", "[", ","])
def test_slurm_lists_that_are_none(tmp_path: Path, nodes: str) -> None:
    code, _, error = slurm(tmp_path, SLURM_JOB_NODELIST=nodes)
    assert (code, error) == (1, f"hvdtrain: error: {nodes!r} is not a list of nodes\n")


# --- kubernetes


def pod(name: str, ip: str, *, ready: str = "True", phase: str = "Running", gpus: int = 0, **about: str) -> Any:
    limits = {"nvidia.com/gpu": str(gpus)} if gpus else {}
    return {
        "metadata": {"name": name, **about},
        "spec": {"containers": [{"name": "main", "resources": {"limits": limits}}, {"name": "side", "resources": {}}]},
        "status": {"phase": phase, "podIP": ip, "conditions": [{"type": "Ready", "status": ready}]},
    }


PODS = [
    pod("w-1", "10.0.0.2", gpus=4),
    pod("w-0", "10.0.0.1"),
    pod("w-2", "10.0.0.3", ready="False"),
    pod("w-3", "10.0.0.4", deletionTimestamp="2026-01-01T00:00:00Z"),
    pod("w-4", "", phase="Pending", ready="False"),
]


class Api:
    """The part of a cluster's API that lists pods."""

    def __init__(self, pods: list[Any]) -> None:
        self.pods, self.asked, self.token = pods, "", ""
        self.sleep = 0.0

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], str]:
        self.asked = path
        time.sleep(self.sleep)
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {}, json.dumps({"kind": "Status", "message": "Unauthorized"})
        return 200, {}, json.dumps({"kind": "PodList", "apiVersion": "v1", "items": self.pods})


Ask = Callable[..., tuple[int, str, str]]


def kubernetes(url: str, *options: object) -> tuple[int, str, str]:
    selection = ["--selector", "app=train,role in (worker)", "--namespace", "ml"]
    return run("kubernetes", *selection, "--url", url, *options)


def test_kubernetes_pods_that_are_ready_and_stay() -> None:
    api = Api(PODS)
    with serving(api) as url:
        assert kubernetes(url) == (0, "10.0.0.1:1\n10.0.0.2:4\n", "")
        assert api.asked == "/api/v1/namespaces/ml/pods?labelSelector=app%3Dtrain%2Crole+in+%28worker%29"
        assert kubernetes(url, "--by", "name", "--domain", ".workers", "--slots", 2)[1] == (
            "w-0.workers:2\nw-1.workers:2\n"
        )
        api.pods = []
        assert kubernetes(url) == (0, "", "")


def test_kubernetes_script_names_bad_pods_answers_and_connections() -> None:
    api = Api([pod("v6", "fd00::1")])
    with serving(api) as url:
        assert kubernetes(url)[2] == (
            "hvdtrain: error: pod v6: 'fd00::1' is not a host name or IPv4 address, which Horovod needs\n"
        )
        api.pods = [None]
        assert kubernetes(url)[2] == "hvdtrain: error: the API's answer is not understood\n"
        api.sleep = 6
        begin = time.monotonic()
        assert kubernetes(url, "--limit", 0.5)[0] == 1
        assert time.monotonic() - begin < 6
    assert "Connection refused" in kubernetes(url)[2]
    assert "not within a pod" in run("kubernetes", "--selector", "a=b", "--namespace", "ml")[2]


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_kubernetes_as_the_service_account(tmp_path: Path) -> None:
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out", "ca.crt"]
    line += ["-days", "2", "-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, timeout=stretch(60))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key")
    (tmp_path / "token").write_text("secret\n")
    api = Api(PODS)
    api.token = "secret"
    account = ["--token-file", tmp_path / "token", "--ca-file", tmp_path / "ca.crt"]
    with serving(api, context) as url:
        # As it is found within a pod, by its address in the environment.
        port = url.rpartition(":")[2]
        line = ["--selector", "a=b", "--namespace", "ml", *map(str, account)]
        there = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": port}
        assert run("kubernetes", *line, **there)[:2] == (0, "10.0.0.1:1\n10.0.0.2:4\n")
        (tmp_path / "token").write_text("stale")
        assert kubernetes(url, *account)[2] == "hvdtrain: error: the API answers 401 Unauthorized\n"
        assert "CERTIFICATE_VERIFY_FAILED" in kubernetes(url, *account[:2], "--ca-file", other_ca())[2]


def other_ca() -> str:
    """Certificates that have not signed the API's."""
    return ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
