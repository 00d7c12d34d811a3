"""Compressors register themselves: what `auto`, `bench compression` and the help take from the registry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hvdtrain.compression import registry
from hvdtrain.compression.arguments import Choice, Fraction, PositiveInteger
from hvdtrain.compression.codec import BucketContext, Codec, Collective, RandomKey
from hvdtrain.compression.registry import COMPRESSORS, auto_candidates, default_specs, describe_methods
from hvdtrain.compression.spec import parse_compression
from hvdtrain.system.errors import UserError
from tests.support.distributions import write_distribution


class Doubles(Codec):
    collective = Collective.ALL_GATHER

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        return x.double()

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        return payload.float()


def test_hvdtrains_own_compressors() -> None:
    own = ["bf16", "fp16", "int8", "onebit", "powersgd:4", "qsgd:4bit", "randomk:0.25", "topk:0.01"]
    assert default_specs() == own
    assert auto_candidates() == ["fp16", "int8", "onebit", "powersgd:4", "topk:0.01"]
    text = describe_methods()
    assert all(spec in text for spec in own)
    assert "topk:0.01 (fraction of the values that is sent)" in text


@pytest.mark.parametrize(
    "spec", ["fp16", "bf16", "int8", "onebit", "powersgd:4", "qsgd:4bit", "randomk:0.25", "topk:1"]
)
def test_every_codec_is_made_for_a_bucket(spec: str) -> None:
    parsed = parse_compression(spec)
    found = COMPRESSORS.get(parsed.method)
    value = found.argument.parse(parsed.argument) if found.argument is not None else None
    context = BucketContext(value, None, [(8, 4)], RandomKey(0, 0, 0, 0), torch.device("cpu"))
    codec = found.codec.for_bucket(context)
    assert isinstance(codec.collective, Collective) and isinstance(codec.feedback, bool)
    assert (found.dense_steps == 100) == (parsed.method in ("topk", "randomk", "powersgd"))


def test_another_distribution_that_does_not_load_leaves_the_help_and_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, site = tmp_path / "broken_one.py", tmp_path / "site"
    module.write_text("import no_such_module\n")
    site.mkdir()
    write_distribution(site, module, {"hvdtrain.compressors:broken": "Broken"})
    monkeypatch.syspath_prepend(str(site))
    assert "broken (cannot be loaded)" in describe_methods()
    assert parse_compression("int8").method == "int8"
    with pytest.raises(UserError, match="the compressor 'broken' of broken_one cannot be loaded"):
        parse_compression("broken:3")


def test_a_codec_adds_its_decoded_payload_by_default() -> None:
    key, x = RandomKey(0, 0, 0, 0), torch.arange(4.0)
    payload, total = Doubles().encode(x, key), torch.ones(4)
    Doubles().add_decoded(total, payload, key, alpha=-2)
    assert torch.equal(total, 1 - 2 * x)
    Doubles().add_decoded(total, payload, key, alpha=3, fresh=True)
    assert torch.equal(total, 3 * x)


def test_a_name_is_registered_once() -> None:
    COMPRESSORS.names()
    with pytest.raises(ValueError, match="two components are registered as the compressor 'int8'"):
        registry.compressor("int8")(Doubles)


def test_arguments_are_parsed_or_refused_with_what_was_expected() -> None:
    width = Choice("width", "bits", {"two": 2, "four": 4, "eight": 8}, default="four")
    assert width.parse("two") == 2 and width.default_text == "four"
    assert Fraction("part", default=0.25).parse("1e-3") == 0.001
    assert PositiveInteger("rank", "of factors", default=4).parse("12") == 12
    with pytest.raises(ValueError, match="'six' is not a valid width; expected two, four or eight"):
        width.parse("six")
