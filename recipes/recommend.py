"""Will this user click? A DLRM whose embedding tables are dealt to the ranks, on generated clicks or Criteo's.

Data: clicks drawn from a known model, 13 numbers and 26 categories each, so that one can compare with the optimum: the
AUC of the true probabilities. Or files in the format of the Criteo Display Advertising Challenge, of which none comes
with hvdtrain: DIR/train.txt, and DIR/eval.txt or else each tenth line of train.txt, with tabs between the label, 13
numbers and 26 categories in hexadecimal, of which any may be empty:

    hvdtrain launch -np 2 recommend --data-dir DIR --rows 100000 --epochs 1
Method: bottom perceptron, tables, dot products of all pairs, top perceptron (Naumov et al., 2019, arXiv:1906.00091).
Full-size run: hvdtrain launch -np 2 recommend
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from hvdtrain.data import Lines
from hvdtrain.errors import UserError
from hvdtrain.torch import Recipe, lookup, option

NUMBERS, CATEGORIES = 13, 26  # of an example
HELD_OUT = 10  # one line in so many of train.txt, if there is no eval.txt


class DLRM(nn.Module):
    """(B, 13) numbers, (B, 26) ids -> (B,) logits of a click"""

    def __init__(self, rows: list[int], width: int, hidden: int) -> None:
        super().__init__()
        self.bottom = perceptron(NUMBERS, hidden, width)
        self.tables = nn.ModuleList(nn.Embedding(count, width, sparse=True) for count in rows)
        vectors = 1 + len(rows)
        self.top = perceptron(width + vectors * (vectors - 1) // 2, hidden, 1)
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, offset=-1), persistent=False)
        for table in self.tables:
            nn.init.uniform_(table.weight, -0.05, 0.05)

    def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
        dense = F.relu(self.bottom(numbers))
        vectors = torch.stack([dense, *lookup(self.tables, ids.unbind(1))], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([dense, products], dim=1)).squeeze(1)


def perceptron(*widths: int) -> nn.Sequential:
    """Return linear layers of these widths with ReLU between them."""
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@dataclass(kw_only=True)
class Recommend(Recipe):
    """Predict clicks by a DLRM whose tables are dealt to the ranks (generated clicks, or Criteo's by --data-dir)."""

    domain = "recommendation"
    best = ("auc", "max")

    data_dir: Path | None = option(None, "folder with train.txt, and perhaps eval.txt, in Criteo's format")
    rows: int = option(100, "of the largest table; with --data-dir of each, into which ids are hashed", at_least=4)
    width: int = option(16, "values of a row", at_least=1)
    hidden: int = option(64, "units of the hidden layers", at_least=1)
    examples: int = option(120_000, "generated clicks to learn from; a sixth as many are for evaluation", at_least=6)
    epochs: int = 2
    batch_size: int = 256
    lr: float = 0.02
    schedule: str = "constant"

    def model(self) -> nn.Module:
        torch.sparse.check_sparse_tensor_invariants.disable()  # or torch's own Adagrad warns of what it makes
        return DLRM([self.rows] * CATEGORIES if self.data_dir else generated_rows(self.rows), self.width, self.hidden)

    def tables(self, model: nn.Module) -> nn.ModuleList:
        return model.tables

    def dataset(self, split: str) -> Dataset:
        if self.data_dir is None:
            train, evaluation = generate_clicks(self.rows, self.examples, self.examples // 6)
            return train if split == "train" else evaluation
        own = self.data_dir / "eval.txt"
        try:
            clicks = Criteo(own if split == "eval" and own.is_file() else self.data_dir / "train.txt", self.rows)
        except UserError as error:
            raise UserError(f"--data-dir {self.data_dir}: expected Criteo's train.txt there ({error})") from error
        if own.is_file():
            return clicks
        return Subset(clicks, [i for i in range(len(clicks)) if (i % HELD_OUT == 0) == (split == "eval")])

    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(params, lr=self.lr)

    def score(self, model: nn.Module, batch: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        numbers, ids, clicked, optimum = batch
        logits = model(numbers, ids)
        loss = F.binary_cross_entropy_with_logits(logits, clicked, reduction="none")
        return {"loss": loss}, {"logit": logits, "clicked": clicked, "optimum": optimum}

    def outputs(self, model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
        return {"probability": model(batch[0], batch[1]).sigmoid()}

    def summarise(self, outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        found = {"auc": area_under_curve(outputs["logit"], outputs["clicked"])}
        if self.data_dir is None:
            found["auc_of_optimum"] = area_under_curve(outputs["optimum"], outputs["clicked"])
        return found


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the probability that a click has a higher score than another example; equal ones count half."""
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    clicks = int((labels > 0.5).sum())
    others = len(labels) - clicks
    if not clicks or not others:
        return float("nan")
    return float((ranks[labels > 0.5].sum() - clicks * (clicks + 1) / 2) / (clicks * others))


def generated_rows(largest: int) -> list[int]:
    """Return how many ids each category has: from 4 to the largest, as uneven as real ones are."""
    return [int(count) for count in np.geomspace(4, largest, CATEGORIES).round()]


def generate_clicks(largest: int, *sizes: int) -> list[TensorDataset]:
    """Return datasets of clicks, all drawn from the same model: each id and some pairs of ids move the log odds.

    An example is (13,) numbers, (26,) ids, whether it was clicked, and the log odds that it was drawn with.
    """
    made, rows, datasets = np.random.default_rng(0), generated_rows(largest), []
    effects = [made.normal(0, 0.35, count) for count in rows]
    features = [made.normal(0, 1, (count, 2)) for count in rows]
    slopes = made.normal(0, 0.2, NUMBERS)
    for size in sizes:
        numbers = made.normal(0, 1, (size, NUMBERS))
        # Few ids are frequent, as in Zipf's law.
        ids = np.stack([(count * made.random(size) ** 3).astype(np.int64) for count in rows], axis=1)
        odds = numbers @ slopes - 1.0
        for category, effect in enumerate(effects):
            odds += effect[ids[:, category]]
        for a, b in pairwise(range(0, CATEGORIES, 4)):
            odds += 0.15 * (features[a][ids[:, a]] * features[b][ids[:, b]]).sum(1)
        clicked = made.random(size) < 1 / (1 + np.exp(-odds))
        arrays = (numbers.astype(np.float32), ids, clicked.astype(np.float32), odds.astype(np.float32))
        datasets.append(TensorDataset(*map(torch.from_numpy, arrays)))
    return datasets


class Criteo(Dataset):
    """Examples of a file in Criteo's format, parsed when they are loaded; nobody knows their log odds."""

    def __init__(self, path: Path, rows: int) -> None:
        self.lines, self.rows = Lines(path), rows

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fields = self.lines[i].split("\t")
        if len(fields) != 1 + NUMBERS + CATEGORIES:
            raise UserError(f"{self.lines.path}, line {i + 1}: {len(fields)} fields, expected 40, with tabs between")
        numbers = torch.tensor([max(0.0, float(text or 0)) for text in fields[1 : 1 + NUMBERS]]).log1p()
        # Row 0 is for what is missing.
        ids = torch.tensor([1 + int(text, 16) % (self.rows - 1) if text else 0 for text in fields[1 + NUMBERS :]])
        return numbers, ids, torch.tensor(float(fields[0])), torch.tensor(0.0)
