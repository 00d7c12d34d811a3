"""`hvdtrain bench` up to the ranks: what it would start, and what it refuses in one line."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from hvdtrain.bench.plot import plot_step_times
from hvdtrain.cli.bench import parse_size_list, size_range
from hvdtrain.cli.main import main

RECIPE = str(Path(__file__).parents[2] / "recipes" / "linear_regression.py")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


TWO_WAYS = "--way: expected two different ways or more; --way '' is RECIPE with the options after it"


def bench(arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["bench", *shlex.split(arguments)])
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.parametrize(
    ("arguments", "where", "own"),
    [
        ("allreduce", "-np 2 -H localhost:2 --gloo --disable-cache", "allreduce"),
        ("allreduce -np 3 --sizes 4k", "-np 3 -H localhost:3 --gloo --disable-cache", "allreduce --sizes 4k"),
        ("step -H a:2,b:2 --nic eth0", "-np 4 -H a:2,b:2 --gloo --disable-cache --network-interfaces eth0", "step"),
        (
            f"step --compression none --compression topk:0.1 {RECIPE} --features 4",
            "-np 2 -H localhost:2 --gloo --disable-cache",
            f"step --compression none --compression topk:0.1 {RECIPE} --features 4",
        ),
        (
            f"step --turns 2 --way '' --way '--compression int8' {RECIPE} --features 4",
            "-np 2 -H localhost:2 --gloo --disable-cache",
            f"step --way= '--way=--compression int8' --turns 2 {RECIPE} --features 4",
        ),
        (
            "compression --plot x.png --steps 3",
            "-np 2 -H localhost:2 --gloo --disable-cache",
            "compression --plot x.png --steps 3",
        ),
    ],
)
def test_dry_run_prints_the_launch_command(
    arguments: str, where: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, rest = arguments.partition(" ")
    assert bench(f"{name} --dry-run {rest}") == 0
    line = capsys.readouterr().out.strip()
    _, _, after = line.partition("horovodrun ")
    assert after == f"{where} {sys.executable} -m hvdtrain bench {own}"


SET_BY_THE_BENCHMARK = "is not used by benchmarks: leave it out"
CASES = [
    (f"step --way '' {RECIPE}", TWO_WAYS),
    (f"step --way '' --way '' {RECIPE}", TWO_WAYS),
    (
        f"step --compression int8 --way '' --way '--clip-norm 1' {RECIPE}",
        "--compression and --way exclude each other: give --way '--compression SPEC'",
    ),
    (
        f"step --way '' --way '--clipnorm 1' {RECIPE}",
        "--way '--clipnorm 1': no option --clipnorm; did you mean '--clip-norm'?",
    ),
    (
        f"step --way '' --way '--compression int9' {RECIPE}",
        "--way '--compression int9': compression 'int9': 'int9' is not a method; did you mean 'int8'?",
    ),
    (f"step --way '' --way '--run-dir x' {RECIPE}", f"--way '--run-dir x': --run-dir {SET_BY_THE_BENCHMARK}"),
    (f"step --way '' --way --ema=0.9 {RECIPE} --quiet", f"--way '': --quiet {SET_BY_THE_BENCHMARK}"),
    ("", "`hvdtrain bench` needs a command: allreduce, step or compression"),
    ("allreduce --sizes 4X", "'4X' is not a size in bytes; expected for example 4096, 64K or 16M"),
    ("allreduce --sizes 4K,,1M", "'' is not a size in bytes; expected for example 4096, 64K or 16M"),
    ("allreduce --sizes 0", "'0' is not a size in bytes; expected for example 4096, 64K or 16M"),
    ("allreduce --sizes 2", "a size of 2 bytes is less than one float32; expected 4 or more"),
    ("allreduce --min-bytes 2M --max-bytes 1M", "--min-bytes 2M is more than --max-bytes 1M"),
    ("allreduce -np 1", "-np 1: there is nothing to exchange; expected 2 ranks or more"),
    ("step --compression int9", "compression 'int9': 'int9' is not a method; did you mean 'int8'?"),
    (
        "step --compression powersgd:0",
        "compression 'powersgd:0': '0' is not a valid rank; expected an integer of at least 1",
    ),
    (
        "compression --compression auto",
        "compression 'auto' measures methods itself during training; expected one method",
    ),
    ("compression --plot no/such/x.png", None),
    ("compression --plot x.pdf", "--plot x.pdf: expected a name that ends in .png"),
    ("step linear_regresion", "no recipe 'linear_regresion'; did you mean 'linear_regression'?"),
    (f"step {RECIPE} --featurs 3", "no option --featurs; did you mean '--features'?"),
    (
        f"step {RECIPE} --resume",
        "--resume is not used by benchmarks; expected the recipe's own options, or --amp, --batch-per-rank, "
        "--batch-size, --device, --lr, --seed, --threads",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[arguments for arguments, _ in CASES])
def test_invalid_bench_options_give_one_line_and_exit_2(
    arguments: str, message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message is None or error == f"hvdtrain: error: {message}\n"


def test_sizes_are_parsed_and_ranges_expanded() -> None:
    assert parse_size_list("1M, 4k,4096") == [4096, 1 << 20]
    assert size_range("1K", "70K") == [1 << 10, 1 << 12, 1 << 14, 1 << 16]


def test_plot_is_a_png() -> None:
    bandwidths = [1e6, 1e8, 1e10]
    picture = plot_step_times(
        "title", bandwidths, {"none": [3, 2, 1], "fp16": [2, 2, 2]}, 1e8, {"none": 2.1, "fp16": 1.9}
    )
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000
