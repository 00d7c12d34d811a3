"""Hosts on the command line and in files."""

from pathlib import Path

import pytest

from hvdtrain.launch.hosts import Host, assign_slots, format_hosts, hosts_by_rank, parse_hosts, read_hostfile
from hvdtrain.system.errors import UserError


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a:4,b:4", [("a", 4), ("b", 4)]),
        ("a", [("a", 1)]),
        (" a:2 , b ", [("a", 2), ("b", 1)]),
        ("10.0.0.1:2,gpu-1.my_lab.org:16", [("10.0.0.1", 2), ("gpu-1.my_lab.org", 16)]),
    ],
)
def test_host_list_is_parsed(text: str, hosts: list[tuple[str, int]]) -> None:
    assert parse_hosts(text) == [Host(*host) for host in hosts]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "-H : a host is empty; expected host:slots,host:slots"),
        ("a:2,", "-H a:2,: a host is empty; expected host:slots,host:slots"),
        ("a:x", "-H a:x: 'x' slots for host 'a'; expected a whole number above 0"),
        ("a:", "-H a:: '' slots for host 'a'; expected a whole number above 0"),
        ("a:0", "-H a:0: '0' slots for host 'a'; expected a whole number above 0"),
        ("a:-1", "-H a:-1: '-1' slots for host 'a'; expected a whole number above 0"),
        ("a:²", "-H a:²: '²' slots for host 'a'; expected a whole number above 0"),
        ("a:1,b:1,a:2", "-H a:1,b:1,a:2: host 'a' is given twice"),
        ("a b:1", "-H a b:1: 'a b' is not a host name or IPv4 address"),
        ("-oProxyCommand=x:1", "-H -oProxyCommand=x:1: '-oProxyCommand=x' is not a host name or IPv4 address"),
        ("a;b", "-H a;b: 'a;b' is not a host name or IPv4 address"),
        (
            "::1",
            "-H ::1: '::1' looks like an IPv6 address, which Horovod cannot use; give a name or IPv4",
        ),
        (
            "[fe80::1]:2",
            "-H [fe80::1]:2: '[fe80::1]:2' looks like an IPv6 address, which Horovod cannot use; give a name or IPv4",
        ),
    ],
)
def test_invalid_host_list_is_refused(text: str, error: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_hosts(text)
    assert str(caught.value) == error


def test_hostfile_of_every_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(b"\xef\xbb\xbf# my hosts\r\n\r\na slots=4\r\n  b:2  # the small one\nc\n10.0.0.7\tslots = 3\n")
    assert read_hostfile(path) == [Host("a", 4), Host("b", 2), Host("c", 1), Host("10.0.0.7", 3)]
    path.write_text("a slots=2 max_slots=4\nb max-slots = 2 slots =2\nc:2 max_slots=2\n")
    assert format_hosts(read_hostfile(path)) == "a:2,b:2,c:2"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a\n\nb slots=x\n", "{path} line 3: 'x' slots for host 'b'; expected a whole number above 0"),
        ("a max_slots=2 slots=4", "{path} line 1: max_slots=2 is less than the 4 slots of host 'a'"),
        ("a slots=4 cpus=8", "{path} line 1: 'a slots=4 cpus=8' is not `host slots=N`, `host:N` or `host`"),
        (
            "\nme@a slots=4",
            "{path} line 2: 'me@a' names a user: write `Host a` and `User me` into ~/.ssh/config",
        ),
        ("a 4\n", "{path} line 1: 'a 4' is not `host slots=N`, `host:N` or `host`"),
        ("a:1 slots=2\n", "{path} line 1: 'a:1 slots=2' is not `host slots=N`, `host:N` or `host`"),
        ("a\nb\na slots=2\n", "{path} line 3: host 'a' is given twice"),
        (
            "fe80::1 slots=2\n",
            "{path} line 1: 'fe80::1' looks like an IPv6 address, which Horovod cannot use; give a name or IPv4",
        ),
        ("# nothing\n", "--hostfile {path}: there is no host in it"),
        (None, "--hostfile {path}: No such file or directory"),
    ],
)
def test_invalid_hostfile_is_refused_with_its_line(tmp_path: Path, text: str | None, error: str) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert str(caught.value) == error.format(path=path)


def test_place_gives_each_rank_one_slot() -> None:
    hosts = parse_hosts("a:4,b:4")
    assert format_hosts(assign_slots(hosts, None)) == "a:4,b:4"
    assert format_hosts(assign_slots(hosts, 5)) == "a:4,b:1"
    assert format_hosts(assign_slots(hosts, 4)) == "a:4"
    assert format_hosts(assign_slots([], 3)) == "localhost:3"
    assert hosts_by_rank(assign_slots(hosts, 5)) == ["a", "a", "a", "a", "b"]


@pytest.mark.parametrize(
    ("text", "ranks", "error"),
    [
        (None, None, "-np is needed: how many ranks, for example -np 4 (or -H host:4)"),
        ("a:4,b:4", 9, "-np 9 is more than the 8 slots of the hosts given"),
    ],
)
def test_wrong_number_of_ranks(text: str | None, ranks: int | None, error: str) -> None:
    with pytest.raises(UserError) as caught:
        assign_slots(parse_hosts(text) if text else [], ranks)
    assert str(caught.value) == error
