"""What makes namespaces look like a host of a cluster: hostname, names of the others, ssh, and nothing of it on disk.

All is mounted from memory, seen by this host alone, and written through /proc/PID/root.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.hosts.namespaces import HOST, start_in
from tests.support.limits import stretch

SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
# Folders of its own: process ids repeat over hosts and clusters, so that the names of temporary files would meet;
# horovodrun keeps in HOME, for an hour, which hosts it could reach.
ENVIRONMENT = {"HOME": "/run/home", "TMPDIR": "/run/tmp"}
KEYS = "/run/keys"

# Nothing of this machine's own settings counts.
CLIENT = """Host *
    BatchMode yes
    IdentityFile /etc/ssh/client
    IdentitiesOnly yes
    StrictHostKeyChecking yes
    UserKnownHostsFile /dev/null
    GlobalKnownHostsFile /etc/ssh/ssh_known_hosts
    ConnectTimeout 10
    LogLevel ERROR
"""
SERVER = """{listen}
HostKey /etc/ssh/host
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes no
MaxStartups 100
PidFile none
SetEnv {environment}
"""


def program(name: str) -> str | None:
    """The path of a system program: some are in folders that are not on every PATH."""
    return shutil.which(name, path=SYSTEM_PATH)


def do(first: int, command: Sequence[str], kinds: int = HOST) -> str:
    """Run a system program in the namespaces of process `first`; return what it prints.

    Raises RuntimeError with its words if it fails.
    """
    path = program(command[0])
    if path is None:
        raise RuntimeError(f"there is no {command[0]}")
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with start_in(first, [path, *command[1:]], kinds, cwd="/", **options) as process:
        said, _ = process.communicate(timeout=stretch(30))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {said.strip()}")
    return str(said)


def root(first: int) -> Path:
    """The root folder as the host sees it."""
    return Path("/proc") / str(first) / "root"


def settle(first: int, name: str, hosts_file: str) -> str:
    """Mount what is the host's own, name it, and make its keys; return its public host key."""
    do(first, ["mount", "--make-rprivate", "/"])
    do(first, ["mount", "-t", "proc", "proc", "/proc"])
    for folder, mode in {"/run": "755", "/dev/shm": "1777", "/etc/ssh": "755"}.items():
        do(first, ["mount", "-t", "tmpfs", "-o", f"mode={mode}", "tmpfs", folder])
    own_settings = Path(pwd.getpwuid(0).pw_dir) / ".ssh"
    if own_settings.is_dir():
        do(first, ["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", str(own_settings)])
    files = {
        "hosts": hosts_file,
        "hostname": f"{name}\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
        "shadow": "root:*:::::::\n",  # a root whose password is locked (!) could not come in by key either
    }
    inside = root(first)
    (inside / "run/etc").mkdir()
    for file, text in files.items():
        if (inside / "etc" / file).exists():
            (inside / "run/etc" / file).write_text(text)
            do(first, ["mount", "--bind", f"/run/etc/{file}", f"/etc/{file}"])
    do(first, ["hostname", name])
    for folder in (*ENVIRONMENT.values(), "/run/sshd"):
        (inside / folder.lstrip("/")).mkdir()
    do(first, ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", "/etc/ssh/host"])
    return (inside / "etc/ssh/host.pub").read_text()


def open_door(
    first: int, addresses: Sequence[str], client_key: tuple[str, str], known_hosts: str
) -> subprocess.Popen[bytes]:
    """Let the host reach the others, and be reached, by ssh without a question; return its sshd."""
    private, public = client_key
    folder = root(first) / "etc/ssh"
    environment = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    listen = "\n".join(f"ListenAddress {address}" for address in addresses)
    (folder / "ssh_config").write_text(CLIENT)
    (folder / "sshd_config").write_text(SERVER.format(listen=listen, environment=environment))
    (folder / "authorized_keys").write_text(public)
    (folder / "ssh_known_hosts").write_text(known_hosts)
    (folder / "client").touch(mode=0o600)
    (folder / "client").write_text(private)
    sshd = program("sshd")
    assert sshd is not None
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environ = {"PATH": SYSTEM_PATH}
    return start_in(first, [sshd, "-D"], cwd="/", env=environ, **quiet)


def client_key(first: int) -> tuple[str, str]:
    """A new key for all clients of a cluster, private and public, made in a host's memory."""
    do(first, ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cluster", "-f", KEYS])
    inside = root(first) / KEYS.lstrip("/")
    return inside.read_text(), inside.with_name(inside.name + ".pub").read_text()
