"""Batches of example ids, with randomness that depends on the example and not on the rank that loads it."""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from hvdtrain.step import Ids


def seed_all(entropy: Sequence[int]) -> None:
    """Seed torch (the CPU and all GPUs), numpy and Python from some integers.

    Randomness is a function of (seed, step, place in the global batch) or (seed, epoch, example), never of what was
    drawn before: so no generator's state has to be saved, and a resumed run draws what the other would have drawn.
    """
    seed = _seed_host(entropy)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def _seed_host(entropy: Sequence[int]) -> int:
    """Seed the CPU's generators, in 7 microseconds: for each example, torch.manual_seed's 100 would be too many."""
    digest = hashlib.blake2b(repr(tuple(entropy)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    return seed


class SeededExamples(Dataset[Any]):
    """A dataset whose examples come with their ids, drawn with generators seeded by (entropy, id)."""

    def __init__(self, dataset: Any, entropy: Sequence[int]) -> None:
        self.dataset, self.entropy = dataset, entropy

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        _seed_host([*self.entropy, i])
        return i, self.dataset[i]


def with_ids(examples: Sequence[tuple[int, Any]]) -> tuple[Ids, Any]:
    """The ids that were really loaded, and their batch."""
    return np.array([i for i, _ in examples], dtype=np.int64), default_collate([example for _, example in examples])


def wait_until_others_sleep(seconds: float = 2.0) -> None:
    """Return when all other threads of this process sleep, or after so long; before it is forked.

    Horovod's thread, as it lets go of a tensor, takes a lock of Python's that a process forked in that moment waits for
    for ever. It sleeps when all that was handed to it is done.
    """
    own, tasks, until = threading.get_native_id(), Path("/proc/self/task"), time.monotonic() + seconds
    while time.monotonic() < until and tasks.exists():
        others = [task / "stat" for task in tasks.iterdir() if int(task.name) != own]
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one has ended: look again
            if not any(stat.read_text().rpartition(")")[2].split()[0] == "R" for stat in others):
                return
        time.sleep(0.001)


def batches(dataset: Any, chunks: Sequence[Ids], entropy: Sequence[int], workers: int) -> Iterator[tuple[Ids, Any]]:
    """The ids and the collated batches of these chunks, in order, loaded by `workers` processes or in this one."""
    if workers:
        wait_until_others_sleep()
    loader = DataLoader(
        SeededExamples(dataset, entropy),
        batch_sampler=[chunk.tolist() for chunk in chunks],
        collate_fn=with_ids,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # the loader draws from it; the global generator stays ours
    )
    return iter(loader)


def to_device(batch: Any, device: torch.device, memory_format: torch.memory_format) -> Any:
    """Move every tensor of a nested batch to the device; 4-D floating ones (images) into the memory format too."""
    if isinstance(batch, torch.Tensor):
        batch = batch.to(device, non_blocking=True)
        if batch.dim() == 4 and batch.is_floating_point():
            batch = batch.contiguous(memory_format=memory_format)
        return batch
    if isinstance(batch, dict):
        return {key: to_device(value, device, memory_format) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [to_device(value, device, memory_format) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
