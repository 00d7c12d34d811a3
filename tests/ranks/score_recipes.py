"""Recipes for tests: scores that are pairs, vectors, and metrics that are functions of sums."""

import collections
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from hvdtrain.torch import Recipe, option

VOCABULARY, CLASSES, BINS = 7, 3, 20


def make_sequences(count, seed):
    """Sequences of 1 to 12 tokens: of one token there is nothing to predict."""
    drawn = np.random.default_rng(seed)
    return [torch.from_numpy(drawn.integers(0, VOCABULARY, length)) for length in drawn.integers(1, 13, count)]


class Bigrams(nn.Module):
    """Logits of the next token, by a small hidden layer, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Embedding(VOCABULARY, 5, dtype=torch.float64)
        self.out = nn.Linear(5, VOCABULARY, dtype=torch.float64)

    def forward(self, tokens):
        return self.out(torch.tanh(self.hidden(tokens)))


@dataclass(kw_only=True)
class Tokens(Recipe):
    """The mean over the tokens of ragged sequences."""

    weighted: bool = option(False, "weigh tokens by fractions")
    empty_from: int = option(10**9, "examples from here on have no token")
    epochs: int = 1
    batch_size: int = 8
    lr: float = 0.5

    def model(self):
        return Bigrams()

    def dataset(self, split):
        sequences = make_sequences(61, 0) if split == "train" else make_sequences(21, 1)
        return [one if i < self.empty_from else one[:1] for i, one in enumerate(sequences)]

    def collate(self, examples):
        return pad_sequence(examples, batch_first=True), torch.tensor([len(one) for one in examples])

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9)

    def score(self, model, batch):
        tokens, lengths = batch
        losses, right, weights = token_scores(model, tokens, lengths, self.weighted)
        # A graph of its own, which must not be differentiated: denominators carry no gradient.
        numbers = weights.sum(1) + 0 * model.out.bias.sum()
        return {"loss": (losses.sum(1), numbers), "accuracy": (right.sum(1), weights.sum(1))}

    def metrics(self, means):
        return {"perplexity": math.exp(means["loss"]), "bits": means["loss"] / np.log(2)}


def token_scores(model, tokens, lengths, weighted=False):
    """(B, L - 1) each: weighted losses, weighted hits, weights."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    weights = (torch.arange(1, tokens.shape[1]) < lengths[:, None]).double()
    if weighted:
        weights = weights / (3.0 + targets)
    logits = model(inputs)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * weights
    return losses, (logits.argmax(2) == targets) * weights, weights


@dataclass(kw_only=True)
class Spoiled(Tokens):
    """Scores that are not as they should be, by HVDTRAIN_TEST_SPOIL."""

    def score(self, model, batch):
        scores = super().score(model, batch)
        nll, numbers = scores["loss"]
        count = len(nll)
        spoiled = {
            "three": {"loss": (nll, numbers, numbers)},
            "shape": {"loss": (nll, numbers.sum())},
            "vector": {"loss": nll[:, None]},
            "vector loss": {"loss": (nll[:, None].expand(count, 2), numbers)},
            "wide denominators": {"hits": (nll, numbers[:, None].expand(count, 2))},
            "complex": {"hits": nll + 1j},
            "number": {"loss": (nll, 3.0)},
            "negative": {"loss": (nll, numbers - 2)},
            "negative later": {"loss": (nll, numbers - 2 * (count > 2))},
            "pair later": {"accuracy": scores["accuracy"] if count <= 2 else nll},
            "width": {"hits": nll.detach()[:, None].expand(count, 2 + (count > 2))},
            "reserved": {"lr": nll},
        }
        return {**scores, **spoiled[os.environ["HVDTRAIN_TEST_SPOIL"]]}


@dataclass(kw_only=True)
class Wrong(Tokens):
    """Metrics that are not as they should be, by HVDTRAIN_TEST_SPOIL."""

    def metrics(self, means):
        what = os.environ["HVDTRAIN_TEST_SPOIL"]
        if what == "raises":
            raise ValueError("no such thing")
        return {"none": None, "list": [1], "text": {"f1": "high"}, "matrix": {"f1": np.eye(2)}, "taken": {"epoch": 1}}[
            what
        ]


