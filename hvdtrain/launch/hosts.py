"""Hosts of a run and their slots: parsed from -H or a host file, and filled with ranks."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from hvdtrain.system import nodelist
from hvdtrain.system.errors import UserError

HOST_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\Z", re.ASCII)
MAX_SLOTS_PER_HOST = 1024  # more is a mistake, such as a port
MAX_HOSTS = 10_000
MAX_SLOTS_KEYS = ("max_slots", "max-slots")


class Host(NamedTuple):
    """A host's name or IPv4 address, and how many ranks it takes."""

    name: str
    slots: int


def parse_hosts(text: str) -> list[Host]:
    """Return the hosts of `a:4,b:4`; a host without slots takes one rank.

    Raises:
        UserError: an item is empty, a name or a number is invalid, an address is of IPv6, a host is given twice, or
            there are too many hosts.
    """
    refuse_host_list(text, f"-H {text}")
    items = text.split(",")
    if len(items) > MAX_HOSTS:
        raise UserError(f"-H has {len(items)} hosts; expected at most {MAX_HOSTS}")
    hosts = [parse_host(item.strip(), f"-H {text}") for item in items]
    refuse_duplicate_hosts((f"-H {text}", host) for host in hosts)
    return hosts


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a file with lines `host slots=N`, `host:N` or `host`; `#` starts a comment.

    Open MPI's `max_slots=M` may follow, which must be at least N: there are never more ranks than slots.

    Raises:
        UserError: as for `parse_hosts`, naming the line; or the file has no hosts, or cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"--hostfile {path}: {reason}") from None
    hosts = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            where = f"{path} line {number}"
            hosts.append((where, parse_hostfile_line(text, where)))
    if not hosts:
        raise UserError(f"--hostfile {path}: there is no host in it")
    if len(hosts) > MAX_HOSTS:
        raise UserError(f"--hostfile {path} has {len(hosts)} hosts; expected at most {MAX_HOSTS}")
    refuse_duplicate_hosts(hosts)
    return [host for _, host in hosts]


def parse_hostfile_line(text: str, where: str) -> Host:
    """Return the host of a line of a host file. Raises UserError; `where` begins its text."""
    name, *words = re.sub(r"\s*=\s*", "=", text).split()
    host = parse_host(name, where)
    values = dict(word.partition("=")[::2] for word in words)
    if len(values) < len(words) or not set(values) <= {"slots", *MAX_SLOTS_KEYS} or ("slots" in values and ":" in name):
        raise UserError(f"{where}: {text!r} is not `host slots=N`, `host:N` or `host`")
    if "slots" in values:
        host = parse_host(f"{host.name}:{values['slots']}", where)
    for most in (values[key] for key in MAX_SLOTS_KEYS if key in values):
        if parse_host(f"{host.name}:{most}", where).slots < host.slots:
            raise UserError(f"{where}: max_slots={most} is less than the {host.slots} slots of host {host.name!r}")
    return host


def parse_host(text: str, where: str) -> Host:
    """Return the host of `name` or `name:slots`.

    Args:
        text: what was given.
        where: in what; begins the text of an error.

    Raises:
        UserError: the name or the number is invalid, or the address is of IPv6.
    """
    refuse_host_list(text, where)
    if is_ipv6(text) or text.count(":") > 2:
        raise UserError(f"{where}: {text!r} looks like an IPv6 address, which Horovod cannot use; give a name or IPv4")
    if text.count(":") == 2:
        raise UserError(f"{where}: {text!r} has two colons; expected host:slots (--ssh-port takes a port)")
    name, colon, slots = text.partition(":")
    if not text:
        raise UserError(f"{where}: a host is empty; expected host:slots,host:slots")
    if "@" in name:
        user, _, host = name.partition("@")
        raise UserError(f"{where}: {name!r} names a user: write `Host {host}` and `User {user}` into ~/.ssh/config")
    if not HOST_NAME.match(name):
        raise UserError(f"{where}: {name!r} is not a host name or IPv4 address")
    if not colon:
        return Host(name, 1)
    if not (slots.isascii() and slots.isdigit() and int(slots[:9]) > 0):
        raise UserError(f"{where}: {slots!r} slots for host {name!r}; expected a whole number above 0")
    if int(slots[:9]) > MAX_SLOTS_PER_HOST:
        raise UserError(
            f"{where}: {slots} slots for host {name!r}; expected at most {MAX_SLOTS_PER_HOST} (--ssh-port takes a port)"
        )
    return Host(name, int(slots))


def is_ipv6(text: str) -> bool:
    """Return whether a text is an IPv6 address, in brackets or not, with or without `:slots` after the brackets."""
    address = text[1:].partition("]")[0] if text.startswith("[") else text
    try:
        return isinstance(ipaddress.ip_address(address), ipaddress.IPv6Address)
    except ValueError:
        return False


def refuse_host_list(text: str, where: str) -> None:
    """Raise UserError, with the names written out, for Slurm's short form of several names, `node[01-03]`."""
    if "[" not in text or is_ipv6(text):
        return
    try:
        names = nodelist.parse_node_list(re.sub(r":\d+", "", text).replace(" ", ""), where)
    except UserError:
        names = []
    written = f"{','.join(names[:3])}{',...' if len(names) > 3 else ''}" if names else "node01,node02"
    raise UserError(f"{where}: {text!r} is a list in brackets; write each name: {written} (--from slurm reads lists)")


def refuse_duplicate_hosts(hosts: Iterable[tuple[str, Host]]) -> None:
    """Raise UserError for the first host that is given twice; each host comes after where it is given."""
    seen = set()
    for where, host in hosts:
        name = host.name.lower().rstrip(".")  # as DNS compares names
        if name in seen:
            raise UserError(f"{where}: host {host.name!r} is given twice")
        seen.add(name)


def assign_slots(hosts: Sequence[Host], ranks: int | None) -> list[Host]:
    """Return the hosts with exactly as many slots as there are ranks, filled in order; without hosts, this one.

    horovodrun starts a rank in every slot that it gets, whatever its -np is, so unused slots must go.

    Raises:
        UserError: there are more ranks than slots, or neither hosts nor ranks are given.
    """
    slots = sum(host.slots for host in hosts)
    if ranks is None:
        if not hosts:
            raise UserError("-np is needed: how many ranks, for example -np 4 (or -H host:4)")
        return list(hosts)
    if not hosts:
        return [Host("localhost", ranks)]
    if ranks > slots:
        raise UserError(f"-np {ranks} is more than the {slots} slots of the hosts given")
    placed = []
    for host in hosts:
        take = min(host.slots, ranks)
        ranks -= take
        if take:
            placed.append(Host(host.name, take))
    return placed


def format_hosts(hosts: Iterable[Host]) -> str:
    """Return the hosts as horovodrun and mpirun take them: `a:4,b:4`."""
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


def hosts_by_rank(hosts: Iterable[Host]) -> list[str]:
    """Return the host name of each rank, by its number: launchers fill the hosts in order."""
    return [host.name for host in hosts for _ in range(host.slots)]
