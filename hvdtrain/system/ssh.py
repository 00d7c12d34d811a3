"""How other hosts are reached by ssh: the one place that builds its command, beyond what its own configuration says."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hvdtrain.system.errors import UserError
from hvdtrain.system.limits import SshLimits
from hvdtrain.system.processes import ProcessTimeout, run_process


class Ssh(NamedTuple):
    """The port and the key to use; None leaves the choice to ssh."""

    port: int | None = None
    identity: Path | None = None

    def ssh_arguments(self) -> list[str]:
        """Return them as arguments of ssh."""
        port = ["-p", str(self.port)] if self.port else []
        return port + (["-i", str(self.identity)] if self.identity else [])

    def check_identity(self) -> None:
        """Raise UserError for a key that does not exist, or whose name launchers cannot pass on."""
        if self.identity is None:
            return
        if not self.identity.is_file():
            raise UserError(f"--ssh-identity {self.identity}: there is no such file")
        if not all(letter.isalnum() or letter in "/._-+@%=:," for letter in str(self.identity)):
            raise UserError(f"--ssh-identity {self.identity}: launchers cannot pass on such a name; rename the file")


DEFAULT_SSH = Ssh()


def build_ssh_command(host: str, remote: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """Return the ssh command that runs a command on a host without asking anything, and without waiting for a dead one.

    ssh's own configuration decides on host keys.

    Args:
        host: never taken for an option.
        remote: the command and its arguments, which the host's shell reads.
        options: more options of ssh; one that is also set here counts.

    Raises:
        UserError: the host's name begins with "-".
    """
    if host.startswith("-"):
        raise UserError(f"{host!r} is not a host name: it begins with -")
    own = ["-o", f"ConnectTimeout={SshLimits.connect}", "-o", "BatchMode=yes", *host_key_options(host, tuple(options))]
    return ["ssh", *options, *own, "--", host, *remote]


@functools.cache
def host_key_options(host: str, options: tuple[str, ...]) -> tuple[str, ...]:
    """Return ssh's options for unknown host keys: none if it is configured, else to accept a host's first key."""
    # `ask` is what ssh prints if nothing is configured; there is no terminal to ask on.
    asks = "stricthostkeychecking ask" in _read_ssh_config(host, options)
    return ("-o", "StrictHostKeyChecking=accept-new") if asks else ()


def ssh_hostname(name: str) -> str:
    """Return the name that ssh's configuration has for a host; the same name if it has none, or there is no ssh."""
    names = [line.partition(" ")[2] for line in _read_ssh_config(name) if line.startswith("hostname ")]
    return names[0] if names else name


def _read_ssh_config(host: str, options: Sequence[str] = ()) -> list[str]:
    """Return the lines of ssh's configuration for a host; none if there is no ssh."""
    try:
        done = run_process(["ssh", "-G", *options, "--", host], SshLimits.read_config)
    except (OSError, ProcessTimeout):
        return []
    return done.stdout.splitlines()