@dataclass(kw_only=True)
class Judged(Recipe):
    """A linear classifier of three classes, judged by counts: F1, area under the curve by bins, confusion matrix."""

    best = ("f1", "max")
    epochs: int = 2
    batch_size: int = 16
    lr: float = 0.5

    def model(self):
        torch.manual_seed(0)
        return nn.Linear(4, CLASSES, dtype=torch.float64)

    def dataset(self, split):
        drawn = torch.Generator().manual_seed(0 if split == "train" else 1)
        inputs = torch.randn(100 if split == "train" else 53, 4, generator=drawn, dtype=torch.float64)
        sides = inputs @ torch.tensor([1.0, -1, 0.5, 0]).double()
        return list(zip(inputs, (sides > -0.5).long() + (sides > 0.7), strict=True))

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model, batch):
        inputs, targets = batch
        logits = model(inputs)
        predicted, rows = logits.argmax(1), torch.arange(len(targets))
        cells = torch.zeros(len(targets), CLASSES * CLASSES, dtype=torch.float64)
        cells[rows, targets * CLASSES + predicted] = 1
        histogram = torch.zeros(len(targets), 2 * BINS)
        histogram[rows, bin_numbers(logits) + BINS * (targets == 2)] = 1
        loss = nn.functional.cross_entropy(logits, targets, reduction="none")
        hits = ((predicted == targets)[:, None] & (targets[:, None] == torch.arange(CLASSES))).double()
        per_class = nn.functional.one_hot(targets, CLASSES)
        return {"loss": loss, "cells": cells, "histogram": histogram, "recall": (hits, per_class)}

    def metrics(self, means):
        cells = means["cells"].reshape(CLASSES, CLASSES)
        right = np.diag(cells)
        negatives, positives = means["histogram"].reshape(2, BINS)
        below = np.cumsum(negatives) - negatives
        return {
            "f1": (2 * right / (cells.sum(0) + cells.sum(1))).mean(),
            "auc": (positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()),
            "undefined": np.float64(0) / means["cells"][:0].sum(),
            "recall": means["recall"] + 0,
        }


def bin_numbers(logits):
    """(B,): the bin of each example's probability of the last class."""
    return (logits.softmax(1)[:, 2] * BINS).long().clamp(max=BINS - 1)


@dataclass(kw_only=True)
class Translated(Tokens):
    """BLEU from n-gram counts."""

    best = ("bleu", "max")

    def score(self, model, batch):
        scores = super().score(model, batch)
        counts = torch.tensor([count_ngrams(*pair) for pair in hypotheses(model, *batch)], dtype=torch.float64)
        return {**scores, "ngrams": (counts[:, :4], counts[:, 4:8]), "lengths": (counts[:, 8], counts[:, 9])}

    def metrics(self, means):
        precisions, ratio = means["ngrams"], means["lengths"]
        brevity = math.exp(min(0.0, 1 - 1 / ratio)) if ratio > 0 else 0.0
        return {"bleu": 100 * brevity * np.exp(np.log(precisions).mean())}


def hypotheses(model, tokens, lengths):
    """Of each sequence, the words that the model does not expect, and all words."""
    predicted = model(tokens[:, :-1]).argmax(2)
    for said, comes, length in zip(predicted.tolist(), tokens[:, 1:].tolist(), lengths.tolist(), strict=True):
        words = [str(word) for word in comes[: length - 1]]
        yield [word for word, guess in zip(words, said, strict=False) if word != str(guess)], words


def count_ngrams(said, comes):
    """Matches of 1- to 4-grams, their numbers, and both lengths."""
    matches, numbers = [], []
    for n in range(1, 5):
        own = collections.Counter(tuple(said[i : i + n]) for i in range(len(said) - n + 1))
        other = collections.Counter(tuple(comes[i : i + n]) for i in range(len(comes) - n + 1))
        matches.append(sum(min(count, other[gram]) for gram, count in own.items()))
        numbers.append(max(0, len(said) - n + 1))
    return [*matches, *numbers, len(said), len(comes)]


@dataclass(kw_only=True)
class Summarised(Judged):
    """Metrics of all examples at once: an exact area under the curve, a confusion matrix, the order of ids."""

    best = ("exact_auc", "max")
    from_score: bool = option(False, "let score return the outputs")
    spoil: str = option("", "what is wrong with the outputs")

    def dataset(self, split):
        return [(i, *example) for i, example in enumerate(super().dataset(split))]

    def score(self, model, batch):
        scores = super().score(model, batch[1:])
        return (scores, self.make_outputs(model, batch)) if self.from_score else scores

    def outputs(self, model, batch):
        if self.from_score:
            raise AssertionError("a second pass that is not needed")
        return self.make_outputs(model, batch)

    def make_outputs(self, model, batch):
        ids, inputs, targets = batch
        logits = model(inputs)
        made = {"logits": logits, "target": targets.numpy(), "id": ids, "half": logits[:, 0].to(torch.bfloat16)}
        later = not model.training and len(ids) > 2 and bool((ids >= 30).any())
        if self.spoil == "kind" and later:
            made["logits"] = logits.float()
        elif self.spoil == "rows":
            made["logits"] = logits[:1]
        elif self.spoil == "list":
            made["target"] = targets.tolist()
        return made

    def summarise(self, outputs):
        from sklearn.metrics import confusion_matrix, roc_auc_score

        shifted = np.exp(outputs["logits"] - outputs["logits"].max(1, keepdims=True))
        chance, targets = (shifted / shifted.sum(1, keepdims=True))[:, 2], outputs["target"]
        cells = confusion_matrix(targets, outputs["logits"].argmax(1))
        in_order = outputs["id"].tolist() == list(range(len(targets))) and outputs["half"].dtype == np.float32
        return {"exact_auc": roc_auc_score(targets == 2, chance), "matrix": cells.ravel(), "in_order": in_order}


@dataclass(kw_only=True)
class Unsummarised(Judged):
    """Outputs are summarised that there are not."""

    def summarise(self, outputs):
        return {}
