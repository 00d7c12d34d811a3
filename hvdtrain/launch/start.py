"""Starting ranks by the options of a launch, with a fixed number or an elastic one.

    options --> LaunchPlan (hosts, slots, interface, environment) --> check of the arguments --> check of hosts --> job

Mistakes are found before any rank starts, and a mistake in the arguments before any host is asked.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hvdtrain.doctor.preflight import check_hosts
from hvdtrain.launch.environment import rank_environment
from hvdtrain.launch.hosts import assign_slots
from hvdtrain.launch.job import JobSpec
from hvdtrain.launch.launcher import LAUNCHERS, LaunchPlan, choose_controller, hvdtrain_command
from hvdtrain.launch.options import ElasticOptions, LaunchOptions
from hvdtrain.launch.relaunch import ElasticLaunch, find_current_hosts, run_with_relaunches
from hvdtrain.launch.run import run_job
from hvdtrain.launch.screen import announce_start
from hvdtrain.system.errors import UserError
from hvdtrain.system.network import interface_toward, is_local_host
from hvdtrain.system.text import format_count


def launch_ranks(args: Sequence[str], options: LaunchOptions, check_arguments: Callable[[], object]) -> int:
    """Run `hvdtrain ARGS` on each rank, and return the exit code.

    Args:
        args: a command of hvdtrain and its arguments.
        options: where ranks run and what starts them.
        check_arguments: raises UserError for a mistake in `args`; called before any host is asked.
    """
    plan = build_plan(args, options)
    launcher, names = options.launcher, [host.name for host in plan.hosts]
    if not options.dry_run and args[0] == "train":  # others print tables that programs read
        announce_start(format_count(plan.num_ranks, "rank"), launcher.name, names)
    check_arguments()
    line = launcher.command_line(plan)
    if options.dry_run:
        print(shlex.join(line))
        return 0
    # The doctor has asked the hosts more than this check does.
    if launcher.uses_ssh(os.environ) and args[0] != "doctor":
        check_hosts(names, args, nic=plan.nic, ssh=plan.ssh.ssh_arguments())
    launcher.check_installation()
    is_chosen_by_system = launcher.batch_system is not None and names == ["localhost"]
    job = JobSpec(
        launcher=launcher,
        command_line=line,
        environ=plan.environ,
        hosts=() if is_chosen_by_system else plan.hosts,
        ssh=plan.ssh,
        grace=options.grace,
    )
    return run_job(job).exit_code


def build_plan(args: Sequence[str], options: LaunchOptions) -> LaunchPlan:
    """Return what the launcher is to start, and how: everything that the options leave open is chosen here.

    Args:
        args: a command of hvdtrain and its arguments, which each rank runs.
        options: where ranks run and what starts them.

    Raises:
        UserError: the options contradict each other, or what they name does not exist.
    """
    launcher = options.launcher
    controller = choose_controller(launcher, options.controller)
    options.ssh.check_identity()
    launcher.check_environment(os.environ, controller)
    hosts = assign_slots(options.read_hosts(os.environ), options.num_ranks)
    names = [host.name for host in hosts]
    multi_host = launcher.batch_system is not None or not all(map(is_local_host, names))
    nic = options.nic
    if nic is None and multi_host and launcher.batch_system is None:
        nic = interface_toward(names)
    return LaunchPlan(
        hosts=hosts,
        command=hvdtrain_command(args),
        # A copy, made now: importing the recipe to check its options may change this process's environment.
        environ=rank_environment(
            os.environ, launcher, controller, multi_host=multi_host, forward_env=options.forward_env
        ),
        controller=controller,
        nic=nic,
        ssh=options.ssh,
        forward_env=options.forward_env,
    )


def launch_elastic(
    train_args: Sequence[str], options: LaunchOptions, elastic: ElasticOptions, check_arguments: Callable[[], object]
) -> int:
    """Run `hvdtrain train ARGS` on ranks that come and go, and return the exit code.

    Args:
        train_args: what follows `hvdtrain train`.
        options: where ranks run and what starts them; without a number of ranks.
        elastic: how many ranks there may be, and which hosts there are.
        check_arguments: raises UserError for a mistake in `train_args`; called before ranks start.
    """
    launcher = options.launcher
    if not launcher.supports_elastic or options.controller not in (None, "gloo"):
        able = sorted(name for name, other in LAUNCHERS.load_all().items() if other.supports_elastic)
        raise UserError(
            f"--elastic needs --launcher {' or '.join(able)} and --controller gloo: MPI ends a job that loses a rank"
        )
    if options.num_ranks is not None:
        raise UserError(f"-np {options.num_ranks} is a fixed number; --elastic takes --min-np and --max-np")
    if (elastic.discovery is not None) + len(options.source.given_options()) != 1:
        raise UserError("--elastic takes its hosts from one of --discovery, -H, --hostfile and --from: give one")
    options.ssh.check_identity()
    hosts = options.source.read_hosts(os.environ)
    elastic.check_options(hosts)
    if options.nic is None:
        options = replace(options, nic=interface_toward(find_current_hosts(elastic, hosts)))
    multi_host = elastic.discovery is not None or not all(is_local_host(host.name) for host in hosts)
    environ = rank_environment(os.environ, launcher, "gloo", multi_host=multi_host, forward_env=options.forward_env)
    if not options.dry_run:
        where = [str(elastic.discovery)] if elastic.discovery else [host.name for host in hosts]
        announce_start(f"{elastic.rank_range_text} elastic ranks", launcher.name, where)
    check_arguments()
    if elastic.relaunches and not any(arg == "--run-dir" or arg.startswith("--run-dir=") for arg in train_args):
        raise UserError("--relaunch needs --run-dir: the folder whose checkpoints the job resumes from")
    launch = ElasticLaunch(options=options, elastic=elastic, hosts=hosts, train_args=train_args, environ=environ)
    if options.dry_run:
        print(shlex.join(launch.command_line(Path("hosts.json"))))
        return 0
    launcher.check_installation()
    return run_with_relaunches(launch)
