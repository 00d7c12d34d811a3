"""Starting ranks by the options of a launch, with a fixed number or an elastic one.

    options --> LaunchPlan (hosts, slots, interface, environment) --> check of the arguments --> check of hosts --> job

Mistakes are found before any rank starts, and a mistake in the arguments before any host is asked.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hvdtrain.doctor.host_facts import FactsRequest
from hvdtrain.doctor.preflight import check_hosts, parse_run_dir
from hvdtrain.launch.environment import rank_environment
from hvdtrain.launch.hosts import assign_slots
from hvdtrain.launch.job import JobSpec
from hvdtrain.launch.launcher import LAUNCHERS, Launcher, LaunchPlan, choose_controller, hvdtrain_command
from hvdtrain.launch.options import ElasticOptions, LaunchOptions
from hvdtrain.launch.places import STORE_VARIABLE
from hvdtrain.launch.program import Program, find_replaced_variables
from hvdtrain.launch.program_store import serve_store
from hvdtrain.launch.relaunch import ElasticLaunch, find_current_hosts, run_program_jobs, run_with_relaunches
from hvdtrain.launch.run import JobResult, run_job
from hvdtrain.launch.screen import announce_start
from hvdtrain.system.errors import UserError
from hvdtrain.system.network import interface_toward, is_local_host
from hvdtrain.system.text import format_count
from hvdtrain.training.lease import RELAUNCH_VARIABLE


def launch_ranks(args: Sequence[str], options: LaunchOptions, check_arguments: Callable[[], object]) -> int:
    """Run `hvdtrain ARGS` on each rank, and return the exit code; the arguments are those of `launch_job`."""
    return launch_job(args, options, check_arguments).exit_code


def launch_job(args: Sequence[str], options: LaunchOptions, check_arguments: Callable[[], object]) -> JobResult:
    """Run `hvdtrain ARGS` on each rank, and return how that ended.

    Args:
        args: a command of hvdtrain and its arguments.
        options: where ranks run and what starts them.
        check_arguments: raises UserError for a mistake in `args`; called before any host is asked.
    """
    plan = build_plan(hvdtrain_command(args), options)
    launcher, names = options.launcher, [host.name for host in plan.hosts]
    if not options.dry_run and args[0] == "train":  # others print tables that programs read
        announce_start(format_count(plan.num_ranks, "rank"), launcher.name, names)
    check_arguments()
    line = launcher.command_line(plan)
    if options.dry_run:
        print(shlex.join(line))
        return JobResult(0, is_final=True)
    # The doctor has asked the hosts more than this check does.
    if launcher.uses_ssh(os.environ) and args[0] != "doctor":
        check_hosts(names, FactsRequest(parse_run_dir(args)), nic=plan.nic, ssh=plan.ssh.ssh_arguments())
    launcher.check_installation()
    return run_job(make_job(plan, options, line))


def launch_program(program: Program, options: LaunchOptions, elastic: ElasticOptions | None = None) -> int:
    """Run a program that is not a recipe on each rank, and return the exit code.

    It is 0, or that of the first rank that failed (128 + n for signal n), 75 if ranks ended with it, or 128 + n if the
    user's signal n stopped the program.

    Args:
        program: what each rank runs.
        options: where ranks run and what starts them.
        elastic: how many ranks there may be, for a program that lets them come and go; None: their number is fixed.

    Raises:
        CommandError: this host runs ranks, and cannot start the command.
        UserError: the options contradict each other, or what they name does not exist.
        RunError: a host cannot take part.
    """
    if elastic is not None:
        return launch_elastic_program(program, options, elastic)
    plan = build_plan(program.rank_command(options.forward_env), options)
    launcher, names = options.launcher, [host.name for host in plan.hosts]
    if not are_hosts_unknown(plan, launcher) and any(map(is_local_host, names)):
        program.check_command(plan.environ)
    # mpirun names the variables that it passes on; the values of these are known once the job starts.
    later = [] if options.dry_run else [STORE_VARIABLE, *([RELAUNCH_VARIABLE] if program.relaunches else [])]
    line = launcher.command_line(replace(plan, environ={**plan.environ, **dict.fromkeys(later, "")}))
    if options.dry_run:
        print(shlex.join(line))
        return 0
    announce_start(format_count(plan.num_ranks, "rank"), launcher.name, names)
    for name in find_replaced_variables(os.environ, options.forward_env):
        print(f"hvdtrain: {name} of the environment is not used: ranks get this launch's; --env {name} keeps it")
    if plan.num_ranks > 1 and (warning := program.describe_lone_ranks(plan.controller)):
        print(f"hvdtrain: {warning}", file=sys.stderr)
    if launcher.uses_ssh(os.environ):
        check_hosts(names, program.request_files(plan.environ), nic=plan.nic, ssh=plan.ssh.ssh_arguments())
    launcher.check_installation()
    job = replace(make_job(plan, options, line), is_program=True)
    return run_program_jobs(lambda: serve_store(plan, job), program.relaunches)


def launch_elastic_program(program: Program, options: LaunchOptions, elastic: ElasticOptions) -> int:
    """Run a program on ranks that come and go, and return the exit code; see `launch_program`."""
    launch = replace(prepare_elastic_launch(options, elastic), program=program)
    launcher = options.launcher
    if any(map(is_local_host, find_current_hosts(elastic, launch.hosts))):
        program.check_command(launch.environ)
    if options.dry_run:
        print(shlex.join(launch.command_line(Path("hosts.json"))))
        return 0
    announce_elastic_start(launch)
    launcher.check_installation()
    return run_program_jobs(launch.prepare_job, max(program.relaunches, elastic.relaunches))


def make_job(plan: LaunchPlan, options: LaunchOptions, line: Sequence[str]) -> JobSpec:
    """Return the job of a plan, whose launcher has the command line `line`."""
    return JobSpec(
        launcher=options.launcher,
        command_line=line,
        environ=plan.environ,
        hosts=() if are_hosts_unknown(plan, options.launcher) else plan.hosts,
        ssh=plan.ssh,
        grace=options.grace,
    )


def are_hosts_unknown(plan: LaunchPlan, launcher: Launcher) -> bool:
    """Return whether the launcher's batch system chooses the hosts once it starts."""
    return launcher.batch_system is not None and [host.name for host in plan.hosts] == ["localhost"]


