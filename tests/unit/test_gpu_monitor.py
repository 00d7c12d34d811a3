"""Readings of a GPU, by a library that stands in for NVIDIA's: what is read, left out, warned of and compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.diagnosis.gpus import explain_by_gpu, find_slow_gpus
from hvdtrain.diagnosis.straggler import Straggler
from hvdtrain.system import gpu
from hvdtrain.system.gpu import GpuMonitor, GpuReading, parse_throttle
from hvdtrain.training.event_writer import EventWriter
from hvdtrain.training.loggers.tensorboard import TensorBoardLogger
from hvdtrain.training.rows import MetricsRow
from tests.ranks.harness import ROOT

UUID = "GPU-8f2d0c3e-0000-1111-2222-333344445555"
WHOLE = {
    "UtilizationRates": 97,
    "MemoryInfo": [60 << 30, 80 << 30],
    "Temperature": 87,
    "PowerUsage": 651_500,
    "ClockInfo": 1005,
    "MaxClockInfo": 1980,
    "TotalEccErrors": [3, 0],
    "CurrentClocksEventReasons": 0x40 | 0x08,
}


class StandIn:
    """GPUs that the module pynvml reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, **gpus: Any) -> None:
        self.path.write_text(json.dumps({name.replace("_", "-"): values for name, values in gpus.items()}))

    def set_one(self, **values: Any) -> None:
        self.set(**{UUID: WHOLE | values})


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.syspath_prepend(ROOT / "tests" / "support" / "nvml")
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setenv("STAND_IN_GPUS", str(tmp_path / "gpus.json"))
    monkeypatch.setattr(gpu, "READING_SECONDS", 0.0)
    return StandIn(tmp_path / "gpus.json")


def test_everything_is_read(gpus: StandIn) -> None:
    gpus.set_one()
    monitor = GpuMonitor(UUID)
    reading = monitor.read()
    assert reading == GpuReading(97, 60 << 30, 80 << 30, 87, 651.5, 1005, 1980, ["thermal"], 3, 0)
    assert reading.describe_speed() == "thermal throttle, 87 °C, 1005 of 1980 MHz"
    assert reading.columns()["throttle"] == "thermal" and reading.columns()["power"] == 651.5
    assert monitor.take_notes() == [] and monitor.take_alarm() is None


def test_what_is_not_supported_is_left_out_and_reported_once(gpus: StandIn) -> None:
    gpus.set(**{UUID: {"Temperature": 40, "MemoryInfo": -4, "PowerUsage": -4, "CurrentClocksEventReasons": 0}})
    monitor = GpuMonitor(UUID)
    assert monitor.read() == GpuReading(temperature=40, throttle=[])
    assert monitor.take_notes() == [
        "readings of the GPU without utilization, clock, highest clock, corrected errors, uncorrected errors: NVML: "
        "Not Supported",
        "readings of the GPU without memory, power: NVML: Insufficient Permissions",
    ]
    gpus.set(**{UUID: {"Temperature": -15, "CurrentClocksEventReasons": 0x4}})
    assert monitor.read() == GpuReading(throttle=["power cap"])
    assert monitor.take_notes() == ["readings of the GPU without temperature: NVML: GPU is lost"]


def test_uncorrected_errors_are_an_alarm_once(gpus: StandIn) -> None:
    gpus.set_one()
    monitor = GpuMonitor(UUID)
    monitor.read()
    assert monitor.take_alarm() is None
    gpus.set_one(TotalEccErrors=[3, 2])
    monitor.read()
    alarm = monitor.take_alarm()
    assert alarm is not None and alarm.startswith(f"{UUID} on ") and "has 2 uncorrected ECC errors since" in alarm
    gpus.set_one(TotalEccErrors=[3, 5])
    assert monitor.read().ecc_uncorrected == 5  # type: ignore[union-attr]
    assert monitor.take_alarm() is None


def test_a_reading_is_kept_for_a_second(gpus: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "READING_SECONDS", 1000.0)
    gpus.set_one()
    monitor = GpuMonitor(UUID)
    first = monitor.read()
    gpus.set_one(Temperature=20)
    assert monitor.read() is first


@pytest.mark.parametrize(
    ("described", "text"),
    [
        ({"init": {"nvmlInit": -18}}, "RM has detected an NVML/RM version mismatch"),
        ({"GPU-other": WHOLE}, "Not Found"),
        ({UUID: WHOLE | {"HandleByUUID": -4}}, "Insufficient Permissions"),
    ],
    ids=["driver", "unknown", "permissions"],
)
def test_a_gpu_that_cannot_be_opened_is_one_note(gpus: StandIn, described: Any, text: str) -> None:
    gpus.set(**described)
    monitor = GpuMonitor(UUID)
    assert monitor.read() is monitor.read() is None
    assert monitor.take_notes() == [f"no readings of the GPU: NVML: {text}"]
    assert monitor.take_notes() == []


def test_a_part_of_a_gpu_is_found_by_its_own_kind_of_uuid(gpus: StandIn) -> None:
    gpus.set(**{UUID.replace("GPU-", "MIG-"): {"MemoryInfo": [1, 2]}})
    reading = GpuMonitor(UUID).read()
    assert reading is not None and (reading.memory_used, reading.memory_total) == (1, 2)


