"""Processes that are forked from one process which has imported the slow packages already.

A test of a process of its own takes little longer than its work, if the process does not first import PyTorch, the part
of PyTorch that compiles (every optimizer imports it), scikit-learn and Matplotlib. The fork server of
``multiprocessing`` imports them once per pytest worker. It imports nothing of this project.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

IMPORTED = ["torch._dynamo", "sklearn.datasets", "matplotlib.pyplot", "ipykernel.kernelapp"]


def context() -> ForkServerContext:
    """The context of processes that find the slow packages imported, those that this machine has."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(IMPORTED)
    return forking
