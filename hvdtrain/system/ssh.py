"""How other hosts are reached, beyond what ssh's own configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hvdtrain.system.errors import UserError


class Ssh(NamedTuple):
    """The port and the key to use; None for what ssh takes by itself."""

    port: int | None = None
    identity: Path | None = None

    def ssh_arguments(self) -> list[str]:
        """Them as ssh takes them."""
        port = ["-p", str(self.port)] if self.port else []
        return port + (["-i", str(self.identity)] if self.identity else [])

    def check_identity(self) -> None:
        """Raise UserError for a key that is not there, or that launchers cannot pass on."""
        if self.identity is None:
            return
        if not self.identity.is_file():
            raise UserError(f"--ssh-identity {self.identity}: there is no such file")
        if not all(letter.isalnum() or letter in "/._-+@%=:," for letter in str(self.identity)):
            raise UserError(f"--ssh-identity {self.identity}: launchers cannot pass on such a name; rename the file")


DEFAULT_SSH = Ssh()
