"""--hierarchy host: what it excludes, and which ranks are a host's."""

from __future__ import annotations

from unittest import mock

import pytest

from hvdtrain.comm.host_groups import HostGroups, arrange_rows, explain_no_columns
from hvdtrain.comm.world import GridShape
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.system.errors import UserError
from hvdtrain.training.options import make_run_options

METHODS = "use bf16, fp16, int8, onebit or qsgd, or leave out --hierarchy"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, f"--hierarchy host with --compression none: none sends gradients as they are; {METHODS}"),
        (
            {"compression": "topk:0.01"},
            f"--hierarchy host with --compression topk:0.01: topk does not encode a part for each host; {METHODS}",
        ),
        (
            {"compression": "powersgd:4"},
            f"--hierarchy host with --compression powersgd:4: powersgd does not encode a part for each host; {METHODS}",
        ),
        (
            {"compression": "auto"},
            f"--hierarchy host with --compression auto: auto would measure other ways than this one; {METHODS}",
        ),
        (
            {"compression": "fp16", "exchange": "horovod"},
            "--hierarchy host with --exchange horovod, which has its own; leave --exchange out",
        ),
        ({"deterministic": True}, "--hierarchy host with --deterministic: its sums depend on which ranks share a host"),
        (
            {"compression": "int8", "shard": "optimizer"},
            "--hierarchy host with --shard optimizer, which sends each part to the rank that owns it; leave one out",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, object], error: str) -> None:
    with pytest.raises(UserError) as refused:
        make_run_options({"hierarchy": "host", **given})
    assert str(refused.value) == error


def test_replicas_of_several_ranks_are_refused() -> None:
    with (
        mock.patch.object(StepOptions, "find_grid_shape", lambda *_: GridShape(2, flags="--stages 2")),
        pytest.raises(UserError) as refused,
    ):
        make_run_options({"hierarchy": "host", "compression": "int8"})
    assert str(refused.value).startswith("--hierarchy host with --stages 2: ")


def test_rows_are_the_ranks_of_each_host() -> None:
    rows = arrange_rows(["b", "a", "b", "a", "c", "c"])
    assert rows == [[0, 2], [1, 3], [4, 5]]
    assert explain_no_columns(rows) is None
    groups = HostGroups(rows, *[mock.Mock()] * 3)
    assert groups.number_parts() == (0, 1, 3, 4, 2, 5)  # first 0, 1, 4 at the first place, then 2, 3, 5


@pytest.mark.parametrize(
    ("hosts", "reason"),
    [
        ("aaa", "all ranks are on one host"),
        ("abc", "each host has one rank"),
        ("aab", "hosts have 1 to 2 ranks; expected the same number on each"),
    ],
)
def test_other_hosts_have_no_columns(hosts: str, reason: str) -> None:
    assert explain_no_columns(arrange_rows(hosts)) == reason
