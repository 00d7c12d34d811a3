"""A rank for the tests of launch: joins the others, sends messages, and ends in the way that its argument names."""

import os
import signal
import socket
import sys
import time
import traceback

import horovod.torch as hvd
import torch

from hvdtrain.system.messages import RankFailed, RankFinished, RankProgress, RankStarted, send_message


def main(mode: str) -> int:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    if mode.startswith("early"):
        print("not started", flush=True)
        time.sleep(60)
    hvd.init()
    rank = hvd.rank()
    host = socket.gethostname() if mode != "remote" else f"far-{rank}"
    send_message(RankStarted(rank, host, os.getpid()))
    print("unfinished", end="")
    send_message(RankProgress(1, 2, 1, 0.5, 100.0))
    print(f"\nhello from {rank} of {hvd.size()}, umläut, launched={os.environ['HVDTRAIN_LAUNCH']}", flush=True)
    print(f"error stream {rank}", file=sys.stderr, flush=True)
    total = hvd.allreduce(torch.ones(2), op=hvd.Sum, name="sum")
    print(f"sum {int(total[0])}", flush=True)
    if mode == "text":
        print("\rone\rtwo\r\n" + "x" * 100_000 + "end\n  indented", flush=True)
        print("no newline", end="", flush=True)
    if mode == "bytes":
        os.write(1, b"bad \xff bytes\n")
    if rank == 1:
        if mode == "raise":
            raise ValueError("boom")
        if mode == "user":
            send_message(RankFailed(rank, host, code=2, error="no such file"))
            return 2
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "code":
            os._exit(3)
    code = 0
    for step in range(3 if mode not in ("wait", "deaf", "remote") else 10_000):
        flag = hvd.allreduce(torch.tensor(1.0 if stopped and mode != "deaf" else 0.0), op=hvd.Sum, name="stop")
        if flag:
            print(f"saved at {step > 0}", flush=True)
            code = 75
            break
        time.sleep(0.01)
    code = 75 if mode == "requeue" else code
    if rank == 0:
        time.sleep(0.2)
    hvd.allreduce(torch.zeros(1), name="end")
    send_message(RankFinished(rank, code))
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except Exception as error:
        number = int(os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
        told = f"{type(error).__name__}: {error}"
        send_message(RankFailed(number, socket.gethostname(), code=1, error=told, traceback=traceback.format_exc()))
        sys.exit(1)
