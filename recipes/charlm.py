"""A small GPT on bytes: predict the next byte of Python's own standard library.

Data: the modules at the top of the standard library of the Python that runs it (3.11: 168 files, 4.7 MB); every
tenth is held out. Files are packed: joined by a zero byte and cut into blocks, so only the last block has padding.
Method: a decoder-only Transformer with pre-normalization (Radford et al., "Language Models are Unsupervised Multitask
Learners", 2019); MFU as in PaLM (Chowdhery et al., 2022, arXiv:2204.02311, appendix B).
Full-size run: hvdtrain launch -np 2 charlm
Result: 1.84 bits per byte after an epoch, 4,185 steps, in 6 minutes of CPU time (frequencies of bytes: 4.52; xz of all
held-out files as one, which looks back further than a block: 1.67); MFU 51 % on a core that others used, too.
Larger, for GPUs, not measured: --width 512 --depth 8 --heads 8 --context 512 --batch-size 128 --epochs 10 --lr 1e-3
--dropout 0.1 --amp bf16 --compile
"""

import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdtrain.torch import Recipe, option

END_OF_FILE = 0
PADDING = -1


class Block(nn.Module):
    """A layer of a Transformer: causal self-attention and a perceptron, (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        attended = attended.transpose(1, 2).flatten(2)
        x = x + self.dropout(self.projection(attended))
        return x + self.dropout(self.perceptron(self.norm2(x)))


def rotate(x: Tensor) -> Tensor:
    """Rotate pairs of features, (B, heads, T, features), by angles in proportion to their positions."""
    length, half = x.shape[2], x.shape[3] // 2
    speeds = 1e4 ** -(torch.arange(half, device=x.device) / half)
    angles = torch.arange(length, device=x.device)[:, None] * speeds
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=3).type_as(x)


class GPT(nn.Module):
    """(B, T) bytes -> (B, T, 256) logits of the bytes that follow"""

    def __init__(self, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.output.weight = self.bytes.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.norm(self.blocks(self.bytes(inputs))))


@dataclass(kw_only=True)
class CharLM(Recipe):
    """A small GPT on bytes of Python's standard library, measured in bits per byte."""

    domain = "text"
    best = ("bits_per_byte", "min")

    width: int = option(128, "channels", at_least=1)
    depth: int = option(4, "Transformer blocks", at_least=1)
    heads: int = option(4, "attention heads", at_least=1)
    context: int = option(128, "bytes in a block", at_least=1)
    dropout: float = option(0.0, "share of each block's output that is dropped in training", at_least=0)
    files: int | None = option(None, "only so many files, the first by name", at_least=10)
    epochs: int = 1
    batch_size: int = 8
    lr: float = 3e-3
    schedule: str = "warmup:0.05ep cosine"

    def model(self) -> nn.Module:
        self.network = GPT(self.width, self.depth, self.heads, self.dropout)
        self.weights = sum(parameter.numel() for parameter in self.network.parameters() if parameter.ndim > 1)
        return self.network

    def dataset(self, split: str) -> Tensor:
        """(blocks, context + 1) int64: inputs and targets, the last byte of a block is the first of the next."""
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[: self.files]
        texts = [path.read_bytes() for i, path in enumerate(paths) if (i % 10 == 9) == (split == "eval")]
        packed = np.frombuffer(bytes([END_OF_FILE]).join([b"", *texts]), np.uint8).astype(np.int64)
        blocks = -(-(len(packed) - 1) // self.context)
        padded = np.pad(packed, (0, blocks * self.context + 1 - len(packed)), constant_values=PADDING)
        return torch.from_numpy(padded).unfold(0, self.context + 1, self.context)

    def optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [parameter for parameter in params if parameter.ndim > 1], "weight_decay": 0.1},
            {"params": [parameter for parameter in params if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))

    def score(self, model: nn.Module, batch: Tensor) -> dict[str, Any]:
        inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
        kind = batch.device.type  # what matrix products are computed in, with --amp another type than the weights'
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.get_default_dtype()
        logits = model(inputs)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PADDING, reduction="none")
        # A mean over all bytes of the step, wherever they are: sums of the examples, and what they are sums of.
        return {"loss": (losses.sum(1), (targets != PADDING).sum(1))}

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)

    def split_plan(self) -> dict[str, Any]:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        return {"blocks.*.perceptron.0": ColwiseParallel(), "blocks.*.perceptron.2": RowwiseParallel()}

    def metrics(self, means: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {"bits_per_byte": means["loss"] / np.log(2)}

    def logged(self, row: Mapping[str, Any]) -> None:
        """Report the speed at the end: bytes per second, and its operations by those that matrix products reach."""
        if row["step"] < self.now.steps:
            return
        flops_per_byte = 6 * self.weights + 12 * self.depth * self.width * self.context
        rate = row["samples_per_second"] * self.context
        reachable = self.now.size * measure_matrix_product(next(self.network.parameters()).device, self.dtype)
        mfu = rate * flops_per_byte / reachable
        print(f"speed     {rate:,.0f} bytes/s, MFU {mfu:.0%} of {reachable / 1e9:,.0f} GFLOP/s in matrix products")


def measure_matrix_product(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a product of square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
