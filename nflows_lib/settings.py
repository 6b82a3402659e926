"""The environment variables that control the chapters and the library, read in one place."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

if TYPE_CHECKING:
    import torch


def preset() -> str:
    """Return ``NFLOWS_PRESET``: "quick" (the default) or "full".

    "quick" means embedded data and minutes on a CPU, "full" means the data and the model of the paper.

    Raises:
        ValueError: if the variable has another value.
    """
    value = os.environ.get("NFLOWS_PRESET", "quick")
    if value not in ("quick", "full"):
        raise ValueError(f'NFLOWS_PRESET: expected "quick" or "full", got {value!r}')
    return value


def seed(offset: int = 0) -> int:
    """Return the seed of one experiment: its own number plus 1000 times ``NFLOWS_SEED`` (0 by default).

    Raises:
        ValueError: if the variable is not a whole number from 0 on.
    """
    value = os.environ.get("NFLOWS_SEED", "0")
    if not value.isdecimal():
        raise ValueError(f"NFLOWS_SEED: expected a whole number from 0 on, got {value!r}")
    return 1000 * int(value) + offset


def device(prefer_gpu: bool | None = None) -> torch.device:
    """Return ``NFLOWS_DEVICE``, "cuda", "mps" or "cpu": the device on which chapters and runs compute.

    If the device is CUDA, convolutions of float32 numbers are computed in float32 from then on. By PyTorch's default
    they are computed in TF32, whose mantissa of 10 bits is too coarse for a round trip.

    Args:
        prefer_gpu: whether CUDA is taken if the variable is not set and PyTorch finds a GPU. None: only for the full
            preset.

    Raises:
        ValueError: if the variable names another device, or one that PyTorch does not find.
    """
    import torch  # imported here: reading the other settings should not wait for it

    gpus = [name for name in ("cuda", "mps") if torch.get_device_module(name).is_available()]
    prefer_gpu = preset() == "full" if prefer_gpu is None else prefer_gpu
    value = os.environ.get("NFLOWS_DEVICE", "cuda" if prefer_gpu and "cuda" in gpus else "cpu")
    if value not in [*gpus, "cpu"]:
        expected = " or ".join(f'"{name}"' for name in [*gpus, "cpu"])
        raise ValueError(f"NFLOWS_DEVICE: expected {expected}, a device that PyTorch finds here, got {value!r}")
    if value == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(value)


def data_folder() -> Path:
    """Return ``NFLOWS_DATA``: the folder of the downloaded data sets, by default ``data/`` next to the library."""
    return Path(os.environ.get("NFLOWS_DATA", Path(__file__).resolve().parent.parent / "data"))


def progress() -> bool:
    """Return whether progress bars are shown. ``NFLOWS_PROGRESS=0`` hides them from notebooks with stored outputs."""
    return os.environ.get("NFLOWS_PROGRESS", "1") != "0"


def progress_bar(total: int | None, unit: int, initial: int = 0, shown: bool = True, delay: float = 0) -> tqdm:
    """Return a bar that shows images per second, if :func:`progress` allows it.

    In a log file it writes one line every half minute.

    Args:
        total: number of units until the end, or None if it is not known.
        unit: number of images per unit.
        initial: number of units that are done already.
        shown: False hides the bar.
        delay: seconds until the bar appears.
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
