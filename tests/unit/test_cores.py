"""Each rank's share of its host's cores."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.system import cpus


@given(st.integers(1, 100), st.integers(1, 100))
def test_shares_are_even_and_all_there_is(count: int, local_size: int) -> None:
    if local_size > count:
        local_size, count = count, local_size
    shares = [cpus.select_cores(range(count), rank, local_size) for rank in range(local_size)]
    assert [core for share in shares for core in share] == list(range(count))
    assert {len(share) for share in shares} <= {count // local_size, count // local_size + 1}


def test_each_cpu_has_a_place_of_its_own() -> None:
    assert len({cpus.read_cpu_topology(cpu) for cpu in cpus.USABLE_CPUS}) == len(cpus.USABLE_CPUS)
    assert cpus.read_cpu_topology(1 << 20) == (0, 1 << 20, 1 << 20)  # one that no machine tells of
