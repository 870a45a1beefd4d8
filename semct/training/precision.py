"""In what numbers a device multiplies fast."""

from __future__ import annotations

import torch


def mixed(device: str) -> torch.autocast:
    """A context in which matrices are multiplied in bfloat16, where hardware does that: else float32 is faster."""
    able = torch.cpu.get_capabilities()
    fast = torch.device(device).type != "cpu" or able.get("amx_bf16") or able.get("avx512_bf16")
    return torch.autocast(device, torch.bfloat16, enabled=bool(fast))
