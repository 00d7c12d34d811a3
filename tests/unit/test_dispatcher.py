"""Who gets which item when, simulated with workers of any speed: each item once, none too old, versions as planned."""

from __future__ import annotations

import heapq
import random

import pytest

from hvdtrain.exchange.server_options import ServerOptions, parse_staleness
from hvdtrain.recipe import order
from hvdtrain.recipe.ranges import Ranges
from hvdtrain.server.dispatcher import Assignment, Dispatcher
from hvdtrain.server.items import EpochItems, Item, ItemContext
from hvdtrain.server.roles import Roles, choose_roles
from hvdtrain.server.service_plan import ServicePlan
from hvdtrain.server.shards import divide_parameters
from hvdtrain.system.errors import UserError

EXAMPLES, BATCH = 101, 24


def make_context(staleness: str, workers: int) -> ItemContext:
    """As hvdtrain.training.service does."""
    policy = parse_staleness(staleness)
    batch = BATCH if policy.in_rounds else -(-BATCH // workers)
    parts = policy.count_parts(workers) if policy.in_rounds else 1
    return ItemContext(examples=EXAMPLES, seed=0, batch=batch, parts=parts, micro_batch=batch, total_steps=0, epochs=1)


def simulate(
    staleness: str, speeds: list[float], items: EpochItems, stop_after: int | None = None
) -> tuple[Dispatcher, list[list[Assignment]], float]:
    """An epoch with workers that take so many seconds for an item; the versions that were made, and the time."""
    roles, chance = Roles(1, len(speeds) + 1, parse_staleness(staleness)), random.Random(0)
    context = make_context(staleness, len(speeds))
    dispatcher = Dispatcher(roles, roles.workers, context.parts_per_batch, 0)
    dispatcher.begin_epoch(items)
    now, events, versions = 0.0, list[tuple[float, int]](), list[list[Assignment]]()
    while items.left and len(versions) != stop_after:
        if ready := dispatcher.take_ready():
            versions.append(ready)
            continue
        for assignment in dispatcher.assign():
            assert assignment.read == dispatcher.version
            seconds = speeds[assignment.worker - 1] * chance.uniform(0.9, 1.1)
            heapq.heappush(events, (now + seconds, assignment.worker))
        now, worker = heapq.heappop(events)
        dispatcher.accept(worker)
    return dispatcher, versions, now


def whole_epoch(staleness: str, workers: int) -> EpochItems:
    return EpochItems(make_context(staleness, workers), 0, [])


@pytest.mark.parametrize("speeds", [[1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 4.0], [0.3, 1.0, 7.0, 2.0]])
@pytest.mark.parametrize("staleness", ["sync", "backup:1", "backup:2", "bounded:1", "bounded:3", "async", "async+dc"])
def test_every_item_is_applied_once_and_none_is_older_than_its_bound(staleness: str, speeds: list[float]) -> None:
    policy, workers = parse_staleness(staleness), len(speeds)
    if policy.kind == "backup" and policy.number >= workers:
        pytest.skip("waits for none")
    context = make_context(staleness, workers)
    dispatcher, versions, _ = simulate(staleness, speeds, whole_epoch(staleness, workers))
    applied = sorted(one.item for version in versions for one in version)
    assert applied == list(context.cut_items([[0, EXAMPLES]]))
    ages = [number - one.read for number, version in enumerate(versions) for one in version]
    bound = policy.find_bound(workers)
    assert min(ages) == 0 and (bound is None or max(ages) <= bound)
    assert (dispatcher.staleness_max, dispatcher.staleness_sum) == (max(ages), sum(ages))
    roles = Roles(1, workers + 1, policy)
    assert len(versions) == ServicePlan(roles, context, 1).count_versions(0, [[0, EXAMPLES]])


def test_a_synchronous_version_has_the_shares_of_a_plain_runs_step() -> None:
    _, versions, _ = simulate("sync", [1.0, 2.0, 0.5], whole_epoch("sync", 3))
    for number, version in enumerate(versions):
        first, count = number * BATCH, min(BATCH, EXAMPLES - number * BATCH)
        bounds = [order.part_bounds(count, rank, 3) for rank in range(3)]
        assert [one.item for one in version] == [Item(first + begin, first + end) for begin, end in bounds]


def test_a_slow_worker_holds_up_synchronous_versions_only() -> None:
    """One of three workers at a quarter of the speed."""
    seconds = {
        name: simulate(name, [1.0, 1.0, 4.0], whole_epoch(name, 3))[2] for name in ("sync", "bounded:3", "async")
    }
    assert seconds["bounded:3"] * 1.8 < seconds["sync"] and seconds["async"] * 1.8 < seconds["sync"]
    dispatcher, versions, with_backup = simulate("backup:1", [1.0, 1.0, 4.0], whole_epoch("backup:1", 3))
    assert with_backup * 1.5 < seconds["sync"] / 1.0 and dispatcher.wasted > 0
    assert all(len(version) == 2 for version in versions)  # a whole batch, without the slow one


def test_what_is_left_of_an_epoch_is_dealt_to_other_workers() -> None:
    """Stopped after 5 versions with items out, then continued with two workers instead of three."""
    items = whole_epoch("async", 3)
    _, versions, _ = simulate("async", [1.0, 2.0, 9.0], items, stop_after=5)
    left: Ranges = items.unapplied
    assert left
    rest = EpochItems(make_context("async", 2), items.frontier, left)
    _, more, _ = simulate("async", [1.0, 1.0], rest)
    positions = sorted(p for version in versions + more for one in version for p in range(*one.item))
    assert positions == list(range(EXAMPLES))


@pytest.mark.parametrize("staleness", ["sync", "backup:1", "bounded:1", "async"])
def test_the_items_of_a_lost_worker_are_applied_by_others_once(staleness: str) -> None:
    """Of three workers one is lost with an item, then another; a new one comes, as the first of them was called."""
    roles, context = Roles(1, 4, parse_staleness(staleness)), make_context(staleness, 3)
    dispatcher = Dispatcher(roles, roles.workers, context.parts_per_batch, 0)
    items, changes, applied = EpochItems(context, 0, []), [1, 3], list[Assignment]()
    dispatcher.begin_epoch(items)
    busy = list[int]()
    while items.left:
        if ready := dispatcher.take_ready():
            applied += ready
            continue
        busy += [assignment.worker for assignment in dispatcher.assign()]
        if len(applied) > 3 and changes:
            dispatcher.remove_worker(lost := changes.pop(0))
            busy = [worker for worker in busy if worker != lost]
            if not changes:
                dispatcher.workers.append(1)
            continue
        dispatcher.accept(busy.pop(0))
    assert sorted(one.item for one in applied) == list(context.cut_items([[0, EXAMPLES]]))
    assert not changes and dispatcher.handed_out == dispatcher.applied + dispatcher.wasted


@pytest.mark.parametrize(
    ("server", "staleness", "size", "message"),
    [
        (1, "sync", 1, "--server 1 of 1 rank leaves no worker; start 2 ranks or more: -np counts servers and"),
        (2, "sync", 2, "--server 2 of 2 ranks leaves no worker; start 3 ranks or more"),
        (1, "backup:3", 4, "--staleness backup:3 with 3 workers waits for none; expected at most backup:2"),
        (1, "backup:1", 2, "--staleness backup:1 with 1 worker waits for none; expected sync"),
    ],
)
def test_impossible_roles_are_refused(server: int, staleness: str, size: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_roles(ServerOptions(server=server, staleness=staleness), size)
    assert message in str(caught.value)


def test_parameters_are_divided_by_size() -> None:
    assert divide_parameters([4, 100, 30, 40, 30], 2) == [[0, 1], [2, 3, 4]]
    assert divide_parameters([8, 8], 1) == [[0, 1]]
    assert divide_parameters([8], 2) == [[0], []]
