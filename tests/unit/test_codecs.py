"""Codecs against references that are plain enough to be right, on one process."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvdtrain.compression.codec import Codec, Collective, RandomKey
from hvdtrain.compression.codecs.half import Cast, Fp16
from hvdtrain.compression.codecs.int8 import Int8
from hvdtrain.compression.codecs.onebit import OneBit
from hvdtrain.compression.codecs.powersgd import PowerSgd, orthonormal_basis
from hvdtrain.compression.codecs.qsgd import Qsgd
from hvdtrain.compression.codecs.randomk import RandomK
from hvdtrain.compression.codecs.topk import TopK, largest_indices
from hvdtrain.compression.packing import (
    join_scales,
    pack_bits,
    pack_bits_by_torch,
    split_scales,
    unpack_bits,
    unpack_bits_by_torch,
)

KEY = RandomKey(seed=3, step=5, bucket=2, rank=1)
CPU = torch.device("cpu")
N = 2048  # whole blocks of every codec
SHAPES = [(32, 32), (16, 63), (1, 16)]  # N values

HALF, BRAIN = Cast(torch.float16), Cast(torch.bfloat16)
EXCHANGES: list[Codec] = [HALF, BRAIN, Int8(), OneBit(), Qsgd(2), Qsgd(4), Qsgd(8)]
GATHERS: list[Codec] = [TopK(0.001), TopK(0.1), TopK(1.0)]
SUMS: list[Codec] = [Fp16(), RandomK(0.1), RandomK(0.1, unbiased=True), RandomK(1.0)]


def powersgd(left: bool = True, rank: int = 4, shapes: list[tuple[int, int]] = SHAPES) -> PowerSgd:
    codec = PowerSgd(rank, shapes, KEY, CPU)
    if not left:
        codec.advance(codec.encode(torch.randn(N, generator=torch.Generator().manual_seed(8)), KEY))
    return codec


CODECS = [*EXCHANGES, *GATHERS, *SUMS, powersgd(), powersgd(left=False)]


def name_of(codec: Codec) -> str:
    if isinstance(codec, PowerSgd):
        return f"PowerSgd(left={codec.sends_left})"
    shown = [str(v) for k, v in vars(codec).items() if k in ("bits", "ratio", "unbiased")]
    return f"{type(codec).__name__}({','.join(shown)})"


all_codecs = pytest.mark.parametrize("codec", CODECS, ids=name_of)


def shaped(codec: Codec, flat: Tensor, rows: int = 2) -> Tensor:
    return flat.view(rows, -1) if codec.collective is Collective.REDUCE_SCATTER else flat


def values(seed: int = 0, n: int = N) -> Tensor:
    """Values of magnitudes over some orders, as gradients are."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=made) * torch.randn(n, generator=made).exp()


def there_and_back(codec: Codec, x: Tensor, key: RandomKey = KEY) -> Tensor:
    return codec.decode(codec.encode(x, key), x.shape[-1], key)


def documented_bytes(codec: Codec, n: int) -> int:
    """Per row of n values."""
    match codec:
        case Fp16() | Cast():
            return 2 * n
        case Int8():
            return n + 4 * n // 512
        case OneBit():
            return n // 8 + 4 * n // 1024
        case Qsgd():
            return n * codec.bits // 8 + 4 * n // 512
        case TopK():
            return math.ceil(codec.ratio * n) * (6 if n <= 2**15 else 8)
        case RandomK():
            return 4 * math.ceil(n / round(1 / codec.ratio))
        case PowerSgd():
            return 4 * sum(min(4, *shape) * shape[0 if codec.sends_left else 1] for shape in codec.shapes)
    raise AssertionError(codec)


