"""The definition of an ablation: a question, and the variants that answer it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ablation:
    """A question, and the variants that answer it.

    question: the question, as the record holds it.
    seeds: the seeds with which every variant runs.
    arms: by each variant's name, a function that takes a seed, runs the variant and returns its measures.
    """

    question: str
    seeds: tuple[int, ...]
    arms: dict[str, Callable[[int], dict[str, Any]]]
