"""Tensors of a network by name, and the layers that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional


class Weights:
    """Tensors by name. A layer is asked for by its name: the ``weight`` below it, and the ``bias`` if it has one."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @classmethod
    def read(cls, path: Path, *, below: str = "", dtype: torch.dtype = torch.float32) -> Self:
        """The tensors of a safetensors file whose names begin with ``below``, as ``dtype``.

        Those that are of this type already are mapped from the file: processes share them.
        Raises ``OSError`` and ``safetensors.SafetensorError`` where there is no such file.
        """
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(below)]  # noqa: SIM118 (it is no mapping)
            return cls({name: file.get_tensor(name).to(dtype) for name in names})

    def to(self, device: str) -> Weights:
        """The same on a torch device."""
        return Weights({name: tensor.to(device) for name, tensor in self._tensors.items()})

    def below(self, prefix: str) -> Weights:
        """The tensors below a prefix, by the rest of their names."""
        return Weights(
            {name.removeprefix(prefix): tensor for name, tensor in self._tensors.items() if name.startswith(prefix)}
        )

    def __getitem__(self, name: str) -> Tensor:
        """One of them; raises ``ValueError`` where there is none of that name."""
        if name not in self._tensors:
            raise ValueError(f"its weights lack {name}")
        return self._tensors[name]

    def linear(self, layer: str, x: Tensor) -> Tensor:
        """A linear layer."""
        return functional.linear(x, self[f"{layer}.weight"], self._tensors.get(f"{layer}.bias"))

    def convolution(self, layer: str, x: Tensor, *, padding: int = 0) -> Tensor:
        """A convolution with stride 1."""
        return functional.conv2d(x, self[f"{layer}.weight"], self._tensors.get(f"{layer}.bias"), padding=padding)

    def layer_norm(self, layer: str, x: Tensor, *, eps: float) -> Tensor:
        """A layer normalisation with scale and shift."""
        weight = self[f"{layer}.weight"]
        return functional.layer_norm(x, weight.shape, weight, self[f"{layer}.bias"], eps)

    def rms_norm(self, layer: str, x: Tensor, *, eps: float) -> Tensor:
        """A root mean square normalisation with scale, its mean in float32."""
        weight = self[f"{layer}.weight"]
        unit = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return unit.to(weight.dtype) * weight
