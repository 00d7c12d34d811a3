"""Lines that are taken in one piece are those that are taken one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.launch.output import OutputParser

LINES = [
    "[0]<stdout>:epoch 1\n",
    "[1]<stdout>:\n",
    "[1,2]<stdout>: of Open MPI\n",
    "[1,2]<stdout>:\n",
    "[3]<stdout>:élan 模型 [0]<stdout>: in the text\n",
    "[3]<stdout>:  indented\n",
    "[0]<stderr>:of the other stream\n",
    "the launcher's own\n",
    "[0]<stdout>:##hvdtrain {}\n",
    "[0]<stdout>:bar 1\r[0]<stdout>:bar 2\r\n",
    "[0]<stdout>:a [1]<stdout>:b\n",
    " Peer host:  b\n",
]


def shown(data: bytes, sizes: list[int], *, plain: bool) -> str:
    """What is shown of the data, which comes in pieces of these sizes."""
    lines, text, at = OutputParser("stdout", LAUNCHERS.get("mpirun").output), "", 0
    for size in [*sizes, len(data)]:
        piece, at = data[at : at + size], at + size
        if not piece:
            break
        taken, rest = lines.convert_plain_lines(piece) if plain else ("", piece)
        text += taken
        for line in lines.parse_bytes(rest) if rest else ():
            text += f"[{line.rank}] {line.text}\n" if line.rank is not None else f"{line.stream} {line.text}\n"
    return text + "".join(f"rest {line.rank} {line.text}" for line in lines.parse_bytes(b""))


@given(st.lists(st.sampled_from(LINES), max_size=30), st.lists(st.integers(1, 60), max_size=60))
def test_plain_output_is_the_same_in_one_piece_or_line_by_line(lines: list[str], sizes: list[int]) -> None:
    data = "".join(lines).encode()
    assert shown(data, sizes, plain=True) == shown(data, sizes, plain=False)


def test_much_output_is_taken_in_one_piece() -> None:
    lines = OutputParser("stdout")
    data = b"[12]<stdout>:" + b"x" * 80 + b"\n"
    assert lines.convert_plain_lines(data * 1000 + data[:20]) == (("[12] " + "x" * 80 + "\n") * 1000, data[:20])


@pytest.mark.parametrize("data", [b"[0]<stdout>:\xff\n", b"own\n", b"[0]<stdout>:a\r\n", b"[0]<stderr>:a\n", b"half"])
def test_output_that_is_not_plain_is_left_to_the_line_parser(data: bytes) -> None:
    assert OutputParser("stdout").convert_plain_lines(data) == ("", data)
    assert OutputParser("stdout", LAUNCHERS.get("srun").output).convert_plain_lines(b"0: a\n") == ("", b"0: a\n")
