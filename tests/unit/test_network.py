"""Which interface joins the hosts, and which names are this host's."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from hvdtrain.comm.world import check_gloo_interface
from hvdtrain.system import network
from hvdtrain.system.errors import UserError


def test_names_of_this_host() -> None:
    own = [one.address for all_ in psutil.net_if_addrs().values() for one in all_ if one.family == socket.AF_INET]
    assert all(network.is_local_host(name) for name in ["localhost", "127.0.0.1", "127.0.1.1", *own])
    assert not network.is_local_host("192.0.2.1") and not network.is_local_host("nowhere.invalid")


def test_interface_to_hosts_is_found_or_nic_is_demanded() -> None:
    assert network.interface_toward(["localhost", "127.0.0.1"]) == "lo"
    for interface, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET and interface != "lo":
                assert network.interface_toward([one.address]) == interface
    # 127.0.1.1 as the own name's address, as Debian's installer writes it, tells nothing.
    with pytest.raises(UserError, match=r"--nic is needed: .* \(only this host is known yet\)"):
        network.interface_toward(["127.0.1.1"])
    with pytest.raises(UserError, match=r"host 'nowhere\.invalid' does not resolve to an IPv4 address"):
        network.interface_toward(["localhost", "nowhere.invalid"])


def test_a_name_that_only_ssh_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\n[ "$*" = "-G -- far" ] && echo "host far\nhostname 192.0.2.7\nport 2222"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert network.resolve_address("far") == "192.0.2.7"


def test_a_rank_without_the_interface_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "lo")
    check_gloo_interface()
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "nic9")
    with pytest.raises(UserError, match=r"has no network interface 'nic9', only .*lo.*; Horovod needs one"):
        check_gloo_interface()
