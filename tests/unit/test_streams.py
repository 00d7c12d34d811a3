"""Output that cannot be written ends no training, and is an error only of commands whose product it is."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hvdtrain.system.streams import DroppedOutput, DroppingFile, make_dropping_stream
from tests.support.limits import stretch

HVDTRAIN = [sys.executable, "-m", "hvdtrain"]


def test_bytes_dropped_on_a_full_disk_are_counted_and_reported_when_there_is_room(tmp_path: Path) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    stream = make_dropping_stream(None, descriptor)
    print("first", file=stream, flush=True)
    print("second", file=stream, flush=True)
    dropped = stream.buffer.raw.dropped  # type: ignore[attr-defined]
    assert dropped == DroppedOutput(13, 13, "No space left on device")
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, descriptor)
    os.close(log)
    print("third", file=stream, flush=True)
    stream.close()
    os.close(descriptor)
    lost = "\nhvdtrain: 13 bytes of output could not be written: No space left on device\n"
    assert (tmp_path / "log").read_text() == f"{lost}third\n"


def test_a_pipe_without_a_reader_takes_everything() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    file = DroppingFile(writing)
    assert file.write(b"text") == 4
    assert file.dropped.last_error == "Broken pipe"
    os.close(writing)


def test_a_closed_terminal_takes_everything_and_is_no_terminal() -> None:
    master, slave = pty.openpty()
    file = DroppingFile(slave)
    assert file.isatty()
    os.close(master)
    assert file.write(b"text") == 4
    assert file.dropped == DroppedOutput(4, 4, "Input/output error")
    assert not file.isatty()
    os.close(slave)


def test_a_non_blocking_pipe_loses_nothing() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    file, received = DroppingFile(writing), bytearray()

    def read() -> None:
        time.sleep(0.1)
        while data := os.read(reading, 65536):
            received.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    assert file.write(bytes(1 << 20)) == 1 << 20
    os.close(writing)
    thread.join()
    os.close(reading)
    assert (len(received), file.dropped.total_bytes) == (1 << 20, 0)


def test_an_unbuffered_stream_passes_each_line_on_at_once() -> None:
    reading, writing = os.pipe()
    code = "from hvdtrain.system import streams; streams.install_dropping_streams(); print('a line'); input()"
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=writing) as process:
        os.close(writing)
        assert os.read(reading, 100) == b"a line\n"  # the process still runs
        process.communicate(b"\n")
    os.close(reading)
    assert process.returncode == 0


def test_a_character_that_the_encoding_lacks_is_escaped() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="ascii") as ascii_stream:
        stream = make_dropping_stream(ascii_stream, writing)
        print("é", file=stream, flush=True)
    assert os.read(reading, 100) == b"\\xe9\n"
    os.close(reading)


@pytest.mark.parametrize(
    ("redirection", "code", "errors"),
    [
        (" > /dev/full", 1, "bytes of output could not be written: No space left on device\n"),
        (" >&-", 0, ""),
        (" > /dev/full 2>&-", 1, ""),
        (" 2> /dev/full", 0, ""),
        (" < /dev/null | true; exit ${PIPESTATUS[0]}", 1, ""),
    ],
)
def test_a_command_whose_output_is_lost_fails(redirection: str, code: int, errors: str) -> None:
    script = f"{' '.join(HVDTRAIN)} list{redirection}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=stretch(60))
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith(errors) and bool(done.stderr) == bool(errors)


def test_descriptors_that_were_closed_are_taken_by_no_file() -> None:
    check = (
        "from hvdtrain.system import streams; streams.install_dropping_streams(); "
        "print(open('/dev/zero').fileno() > 2, flush=True)"
    )
    code = f"import os; {check}; os._exit(0)"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" <&- 2>&-'], capture_output=True, timeout=stretch(60)
    )
    assert done.stdout == b"True\n"
