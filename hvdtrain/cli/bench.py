"""`hvdtrain bench`: measure the network, the step and gradient compression, on many ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from hvdtrain.cli.bench_workload import WayArguments, WorkloadArguments, add_workload_options
from hvdtrain.cli.groups import CommandGroup
from hvdtrain.cli.launch_options import LAUNCH_OPTION_NAMES, add_launch_options
from hvdtrain.cli.rank import exit_on_failure, set_rank_threads, start_rank
from hvdtrain.comm.world import World, rank_from_environment
from hvdtrain.launch.options import LaunchOptions
from hvdtrain.launch.start import launch_ranks
from hvdtrain.native.installed import start_mpi
from hvdtrain.system import messages
from hvdtrain.system.errors import UserError

if TYPE_CHECKING:
    pass

COMMAND_SETTINGS = {"allow_interspersed_args": False, "max_content_width": 100}
BYTE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@click.group("bench", cls=CommandGroup, invoke_without_command=True)
@click.pass_context
def bench_command(context: click.Context) -> None:
    """Measure the network, the step and gradient compression, on many ranks.

    Each command starts its ranks itself, as `hvdtrain launch` does, by default two on this host; under horovodrun,
    mpirun or srun it is one of their ranks.
    """
    if context.invoked_subcommand is None:
        raise UserError("`hvdtrain bench` needs a command: allreduce, step or compression")


@bench_command.command("allreduce", context_settings=COMMAND_SETTINGS)
@add_launch_options
@click.option("--sizes", metavar="4K,1M,...", help="Sizes in bytes, instead of a range.")
@click.option(
    "--min-bytes",
    default="1K",
    show_default=True,
    metavar="SIZE",
    help="The first size; each is four times the one before.",
)
@click.option("--max-bytes", default="64M", show_default=True, metavar="SIZE", help="No size is larger.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32", "float64", "int32", "int64"]),
    default="float32",
    show_default=True,
    help="The type of the values.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Where the values are. Default: cuda if there is one."
)
def allreduce_command(
    sizes: str | None,
    min_bytes: str,
    max_bytes: str,
    dtype: str,
    device: str | None,
    launch_options: LaunchOptions,
) -> int:
    """Time all-reduces of many sizes, as nccl-tests do.

    Sizes are in bytes, or end in K, M or G. For each: the median time of an all-reduce in place; the bytes reduced per
    second (algbw) and the bytes that each of n ranks sends per second (busbw = algbw 2 (n - 1) / n), both in GB; and
    how many values of all ranks' results are wrong.
    """
    chosen = parse_size_list(sizes) if sizes is not None else size_range(min_bytes, max_bytes)
    width = int(re.sub(r"\D", "", dtype)) // 8
    for size in chosen:
        if size < width:
            raise UserError(f"a size of {size} bytes is less than one {dtype}; expected {width} or more")

    def run_on_rank(world: World) -> None:
        from hvdtrain.bench.allreduce import benchmark_all_reduce

        benchmark_all_reduce(world, chosen, dtype, device)

    return run_or_launch(launch_options, lambda: None, run_on_rank)


@bench_command.command("step", context_settings=COMMAND_SETTINGS)
@add_launch_options
@add_workload_options("A method to measure. Can be repeated. Default: none.")
@click.option(
    "--way",
    "ways",
    multiple=True,
    metavar="OPTIONS",
    help="Options of `hvdtrain train RECIPE` to compare with those of the first --way. Repeat it; '' is for none.",
)
@click.option(
    "--turns", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="Measure each --way N times."
)
def step_command(workload: WorkloadArguments, ways: tuple[str, ...], turns: int, launch_options: LaunchOptions) -> int:
    """Time training steps: without an exchange, with Horovod's own, and with hvdtrain's buckets.

    Trains RECIPE on one batch again and again; without RECIPE, a ResNet-18 on 16 random images of 64x64 per rank.
    Prints medians of the slowest rank; "waited" is the part of a step that its thread waits for the network.

    With --way, compares the first steps of real runs, each with all that its options do, in turns: mean step of the
    slowest rank, bytes that rank 0 sends in a step, peak memory that the run takes, and the step over the first
    way's. `hvdtrain bench step digits --way "" --way "--compression int8"`
    """
    if ways:
        arguments = WayArguments(ways, turns, workload)

        def compare_on_rank(world: World) -> None:
            from hvdtrain.bench.ways import compare_ways

            compare_ways(world, arguments.make_plan())

        return run_or_launch(launch_options, arguments.check_arguments, compare_on_rank)

    def run_on_rank(world: World) -> None:
        from hvdtrain.bench.step import benchmark_step

        benchmark_step(world, workload.make_plan(["none"]))

    return run_or_launch(launch_options, workload.check_arguments, run_on_rank)


@bench_command.command("compression", context_settings=COMMAND_SETTINGS)
@add_launch_options
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    default="compression.png",
    show_default=True,
    metavar="FILE.png",
    help="Step time against bandwidth, 10 Mbit/s to 100 Gbit/s.",
)
@add_workload_options("A method to measure. Can be repeated. Default: all.")
def compression_command(workload: WorkloadArguments, plot: Path, launch_options: LaunchOptions) -> int:
    """Measure and predict what each method of gradient compression costs and gains.

    For each method: bytes that a rank sends in a step, milliseconds to encode and to decode, the cosine between the
    gradients that were applied and the exact mean over the ranks, predicted and measured milliseconds of a step, and
    the speed-up over no compression. The plot shows the prediction for other networks.

    Trains RECIPE on one batch again and again; without RECIPE, a ResNet-18 on 16 random images of 64x64 per rank.
    """
    if plot.suffix != ".png":
        raise UserError(f"--plot {plot}: expected a name that ends in .png")
    if not plot.absolute().parent.is_dir():
        raise UserError(f"--plot {plot}: there is no folder {plot.absolute().parent}")

    def run_on_rank(world: World) -> None:
        from hvdtrain.bench.compression import benchmark_compression
        from hvdtrain.compression.registry import default_specs

        benchmark_compression(world, workload.make_plan(default_specs()), plot)

    return run_or_launch(launch_options, workload.check_arguments, run_on_rank)


def parse_size(text: str) -> int:
    """Return the bytes of a text such as `4096`, `64K` or `16GiB`. Raises UserError."""
    found = re.fullmatch(r"(\d+)([KMGT]?)(?:I?B)?", text.strip().upper())
    if not found or not int(found[1]):
        raise UserError(f"{text!r} is not a size in bytes; expected for example 4096, 64K or 16M")
    return int(found[1]) * BYTE_UNITS[found[2]]


def parse_size_list(text: str) -> list[int]:
    """Return the sizes of a list, each once, increasing. Raises UserError."""
    return sorted({parse_size(part) for part in text.split(",")})


def size_range(first: str, last: str) -> list[int]:
    """Return sizes from the first on, each four times the one before, none above the last. Raises UserError."""
    size, most = parse_size(first), parse_size(last)
    if size > most:
        raise UserError(f"--min-bytes {first} is more than --max-bytes {last}")
    sizes = []
    while size <= most:
        sizes.append(size)
        size *= 4
    return sizes


def run_or_launch(options: LaunchOptions, check: Callable[[], object], work: Callable[[World], object]) -> int:
    """Do the work if this process is a rank; else start the same command on ranks. Returns the exit code.

    Args:
        options: where the ranks run.
        check: called before any rank starts, and on each rank; raises UserError.
        work: what a rank does.
    """
    context = click.get_current_context()
    if rank_from_environment() is None:
        if options.num_ranks == 1:
            raise UserError("-np 1: there is nothing to exchange; expected 2 ranks or more")
        if options.num_ranks is None and not options.source.given_options():
            options = replace(options, num_ranks=2)
        return launch_ranks(["bench", str(context.command.name), *collect_own_arguments(context)], options, check)
    set_rank_threads()
    if "HOROVOD_RANK" not in os.environ:
        # mpirun or srun started this rank. MPI that is started here outlives Horovod, which `bench step` restarts.
        start_mpi()
    with exit_on_failure():
        check()
        world = start_rank()
        if world.size == 1:
            raise UserError("this is the only rank: there is nothing to exchange; expected 2 ranks or more")
        work(world)
    messages.send_message(messages.RankFinished(world.rank, 0))
    from hvdtrain.comm import collectives

    collectives.barrier("end")  # launchers end all ranks when one has ended
    return 0


def collect_own_arguments(context: click.Context) -> list[str]:
    """Return the arguments that were given to a command, without the launch options."""
    given: list[str] = []
    for parameter in sorted(context.command.params, key=lambda one: isinstance(one, click.Argument)):
        name = str(parameter.name)
        if name in LAUNCH_OPTION_NAMES or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        values = value if isinstance(value, tuple) else (value,)
        for one in values:
            if isinstance(parameter, click.Argument):
                given.append(str(one))
            else:  # a value that looks like an option, or is empty, needs the equals sign
                text, flag = str(one), parameter.opts[0]
                given += [flag, text] if text and not text.startswith("-") else [f"{flag}={text}"]
    return given
