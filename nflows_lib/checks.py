"""The executable claims of a chapter, and the checks of arguments that the whole library shares."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor


def check(claim: str, holds: bool | np.bool_ | Tensor) -> None:
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
        isinstance(holds, Tensor) and holds.dtype == torch.bool and holds.numel() == 1
    )
    if not single:
        raise ValueError(f"holds: expected one truth value, got {holds!r}")
    if not holds:
        raise AssertionError(f"✗ {claim}")
    print(f"✓ {claim}")


# --- arguments --------------------------------------------------------------------------------------------------------


def check_at_least(least: int, why: str = "", /, **numbers: int) -> None:
    """Raise a ValueError with the number's name unless each number is a whole number of at least ``least``.

    Args:
        least: the smallest number that is allowed.
        why: what the error adds to the words "expected at least 2".
        numbers: the numbers, by the names that the error calls them.
    """
    for name, number in numbers.items():
        if not isinstance(number, Integral):
            raise ValueError(f"{name}: expected a whole number, got {number!r}")
        if number < least:
            raise ValueError(f"{name}: expected at least {least}{why}, got {number}")


def is_number(value: object) -> bool:
    """Return whether a value is a finite real number."""
    return isinstance(value, Real) and math.isfinite(value)


def is_shape(value: object, *lengths: int) -> bool:
    """Return whether a value is a sequence of whole numbers of at least 1, and of one of the given lengths, if any."""
    whole = isinstance(value, Sequence) and all(isinstance(size, Integral) and size > 0 for size in value)
    return whole and (not lengths or len(value) in lengths)


def check_tensor(name: str, x: object) -> None:
    """Raise a ValueError unless x is a tensor; name is what the error calls it."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {'None' if x is None else type(x).__name__}")


def check_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless x is a batch of examples of this shape, ``(B, *shape)``; None is refused, too.

    Args:
        name: what the error calls x.
        x: the batch, or None if it is missing.
        shape: shape of one example.
    """
    if x is not None:
        check_tensor(name, x)
    if x is None or x.dim() == 0 or tuple(x.shape[1:]) != tuple(shape):
        expected = ", ".join(["B", *map(str, shape)])
        raise ValueError(f"{name}: expected shape ({expected}), got {None if x is None else tuple(x.shape)}")
