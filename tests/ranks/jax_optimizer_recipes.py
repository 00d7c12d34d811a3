"""JAX recipes for tests, with optimizers of many kinds, and one for each of several losses."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from hvdtrain.jax import option
from tests.ranks.jax_recipes import FEATURES, Line


@dataclass(kw_only=True)
class Duel(Line):
    """Two losses, each with an optimizer of its own."""

    def model(self, key):
        return {"params": {"generator": {"g": jnp.ones(FEATURES)}, "discriminator": {"d": jnp.full((FEATURES,), 0.5)}}}

    def optimizer(self):
        return {"generator": optax.adam(self.lr), "discriminator": optax.sgd(self.lr / 2, momentum=0.9)}

    def score(self, model, batch, key):
        x, y = batch
        g, d = model["params"]["generator"]["g"], model["params"]["discriminator"]["d"]
        fake, judged = x @ g, x @ d
        return {"loss_generator": (fake * judged - y) ** 2, "loss_discriminator": (judged - fake) ** 2 + judged * y}


@dataclass(kw_only=True)
class OtherKeys(Duel):
    def optimizer(self):
        return {"generator": optax.adam(self.lr), "critic": optax.sgd(self.lr)}


OPTIMIZERS = {
    "adam": lambda lr: optax.adam(lr),
    "adamw": lambda lr: optax.adamw(lr),
    "lion": lambda lr: optax.lion(lr),
    "lamb": lambda lr: optax.lamb(lr),
    "adafactor": lambda lr: optax.adafactor(lr),
    "muon": lambda lr: optax.contrib.muon(lr),
    "chain": lambda lr: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(lr)),
    "masked": lambda lr: optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), lambda tree: jax.tree.map(lambda a: a.ndim > 0, tree)),
        optax.sgd(lr),
    ),
    "multi": lambda lr: optax.multi_transform(
        {"a": optax.adam(lr), "b": optax.sgd(lr)},
        lambda tree: jax.tree.map(lambda a: "a" if a.ndim else "b", tree),
    ),
    "injected": lambda lr: optax.inject_hyperparams(optax.rmsprop)(lr, momentum=0.9),
    "scheduled": lambda lr: optax.adam(optax.exponential_decay(lr, 2, 0.7)),
    "noisy": lambda lr: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(lr)),
    "multisteps": lambda lr: optax.MultiSteps(optax.adam(lr), 2),
    "finite": lambda lr: optax.apply_if_finite(optax.adam(lr), 3),
    "schedule free": lambda lr: optax.contrib.schedule_free_adamw(lr),
    "sam": lambda lr: optax.contrib.sam(optax.sgd(lr), optax.sgd(0.01)),
}


@dataclass(kw_only=True)
class Optax(Line):
    """With an optimizer of optax, by its name."""

    kind: str = option("adam", "of OPTIMIZERS")
    schedule: str = "linear"

    def model(self, key):
        return {
            "params": {
                "slope": jnp.linspace(0.5, -0.5, FEATURES),
                "bias": jnp.zeros(()),
                "deep": {"w": jnp.eye(FEATURES)},
            }
        }

    def optimizer(self):
        return OPTIMIZERS[self.kind](self.lr)

    def score(self, model, batch, key):
        x, y = batch
        return super().score(model, (jnp.tanh(x @ model["params"]["deep"]["w"]), y), key)