@all_codecs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_shapes_dtypes_and_bytes(codec: Codec, dtype: torch.dtype) -> None:
    for flat in (values(), torch.zeros(N), torch.full((N,), math.nan)):
        x = shaped(codec, flat.to(dtype))
        before = x.clone()
        payload = codec.encode(x, KEY)
        decoded = codec.decode(payload, x.shape[-1], KEY)
        assert torch.equal(x, before) or x.isnan().all(), "x itself must stay"
        assert decoded.shape == x.shape
        assert decoded.dtype == torch.float32
        if codec.collective is Collective.REDUCE_SCATTER:
            assert payload.dtype == torch.uint8
            assert payload.shape == (2, documented_bytes(codec, N // 2))
        else:
            assert payload.dtype == torch.uint8 or codec.collective is Collective.ALL_REDUCE
            assert payload.dim() == 1
            assert payload.numel() * payload.element_size() == documented_bytes(codec, N)


@all_codecs
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_as_if_they_were_float32(codec: Codec, dtype: torch.dtype) -> None:
    x = shaped(codec, values().to(torch.float16).to(dtype))
    assert torch.equal(there_and_back(codec, x), there_and_back(codec, x.float()))


@all_codecs
def test_bytes_of_several_ranks_are_decoded_where_they_lie(codec: Codec) -> None:
    """A received payload begins anywhere in a longer tensor, at no more than 2-byte alignment."""
    x = shaped(codec, values(), 1)
    for n in (x.shape[-1], *([50, 51, 1] if isinstance(codec, TopK) else [])):
        part = x[..., :n]
        payload = codec.encode(part, KEY)
        joined = torch.cat([payload.flatten()] * 3)
        for piece in joined.view(3, *payload.shape):
            assert torch.equal(codec.decode(piece, n, KEY), there_and_back(codec, part))


@all_codecs
def test_randomness_comes_from_the_key_alone(codec: Codec) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    x = shaped(codec, values())
    once = codec.encode(x, KEY)
    codec.decode(once, x.shape[-1], KEY)
    if isinstance(codec, PowerSgd):
        powersgd(codec.sends_left)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    torch.manual_seed(2)
    assert torch.equal(codec.encode(x, KEY), once)


def test_keys_differ_in_every_part() -> None:
    def drawn(key: RandomKey, shared: bool) -> float:
        return float(torch.rand((), generator=key.make_generator(CPU, shared=shared)))

    keys = [RandomKey(*numbers) for numbers in itertools.product(range(3), repeat=4)]
    assert len({drawn(key, shared=False) for key in keys}) == len(keys)
    assert len({drawn(key, shared=True) for key in keys}) == len(keys) / 3
    assert not {drawn(key, shared=False) for key in keys} & {drawn(key, shared=True) for key in keys}


# What each codec says it does, said again in numpy, one value after the other.


def test_casts_round_as_numpy_and_torch_do() -> None:
    x = values()
    assert torch.equal(there_and_back(Fp16(), x), torch.from_numpy(x.numpy().astype(np.float16).astype(np.float32)))
    assert torch.equal(there_and_back(BRAIN, x[None]), x[None].bfloat16().float())


def test_int8_rounds_by_the_largest_value_of_each_block() -> None:
    x = values()
    expected = []
    for block in x.view(-1, 512).tolist():
        scale = max(abs(v) for v in block) / 127
        expected += [round(v / scale) * scale for v in block]
    torch.testing.assert_close(there_and_back(Int8(), x[None])[0], torch.tensor(expected), rtol=1e-5, atol=0)


def test_onebit_keeps_signs_and_the_mean_magnitude_of_each_block() -> None:
    x = values()
    x[7] = 0
    expected = []
    for block in x.view(-1, 1024).tolist():
        scale = sum(abs(v) for v in block) / 1024
        expected += [scale if v >= 0 else -scale for v in block]
    torch.testing.assert_close(there_and_back(OneBit(), x[None])[0], torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_rounds_to_a_neighbour(bits: int) -> None:
    x = values()
    got = there_and_back(Qsgd(bits), x[None])[0]
    levels = 2 ** (bits - 1) - 1
    for block, decoded in zip(x.view(-1, 512).tolist(), got.view(-1, 512).tolist(), strict=True):
        scale = max(abs(v) for v in block) / levels
        for v, d in zip(block, decoded, strict=True):
            assert d / scale == pytest.approx(round(d / scale), abs=1e-4)
            assert math.floor(v / scale - 1e-4) <= round(d / scale) <= math.ceil(v / scale + 1e-4)


@pytest.mark.parametrize("n", [1, 5, 1000, 2**15, 2**15 + 1, 2**16 + 3])
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.5, 1.0])
def test_topk_keeps_the_largest_values(n: int, ratio: float) -> None:
    x = values(n=n)
    got = there_and_back(TopK(ratio), x)
    k = math.ceil(ratio * n)
    kept = sorted(range(n), key=lambda i: -abs(float(x[i])))[:k]
    expected = torch.zeros(n)
    expected[kept] = x[kept]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("n", "ratio"), [(1000, 0.01), (1003, 0.01), (7, 0.1), (1, 0.5), (64, 0.3), (12, 1.0)])
