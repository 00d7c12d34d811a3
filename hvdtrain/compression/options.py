"""The run options of gradient compression."""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.recipe.options import option


def _describe_compression() -> str:
    from hvdtrain.compression.registry import describe_methods  # with which torch comes

    return describe_methods()


@dataclass(kw_only=True)
class CompressionOptions:
    """What is sent instead of the gradients."""

    spec: str = option("none", _describe_compression, name="compression")
