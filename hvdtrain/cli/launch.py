"""`hvdtrain launch`: start `hvdtrain train`, or any program, on many ranks and hosts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvdtrain.cli.launch_options import add_launch_options
from hvdtrain.cli.programs import find_program
from hvdtrain.cli.sides import LAUNCH_LINE, LaunchCommand, LaunchLine, correct_launch_line
from hvdtrain.launch.options import ElasticOptions, LaunchOptions
from hvdtrain.launch.program import Program
from hvdtrain.launch.signals import RequeueRequest
from hvdtrain.launch.start import launch_elastic, launch_program, launch_ranks
from hvdtrain.system.collection import pause_collection
from hvdtrain.system.errors import UserError

if TYPE_CHECKING:
    from hvdtrain.cli.options import TrainArguments


LAUNCH_HELP = """\
Start a recipe, or any program, on many ranks and hosts.

\b
hvdtrain launch -np 4 digits --epochs 5              four ranks of a recipe on this host
hvdtrain launch -H a:8,b:8 --nic eth0 digits         sixteen ranks on two hosts
hvdtrain launch --hostfile hosts --launcher mpirun digits --resume
hvdtrain launch --from slurm --launcher srun digits  in a job script, a rank for each task
hvdtrain launch --elastic --min-np 1 --max-np 8 --discovery ./hosts.sh --relaunch 5 digits
hvdtrain launch -np 4 train.py --lr 0.1              four ranks of a script, which needs no hvdtrain
hvdtrain launch -H a:8,b:8 -- python -m pkg.train    likewise anything else: a binary, a shell script

Launch options come first. What follows RECIPE goes to `hvdtrain train` as it is, after a check here; run options
may also be before RECIPE. What follows SCRIPT.py or COMMAND goes to the program as it is.
The other hosts are reached by ssh, without a password, and have this Python and this folder at the same paths. This
host need not be among those of -H.

SCRIPT.py is a program if no class in it can be a recipe, as far as it and the files next to it show: none is run to
find out. Each rank runs it by this Python, and so does `-- python`: this Python's folder is the first on PATH.
Ranks of a program have RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun
sets them, JAX_COORDINATOR_ADDRESS, TF_CONFIG, and what hvd.init() needs; with --elastic only the last. See
docs/programs.md.

Ranks on this host alone have your whole environment. Over several hosts, and under srun, ranks get the variables
whose names begin with HVDTRAIN_, HOROVOD_, NCCL_, GLOO_, UCX_, OMP_, MKL_, MALLOC_, PYTHON, PYTORCH_, TORCH_,
KERAS_, JAX_, XLA_ or TF_; PATH, LD_LIBRARY_PATH, VIRTUAL_ENV, GLIBC_TUNABLES, CUBLAS_WORKSPACE_CONFIG and NPROC;
and those that --env names, such as --env HF_HOME. Others, secrets among them, stay here. No value is on a command
line, which all users of a host can read; mpirun and srun send them over the network unencrypted.

With --launcher srun, --from slurm is the default within a job; outside of one, -np is enough, and Slurm chooses the
nodes.

Ctrl-C or SIGTERM lets the ranks of a recipe finish their step and save; programs get the signal itself. What is
left after --grace seconds is killed; a second Ctrl-C ends all at once.

Exit codes: 0 done; 1 a rank failed, and which one and why is shown; 2 a mistake in the command line;
75 saved, or not begun: run it again with --resume; 130 or 143 ended at once by Ctrl-C or SIGTERM. A program's own
exit code is passed on: that of the rank that failed first, 128+N if signal N ended it, 75 to be queued again; 127
and 126 if there is no such COMMAND, or it cannot be executed."""


@click.command(
    "launch",
    cls=LaunchCommand,
    help=LAUNCH_HELP,
    context_settings={"max_content_width": 100},
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
    help="Start a job that failed or is lost as a whole again, up to N times: a program, or an elastic recipe, which "
    "resumes from its newest checkpoint.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long ranks may take to save after Ctrl-C or SIGTERM.",
)
@click.option("--gpu-per-rank", is_flag=True, help="Programs: each rank sees one GPU (CUDA_VISIBLE_DEVICES).")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def launch_command(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
    elastic: bool,
    grace: float,
    gpu_per_rank: bool,
    launch_options: LaunchOptions,
    **given: Any,
) -> int:
    line: LaunchLine = ctx.meta[LAUNCH_LINE]
    if not words and not line.is_command:
        raise UserError("RECIPE is missing; `hvdtrain list` shows those found")
    options = replace(launch_options, grace=grace)
    elastic_options = parse_elastic_options(elastic, given)
    has_hosts = options.num_ranks is not None or elastic or bool(options.source.given_options())
    if (command := find_program(line)) is not None:
        if not has_hosts and (message := correct_launch_line(ctx, words, name=words[0])) and not line.is_command:
            raise UserError(message)
        program = Program(command=command, gpu_per_rank=gpu_per_rank, relaunches=given["relaunches"])
        with RequeueRequest():
            return launch_program(program, options, elastic_options)
    if gpu_per_rank:
        raise UserError("--gpu-per-rank is for programs; a recipe chooses its device itself (--device)")
    args = [words[0], *line.run, *words[1:]]
    if "--print-config" in args:
        return print_train_config(ctx, args, elastic=elastic)
    if not has_hosts and (message := correct_launch_line(ctx, args)):
        raise UserError(message)
    if given["relaunches"] and not elastic:
        raise UserError(f"--relaunch {given['relaunches']} goes with --elastic or with a program")
    with RequeueRequest() as request:

        def check() -> None:
            check_train_arguments(ctx, args, elastic=elastic)
            request.raise_if_received()

        if elastic_options is not None:
            return launch_elastic(args, options, elastic_options, check)
        return launch_ranks(["train", *args], options, check)


def parse_elastic_options(elastic: bool, given: dict[str, Any]) -> ElasticOptions | None:  # values of click's options
    """Return the options of an elastic launch; None without --elastic. Raises UserError if one is given then."""
    if elastic:
        return ElasticOptions(**given | {"min_np": given["min_np"] or 1})
    for name in ("min_np", "max_np", "discovery"):
        if given[name]:
            raise UserError(f"--{name.replace('_', '-')} {given[name]} goes with --elastic")
    return None


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
