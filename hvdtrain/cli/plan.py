"""`hvdtrain plan`: the memory of a rank in each layout of a recipe on many ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from hvdtrain.cli.bench import parse_size
from hvdtrain.cli.run_commands import run_on_rank
from hvdtrain.comm.world import World, rank_from_environment
from hvdtrain.recipe.options import flag_of
from hvdtrain.system.errors import UserError

SHOWN = ("shard", "mirror")  # run options whose layouts are all printed
# What these keep is not counted.
UNCOUNTED = (
    "local_steps",
    "deterministic",
    "prune",
    "exchange",
    "batch_per_rank",
    "shares",
    "shard_ranks",
    "pipeline_schedule",
    "server",
)


@click.command("plan", context_settings={"allow_interspersed_args": False, "max_content_width": 100})
@click.option("-np", "--ranks", type=click.IntRange(1, 1024), default=1, show_default=True, metavar="N", help="Ranks.")
@click.option(
    "--memory",
    metavar="SIZE",
    help="Bytes that a rank may take: 16GiB, 500M. Default: of this host's GPUs or, on CPUs, of its memory, as if all "
    "ranks were on this host.",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Also write the rows."
)
@click.argument("recipe")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE OPTIONS] [RUN OPTIONS]")
def plan_command(ranks: int, memory: str | None, json_path: Path | None, recipe: str, args: tuple[str, ...]) -> int:
    """Print the memory of a rank for each layout of RECIPE on many ranks, and which layouts fit.

    This process makes steps of RECIPE, on its device, with the micro-batch that each of N ranks would have, and
    measures: parameters, with buffers; the optimizer's state, with the average of --ema; activations, which the forward
    pass keeps for the backward pass; and temporary, what a step takes at its peak besides. Gradients are counted in the
    buckets in which they are sent, with the residuals of --compression. Each row is of the rank that has most.

    \b
    hvdtrain plan -np 4 charlm                              data parallel, --shard optimizer, --recompute
    hvdtrain plan -np 8 --memory 16GiB charlm --width 1024 --micro-batch 4 --amp bf16
    hvdtrain plan -np 8 charlm --stages 2 --tensor 4        replicas of two stages, of four ranks

    Layouts: data parallel, with the recipe's embedding tables dealt to the ranks; --shard optimizer; the same with
    --mirror 1, as in elastic runs; --stages N, by the schedule 1f1b; if the recipe has `split_plan`, --tensor N; and,
    if it has `blocks`, --shard model, and all but --stages and --tensor with --recompute all, which has one block's
    activations at a time. All N ranks are one replica there, unless --stages or --tensor is given. What torch, the
    device, the network and the C library's heap take is not counted: leave a tenth and 1 GiB on GPUs, half as much
    again on CPUs.

    Exit codes: 0 printed, 1 the step failed, 2 a mistake in the options.
    """
    from hvdtrain.cli.options import check_parsed_arguments
    from hvdtrain.cli.train import load_arguments

    limit = None if memory is None else parse_size(memory)
    if rank_from_environment() is not None:
        raise UserError("hvdtrain plan is one process for any number of ranks: start it without a launcher, with -np N")
    arguments = load_arguments([recipe, *args])
    for name in arguments.given_options:
        if name in SHOWN:
            raise UserError(f"{flag_of(name)} is one of the layouts that are printed: leave it out")
        if name in UNCOUNTED:
            raise UserError(f"hvdtrain plan does not count what {flag_of(name)} keeps: leave it out")
    if str(arguments.given_options.get("compression", "")).partition(",")[0] == "auto":
        raise UserError("--compression auto chooses a method by its time: name one, for example int8")
    given = dict(arguments.given_options)
    stages, tensor = (int(given.pop(name, ranks)) for name in ("stages", "tensor"))
    check_parsed_arguments(replace(arguments, given_options=given))

    def work(world: World) -> None:
        from hvdtrain.bench.memory import MemoryQuestion, plan_memory

        own = limit if limit is not None else host_memory(given.get("device"), ranks)
        plan_memory(world, MemoryQuestion(arguments.recipe_class, given, ranks, stages, tensor, own, json_path))

    return run_on_rank(work)


def host_memory(device: object, ranks: int) -> int | None:
    """Return the bytes of this host's memory for each of its ranks; None if they compute on GPUs. Imports torch."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return None
    from hvdtrain.doctor.machine import count_usable_memory

    return count_usable_memory() // ranks
