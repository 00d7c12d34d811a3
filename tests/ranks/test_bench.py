"""`hvdtrain bench` on two real ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hvdtrain
from hvdtrain.bench.ways import compare_ways
from hvdtrain.cli.bench_workload import WayArguments, WorkloadArguments
from hvdtrain.comm.collectives import ring_all_reduce_bytes
from hvdtrain.exchange.buckets import HEAD_SIZE
from tests.ranks.harness import HVDTRAIN, ROOT, run
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld

MLP = str(ROOT / "recipes" / "mlp.py")
PARAMETERS = {"weights": [(200, 30), (200, 200), (1, 200)], "vectors": [200, 200, 1]}  # of MLP at width 200
VALUES = sum(n * m for n, m in PARAMETERS["weights"]) + sum(PARAMETERS["vectors"])


def lines(output: str) -> list[list[str]]:
    """Rows of a benchmark's output in words: without comments, and without the rank that launch puts before them."""
    texts = [line.removeprefix("[0] ") for line in output.splitlines()]
    return [text.split() for text in texts if text and not text.startswith("#")]


@pytest.mark.parametrize("kind", ["horovodrun", *slow("alone", "mpirun")])
def test_bench_allreduce_prints_the_same_table_with_any_launcher(kind: str, tmp_path: Path) -> None:
    """Started by itself or by a launcher, it prints the same table."""
    done = run(kind, 2, [*HVDTRAIN, "bench", "allreduce", "--sizes", "4K,1M", "--dtype", "float64"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout.replace("[0]<stdout>:", "")
    rows = lines(text)
    assert [row[:3] for row in rows] == [["4096", "512", "float64"], ["1048576", "131072", "float64"]]
    for size, _, _, micros, algorithm, bus, wrong in rows:
        assert wrong == "0"
        assert float(algorithm) == pytest.approx(int(size) / float(micros) / 1e3, abs=1e-3)
        assert float(bus) == float(algorithm)  # 2 (n - 1) / n is 1 for two ranks
    assert "2 ranks on 1 host, cpu over" in text and "# fitted: " in text


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_bench_step_compares_horovod_with_each_compression(launcher: str, tmp_path: Path) -> None:
    arguments = ["--steps", "3", "--compression", "none", "--compression", "int8", "--json", "step.json"]
    command = [*HVDTRAIN, "bench", "step", "--launcher", launcher, *arguments, MLP, "--width", "200"]
    done = run("alone", 2, command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row[0] for row in lines(done.stdout)] == ["way", "horovod", "no", "none", "int8"]
    rows = {row["way"]: row for row in json.loads((tmp_path / "step.json").read_text())["rows"]}
    assert rows["horovod"]["gain"] == 1 and rows["no exchange"]["wire_bytes"] == 0
    assert rows["horovod"]["wire_bytes"] == ring_all_reduce_bytes(4 * VALUES, 2)
    assert rows["none"]["wire_bytes"] == ring_all_reduce_bytes(
        4 * (VALUES + 6 + HEAD_SIZE), 2
    )  # a flag with each parameter
    assert 0 < rows["int8"]["wire_bytes"] < 0.4 * rows["none"]["wire_bytes"]
    for row in rows.values():
        assert 0 <= row["waited_seconds"] <= row["step_seconds"]


def measure_ways(folder: Path, steps: int) -> None:
    """What `hvdtrain bench step --way ...` does on a rank."""
    ways = ("", "--compression int8", "--batch-size 16 --micro-batch 4")
    workload = WorkloadArguments((), steps, folder / "ways.json", MLP, ("--width", "200"))
    compare_ways(hvdtrain.init(), WayArguments(ways, 2, workload).make_plan())


@pytest.mark.slow
def test_bench_step_compares_ways_to_train_in_turns(world2: KeptWorld, tmp_path: Path) -> None:
    world2.run(measure_ways, tmp_path, 3, cwd=tmp_path)
    table = lines(world2.printed[0])
    assert [row[0] for row in table] == ["way", "as", "--compression", "--batch-size"] and not world2.printed[1]
    found = json.loads((tmp_path / "ways.json").read_text())
    first, int8, small = found["rows"]
    assert found["ranks"] == 2 and found["title"].endswith("; 2 turns of 3 steps")
    assert [row["way"] for row in found["rows"]] == [
        "as it is",
        "--compression int8",
        "--batch-size 16 --micro-batch 4",
    ]
    assert first["ratio"] == 1 and int8["ratio"] > 0 < small["ratio"]
    assert 0 < int8["wire_bytes"] < 0.4 * first["wire_bytes"] == 0.4 * small["wire_bytes"]
    for row in found["rows"]:
        assert 0 <= row["waited_seconds"] <= row["step_seconds"] and row["memory_bytes"] >= 0
    assert [path.name for path in tmp_path.iterdir()] == ["ways.json"]


def test_bench_step_names_the_way_that_is_too_short(world2: KeptWorld, tmp_path: Path) -> None:
    (text,) = {str(error) for error in world2.errors(measure_ways, tmp_path, 10**6, cwd=tmp_path)}
    assert (
        text.startswith("--way '': the run has ") and " steps; expected 1000004, of which 1000000 are measured" in text
    )


@pytest.mark.slow
def test_bench_compression_writes_a_table_a_plot_and_json(tmp_path: Path) -> None:
    specs = ["fp16", "int8", "topk:0.01", "powersgd:2"]
    chosen = [word for spec in specs for word in ("--compression", spec)]
    arguments = ["--steps", "3", *chosen, "--plot", "curves.png", "--json", "rows.json", MLP, "--width", "200"]
    done = run("alone", 2, [*HVDTRAIN, "bench", "compression", *arguments], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row[0] for row in lines(done.stdout)] == ["method", "none", *specs]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "rows.json"]
    told = json.loads((tmp_path / "rows.json").read_text())
    assert told["ranks"] == 2 and told["network"]["bytes_per_second"] > 0
    rows = {row["method"]: row for row in told["rows"]}

    assert rows["none"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert rows["none"]["predicted_gain"] == rows["none"]["measured_gain"] == 1
    assert rows["fp16"]["cosine"] > 0.999 and rows["int8"]["cosine"] > 0.99
    assert all(0 < row["cosine"] <= 1 + 1e-5 for row in rows.values())
    assert all(row["encode_seconds"] > 0 for spec, row in rows.items() if spec != "none")
    assert all(row["predicted_step_seconds"] > 0 < row["measured_step_seconds"] for row in rows.values())

    # Only the matrix of 200 x 200 is large enough to be compressed; six flags travel, and the heads.
    large, small = 200 * 200, VALUES - 200 * 200
    dense = ring_all_reduce_bytes(4 * (small + 5 + HEAD_SIZE), 2) + ring_all_reduce_bytes(4 * (1 + HEAD_SIZE), 2)
    assert rows["none"]["wire_bytes"] == ring_all_reduce_bytes(4 * (VALUES + 6 + HEAD_SIZE), 2)
    assert rows["fp16"]["wire_bytes"] == ring_all_reduce_bytes(2 * large, 2) + dense
    assert rows["powersgd:2"]["wire_bytes"] == ring_all_reduce_bytes(4 * 2 * 200, 2) + dense
    assert dense < rows["topk:0.01"]["wire_bytes"] <= 8 * (large // 100 + 1) + dense
