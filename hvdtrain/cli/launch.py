"""`hvdtrain launch`: start `hvdtrain train` on many ranks and hosts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvdtrain.cli.launch_options import add_launch_options
from hvdtrain.cli.sides import LaunchCommand, correct_launch_line
from hvdtrain.launch.options import ElasticOptions, LaunchOptions
from hvdtrain.launch.signals import RequeueRequest
from hvdtrain.launch.start import launch_elastic, launch_ranks
from hvdtrain.system.collection import pause_collection
from hvdtrain.system.errors import UserError

if TYPE_CHECKING:
    from hvdtrain.cli.options import TrainArguments


@click.command(
    "launch",
    cls=LaunchCommand,
    context_settings={"allow_interspersed_args": False, "max_content_width": 100},
    options_metavar="[LAUNCH OPTIONS]",
)
@add_launch_options
@click.option("--elastic", is_flag=True, help="Let hosts come and go while it trains.")
@click.option(
    "--min-np", type=click.IntRange(min=1), metavar="N", help="Elastic: pause while fewer than N ranks are available."
)
@click.option("--max-np", type=click.IntRange(min=1), metavar="N", help="Elastic: use N ranks at most.")
@click.option(
    "--discovery",
    type=click.Path(path_type=Path),
    metavar="SCRIPT",
    help="Elastic: a program that prints the current hosts, `host:slots` a line; asked once a second.",
)
@click.option(
    "--relaunch",
    "relaunches",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Elastic: start a job that is lost as a whole again, from its newest checkpoint, up to N times.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long ranks may take to save after Ctrl-C or SIGTERM.",
)
@click.argument("train_args", nargs=-1, type=click.UNPROCESSED, metavar="RECIPE [RECIPE OPTIONS] [RUN OPTIONS]")
@click.pass_context
def launch_command(
    ctx: click.Context,
    /,
    train_args: tuple[str, ...],
    elastic: bool,
    grace: float,
    launch_options: LaunchOptions,
    **given: Any,
) -> int:
    """Start `hvdtrain train RECIPE` on many ranks and hosts.

    Launch options go before RECIPE; all that follows RECIPE goes to `hvdtrain train` as it is, after a check here. Run
    options may also be before RECIPE.
    The other hosts are reached by ssh, without a password, and have this Python and this folder at the same paths. This
    host need not be among those of -H.

    \b
    hvdtrain launch -np 4 digits --epochs 5              four ranks on this host
    hvdtrain launch -H a:8,b:8 --nic eth0 digits         sixteen ranks on two hosts
    hvdtrain launch --hostfile hosts --launcher mpirun digits --resume
    hvdtrain launch --from slurm --launcher srun digits  in a job script, a rank for each task
    hvdtrain launch --elastic --min-np 1 --max-np 8 --discovery ./hosts.sh --relaunch 5 digits

    Ranks on this host alone have your whole environment. Over several hosts, and under srun, ranks get the variables
    whose names begin with HVDTRAIN_, HOROVOD_, NCCL_, GLOO_, UCX_, OMP_, MKL_, MALLOC_, PYTHON, PYTORCH_ or TORCH_, and
    PATH, LD_LIBRARY_PATH, VIRTUAL_ENV, GLIBC_TUNABLES and CUBLAS_WORKSPACE_CONFIG; and those that --env
    names, such as --env HF_HOME. Others, secrets among them, stay here. No value is on a command line, which all users
    of a host can read; mpirun and srun send them over the network unencrypted.

    With --launcher srun, --from slurm is the default within a job; outside of one, -np is enough, and Slurm chooses the
    nodes.

    Ctrl-C or SIGTERM lets the ranks finish their step and save; a second one ends them at once.

    Exit codes: 0 trained; 1 a rank failed, and which one and why is shown; 2 a mistake in the command line;
    75 saved, or not begun: run it again with --resume; 130 or 143 ended at once by Ctrl-C or SIGTERM.
    """
    if not train_args:
        raise UserError("RECIPE is missing; `hvdtrain list` shows those found")
    args, options = list(train_args), replace(launch_options, grace=grace)
    if "--print-config" in args:
        return print_train_config(ctx, args, elastic=elastic)
    has_hosts = options.num_ranks is not None or elastic or options.source.given_options()
    if not has_hosts and (message := correct_launch_line(ctx, args)):
        raise UserError(message)
    with RequeueRequest() as request:

        def check() -> None:
            check_train_arguments(ctx, args, elastic=elastic)
            request.raise_if_received()

        if elastic:
            elastic_options = ElasticOptions(**given | {"min_np": given["min_np"] or 1})
            return launch_elastic(args, options, elastic_options, check)
        for name, value in given.items():
            if value:
                flag = "--relaunch" if name == "relaunches" else f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {value} goes with --elastic")
        return launch_ranks(["train", *args], options, check)


def check_train_arguments(ctx: click.Context, args: list[str], elastic: bool) -> TrainArguments:
    """Return the arguments of `hvdtrain train`, with mistakes in them refused before any rank starts.

    Raises:
        UserError: there is one; if it is a launch option after RECIPE, the message is the line to write.
        click.ClickException: likewise.
    """
    try:
        with pause_collection():
            from hvdtrain.cli.train import check_arguments

            return check_arguments(args, elastic)
    except UserError as error:
        unknown = error.__cause__.option_name if isinstance(error.__cause__, click.NoSuchOption) else ""
        if unknown and (message := correct_launch_line(ctx, args, unknown)):
            raise UserError(message) from None
        raise


def print_train_config(ctx: click.Context, args: list[str], elastic: bool) -> int:
    """Do what `hvdtrain train` does with --print-config, and start no rank."""
    from hvdtrain.cli.train import print_config

    return print_config(check_train_arguments(ctx, args, elastic))
