"""What the jobs of one launch have in common."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from hvdtrain.launch import elastic
from hvdtrain.launch.elastic import Elastic, keep_running
from hvdtrain.launch.hosts import Host
from hvdtrain.launch.signals import Caught
from hvdtrain.system.ssh import AS_CONFIGURED
from hvdtrain.training.lease import RELAUNCH


@pytest.mark.parametrize(("relaunch", "names"), [(0, 0), (2, 1)])
def test_relaunched_jobs_own_their_run_folder_together(
    relaunch: int, names: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "BACK_OFF", (0.0, 0.0))
    environments: list[Mapping[str, str]] = []

    def launch(line: list[str], environ: Mapping[str, str], caught: Caught, told: object) -> tuple[int, bool]:
        environments.append(environ)
        return 1, False

    fixed = Elastic(1, None, None, [Host("localhost", 1)])
    code = keep_running(launch, fixed, lambda resume: ["true"], {}, nic=None, ssh=AS_CONFIGURED, relaunch=relaunch)
    assert (code, len(environments)) == (1, relaunch + 1)
    assert len({environ[RELAUNCH] for environ in environments if RELAUNCH in environ}) == names
