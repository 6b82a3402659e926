"""The environment variables that a chapter and the library obey, read in one place."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

if TYPE_CHECKING:
    import torch


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


def device(prefer_gpu: bool | None = None) -> torch.device:
    """``NFLOWS_DEVICE``: "cuda", "mps" or "cpu", where a chapter's flows and data and a run are computed.

    Where it is CUDA, convolutions of float32 numbers are from then on computed in float32. By PyTorch's default they
    are computed in TF32, with 10 bits behind the point, which is too coarse for a round trip.

    Args:
        prefer_gpu: whether CUDA is taken if the variable is not set and PyTorch finds a GPU. None: for the full preset.

    Raises:
        ValueError: the variable names another device, or one that PyTorch does not find.
    """
    import torch  # not at the top: the other settings are read without a wait for it

    gpus = [name for name in ("cuda", "mps") if torch.get_device_module(name).is_available()]
    prefer_gpu = preset() == "full" if prefer_gpu is None else prefer_gpu
    value = os.environ.get("NFLOWS_DEVICE", "cuda" if prefer_gpu and "cuda" in gpus else "cpu")
    if value not in [*gpus, "cpu"]:
        expected = " or ".join(f'"{name}"' for name in [*gpus, "cpu"])
        raise ValueError(f"NFLOWS_DEVICE: expected {expected}, what PyTorch finds here, got {value!r}")
    if value == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(value)


def data_folder() -> Path:
    """``NFLOWS_DATA``: the folder that holds downloaded data sets, ``data/`` beside the library by default."""
    return Path(os.environ.get("NFLOWS_DATA", Path(__file__).resolve().parent.parent / "data"))


def progress() -> bool:
    """``NFLOWS_PROGRESS``: 0 turns progress bars off, as for notebooks whose output is stored."""
    return os.environ.get("NFLOWS_PROGRESS", "1") != "0"


def progress_bar(total: int | None, unit: int, initial: int = 0, shown: bool = True, delay: float = 0) -> tqdm:
    """A bar that counts units of so many images and shows images per second, if :func:`progress` lets it.

    In a log file it writes a line every half minute. Nothing is shown of what ends within ``delay`` seconds.
    """
    return tqdm(
        total=total,
        initial=initial,
        unit=" images",
        unit_scale=unit,
        disable=not (shown and progress()),
        leave=False,
        delay=delay,
        mininterval=0.5 if sys.stderr.isatty() or "ipykernel" in sys.modules else 30.0,
    )
