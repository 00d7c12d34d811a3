"""What the jobs of one launch have in common."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hvdtrain.launch import elastic
from hvdtrain.launch.elastic import ElasticOptions, run_with_relaunches
from hvdtrain.launch.hosts import Host
from hvdtrain.launch.signals import SignalInbox
from hvdtrain.system.ssh import DEFAULT_SSH
from hvdtrain.training.lease import RELAUNCH_VARIABLE


@pytest.mark.parametrize(("relaunch", "names"), [(0, 0), (2, 1)])
def test_relaunched_jobs_own_their_run_folder_together(
    relaunch: int, names: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "RELAUNCH_BACKOFF", (0.0, 0.0))
    environments: list[Mapping[str, str]] = []

    def launch(line: list[str], environ: Mapping[str, str], caught: SignalInbox, told: object) -> tuple[int, bool]:
        environments.append(environ)
        return 1, False

    fixed = ElasticOptions(1, None, None, [Host("localhost", 1)])
    code = run_with_relaunches(launch, fixed, lambda resume: ["true"], {}, nic=None, ssh=DEFAULT_SSH, relaunch=relaunch)
    assert (code, len(environments)) == (1, relaunch + 1)
    assert len({environ[RELAUNCH_VARIABLE] for environ in environments if RELAUNCH_VARIABLE in environ}) == names
