"""Which parameters' gradients can be exchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdtrain.compression.spec import Spec, layer_contains
from hvdtrain.exchange.partition import NamedParameters
from hvdtrain.system.errors import UserError

# Types whose gradients are summed as they are; bfloat16 travels as float32, so that its sums are rounded once.
WIRE_DTYPES = {torch.float16: torch.float16, torch.float32: torch.float32, torch.float64: torch.float64}
SUPPORTED_DTYPES = (*WIRE_DTYPES, torch.bfloat16, torch.complex64, torch.complex128)


def check_parameters(named: NamedParameters, spec: Spec) -> None:
    """Raise UserError if a layer of the spec matches no parameter, or a parameter's type cannot be exchanged."""
    check_layers(spec, [name for name, _ in named])
    for name, p in named:
        check_dtype(name, p)


def check_layers(spec: Spec, names: Sequence[str]) -> None:
    """Raise UserError if a layer of the spec matches none of these names of parameters."""
    for layer in spec.layers:
        if not any(layer_contains(layer, name) for name in names):
            known = ", ".join(sorted({name.rpartition(".")[0] or name for name in names}))
            raise UserError(f"compression {spec.text!r}: there is no parameter or module {layer!r}; there are: {known}")


def check_dtype(name: str, p: torch.nn.Parameter) -> None:
    """Raise UserError if the parameter requires a gradient and that has a type that cannot be exchanged."""
    if p.requires_grad and p.dtype not in SUPPORTED_DTYPES:
        raise UserError(
            f"parameter {name} is {p.dtype}, whose gradient cannot be exchanged; expected float16, bfloat16, float32, "
            "float64, complex64 or complex128: convert it, or freeze it with requires_grad_(False)"
        )
