"""Processes that are forked from one process which has imported the slow packages already.

A test of a process of its own takes little longer than its work, if the process does not first import PyTorch, the part
of PyTorch that compiles (every optimizer imports it), scikit-learn and Matplotlib. The fork server of
``multiprocessing`` imports them once per pytest worker. It imports nothing of this project.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

IMPORTED = ["torch._dynamo", "sklearn.datasets", "matplotlib.pyplot", "ipykernel.kernelapp"]


def context() -> ForkServerContext:
    """The context of processes that find the slow packages imported, those that this machine has."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(IMPORTED)
    return forking


def search_path(environment: dict[str, str]) -> list[str]:
    """Where a new Python with this environment looks for modules, after its own folder."""
    ask = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    return subprocess.run(ask, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def run_code(code: str, environment: dict[str, str], path: list[str], said: Path) -> None:
    """Do what ``python -c CODE`` does in the root folder, and write to a file what it prints."""
    os.chdir("/")
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = ["", *path]
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    exec(code, {"__name__": "__main__"})
