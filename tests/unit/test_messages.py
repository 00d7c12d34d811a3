"""Messages of ranks: which lines `hvdtrain launch` believes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.launch.output import OutputLine, OutputParser, extract_message
from hvdtrain.system import messages

ENVIRON = {"HVDTRAIN_SECRET": "s" * 32, "HVDTRAIN_LAUNCH": "1"}
MARK = messages.message_prefix(ENVIRON)
STARTED = {"kind": "started", "rank": 0, "host": "h", "pid": 7}


def text_of(message: dict[str, Any], mark: str = MARK) -> str:
    return f"{mark}{json.dumps(message)}"


def test_a_message_begins_with_the_mark_of_this_launch() -> None:
    assert MARK.startswith("##hvdtrain ") and len(MARK.split()[1]) == 32 and "s" * 8 not in MARK
    assert messages.parse_message(text_of(STARTED), MARK) == messages.RankStarted(0, "h", 7)
    other = messages.message_prefix({"HVDTRAIN_SECRET": "t" * 32})
    for line in (
        text_of(STARTED, "##hvdtrain "),
        text_of(STARTED, other),
        f"10% {text_of(STARTED)}",
        f" {text_of(STARTED)}",
        f"{MARK}{{broken",
        MARK + "[" * 100_000,
        f"{MARK}[]",
        "plain",
    ):
        assert messages.parse_message(line, MARK) is None


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 1},
        {"pid": 0},
        {"pid": -1},
        {"pid": True},
        {"pid": "7"},
        {"pid": 1 << 70},
        {"rank": -1},
        {"rank": None},
        {"host": "-oProxyCommand=touch F"},
        {"host": ""},
        {"host": "a b"},
        {"reach": "-oProxyCommand=touch F"},
        {"reach": "a\n"},
        {"reach": 3},
        {"size": "2"},
        {"kind": "other"},
        {"kind": []},
    ],
)
def test_a_message_with_a_wrong_value_is_an_ordinary_line(change: dict[str, Any]) -> None:
    assert messages.parse_message(text_of({**STARTED, "reach": "node-1.a_b", "size": 3}), MARK) is not None
    assert messages.parse_message(text_of({**STARTED, **change}), MARK) is None


def test_a_message_without_one_of_its_fields_is_an_ordinary_line() -> None:
    for name in STARTED:
        assert (
            messages.parse_message(text_of({key: value for key, value in STARTED.items() if key != name}), MARK) is None
        )
    assert messages.parse_message(text_of({"kind": "progress", "loss": "x"}), MARK) is None
    assert messages.parse_message(text_of({"kind": "progress", "loss": None, "step": 3}), MARK) is not None


def test_the_rank_is_the_launchers() -> None:
    """But in an elastic run, where the launcher's number is that of a slot. Standard error has no messages."""
    line = OutputLine(3, "stdout", text_of(STARTED))
    sent = messages.parse_message(text_of(STARTED), MARK)
    assert isinstance(sent, messages.RankStarted) and messages.message_fields(sent) == STARTED
    assert extract_message(line, MARK) == replace(sent, rank=3)
    assert extract_message(line._replace(rank=None), MARK) == sent
    assert extract_message(line, MARK, elastic=True) == sent
    assert extract_message(line._replace(stream="stderr"), MARK) is None


@pytest.mark.parametrize(
    ("prefix", "repeated"), [(b"[4]<stdout>:", True), (b"[1,4]<stdout>: ", False), (b" 4: ", False)]
)
def test_a_message_is_found_after_an_unfinished_line(
    prefix: bytes, repeated: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the launchers bring it: horovodrun repeats its prefix after a carriage return, srun breaks long lines."""
    monkeypatch.setattr("os.environ", ENVIRON)
    print("10%\r50%", end="")
    messages.send_message(messages.RankFailed(4, error="e" * 3000))
    messages.send_message(messages.RankFinished(4, 0))
    said = capsys.readouterr().out.encode()
    if prefix == b" 4: ":
        pieces = [piece for line in said[:-1].split(b"\n") for piece in cut(line)]
        said = b"".join(prefix + piece + b"\n" for piece in pieces)
    elif repeated:
        said = b"".join(prefix + part for part in re.findall(rb"[^\r\n]*[\r\n]", said))
    else:
        said = b"".join(prefix + part + b"\n" for part in said[:-1].split(b"\n"))
    lines = OutputParser("stdout", LAUNCHERS.get("srun" if prefix == b" 4: " else "horovodrun").output)
    found = [*lines.parse_bytes(said), *lines.parse_bytes(b"")]
    assert [line for line in found if extract_message(line, MARK) is None] == [
        OutputLine(4, "stdout", "10%"),
        OutputLine(4, "stdout", "50%"),
    ]
    kept = [message for line in found if (message := extract_message(line, MARK))]
    assert kept == [messages.RankFailed(4, error="e" * 3000), messages.RankFinished(4, 0)]


def cut(line: bytes) -> list[bytes]:
    return [line[at : at + 1024] for at in range(0, len(line), 1024)]


def test_only_ranks_of_a_launch_send(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.environ", {"HVDTRAIN_SECRET": "s" * 32})
    messages.send_message(messages.RankFinished(0, 0))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "message",
    [
        messages.RankStarted(1, "h", 7),
        messages.RankStarted(1, "h", 7, size=2, reach="node-1", supervisor=6),
        messages.RankProgress(3, 10, 1, 0.5, 812.0),
        messages.RankProgress(3, 10, 1, None, None, "warming up"),
        messages.RankFailed(1, "h", 7, 2, "no such file", "Traceback ...", origin=0),
        messages.RankFailed(1, "h", 7, 1, "it hangs", waits=True),
        messages.RankFailed(0, "h", 7, 1, "no progress", ends=False),
        messages.RankFinished(0, 75),
        messages.RankStandstill(1, "h", 7, "loading its batch", "", "mine.py:3 in load", 4, 61.5, False, 45.0),
    ],
)
def test_messages_arrive_as_they_were_sent(
    message: messages.RankMessage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.environ", ENVIRON)
    messages.send_message(message)
    line = capsys.readouterr().out.strip("\r\n")
    assert messages.parse_message(line, MARK) == message
    assert "null" not in line


def test_fields_of_a_later_version_are_ignored() -> None:
    assert messages.parse_message(text_of({**STARTED, "colour": "red"}), MARK) == messages.RankStarted(0, "h", 7)
