"""Latents on the wire: tensors to messages and back."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from broker.messages import Latent

_STORED: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
}


class MisshapenLatent(ValueError):
    """A latent's bytes do not fit its shape, or its shape not the model."""


def pack(tensor: Tensor, dtype: Literal["float16", "bfloat16", "float32"], *, least_bytes: int = 0) -> Latent:
    """A tensor as ``dtype``, padded with zeros to ``least_bytes``."""
    value = tensor.detach().cpu().contiguous().to(getattr(torch, dtype))
    array = (value.view(torch.uint16) if dtype == "bfloat16" else value).numpy().astype(_STORED[dtype], copy=False)
    data = memoryview(array.tobytes())
    padding = memoryview(bytes(max(0, least_bytes - len(data))))
    return Latent(dtype=dtype, shape=tuple(tensor.shape), data=data, padding=padding)


def unpack(latent: Latent, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor of a latent that must have ``shape``; raises ``MisshapenLatent``."""
    stored = _STORED[latent.dtype]
    wanted = int(np.prod(latent.shape)) * stored.itemsize
    if latent.shape != shape:
        raise MisshapenLatent(f"a latent of shape {latent.shape} came, the model works on {shape}")
    if len(latent.data) != wanted:
        raise MisshapenLatent(f"a {latent.dtype} latent of shape {shape} has {wanted} bytes, not {len(latent.data)}")
    # The view into the payload is read-only and unaligned: copy before torch sees it.
    value = torch.from_numpy(np.frombuffer(latent.data, dtype=stored).copy())
    if latent.dtype == "bfloat16":
        value = value.view(torch.bfloat16)
    return value.float().reshape(shape)
