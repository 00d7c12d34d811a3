"""How many cores there are to share, and who chose a rank's threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdtrain.system import cpus
from hvdtrain.system.cpus import ThreadCount, choose_threads, cpu_quota, set_threads


def cgroup(folder: Path, own: str, files: dict[str, str]) -> float | None:
    """The quota of a process in the groups `own`, with these files under the mounted hierarchy."""
    (folder / "own").write_text(own)
    for name, text in files.items():
        path = folder / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cpu_quota(folder / "own", folder / "mounted")


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/pod/app\n", {"pod/cpu.max": "400000 100000", "pod/app/cpu.max": "max 100000"}, 4.0),  # of the outer group
        ("0::/pod/app\n", {"pod/cpu.max": "400000 100000", "pod/app/cpu.max": "150000 100000"}, 1.5),
        ("0::/docker/abc\n", {"cpu.max": "200000 100000"}, 2.0),  # the host's path, which is not mounted here
        ("0::/../outer\n", {"outer/cpu.max": "200000 100000"}, 2.0),
        (
            "5:memory:/x\n4:cpu,cpuacct:/job\n0::/\n",
            {"cpu,cpuacct/job/cpu.cfs_quota_us": "50000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        (
            "4:cpu,cpuacct:/a/b\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        ("0::/\n", {"cpu.max": "junk"}, None),
        ("", {}, None),
    ],
)
def test_cpu_quota_is_read_from_control_groups(
    tmp_path: Path, own: str, files: dict[str, str], quota: float | None
) -> None:
    assert cgroup(tmp_path, own, files) == quota


def test_ranks_share_what_the_quota_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "USABLE_CPUS", frozenset(range(96)))
    monkeypatch.setattr(cpus, "CPU_QUOTA", 4.0)
    assert [cpus.cores_per_rank(ranks) for ranks in (1, 2, 3, 8)] == [4, 2, 1, 1]
    assert choose_threads(2, {}) == ThreadCount(2, "the CPU quota of 4 cores, shared by 2 ranks")
    monkeypatch.setattr(cpus, "CPU_QUOTA", 0.5)
    assert cpus.cores_per_rank(1) == 1
    monkeypatch.setattr(cpus, "CPU_QUOTA", None)
    assert cpus.cores_per_rank(2) == 48


def test_no_cores_are_chosen_under_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[object] = []
    monkeypatch.setattr(cpus.os, "sched_setaffinity", lambda pid, which: bound.append(which))
    monkeypatch.setattr(cpus.os, "cpu_count", lambda: 96)
    monkeypatch.setattr(cpus, "GPU_DRIVER_FILE", Path("/no/such/driver"))
    monkeypatch.setattr(cpus, "USABLE_CPUS", frozenset(range(96)))
    monkeypatch.setattr(cpus, "CPU_QUOTA", 4.0)
    cpus.bind_to_cores(1, 2)
    assert bound == []
    monkeypatch.setattr(cpus, "CPU_QUOTA", None)
    cpus.bind_to_cores(1, 2)
    assert bound == [list(range(48, 96))]


@pytest.mark.parametrize(
    ("environ", "ranks", "chosen"),
    [
        ({"OMP_NUM_THREADS": "3", "SLURM_CPUS_PER_TASK": "2"}, 2, ThreadCount(3, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "4,2"}, 1, ThreadCount(4, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "", "SLURM_CPUS_PER_TASK": "2"}, 2, ThreadCount(2, "SLURM_CPUS_PER_TASK")),
        (
            {"SLURM_CPUS_PER_TASK": "8"},
            2,
            ThreadCount(4, "the host's 8 cores, shared by 2 ranks"),
        ),  # one task, two ranks
        ({"OMP_NUM_THREADS": "many"}, 1, ThreadCount(8, "the host's 8 cores")),
        ({}, 16, ThreadCount(1, "the host's 8 cores, shared by 16 ranks")),
    ],
)
def test_thread_count_and_its_source_are_chosen_and_kept(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], ranks: int, chosen: ThreadCount
) -> None:
    monkeypatch.setattr(cpus, "USABLE_CPUS", frozenset(range(8)))
    monkeypatch.setattr(cpus, "CPU_QUOTA", None)
    assert choose_threads(ranks, environ) == chosen
    # A process started from here, which sees another number of ranks, repeats the choice and its source.
    environ = dict(environ)
    set_threads(ranks, environ)
    assert environ["OMP_NUM_THREADS"].split(",")[0] == str(chosen.count)
    assert choose_threads(1, environ) == chosen
