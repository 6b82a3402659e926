"""A chapter's executable claims."""

from __future__ import annotations

import numpy as np
import torch


def check(claim: str, holds: bool | np.bool_ | torch.Tensor) -> None:
    """Print the claim with a tick if it holds, raise an AssertionError with the claim if not.

    Raises:
        ValueError: ``holds`` is no single truth value: a number, a list or a function would pass unnoticed.

    >>> check("two and two make four", 2 + 2 == 4)
    ✓ two and two make four
    """
    single = isinstance(holds, bool | np.bool_) or (
        isinstance(holds, torch.Tensor) and holds.dtype == torch.bool and holds.numel() == 1
    )
    if not single:
        raise ValueError(f"holds: expected one truth value, got {holds!r}")
    if not holds:
        raise AssertionError(f"✗ {claim}")
    print(f"✓ {claim}")
