"""What a rank's program finds in its environment, and how its end is reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.launch.places import STORE_VARIABLE
from hvdtrain.launch.program_rank import LOST_PEER, RankOptions, make_environment
from hvdtrain.launch.rank_output import find_error_before_abort
from hvdtrain.system import signed_http
from hvdtrain.system.messages import RankFailed, RankFinished, message_prefix, parse_message
from tests.support.limits import stretch

ENVIRONMENT = {**os.environ, "HVDTRAIN_LAUNCH": "1", "HVDTRAIN_SECRET": "0" * 64}
# Its exit handlers take long, as those of Horovod and JAX do, which wait for other ranks.
SLOW_TO_END = "import atexit, time\natexit.register(lambda: (print('exits', flush=True), time.sleep(60)))\n"


@pytest.mark.parametrize(
    ("last", "failed"), [("raise ValueError('planted')", True), ("", False), ("raise KeyboardInterrupt", False)]
)
def test_a_program_that_has_failed_is_not_taken_for_one_that_its_launcher_stopped(last: str, failed: bool) -> None:
    command = [sys.executable, "-m", "hvdtrain.launch.program_rank", "--", sys.executable, "-c", SLOW_TO_END + last]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        assert any(line == "exits\n" for line in rank.stdout)
        rank.send_signal(signal.SIGTERM)  # as horovodrun does once another rank, which has lost this one, has ended
        out, err = rank.communicate(timeout=stretch(30))
    end = [parse_message(line.rstrip("\n"), message_prefix(ENVIRONMENT)) for line in out.splitlines()][-1]
    if failed:
        assert isinstance(end, RankFailed) and (end.error, end.code) == ("ValueError: planted", 1)
        assert "Traceback" not in err and end.traceback.count("Traceback") == 1
    else:
        assert isinstance(end, RankFinished) and end.code == 128 + signal.SIGTERM


ABORT = "E1 agent.cc:289] Polled an error from coordination service\nF1 client.h:80] Terminating process\n"
FAILED = "Traceback (most recent call last):\n  File 'x', line 1\nValueError: planted\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (FAILED + ABORT, "ValueError: planted"),
        (FAILED + "step 8\n" + ABORT, ""),
        (ABORT, ""),
        (FAILED, ""),
    ],
)
def test_a_rank_whose_exit_handlers_abort_has_failed_by_the_error_before(text: str, error: str) -> None:
    """JAX's wait for the other ranks, for 5 minutes, and abort then: these other ranks as well."""
    assert find_error_before_abort(text, LOST_PEER) == error


RANK_0 = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "1"}


def test_a_rank_is_not_taken_for_the_batch_script_s_task_of_slurm() -> None:
    """Every rank of horovodrun on the host of the script inherits them; the job's own variables stay."""
    task = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "4"}
    found = make_environment(RankOptions(command=["x"]), {**RANK_0, **task, "SLURM_JOB_ID": "7", "HOROVOD_RANK": "1"})
    assert [name for name in found.variables if name.startswith("SLURM_")] == ["SLURM_JOB_ID"]
    assert found.variables["RANK"] == "1"


@pytest.mark.parametrize(("given", "expected"), [({}, "lo"), ({"GLOO_SOCKET_IFNAME": "eth7"}, "eth7")])
def test_gloo_of_torch_uses_the_interface_of_the_launch(given: dict[str, str], expected: str) -> None:
    environ = {**RANK_0, "HVDTRAIN_SECRET": "0" * 64, **given}
    server = RendezvousServer("127.0.0.1", {}, key=signed_http.read_key(environ))
    try:
        environ[STORE_VARIABLE] = f"127.0.0.1:{server.port}"
        assert make_environment(RankOptions(command=["x"]), environ).variables["GLOO_SOCKET_IFNAME"] == expected
    finally:
        server.stop_serving()
