"""The run options of pipelines: a model in stages, each on another rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvdtrain.recipe.options import option
from hvdtrain.system.errors import UserError

MICRO_BATCHES_PER_STAGE = 2  # unless --micro-batch is given
STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zerobubble": 2}


@dataclass(kw_only=True)
class PipelineOptions:
    """Pipeline parallelism: GPipe (Huang et al., 1811.06965) and what followed it."""

    stages: int = option(
        1, "ranks that hold a model together, each some of its layers; they train one part of the batch", at_least=1
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zerobubble"] | None = option(
        None,
        "with --stages: in which order a step's micro-batches pass the stages; with interleaved and zerobubble each "
        "rank has two; default: 1f1b",
        name="pipeline_schedule",
    )

    @property
    def kind(self) -> str:
        """The schedule."""
        return self.schedule or "1f1b"

    @property
    def stages_per_rank(self) -> int:
        """How many stages each rank has."""
        return STAGES_PER_RANK[self.kind]

    def count_micro_batches(self, examples: int, micro_batch: int) -> int:
        """Return how many micro-batches a step has, of at most `micro_batch` of its `examples` a replica."""
        count = -(-examples // micro_batch)
        # These schedules take them in rounds of one for each rank.
        return count if self.stages_per_rank == 1 else -(-count // self.stages) * self.stages

    @property
    def flag(self) -> str:
        """The option, for messages."""
        return f"--stages {self.stages}"

    def name_places(self) -> list[str]:
        """Return of each rank of a replica which stages it has; nothing without stages."""
        if self.stages == 1:
            return []
        kept = [[place + turn * self.stages for turn in range(self.stages_per_rank)] for place in range(self.stages)]
        return [f"stage{'s' * (len(own) > 1)} {' and '.join(map(str, own))}" for own in kept]

    def choose_micro_batch(self, asked: int | None, most: int) -> int:
        """Return the examples of a micro-batch.

        Args:
            asked: by --micro-batch.
            most: examples of a step that a replica has.

        Raises:
            UserError: a step would have fewer micro-batches than stages.
        """
        size = min(asked or -(-most // (MICRO_BATCHES_PER_STAGE * self.stages)), most)
        if -(-most // size) >= self.stages:
            return size
        needed = f"--micro-batch {most // self.stages} at most" if most >= self.stages else "a larger --batch-size"
        raise UserError(
            f"{self.flag} needs {self.stages} micro-batches a step at least, and {most} examples a replica in "
            f"micro-batches of {size} are {-(-most // size)}: give {needed}"
        )
