"""Codecs on a device: decoded values against the CPU's, and the seconds of encoding and decoding."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from hvdtrain.compression.codec import Codec, Collective, RandomKey
from hvdtrain.compression.codecs.powersgd import PowerSgd
from hvdtrain.compression.codecs.qsgd import Qsgd
from hvdtrain.compression.codecs.randomk import RandomK
from hvdtrain.compression.spec import make_codec, parse_compression

SPECS = ["fp16", "bf16", "int8", "onebit", "qsgd:2bit", "qsgd:4bit", "qsgd:8bit"]
SPECS += ["topk:0.01", "randomk:0.01", "randomk:0.01,feedback=on", "powersgd:4"]
KEY = RandomKey(seed=3, step=5, bucket=2, rank=1)
CPU = torch.device("cpu")
ROWS, COLUMNS = 1024, 512
TRIALS = 200
# The same in any order of operations, but for the last bits of sums; and values on the border of two codes.
TOLERANCE, STRAY = 1e-4, 1e-4


def made(text: str, device: torch.device, shapes: list[tuple[int, int]]) -> Codec:
    spec = parse_compression(text)
    return make_codec(spec, spec.argument, shapes, KEY, device)


def values(n: int) -> Tensor:
    """(n,) of magnitudes over some orders, as gradients are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator) * torch.randn(n, generator=generator).exp()


def shaped(codec: Codec, flat: Tensor) -> Tensor:
    """As a channel gives it to the codec."""
    return flat.view(2, -1) if codec.collective is Collective.REDUCE_SCATTER else flat


def compare(text: str, device: torch.device) -> str:
    """Hold a codec on the device against the same on the CPU; in words, what was compared.

    Raises AssertionError where they differ.
    """
    here, there = made(text, CPU, [(ROWS, COLUMNS)]), made(text, device, [(ROWS, COLUMNS)])
    x = shaped(here, values(ROWS * COLUMNS))
    moved = x.to(device)
    if isinstance(there, RandomK):
        return compare_randomk(there, moved)
    if isinstance(here, PowerSgd) and isinstance(there, PowerSgd):
        return compare_powersgd(here, there, x, moved)
    payload = there.encode(moved, KEY)
    decoded = there.decode(payload, x.shape[-1], KEY)
    assert (payload.device, decoded.device) == (moved.device, moved.device)
    # The CPU reads what the device wrote.
    torch.testing.assert_close(here.decode(payload.cpu(), x.shape[-1], KEY), decoded.cpu(), rtol=1e-6, atol=0)
    if isinstance(there, Qsgd):
        return compare_qsgd(there, moved)
    expected = here.decode(here.encode(x, KEY), x.shape[-1], KEY)
    off = (decoded.cpu() - expected).abs() > TOLERANCE * expected.abs()
    share = float(off.float().mean())
    assert share <= STRAY, f"{text}: {share:.2%} of the values differ from the CPU's"
    return f"decoded values as on the CPU, but for {int(off.sum())} of {off.numel():,}"


def compare_randomk(codec: RandomK, x: Tensor) -> str:
    """Places are drawn by the device's generator: another choice, of the same kind."""
    decoded = codec.decode(codec.encode(x, KEY), len(x), KEY)
    again = codec.decode(codec.encode(x, KEY), len(x), KEY)
    assert torch.equal(decoded, again), "the same key, the same places"
    places = decoded.nonzero().squeeze(1)
    groups = -(-len(x) // codec.group_size)
    assert groups - 1 <= len(places) <= groups
    assert torch.equal(places // codec.group_size, torch.arange(len(places), device=x.device)), "one of each group"
    gain = codec.group_size if codec.unbiased else 1
    torch.testing.assert_close(decoded[places], x[places] * gain, rtol=1e-6, atol=0)
    return "properties only (generators differ): one value of each group, rightly scaled, the same for the same key"


def compare_qsgd(codec: Qsgd, x: Tensor) -> str:
    """Rounded by the device's generator: to a neighbour, and right in the mean."""
    part = x[:, : codec.block_size * 8].contiguous()
    blocks = part.reshape(-1, codec.block_size)
    scale = (blocks.abs().amax(-1, keepdim=True) / codec.max_level).expand_as(blocks).reshape(part.shape)
    total = torch.zeros_like(part, dtype=torch.float64)
    for trial in range(TRIALS):
        key = RandomKey(0, trial, 0, 0)
        decoded = codec.decode(codec.encode(part, key), part.shape[-1], key)
        assert ((decoded - part).abs() <= scale * 1.0001).all(), "not a neighbour"
        total += decoded
    # Of a rounding between neighbours the variance is at most a quarter of their distance squared.
    z = (total / TRIALS - part) / (scale.double() / 2 / TRIALS**0.5)
    assert z.square().mean() < 1.1, f"biased: {float(z.square().mean()):.2f}"
    return f"properties only (generators differ): rounded to a neighbour, unbiased over {TRIALS} keys"


def compare_powersgd(here: PowerSgd, there: PowerSgd, x: Tensor, moved: Tensor) -> str:
    """From the same basis on, which is drawn by the device's generator; columns' signs are nobody's concern."""
    there.bases = [basis.to(moved.device) for basis in here.bases]
    for _ in range(3):
        payloads = here.encode(x, KEY), there.encode(moved, KEY)
        expected = here.decode(payloads[0], len(x), KEY)
        decoded = there.decode(payloads[1], len(x), KEY).cpu()
        off = float((decoded - expected).norm() / expected.norm())
        assert off < 1e-3, f"off by {off:.1e}"
        here.advance(payloads[0])
        there.advance(payloads[1])
    return "decoded values as on the CPU over 3 steps, from the same first basis"


def median_seconds(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """The median of some runs, after two that do not count."""
    seconds = []
    for _ in range(times + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def speeds(device: torch.device, megabytes: float) -> dict[str, tuple[float, float]]:
    """{codec: (encoding, decoding)} in GB/s of dense float32 values; "copy" stands for one on the device, twice."""
    columns = 1024
    rows = max(2, round(megabytes * 1e6 / 4 / columns / 2) * 2)
    flat = torch.randn(rows * columns, device=device)
    gigabytes, target = flat.numel() * 4 / 1e9, torch.empty_like(flat)
    copied = gigabytes / median_seconds(lambda: target.copy_(flat), device)
    found = {"copy": (copied, copied)}
    for text in SPECS:
        codec = made(text, device, [(rows, columns)])
        x = shaped(codec, flat)
        payload = codec.encode(x, KEY)
        encoding = median_seconds(functools.partial(codec.encode, x, KEY), device)
        decoding = median_seconds(functools.partial(codec.decode, payload, x.shape[-1], KEY), device)
        found[text] = gigabytes / encoding, gigabytes / decoding
    return found
