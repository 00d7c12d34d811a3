"""How a run with a parameter server begins: ranks get their roles, and each continues in a world of its own.

all ranks      make the step together: the same data, model and options on all, or an error on all
enter_service  each leaves that world for one in which it is alone
rank 0         trains as a run of one rank does, but for where gradients come from (hvdtrain.training.serving)
workers        follow_server: compute gradients until rank 0 sends its summary
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from hvdtrain.comm import collectives
from hvdtrain.comm.messages import Messages, connect_messages
from hvdtrain.comm.world import World, connections, leave_for_own_world
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.framework import Step
from hvdtrain.server.item_server import ItemServer
from hvdtrain.server.items import ItemContext, find_pending
from hvdtrain.server.roles import Roles, choose_roles
from hvdtrain.server.served_step import ServedStep
from hvdtrain.server.service_plan import ServicePlan
from hvdtrain.server.shards import GatheredStep, ShardServer
from hvdtrain.training.options import RunOptions
from hvdtrain.training.plan import TrainingPlan
from hvdtrain.training.position import Position


@dataclass(frozen=True)
class Service:
    """This rank's part in a run with a parameter server.

    Attributes:
        roles: of the ranks.
        rank: of this one, among all.
        threads: of each rank.
        messages: to and from the other ranks.
        step: of this rank.
        server: rank 0's side; None on the others.
        shard: the side of another server.
    """

    roles: Roles
    rank: int
    threads: int
    messages: Messages
    step: ServedStep
    server: ItemServer | None
    shard: ShardServer | None


def enter_service(served: ServedStep, options: RunOptions, world: World) -> tuple[Service, World]:
    """Leave the world of all ranks for one in which this rank is alone; return its part, and that world.

    All ranks call it. Raises UserError on all of them if they are too few.
    """
    roles = choose_roles(options.service, world.size)
    hosts = list(dict.fromkeys(collectives.gather_json(world.host, "service.hosts")))
    messages = connect_messages(world, roles.servers)
    alone = leave_for_own_world(world)
    connections.add(messages)
    served.switch_world(alone)
    server = ItemServer(roles, hosts, messages, served) if world.rank == 0 else None
    is_shard = 0 < world.rank < roles.servers
    shard = ShardServer(roles, world.rank, messages, served) if is_shard else None
    threads = options.resolve_threads(world.local_size).count
    return Service(roles, world.rank, threads, messages, served, server, shard), alone


def whole_step(service: Service) -> Step:
    """Return this rank's step; on rank 0 of several servers one that has all of the model where that is needed."""
    if service.server is None or service.roles.servers == 1:
        return service.step
    return cast(Step, GatheredStep(service.step, service.server.others))


def cut_recipe(recipe: Recipe, roles: Roles) -> Recipe:
    """Return the recipe with the examples of a version as its batch."""
    if roles.policy.in_rounds:
        return recipe
    return replace(recipe, batch_size=-(-recipe.batch_size // len(roles.workers)))


def plan_service(service: Service, plan: TrainingPlan, options: RunOptions, position: Position) -> TrainingPlan:
    """Return the plan with the items, and as many steps as there will be versions from `position` on."""
    roles = service.roles
    parts = roles.policy.count_parts(len(roles.workers)) if roles.policy.in_rounds else 1
    context = ItemContext(
        examples=plan.examples,
        seed=options.data.seed,
        batch=plan.batch_size,
        parts=parts,
        micro_batch=options.data.micro_batch or -(-plan.batch_size // parts),
        total_steps=plan.total_steps,
        epochs=plan.epochs,
    )
    planned = ServicePlan(roles, context, service.threads)
    if not plan.ends_with_epoch:
        return replace(plan, service=planned)
    pending = find_pending(plan.examples, position.offset, position.owed)
    total = position.step + planned.count_versions(position.epoch, pending)
    planned = replace(planned, context=replace(context, total_steps=total))
    return replace(plan, service=planned, total_steps=total)
