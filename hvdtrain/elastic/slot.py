"""A slot, as horovodrun gives it to a supervisor, and what the supervisor hands on to its worker.

The worker's environment names its slot and the read end of a pipe, on which the supervisor sends it requests. When the
supervisor dies, the pipe is closed: that is a request to leave.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum

MEMBER_VARIABLE = "HVDTRAIN_MEMBER"  # in a worker's environment: its slot and its name
REQUESTS_FD_VARIABLE = "HVDTRAIN_MESSAGES"  # likewise: the file descriptor of the pipe


class Request(bytes, Enum):
    """What a supervisor asks of its worker, as bytes on the pipe between them."""

    STOP = b"s"  # save the state and stop the run
    LEAVE = b"d"  # leave the run after the current step: the host goes away
    REGROUP = b"r"  # form a larger generation after the current step: newcomers are ready


@dataclass(frozen=True)
class Slot:
    """A place for a worker, as horovodrun gives it."""

    host: str
    local_rank: int
    local_size: int
    size: int  # of the world when the slot was filled
    address: str  # of horovodrun's key-value server
    port: int
    interface: str
    min_members: int  # of a generation

    @staticmethod
    def from_environment(environ: Mapping[str, str]) -> Slot:
        """Read what horovodrun tells a process that it starts."""
        return Slot(
            host=environ["HOROVOD_HOSTNAME"],
            local_rank=int(environ["HOROVOD_LOCAL_RANK"]),
            local_size=int(environ["HOROVOD_LOCAL_SIZE"]),
            size=int(environ["HOROVOD_SIZE"]),
            address=environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"],
            port=int(environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]),
            interface=environ.get("HOROVOD_GLOO_IFACE", "lo"),
            min_members=int(environ.get("HVDTRAIN_MIN_NP", "1")),
        )

    def worker_environment(self, member: str, requests_fd: int) -> dict[str, str]:
        """Return what a supervisor adds to the environment of its worker, called `member`."""
        about = json.dumps({"member": member, "slot": asdict(self)})
        return {MEMBER_VARIABLE: about, REQUESTS_FD_VARIABLE: str(requests_fd)}

    @staticmethod
    def from_worker_environment(environ: Mapping[str, str]) -> tuple[Slot, str, int]:
        """Return a worker's slot, its member's name, and the read end of its pipe."""
        given = json.loads(environ[MEMBER_VARIABLE])
        return Slot(**given["slot"]), str(given["member"]), int(environ[REQUESTS_FD_VARIABLE])


def send_request(requests_fd: int, request: Request) -> None:
    """Send a request to a worker, which may have ended."""
    with contextlib.suppress(OSError):
        os.write(requests_fd, request.value)


def read_requests(requests_fd: int) -> set[Request]:
    """Return the requests that have come since the last call, without waiting. Takes microseconds."""
    try:
        received = os.read(requests_fd, 4096)
    except BlockingIOError:
        return set()
    if not received:  # the supervisor has died
        return {Request.LEAVE}
    return {request for request in Request if request.value in received}
