"""The hosts of batch jobs, and Slurm's lists of nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.comm import srun
from hvdtrain.launch.hosts import format_hosts
from hvdtrain.launch.scheduler import read_allocated_hosts
from hvdtrain.system.errors import UserError
from hvdtrain.system.nodelist import parse_node_list, parse_repeated_counts


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n0", ["n0"]),
        ("n[0-3,7],gpu[009-010]", ["n0", "n1", "n2", "n3", "n7", "gpu009", "gpu010"]),
        ("a[1-2]b[1-2]", ["a1b1", "a1b2", "a2b1", "a2b2"]),
        (
            "c[08-11]-ib.lab.org,login-1",
            ["c08-ib.lab.org", "c09-ib.lab.org", "c10-ib.lab.org", "c11-ib.lab.org", "login-1"],
        ),
        ("n[98-101]", ["n98", "n99", "n100", "n101"]),
    ],
)
def test_lists_of_nodes(text: str, names: list[str]) -> None:
    assert parse_node_list(text, "X") == names


@pytest.mark.parametrize(
    "text",
    ["", "a,", ",a", "a,,b", "n[1-", "n]1[", "n[3-1]", "n[a]", "n[]", "n[1-999999999]", "n[[1]]", "-n1", "n 1", "n[²]"],
)
def test_invalid_node_lists_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a list of nodes"):
        parse_node_list(text, "SLURM_JOB_NODELIST")


PIECES = st.lists(
    st.tuples(
        st.sampled_from(["n", "gpu", "rack2-", "x.y"]),
        st.lists(st.tuples(st.integers(0, 120), st.integers(0, 12)), min_size=1, max_size=3),
        st.integers(1, 4),
        st.sampled_from(["", "-ib"]),
    ),
    min_size=1,
    max_size=4,
)


@given(PIECES)
def test_a_list_is_what_was_put_together(pieces: list[tuple[str, list[tuple[int, int]], int, str]]) -> None:
    """Each piece: a name, ranges of a first number and how many follow it, the width, what follows the number."""
    text, names = [], []
    for name, ranges, width, end in pieces:
        shown = [f"{a:0{width}d}" if not more else f"{a:0{width}d}-{a + more:0{width}d}" for a, more in ranges]
        text.append(f"{name}[{','.join(shown)}]{end}")
        names += [f"{name}{a + i:0{width}d}{end}" for a, more in ranges for i in range(more + 1)]
    assert parse_node_list(",".join(text), "X") == names


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12))
def test_counts_are_what_was_put_together(numbers: list[int]) -> None:
    text, left = [], list(numbers)
    while left:
        same = next((i for i, number in enumerate(left) if number != left[0]), len(left))
        text.append(f"{left[0]}(x{same})" if same > 1 else str(left[0]))
        left = left[same:]
    assert parse_repeated_counts(",".join(text), "X") == numbers


@pytest.mark.parametrize("text", ["", "2(x3", "2(3)", "a", "1,", "-1"])
def test_invalid_slurm_counts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="is invalid; expected numbers"):
        parse_repeated_counts(text, "SLURM_TASKS_PER_NODE")


SLURM = {"SLURM_JOB_NODELIST": "n[0-3]", "SLURM_TASKS_PER_NODE": "2(x3),1"}


@pytest.mark.parametrize(
    ("environ", "hosts"),
    [
        (SLURM, "n0:2,n1:2,n2:2,n3:1"),
        (SLURM | {"SLURM_GPUS_ON_NODE": "8"}, "n0:8,n1:8,n2:8,n3:8"),
        (SLURM | {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "7"}, "n0:2,n1:2,n2:2,n3:1"),
        (SLURM | {"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2"}, "n0:2,n1:2,n2:2,n3:1"),
    ],
)
def test_slurm_nodes_and_slots_are_read(environ: dict[str, str], hosts: str) -> None:
    assert format_hosts(read_allocated_hosts("slurm", environ)) == hosts
    assert format_hosts(read_allocated_hosts("auto", environ)) == hosts


@pytest.mark.parametrize(
    ("environ", "error"),
    [
        (SLURM | {"SLURM_TASKS_PER_NODE": "2"}, "SLURM_TASKS_PER_NODE=2 is for 1 nodes, SLURM_JOB_NODELIST for 4"),
        (SLURM | {"SLURM_TASKS_PER_NODE": ""}, "neither SLURM_TASKS_PER_NODE nor SLURM_GPUS_ON_NODE is set"),
        (SLURM | {"SLURM_JOB_NODELIST": "n[0-"}, "SLURM_JOB_NODELIST='n.0-' is not a list of nodes"),
        (SLURM | {"PE_HOSTFILE": "f"}, "variables of several batch systems are set: sge, slurm; name one of them"),
    ],
)
def test_slurm_variables_that_cannot_be_used_are_refused(environ: dict[str, str], error: str) -> None:
    with pytest.raises(UserError, match=error):
        read_allocated_hosts("auto", environ)


CSM = {"CSM_ALLOCATION_ID": "7"}  # of clusters whose ranks jsrun starts


@pytest.mark.parametrize(
    ("source", "text", "environ", "hosts"),
    [
        ("pbs", "a.lab\na.lab\nb.lab\na.lab\n", {}, "a.lab:3,b.lab:1"),
        ("pbs", "a\r\n\nb\n", {}, "a:1,b:1"),
        ("lsf", "launch\n" + "c1\n" * 4 + "c2\n" * 4, CSM, "c1:4,c2:4"),
        ("lsf", "c0\nc1\nc1\n", {}, "c0:1,c1:2"),
        ("lsf", "c0\n", CSM, "c0:1"),
        ("lsf", "c0\nc0\nc1\nc1\n", CSM, "c0:2,c1:2"),
        ("sge", "a 4 all.q@a UNDEFINED\nb 2 all.q@b <NULL>\na 1 gpu.q@a UNDEFINED\n", {}, "a:5,b:2"),
    ],
)
def test_host_files_of_pbs_lsf_and_sge_are_read(
    tmp_path: Path, source: str, text: str, environ: dict[str, str], hosts: str
) -> None:
    path = tmp_path / "nodes"
    path.write_bytes(text.encode())
    variable = {"pbs": "PBS_NODEFILE", "lsf": "LSB_DJOB_HOSTFILE", "sge": "PE_HOSTFILE"}[source]
    for asked in (source, "auto"):
        assert format_hosts(read_allocated_hosts(asked, {variable: str(path), **environ})) == hosts


@pytest.mark.parametrize(
    ("variable", "text", "error"),
    [
        ("PBS_NODEFILE", None, "PBS_NODEFILE {path}: No such file or directory"),
        ("PBS_NODEFILE", "\n", "PBS_NODEFILE {path}: there is no host in it"),
        ("PBS_NODEFILE", "a\nb c\n", "PBS_NODEFILE {path} line 2: 'b c' is not a host name or IPv4 address"),
        ("PBS_NODEFILE", "a:2\n", "PBS_NODEFILE {path} line 1: 'a:2' is not the name of a host"),
        ("PE_HOSTFILE", "a\n", "PE_HOSTFILE {path} line 1: 'a' is not `host slots queue processors`"),
        ("PE_HOSTFILE", "a x\n", "PE_HOSTFILE {path} line 1: 'x' slots for host 'a'; expected a whole number above 0"),
    ],
)
def test_files_that_are_not_understood(tmp_path: Path, variable: str, text: str | None, error: str) -> None:
    path = tmp_path / "nodes"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_allocated_hosts("auto", {variable: str(path)})
    assert str(caught.value) == error.format(path=path)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_each_slurm_task_has_a_place_of_its_own(on_nodes: list[int], cyclic: bool) -> None:
    """Every task has a place of its own, on its node and among the tasks with the same number on other nodes."""
    tasks = [(node, local) for node, number in enumerate(on_nodes) for local in range(number)]
    tasks = sorted(tasks, key=lambda task: task[::-1]) if cyclic else tasks
    for rank, (node, local) in enumerate(tasks):
        environ = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(local),
            "SLURM_NODEID": str(node),
            "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, on_nodes)),
            "SLURMD_NODENAME": f"n{node}",
        }
        place = srun.task_environment(environ)
        across = [other for other, other_local in tasks if other_local == local]
        numbers = {name.removeprefix("HOROVOD_"): value for name, value in place.items() if value.isdecimal()}
        assert numbers == {
            "RANK": str(rank),
            "SIZE": str(len(tasks)),
            "LOCAL_RANK": str(local),
            "LOCAL_SIZE": str(on_nodes[node]),
            "CROSS_RANK": str(across.index(node)),
            "CROSS_SIZE": str(len(across)),
        }


def test_port_of_a_step() -> None:
    step = {"SLURM_JOB_ID": "123456789", "SLURM_STEP_ID": "3"}
    assert srun.rendezvous_port(step) in srun.RENDEZVOUS_PORTS and srun.rendezvous_port(step) != srun.rendezvous_port(
        step | {"SLURM_STEP_ID": "4"}
    )
    assert srun.rendezvous_port(step | {"SLURM_STEP_RESV_PORTS": "15003-15004,15009"}) == 15003
