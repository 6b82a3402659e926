"""The precision in which the networks of named runs compute: bfloat16 if the device multiplies it, else float32.

A processor without instructions for bfloat16 can compute in bfloat16, but about ten times more slowly than in float32.
"""

from __future__ import annotations

import torch
from torch import nn


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply matrices of bfloat16 numbers.

    A GPU with CUDA has them from compute capability 8.0 on, a CPU has them with AMX or AVX512-BF16. For other devices,
    and for a CPU whose instructions an old PyTorch does not report, the answer is False.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return bool(known.get("amx_bf16") or known.get("avx512_bf16"))
    return False


def fastest(device: torch.device) -> torch.dtype:
    """The fastest precision on the device: torch.bfloat16 if the device multiplies it, else torch.float32."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def name_of(model: nn.Module) -> str:
    """The precision in which a model's networks compute, as a record names it: "bfloat16" or "float32"."""
    found = {getattr(module, "precision", torch.float32) for module in model.modules()}
    return "bfloat16" if torch.bfloat16 in found else "float32"
