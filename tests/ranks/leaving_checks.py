"""A rank leaves while the other hands over sum after sum: each of them ends, with an error. Round after round.

leaving_checks.py FOLDER ROUNDS    on two ranks; the folder is where they tell each other what they did
"""

import os
import socket
import sys
import time
from pathlib import Path

import torch

import hvdtrain
from hvdtrain.collectives import ops
from hvdtrain.collectives import world as worlds
from hvdtrain.collectives.rendezvous import Server

FOLDER, ROUNDS = Path(sys.argv[1]), int(sys.argv[2])
RANK = hvdtrain.init().rank
HOST = socket.gethostname()


def tell(name, text):
    (FOLDER / f"{name}.new").write_text(text)
    (FOLDER / f"{name}.new").replace(FOLDER / name)


def told(name):
    while not (FOLDER / name).exists():
        time.sleep(0.002)
    return (FOLDER / name).read_text()


def meet_again(number):
    """A new world of the same two."""
    if RANK == 0:
        assignments = {f"{HOST}:{rank}": f"{rank},2,{rank},2,0,1" for rank in range(2)}
        servers.append(Server("127.0.0.1", assignments))
        tell(f"port-{number}", str(servers[-1].port))
    address = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": told(f"port-{number}")}
    worlds.enter({**address, "HOROVOD_HOSTNAME": HOST})


servers = []
refused = 0
for number in range(ROUNDS):
    ops.barrier(f"begin.{number}")
    if RANK == 1:
        told(f"busy-{number}")
        time.sleep(0.001 * (number % 7))
    else:
        handles = []
        try:
            while True:
                handles.append(ops.all_reduce_async_(torch.zeros(1), f"sum.{number}.{len(handles)}"))
                if len(handles) == 20:
                    tell(f"busy-{number}", "")
        except ops.PeersLost:
            refused += 1
        for handle in handles:
            try:
                ops.wait(handle)
            except ops.PeersLost:
                continue
            raise AssertionError("a sum of one rank only")
    worlds.leave()
    meet_again(number)
assert refused == (ROUNDS if RANK == 0 else 0)
print("ok leaving", flush=True)
os._exit(0)
