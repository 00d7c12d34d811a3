"""The files of cluster/: each is sound, says what hvdtrain understands, and does what it says as far as one host shows.

Those that launch are run for real by tests/slurm and tests/hosts/test_job_scripts_on_hosts.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from hvdtrain.launch.hosts import Host, read_hostfile
from tests.ranks.harness import skip_or_fail
from tests.support.limits import stretch

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
    said = {run: shlex.split(process.communicate(timeout=stretch(100))[0]) for run, process in started.items()}
    for run, line in said.items():
        train = ["train", "digits", "--epochs", "5", "--run-dir", f"{ROOT}/runs/{run}", "--resume"]
        assert line[1:5] == ["-np", "4", "-H", "node1:2,node2:2"] and line[-len(train) :] == train, line


def test_job_scripts_launch_any_program(tmp_path: Path) -> None:
    """A command, a script, with words that a shell would take apart; its arguments are its own."""
    nodes, hostfile, script = tmp_path / "nodes", tmp_path / "hostfile", tmp_path / "train.py"
    nodes.write_text("node1\nnode2\n")
    hostfile.write_text("node1\nnode2\n")
    script.write_text("1 / 0\n")
    words = ["--name", "a b", "$HOME", "it's", "--resume", "*", ""]
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "1(x2)"}
    pbs, lsf = {"PBS_JOBID": "7", "PBS_NODEFILE": str(nodes)}, {"LSB_JOBID": "7", "LSB_DJOB_HOSTFILE": str(nodes)}
    command, program = ["--", "python", "x.py", *words], [str(script), *words]
    started = {
        "slurm": (
            dry_run("slurm/train.sbatch", *command, SLURM_JOB_ID="7", RUN_DIR=f"{tmp_path}/slurm", **slurm),
            command,
        ),
        "script": (
            dry_run("slurm/train.sbatch", *program, SLURM_JOB_ID="7", RUN_DIR=f"{tmp_path}/script", **slurm),
            program,
        ),
        "pbs": (dry_run("pbs/train.pbs", PROGRAM=shlex.join(command), RUN_DIR=f"{tmp_path}/pbs", **pbs), command),
        "recipe": (dry_run("pbs/train.pbs", RECIPE=str(script), RUN_DIR=f"{tmp_path}/recipe", **pbs), [str(script)]),
        "lsf": (dry_run("lsf/train.lsf", PROGRAM=shlex.join(program), RUN_DIR=f"{tmp_path}/lsf", **lsf), program),
        "arguments": (dry_run("lsf/train.lsf", *command, RUN_DIR=f"{tmp_path}/arguments", **lsf), command),
        "mpi": (dry_run("mpi/train.sh", *command, HOSTFILE=str(hostfile), RUN_DIR=f"{tmp_path}/mpi"), command),
    }
    for run, (process, given) in started.items():
        line = shlex.split(process.communicate(timeout=stretch(100))[0])
        assert line[-len(given) :] == given, (run, line)
        assert given[0] == "--" or Path(line[-len(given) - 1]).name.startswith("python"), line
        assert (tmp_path / run).is_dir(), run
        assert "RUN_DIR" in line or Path(line[0]).name != "mpirun", line


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
        until = time.monotonic() + stretch(30)
        while not (tmp_path / "members" / "here.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        member = yaml.safe_load((tmp_path / "members" / "here.json").read_text())
        agent.send_signal(signal.SIGINT)
    assert (agent.returncode, member["slots"]) == (0, 3)


def test_systemd_unit_is_valid_and_has_few_rights(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    source = CLUSTER / "systemd" / "hvdtrain-agent.service"
    copy = tmp_path / source.name
    copy.write_text(source.read_text().replace("/opt/hvdtrain/bin/hvdtrain", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # From 0 (nothing is allowed) to 10; without any hardening it is 9.6, and a unit with a threshold of 2.0 is "OK".
    line = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", str(copy)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
    for args in (launcher["args"], ["--grace", "50", "--", "true", "/runs/train"]):  # the recipe's, a program's
        line = [str(hosts) if word.startswith("/etc/") else word for word in launcher["command"] + args]
        assert line[:2] == ["hvdtrain", "launch"]
        dry = [sys.executable, "-m", "hvdtrain", "launch", "--dry-run", *line[2:]]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip().endswith(args[-1]), done.stderr


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
    assert dict([re.findall(r"--selector (\w+)=(\S+)", script)[0]]).items() <= labels.items()
    assert "exec /opt/hvdtrain/bin/hvdtrain discover kubernetes --selector" in script
    assert "COPY --from=build /opt/hvdtrain /opt/hvdtrain" in dockerfile()


@pytest.mark.parametrize("name", ["elastic.yaml", "mpijob.yaml"])
def test_pods_have_no_rights_that_they_do_not_need(name: str) -> None:
    objects = manifests(name)
    templates = pods(objects)
    assert len(templates) == 2
    for template in templates:
        spec = template["spec"]
        security, (container,) = spec["securityContext"], spec["containers"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == security["fsGroup"] == 10000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        # Only the launcher that asks Kubernetes for pods has an account's token.
        assert spec.get("automountServiceAccountToken") is False or "serviceAccountName" in spec
    assert "useradd --create-home --uid 10000" in dockerfile() and "\nUSER train\n" in dockerfile()


@pytest.mark.parametrize("name", ["elastic.yaml", "mpijob.yaml"])
def test_only_pods_of_the_training_reach_its_pods(name: str) -> None:
    objects = manifests(name)
    policy = only(objects, "NetworkPolicy")["spec"]
    chosen = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": chosen}}]}]
    for template in pods(objects):
        assert chosen.items() <= template["metadata"]["labels"].items()


def test_workers_do_not_have_the_launchers_private_key() -> None:
    secrets = {
        template["spec"]["containers"][0]["name"]: volume["secret"]
        for template in pods(manifests("elastic.yaml"))
        for volume in template["spec"]["volumes"]
        if volume["name"] == "ssh"
    }
    items = {name: {item["key"] for item in secret["items"]} for name, secret in secrets.items()}
    assert items == {"worker": {"authorized_keys", "host_key"}, "launcher": {"id_ed25519", "host_key.pub"}}


@pytest.mark.parametrize("keys", ["of elastic.yaml", "of the MPI operator"])
def test_a_pods_sshd_lets_in_the_launcher_alone_and_is_known_to_it(keys: str, tmp_path: Path) -> None:
    skip_or_fail(None if Path("/usr/sbin/sshd").exists() else "there is no sshd")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # which sshd needs as root only
    there = tmp_path / "keys"
    there.mkdir()
    client, host = ("id_ed25519", "host_key") if keys == "of elastic.yaml" else ("id_rsa", "id_rsa")
    for name in {client, host, "stranger"}:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(there / name)], check=True)
    (there / "authorized_keys").write_text((there / f"{client}.pub").read_text())
    (there / "authorized_keys").chmod(0o666)  # as in a mounted secret, where others than the owner may write
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {**os.environ, "KEYS": str(there), "PORT": str(port)}
    config = tmp_path / "ssh_config"
    text = (CLUSTER / "docker" / "ssh_config").read_text().replace("/etc/hvdtrain/ssh", str(there))
    known = f"/usr/bin/env KEYS={there} {CLUSTER}/docker/known_hosts"
    config.write_text(text.replace("Port 2222", f"Port {port}").replace("/opt/hvdtrain/ssh/known_hosts", known))

    def login(*options: str) -> subprocess.CompletedProcess[str]:
        line = ["ssh", "-F", str(config), *options, "127.0.0.1", "echo", "in"]
        return subprocess.run(line, capture_output=True, text=True, timeout=stretch(90))

    serve = [str(CLUSTER / "docker" / "serve")]
    with (
        tempfile.TemporaryDirectory(
            prefix=".hvdtrain-test-", dir=Path.home()
        ) as home,  # sshd looks at what is above it
        subprocess.Popen(serve, env={**environ, "HOME": home}, stderr=subprocess.DEVNULL) as sshd,
    ):
        try:
            until = time.monotonic() + stretch(30)
            while (done := login()).returncode == 255 and time.monotonic() < until:
                time.sleep(0.1)
            assert (done.stdout, done.stderr) == ("in\n", "")
            (there / client).rename(there / "hidden")
            assert "Permission denied (publickey)" in login("-i", str(there / "stranger")).stderr
            (there / "hidden").rename(there / client)
            (there / f"{host}.pub").write_text((there / "stranger.pub").read_text())
            assert "Host key verification failed" in login().stderr
        finally:
            sshd.terminate()


def dockerfile() -> str:
    return (CLUSTER / "docker" / "Dockerfile").read_text()


def test_dockerfile_copies_what_there_is_and_installs_the_pair_of_the_makefile() -> None:
    lines = dockerfile().replace("\\\n", " ").splitlines()
    words = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    assert {line[0] for line in words} <= {"ARG", "FROM", "RUN", "ENV", "COPY", "USER", "WORKDIR"}
    sources = [word for line in words if line[0] == "COPY" and not line[1].startswith("--") for word in line[1:-1]]
    assert sources and all((ROOT / source).exists() for source in sources), sources
    (pair,) = re.findall(r'^ARG TORCH="(.+)"$', dockerfile(), re.MULTILINE)
    assert f"TORCH ?= {pair}\n" in (ROOT / "Makefile").read_text()
    # What the wheel is made from is copied: packages, and the files that pyproject.toml names.
    assert set(sources) >= {"pyproject.toml", "README.md", "LICENSE", "hvdtrain", "recipes"}
    for command in re.findall(r"hvdtrain (horovod \w+)", dockerfile()):
        subprocess.run([sys.executable, "-m", "hvdtrain", *command.split(), "--help"], check=True, capture_output=True)
