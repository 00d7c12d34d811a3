"""Train a run of a parameter server again, in this process, by its ledger: to the same bits.

The ledger has of each version which gradients it was made of, and with which weights they were computed:

    weights after step 38 ---- gradient of positions 128 to 171 --+
    weights after step 40 ---- gradient of positions 171 to 214 --+--> version 41: the optimizer's step

So the order in which gradients have arrived, which nobody can know beforehand, is known afterwards, and all else is
computed as it was: items, randomness and threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hvdtrain.comm.world import init
from hvdtrain.ledger.made import MadeVersion, RecordedService
from hvdtrain.ledger.reader import Segment, find_segments, read_segment, select_effective_rows
from hvdtrain.ledger.rows import LedgerRow
from hvdtrain.recipe.framework import StepVotes, find_framework
from hvdtrain.recipe.now import Now, set_now
from hvdtrain.server.items import Bytes, Item, ItemContext
from hvdtrain.server.served_step import ServedStep, check_served_step
from hvdtrain.server.worker import ItemComputer
from hvdtrain.system.errors import UserError
from hvdtrain.system.text import format_count
from hvdtrain.training import checkpoint
from hvdtrain.training.loading import OpenedRun, find_checkpoint, import_run_class, open_run, read_run_files


@dataclass(frozen=True)
class Replay:
    """What has come of a replay."""

    versions: int  # that were made again
    differing: list[str]  # tensors of the model that differ from those of the checkpoint after the last of them

    def format_line(self) -> str:
        """Return it in a line."""
        what = f"replayed: {format_count(self.versions, 'version')} in one process"
        if not self.differing:
            return f"{what}, to the same bits as the checkpoint of step {self.versions}"
        more = f" and {len(self.differing) - 1} more" if len(self.differing) > 1 else ""
        return f"{what}, but {self.differing[0]}{more} differ from the checkpoint of step {self.versions}"


@dataclass(frozen=True)
class RecordedVersion:
    """A version as the ledger has it."""

    row: LedgerRow
    made: MadeVersion
    segment: Segment
    service: RecordedService


def read_versions(run_dir: Path, last_step: int) -> list[RecordedVersion]:
    """Return the versions up to a step. Raises UserError for steps that no server has made."""
    segments = [read_segment(path) for path in find_segments(run_dir / "ledger").values()]
    found = []
    for row, segment in select_effective_rows(segments):
        if row.step > last_step:
            break
        if row.step not in segment.made or segment.service is None:
            raise UserError(
                f"{run_dir}: step {row.step} was not made by a parameter server: only such runs are replayed"
            )
        found.append(RecordedVersion(row, segment.made[row.step], segment, segment.service))
    return found


def replay_run(run_dir: Path) -> Replay:
    """Make the versions up to the newest checkpoint again, and compare; this executes the source that the run kept.

    Raises:
        UserError: there is no such run or checkpoint, or it cannot be replayed.
    """
    files = read_run_files(run_dir)
    run = open_run(files, import_run_class(files))
    found = checkpoint.read_checkpoint(find_checkpoint(run, "last"), run.name)
    versions = read_versions(run_dir, found.position.step)
    if not versions:
        raise UserError(f"{run_dir}: the checkpoint of step {found.position.step} has no version to replay")
    if run.options.checkpoints.init_from is not None:
        raise UserError(f"{run_dir} began with --init-from: its first weights are not in the run folder to replay it")
    world = init()
    set_now(run.recipe, Now.before_training(run_dir.absolute(), rank=0, size=1))
    device = replace(run.options.device, threads=versions[0].service.threads)
    step = find_framework(type(run.recipe)).make_step(run.recipe, world, replace(run.options, device=device))
    try:
        replayer = Replayer(run, check_served_step(step, type(run.recipe).__name__), versions)
        for version in versions:
            replayer.make_again(version)
        made = step.checksum_state()
        step.load_state(found.state)
        saved = step.checksum_state()
    finally:
        step.close()
    return Replay(len(versions), [name for name, checksum in saved.items() if made.get(name) != checksum])


class Replayer:
    """Makes versions one after the other.

    Attributes:
        run: that is replayed.
        step: computes gradients as the workers did, and updates as the server did.
    """

    def __init__(self, run: OpenedRun, step: ServedStep, versions: list[RecordedVersion]) -> None:
        self.run, self.step = run, step
        # By the step after which weights were read, the last version that is made of gradients computed with them.
        self._last_use = {item.read: version.row.step for version in versions for item in version.made.items}
        self._weights: dict[int, Bytes] = {}  # by the step after which they were so, while they are used
        self._keep_weights(0)

    def _keep_weights(self, step: int) -> None:
        self._weights = {read: kept for read, kept in self._weights.items() if self._last_use.get(read, 0) > step}
        self._weights[step] = self.step.make_array()
        self.step.read_weights(self._weights[step])

    def make_again(self, version: RecordedVersion) -> None:
        """Make a version, as all before it were made."""
        row, step = version.row, self.step
        items = [Item(item.begin, item.end) for item in version.made.items]
        examples = sum(item.end - item.begin for item in items)
        gradients, sums, finite = [], [], True
        for item, applied in zip(items, version.made.items, strict=True):
            step.write_weights(self._weights[applied.read])
            result = self._make_computer(version, item).compute_gradient(row.epoch - 1, item)
            gradients.append(step.make_array())
            step.read_gradients(gradients[-1])
            step.skip_update()
            sums.append(np.array(result.sums))
            finite = finite and result.is_finite
        step.write_weights(self._weights[row.step - 1])
        step.start_step([], 1.0, False)
        compensation = version.service.policy.compensation
        for applied, gradient in zip(version.made.items, gradients, strict=True):
            if compensation is not None and applied.read < row.step - 1:
                step.compensate_delay(gradient, self._weights[applied.read], compensation)
        for item, gradient, score_sums in zip(items, gradients, sums, strict=True):
            step.add_gradients(gradient, (item.end - item.begin) / examples)
            step.add_scores(score_sums, finite)
        step.cast_votes(StepVotes(examples=row.fed))
        if step.all_reduce().must_skip:
            step.skip_update()
        else:
            step.apply_update(version.made.factor, (self.run.options.data.seed, row.step - 1, -1))
        self._keep_weights(row.step)

    def _make_computer(self, version: RecordedVersion, item: Item) -> ItemComputer:
        options, recipe, segment = self.run.options, self.run.recipe, version.segment
        steps_per_epoch = -(-segment.examples // segment.batch)
        context = ItemContext(
            examples=segment.examples,
            seed=segment.seed,
            batch=segment.batch,
            parts=1,
            micro_batch=options.data.micro_batch or item.end - item.begin,
            total_steps=version.service.steps,
            epochs=-(-options.data.steps // steps_per_epoch) if options.data.steps else recipe.epochs,
        )
        return ItemComputer(recipe, self.step, context, recipe.now.folder)
