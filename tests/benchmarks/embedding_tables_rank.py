"""One rank of `tests.benchmarks.embedding_tables`: steps of a small DLRM, by hvdtrain and by torchrec in turns."""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvdtrain.comm.signed_store import open_store
from hvdtrain.comm.torch_ranks import connect_ranks
from hvdtrain.comm.world import World
from hvdtrain.torch import DistributedOptimizer, lookup
from hvdtrain.torch.dealt_tables import DealtTables
from hvdtrain.torch.score_session import ScoreSession
from hvdtrain.torch.table_group import RowTransport
from hvdtrain.torch.table_lookup import DealtForward

TABLES, WIDTH, LR = 26, 16, 0.1
CPU = torch.device("cpu")


class Dense(nn.Module):
    """(B, tables * width) rows -> (B,) logits"""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(TABLES * WIDTH, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows).squeeze(1)  # type: ignore[no-any-return]


def make_own_step(rows: int) -> Callable[[Tensor, Tensor], float]:
    """Return hvdtrain's step, of ids (B, tables) and targets (B,)."""
    torch.manual_seed(0)
    tables = nn.ModuleList(nn.Embedding(rows, WIDTH, sparse=True) for _ in range(TABLES))
    model = nn.ModuleDict({"tables": tables, "dense": Dense()})
    world = World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), "localhost")
    group = connect_ranks(open_store(), "tables", range(world.size), world, CPU)
    assert group is not None
    session, named = ScoreSession(), {f"tables.{i}": table for i, table in enumerate(tables)}
    dealt = DealtTables("Bench", named, session, RowTransport(group, CPU))  # type: ignore[arg-type]
    for number, table in enumerate(dealt.modules):
        vars(table)["forward"] = DealtForward(dealt, number, table)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=LR)
    own = set(dealt.parameters.values())
    optimizer = DistributedOptimizer(optimizer, list(model.named_parameters()), average=False, left_out=own)
    dealt.take_rows()

    def step(ids: Tensor, targets: Tensor) -> float:
        optimizer.zero_grad()
        dealt.start_step()
        session.start_pass(training=True)
        logits = model["dense"](torch.cat(lookup(list(tables), ids.unbind(1)), dim=1))
        loss = session.end_forward((logits - targets).square()).sum() / (len(ids) * world.size)
        loss.backward()  # type: ignore[no-untyped-call]
        dealt.set_gradients()
        dealt.sum_squares()
        optimizer.step()
        return float(loss)

    return step


def make_torchrec_step(rows: int) -> Callable[[Tensor, Tensor], float]:
    """Return torchrec's step: tables whole on a rank, its own choice which, updated in the backward pass."""
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    torch.manual_seed(0)
    names = [f"t{i}" for i in range(TABLES)]
    configs = [
        EmbeddingBagConfig(name=name, embedding_dim=WIDTH, num_embeddings=rows, feature_names=[name]) for name in names
    ]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = EmbeddingBagCollection(device=CPU, tables=configs)
            self.dense = Dense()

        def forward(self, ids: Any) -> Tensor:
            return self.dense(self.tables(ids).values())  # type: ignore[no-any-return]

    model = Model()
    apply_optimizer_in_backward(torch.optim.SGD, model.tables.parameters(), {"lr": LR})
    constraints = {name: ParameterConstraints(sharding_types=["table_wise"]) for name in names}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=hvd.size(), compute_device="cpu"), constraints=constraints
    )
    plan = planner.collective_plan(model, pg=dist.group.WORLD)
    dealt: Any = DistributedModelParallel(model, device=CPU, plan=plan)
    optimizer = torch.optim.SGD([p for n, p in dealt.named_parameters() if "dense" in n], lr=LR)

    def step(ids: Tensor, targets: Tensor) -> float:
        optimizer.zero_grad()
        lengths = torch.ones(ids.numel(), dtype=torch.int32)
        keyed = KeyedJaggedTensor.from_lengths_sync(keys=names, values=ids.t().reshape(-1), lengths=lengths)
        loss = (dealt(keyed) - targets).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss)

    return step


def draw_batch(rows: int, batch: int, made: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ids (B, tables), of which few are frequent, and targets."""
    ids = (torch.rand((batch, TABLES), generator=made) ** 3 * rows).long()
    return ids, torch.rand(batch, generator=made)


def main(rows: int, batch: int, rounds: int, steps: int) -> None:
    """Print milliseconds of each way in each round on rank 0, as JSON."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.sparse.check_sparse_tensor_invariants.disable()
    hvd.init()
    store = open_store()
    dist.init_process_group("gloo", store=store, rank=hvd.rank(), world_size=hvd.size())
    ways = {"hvdtrain": make_own_step(rows), "torchrec": make_torchrec_step(rows)}
    made = torch.Generator().manual_seed(hvd.rank())
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name in list(ways) if turn % 2 else list(reversed(ways)):
            times = []
            for _ in range(steps):
                ids, targets = draw_batch(rows, batch, made)
                hvd.barrier()
                began = time.perf_counter()
                ways[name](ids, targets)
                times.append(time.perf_counter() - began)
            if turn:  # the first one does not count
                found[name].append(1000 * statistics.median(times))
    if hvd.rank() == 0:
        print("RESULT " + json.dumps(found), flush=True)
    hvd.barrier()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
