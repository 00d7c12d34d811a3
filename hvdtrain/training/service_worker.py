"""A run with a parameter server on its workers, and how both sides learn that it has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.server.items import ItemContext
from hvdtrain.server.served_step import check_served_step
from hvdtrain.server.shards import divide_parameters
from hvdtrain.server.worker import ItemComputer, compute_items
from hvdtrain.system import activity
from hvdtrain.system.errors import KnownError
from hvdtrain.training.checkpoint import BestCheckpoint
from hvdtrain.training.elastic_service import announce_worker, join_service
from hvdtrain.training.run import Run
from hvdtrain.training.service import Service, enter_service
from hvdtrain.training.summary import Summary, end_rank


@contextlib.contextmanager
def announcing_failures(service: Service | None) -> Iterator[None]:
    """Let the workers raise the error with which the block ends rank 0's run."""
    try:
        yield
    except KnownError as error:
        if service is not None and service.server is not None:
            service.server.announce_failure(error)
        raise


def begin_service(run: Run, world: World) -> tuple[Service, World]:
    """Return this rank's part in a run with a parameter server, and the world in which it is alone from now on.

    Raises UserError on all ranks if a server cannot train the recipe.
    """
    step = check_served_step(run.step, type(run.recipe).__name__)
    if (met := run.membership.meet_server()) is None:
        return enter_service(step, run.options, world)
    return join_service(step, met, run.options, world, run.membership, run.report), world


def follow_server(run: Run, service: Service, world: World) -> Summary | Service:
    """Compute gradients on a worker, or be a server other than rank 0, until the run has ended; return its summary.

    In an elastic run the server may be lost, and this process may take its place: then its part as the server.
    """
    if not run.membership.world_may_change:
        return follow_to_end(run, service, world)
    first = service.step.make_array()
    service.step.read_weights(first)
    while service.server is None:
        try:
            return follow_to_end(run, service, world)
        except collectives.PeersLost:
            activity.enter_activity("waiting for another server", waits=True)
        service.messages.close()
        service, world = begin_service(run, world)
    service.step.write_weights(first)  # for a run that has no checkpoint yet
    return service


def follow_to_end(run: Run, service: Service, world: World) -> Summary:
    """Do what one server says until the run has ended, and report that; return the run's summary.

    Raises PeersLost if the server is lost.
    """
    folder, rank = run.recipe.now.folder, service.rank

    def make_computer(context: ItemContext, given_rank: int) -> ItemComputer:
        nonlocal rank
        rank = given_rank
        if run.membership.world_may_change:
            announce_worker(run.membership, world, rank)
        return ItemComputer(run.recipe, service.step, context, folder, parts)

    if service.shard is not None:
        summary = service.shard.serve()
    else:
        parts = divide_parameters(service.step.parameter_bytes(), service.roles.servers)
        summary = compute_items(make_computer, service.messages, lambda: bool(run.stop.collect_votes().stop))
    activity.enter_activity("ending the run", patient=True)
    best = summary["best"]
    found = Summary(**{**summary, "best": BestCheckpoint(**best) if best is not None else None})
    end_rank(rank, found)
    return found
