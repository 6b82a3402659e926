"""The library's command line as a function for a process that a test starts.

The function has a file of its own, since a forked process imports the file of its function.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path


def run(words: list[str], said: Path) -> None:
    """Run ``python -m nflows_lib`` with these words, and write its stderr to a file."""
    sys.argv[1:] = words
    with open(said, "w", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        runpy.run_module("nflows_lib", run_name="__main__")