def test_randomk_sends_one_of_each_group(n: int, ratio: float) -> None:
    group = round(1 / ratio)
    x = values(n=n).abs() + 1
    seen = torch.zeros(n)
    for step in range(40 * group):
        key = RandomKey(0, step, 0, 1)
        got = there_and_back(RandomK(ratio), x, key)
        assert torch.equal(got[got != 0], x[got != 0])
        counts = [(part != 0).sum().item() for part in got.split(group)]
        assert counts[:-1] == [1] * (len(counts) - 1)
        assert counts[-1] == 1 or (counts[-1] == 0 and n % group)
        assert torch.equal(there_and_back(RandomK(ratio, unbiased=True), x, key), got * group)
        assert torch.equal(there_and_back(RandomK(ratio), x, RandomKey(0, step, 0, 0)), got), (
            "all ranks, the same places"
        )
        seen += got != 0
    assert seen.min() > 0


def test_powersgd_projects_in_turns() -> None:
    codec = powersgd()
    key = KEY
    for step in range(4):
        x = values(step)
        bases = [basis.double().numpy() for basis in codec.bases]
        got = there_and_back(codec, x, key)
        for part, matrix, basis, (n, m) in zip(
            got.split([n * m for n, m in SHAPES]), codec.split_matrices(x), bases, SHAPES, strict=True
        ):
            exact = matrix.double().numpy()
            r = min(4, n, m)
            assert basis.shape == ((m, r) if step % 2 == 0 else (n, r))
            np.testing.assert_allclose(basis.T @ basis, np.eye(r), atol=1e-5)
            expected = exact @ basis @ basis.T if step % 2 == 0 else basis @ basis.T @ exact
            np.testing.assert_allclose(part.view(n, m).numpy(), expected, atol=1e-4)
        sent = codec.encode(x, key)
        factors = [f.double().numpy() for f in codec.unpack_factors(sent)]
        codec.advance(sent)
        for factor, basis in zip(factors, codec.bases, strict=True):
            # The basis spans what was sent.
            np.testing.assert_allclose(basis.numpy() @ (basis.numpy().T @ factor), factor, atol=1e-4)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("block", [1, 100, 1 << 18])
def test_powersgd_takes_in_blocks_what_it_encodes(block: int, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvdtrain.compression.codecs.powersgd.BLOCK_VALUES", block)
    codec = powersgd(left)
    residual, gradient, rest = values(3), values(4), torch.full((N,), math.nan)
    parts = zip(*(codec.split_matrices(flat) for flat in (rest, residual, gradient)), strict=True)
    for number, matrices in reversed(list(enumerate(parts))):  # in any order
        codec.encode_fused(number, *matrices)
    x = residual + gradient
    sent = codec.encode(x, KEY)
    torch.testing.assert_close(codec.pop_fused_payload(), sent, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest, x - codec.decode(sent, N, KEY), rtol=1e-5, atol=1e-5)


def test_powersgd_finds_a_matrix_of_its_rank() -> None:
    """Of a matrix of rank r, two steps find all."""
    made = torch.Generator().manual_seed(0)
    x = (torch.randn(30, 3, generator=made) @ torch.randn(3, 20, generator=made)).flatten()
    codec = PowerSgd(3, [(30, 20)], KEY, CPU)
    codec.advance(codec.encode(x, KEY))
    torch.testing.assert_close(there_and_back(codec, x), x, rtol=1e-4, atol=1e-4)


def test_powersgd_bases_survive_zeros_and_equal_columns() -> None:
    for x in (torch.zeros(N), torch.ones(N)):
        codec = powersgd()
        for _ in range(3):
            codec.advance(codec.encode(x, KEY))
            for basis in codec.bases:
                torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)


