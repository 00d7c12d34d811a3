"""The run options of the gradients' exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvdtrain.recipe.options import option


@dataclass(kw_only=True)
class ExchangeOptions:
    """How the gradients of all ranks are added up. Compression has options of its own (`CompressionOptions`)."""

    kind: Literal["bucketed", "horovod"] = option(
        "bucketed", "flat buckets, or Horovod's own, for comparison", name="exchange"
    )
    bucket_mib: float | None = option(
        None,
        "MiB of gradients that are sent together; default: 8, between GPUs 25, with --hierarchy 2; the first one has 1 "
        "at most",
        above=0,
    )
    shard: Literal["none", "optimizer", "model"] = option(
        "none",
        "optimizer: each rank holds 1 / ranks of the optimizer's state, and updates that part of the parameters; "
        "model: the ranks of a host (--shard-ranks) hold parameters, gradients and state once together",
    )
    mirror: Literal["0", "1"] | None = option(
        None,
        "with --shard optimizer, 1: another rank, on another host if there is one, has a part as well, so that a lost "
        "rank costs no step; default: 1 in elastic runs, else 0",
    )
    hierarchy: Literal["none", "host"] = option(
        "none",
        "with --compression bf16, fp16, int8, onebit or qsgd, host: a host adds up its ranks' gradients, encodes the "
        "sum and sends it once; if there are as many ranks on each host",
    )
    tables: Literal["dealt", "whole"] = option(
        "dealt",
        "rows of the recipe's embedding `tables`: dealt to the ranks, in elastic runs each to two of them, or all of "
        "them on each rank; the maths stays the same",
    )
    checkpoint_residuals: Literal["sum", "exact"] = option(
        "sum", "save compression's residuals summed, for any number of ranks, or also each rank's own"
    )
    deterministic: bool = option(False, "the same bits on any number of ranks, and when that changes during the run")
    virtual_shards: int = option(
        12,
        "with --deterministic: parts of the global batch whose gradients are computed alone; part of the maths",
        at_least=1,
    )

    def __post_init__(self) -> None:
        if self.deterministic and self.kind != "bucketed":
            raise ValueError(f"--deterministic with --exchange {self.kind}: its sums depend on the ranks")
        if self.shards_optimizer and self.kind != "bucketed":
            raise ValueError(
                f"--shard optimizer with --exchange {self.kind}: it brings whole gradients to every rank; leave "
                "--exchange out"
            )
        if self.sums_on_hosts and self.kind != "bucketed":
            raise ValueError(f"--hierarchy host with --exchange {self.kind}, which has its own; leave --exchange out")
        if self.sums_on_hosts and self.deterministic:
            raise ValueError("--hierarchy host with --deterministic: its sums depend on which ranks share a host")
        if self.sums_on_hosts and self.shards_optimizer:
            raise ValueError(
                "--hierarchy host with --shard optimizer, which sends each part to the rank that owns it; leave one out"
            )
        if self.is_mirrored and not self.shards_optimizer:
            raise ValueError("--mirror 1 without --shard optimizer: each rank has all of the optimizer's state anyway")

    @property
    def sums_on_hosts(self) -> bool:
        """Whether the ranks of a host add up their gradients before they are encoded."""
        return self.hierarchy == "host"

    @property
    def shards_optimizer(self) -> bool:
        """Whether each rank holds a part of the optimizer's state only."""
        return self.shard == "optimizer"

    @property
    def is_mirrored(self) -> bool:
        """Whether each part of the optimizer's state is on two ranks."""
        return self.mirror == "1"

    @property
    def bucket_bytes(self) -> int | None:
        """Bytes of gradients that are sent together; None: as suits the device."""
        return None if self.bucket_mib is None else int(self.bucket_mib * 2**20)

    @property
    def saves_rank_residuals(self) -> bool:
        """Whether checkpoints hold each rank's own residuals next to their sum."""
        return self.checkpoint_residuals == "exact"

    @property
    def num_shards(self) -> int | None:
        """Virtual shards of the global batch whose gradients are computed alone; None unless deterministic."""
        return self.virtual_shards if self.deterministic else None
