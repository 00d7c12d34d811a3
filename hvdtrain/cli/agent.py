"""`hvdtrain agent`: keep a host in the membership folder until it is to be preempted."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hvdtrain.preemption.source import REQUIRED, SOURCES, NoticeSource, SourceOption, options_of_source
from hvdtrain.system.errors import UserError

OptionValue = str | int | float | bool | Path | None


class AgentCommand(click.Command):
    """The agent's own options, and those of all notice sources."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        of_sources = map(make_source_click_option, collect_options().values())
        return [*own[:-1], *of_sources, own[-1]]  # --help is the last

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Sources"):
            lines = {name: (source.__doc__ or "").partition("\n")[0] for name, source in load_sources().items()}
            formatter.write_dl(list(lines.items()))


def load_sources(chosen: str | None = None) -> dict[str, type[NoticeSource]]:
    """Return all sources by name, without those of other packages that cannot be used.

    Raises:
        UserError: the source `chosen` does not exist, cannot be loaded, or has an option that clashes with another one.
    """
    sources: dict[str, type[NoticeSource]] = {}
    for name in SOURCES.names():
        try:
            source = SOURCES.get(name)
            check_source_options(name, source, sources)
        except UserError:
            if name == chosen:
                raise
            continue
        sources[name] = source
    if chosen is not None:
        SOURCES.get(chosen)
    return sources


def check_source_options(name: str, source: type[NoticeSource], others: Mapping[str, type[NoticeSource]]) -> None:
    """Raise UserError if an option is the agent's own, or of another type than that of another source."""
    own = {parameter.name for parameter in agent_command.params}
    types = {
        option.name: (option.type, other) for other, found in others.items() for option in options_of_source(found)
    }
    for option in options_of_source(source):
        kind, other = types.get(option.name, (option.type, ""))
        if option.name in own:
            raise UserError(f"{option.flag} is the agent's own option; rename the field in the notice source {name!r}")
        if kind is not option.type:
            raise UserError(
                f"{option.flag} takes {option.type.__name__} in the notice source {name!r} and {kind.__name__} in "
                f"{other!r}; rename the field"
            )


def collect_options() -> dict[str, dict[str, SourceOption]]:
    """Return the options of all sources: by option, the sources that have it."""
    found: dict[str, dict[str, SourceOption]] = {}
    for name, source in load_sources().items():
        for option in options_of_source(source):
            found.setdefault(option.name, {})[name] = option
    return found


def make_source_click_option(options: dict[str, SourceOption]) -> click.Option:
    """Return the option of the command line for an option that these sources have."""
    first = next(iter(options.values()))
    texts = [first.help]
    if len(options) < len(load_sources()):
        texts.append(f"For {join_names(list(options))}.")
    if first.type is bool:
        return click.Option([first.name, first.flag], is_flag=True, default=None, help=" ".join(texts))
    defaults: dict[str, list[str]] = {}
    for name, option in options.items():
        if option.default is not REQUIRED and option.default is not None:
            defaults.setdefault(f"{option.default:g}" if option.type is float else str(option.default), []).append(name)
    usual, *others = sorted(defaults, key=lambda value: -len(defaults[value])) or [""]
    if usual:
        texts.append("; ".join([f"Default: {usual}", *(f"for {join_names(defaults[v])} {v}" for v in others)]) + ".")
    kind = click.Path(path_type=Path) if first.type is Path else first.type
    return click.Option([first.name, first.flag], type=kind, metavar=first.metavar, help=" ".join(texts))


def make_source(name: str, host: str, given: dict[str, OptionValue]) -> NoticeSource:
    """Make a source from the options that were given. Raises UserError if they are not its options, or invalid."""
    source = load_sources(name)[name]
    options = {option.name: option for option in options_of_source(source)}
    for other in given:
        if other not in options:
            owners = collect_options()[other]
            raise UserError(f"{owners[next(iter(owners))].flag} is for {join_names(list(owners))}, not for {name}")
    for option in options.values():
        if option.default is REQUIRED and option.name not in given:
            raise UserError(f"--source {name} needs {option.flag} {option.metavar or option.name.upper()}")
    values: dict[str, Any] = dict(given)  # of the types that the source's fields have
    try:
        return source(host=host, **values)
    except ValueError as error:
        raise UserError(str(error)) from None


def join_names(names: list[str]) -> str:
    """Return `a`, `a and b` or `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


@click.command("agent", cls=AgentCommand, context_settings={"max_content_width": 100})
@click.option(
    "--source",
    required=True,
    metavar="NAME",
    help="Where notices come from: one of the sources below.",
)
@click.option(
    "--membership",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="The folder that all hosts and the launcher share.",
)
@click.option("--host", metavar="NAME", help="This host's name, as the launcher reaches it. Default: its own name.")
@click.option("--slots", type=click.IntRange(min=1), metavar="N", help="Ranks it takes. Default: its GPUs, or 1.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.05),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Between heartbeats.",
)
@click.option(
    "--boot-id",
    metavar="ID",
    help="What names this life of the host: after a notice, only another one may join. "
    "Default: the kernel's boot id; for slurm, with the job and its restarts.",
)
def agent_command(
    source: str,
    membership: Path,
    host: str | None,
    slots: int | None,
    interval: float,
    boot_id: str | None,
    **source_options: OptionValue,
) -> int:
    """Keep this host in the membership folder, and mark it there before it is preempted.

    One runs on each host; `hvdtrain discover membership` offers the launcher those that are alive and stay. After a
    notice the agent writes NAME.draining, and continues until the host ends. SIGTERM or Ctrl-C takes the host out of
    the folder, unless they are the source's notice.
    """
    from hvdtrain.launch.hosts import parse_host
    from hvdtrain.preemption.agent import Agent, AgentConfig

    name = socket.gethostname() if host is None else host
    given: dict[str, OptionValue] = {key: value for key, value in source_options.items() if value is not None}
    notice_source = make_source(source, name, given)
    if ":" in name:
        raise UserError(f"--host {name!r} is not a host name or IPv4 address; --slots says how many ranks it takes")
    parse_host(name, "--host")
    try:
        membership.mkdir(exist_ok=True)  # but not its parents: they may be what is not mounted
        life = boot_id or notice_source.read_boot_id()
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    config = AgentConfig(membership, name, slots or count_gpu_devices() or 1, life, source, interval)
    Agent(config, notice_source).run_agent()
    return 0


def count_gpu_devices() -> int:
    """Return how many NVIDIA GPUs this host shows, without asking torch."""
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))
