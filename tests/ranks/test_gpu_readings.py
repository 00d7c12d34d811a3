"""Two ranks whose GPUs are read by a library that stands in for NVIDIA's: one is throttled, and slow."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.comm import collectives
from tests.ranks.harness import ROOT
from tests.support.worlds import KeptWorld, train_here

RECIPE = str(ROOT / "tests" / "ranks" / "slow_rank_recipe.py")
COOL = {"UtilizationRates": 99, "MemoryInfo": [1000, 5000], "Temperature": 61, "ClockInfo": 1900, "MaxClockInfo": 1980}
COOL |= {"TotalEccErrors": [7, 0], "CurrentClocksEventReasons": 0x4}
HOT = COOL | {"Temperature": 87, "ClockInfo": 1005, "TotalEccErrors": [0, 2], "CurrentClocksEventReasons": 0x44}
HOT |= {"PowerUsage": 300_000}


def train_on_gpus(folder: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Train on this rank as if its CPU were a GPU, which the stand-in describes."""
    described = folder.parent / f"gpus-{collectives.rank()}.json"
    described.write_text(json.dumps({"GPU-0": COOL, "GPU-1": HOT}))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "support" / "nvml")
        patch.delitem(sys.modules, "pynvml", raising=False)
        patch.setenv("STAND_IN_GPUS", str(described))
        patch.setattr("hvdtrain.torch.step.find_gpu_uuid", lambda device: f"GPU-{collectives.rank()}")
        try:
            return train_here(f"{RECIPE}:SlowRank", folder, options)
        finally:
            del sys.modules["pynvml"]


def test_a_throttled_gpu_is_in_the_rows_and_the_diagnosis(world2: KeptWorld, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    world2.run(train_on_gpus, folder, ("--diagnose", "--steps", "20", "--log-every", "5"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert {name: value for name, value in row.items() if name.startswith("gpu_")} == {
            "gpu_utilization": 99,
            "gpu_memory_used": 1000,
            "gpu_memory_total": 5000,
            "gpu_temperature": 61,
            "gpu_sm_clock": 1900,
            "gpu_max_sm_clock": 1980,
            "gpu_throttle": "power cap",
            "gpu_ecc_corrected": 7,
            "gpu_ecc_uncorrected": 0,
        }
    found = json.loads((folder / "diagnose.json").read_text())
    for part in (*found["intervals"], found["end"]):
        assert [one["temperature"] for one in part["gpus"]] == [61, 87]
        assert [one["throttle"] for one in part["gpus"]] == [["power cap"], ["thermal", "power cap"]]
    straggler = found["end"]["straggler"]
    words = "thermal and power cap throttle, 87 °C, 1005 of 1980 MHz"
    assert (straggler["rank"], straggler["cause"], straggler["detail"]) == (1, "gpu", words)

    root, other = world2.printed
    assert f"GPU of rank 1 on {found['hosts'][1]}: {words}\n" in root
    assert f" ms longer than theirs: {words}\n" in root
    assert root.count("readings of the GPU without power: NVML: Not Supported\n") == 1
    assert "uncorrected" not in root
    assert other.count("hvdtrain: warning: GPU-1 on ") == other.count("has 2 uncorrected ECC errors since") == 1
