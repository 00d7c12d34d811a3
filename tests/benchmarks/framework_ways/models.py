"""What all ways train, in whichever framework."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

CLASSES = 10
LR, MOMENTUM = 0.01, 0.9
STORED = 512  # different examples


@dataclass(frozen=True)
class Shape:
    """A network: convolutions of 3x3 with ReLU and a halving of the image by maxima, then dense layers with ReLU.

    Attributes:
        side: of the square images of three colours.
        channels: of each convolution.
        widths: of each dense layer but the last, which has `CLASSES`.
    """

    side: int
    channels: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def convolutions(self) -> list[tuple[int, int]]:
        """Channels before and after each convolution."""
        return list(pairwise([3, *self.channels]))

    @property
    def dense_layers(self) -> list[tuple[int, int]]:
        """Values before and after each dense layer."""
        flat = (self.side >> len(self.channels)) ** 2 * [3, *self.channels][-1]
        return list(pairwise([flat, *self.widths, CLASSES]))

    @property
    def num_parameters(self) -> int:
        """Kernels and biases."""
        return sum(9 * a * b + b for a, b in self.convolutions) + sum(a * b + b for a, b in self.dense_layers)


SHAPES = {
    "mlp": Shape(32, (), (1536, 1536, 1536, 384)),  # 3072-1536-1536-1536-384-10: 10 M parameters
    "conv": Shape(32, (32, 64, 128), ()),
}


def make_examples(shape: Shape) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """(STORED, side, side, 3) and (STORED,)"""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((STORED, shape.side, shape.side, 3), np.float32)
    return images, generator.integers(CLASSES, size=STORED, dtype=np.int32)


class ManyExamples:
    """The stored examples, again and again: so many that no epoch ends while something is measured."""

    def __init__(self, shape: Shape, images_first: bool = False) -> None:
        self._images, self._labels = make_examples(shape)
        if images_first:  # channels before rows, as torch has them
            self._images = np.ascontiguousarray(self._images.transpose(0, 3, 1, 2))

    def __len__(self) -> int:
        return 10**8

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], np.int32]:
        return self._images[index % STORED], self._labels[index % STORED]


def uniform_bound(fan_in: int) -> float:
    """Of initial weights that keep the scale of what ReLU lets through (He et al., 2015)."""
    return math.sqrt(6 / fan_in)
