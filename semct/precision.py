"""In what numbers a device computes fast."""

from __future__ import annotations

import torch


def fast_type(device: str) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, else float32."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("amx_bf16") or able.get("avx512_bf16") else torch.float32


def mixed(device: str) -> torch.autocast:
    """A context in which matrices are multiplied in bfloat16, where that is faster than in float32."""
    return torch.autocast(device, torch.bfloat16, enabled=fast_type(device) is torch.bfloat16)
