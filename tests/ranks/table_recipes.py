"""Recipes with embedding tables that are dealt to the ranks."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch import Recipe, lookup, option

RECOMMEND: Any = load_recipe("recommend")
TYPES = {"float32": torch.float32, "float64": torch.float64}
ROWS = (50, 7, 23, 1, 11)  # of the tables: the first is larger than half of all
EXAMPLES, BATCH = 90, 28  # four steps an epoch, the last of 6 examples


class Tables(nn.Module):
    """Tables of two widths, one with padding, a bag of each kind, and what is dense."""

    def __init__(self, dtype: torch.dtype, sparse: bool, together: bool) -> None:
        super().__init__()
        made: Any = {"sparse": sparse, "dtype": dtype}
        self.users = nn.Embedding(ROWS[0], 4, **made)
        self.items = nn.Embedding(ROWS[1], 4, padding_idx=2, **made)
        self.words = nn.EmbeddingBag(ROWS[2], 4, mode="mean", padding_idx=0, **made)
        self.one = nn.Embedding(ROWS[3], 3, **made)
        self.tags = nn.EmbeddingBag(ROWS[4], 4, mode="sum", **made)
        self.head = nn.Sequential(nn.Linear(19, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 1, dtype=dtype))
        self.together = together

    def forward(self, ids: Tensor, words: Tensor) -> Tensor:
        """ids: (B, 3). words: (B, 5)."""
        offsets = torch.arange(0, words.numel(), words.shape[1], device=words.device)
        weights = torch.linspace(0.5, 1.5, words.shape[1], dtype=self.head[0].weight.dtype).repeat(len(words))
        tables = [self.users, self.items, self.words, self.one, self.tags, self.users]
        inputs: list[Any] = [ids[:, 0], ids[:, 1].int(), words, ids[:, 2]]
        inputs += [(words.reshape(-1) % ROWS[4], offsets, weights), (ids[:, :1] + 1) % ROWS[0]]
        calls = zip(tables, [x if isinstance(x, tuple) else (x,) for x in inputs], strict=True)
        rows = lookup(tables, inputs) if self.together else [table(*x) for table, x in calls]
        users = rows[0] + rows.pop().squeeze(1)
        return self.head(torch.cat([users, *rows[1:]], 1)).squeeze(1)  # type: ignore[no-any-return]


class Clicks(Dataset[Any]):
    """Examples whose target depends on each id."""

    def __init__(self, dtype: torch.dtype) -> None:
        made = torch.Generator().manual_seed(1)
        self.ids = torch.stack([torch.randint(rows, (EXAMPLES,), generator=made) for rows in (ROWS[0], ROWS[1], 1)], 1)
        self.words = torch.randint(ROWS[2], (EXAMPLES, 5), generator=made)
        self.targets = (self.ids.sum(1) % 5 + self.words.double().mean(1) / 10).to(dtype)

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, i: int) -> Any:
        return self.ids[i], self.words[i], self.targets[i]


@dataclass(kw_only=True)
class Dealt(Recipe):
    """A small recommender."""

    kind: str = option("sgd", "the optimizer")
    dtype: str = option("float64", "of the parameters")
    sparse: bool = option(False, "sparse gradients of the tables")
    together: bool = option(False, "look up in all tables at once")
    epochs: int = 3
    batch_size: int = BATCH
    lr: float = 0.05
    schedule: str = "constant"

    def model(self) -> nn.Module:
        torch.sparse.check_sparse_tensor_invariants.disable()  # of what torch's own Adagrad makes
        return Tables(TYPES[self.dtype], self.sparse, self.together)

    def tables(self, model: Any) -> Any:
        self.made = model
        return [model.words, model.users, model.items, model.one, model.tags]

    def dataset(self, split: str) -> Any:
        return Clicks(TYPES[self.dtype]) if split in ("train", "eval") else None

    def optimizer(self, params: list[nn.Parameter]) -> Any:
        kinds: dict[str, Any] = {
            "sgd": lambda: torch.optim.SGD(params, lr=self.lr),
            "momentum": lambda: torch.optim.SGD(params, lr=self.lr, momentum=0.9, weight_decay=0.01),
            "adamw": lambda: torch.optim.AdamW(params, lr=self.lr, weight_decay=0.1),
            "adagrad": lambda: torch.optim.Adagrad(params, lr=self.lr),
            "adafactor": lambda: torch.optim.Adafactor(params, lr=self.lr),
        }
        return kinds[self.kind]()

    def score(self, model: Any, batch: Any) -> dict[str, Tensor]:
        ids, words, targets = batch
        self.report_rows()
        return {"loss": (model(ids, words) - targets).square()}

    def report_rows(self) -> None:
        """Write how many rows of each table this rank has."""
        if folder := os.environ.get("HVDTRAIN_TEST_OUT"):
            rows = {name: p.shape[0] for name, p in self.made.named_parameters() if not name.startswith("head")}
            (Path(folder) / f"rows{self.now.rank}.json").write_text(json.dumps(rows))


@dataclass(kw_only=True)
class Wrong(Dealt):
    """What cannot be dealt, by `wrong`."""

    wrong: str = option("", "what it does")

    def model(self) -> nn.Module:
        model: Any = super().model()
        if self.wrong == "norm":
            model.users.max_norm = 1.0
        if self.wrong == "tied":
            model.also = nn.Embedding(ROWS[0], 4)
            model.also.weight = model.users.weight
        return model  # type: ignore[no-any-return]

    def tables(self, model: Any) -> Any:
        return [model.head[0]] if self.wrong == "linear" else [model.users]

    def optimizer(self, params: list[nn.Parameter]) -> Any:
        made = torch.optim.SGD(params, lr=self.lr)
        return {"loss": made} if self.wrong == "several" else made

    def score(self, model: Any, batch: Any) -> dict[str, Tensor]:
        ids, words, targets = batch
        loss = (model(ids, words) - targets).square()
        if self.wrong == "decay":
            loss = loss + model.users.weight.square().sum()
        if self.wrong == "copy":
            loss = loss + copy.deepcopy(model).users(ids[:, 0]).sum(1).detach()
        return {"loss": loss}


@dataclass(kw_only=True)
class Precise(RECOMMEND):  # type: ignore[misc]
    """The recipe `recommend` in float64."""

    def model(self) -> nn.Module:
        return super().model().double()  # type: ignore[no-any-return]

    def score(self, model: nn.Module, batch: Any) -> Any:
        numbers, *others = batch
        return super().score(model, [numbers.double(), *others])
