"""What a source of preemption notices is, and the registry of all sources.

A source is one file: a dataclass whose fields are its command-line options, registered under the name that
`hvdtrain agent --source` takes. Those of other distributions are named in the entry point group `hvdtrain.notices`.

    @notice_source("mycloud")
    @dataclass(kw_only=True)
    class MyCloudSource(NoticeSource):
        "My cloud: polls its metadata server."        # the first line is shown by `hvdtrain agent --help`
        poll_interval = 5.0
        zone: str = source_option("eu", "The zone of this host.", metavar="NAME")

        def poll(self) -> Notice | None: ...
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args, get_type_hints

from hvdtrain.system.plugins import Registry, registering

KERNEL_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
REQUIRED = dataclasses.MISSING  # the default of an option without one


class UnexpectedResponse(Exception):
    """An answer that is not one of those documented; its text is printed."""


class Notice(NamedTuple):
    """This host will be preempted: why, and in how many seconds from now (0 or more)."""

    reason: str
    seconds: float


def source_option(default: Any, help: str, *, metavar: str | None = None) -> Any:
    """Return a dataclass field that is a command-line option of its source; `REQUIRED` is no default."""
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar})


def grace_option(default: float) -> Any:
    """Return the field `grace` with another default."""
    return source_option(default, "From a notice to the end, if the source does not give the time.", metavar="SECONDS")


@dataclass(kw_only=True)
class NoticeSource:
    """Base of all sources: overridden are `poll_interval` and `poll`, or `notice_signals`.

    Fields made by `source_option` are options: of type str, int, float, bool or Path, or one of these or None.
    Invalid values raise ValueError in `__post_init__`, with a text that begins with the flag.
    """

    poll_interval: ClassVar[float] = 0.0  # seconds between two polls; 0: it is not polled
    notice_signals: ClassVar[tuple[int, ...]] = ()  # signals to the agent that are notices
    exits_at_deadline: ClassVar[bool] = False  # the agent ends then: what ends is not the host, but an allocation of it

    host: str = ""  # this host's name, as the launcher reaches it
    grace: float = grace_option(30.0)

    def __post_init__(self) -> None:
        if not self.grace >= 0:
            raise ValueError(f"--grace {self.grace}: expected 0 or more seconds")

    @property
    def location(self) -> str:
        """Where it looks for notices, for messages: a URL or a path."""
        return type(self).__name__

    def poll(self) -> Notice | None:
        """Ask once for a notice; None: there is none.

        It is also asked after a notice; a sooner end replaces a later one. May raise any exception; it is polled again.
        OSError and UnexpectedResponse are reported by their text.
        """
        return None

    def read_boot_id(self, environ: Mapping[str, str] = os.environ) -> str:
        """Return what names this life of the host: a notice is for one life only. Raises OSError."""
        return KERNEL_BOOT_ID.read_text().strip()


SOURCES: Registry[type[NoticeSource]] = Registry("notice source", "hvdtrain.notices", "hvdtrain.preemption.sources")
S = TypeVar("S", bound=type[NoticeSource])


def notice_source(name: str) -> Callable[[S], S]:
    """Return a decorator that registers a source for `hvdtrain agent --source NAME`."""
    return registering(SOURCES, name)  # type: ignore[return-value]


@dataclass(frozen=True)
class SourceOption:
    """One option of a source, as the command line needs it."""

    name: str
    type: type  # str, int, float, bool or Path
    default: Any  # of `type`, None, or REQUIRED
    help: str
    metavar: str | None

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")


def options_of_source(source: type[NoticeSource]) -> list[SourceOption]:
    """Return a source's options in the order of declaration."""
    hints = get_type_hints(source)
    return [
        SourceOption(
            field.name,
            next(iter(get_args(hints[field.name])), hints[field.name]),
            field.default,
            field.metadata["help"],
            field.metadata["metavar"],
        )
        for field in dataclasses.fields(source)
        if "help" in field.metadata
    ]
