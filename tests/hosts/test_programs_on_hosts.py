"""An unchanged program on two hosts over ssh; tests/slurm has all programs in all places."""

from __future__ import annotations

import pytest

from tests.hosts.cluster import cluster
from tests.programs.matrix import check_case
from tests.programs.places import Place

pytestmark = pytest.mark.usefixtures("machine_allows_clusters")


def test_ranks_of_torch_meet_although_each_host_s_own_name_is_a_loopback_address() -> None:
    with cluster(2, loopback_names=True) as hosts:
        check_case(Place(["-H", "h0:1,h1:1"], hosts), "torch_ddp", "run")
