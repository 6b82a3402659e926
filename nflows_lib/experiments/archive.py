"""Records: the files that finished runs and experiments leave, with the commit, versions and hardware behind them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nflows_lib import settings

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]  # the checkout's root
MODEL, RECORD, SAMPLES = "model.safetensors", "run.json", "samples.png"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # the suffixes of pictures that are written


def commit() -> str:
    """The checkout's commit, with "-dirty" if files have been changed since; "unknown" outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def origin() -> dict[str, Any]:
    """The origin of a result that is made now: commit, versions, hardware.

    A long run asks for its origin when it starts: when it ends, the checkout may have moved on.
    """
    import torch  # not at the top, since reading a record should not wait for torch

    return {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": _hardware(settings.device(prefer_gpu=True)),
    }


def _hardware(device: torch.device) -> str:
    import torch

    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{threads} CPU thread" + "s" * (threads > 1)
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def print_origin(record: Mapping[str, Any]) -> None:
    """Print the command that made a record, its commit and its hardware."""
    print(f"{record['command']}\ncommit {record['commit']}, {record['hardware']}")


def folder(run: str) -> Path:
    """The folder of a shipped run, with its record ``run.json``, its samples and, if the model is small, the model."""
    return ROOT / "data" / "pretrained" / run


def work_folder(run: str) -> Path:
    """The folder in which a run is trained by default: next to the data sets, and ignored by git."""
    return settings.data_folder() / "runs" / run


def save(run: str, record: Mapping[str, Any], out: Path | None = None) -> None:
    """Write ``run.json``: the record together with the run's name, its seed and its :func:`origin`."""
    write_json((out or folder(run)) / RECORD, {"run": run, "seed": settings.seed(), **origin(), **record})


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file: a kill leaves the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The record in a JSON file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file does not hold a JSON object with these keys; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a record, got a file that is not JSON ({error})") from error
    missing = [key for key in keys if key not in content] if isinstance(content, dict) else ["a JSON object"]
    if missing:
        raise ValueError(f"{path}: expected a record, got a file without {', '.join(missing)}")
    return content


def is_recorded(run: str) -> bool:
    """Whether a record of the run is shipped."""
    return (folder(run) / RECORD).exists()


def load(run: str, *keys: str) -> dict[str, Any]:
    """The record of a shipped run, which must have these keys.

    Raises:
        ValueError: if no record of the run is shipped, or if its file is broken.
    """
    path = folder(run) / RECORD
    if not is_recorded(run):
        known = sorted(p.parent.name for p in path.parent.parent.glob(f"*/{RECORD}"))
        raise ValueError(f"run: expected one of {', '.join(known) or '(no record yet)'}, got {run!r}")
    return read_json(path, *keys)


def load_seeds(run: str) -> list[dict[str, Any]]:
    """The records of a shipped run: ``run.json``, then those with other seeds, ``run-seed-1.json`` and so on.

    Raises:
        ValueError: if no record of the run is shipped, or if a file is broken.
    """
    return [load(run), *(read_json(path) for path in sorted(folder(run).glob("run-seed-*.json")))]
