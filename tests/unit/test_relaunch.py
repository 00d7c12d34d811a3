"""What the jobs of one launch have in common."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hvdtrain.launch.hosts import Host
from hvdtrain.launch.job import JobSpec
from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.launch.options import ElasticOptions, LaunchOptions
from hvdtrain.launch.relaunch import ElasticLaunch, run_with_relaunches
from hvdtrain.launch.run import JobResult
from hvdtrain.launch.signals import SignalInbox
from hvdtrain.system.limits import LaunchLimits
from hvdtrain.training.lease import RELAUNCH_VARIABLE


def launch_of_one_host(relaunches: int, limits: LaunchLimits | None = None) -> ElasticLaunch:
    """An elastic launch of a rank or more on this host."""
    return ElasticLaunch(
        options=LaunchOptions(launcher=LAUNCHERS.get("horovodrun")),
        elastic=ElasticOptions(relaunches=relaunches),
        hosts=[Host("localhost", 1)],
        train_args=["digits"],
        environ={},
        limits=limits or LaunchLimits(),
    )


@pytest.mark.parametrize(("relaunches", "names"), [(0, 0), (2, 1)])
def test_relaunched_jobs_own_their_run_folder_together_and_resume(relaunches: int, names: int) -> None:
    environments: list[Mapping[str, str]] = []

    def run(spec: JobSpec, inbox: SignalInbox) -> JobResult:
        assert (spec.command_line[-1] == "--resume") == bool(environments)
        environments.append(spec.environ)
        return JobResult(1, False)

    code = run_with_relaunches(launch_of_one_host(relaunches, LaunchLimits(relaunch_first=0.0)), run)
    assert (code, len(environments)) == (1, relaunches + 1)
    assert len({environ[RELAUNCH_VARIABLE] for environ in environments if RELAUNCH_VARIABLE in environ}) == names
