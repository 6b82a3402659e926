"""A flow of the reader's own, named on the command line as ``module:function`` or ``path/to/file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from nflows_lib.clinic.report import doctor

KINDS = "(flow, batch), (flow, batch, context) or (flow, batch, keywords)"


def flow_and_batch(target: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """Import a function, call it without arguments, and return the flow, the batch and the doctor's keywords.

    The module is searched for in the current folder first; a file may also import its neighbours.

    Args:
        target: ``module:function``, or ``path/to/file.py:function``.

    Raises:
        ValueError: if the target has no colon, the module cannot be imported or lacks the function, or the function is
            not callable, raises an error, or returns something else than a flow, a batch and what the doctor takes.
    """
    place, colon, name = target.rpartition(":")
    if not (place and colon and name):
        raise ValueError(f"target: expected module:function or path/to/file.py:function, got {target!r}")
    with _searched(Path(place).parent if place.endswith(".py") else Path()):
        module = _imported(place)
        function: Any = module
        for part in name.split("."):
            if not hasattr(function, part):
                raise ValueError(f"target: expected a function of {place}, which has nothing called {name!r}")
            function = getattr(function, part)
        if not callable(function):
            raise ValueError(f"target: expected a function, got {name!r} of {place}, of type {type(function).__name__}")
        try:
            returned = function()
        except (Exception, SystemExit) as error:
            raise ValueError(f"{target} raised {_said(error)}") from error
    return _sorted_out(target, returned)


def _imported(place: str) -> ModuleType:
    """The module of a name, or of a file."""
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.is_file():
            raise ValueError(f"target: expected a file that exists, got {place!r}")
        spec = importlib.util.spec_from_file_location(f"{path.stem} of the doctor", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses and pickles look for it
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        if isinstance(error, ValueError) and str(error).startswith("target: "):
            raise
        raise ValueError(f"{place} cannot be imported: {_said(error)}") from error


@contextmanager
def _searched(folder: Path) -> Iterator[None]:
    """A context in which modules are searched for in a folder first."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _said(error: BaseException) -> str:
    """The kind of an error and its message in one line, and the last line of the reader's own code on the way to it."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    library = Path(sysconfig.get_path("stdlib"))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not {"site-packages", "nflows_lib"} & {*path.parts} and library not in path.parents:
            return f"{words} ({path.name}, line {frame.lineno})"
    return words


def _sorted_out(target: str, returned: object) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The flow, the batch and the doctor's keywords from what the function has returned."""
    if not isinstance(returned, tuple | list):
        raise ValueError(f"{target}: expected it to return {KINDS}, got {type(returned).__name__}")
    flow, batch, third = [*returned, None][:3] if len(returned) in (2, 3) else (None, None, None)
    if not isinstance(flow, nn.Module) or not isinstance(batch, Tensor) or not isinstance(third, dict | Tensor | None):
        got = ", ".join(type(one).__name__ for one in returned)
        raise ValueError(f"{target}: expected it to return {KINDS}, got ({got})")
    if not isinstance(third, dict):
        return flow, batch, {} if third is None else {"context": third}
    taken = [*inspect.signature(doctor).parameters][2:]
    if unknown := [key for key in third if key not in taken]:
        raise ValueError(f"{target}: expected keywords among {', '.join(taken)}, got {', '.join(map(repr, unknown))}")
    return flow, batch, third
