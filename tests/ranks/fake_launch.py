"""`hvdtrain launch` with tests/ranks/fake_rank.py for its ranks: LAUNCHER CONTROLLER GRACE HOSTS RANK_ARGUMENTS..."""

import os
import sys
from pathlib import Path

from hvdtrain.launch.environment import rank_environment
from hvdtrain.launch.hosts import parse_hosts
from hvdtrain.launch.job import JobSpec
from hvdtrain.launch.launcher import LAUNCHERS, LaunchPlan
from hvdtrain.launch.run import run_job

if __name__ == "__main__":
    name, controller, grace, hosts, *command = sys.argv[1:]
    launcher = LAUNCHERS.get(name)
    if not command[0].startswith("/"):
        command = [sys.executable, str(Path(__file__).with_name("fake_rank.py")), *command]
    environ = rank_environment(os.environ, launcher, controller)
    plan = LaunchPlan(hosts=parse_hosts(hosts), command=command, environ=environ, controller=controller)
    line = launcher.command_line(plan)
    spec = JobSpec(launcher=launcher, command_line=line, environ=environ, hosts=plan.hosts, grace=float(grace))
    sys.exit(run_job(spec).exit_code)
