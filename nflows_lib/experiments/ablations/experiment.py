"""What an ablation is: a question, and the arms that answer it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ablation:
    """A question, and the arms that answer it: each takes a seed and returns its measures."""

    question: str
    seeds: tuple[int, ...]
    arms: dict[str, Callable[[int], dict[str, Any]]]
