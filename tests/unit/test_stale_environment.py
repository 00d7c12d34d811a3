"""What an earlier job left in the environment, and what an account lacks, is named before a rank starts."""

from __future__ import annotations

import socket

import pytest

from hvdtrain.comm.world import reject_stale_pmix
from hvdtrain.launch.launchers.mpirun import check_home_directory
from hvdtrain.system.errors import UserError


@pytest.fixture
def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def test_variables_of_an_mpi_job_that_has_ended(free_port: int) -> None:
    stale = {
        "PMIX_RANK": "0",
        "PMIX_NAMESPACE": "prterun-vm-1@1",
        "PMIX_SERVER_URI41": f"prterun-vm-1@0.0;tcp4://127.0.0.1:{free_port}",
    }
    with pytest.raises(UserError) as caught:
        reject_stale_pmix(stale)
    assert str(caught.value) == (
        f"PMIX_SERVER_URI41 names the server of an MPI job that has ended (tcp4://127.0.0.1:{free_port}): start this "
        "with mpirun or hvdtrain launch, or unset the variables whose names begin with PMIX_ and OMPI_"
    )


def test_variables_of_an_mpi_job_that_runs_are_right() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reject_stale_pmix({"PMIX_RANK": "0", "PMIX_SERVER_URI2": f"prterun@0.0;tcp4://127.0.0.1:{port}"})
    reject_stale_pmix({"PMIX_RANK": "0"})  # Open MPI takes the process for one that was started alone
    reject_stale_pmix({"PMIX_RANK": "0", "PMIX_SERVER_URI2": "ns.0;usock:/tmp/x"})


def test_mpirun_without_a_home_directory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_home_directory({})  # the password database knows this user
    monkeypatch.setattr("os.getuid", lambda: 1234567)
    check_home_directory({"HOME": "/tmp"})
    with pytest.raises(UserError, match=r"^mpirun needs a home directory: HOME is not set, and user 1234567 has"):
        check_home_directory({})
