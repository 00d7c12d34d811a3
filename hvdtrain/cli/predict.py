"""`hvdtrain predict`: the outputs of a run's model for a file of examples, or for a split of its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hvdtrain.cli.run_commands import add_run_options, check_run_dir, run_on_rank, select_overrides
from hvdtrain.comm.world import World
from hvdtrain.system.errors import UserError


@click.command("predict")
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option(
    "--input", "input_path", type=click.Path(path_type=Path), metavar="FILE", help="Examples: .npy, .npz or .jsonl."
)
@click.option("--split", metavar="NAME", help="Instead of --input: a split of the recipe, such as eval.")
@click.option(
    "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Outputs: .jsonl or .npz."
)
@add_run_options
def predict_command(
    run_dir: Path, input_path: Path | None, split: str | None, output: Path, checkpoint: str, **given: Any
) -> int:
    """Write the outputs of a run's model, in the order of the examples.

    The outputs are what the recipe's method outputs(model, batch) returns, {name: (B, ...)}; without that method, what
    the model returns for the batch, or for the first part of a batch that is a tuple, as (images, labels) is. The
    recipe comes from the source that RUN_DIR keeps, with the run's options. THIS EXECUTES THAT SOURCE.

    The examples of an input file are joined by the recipe's collate. Row i of an .npy is example i. An .npz gives
    tuples of rows if its arrays were saved by position, np.savez(F, images, labels), and dicts if they were saved by
    name. A .jsonl has a JSON value a line; lists of numbers become arrays. Floating numbers get the model's type.

    The output FILE.jsonl has a line for each example, {"id": 0, "output": [...]}, FILE.npz an array for each output. It
    is written whole or not at all, by rank 0; one that exists is replaced.

    \b
    hvdtrain predict runs/x --input new.npy --output new.jsonl
    hvdtrain predict runs/x --split eval --output eval.npz --checkpoint last
    horovodrun -np 2 hvdtrain predict runs/x --input new.npz --output out.npz

    Exit codes: 0 written, 1 failed, 2 a mistake in the options or in what outputs() returns, or there is no such run,
    checkpoint, split or file.
    """
    check_run_dir(run_dir)
    if (input_path is None) == (split is None):
        raise UserError("give either --input FILE or --split NAME")

    def work(world: World) -> None:
        from hvdtrain.training.prediction import PredictionRequest, predict_run

        source = input_path if input_path is not None else str(split)
        report = predict_run(PredictionRequest(run_dir, checkpoint, source, output, select_overrides(given)), world)
        if world.rank == 0:
            shapes = ", ".join(f"{name} {shape}" for name, shape in report.outputs.items())
            click.echo(f"{output}: {shapes}  (step {report.step}, {report.examples} examples)")

    return run_on_rank(work)
