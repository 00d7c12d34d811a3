"""The files of cluster/: each is sound, says what hvdtrain understands, and does what it says as far as one host shows.

Those that launch are run for real by tests/slurm and tests/hosts/test_job_scripts_on_hosts.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from hvdtrain.launch.hosts import Host, read_hostfile

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent
JOBS = ["slurm/train.sbatch", "slurm/elastic.sbatch", "pbs/train.pbs", "lsf/train.lsf", "mpi/train.sh"]
KUBERNETES = "1.31"


def test_the_readme_tells_of_every_file() -> None:
    text = (CLUSTER / "README.md").read_text()
    there = [
        path.relative_to(CLUSTER) for path in CLUSTER.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert [str(path) for path in there if f"`{path}`" not in text and path.name != "README.md"] == []


@pytest.mark.parametrize("name", JOBS)
def test_job_scripts_are_sound_and_short(name: str) -> None:
    path = CLUSTER / name
    assert os.access(path, os.X_OK)
    assert len(path.read_text().splitlines()) <= 70
    subprocess.run(["bash", "-n", str(path)], check=True)
    done = subprocess.run([str(BIN / "shellcheck"), "--shell=bash", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def dry_run(name: str, *args: str, **environ: str) -> subprocess.Popen[str]:
    """Start a job script that is to say what it would launch."""
    line = ["bash", str(CLUSTER / name), *args]
    own = {"VENV": str(BIN.parent), "PYTHONPATH": str(ROOT), "LAUNCH": "--nic eth0 --dry-run"}
    return subprocess.Popen(line, env={**os.environ, **own, **environ}, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_job_scripts_launch_on_the_hosts_of_the_job(tmp_path: Path) -> None:
    nodes, hostfile = tmp_path / "nodes", tmp_path / "hostfile"
    nodes.write_text("node1\nnode1\nnode2\nnode2\n")
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"}
    recipe = {"RECIPE": "digits", "OPTIONS": "--epochs 5"}
    # At the same time: each imports torch.
    started = {
        "slurm-7": dry_run("slurm/train.sbatch", "digits", "--epochs", "5", SLURM_JOB_ID="7", **slurm),
        "pbs-7": dry_run("pbs/train.pbs", PBS_JOBID="7.server", PBS_NODEFILE=str(nodes), **recipe),
        "lsf-7": dry_run("lsf/train.lsf", LSB_JOBID="7", LSB_DJOB_HOSTFILE=str(nodes), **recipe),
        "mpi": dry_run("mpi/train.sh", "digits", "--epochs", "5", HOSTFILE=str(hostfile)),
    }
    said = {run: shlex.split(process.communicate(timeout=100)[0]) for run, process in started.items()}
    for run, line in said.items():
        train = ["train", "digits", "--epochs", "5", "--run-dir", f"{ROOT}/runs/{run}", "--resume"]
        assert line[1:5] == ["-np", "4", "-H", "node1:2,node2:2"] and line[-len(train) :] == train, line


def test_mpi_hostfile_is_understood() -> None:
    assert read_hostfile(CLUSTER / "mpi" / "hostfile.example") == [
        Host("node1", 8),
        Host("node2", 8),
        Host("10.0.0.3", 4),
    ]


def test_ssh_configuration_is_understood() -> None:
    line = ["ssh", "-G", "-F", str(CLUSTER / "ssh" / "config.example"), "node7"]
    said = subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()
    assert {"batchmode yes", "user train", "serveraliveinterval 5", "serveralivecountmax 3"} <= set(said)


def unit() -> list[tuple[str, str]]:
    """The settings of the systemd unit."""
    lines = (CLUSTER / "systemd" / "hvdtrain-agent.service").read_text().splitlines()
    return [(line.partition("=")[0], line.partition("=")[2]) for line in lines if "=" in line and line[0] != "#"]


def test_systemd_unit_runs_an_agent(tmp_path: Path) -> None:
    settings = unit()
    environ = dict(value.partition("=")[::2] for name, value in settings if name == "Environment")
    assert set(environ) == {"SOURCE", "MEMBERSHIP", "SLOTS"}
    # A source that asks no server.
    environ |= {"SOURCE": "signal", "MEMBERSHIP": str(tmp_path / "members"), "SLOTS": "3"}
    (text,) = (value for name, value in settings if name == "ExecStart")
    program, *words = [re.sub(r"\$\{(\w+)\}", lambda found: environ[found[1]], word) for word in text.split()]
    assert Path(program).name == "hvdtrain"
    with subprocess.Popen([sys.executable, "-m", "hvdtrain", *words, "--host", "here"], cwd=ROOT) as agent:
        until = time.monotonic() + 30
        while not (tmp_path / "members" / "here.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        member = yaml.safe_load((tmp_path / "members" / "here.json").read_text())
        agent.send_signal(signal.SIGINT)
    assert (agent.returncode, member["slots"]) == (0, 3)


def test_systemd_unit_is_sound(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    source = CLUSTER / "systemd" / "hvdtrain-agent.service"
    copy = tmp_path / source.name
    copy.write_text(source.read_text().replace("/opt/hvdtrain/bin/hvdtrain", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- Kubernetes


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kubernetes" / name).read_text()))


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All pod templates."""
    jobs = [one["spec"] for one in objects if one["kind"] in ("Job", "Deployment")]
    replicas = [spec for one in objects if one["kind"] == "MPIJob" for spec in one["spec"]["mpiReplicaSpecs"].values()]
    return [spec["template"] for spec in jobs + replicas]


