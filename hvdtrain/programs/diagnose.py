"""`hvdtrain.diagnose`: who is slow and why, and whether the replicas are the same, in any torch training loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hvdtrain.comm.mailbox import open_mailbox
from hvdtrain.exchange.checksums import checksum_tensor
from hvdtrain.programs.hooks import LoopHooks
from hvdtrain.programs.reporter import PendingChecksums, Reporter
from hvdtrain.programs.step_clock import StepClock, StepMarks
from hvdtrain.system.errors import UserError
from hvdtrain.torch.gpu import find_gpu_uuid

FIRST_CHECKSUM_STEP = 10


def diagnose(
    model: nn.Module,
    optimizer: Any = None,
    *,
    path: str | Path = "diagnose.json",
    checksum_every: int = 100,
) -> ProgramDiagnosis:
    """Return a context manager that diagnoses the training within it; all ranks enter it.

        with hvdtrain.diagnose(model, optimizer):
            for batch in loader:
                ...

    Rank 0 prints a table when another rank becomes the straggler, and at the end, and writes diagnose.json. No rank
    waits for another one but at the end: rank 0 some seconds, for what the others report last.

    Args:
        model: the model, or what wraps it (DistributedDataParallel, fully_shard, Lightning, torch.compile).
        optimizer: the optimizer or a sequence of them; Horovod's, Accelerate's and Lightning's as they are. Without it,
            every optimizer of the model's parameters counts: for loops that make their own.
        path: of diagnose.json.
        checksum_every: steps from one comparison of the replicas' parameters to the next; 0: none.

    Raises:
        UserError: `model` or `optimizer` is something else. At the first step: several processes were started, and
            neither torch.distributed nor Horovod is initialized.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"diagnose expects a torch.nn.Module as its model, got {type(model).__name__}")
    if isinstance(checksum_every, bool) or not isinstance(checksum_every, int) or checksum_every < 0:
        raise UserError(f"diagnose expects a number of steps as checksum_every, 0 for never, got {checksum_every!r}")
    return ProgramDiagnosis(model, unwrap_optimizers(optimizer), Path(path), checksum_every)


def unwrap_optimizers(optimizer: Any) -> list[Optimizer]:
    """Return the torch optimizers in what a program calls its optimizer.

    Raises:
        UserError: there is none.
    """
    if optimizer is None:
        return []
    found = []
    for one in optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]:
        inner = getattr(one, "optimizer", one)  # of Accelerate, Lightning and others that wrap one
        if not isinstance(inner, Optimizer):
            raise UserError(f"diagnose expects a torch.optim.Optimizer, or a list of them, got {type(one).__name__}")
        found.append(inner)
    return found


class ProgramDiagnosis:
    """Diagnoses the training loop that runs within it."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], path: Path, checksum_every: int) -> None:
        """Change nothing yet."""
        self._model, self._path, self._checksum_every = model, path, checksum_every
        self._hooks = LoopHooks(model, optimizers, self._record_step)
        self._reporter: Reporter | None = None  # from the end of the first step: then the program has found its ranks
        self._steps = 0
        self._names_sent = False

    def __enter__(self) -> ProgramDiagnosis:
        self._hooks.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.remove()
        if self._reporter is not None:
            self._reporter.end(failed=kind is not None)

    def time_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the same batches, of anything but torch's DataLoader, which is seen without; the wait is data time."""
        return self._hooks.time_batches(iter(batches))

    def _record_step(self, marks: StepMarks, clock: StepClock) -> None:
        """Take a step that has ended. The first one is left out: kernels are chosen and memory is taken in it."""
        if self._reporter is None:
            gpu_uuid = find_gpu_uuid(next((one.device for one in self._model.parameters()), torch.device("cpu")))
            self._reporter = Reporter(open_mailbox(), self._path, self._hooks.stolen_time, gpu_uuid)
            return
        self._reporter.add_step(marks, clock)
        self._steps += 1
        if self._reporter.mailbox.size > 1 and self._is_checksum_due():
            self._add_checksums(self._reporter)

    def _is_checksum_due(self) -> bool:
        every = self._checksum_every
        return every > 0 and (self._steps % every == 0 or FIRST_CHECKSUM_STEP == self._steps < every)

    @torch.no_grad()
    def _add_checksums(self, reporter: Reporter) -> None:
        """Report the parameters' checksums, unless each rank has a shard of its own."""
        named = list(self._model.named_parameters())
        if not named or any(is_shard(parameter) for _, parameter in named):
            return
        values = torch.stack([checksum_tensor(parameter).to(named[0][1].device) for _, parameter in named])
        names = [] if self._names_sent else [name for name, _ in named]
        self._names_sent = True
        reporter.add_checksums(PendingChecksums(self._steps, names, values))


def is_shard(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a part of one that is divided over ranks (DTensor, FSDP's flat parameters)."""
    return hasattr(parameter, "device_mesh") or type(parameter).__name__ == "FlatParameter"
