"""Host texts that people write, refused with what to write instead; and limits of hosts and slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdtrain.launch.hosts import parse_hosts, read_hostfile
from hvdtrain.system.errors import UserError

LISTS = "(--from slurm reads lists)"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "node[01-03]",
            f"-H node[01-03]: 'node[01-03]' is a list in brackets; write each name: node01,node02,node03 {LISTS}",
        ),
        (
            "node[1,4]:2",
            f"-H node[1,4]:2: 'node[1,4]:2' is a list in brackets; write each name: node1,node4 {LISTS}",
        ),
        (
            "a:2,gpu[001-128]:8",
            "-H a:2,gpu[001-128]:8: 'a:2,gpu[001-128]:8' is a list in brackets; write each name: "
            f"a,gpu001,gpu002,... {LISTS}",
        ),
        ("n[", f"-H n[: 'n[' is a list in brackets; write each name: node01,node02 {LISTS}"),
        ("a:2:3", "-H a:2:3: 'a:2:3' has two colons; expected host:slots (--ssh-port takes a port)"),
        ("a:2222", "-H a:2222: 2222 slots for host 'a'; expected at most 1024 (--ssh-port takes a port)"),
        (
            "a:99999999999",
            "-H a:99999999999: 99999999999 slots for host 'a'; expected at most 1024 (--ssh-port takes a port)",
        ),
        ("a:1,A:1", "-H a:1,A:1: host 'A' is given twice"),
        ("a.b:1,A.b.:1", "-H a.b:1,A.b.:1: host 'A.b.' is given twice"),
        ("fe80::1", "-H fe80::1: 'fe80::1' looks like an IPv6 address, which Horovod cannot use; give a name or IPv4"),
        (
            "[::1]",
            "-H [::1]: '[::1]' looks like an IPv6 address, which Horovod cannot use; give a name or IPv4",
        ),
    ],
)
def test_a_host_text_that_is_refused(text: str, error: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_hosts(text)
    assert str(caught.value) == error


def test_more_than_10000_hosts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^-H has 700000 hosts; expected at most 10000$"):
        parse_hosts(",".join(f"h{number}" for number in range(700_000)))
    (tmp_path / "hosts").write_text("\n".join(f"h{number}" for number in range(10_001)))
    with pytest.raises(UserError, match=r"hosts has 10001 hosts; expected at most 10000$"):
        read_hostfile(tmp_path / "hosts")
    (tmp_path / "hosts").write_text("node[01-02] slots=4\n")
    with pytest.raises(UserError, match=r"line 1: 'node\[01-02\]' is a list in brackets; write each name: node01,no"):
        read_hostfile(tmp_path / "hosts")