def test_a_driver_without_event_reasons_is_asked_by_their_older_name(gpus: StandIn) -> None:
    gpus.set_one(CurrentClocksEventReasons=-13, CurrentClocksThrottleReasons=0x10)
    reading = GpuMonitor(UUID).read()
    assert reading is not None and reading.throttle == ["sync boost"]


def test_an_old_package_leaves_out_what_it_does_not_have(gpus: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.set_one(CurrentClocksThrottleReasons=0x4)
    import pynvml

    monkeypatch.delattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons")
    monkeypatch.delattr(pynvml, "nvmlDeviceGetPowerUsage")
    monitor = GpuMonitor(UUID)
    reading = monitor.read()
    assert reading is not None and reading.throttle == ["power cap"] and reading.power is None
    assert len(monitor.take_notes()) == 1


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monitor = GpuMonitor(UUID)
    assert monitor.read() is None
    assert monitor.take_notes() == [
        "no readings of the GPU: nvidia-ml-py is not installed: pip install 'hvdtrain[gpu]'"
    ]


def test_without_a_gpu_the_package_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monitor = GpuMonitor(None)
    assert monitor.read() is None and monitor.take_notes() == [] and "pynvml" not in sys.modules


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_package_without_a_driver_is_one_note() -> None:
    monitor = GpuMonitor(UUID)
    assert monitor.read() is None
    (note,) = monitor.take_notes()
    assert note.startswith("no readings of the GPU: NVML: ")


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x1 | 0x2 | 0x100, []),  # idle, or as it was set
        (0x8, ["hw slowdown"]),
        (0x8 | 0x80, ["power brake"]),
        (0x20 | 0x40 | 0x8 | 0x4, ["thermal", "power cap"]),
        (0x10, ["sync boost"]),
    ],
)
def test_bits_are_reasons_in_words(bits: int, words: list[str]) -> None:
    assert parse_throttle(bits) == words


HOT = GpuReading(temperature=87, sm_clock=1005, max_sm_clock=1980, throttle=["thermal"])
CAPPED = GpuReading(temperature=60, sm_clock=1800, max_sm_clock=1980, throttle=["power cap"])
SMALL = GpuReading(temperature=60, sm_clock=1300, max_sm_clock=1410, throttle=["power cap"])  # another kind of GPU
LOW = GpuReading(temperature=60, sm_clock=900, max_sm_clock=1980, throttle=["power cap"])


@pytest.mark.parametrize(
    ("readings", "slow"),
    [
        ([CAPPED, HOT, CAPPED], {1: "thermal throttle, 87 °C, 1005 of 1980 MHz"}),
        ([CAPPED, CAPPED, SMALL], {}),
        ([CAPPED, LOW], {1: "power cap throttle, 60 °C, 900 of 1980 MHz"}),
        ([HOT, HOT], {}),
        ([GpuReading(throttle=["thermal"]), GpuReading(throttle=[])], {0: "thermal throttle"}),
        ([None, HOT, None], {1: "thermal throttle, 87 °C, 1005 of 1980 MHz"}),
        ([GpuReading(), None], {}),
        ([], {}),
    ],
)
def test_a_gpu_is_slow_if_it_is_unlike_the_others(readings: list[GpuReading | None], slow: dict[int, str]) -> None:
    assert find_slow_gpus(readings) == slow


@pytest.mark.parametrize(
    ("cause", "rank", "explained"), [("compute", 1, "gpu"), ("data", 1, "data"), ("compute", 0, "compute")]
)
def test_a_slow_gpu_explains_what_the_gpu_does(cause: str, rank: int, explained: str) -> None:
    found = explain_by_gpu(Straggler(rank, 0.1, 0.5, cause, 0.1), {1: "thermal throttle"})
    assert found is not None and found.cause == explained
    assert found.detail == ("thermal throttle" if explained == "gpu" else "")


def test_a_program_that_is_diagnosed_has_its_gpus_in_the_report(
    gpus: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gpus.set_one(TotalEccErrors=[0, 1], PowerUsage=-3)
    monkeypatch.setattr("hvdtrain.programs.diagnose.find_gpu_uuid", lambda device: UUID)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hvdtrain.diagnose(model, optimizer, path=tmp_path / "diagnose.json"):
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).sum().backward()
            optimizer.step()
    (reading,) = json.loads((tmp_path / "diagnose.json").read_text())["end"]["gpus"]
    assert reading["temperature"] == 87 and reading["power"] is None and reading["throttle"] == ["thermal"]
    printed = capfd.readouterr()
    assert printed.err.count("has 1 uncorrected ECC error since") == 1
    assert printed.out.count("diagnose  readings of the GPU without power: NVML: Not Supported\n") == 1
    assert "GPU of rank 0 on " in printed.out


def test_tensorboard_has_a_gpus_numbers_and_whether_it_is_throttled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, float] = {}
    monkeypatch.setattr(EventWriter, "add_scalars", lambda self, step, scalars: written.update(scalars))
    row = MetricsRow(1, 1, 8, 0.1, 10.0, 0.0, {"loss": 1.0}, gpu=HOT.columns())
    TensorBoardLogger(tmp_path).log_row(row)
    found = {name: value for name, value in written.items() if name.startswith("gpu/")}
    assert found == {"gpu/temperature": 87, "gpu/sm_clock": 1005, "gpu/max_sm_clock": 1980, "gpu/throttled": 1}
