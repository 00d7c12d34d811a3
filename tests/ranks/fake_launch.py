"""`hvdtrain launch` with tests/ranks/fake_rank.py for its ranks: LAUNCHER CONTROLLER GRACE HOSTS RANK_ARGUMENTS..."""

import os
import sys
from pathlib import Path

from hvdtrain.launch.command import build_command_line
from hvdtrain.launch.environment import rank_environment
from hvdtrain.launch.hosts import parse_hosts
from hvdtrain.launch.run import run_launcher

if __name__ == "__main__":
    launcher, controller, grace, hosts, *arguments = sys.argv[1:]
    placed = parse_hosts(hosts)
    environ = rank_environment(os.environ, launcher, controller)
    rank = [sys.executable, str(Path(__file__).with_name("fake_rank.py")), *arguments]
    line = build_command_line(launcher, controller, placed, rank, environ)
    sys.exit(run_launcher(line, environ, placed, grace=float(grace))[0])
