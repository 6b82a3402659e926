"""The executable claims of a chapter."""

from __future__ import annotations

import numpy as np
import torch


def check(claim: str, holds: bool | np.bool_ | torch.Tensor) -> None:
    """Print the claim with a tick if it holds; if not, raise an error.

    Args:
        claim: a whole sentence that can be false.
        holds: whether the claim holds, one truth value.

    Raises:
        AssertionError: if the claim does not hold; the message is the claim.
        ValueError: if ``holds`` is not a single truth value. A non-empty list or a function would count as true.

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
