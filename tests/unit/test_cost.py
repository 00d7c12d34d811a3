"""The model of a step: what it must say where the answer is plain, and what it never may."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.comm.network_model import NetworkModel, fit_line
from hvdtrain.compression.cost_model import BucketCost, predict_step_time

NETWORK = NetworkModel(ranks=2, latency=0.5, bandwidth=10.0)


def cost(wire: int, encode: float = 0, decode: float = 0, rounds: int = 1) -> BucketCost:
    return BucketCost("some", encode, decode, wire, rounds)


def test_nothing_to_exchange() -> None:
    assert predict_step_time([], 3.0, [], NETWORK) == 3.0


def test_one_bucket_that_is_ready_last() -> None:
    # Encoded for 1 s, under way for 0.5 + 20 / 10, decoded for 2.
    assert predict_step_time([3.0], 3.0, [cost(20, encode=1, decode=2)], NETWORK) == pytest.approx(3 + 1 + 2.5 + 2)


def test_a_bucket_hidden_behind_the_backward_pass() -> None:
    assert predict_step_time([1.0], 9.0, [cost(20)], NETWORK) == 9.0


def test_buckets_queue_for_the_network() -> None:
    # The first is served from 1 to 3.5, the second waits for it and is served from 3.5 to 5.
    assert predict_step_time([1.0, 2.0], 2.0, [cost(20), cost(10)], NETWORK) == pytest.approx(5.0)


def test_encoding_delays_all_that_comes_after_it() -> None:
    # Encoded from 1 to 3; what was to be ready at 2 is at 4, and under way until 5.5; the first arrived at 4.5.
    costs = [cost(10, encode=2), cost(5)]
    assert predict_step_time([1.0, 2.0], 2.0, costs, NETWORK) == pytest.approx(4.5 + 1.0)
    assert predict_step_time([1.0, 20.0], 20.0, costs, NETWORK) == pytest.approx(20 + 2 + 1.0)


def test_decoding_overlaps_with_later_collectives() -> None:
    # Arrived at 2.5 and 5; decoded from 2.5 to 3.5 and from 5 to 6.
    assert predict_step_time([0.0, 0.0], 0.0, [cost(20, decode=1), cost(20, decode=1)], NETWORK) == pytest.approx(6.0)


def test_second_rounds_come_after_all_first_ones() -> None:
    # First rounds of 1.5 s until 1.5 and 3; half of the decoding until 2.5 and 4; second rounds from 3 (the network
    # was busy) to 4.5 and to 6; the rest of the decoding until 5.5 and 7.
    costs = [cost(20, decode=2, rounds=2), cost(20, decode=2, rounds=2)]
    assert predict_step_time([0.0, 0.0], 0.0, costs, NETWORK) == pytest.approx(7.0)


def test_buckets_that_are_ready_in_another_order() -> None:
    assert predict_step_time([2.0, 0.0], 2.0, [cost(10), cost(20)], NETWORK) == pytest.approx(4.0)


def test_free_network_leaves_only_encoding_and_decoding() -> None:
    free = NetworkModel(1, 0.0, math.inf)
    assert predict_step_time([1.0], 2.0, [cost(0, encode=0.5, decode=0.25)], free) == pytest.approx(2.75)


seconds = st.floats(0, 100, allow_nan=False)
buckets = st.lists(
    st.tuples(
        seconds,
        st.builds(BucketCost, st.just("some"), seconds, seconds, st.integers(0, 10**9), st.sampled_from([1, 2])),
    ),
    max_size=6,
)


@given(buckets, seconds, st.floats(0, 1), st.floats(1e3, 1e12))
def test_never_less_than_the_computing_nor_than_the_network_takes(
    drawn: list[tuple[float, BucketCost]], end: float, latency: float, bandwidth: float
) -> None:
    ready, costs = [at for at, _ in drawn], [each for _, each in drawn]
    network = NetworkModel(2, latency, bandwidth)
    predicted = predict_step_time(ready, end, costs, network)
    computing = end + sum(each.encode_seconds + each.decode_seconds for each in costs)
    serving = sum(each.rounds * latency + each.wire_bytes / bandwidth for each in costs)
    assert predicted >= max(computing, serving) * (1 - 1e-9)
    # And never more than one after the other.
    assert predicted <= (max([end, *ready]) + computing - end + serving) * (1 + 1e-9) + 1e-9
    # A faster network is never slower.
    assert predict_step_time(ready, end, costs, NetworkModel(2, latency, bandwidth * 2)) <= predicted * (1 + 1e-9)


def test_latency_and_bandwidth_are_fitted_to_two_sizes() -> None:
    assert fit_line([1000, 11_000], [0.002, 0.003]) == pytest.approx((0.0019, 1e7))
    # Noise: no slope, and yet no network without end.
    assert fit_line([1000, 11_000], [0.003, 0.002]) == pytest.approx((0.00298, 5e7))
