"""Stands in for nvidia-ml-py: GPUs as a file describes them, whose path is in the environment as STAND_IN_GPUS.

The file is read at each call, as a real GPU changes. It holds JSON: by UUID, what functions return, by their
names without "nvmlDeviceGet"; an integer below 0 is the error of that number, "init" stands for nvmlInit. What is not
there is not supported.
"""

# ruff: noqa: N801, N802
from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NVML_TEMPERATURE_GPU, NVML_CLOCK_SM, NVML_VOLATILE_ECC = 0, 1, 0
NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
TEXTS = {
    3: "Not Supported",
    4: "Insufficient Permissions",
    6: "Not Found",
    13: "Function Not Found",
    15: "GPU is lost",
    18: "RM has detected an NVML/RM version mismatch.",
}


class NVMLError(Exception):
    """An error of NVML, by its number."""

    def __str__(self) -> str:
        return TEXTS[self.args[0]]

    def __eq__(self, other: object) -> bool:  # as the real one, which thereby has no hash
        return self.args == getattr(other, "args", None)


class NVMLError_NotFound(NVMLError):
    """There is no such GPU."""


class NVMLError_FunctionNotFound(NVMLError):
    """The driver is older than the function."""


ERRORS: dict[int, type[NVMLError]] = {6: NVMLError_NotFound, 13: NVMLError_FunctionNotFound}


def read(key: str, name: str, default: Any) -> Any:
    found = json.loads(Path(os.environ["STAND_IN_GPUS"]).read_text()).get(key, {}).get(name, default)
    if isinstance(found, int) and found < 0:
        raise ERRORS.get(-found, NVMLError)(-found)
    return found


def nvmlInit() -> None:
    read("init", "nvmlInit", 0)


def nvmlShutdown() -> None:
    pass


def nvmlDeviceGetHandleByUUID(uuid: str) -> str:
    read(uuid, "HandleByUUID", 0 if uuid in json.loads(Path(os.environ["STAND_IN_GPUS"]).read_text()) else -6)
    return uuid


def nvmlDeviceGetUtilizationRates(handle: str) -> SimpleNamespace:
    return SimpleNamespace(gpu=read(handle, "UtilizationRates", -3), memory=0)


def nvmlDeviceGetMemoryInfo(handle: str) -> SimpleNamespace:
    used, total = read(handle, "MemoryInfo", -3)
    return SimpleNamespace(used=used, total=total, free=total - used)


def nvmlDeviceGetTemperature(handle: str, sensor: int) -> Any:
    return read(handle, "Temperature", -3)


def nvmlDeviceGetPowerUsage(handle: str) -> Any:
    return read(handle, "PowerUsage", -3)


def nvmlDeviceGetClockInfo(handle: str, clock: int) -> Any:
    return read(handle, "ClockInfo", -3)


def nvmlDeviceGetMaxClockInfo(handle: str, clock: int) -> Any:
    return read(handle, "MaxClockInfo", -3)


def nvmlDeviceGetTotalEccErrors(handle: str, kind: int, counter: int) -> Any:
    counts = read(handle, "TotalEccErrors", -3)
    return counts[kind]


def nvmlDeviceGetCurrentClocksEventReasons(handle: str) -> Any:
    return read(handle, "CurrentClocksEventReasons", -3)


def nvmlDeviceGetCurrentClocksThrottleReasons(handle: str) -> Any:
    return read(handle, "CurrentClocksThrottleReasons", -3)
