"""A JAX recipe for tests: the mean over the tokens of ragged sequences, as a torch recipe has it."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import optax

from hvdtrain.jax import Recipe, option
from tests.ranks import score_recipes


def to_tree(module):
    """Return the parameters of a torch module as nested dicts of arrays, by the same names."""
    tree = {}
    for name, p in module.named_parameters():
        *path, key = name.split(".")
        part = tree
        for step in path:
            part = part.setdefault(step, {})
        part[key] = jnp.asarray(p.detach().numpy())
    return tree


@dataclass(kw_only=True)
class Tokens(Recipe):
    """`score_recipes.Tokens` in JAX: the mean over the tokens of ragged sequences."""

    weighted: bool = option(False, "weigh tokens by fractions")
    empty_from: int = option(10**9, "examples from here on have no token")
    epochs: int = 1
    batch_size: int = 8
    lr: float = 0.5

    def model(self, key):
        return {"params": to_tree(score_recipes.Bigrams())}

    def dataset(self, split):
        data = score_recipes.Tokens(empty_from=self.empty_from).dataset(split)
        return [one.numpy() for one in data]

    def collate(self, examples):
        padded = np.zeros((len(examples), 12), np.int64)
        for row, one in zip(padded, examples, strict=True):
            row[: len(one)] = one
        return padded, np.array([len(one) for one in examples])

    def optimizer(self):
        return optax.sgd(self.lr, momentum=0.9)

    def score(self, model, batch, key):
        losses, right, weights = score_tokens(model["params"], *batch, self.weighted)
        # Denominators carry no gradient.
        numbers = weights.sum(1) + 0 * model["params"]["out"]["bias"].sum()
        return {"loss": (losses.sum(1), numbers), "accuracy": (right.sum(1), weights.sum(1))}

    def metrics(self, means):
        return {"perplexity": math.exp(means["loss"]), "bits": means["loss"] / np.log(2)}


def score_tokens(params, tokens, lengths, weighted=False):
    """(B, L - 1) each: weighted losses, weighted hits, weights."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    weights = (jnp.arange(1, tokens.shape[1]) < lengths[:, None]).astype(params["out"]["bias"].dtype)
    if weighted:
        weights = weights / (3.0 + targets)
    logits = jnp.tanh(params["hidden"]["weight"][inputs]) @ params["out"]["weight"].T + params["out"]["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights
    return losses, (logits.argmax(2) == targets) * weights, weights
