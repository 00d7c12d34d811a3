"""A program for tests of `hvdtrain launch -- COMMAND`: what it does is its first argument."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

NAMES = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
NAMES += ("JAX_COORDINATOR_ADDRESS", "TF_CONFIG", "CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID", "HVDTRAIN_RELAUNCH")
rank = int(os.environ.get("RANK", os.environ.get("HOROVOD_RANK", "0")))
mode, value = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""


def leave_children() -> None:
    """Start a child, and a daemon that has lost its parents."""
    subprocess.Popen(["sleep", "900"])
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "900"])
        os._exit(0)


def end_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    print(f"rank {rank} ends after signal {number}", flush=True)
    sys.exit(int(value))


if mode == "variables":
    print(json.dumps({"RANK": rank, **{name: os.environ.get(name) for name in NAMES}}))
elif mode == "raise" and rank == 1:
    raise ValueError("planted on rank 1\nsecond line")
elif mode == "lost-peer":  # the rank that is not the cause ends first
    if rank == 0:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGSEGV)
elif mode == "exit" and rank == 1:
    sys.exit(int(value))
elif mode == "requeue":
    time.sleep(rank)
    sys.exit(75)
elif mode == "attempts":
    sys.exit(0 if os.environ["HVDTRAIN_RELAUNCH"] == value else 9)
elif mode == "output":
    try:
        raise KeyError("logged")
    except KeyError:
        logging.exception("rank %d continues", rank)
    out = sys.stdout.buffer
    out.write(b"latin \xe9 \xff\xfe end\n" + "four bytes \U0001f600\n".encode())
    for step in range(3):
        out.write(b"\rstep %d" % step)
        out.flush()
    out.write(b"\n" + b"x" * 300_000 + b"\n")
    for number in range(int(value)):
        out.write(b"line %d\n" % number)
    out.write(b"no end of line")
    out.flush()
    leave_children()
elif mode in ("wait", "handle", "ignore"):
    if mode != "wait":
        handler = end_by_signal if mode == "handle" else lambda number, frame: None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, handler)
    leave_children()
    print("ready", flush=True)
    while True:
        time.sleep(0.1)
if mode in ("raise", "exit"):
    time.sleep(60)
