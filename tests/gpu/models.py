"""What the step times are measured on: ResNet-50 and a GPT of 124 million parameters, with made-up data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Words, words of context, layers, width, heads.
GPT_124M = (50257, 1024, 12, 768, 12)
GPT_TINY = (100, 16, 2, 32, 2)


@dataclass
class Task:
    """A model on a device and one batch for it."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    optimizer: torch.optim.Optimizer

    def loss(self) -> Tensor:
        """The mean loss, with bfloat16 where autocast thinks it safe."""
        with torch.autocast(self.inputs.device.type, torch.bfloat16):
            logits = self.model(self.inputs)
        return F.cross_entropy(logits.float().flatten(0, -2), self.targets.flatten())


class Block(nn.Module):
    """Attention to earlier words, and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)"""
        batch, words, width = x.shape
        asked = self.attend(self.before_attention(x)).view(batch, words, 3, self.heads, width // self.heads)
        query, key, value = asked.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).reshape(batch, words, width))
        return x + self.perceptron(self.before_perceptron(x))


class Gpt(nn.Module):
    """A transformer as GPT-2's smallest, whose first and last layers share their weights."""

    def __init__(self, vocabulary: int, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, vocabulary)"""
        x = self.words(words) + self.places.weight[: words.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.words.weight)


def resnet50(device: torch.device, tiny: bool, channels_last: bool = True) -> Task:
    """A batch of 64 images of 224x224; tiny: 2 of 32x32, and ResNet-18. channels_last: the weights too."""
    from torchvision import models

    model = models.resnet18(num_classes=10) if tiny else models.resnet50()
    model = model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    batch, side, classes = (2, 32, 10) if tiny else (64, 224, 1000)
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch,), device=device)
    return Task(model, images, labels, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))


def gpt(device: torch.device, tiny: bool, channels_last: bool = True) -> Task:
    """A batch of 8 texts of 1024 words."""
    vocabulary, context, *_ = size = GPT_TINY if tiny else GPT_124M
    model = Gpt(*size).to(device)
    words = torch.randint(vocabulary, (2 if tiny else 8, context + 1), device=device)
    return Task(model, words[:, :-1], words[:, 1:], torch.optim.AdamW(model.parameters(), lr=1e-4))


TASKS = {"resnet50": resnet50, "gpt": gpt}
