"""Serve the store in which the ranks of a program agree on addresses and ports (hvdtrain.launch.places)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from hvdtrain.comm.rendezvous import RendezvousServer
from hvdtrain.launch.job import JobSpec
from hvdtrain.launch.launcher import LaunchPlan
from hvdtrain.launch.places import STOP_KEY, STORE_VARIABLE
from hvdtrain.system import signed_http
from hvdtrain.system.errors import RunError
from hvdtrain.system.network import interface_address, interface_toward, is_local_host


@contextlib.contextmanager
def serve_store(plan: LaunchPlan, job: JobSpec) -> Iterator[JobSpec]:
    """Serve a store for the ranks of a plan within a block, and yield its job, whose ranks find the store.

    It listens on the interface that the ranks use, and answers only what is signed with the launch's secret. If srun
    chooses the hosts, nothing is served: its ranks have a store of their own (hvdtrain.comm.srun).

    Raises:
        RunError: it cannot listen there.
    """
    if job.launcher.batch_system is not None and not job.hosts:
        yield job
        return
    address = find_store_address(plan)
    try:
        server = RendezvousServer(address, {}, key=signed_http.read_key(plan.environ))
    except OSError as error:
        raise RunError(f"cannot listen at {address}: {error.strerror or error}") from None
    try:
        environ = {**job.environ, STORE_VARIABLE: f"{address}:{server.port}"}
        yield replace(job, environ=environ, announce_stop=partial(announce_stop, server))
    finally:
        server.stop_serving()


def announce_stop(server: RendezvousServer, name: str) -> None:
    """Put the name of the signal by which ranks are stopped, without its SIG, into the store."""
    server.values[STOP_KEY] = name.encode()


def find_store_address(plan: LaunchPlan) -> str:
    """Return the address of this host at which all ranks reach it."""
    names = [host.name for host in plan.hosts]
    if plan.nic and not all(map(is_local_host, names)):
        return interface_address(plan.nic.partition(",")[0])
    return interface_address("lo" if all(map(is_local_host, names)) else interface_toward(names))