def test_decoding_a_sum_equals_the_sum_of_decoded_payloads() -> None:
    for codec in (RandomK(0.1), RandomK(0.1, unbiased=True), powersgd(), powersgd(left=False), Fp16()):
        parts = [values(seed) for seed in range(3)]
        keys = [RandomKey(3, 5, 2, rank) for rank in range(3)]
        total = sum(codec.encode(x, key) for x, key in zip(parts, keys, strict=True))
        apart = sum(codec.decode(codec.encode(x, key), N, key) for x, key in zip(parts, keys, strict=True))
        tolerance = 2e-2 if isinstance(codec, Fp16) else 1e-4
        torch.testing.assert_close(codec.decode(total, N, keys[2]), apart, rtol=tolerance, atol=tolerance)


# Bias, variance, contraction, losslessness.


@pytest.mark.parametrize(
    ("codec", "variance"),
    [
        # Of x's square: one in 8 is sent eightfold. Of the scale's: rounding between neighbours.
        (RandomK(0.125, unbiased=True), lambda x: 7 * x.square()),
        *((Qsgd(bits), lambda x, b=bits: (x.abs().max() / (2 ** (b - 1) - 1)) ** 2 / 4) for bits in (2, 4, 8)),
    ],
    ids=lambda value: name_of(value) if not callable(value) else "",
)
def test_stochastic_codecs_are_unbiased_with_bounded_variance(
    codec: Codec, variance: Callable[[Tensor], Tensor]
) -> None:
    n, trials = 512, 3000
    x = values(n=n)
    drawn = torch.stack(
        [there_and_back(codec, shaped(codec, x, 1), RandomKey(1, t, 0, 0)).flatten() for t in range(trials)]
    )
    bound = variance(x).expand(n).double()
    z = (drawn.double().mean(0) - x) / (bound / trials).sqrt()
    assert z.abs().max() < 5.5
    # The mean over values of z squared is at most 1, give or take.
    assert z.square().mean() < 1 + 6 * math.sqrt(2 / n)
    assert (drawn.double().var(0) < bound * 1.5).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_is_not_biased_by_chance_at_a_rank_or_step(bits: int) -> None:
    """The same x at two ranks is rounded independently: the error of the sum has twice the variance, not four times."""
    x = values()[None]
    first, second = (there_and_back(Qsgd(bits), x, RandomKey(0, 0, 0, rank)) - x for rank in (0, 1))
    cosine = float((first * second).sum() / first.norm() / second.norm())
    assert abs(cosine) < 5 / math.sqrt(N)


def floats(limit: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-limit, limit, width=32), min_size=1, max_size=40)


CONTRACTIONS: list[tuple[Codec, Callable[[Tensor], float]]] = [
    (TopK(0.1), lambda x: 0.1),
    # Of a block: ||x||_1^2 / (d ||x||_2^2), at least 1 / d.
    (OneBit(), lambda x: min(float(b.abs().sum() ** 2 / b.square().sum() / 1024) if b.any() else 1 for b in x)),
    (Int8(), lambda x: 1 - 512 * (0.5 / 127) ** 2),
    (powersgd(), lambda x: 0.0),
    (powersgd(left=False), lambda x: 0.0),
]


