"""The run options of gradient compression."""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.recipe.options import option


@dataclass(kw_only=True)
class CompressionOptions:
    """What is sent instead of the gradients."""

    spec: str = option(
        "none",
        "gradient compression: none, fp16, bf16, int8, onebit, qsgd:4bit, topk:0.01, randomk:0.25, powersgd:4; "
        "with options, e.g. powersgd:4,warmup=100,min=8192; auto: measured while training, none included",
        name="compression",
    )
