"""Floating-point operations of the small networks, by the three functions that have all of them that matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_COUNTED: Mapping[Any, Callable[..., int]] = {
    functional.linear: lambda out, x, _weight, *_: 2 * out.numel() * x.shape[-1],
    functional.conv2d: lambda out, _x, weight, *_: 2 * out.numel() * weight[0].numel(),
    functional.scaled_dot_product_attention: lambda out, _query, key, *_: 4 * out.numel() * key.shape[-2],
}


class FlopCounter(TorchFunctionMode):
    """Counts while it lasts what torch's FlopCounterMode would, which imports torch's compiler: 70 MB and 2 s."""

    def __init__(self) -> None:
        super().__init__()
        self.total: int = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, and count it."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func in _COUNTED:
            self.total += _COUNTED[func](out, *args)
        return out
