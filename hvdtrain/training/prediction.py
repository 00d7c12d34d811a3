"""`hvdtrain predict`: the outputs of a finished run's model, in the order of the examples."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.data.input_file import InputFile
from hvdtrain.recipe import order
from hvdtrain.recipe.framework import Chunk, Predictor, find_framework
from hvdtrain.recipe.now import Now, set_now
from hvdtrain.recipe.options import OptionValues
from hvdtrain.recipe.shares import even_shares
from hvdtrain.system import activity
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.files import write_atomically, write_error_text
from hvdtrain.system.strict_json import encode_json
from hvdtrain.training.outputs import OutputCollector, Outputs
from hvdtrain.training.plan import TrainingPlan, make_training_plan
from hvdtrain.training.position import Position
from hvdtrain.training.reopening import ReopenedRun, reopen_run

OUTPUT_SUFFIXES = (".jsonl", ".npz")


@dataclass(frozen=True)
class PredictionRequest:
    """What `hvdtrain predict` is asked for."""

    run_dir: Path
    which: str  # the checkpoint: "best", "last" or a step
    source: str | Path  # a split of the recipe, or a file
    output: Path
    given: OptionValues  # run options that replace those of the run


@dataclass(frozen=True)
class PredictionReport:
    """What was written."""

    step: int  # of the checkpoint
    examples: int
    outputs: dict[str, tuple[int, ...]]  # the shape of each, on rank 0


def check_output(path: Path) -> None:
    """Raise UserError for an output file of another kind, or in a folder that is not there."""
    if path.suffix not in OUTPUT_SUFFIXES:
        raise UserError(f"--output {path}: expected a file whose name ends in {' or '.join(OUTPUT_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}")


def predict_run(request: PredictionRequest, world: World) -> PredictionReport:
    """Predict examples on all ranks, each with its part, and write the outputs in their order on rank 0.

    Raises:
        UserError: on all ranks, if there is no such run, checkpoint, split or file, or outputs are not arrays (B, ...)
            that fit together.
        RunError: on all ranks, if the output cannot be written.
    """
    collectives.on_root("predict.output", lambda: check_output(request.output))
    reopened = reopen_run(request.run_dir, request.which, request.given, world)
    recipe = reopened.opened.recipe
    framework = find_framework(type(recipe))
    if framework.make_predictor is None:
        raise UserError(f"{request.run_dir}: models of the framework {framework.name} cannot be loaded")
    examples = read_input(request.source) if isinstance(request.source, Path) else request.source
    activity.enter_activity("preparing the model and the examples", patient=True)
    predictor = framework.make_predictor(recipe, reopened.state, world, reopened.options)
    with contextlib.closing(predictor):
        count = predictor.open_examples(examples)
        plan = make_training_plan(recipe, reopened.options, count, recipe.lr, even_shares(world.size), Position())
        outputs = predict_own_part(reopened, predictor, plan, world).gather(count)
    write_output(request.output, outputs)
    return PredictionReport(reopened.position.step, count, {name: array.shape for name, array in outputs.items()})


def read_input(path: Path) -> InputFile:
    """Read a file of examples on every rank. Raises UserError on all ranks if one cannot, or their files differ."""
    examples = collectives.on_all_ranks("predict.input", lambda: InputFile(path))
    sizes = collectives.gather_json(examples.num_bytes, "predict.input.bytes")
    other = next((rank for rank, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise UserError(
            f"--input {path} has {sizes[0]} bytes on rank 0 and {sizes[other]} on rank {other}: all ranks need the "
            "same file"
        )
    return examples


def predict_own_part(reopened: ReopenedRun, predictor: Predictor, plan: TrainingPlan, world: World) -> OutputCollector:
    """Return the outputs of this rank's part of the examples; none if it has no part.

    Raises UserError, RunError, RecipeError: on all ranks alike.
    """
    recipe, position, seed = reopened.opened.recipe, reopened.position, reopened.options.data.seed
    now = Now(
        folder=recipe.now.folder,
        rank=world.rank,
        size=world.size,
        step=position.step,
        steps=position.step,
        epoch=position.epoch,
        epochs=recipe.epochs,
        samples=position.samples,
        training=False,
    )
    set_now(recipe, now)
    own = np.arange(*order.part_bounds(plan.examples, world.rank, world.size))
    chunks = (Chunk(ids, now, int(ids[0])) for ids in order.split_micro_batches(own, plan.eval_micro_batch))

    collector = OutputCollector(recipe)

    def predict_batches() -> None:
        for ids, batch in predictor.load_batches(chunks):
            activity.enter_activity("predicting")
            collector.add_batch(ids, predictor.predict_batch(batch, len(ids), (seed, -1, int(ids[0]))))

    collectives.on_all_ranks("predict", predict_batches)
    return collector


def write_output(path: Path, outputs: Outputs) -> None:
    """Write outputs on rank 0, whole or not at all. Raises RunError on all ranks if they cannot be written."""

    def write_on_root() -> None:
        try:
            write_atomically(path, encode_npz(outputs) if path.suffix == ".npz" else encode_lines(outputs))
        except OSError as error:
            raise RunError(write_error_text(path.name, path.parent, error)) from error

    collectives.on_root("predict.write", write_on_root)


def encode_npz(outputs: Outputs) -> bytes:
    """Return a .npz of outputs by their names."""
    buffer = io.BytesIO()
    np.savez(buffer, **outputs)  # type: ignore[arg-type]
    return buffer.getvalue()


def encode_lines(outputs: Outputs) -> bytes:
    """Return a line of JSON for each example: its id and its outputs; numbers that are not finite are null."""
    columns = {name: array.tolist() for name, array in outputs.items()}
    count = len(next(iter(columns.values())))
    rows = ({"id": i, **{name: column[i] for name, column in columns.items()}} for i in range(count))
    return "".join(f"{encode_json(row)}\n" for row in rows).encode()
