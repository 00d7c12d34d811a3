"""Which GPU a device of torch is, for whatever reads its state (hvdtrain.system.gpu)."""

from __future__ import annotations

import torch


def find_gpu_uuid(device: torch.device) -> str | None:
    """Return the UUID of an NVIDIA GPU, as its driver writes it; None for any other device.

    The number of a device is not what the driver counts: CUDA_VISIBLE_DEVICES selects and reorders GPUs.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
