"""`--compression` as text: what it means, and the words for what is wrong in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.compression.codec import RandomKey
from hvdtrain.compression.registry import COMPRESSORS
from hvdtrain.compression.spec import Spec, make_codec, parse_compression
from hvdtrain.system.errors import UserError

KEY = RandomKey(0, 0, 0, 0)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Spec("none", "none", "")),
        ("fp16", Spec("fp16", "fp16", "")),
        ("qsgd", Spec("qsgd", "qsgd", "4bit")),
        ("qsgd:2bit", Spec("qsgd:2bit", "qsgd", "2bit")),
        ("topk", Spec("topk", "topk", "0.01", warmup=100)),
        ("topk:1", Spec("topk:1", "topk", "1", warmup=100)),
        ("randomk", Spec("randomk", "randomk", "0.25", warmup=100)),
        ("randomk:1e-3", Spec("randomk:1e-3", "randomk", "1e-3", warmup=100)),
        ("powersgd", Spec("powersgd", "powersgd", "4", warmup=100)),
        ("powersgd:2,warmup=100,min=0", Spec("powersgd:2,warmup=100,min=0", "powersgd", "2", warmup=100, min=0)),
        ("int8,feedback=off", Spec("int8,feedback=off", "int8", "", feedback=False)),
        ("bf16,feedback=on", Spec("bf16,feedback=on", "bf16", "", feedback=True)),
        ("topk,momentum=0.9", Spec("topk,momentum=0.9", "topk", "0.01", warmup=100, momentum=0.9)),
        ("onebit,momentum=0", Spec("onebit,momentum=0", "onebit", "")),
        (
            "powersgd:4,layer.fc=2,layer.fc.out=none",
            Spec(
                "powersgd:4,layer.fc=2,layer.fc.out=none",
                "powersgd",
                "4",
                warmup=100,
                layers={"fc": "2", "fc.out": "none"},
            ),
        ),
        ("int8,layer.x=none", Spec("int8,layer.x=none", "int8", "", layers={"x": "none"})),
    ],
)
def test_compression_text_is_parsed_to_its_spec(text: str, expected: Spec) -> None:
    assert parse_compression(text) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not a method; there are: auto, bf16, fp16, int8, none, onebit, powersgd, qsgd, randomk, topk"),
        ("int9", "'int9' is not a method; did you mean 'int8'?"),
        ("powersdg:4", "'powersdg' is not a method; did you mean 'powersgd'?"),
        ("TopK", "'TopK' is not a method; did you mean 'topk'?"),
        ("none:1", "none takes no argument"),
        ("fp16:", "fp16 takes no argument"),
        ("int8:8", "int8 takes no argument"),
        ("powersgd:0", "'0' is not a valid rank; expected an integer of at least 1"),
        ("powersgd:-1", "'-1' is not a valid rank; expected an integer of at least 1"),
        ("powersgd:1.5", "'1.5' is not a valid rank; expected an integer of at least 1"),
        ("powersgd:²", "'²' is not a valid rank; expected an integer of at least 1"),
        ("topk:2", "'2' is not a valid fraction; expected a number above 0, at most 1"),
        ("topk:0", "'0' is not a valid fraction; expected a number above 0, at most 1"),
        ("topk:nan", "'nan' is not a valid fraction; expected a number above 0, at most 1"),
        ("randomk:1%", "'1%' is not a valid fraction; expected a number above 0, at most 1"),
        ("qsgd:3bit", "'3bit' is not a valid bit width; expected 2bit, 4bit or 8bit"),
        ("qsgd:4", "'4' is not a valid bit width; expected 2bit, 4bit or 8bit"),
        ("topk,0.01", "'0.01' is not an option; expected KEY=VALUE"),
        ("topk,", "'' is not an option; expected KEY=VALUE"),
        ("topk,warmpu=3", "'warmpu' is not an option; did you mean 'warmup'?"),
        ("topk,xyz=3", "'xyz' is not an option; there are: feedback, layer.NAME, min, momentum, warmup"),
        ("topk,warmup=-1", "warmup is '-1'; expected an integer, not negative"),
        ("topk,warmup=1.5", "warmup is '1.5'; expected an integer, not negative"),
        ("topk,min=", "min is ''; expected an integer, not negative"),
        ("topk,momentum=-0.1", "momentum is '-0.1'; expected a number, not negative"),
        ("topk,momentum=x", "momentum is 'x'; expected a number, not negative"),
        ("topk,momentum=1", "momentum is 1; expected a value from 0 to below 1"),
        ("topk,momentum=nan", "momentum is nan; expected a value from 0 to below 1"),
        ("onebit,momentum=0.9", "onebit takes no momentum; expected topk"),
        ("topk,momentum=0.9,feedback=off", "momentum needs feedback"),
        ("topk,feedback=yes", "feedback is 'yes'; expected on or off"),
        ("topk,layer.fc=2", "'2' is not a valid fraction; expected a number above 0, at most 1"),
        ("powersgd,layer.fc=", "'' is not a valid rank; expected an integer of at least 1"),
        ("int8,layer.fc=4", "int8 takes no argument"),
    ],
)
def test_invalid_compression_text_is_refused_with_its_problem(text: str, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_compression(text)
    assert str(caught.value) == f"compression {text!r}: {problem}"


PIECES = ["topk", "powersgd", ":", ",", "=", "warmup", "layer.a", "0", "1", "-1", "none", "²"]


@given(st.text(max_size=30) | st.lists(st.sampled_from(PIECES)))
def test_any_text_is_parsed_or_a_users_mistake(text: str | list[str]) -> None:
    try:
        parse_compression("".join(text))
    except UserError as error:
        assert str(error).startswith("compression ")


def test_which_parameters_are_compressed() -> None:
    spec = parse_compression("powersgd:4,min=100,layer.head=2,layer.head.out=none,layer.norm=1")
    assert spec.argument_for("body.weight", 100, 2) == "4"
    assert spec.argument_for("body.weight", 99, 2) is None
    assert spec.argument_for("body.bias", 1000, 1) is None
    assert spec.argument_for("head.weight", 10, 2) == "2"
    assert spec.argument_for("head.out.weight", 1000, 2) is None
    assert spec.argument_for("norm.bias", 10, 1) == "1"
    assert parse_compression("none").argument_for("body.weight", 10**6, 2) is None
    # Nothing to send: no codec has to cope with it.
    assert parse_compression("int8,min=0").argument_for("empty", 0, 2) is None
    assert parse_compression("powersgd,layer.empty=2").argument_for("empty", 0, 2) is None


@pytest.mark.parametrize("method", COMPRESSORS.names())
def test_every_method_has_its_codec(method: str) -> None:
    spec = parse_compression(method)
    codec = make_codec(spec, spec.argument, [(8, 4)], KEY, CPU)
    assert type(codec).__name__.lower() == {"fp16": "cast", "bf16": "cast"}.get(method, method)
    assert codec.feedback == (method not in ("fp16", "bf16", "qsgd", "randomk"))
    assert spec.argument == COMPRESSORS.get(method).default_argument


def test_arguments_reach_the_codec() -> None:
    def made(text: str) -> object:
        return make_codec(parse_compression(text), parse_compression(text).argument, [(8, 4), (2, 6)], KEY, CPU)

    assert made("qsgd:8bit").bits == 8
    assert made("topk:0.5").ratio == made("randomk:0.5").ratio == 0.5
    assert made("powersgd:3").matrix_ranks == [3, 2]
    # What is not kept for later must be right in the mean.
    assert made("randomk").unbiased and made("randomk,feedback=off").unbiased
    assert not made("randomk,feedback=on").unbiased