def only(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (one for one in objects if one["kind"] == kind)
    return found


@pytest.mark.parametrize("name", ["elastic.yaml", "mpijob.yaml"])
def test_manifests_fit_the_api(name: str) -> None:
    objects = manifests(name)
    for one in objects:
        if one["kind"] != "MPIJob":
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
    for template in pods(objects):
        # The schema of a pod template is that of its parents.
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": {"template": template}}
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_mpijob_is_one_of_v2beta1() -> None:
    """By hand, from the operator's definition of the resource: names, kinds and choices of what is used here."""
    job = only(manifests("mpijob.yaml"), "MPIJob")
    assert (set(job), job["apiVersion"]) == ({"apiVersion", "kind", "metadata", "spec"}, "kubeflow.org/v2beta1")
    known = {"slotsPerWorker", "runLauncherAsWorker", "runPolicy", "mpiReplicaSpecs", "sshAuthMountPath"}
    known |= {"launcherCreationPolicy", "mpiImplementation"}
    spec = job["spec"]
    assert set(spec) <= known
    assert spec["launcherCreationPolicy"] in ("AtStartup", "WaitForWorkersReady")
    policy = {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"}
    assert set(spec["runPolicy"]) <= policy | {"schedulingPolicy", "suspend", "managedBy"}
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    assert set(spec["mpiReplicaSpecs"]) == {"Launcher", "Worker"}
    for replica in spec["mpiReplicaSpecs"].values():
        assert set(replica) <= {"replicas", "restartPolicy", "template"} and type(replica["replicas"]) is int
        assert replica.get("restartPolicy", "Never") in ("Never", "OnFailure")
    (worker,) = spec["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert spec["slotsPerWorker"] == worker["resources"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("name", ["elastic.yaml", "mpijob.yaml"])
def test_what_pods_mount_and_launch_is_there(name: str, tmp_path: Path) -> None:
    objects = manifests(name)
    claims = {one["metadata"]["name"] for one in objects if one["kind"] == "PersistentVolumeClaim"}
    for template in pods(objects):
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        (container,) = template["spec"]["containers"]
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {"claimName": "runs"})["claimName"] in claims
            assert volume.get("secret", {}).get("secretName", "hvdtrain-ssh") == "hvdtrain-ssh"
    launchers = [pod["spec"]["containers"][0] for pod in pods(objects)]
    (launcher,) = [one for one in launchers if one["name"] == "launcher"]
    hosts = tmp_path / "hosts"
    hosts.write_text(
        "#!/bin/sh\necho train-worker-0.train.default.svc:1\n" if name == "elastic.yaml" else "10.0.0.1 slots=1\n"
    )
    hosts.chmod(0o755)
    line = [str(hosts) if word.startswith("/etc/") else word for word in launcher["command"] + launcher["args"]]
    assert line[:2] == ["hvdtrain", "launch"]
    done = subprocess.run(
        [sys.executable, "-m", "hvdtrain", "launch", "--dry-run", *line[2:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_elastic_pods_may_see_each_other_and_no_more() -> None:
    objects = manifests("elastic.yaml")
    role, binding = only(objects, "Role"), only(objects, "RoleBinding")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    account = only(objects, "ServiceAccount")["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert only(objects, "Job")["spec"]["template"]["spec"]["serviceAccountName"] == account
    script = only(objects, "ConfigMap")["data"]["hosts.sh"]
    labels = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert dict([re.findall(r"--selector (\w+)=(\S+)", script)[0]]) == labels
    assert "/opt/hvdtrain/discovery/kubernetes.py" in script and "discovery /opt/hvdtrain/discovery" in dockerfile()


def dockerfile() -> str:
    return (CLUSTER / "docker" / "Dockerfile").read_text()


def test_dockerfile_copies_what_there_is_and_installs_the_pair_of_the_makefile() -> None:
    lines = dockerfile().replace("\\\n", " ").splitlines()
    words = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    assert {line[0] for line in words} <= {"ARG", "FROM", "RUN", "ENV", "COPY", "WORKDIR"}
    sources = [word for line in words if line[0] == "COPY" and not line[1].startswith("--") for word in line[1:-1]]
    assert sources and all((ROOT / source).exists() for source in sources), sources
    (pair,) = re.findall(r'^ARG TORCH="(.+)"$', dockerfile(), re.MULTILINE)
    assert f"TORCH ?= {pair}\n" in (ROOT / "Makefile").read_text()
    # What the wheel is made from is copied: packages, and the files that pyproject.toml names.
    assert set(sources) >= {"pyproject.toml", "README.md", "LICENSE", "hvdtrain", "recipes"}
    for command in re.findall(r"hvdtrain (horovod \w+)", dockerfile()):
        subprocess.run([sys.executable, "-m", "hvdtrain", *command.split(), "--help"], check=True, capture_output=True)
