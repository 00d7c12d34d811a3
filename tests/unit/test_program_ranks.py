"""The process around a rank of a program: tracebacks, bytes, places, outcomes, and what is left of it at its end."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.launch import places
from hvdtrain.launch.outcome import determine_elastic_program_outcome, determine_program_outcome
from hvdtrain.launch.places import RankPlace, find_place, gpu_variables, meet_ranks, world_variables
from hvdtrain.launch.program import Program
from hvdtrain.launch.program_process import start_program
from hvdtrain.launch.program_rank import LOST_PEER
from hvdtrain.launch.rank_output import ByteCarrier, TracebackHolder, find_error_line, restore_bytes
from hvdtrain.launch.report import JobReport
from hvdtrain.system.errors import CommandError, RunError
from hvdtrain.system.limits import ProgramLimits
from hvdtrain.system.messages import RankFailed, RankFinished, RankStarted
from hvdtrain.system.processes import Deadline
from hvdtrain.system.signed_http import SECRET, new_secret
from tests.support.limits import stretch

FIRST = "Traceback (most recent call last):"
TRACEBACK = b'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\nValueError: wrong\nsecond line\n'


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("label", [b"", b"[rank3]: "])
def test_a_traceback_at_the_end_is_taken_out_of_the_stream(size: int, label: bytes) -> None:
    labelled = b"".join(label + line for line in TRACEBACK.splitlines(keepends=True))
    data, passed, holder = b"step 1\rTr\nTrace\n" + labelled, b"", TracebackHolder()
    for start in range(0, len(data), size):
        passed += holder.add(data[start : start + size])
    assert passed == b"step 1\rTr\nTrace\n"
    assert holder.take_error() == ("ValueError: wrong", TRACEBACK.decode()) and holder.release() == b""


def test_a_logged_traceback_passes_as_it_is_after_some_time() -> None:
    holder = TracebackHolder(ProgramLimits(hold_traceback=0.05))
    assert holder.add(b"before\n" + TRACEBACK) == b"before\n"
    time.sleep(0.06)
    assert holder.release_due() == TRACEBACK and holder.take_error() == ("ValueError: wrong", "")
    assert holder.add(b"continues") == b"continues" and holder.take_error() == ("", "")


def test_a_huge_traceback_is_not_held() -> None:
    holder = TracebackHolder()
    assert holder.add(TRACEBACK * 1000) == TRACEBACK * 1000 and holder.seconds_left() is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{FIRST}\n  File x\nKeyError: 1\n\nDuring ...:\n\n{TRACEBACK.decode()}", "ValueError: wrong"),
        (f"  + Exception Group {FIRST}\n  |   File x\n  | ExceptionGroup: two (2)\n", "ExceptionGroup: two (2)"),
        (f"{FIRST}\n  File x\nKeyboardInterrupt\n", "KeyboardInterrupt"),
        ("no traceback\n", ""),
    ],
)
def test_the_error_of_a_traceback_is_its_last_one(text: str, line: str) -> None:
    assert find_error_line(text) == line


def test_bytes_that_are_not_utf8_come_out_as_they_went_in() -> None:
    data = bytes(range(256)) * 3 + "ünïcödé \U0001f600".encode() + b"\xe2\x82"
    carrier = ByteCarrier()
    carried = b"".join(carrier.convert(data[at : at + 5]) for at in range(0, len(data), 5)) + carrier.convert(
        b"", last=True
    )
    assert restore_bytes(carried.decode("utf-8"), "utf-8") == data


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (dict(zip(places.PLACE_VARIABLES[0], "3412", strict=True)), (3, 4, 1, 2)),
        (dict(zip(places.PLACE_VARIABLES[1], "0202", strict=True)), (0, 2, 0, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None),
    ],
)
def test_a_place_is_read_from_the_launcher_s_variables(
    environ: dict[str, str], expected: tuple[int, int, int, int] | None
) -> None:
    place = find_place(environ)
    assert (place and (place.rank, place.size, place.local_rank, place.local_size)) == expected


def test_a_rank_has_its_number_before_it_has_met_the_others() -> None:
    assert places.find_rank({"SLURM_PROCID": "3"}) == 3 and places.find_rank({}) == 0
    assert places.find_rank({**dict(zip(places.PLACE_VARIABLES[0], "1412", strict=True)), "SLURM_PROCID": "0"}) == 1


def test_ranks_meet_in_a_store_and_agree() -> None:
    environ = {SECRET: new_secret()}
    server = RendezvousServer("127.0.0.1", {}, key=environ[SECRET].encode())
    store, worlds = ("127.0.0.1", server.port), {}
    ranks = [RankPlace(rank=r, size=3, local_rank=r % 2, local_size=2, node=f"host-{r // 2}") for r in range(3)]
    threads = [
        threading.Thread(target=lambda one=one: worlds.update({one.rank: meet_ranks(one, store, environ)}))
        for one in ranks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(stretch(30))
    server.stop_serving()
    assert worlds[0] == worlds[1] == worlds[2] and [one.rank for one in worlds[0]] == [0, 1, 2]
    own = [world_variables(worlds[0], rank) for rank in range(3)]
    assert [one["GROUP_RANK"] for one in own] == ["0", "0", "1"] and {one["GROUP_WORLD_SIZE"] for one in own} == {"2"}
    workers = json.loads(own[0]["TF_CONFIG"])["cluster"]["worker"]
    ports = [own[0]["MASTER_PORT"], own[0]["JAX_COORDINATOR_ADDRESS"].split(":")[1], workers[0].split(":")[1]]
    assert len(set(ports)) == 3 and all(int(port) in places.RENDEZVOUS_PORTS for port in ports)
    for place in worlds[0]:  # no two ranks of a host can choose the same one
        assert {places.RENDEZVOUS_PORTS.index(port) % 2 for port in place.ports} == {place.local_rank}


def test_a_rank_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {SECRET: new_secret(), "HOROVOD_START_TIMEOUT": "0.2"}
    server = RendezvousServer("127.0.0.1", {}, key=environ[SECRET].encode())
    with pytest.raises(RunError, match=r"rank 1 has not started within 0.2 s; HOROVOD_START_TIMEOUT"):
        meet_ranks(RankPlace(rank=0, size=2, local_rank=0, local_size=2), ("127.0.0.1", server.port), environ)
    server.stop_serving()


def test_a_gpu_per_rank_is_one_of_those_visible() -> None:
    assert gpu_variables(1, {})["CUDA_VISIBLE_DEVICES"] == "1"
    assert gpu_variables(1, {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    with pytest.raises(RunError, match="rank 2 has no GPU: CUDA_VISIBLE_DEVICES=4,6"):
        gpu_variables(2, {"CUDA_VISIBLE_DEVICES": "4,6"})


def test_a_command_that_cannot_be_started_has_the_code_of_a_shell(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    for name, code in (("no-such-command", 127), (str(tmp_path / "none"), 127), (str(tmp_path / "text"), 126)):
        with pytest.raises(CommandError, match="cannot start") as caught:
            Program(command=[name]).check_command({"PATH": os.environ["PATH"]})
        assert caught.value.exit_code == code
    with pytest.raises(CommandError, match="it is a folder"):
        Program(command=[str(tmp_path)]).check_command({})


@pytest.mark.parametrize(
    "error",
    [
        "horovod.common.exceptions.HorovodInternalError: Broken",
        "RuntimeError: [third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:4",
        "torch.distributed.DistBackendError: NCCL error in: x, remote process exited",
        "jax.errors.JaxRuntimeError: UNAVAILABLE: The following tasks are unhealthy",
    ],
)
def test_the_errors_of_ranks_that_lost_another_one_are_known(error: str) -> None:
    assert LOST_PEER.search(error) and not LOST_PEER.search("ValueError: shapes (2,) and (3,) differ")


def make_report(*messages: RankStarted | RankFailed | RankFinished, hosts: int = 2) -> JobReport:
    report = JobReport(["a"] * hosts)
    for message in messages:
        report.add_message(message)
    return report


def test_outcomes_of_programs() -> None:
    lost, died = RankFailed(0, "a", 10, 1, "gloo", waits=True), RankFailed(1, "a", 11, 139, "killed by signal 11")
    done = determine_program_outcome
    assert done(make_report(lost, died), "mpirun", 1)[0] == 139
    assert done(make_report(lost, RankFinished(1, 143)), "mpirun", 1)[0] == 1
    assert done(make_report(RankFinished(0, 75), lost), "mpirun", 1) == (75, "")
    assert done(make_report(RankFinished(0, 0), RankFinished(1, 0)), "mpirun", 0, signal.SIGINT) == (0, "")
    assert done(make_report(RankFinished(0, 130), RankFinished(1, 0)), "mpirun", 1, signal.SIGINT) == (130, "")
    elastic = determine_elastic_program_outcome
    assert elastic(make_report(RankFinished(0, 0)), "horovodrun", 1) == (0, "")
    code, text = elastic(make_report(died, hosts=0), "horovodrun", 1)
    assert code == 139 and text == "error: a worker on a failed: killed by signal 11"


def test_the_end_of_a_program_ends_all_that_it_has_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 900 & echo $! >> {pids}; setsid sleep 901 & echo $! >> {pids}; exit 5"
    program = start_program(["bash", "-c", script], os.environ)
    assert program.wait_for_end() == 5
    assert not [pid for pid in pids.read_text().split() if Path(f"/proc/{pid}").exists()]


def test_a_killed_program_leaves_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"trap '' TERM; sleep 900 & echo $! > {pids}; wait"
    program = start_program(["bash", "-c", script], os.environ)
    deadline = Deadline(20)
    while not (pids.exists() and pids.read_text()) and deadline.wait(0.02):
        pass
    program.kill()
    assert program.wait_for_end() == -signal.SIGKILL
    assert not Path(f"/proc/{pids.read_text().strip()}").exists() and not Path(f"/proc/{program.pid}").exists()


def test_what_cannot_be_started_raises() -> None:
    with pytest.raises(FileNotFoundError):
        start_program(["/no/such/program"], os.environ)
    assert start_program([sys.executable, "-c", "raise SystemExit(7)"], os.environ).wait_for_end() == 7
