"""A run with a parameter server on its workers, and how both sides learn that it has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hvdtrain.server.shards import divide_parameters
from hvdtrain.server.worker import ItemComputer, compute_items
from hvdtrain.system import activity
from hvdtrain.system.errors import KnownError
from hvdtrain.training.checkpoint import BestCheckpoint
from hvdtrain.training.run import Run
from hvdtrain.training.service import Service
from hvdtrain.training.summary import Summary


@contextlib.contextmanager
def announcing_failures(service: Service | None) -> Iterator[None]:
    """Let the workers raise the error with which the block ends rank 0's run."""
    try:
        yield
    except KnownError as error:
        if service is not None and service.server is not None:
            service.server.announce_failure(error)
        raise


def follow_server(run: Run, service: Service) -> Summary:
    """Compute gradients on a worker, or be a server other than rank 0, until the run has ended; return its summary."""
    folder = run.recipe.now.folder
    if service.shard is not None:
        summary = service.shard.serve()
    else:
        parts = divide_parameters(service.step.parameter_bytes(), service.roles.servers)
        summary = compute_items(
            lambda context: ItemComputer(run.recipe, service.step, context, folder, parts),
            service.messages,
            lambda: bool(run.stop.collect_votes().stop),
        )
    activity.enter_activity("ending the run", patient=True)
    best = summary["best"]
    return Summary(**{**summary, "best": BestCheckpoint(**best) if best is not None else None})
