"""A chapter's executable claims."""

from __future__ import annotations


def check(claim: str, holds: object) -> None:
    """Print the claim with a tick if it holds, raise an AssertionError with the claim if not.

    >>> check("two and two make four", 2 + 2 == 4)
    ✓ two and two make four
    """
    if not bool(holds):
        raise AssertionError(f"✗ {claim}")
    print(f"✓ {claim}")
