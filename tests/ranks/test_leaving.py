"""Ranks that leave in the middle of what others do end nobody's process, and hold nobody up."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import torch

import hvdtrain
from hvdtrain.comm import collectives
from hvdtrain.comm import world as horovod
from hvdtrain.comm.rendezvous import RendezvousServer
from tests.support.worlds import KeptWorld

ROUNDS = 40
HOST = socket.gethostname()


def test_pending_all_reduces_fail_when_another_rank_leaves(tmp_path: Path) -> None:
    """A rank leaves while the other hands over sum after sum: each of them ends, with an error. Round after round."""
    with KeptWorld(2) as world:
        assert world.run(leave_and_meet_again, tmp_path) == [ROUNDS, 0]


def leave_and_meet_again(folder: Path) -> int:
    """How often this rank was told that the other has left."""
    rank, refused, servers = hvdtrain.init().rank, 0, []
    for number in range(ROUNDS):
        collectives.barrier(f"begin.{number}")
        if rank == 1:
            wait_for(folder / f"busy-{number}")
            time.sleep(0.001 * (number % 7))
        else:
            handles = []
            try:
                while True:
                    handles.append(collectives.all_reduce_async_(torch.zeros(1), f"sum.{number}.{len(handles)}"))
                    if len(handles) == 20:
                        write(folder / f"busy-{number}", "")
            except collectives.PeersLost:
                refused += 1
            for handle in handles:
                try:
                    collectives.wait(handle)
                except collectives.PeersLost:
                    continue
                raise AssertionError("a sum of one rank only")
        horovod.shut_down_horovod()
        if rank == 0:
            assignments = {f"{HOST}:{rank}": f"{rank},2,{rank},2,0,1" for rank in range(2)}
            servers.append(RendezvousServer("127.0.0.1", assignments))
            write(folder / f"port-{number}", str(servers[-1].port))
        port = wait_for(folder / f"port-{number}")
        address = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": port}
        horovod.enter_world({**address, "HOROVOD_HOSTNAME": HOST})
    return refused


def write(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def wait_for(path: Path) -> str:
    while not path.exists():
        time.sleep(0.002)
    return path.read_text()