def build_plan(command: Sequence[str], options: LaunchOptions) -> LaunchPlan:
    """Return what the launcher is to start, and how: everything that the options leave open is chosen here.

    Args:
        command: what each rank runs.
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
        command=command,
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
    launch = replace(prepare_elastic_launch(options, elastic), train_args=train_args)
    if not options.dry_run:
        announce_elastic_start(launch)
    check_arguments()
    if elastic.relaunches and not any(arg == "--run-dir" or arg.startswith("--run-dir=") for arg in train_args):
        raise UserError("--relaunch needs --run-dir: the folder whose checkpoints the job resumes from")
    if options.dry_run:
        print(shlex.join(launch.command_line(Path("hosts.json"))))
        return 0
    options.launcher.check_installation()
    return run_with_relaunches(launch)


def prepare_elastic_launch(options: LaunchOptions, elastic: ElasticOptions) -> ElasticLaunch:
    """Return an elastic launch without what ranks run: hosts, interface and environment are chosen here.

    Raises:
        UserError: the options contradict each other, or what they name does not exist.
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
    return ElasticLaunch(options=options, elastic=elastic, hosts=hosts, train_args=(), environ=environ)


def announce_elastic_start(launch: ElasticLaunch) -> None:
    """Print that an elastic launch is being started."""
    elastic = launch.elastic
    where = [str(elastic.discovery)] if elastic.discovery else [host.name for host in launch.hosts]
    announce_start(f"{elastic.rank_range_text} elastic ranks", launch.options.launcher.name, where)
