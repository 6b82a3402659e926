"""The environment variables that a chapter and the library obey, read in one place."""

from __future__ import annotations

import os
from pathlib import Path


def preset() -> str:
    """``NFLOWS_PRESET``: "quick" (the default: embedded data, minutes on a CPU) or "full" (the paper's data, size)."""
    value = os.environ.get("NFLOWS_PRESET", "quick")
    if value not in ("quick", "full"):
        raise ValueError(f'NFLOWS_PRESET: expected "quick" or "full", got {value!r}')
    return value


def seed(offset: int = 0) -> int:
    """A seed for one experiment: its own number, shifted by 1000 times ``NFLOWS_SEED`` (0 by default)."""
    value = os.environ.get("NFLOWS_SEED", "0")
    if not value.isdecimal():
        raise ValueError(f"NFLOWS_SEED: expected a whole number from 0 on, got {value!r}")
    return 1000 * int(value) + offset


def data_folder() -> Path:
    """``NFLOWS_DATA``: the folder that holds downloaded data sets, ``data/`` beside the library by default."""
    return Path(os.environ.get("NFLOWS_DATA", Path(__file__).resolve().parent.parent / "data"))


def progress() -> bool:
    """``NFLOWS_PROGRESS``: 0 turns progress bars off, as for notebooks whose output is stored."""
    return os.environ.get("NFLOWS_PROGRESS", "1") != "0"
