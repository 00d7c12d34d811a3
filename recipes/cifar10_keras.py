"""CIFAR-10 with a ResNet in Keras, on JAX, TensorFlow or torch; the data of `cifar10`.

Method: residual blocks (He et al., 2015, arXiv:1512.03385, section 4.2) as keras.applications writes them, functions of
tensors; images are shifted and mirrored by numpy.
Full-size run: hvdtrain launch -np 2 cifar10_keras --backend jax --download
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from torchvision import datasets

from hvdtrain import UserError
from hvdtrain.keras import Recipe, option

MEAN = np.array((0.4914, 0.4822, 0.4465), np.float32)
STD = np.array((0.2470, 0.2435, 0.2616), np.float32)


def convolve(x: Any, filters: int, kernel_size: int, stride: int, decay: float) -> Any:
    """A convolution and batch norm: (B, H, W, C) -> (B, H / stride, W / stride, filters)"""
    x = layers.Conv2D(
        filters,
        kernel_size,
        stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        kernel_regularizer=keras.regularizers.L2(decay / 2),
    )(x)
    return layers.BatchNormalization(epsilon=1e-5, momentum=0.9)(x)


def residual_block(x: Any, filters: int, stride: int, decay: float) -> Any:
    """Two convolutions next to a shortcut, which is projected where the shape changes."""
    shortcut = x if x.shape[-1] == filters and stride == 1 else convolve(x, filters, 1, stride, decay)
    x = layers.ReLU()(convolve(x, filters, 3, stride, decay))
    return layers.ReLU()(layers.Add()([convolve(x, filters, 3, 1, decay), shortcut]))


def build_resnet(depth: int, width: int, classes: int, decay: float) -> keras.Model:
    """(B, 32, 32, 3) -> (B, classes)"""
    images = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolve(images, width, 3, 1, decay))
    for stage in range(3):
        for block in range((depth - 2) // 6):
            x = residual_block(x, width * 2**stage, 2 if stage > 0 and block == 0 else 1, decay)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(classes, dtype="float32")(x))


@dataclass(kw_only=True)
class CIFAR10Keras(Recipe):
    """Small photographs, 32x32 in colour, by a ResNet in Keras (Krizhevsky's 50,000, from files in --data-dir).

    It has batch norm, which --deterministic refuses. --synthetic makes examples, a pattern for each class under noise:
    for tests of speed, and of whether it learns.
    """

    domain = "vision"
    best = ("accuracy", "max")

    depth: int = option(20, "layers: 8, 14, 20, 26, ..., 6 n + 2", at_least=8)
    width: int = option(16, "channels of the first stage", at_least=1)
    decay: float = option(1e-4, "weight decay of convolutions", at_least=0)
    data_dir: Path = option(Path("data"), "folder that holds cifar-10-batches-py")
    download: bool = option(False, "fetch the files into --data-dir if they are missing (needs a network)")
    augment: bool = option(True, "random crops and flips in training")
    synthetic: int | None = option(None, "so many made examples instead of --data-dir", at_least=10)
    epochs: int = 60
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "warmup:2ep cosine"

    def model(self) -> keras.Model:
        return build_resnet(self.depth, self.width, 10, self.decay)

    def dataset(self, split: str) -> "Images":
        train = split == "train"
        augment = train and self.augment
        if self.synthetic is not None:
            return Images(*make_examples(self.synthetic if train else self.synthetic // 4, train), augment)
        try:
            files = datasets.CIFAR10(self.data_dir, train=train, download=self.download)
        except RuntimeError as error:
            raise UserError(
                f"no whole CIFAR-10 in {self.data_dir / 'cifar-10-batches-py'}: --download fetches it if there is a "
                f"network; else unpack cifar-10-python.tar.gz in {self.data_dir}, or try --synthetic 2000"
            ) from error
        return Images(files.data, np.array(files.targets, np.int32), augment)

    def optimizer(self) -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(self.lr, momentum=0.9, nesterov=True)

    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        images, labels = batch
        logits = model(images)
        return {
            "loss": keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True),
            "accuracy": ops.cast(ops.equal(ops.cast(ops.argmax(logits, axis=1), "int32"), labels), "float32"),
        }


class Images:
    """Images (N, 32, 32, 3) uint8 and labels; `augment` shifts each by up to 4 pixels, and mirrors half of them."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, augment: bool) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.int32]:
        image = self.images[i]
        if self.augment:
            top, left, mirrored = np.random.randint((9, 9, 2))
            image = np.pad(image, ((4, 4), (4, 4), (0, 0)))[top : top + 32, left : left + 32]
            image = image[:, ::-1] if mirrored else image
        return (np.float32(image) / 255 - MEAN) / STD, self.labels[i]


def make_examples(count: int, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return (count, 32, 32, 3) uint8 and (count,) int32: a pattern for each class under noise, and classes."""
    patterns = np.random.default_rng(0).integers(256, size=(10, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    labels = np.arange(count, dtype=np.int32) % 10
    noise = np.random.default_rng(1 + train).integers(256, size=(count, 32, 32, 3))
    return ((patterns[labels] + 3 * noise) // 4).astype(np.uint8), labels
