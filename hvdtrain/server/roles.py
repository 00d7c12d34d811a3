"""Which ranks are servers and which are workers, and what they send each other.

server -> worker    ["begin", ItemContext, rank]    once
                    ["item", epoch, begin, end]     with the weights
                    ["end", summary], ["failed", class, text, rank]
worker -> server    ["gradient", ItemResult]        with the gradient
                    ["failed", class, text]
                    ["joined", member, its host as horovodrun calls it, and as it calls itself]
                                                    first of all, in an elastic run; of a lost one the last is ["lost"]
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.exchange.server_options import ServerOptions, Staleness
from hvdtrain.system.errors import KnownError, RecipeError, RunError, UserError
from hvdtrain.system.text import format_count

KINDS = {kind.__name__: kind for kind in (UserError, RunError, RecipeError)}


@dataclass(frozen=True)
class Roles:
    """The first ranks serve, the others compute gradients."""

    servers: int
    size: int  # of all ranks
    policy: Staleness

    @property
    def workers(self) -> range:
        """The ranks of the workers."""
        return range(self.servers, self.size)

    def describe(self) -> str:
        """Return who does what, and which gradients are applied."""
        servers, workers = format_count(self.servers, "server"), format_count(len(self.workers), "worker")
        bound = self.policy.find_bound(len(self.workers))
        age = f", at most {format_count(bound, 'version')} old" if bound else ""
        return f"{servers}, {workers}, staleness {self.policy.text}{age}"


def choose_roles(options: ServerOptions, size: int) -> Roles:
    """Return the roles of `size` ranks. Raises UserError if that is not possible, on all ranks alike."""
    assert options.server is not None
    flag, policy = f"--server {options.server}", options.policy
    if size <= options.server:
        raise UserError(
            f"{flag} of {format_count(size, 'rank')} leaves no worker; start {options.server + 1} ranks or more: "
            "-np counts servers and workers"
        )
    workers = size - options.server
    if policy.kind == "backup" and policy.number >= workers:
        valid = f"at most backup:{workers - 1}" if workers > 1 else "sync"
        raise UserError(
            f"--staleness {policy.text} with {format_count(workers, 'worker')} waits for none; expected {valid}"
        )
    return Roles(options.server, size, policy)


def encode_failure(error: KnownError) -> list[str]:
    """Return an error's class and text, to be sent."""
    return [next(name for name, kind in KINDS.items() if isinstance(error, kind)), str(error)]


def decode_failure(kind: str, text: str, origin: int) -> KnownError:
    """Return an error that was sent. origin: the rank on which it happened."""
    error: KnownError = RecipeError(text, "") if kind == "RecipeError" else KINDS[kind](text)
    error.origin = origin
    return error
