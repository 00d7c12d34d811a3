"""What the patches of Horovod's elastic mode promise, in parts; tests/ranks/test_elastic_run.py runs whole jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.limits import stretch


class Samplers:
    """The samplers of all ranks of a world, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
        from horovod.torch.elastic import sampler

        self.module, self.monkeypatch, self.examples = sampler, monkeypatch, examples

    def enter(self, size: int, state: dict[str, Any] | None) -> list[Any]:
        """Return the samplers of a new world, which continue from a state."""
        found = []
        self.monkeypatch.setattr(self.module, "size", lambda: size)
        for rank in range(size):
            self.monkeypatch.setattr(self.module, "rank", lambda rank=rank: rank)
            found.append(self.module.ElasticSampler(list(range(self.examples))))
            if state is not None:
                found[-1].load_state_dict(state)
        return found


def exchange(samplers: list[Any]) -> None:
    counts = [sampler.counts[sampler.rank] for sampler in samplers]
    for sampler in samplers:
        sampler.exchange_counts(lambda count: counts)


def test_no_id_is_lost_or_repeated_over_worlds_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds, state, seen = Samplers(monkeypatch, 240), None, []
    for size, batches in ((3, 2), (4, 3), (1, 1), (5, 1)):
        samplers = worlds.enter(size, state)
        for sampler in samplers:
            seen += list(sampler)[: 7 * batches]
            for number in range(batches):
                sampler.record_batch(number, 7)
        states = [sampler.state_dict() for sampler in samplers]
        assert all(one == states[0] for one in states)
        state = states[0]
    last = worlds.enter(2, state)
    seen += [i for sampler in last for i in sampler]
    assert len(seen) - 240 == last[0].total_size - len(last[0].remaining_indices) <= 1  # padding
    assert sorted(set(seen)) == list(range(240))


def test_batches_of_ranks_may_differ_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds, seen = Samplers(monkeypatch, 100), []
    samplers = worlds.enter(3, None)
    for sampler, batch in zip(samplers, (4, 9, 2), strict=True):
        seen += list(sampler)[: 2 * batch]
        sampler.record_batch(0, batch)
        sampler.record_batch(1, batch)
    exchange(samplers)
    assert samplers[0].state_dict() == samplers[2].state_dict()
    assert samplers[1].processed_num == 30
    seen += [i for sampler in worlds.enter(2, samplers[1].state_dict()) for i in sampler]
    assert sorted(seen) == list(range(100))


def test_fewer_ids_than_half_the_ranks_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    samplers = Samplers(monkeypatch, 9).enter(8, {"epoch": 0, "processed_num": 6})  # as published Horovod saves it
    assert {len(list(sampler)) for sampler in samplers} == {1}
    assert len({i for sampler in samplers for i in sampler}) == 3
    assert [list(sampler) for sampler in Samplers(monkeypatch, 9).enter(8, {"epoch": 0, "processed_num": 9})] == [
        []
    ] * 8


def test_a_state_is_not_what_training_goes_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the attributes of a state nor an optimizer that was restored change what was saved."""
    import torch
    from horovod.torch.elastic.state import TorchState

    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = TorchState(model=model, optimizer=optimizer, schedule=schedule, seen=[], batch=0)

    def step() -> None:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
        state.seen.append(state.batch)
        state.batch += 1

    def describe() -> tuple[Any, ...]:
        moments = [value.clone() for one in optimizer.state.values() for value in one.values()]
        weights = [value.clone() for value in model.parameters()]
        return list(state.seen), state.batch, schedule.last_epoch, torch.cat([x.reshape(-1) for x in moments + weights])

    step()
    state.save()
    saved = describe()
    for _ in range(2):  # the second time after steps on what was restored
        step()
        state.restore()
        assert describe()[:3] == saved[:3]
        assert torch.equal(describe()[3], saved[3])


class FakeDriver:
    """What the registry of workers' states asks of horovodrun's driver; a resume lasts until `go`."""

    def __init__(self) -> None:
        self.resumed, self.stopped, self.go = threading.Event(), threading.Event(), threading.Event()
        self.registry: Any = None

    def finished(self) -> bool:
        return self.stopped.is_set()

    def stop(self, error_message: str | None = None) -> None:
        self.stopped.set()

    def has_rank_assignment(self, host: str, slot: int) -> bool:
        return host != "removed"

    def restart_slot(self, host: str, slot: int) -> bool:
        return False

    def resume(self) -> None:
        self.resumed.set()
        assert self.go.wait(stretch(20))
        self.registry.reset(2)


def run_threads(*calls: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def test_a_worker_may_fail_while_a_round_is_decided() -> None:
    """It held a lock that the decision needed (horovodrun waited for hosts meanwhile)."""
    from horovod.runner.elastic.discovery import FixedHosts, HostManager
    from horovod.runner.elastic.registration import WorkerStateRegistry

    driver = FakeDriver()
    registry = driver.registry = WorkerStateRegistry(driver, HostManager(FixedHosts({})))
    registry.reset(3)
    threads = run_threads(
        lambda: registry.record_failure("a", 0),
        lambda: registry.record_ready("b", 0),
        lambda: registry.record_ready("c", 0),
    )
    assert driver.resumed.wait(stretch(20))
    threads += run_threads(lambda: registry.record_failure("b", 0))  # while horovodrun waits for enough slots
    threads += run_threads(lambda: registry.record_ready("removed", 0))  # is no part of a round
    driver.go.set()
    threads[1].join(stretch(20))
    threads[2].join(stretch(20))
    threads += run_threads(lambda: registry.record_ready("c", 0))
    for thread in threads:
        thread.join(stretch(20))
    assert not any(thread.is_alive() for thread in threads)
    assert registry.last_rendezvous() == 3  # the failure was one of the second round


@pytest.mark.parametrize(
    ("text", "error"),
    [("echo a:2; echo b", None), ("exit 3", "Exit code: 3"), ("echo '?!'", "neither `host`"), ("echo a:x", "neither"),
     ("true", "found none"), ("sleep 600", "longer than")],
)  # fmt: skip
def test_the_last_good_list_of_hosts_stays_valid(
    text: str, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from horovod.runner.elastic import discovery

    monkeypatch.setattr(discovery, "DISCOVERY_TIMEOUT_SECS", 0.3)
    script = tmp_path / "discover.sh"
    script.write_text("#!/bin/sh\necho a:2; echo b\n")
    script.chmod(0o755)
    manager = discovery.HostManager(discovery.HostDiscoveryScript(str(script), None))
    manager.update_available_hosts()
    script.write_text(f"#!/bin/sh\n{text}\n")
    if error:
        with pytest.raises(RuntimeError, match=error):
            manager.update_available_hosts()
    else:
        manager.update_available_hosts()
    assert manager.current_hosts.host_slots == {"a": 2, "b": 1}


def test_hosts_that_are_not_listed_for_a_moment_stay() -> None:
    from horovod.runner.elastic.discovery import FixedHosts, HostManager

    fixed = FixedHosts({"a": 2, "b": 1})
    manager = HostManager(fixed)
    manager.removal_answers = 3
    manager.update_available_hosts()
    seen = []
    for answer in ({"a": 1}, {"a": 1}, {"a": 2, "b": 1}, {"a": 2}, {"a": 2, "c": 1}, {"a": 2, "c": 1}):
        fixed.set(answer)
        manager.update_available_hosts()
        seen.append(dict(manager.current_hosts.host_slots))
    both = {"a": 2, "b": 1}
    assert seen == [both, both, both, both, both | {"c": 1}, {"a": 2, "c": 1}]
