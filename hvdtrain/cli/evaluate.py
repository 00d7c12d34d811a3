"""`hvdtrain evaluate`: the metrics of a run's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hvdtrain.cli.run_commands import add_run_options, check_run_dir, run_on_rank, select_overrides
from hvdtrain.comm.world import World


@click.command("evaluate")
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option("--split", metavar="NAME", help="An evaluation set, or train. Default: all evaluation sets.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON, with all digits.")
@add_run_options
def evaluate_command(run_dir: Path, split: str | None, as_json: bool, checkpoint: str, **given: Any) -> int:
    """Evaluate a checkpoint of a run, as its training evaluated it.

    The recipe comes from the source that RUN_DIR keeps, with the run's options. THIS EXECUTES THAT SOURCE. On as many
    ranks as in training the metrics are those of the training to the last digit; on another number they differ by
    rounding, unless the run was --deterministic.

    \b
    hvdtrain evaluate runs/x                            on one rank
    hvdtrain evaluate runs/x --split test --checkpoint 2400 --json
    horovodrun -np 2 hvdtrain evaluate runs/x           on two; likewise mpirun and srun

    Exit codes: 0 evaluated, 1 failed, 2 a mistake in the options, or there is no such run, checkpoint or split.
    """
    check_run_dir(run_dir)

    def work(world: World) -> None:
        from dataclasses import asdict

        from hvdtrain.recipe.metrics import format_values
        from hvdtrain.system.strict_json import encode_json
        from hvdtrain.training.evaluating import evaluate_run

        report = evaluate_run(run_dir, checkpoint, split, select_overrides(given), world)
        if world.rank != 0:
            return
        if as_json:
            click.echo(encode_json(asdict(report), indent=2))
            return
        width = max(map(len, report.metrics))
        for name, metrics in report.metrics.items():
            where = f"step {report.step}, {report.examples[name]} examples"
            click.echo(f"{name:{width}}  {format_values(metrics)}  ({where})")

    return run_on_rank(work)
