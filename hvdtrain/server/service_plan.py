"""What a run with a parameter server will do, besides the plan of training."""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.recipe.ranges import Ranges
from hvdtrain.server.items import ItemContext
from hvdtrain.server.roles import Roles
from hvdtrain.system.text import format_count


@dataclass(frozen=True)
class ServicePlan:
    """How versions of the weights are made."""

    roles: Roles
    context: ItemContext
    threads: int  # of each rank; a replay needs the same for the same bits

    @property
    def per_version(self) -> int:
        """How many items a version is made of."""
        return self.context.parts_per_batch

    def count_versions(self, epoch: int, pending: Ranges) -> int:
        """Return how many versions are left. pending: positions of the epoch's (from 0) order that are not applied."""
        if epoch >= self.context.epochs:
            return 0
        whole = self.context.count_versions([[0, self.context.examples]], self.per_version)
        return self.context.count_versions(pending, self.per_version) + (self.context.epochs - epoch - 1) * whole

    def describe(self) -> list[str]:
        """Return lines to print."""
        batch, most = self.context.batch, -(-self.context.batch // self.context.parts)
        made = (
            f"{batch} global = a version of {format_count(self.per_version, 'item')} x at most {most}"
            if self.roles.policy.in_rounds
            else f"{batch} = a version of one item: --batch-size / {len(self.roles.workers)} workers"
        )
        return [
            f"batch     {made}",
            f"server    {self.roles.describe()}",
        ]

    def encode(self) -> str:
        """Return it as the ledger's header has it: STALENESS/SERVERS/WORKERS/THREADS/STEPS."""
        roles, steps = self.roles, self.context.total_steps
        return f"{roles.policy.text}/{roles.servers}/{len(roles.workers)}/{self.threads}/{steps}"
