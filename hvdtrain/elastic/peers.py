"""The supervisors of a run as their heartbeats show them: which are alive, and which workers are gone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from hvdtrain.elastic.records import GONE, Heartbeat
from hvdtrain.elastic.store import KeyValueStore


@dataclass
class HeartbeatMonitor:
    """Notices heartbeats that do not change, by this process's monotonic clock: no clock of another host counts."""

    last_changes: dict[str, tuple[int, float]] = field(default_factory=dict)  # by supervisor: its beats, and when
    last_check: float = 0.0

    def find_expired(self, heartbeats: Mapping[str, Heartbeat], lease: float) -> set[str]:
        """Return the supervisors whose heartbeats have not changed for `lease` seconds."""
        now = time.monotonic()
        if now - self.last_check > lease / 2:  # this process was frozen itself, and knows nothing of the others
            self.last_changes.clear()
        self.last_check = now
        for name, heartbeat in heartbeats.items():
            if name not in self.last_changes or self.last_changes[name][0] != heartbeat.beats:
                self.last_changes[name] = (heartbeat.beats, now)
        return {name for name, (_, since) in self.last_changes.items() if now - since > lease}


@dataclass(frozen=True)
class Peers:
    """All supervisors at one time."""

    own_name: str
    heartbeats: dict[str, Heartbeat]  # by supervisor
    lost: set[str]  # supervisors without a heartbeat for as long as the lease
    gone: set[str]  # members that are not in the run any more

    @property
    def alive(self) -> set[str]:
        """The workers of supervisors that are not lost."""
        return {heartbeat.member for name, heartbeat in self.heartbeats.items() if name not in self.lost}

    @property
    def others(self) -> list[Heartbeat]:
        """The heartbeats of the other supervisors that are not lost."""
        return [beat for name, beat in self.heartbeats.items() if name != self.own_name and name not in self.lost]

    def host_has_other_workers(self, host: str) -> bool:
        """Whether another slot of a host has a worker, or will have one."""
        return any(beat.host == host and not (beat.drained and beat.member in self.gone) for beat in self.others)

    def all_know_the_end(self) -> bool:
        """Whether every supervisor that is not lost knows that the run has ended, or leaves it."""
        return all(beat.ending or name in self.lost for name, beat in self.heartbeats.items())


class PeerMonitor:
    """Reads the heartbeats of all supervisors for one of them."""

    def __init__(self, store: KeyValueStore, own_name: str, lease: float) -> None:
        self.store, self.own_name, self.lease = store, own_name, lease
        self._monitor = HeartbeatMonitor()

    def read(self) -> Peers:
        """Return all supervisors as they are now."""
        heartbeats = self.store.get_heartbeats()
        lost = self._monitor.find_expired(heartbeats, self.lease)
        return Peers(self.own_name, heartbeats, lost, set(self.store.get_all(GONE)))

    def declare_lost(self) -> Peers:
        """Write that the workers of lost supervisors are gone; return all supervisors."""
        peers = self.read()
        for name in peers.lost & peers.heartbeats.keys() - {self.own_name}:
            member = peers.heartbeats[name].member
            if member not in peers.gone:
                self.store.put(GONE.of(member), "lost")
                peers.gone.add(member)
        return peers
