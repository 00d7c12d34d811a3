"""What NVIDIA's NVML reads of one GPU while it computes: load, memory, heat, clocks, throttling and memory errors.

Its bindings, the package nvidia-ml-py (module pynvml), are imported by the first reading: never in a run without a GPU.
What cannot be read is left out and reported once; nothing here ends a run.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hvdtrain.system.extras import explain_missing_extra

READING_SECONDS = 1.0  # between two readings: NVML's own values are means of up to a second
# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h) that stand for a lower clock than an idle GPU or its settings
# explain. The bit of a hardware slowdown is set with those of its two special cases.
THROTTLE_BITS = {
    0x20: "thermal",  # software
    0x40: "thermal",  # hardware
    0x04: "power cap",
    0x80: "power brake",
    0x08: "hw slowdown",
    0x10: "sync boost",
    0x200: "board limit",
    0x400: "reliability",
}
HW_SLOWDOWN, HW_SLOWDOWN_CAUSES = 0x08, 0x40 | 0x80


@dataclass(frozen=True)
class GpuReading:
    """What was read of a GPU. None: it could not be read.

    Attributes:
        utilization: percent of the last second or less in which something was computed.
        memory_used: bytes, of all processes.
        memory_total: bytes.
        temperature: degrees Celsius.
        power: watts.
        sm_clock: MHz.
        max_sm_clock: MHz, that the GPU can have.
        throttle: why its clock is lower than it could be, in the words of THROTTLE_BITS.
        ecc_corrected: errors of its memory since the driver was loaded that were corrected.
        ecc_uncorrected: those that were not.
    """

    utilization: int | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    temperature: int | None = None
    power: float | None = None
    sm_clock: int | None = None
    max_sm_clock: int | None = None
    throttle: list[str] | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None

    def columns(self) -> Mapping[str, float | str]:
        """Return what is known, by name: numbers, and the reasons of throttling as one text, "" for none."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return known | ({"throttle": ", ".join(self.throttle)} if self.throttle is not None else {})

    def clock_share(self) -> float | None:
        """Return the clock over the highest one, None if they are unknown."""
        return self.sm_clock / self.max_sm_clock if self.sm_clock is not None and self.max_sm_clock else None

    def describe_speed(self) -> str:
        """Return what makes it slow: `thermal throttle, 87 °C, 1005 of 1980 MHz`."""
        parts = [f"{' and '.join(self.throttle)} throttle"] if self.throttle else []
        if self.temperature is not None:
            parts.append(f"{self.temperature} °C")
        if self.sm_clock is not None:
            parts.append(f"{self.sm_clock} of {self.max_sm_clock} MHz" if self.max_sm_clock else f"{self.sm_clock} MHz")
        return ", ".join(parts)


GPU_COLUMNS = frozenset(f"gpu_{name}" for name in GpuReading.__dataclass_fields__)  # of metrics.jsonl


def parse_throttle(bits: int) -> list[str]:
    """Return the reasons of throttling in words, each once."""
    if bits & HW_SLOWDOWN_CAUSES:
        bits &= ~HW_SLOWDOWN
    return list(dict.fromkeys(word for bit, word in THROTTLE_BITS.items() if bits & bit))


def read_throttle_bits(nvml: Any, gpu: Any) -> int:
    """Return the bits of THROTTLE_BITS, and of others, by their older name with drivers before version 535."""
    try:
        bits: int = nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
    except (AttributeError, nvml.NVMLError_FunctionNotFound):
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
    return bits


