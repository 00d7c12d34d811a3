"""Processes that hvdtrain starts end within their time limit, with everything that they have started."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from hvdtrain.system.processes import (
    TO_STDOUT,
    Child,
    Deadline,
    OutputTooLarge,
    ProcessTimeout,
    completed_children,
    run_process,
)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = Deadline(5.0)
    while is_running(pid):
        assert deadline.wait(0.01), f"{pid} still runs"


def test_output_and_exit_code_are_returned() -> None:
    done = run_process(python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"), 10.0)
    assert (done.exit_code, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_merged_output_keeps_its_order() -> None:
    code = "import os; os.write(1, b'a'); os.write(2, b'b'); os.write(1, b'c')"
    assert run_process(python(code), 10.0, merge_stderr=True).stdout == "abc"


def test_environment_is_passed() -> None:
    code = "import os; print(os.environ['HERE'])"
    assert run_process(python(code), 10.0, env={"HERE": "yes"}).stdout == "yes\n"


def test_program_that_does_not_exist_raises_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        run_process(["/no/such/program"], 1.0)


def test_grandchild_that_holds_the_output_is_killed_with_the_process() -> None:
    code = "import os, time; child = os.fork(); child and (print(child, flush=True), os._exit(0)); time.sleep(60)"
    begin = time.monotonic()
    with pytest.raises(ProcessTimeout) as caught:
        run_process(python(code), 0.5)
    assert time.monotonic() - begin < 30
    assert caught.value.seconds == 0.5
    wait_until_gone(int(caught.value.output))


def test_grace_lets_a_process_clean_up_and_keeps_what_it_prints() -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('cleaned', flush=True), sys.exit(0)))\n"
        "print('up', flush=True); time.sleep(60)"
    )
    with pytest.raises(ProcessTimeout) as caught:
        run_process(python(code), 1.0, grace=5.0)
    assert caught.value.output == "up\ncleaned\n"


def test_process_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    with Child(python(code)) as child:
        assert next(child.output_lines(Deadline(10.0))) == "up\n"
        child.terminate_group(0.2)
        assert child.exit_code() == -signal.SIGKILL


def test_endless_output_is_cut_off() -> None:
    with pytest.raises(OutputTooLarge):
        run_process(python("while True: print('x' * 1000)"), 10.0, max_bytes=1 << 16)


def test_lines_arrive_one_by_one_and_the_deadline_ends_them() -> None:
    code = "import time; print('one', flush=True); print('two\\r', flush=True); time.sleep(60)"
    lines = []
    with Child(python(code), stderr=TO_STDOUT) as child:
        with pytest.raises(ProcessTimeout):
            for line in child.output_lines(Deadline(1.0)):
                lines.append(line)
        pid = child.pid
    assert lines == ["one\n", "two\n"]
    assert not is_running(pid)


def test_last_line_without_newline_is_a_line() -> None:
    with Child(python("print('a'); print('b', end='')")) as child:
        assert list(child.output_lines(Deadline(10.0))) == ["a\n", "b"]
        assert child.wait_for_exit(Deadline(10.0)) == 0


def test_children_come_as_they_complete_and_slow_ones_do_not() -> None:
    children = [Child(python(f"import time; time.sleep({seconds}); print({seconds})")) for seconds in (0.6, 0, 60)]
    try:
        done = [bytes(child.stdout) for child in completed_children(children, Deadline(3.0))]
    finally:
        for child in children:
            child.kill_group()
    assert done == [b"0\n", b"0.6\n"]


def test_child_in_this_session_is_signalled_alone() -> None:
    with Child(python("import time; time.sleep(60)"), new_session=False) as child:
        assert os.getpgid(child.pid) == os.getpgid(0)
        child.terminate_group(5.0)
        assert child.exit_code() == -signal.SIGTERM


def test_deadline_counts_down_and_ends_waiting() -> None:
    deadline = Deadline(0.2)
    assert 0 < deadline.left() <= 0.2 and not deadline.expired
    begin, looked = time.monotonic(), 0
    while deadline.wait(0.05):
        looked += 1
    assert 0.19 < time.monotonic() - begin < 20
    assert 1 <= looked <= 5
    assert deadline.expired and deadline.left() == 0
