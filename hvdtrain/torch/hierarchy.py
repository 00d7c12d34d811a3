"""The hosts of a loss's exchange in a world: `--hierarchy host`."""

from __future__ import annotations

from collections.abc import Callable

from hvdtrain.comm.host_groups import connect_hosts
from hvdtrain.comm.world import World
from hvdtrain.compression.hierarchical_reducer import RoundOrder
from hvdtrain.torch.update_settings import UpdateSettings


def connect_round_order(
    settings: UpdateSettings, world: World, name: str, log_line: Callable[[str], object]
) -> RoundOrder | None:
    """Connect the ranks of each host, and those across hosts, all of which call this; return the order of their rounds.

    Args:
        settings: of the run.
        world: this process's place.
        name: of the loss, whose exchange closes the connections.
        log_line: called with a line to print.

    Returns:
        None: the exchange is flat.
    """
    if not settings.options.exchange.sums_on_hosts or world.size == 1:
        return None
    device = next(settings.model.parameters()).device
    connected = connect_hosts(world, f"{name}.hierarchy", device)
    if isinstance(connected, str):
        log_line(f"hierarchy none: {connected}")
        return None
    log_line(f"hierarchy {connected.describe()}: each host adds up its gradients, and encodes the sum once")
    return RoundOrder(connected)