class GpuMonitor:
    """Reads one GPU, at most once in READING_SECONDS.

    Attributes:
        uuid: of the GPU, as "GPU-..."; None: there is none, and nothing is read.
    """

    def __init__(self, uuid: str | None) -> None:
        """Import and open nothing yet."""
        self.uuid = uuid
        self._nvml: Any = None
        self._handle: Any = None  # the open GPU; None: not opened yet, or it cannot be
        self._opened, self._next_time = False, 0.0  # next_time: of the next reading, by time.monotonic
        self._last: GpuReading | None = None
        self._notes: list[str] = []  # that nobody has taken
        self._left_out: set[str] = set()  # values of which it is known that they cannot be read
        self._alarm: str | None = None
        self._has_alarmed = False

    def read(self) -> GpuReading | None:
        """Return the state of the GPU, at most READING_SECONDS old; None if there is none that can be read."""
        if self.uuid is not None and not self._opened:
            self._opened = True
            self._open(self.uuid)
        if self._handle is not None and time.monotonic() >= self._next_time:
            self._last, self._next_time = self._read_values(), time.monotonic() + READING_SECONDS
            self._check_memory_errors(self._last.ecc_uncorrected or 0)
        return self._last

    def take_notes(self) -> list[str]:
        """Return lines on what cannot be read and why; each is returned once."""
        notes, self._notes = self._notes, []
        return notes

    def take_alarm(self) -> str | None:
        """Return a line on errors of the GPU that make results wrong; once."""
        alarm, self._alarm = self._alarm, None
        return alarm

    def close(self) -> None:
        """Read nothing any more."""
        if self._handle is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._handle, self.uuid = None, None

    def _open(self, uuid: str) -> None:
        try:
            self._nvml = importlib.import_module("pynvml")
        except ModuleNotFoundError as error:
            self._notes.append(f"no readings of the GPU: {explain_missing_extra(error) or error}")
            return
        try:
            self._nvml.nvmlInit()
            self._handle = self._find_device(uuid)
        except self._nvml.NVMLError as error:
            self._notes.append(f"no readings of the GPU: NVML: {str(error).rstrip('.')}")

    def _find_device(self, uuid: str) -> Any:
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._nvml.NVMLError_NotFound:  # CUDA does not say of a UUID that it is of a part of a GPU (MIG)
            return self._nvml.nvmlDeviceGetHandleByUUID(uuid.replace("GPU-", "MIG-", 1))

    def _read_values(self) -> GpuReading:
        nvml, gpu, errors = self._nvml, self._handle, dict[str, list[str]]()  # errors: names of values by NVML's text

        def ask(what: str, function: Callable[[], Any]) -> Any:
            try:
                return function()
            except (nvml.NVMLError, AttributeError) as error:  # AttributeError: the package is older than the function
                if what not in self._left_out:
                    errors.setdefault(str(error).rstrip("."), []).append(what)
                return None

        def count_ecc_errors(kind: int) -> Any:
            return nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, nvml.NVML_VOLATILE_ECC)  # since the driver was loaded

        load = ask("utilization", lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        memory = ask("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(gpu))
        reading = GpuReading(
            utilization=load,
            memory_used=memory.used if memory is not None else None,
            memory_total=memory.total if memory is not None else None,
            temperature=ask("temperature", lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
            power=ask("power", lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
            sm_clock=ask("clock", lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            max_sm_clock=ask("highest clock", lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            throttle=ask("throttling", lambda: parse_throttle(read_throttle_bits(nvml, gpu))),
            ecc_corrected=ask("corrected errors", lambda: count_ecc_errors(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED)),
            ecc_uncorrected=ask(
                "uncorrected errors", lambda: count_ecc_errors(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)
            ),
        )
        for text, names in errors.items():
            self._left_out.update(names)
            self._notes.append(f"readings of the GPU without {', '.join(names)}: NVML: {text}")
        return reading

    def _check_memory_errors(self, count: int) -> None:
        if count and not self._has_alarmed:
            self._has_alarmed = True
            self._alarm = (
                f"{self.uuid} on {socket.gethostname()} has {count} uncorrected ECC error{'s' * (count > 1)} since its "
                "driver was loaded: results may be wrong; reset or replace this GPU (`nvidia-smi -q -d ECC`)"
            )
