"""What a process that a test starts runs: the library's command line.

It stands in a file of its own, since a process that is forked imports the file of its function.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
from pathlib import Path


def run(words: list[str], said: Path) -> None:
    """Do what ``python -m nflows_lib`` does with these words; a file gets what it says on stderr."""
    sys.argv[1:] = words
    with open(said, "w", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        runpy.run_module("nflows_lib", run_name="__main__")
