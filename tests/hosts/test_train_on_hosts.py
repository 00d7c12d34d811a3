"""`hvdtrain launch` over real hosts: through ssh, with processes and interfaces that are not this host's."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import Host, cluster
from tests.hosts.launching import (
    DIGITS,
    DIGITS_JAX,
    HOROVODRUN,
    HOROVODRUN_MPI,
    MPIRUN,
    end,
    launched,
    losses_alone,
    ranks,
)
from tests.ranks.harness import rows, wait_for_step
from tests.support.slow_cases import slow

pytestmark = pytest.mark.usefixtures("machine_allows_clusters")

TWO_EPOCHS = ["--epochs", "2", "--log-every", "1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses_alone(tmp_path_factory.mktemp("alone") / "run", *TWO_EPOCHS)


@pytest.fixture(scope="module")
def two() -> Iterator[list[Host]]:
    with cluster(2) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def debian() -> Iterator[list[Host]]:
    """Hosts whose own name is 127.0.1.1."""
    with cluster(2, loopback_names=True) as hosts:
        yield hosts


def test_digits_over_two_debian_hosts_by_gloo_is_as_in_one_process(
    debian: list[Host], alone: list[float], tmp_path: Path
) -> None:
    with launched(debian, "h0:1,h1:1", tmp_path / "run", *HOROVODRUN, DIGITS, *TWO_EPOCHS) as process:
        while process.poll() is None and not all(ranks(host) for host in debian):
            time.sleep(0.1)
        spread = [len(ranks(host)) for host in debian]
        code, out, err = end(process)
    assert code == 0, f"{out}\n{err}"
    assert spread == [1, 1]
    assert len(alone) == 24
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("way", [HOROVODRUN, HOROVODRUN_MPI, MPIRUN], ids=" ".join)
def test_digits_in_jax_over_two_hosts_is_as_in_one_process(way: list[str], two: list[Host], tmp_path: Path) -> None:
    expected = losses_alone(tmp_path / "alone", *TWO_EPOCHS, recipe=DIGITS_JAX)
    with launched(two, "h0:1,h1:1", tmp_path / "run", *way, DIGITS_JAX, *TWO_EPOCHS) as process:
        while process.poll() is None and not all(ranks(host) for host in two):
            time.sleep(0.1)
        spread = [len(ranks(host)) for host in two]
        code, out, err = end(process, 150)
    assert code == 0, f"{out}\n{err}"
    assert spread == [1, 1]
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", [*slow(HOROVODRUN), MPIRUN], ids=" ".join)
def test_ctrl_c_saves_and_leaves_no_rank(way: list[str], two: list[Host], tmp_path: Path) -> None:
    with launched(two, "h0:1,h1:1", tmp_path / "run", *way, DIGITS, "--epochs", "10000", "--log-every", "1") as process:
        wait_for_step(tmp_path / "run", 3)
        process.send_signal(signal.SIGINT)
        code, out, err = end(process)
    assert code == 75, f"{out}\n{err}"
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        *slow((HOROVODRUN, r"was killed by signal 9 \(SIGKILL\)")),
        # Rank 0 may miss rank 1, and abort, before mpirun notices.
        (MPIRUN, r"was (killed by signal 9 \(SIGKILL\)|lost: it ended)"),
    ],
    ids=["horovodrun", "mpirun"],
)
def test_a_rank_killed_on_another_host_is_named(way: list[str], words: str, two: list[Host], tmp_path: Path) -> None:
    with launched(two, "h0:1,h1:1", tmp_path / "run", *way, DIGITS, "--epochs", "10000", "--log-every", "1") as process:
        wait_for_step(tmp_path / "run", 3)
        (second,) = ranks(two[1])
        second.kill()
        code, out, err = end(process)
    assert code == 1, f"{out}\n{err}"
    assert re.search(f"hvdtrain: error: rank 1 on h1 {words}", err), f"{out}\n{err}"


@pytest.mark.parametrize(
    ("way", "words"),
    [
        *slow((HOROVODRUN, "ended with code 255 and no message: over ssh, that is a")),
        (MPIRUN, "was lost: the connection to the host failed"),
    ],
    ids=["horovodrun", "mpirun"],
)
def test_a_host_that_loses_its_power_is_named(way: list[str], words: str, tmp_path: Path) -> None:
    """mpirun itself may end with code 0 then."""
    options = [*way, DIGITS, "--epochs", "10000", "--log-every", "1"]
    with cluster(2) as hosts, launched(hosts, "h0:1,h1:1", tmp_path / "run", *options) as process:
        wait_for_step(tmp_path / "run", 3)
        hosts[1].down()
        code, out, err = end(process)
    assert code == 1, f"{out}\n{err}"
    assert re.search(f"hvdtrain: error: rank 1 on h1 {words}", err), f"{out}\n{err}"


@pytest.mark.slow
@pytest.mark.parametrize("way", [HOROVODRUN, MPIRUN], ids=" ".join)
def test_nothing_is_left_on_any_host_when_launch_is_killed(way: list[str], two: list[Host], tmp_path: Path) -> None:
    with launched(two, "h0:1,h1:1", tmp_path / "run", *way, DIGITS, "--epochs", "10000", "--log-every", "1") as process:
        wait_for_step(tmp_path / "run", 3)
        process.kill()
        end(process)
