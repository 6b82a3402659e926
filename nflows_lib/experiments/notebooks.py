"""Run a chapter without Jupyter: ``python -m nflows_lib.notebook chapters/01_nice.ipynb``.

This is for machines that have torch and matplotlib but no Jupyter. The code cells run in order in one namespace, their
output goes to the terminal, and every ``plt.show()`` writes the open figures to a folder.
"""

import argparse
import ast
import json
import linecache
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any


class CellError(RuntimeError):
    """A cell failed; the message names the cell and shows the traceback with the cell's own lines."""


def read_code_cells(path: Path) -> list[tuple[str, set[str]]]:
    """The source and the tags of each code cell of a notebook.

    Raises:
        ValueError: if the file is not a notebook in format 4.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a Jupyter notebook, got a file that is not JSON ({error})") from None
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4:
        raise ValueError(f"{path}: expected a Jupyter notebook in format 4, got other JSON")
    try:
        return [
            ("".join(cell["source"]), set(cell["metadata"].get("tags", [])))
            for cell in notebook["cells"]
            if cell["cell_type"] == "code"
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a Jupyter notebook in format 4, got a broken one ({error!r})") from None


def run_cell(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Execute one cell; as in Jupyter, print the value of a last expression unless it is None."""
    # A cell has no file: linecache gives its lines to tracebacks and to inspect.getsource.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
        if value is not None:
            print(repr(value))


def run_notebook(path: Path, out: Path) -> int:
    """Run every code cell of the notebook at ``path``, write its figures to ``out``, and return their number.

    A cell tagged ``raises-exception`` must raise an exception; the run then goes on.

    Raises:
        CellError: if another cell raises an exception, or if a tagged cell does not.
        ValueError: if the file is not a notebook in format 4.
    """
    import matplotlib  # not at the top, since a wrong argument should not wait for it

    matplotlib.use("Agg")  # before pyplot is imported: there may be no screen
    import matplotlib.pyplot as plt

    figures = 0

    def show(*args: Any, **kwargs: Any) -> None:
        nonlocal figures
        for number in plt.get_fignums():
            figures += 1
            out.mkdir(parents=True, exist_ok=True)
            file = out / f"{figures:02d}.png"
            plt.figure(number).savefig(file, dpi=150, bbox_inches="tight")
            print(f"[figure {file}]")
        plt.close("all")

    cells = read_code_cells(path)
    module = types.ModuleType("__main__")  # the cells' own module, so that a class defined in a cell can be pickled
    original_main, sys.modules["__main__"] = sys.modules["__main__"], module
    original_show, plt.show = plt.show, show
    try:
        for number, (source, tags) in enumerate(cells, start=1):
            print(f"── cell {number} of {len(cells)}", flush=True)
            started = time.perf_counter()
            raised = None
            try:
                run_cell(source, f"<{path.name}, cell {number}>", module.__dict__)
            except Exception as error:
                raised = error
            show()  # Jupyter also shows the figures that a cell leaves open
            if raised is not None and "raises-exception" in tags:
                print(f"{type(raised).__name__}: {raised}")
            elif raised is not None:
                frames = raised.__traceback__
                while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
                    frames = frames.tb_next  # the reader need not see this file's frames
                report = "".join(traceback.format_exception(raised.with_traceback(frames)))
                raise CellError(f"cell {number} of {path} failed\n{report}") from raised
            elif "raises-exception" in tags:
                raise CellError(f"cell {number} of {path}: expected an exception (tag raises-exception), got none")
            print(f"── {time.perf_counter() - started:.1f} s", flush=True)
    finally:
        plt.show, sys.modules["__main__"] = original_show, original_main
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 1 after a printed error."""
    parser = argparse.ArgumentParser(prog="python -m nflows_lib.notebook", description="Run a chapter without Jupyter.")
    parser.add_argument("notebook", type=Path, help="the chapter, for example chapters/01_nice.ipynb")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder for the figures (default: figures/CHAPTER)")
    options = parser.parse_args(arguments)
    out = options.out or Path("figures") / options.notebook.stem
    try:
        figures = run_notebook(options.notebook, out)
    except (CellError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.notebook}: all cells ran" + (f", {figures} figures in {out}" if figures else ""))
    return 0
