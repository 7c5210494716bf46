"""What a lens was fitted on: one digest for all of a model's parameters."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_digest(model: nn.Module) -> str:
    """Hex SHA-256 over the name, dtype, shape and bytes of every parameter, in the order of their names.

    The same weights on another device, or compiled, have the same digest; any changed bit has another.
    """
    whole = hashlib.sha256()
    for name, p in sorted(model.named_parameters(remove_duplicate=False)):
        whole.update(f"{name} {p.dtype} {list(p.shape)}\n".encode())
        whole.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
