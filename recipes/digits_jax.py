"""Handwritten digits in JAX: a small convolutional network on scikit-learn's 8x8 images."""

from dataclasses import dataclass
from importlib.metadata import distribution

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hvdtrain.data import Arrays
from hvdtrain.jax import Recipe, option

SAME = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def convolve(layer, images):
    """Return the layer's channels of (B, height, width, channels), at half the size."""
    x = jax.nn.relu(jax.lax.conv_general_dilated(images, layer["kernel"], **SAME) + layer["bias"])
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


@dataclass(kw_only=True)
class DigitsJax(Recipe):
    """Handwritten digits, two convolutions, in JAX."""

    domain = "vision"
    best = ("accuracy", "max")

    width: int = option(32, "channels of the first convolution", at_least=1)
    dropout: float = option(0.0, "fraction of the features that training leaves out", at_least=0)
    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "warmup:1ep cosine"

    def model(self, key):
        keys, width, init = jax.random.split(key, 3), self.width, jax.nn.initializers.he_normal()

        def layer(key, *shape):
            return {"kernel": init(key, shape), "bias": jnp.zeros(shape[-1])}

        convolutions = {
            "conv1": layer(keys[0], 3, 3, 1, width),
            "conv2": layer(keys[1], 3, 3, width, 2 * width),
        }
        return {"params": {**convolutions, "out": layer(keys[2], 2 * width * 4, 10)}}

    def dataset(self, split):
        # scikit-learn's own file: the library itself takes a second to import.
        file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        digits = np.loadtxt(str(file), delimiter=",", dtype=np.float32)
        images, labels = digits[:, :-1].reshape(-1, 8, 8, 1) / 16, digits[:, -1].astype(np.int32)
        held_out = np.arange(len(labels)) % 5 == 0
        chosen = held_out if split == "eval" else ~held_out
        return Arrays(images[chosen], labels[chosen])

    def optimizer(self):
        return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(self.lr, momentum=0.9))

    def apply(self, params, images, key=None):
        """Return (B, 10) logits. key: of dropout; None: there is none."""
        features = convolve(params["conv2"], convolve(params["conv1"], images)).reshape(len(images), -1)
        if key is not None and self.dropout:
            kept = jax.random.bernoulli(key, 1 - self.dropout, features.shape)
            features = features * kept / (1 - self.dropout)
        return (features @ params["out"]["kernel"] + params["out"]["bias"]).astype(jnp.float32)

    def score(self, model, batch, key):
        images, labels = batch
        logits = self.apply(model["params"], images, key)
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
            "accuracy": (logits.argmax(1) == labels).astype(jnp.float32),
        }

    def outputs(self, model, batch):
        images = batch[0] if isinstance(batch, tuple) else batch
        return {"logits": self.apply(model["params"], images)}
