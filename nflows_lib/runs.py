"""Records of full-scale runs: what was run, where, and what came out, kept in ``data/pretrained/<run>/``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from nflows_lib import settings

ROOT = Path(__file__).resolve().parent.parent


def _commit() -> str:
    """The checkout's commit, with "-dirty" where files were changed since; "unknown" outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


COMMIT = _commit()  # on import: by the end of a long run the checkout may have moved on


def folder(run: str) -> Path:
    """Where the record of a named run lies: ``run.json`` and the pictures beside it."""
    return ROOT / "data" / "pretrained" / run


def save(run: str, record: dict[str, Any]) -> None:
    """Write ``run.json``: the record, and beside it the commit, the versions, the hardware and the seed.

    The file appears whole or not at all.
    """
    described = {
        "run": run,
        "commit": COMMIT,
        "seed": settings.seed(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        **record,
    }
    target = folder(run) / "run.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(described, indent=1) + "\n")
    os.replace(partial, target)


def load(run: str) -> dict[str, Any]:
    """The record of a named run.

    Raises:
        ValueError: there is none.
    """
    path = folder(run) / "run.json"
    if not path.exists():
        known = sorted(p.parent.name for p in path.parent.parent.glob("*/run.json"))
        raise ValueError(f"run: expected one of {', '.join(known) or '(no record yet)'}, got {run!r}")
    return json.loads(path.read_text())