@pytest.mark.parametrize(("codec", "delta"), CONTRACTIONS, ids=lambda value: "" if callable(value) else name_of(value))
@given(pattern=floats(2.0**60), scale=st.sampled_from([1.0, 2.0**-50, 2.0**-70]))
@example(pattern=[0.0], scale=1.0)
@example(pattern=[1.0, 0.0], scale=1.0)
@settings(max_examples=60, deadline=None)
def test_codec_error_is_within_its_contraction_bound(
    codec: Codec, delta: Callable[[Tensor], float], pattern: list[float], scale: float
) -> None:
    flat = torch.tensor(pattern * (N // len(pattern) + 1))[:N] * scale
    x = shaped(codec, flat)
    error = (there_and_back(codec, x).double() - x).flatten()
    left = delta(flat.double().view(-1, 1024))
    rounding = 1e-12 * flat.double().square().sum() + N * torch.finfo(torch.float32).tiny ** 2
    assert error.square().sum() <= (1 - left) * flat.double().square().sum() * (1 + 1e-5) + rounding


def test_powersgd_keeps_its_share_of_noise() -> None:
    """Of noise, which has no direction, a basis of r of m keeps r / m of the square."""
    codec = PowerSgd(4, [(64, 32)], KEY, CPU)
    kept = [float(there_and_back(codec, torch.randn(N)).square().sum() / N) for _ in range(10)]
    assert sum(kept) / 10 == pytest.approx(4 / 32, rel=0.2)


@pytest.mark.parametrize(
    "codec",
    [TopK(1.0), RandomK(1.0), RandomK(1.0, unbiased=True), powersgd()],
    ids=name_of,
)
def test_codecs_at_their_limit_are_lossless(codec: Codec) -> None:
    x = values()
    if isinstance(codec, PowerSgd):
        square = PowerSgd(100, [(32, 32), (31, 31), (63, 1)], KEY, CPU)
        for _ in range(3):
            torch.testing.assert_close(there_and_back(square, x), x, rtol=1e-4, atol=1e-4)
            square.advance(square.encode(x, KEY))
    else:
        assert torch.equal(there_and_back(codec, x), x)


def test_casts_are_lossless_on_representable_values() -> None:
    for codec, dtype in ((Fp16(), torch.float16), (HALF, torch.float16), (BRAIN, torch.bfloat16)):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        x = shaped(codec, every[every.isfinite()].float(), 1)
        assert torch.equal(there_and_back(codec, x), x)
        assert torch.equal(there_and_back(codec, x).signbit(), x.signbit())


# Edges.


@all_codecs
def test_zeros_decode_to_zeros(codec: Codec) -> None:
    assert not there_and_back(codec, shaped(codec, torch.zeros(N))).any()


@all_codecs
@pytest.mark.parametrize("place", [0, 700, N - 1])
def test_a_single_nonzero_value_is_decoded_in_its_place(codec: Codec, place: int) -> None:
    x = torch.zeros(N)
    x[place] = -3.0
    got = there_and_back(codec, shaped(codec, x)).flatten()
    assert got.isfinite().all()
    match codec:
        case OneBit():
            block = slice(place // 1024 * 1024, place // 1024 * 1024 + 1024)
            assert got[place] == -3 / 1024
            assert (got[block].abs() == 3 / 1024).all()
        case RandomK():
            sent = -3.0 * (10 if codec.unbiased else 1)
            assert got[place] in (0, sent)
            assert not got[x == 0].any()
        case PowerSgd():
            assert got.norm() <= 3.001
        case _:
            assert torch.equal(got, x)


@all_codecs
@pytest.mark.parametrize("size", [1e-45, 3e-44, 2.5e-43, 1e-39, 1e-30, 1e30])
def test_tiny_and_huge_values(codec: Codec, size: float) -> None:
    """Nothing is blown up, and no sign turns. (bfloat16's own smallest step is 9e-41.)"""
    x = (values().clamp(-3, 3) / 3 * size).float()
    got = there_and_back(codec, shaped(codec, x)).flatten()
    if (isinstance(codec, Fp16) or codec == HALF) and size > 1:
        assert got.isinf().any()
        return
    assert got.isfinite().all()
    gain = 10 if isinstance(codec, RandomK) and codec.unbiased else 6 if isinstance(codec, PowerSgd) else 1
    assert got.abs().max() <= gain * x.abs().max() * 1.01 + (9.2e-41 if codec == BRAIN else 1.4e-45)
    if not isinstance(codec, (OneBit, PowerSgd)):
        assert (got.sign() * x.sign() >= 0).all()


@pytest.mark.parametrize("codec", [*EXCHANGES, *GATHERS, Fp16()], ids=name_of)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_decode_to_nonfinite(codec: Codec, wrong: float) -> None:
    for place in (0, 1, 511, 512, 1023, 1024, N - 1):
        for flat in (values(), torch.zeros(N), torch.full((N,), 1e30)):
            flat[place] = wrong
            got = there_and_back(codec, shaped(codec, flat)).flatten()
            assert not got[place].isfinite()


def test_largest_returns_sorted_indices_of_short_tensors() -> None:
    assert largest_indices(torch.tensor([1.0, -3.0, 2.0]), 2).tolist() == [1, 2]
    assert largest_indices(torch.tensor([0.0]), 1).tolist() == [0]


def cases_for_largest() -> Iterator[tuple[str, Tensor]]:
    for n in (100, 2**16 - 1, 2**16, 2**16 + 1, 300_001):
        made = torch.Generator().manual_seed(n)
        yield "noise", torch.randn(n, generator=made)
        yield "ties", torch.randint(-2, 3, (n,), generator=made).float()
        yield "equal", torch.ones(n)
        yield "zeros", torch.zeros(n)
        yield "nearly all zero", torch.where(torch.rand(n, generator=made) < 0.001, 1.0, 0.0)
        yield "sorted", torch.arange(n).float()
        yield "reversed", -torch.arange(n).float().flip(0)
        # The sample sees every 64th value: here it sees none, or only, of the large ones.
        yield "hidden", torch.where(torch.arange(n) % 64 == 1, 5.0, 1.0) * torch.rand(n, generator=made)
        yield "shown", torch.where(torch.arange(n) % 64 == 0, 5.0, 1.0) * torch.rand(n, generator=made)
        some_nan = torch.randn(n, generator=made)
        some_nan[torch.randint(n, (20,), generator=made)] = math.nan
        some_nan[n // 2] = -math.inf
        yield "some NaN", some_nan
        yield "many NaN", torch.where(torch.rand(n, generator=made) < 0.3, math.nan, 1.0)
        yield "all NaN", torch.full((n,), math.nan)


def test_largest_is_topk() -> None:
    for name, x in cases_for_largest():
        for k in {1, 7, len(x) // 100, len(x) // 4, len(x) // 2, len(x)} - {0}:
            places = largest_indices(x, k)
            assert places.dtype == torch.int64
            assert len(places) == k == len(places.unique()), name
            got = x[places].abs().sort().values
            expected = x.abs().topk(k).values.sort().values
            assert torch.equal(got.nan_to_num(-1), expected.nan_to_num(-1)), (name, len(x), k)


# Laying out bytes.


@given(rows=st.integers(1, 4), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_packed_bits_are_unpacked_unchanged(rows: int, count: int, seed: int) -> None:
    bits = torch.rand(rows, 8 * count, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(bits)
    assert packed.tolist() == [
        [sum(bit << i for i, bit in enumerate(row[b : b + 8])) for b in range(0, len(row), 8)]
        for row in bits.int().tolist()
    ]
    assert torch.equal(pack_bits_by_torch(bits), packed)
    assert pack_bits_by_torch(bits).dtype == packed.dtype == torch.uint8
    for unpack in (unpack_bits, unpack_bits_by_torch):
        assert unpack(packed).dtype == torch.uint8
        assert torch.equal(unpack(packed).bool(), bits)


@given(rows=st.integers(1, 3), count=st.integers(1, 9), scales=st.integers(1, 5))
def test_join_and_split(rows: int, count: int, scales: int) -> None:
    parts = torch.arange(rows * count).view(rows, count).to(torch.uint8), torch.rand(rows, scales)
    joined = join_scales(*parts)
    assert joined.shape == (rows, count + 4 * scales)
    again = split_scales(joined, count, scales)
    assert torch.equal(again[0], parts[0])
    assert torch.equal(again[1], parts[1])


def test_orthonormal_spans_its_columns() -> None:
    made = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    basis = orthonormal_basis(made)
    torch.testing.assert_close(basis @ (basis.T @ made), made)
    assert basis.T.is_contiguous()
