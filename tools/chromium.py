"""Where the browser is. The tools that print or draw with it, and the tests, ask this module, which needs no package."""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = "no Chromium on this machine (on Debian: apt-get install chromium)"
ARGUMENTS = ["--no-sandbox", "--disable-gpu"]


def find() -> str | None:
    """The path of the browser: the one that the environment names, or else the first usual name that is found.

    Raises:
        ValueError: the environment variable CHROMIUM names no program.
    """
    if wanted := os.environ.get("CHROMIUM"):
        if found := shutil.which(wanted):
            return found
        raise ValueError(f"the environment variable CHROMIUM is {wanted!r}, which is no program")
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def require() -> str:
    """The path of the browser; a program that needs one ends with one line where none is found."""
    try:
        path = find()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if path is None:
        raise SystemExit(f"There is {MISSING}. The environment variable CHROMIUM can name another path.")
    return path
