"""Tests of nflows_lib.notebook, which runs a chapter without Jupyter."""

import json
import subprocess
import sys
from pathlib import Path


def write_notebook(path: Path, *cells: str | tuple[str, str]) -> Path:
    """Write a notebook of code cells, each a source or (source, tag), after a text cell."""
    made = [{"cell_type": "markdown", "metadata": {}, "source": ["# Not run\n"]}]
    for cell in cells:
        source, tags = (cell, []) if isinstance(cell, str) else (cell[0], [cell[1]])
        made.append(
            {
                "cell_type": "code",
                "execution_count": None,
                "metadata": {"tags": tags},
                "outputs": [],
                "source": source.splitlines(keepends=True),
            }
        )
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nflows_lib.notebook", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=120)


def test_runs_prints_and_writes_figures(tmp_path: Path) -> None:
    notebook = write_notebook(
        tmp_path / "chapter.ipynb",
        "import inspect, pickle\nimport matplotlib.pyplot as plt\nx = 6",
        "x * 7",
        "x = None\nx",
        "plt.plot([1, 2])\nplt.show()\nplt.plot([2, 1])\nplt.show()",
        ("raise ValueError('expected 2, got 3')", "raises-exception"),
        "class Point:\n    pass\n\ntype(pickle.loads(pickle.dumps(Point()))).__name__",
        "def double(x):\n    return 2 * x\n\ninspect.getsource(double)",
    )
    done = run(tmp_path, notebook)
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if not line.startswith(("──", "["))]
    assert shown == [
        "42",
        "ValueError: expected 2, got 3",
        "'Point'",
        r"'def double(x):\n    return 2 * x\n'",
        f"{notebook}: all cells ran, 2 figures in figures/chapter",
    ]
    assert sorted(path.name for path in (tmp_path / "figures" / "chapter").iterdir()) == ["01.png", "02.png"]


def test_an_error_names_the_cell_and_its_line(tmp_path: Path) -> None:
    notebook = write_notebook(
        tmp_path / "chapter.ipynb", "def halve(x):\n    return x / 0", "halve(2)", "print('never')"
    )
    done = run(tmp_path, notebook, "--out", tmp_path / "shown")
    assert done.returncode == 1
    assert "cell 2 of" in done.stderr
    assert "<chapter.ipynb, cell 1>" in done.stderr and "return x / 0" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "notebook.py" not in done.stderr
    assert "never" not in done.stdout


def test_a_syntax_error_names_the_cell(tmp_path: Path) -> None:
    done = run(tmp_path, write_notebook(tmp_path / "chapter.ipynb", "x = = 2"))
    assert done.returncode == 1
    assert "<chapter.ipynb, cell 1>" in done.stderr and "SyntaxError" in done.stderr


def test_an_exception_that_stays_away_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path, write_notebook(tmp_path / "chapter.ipynb", ("x = 1", "raises-exception")))
    assert done.returncode == 1
    assert "expected an exception (tag raises-exception), got none" in done.stderr


def test_what_is_no_notebook_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.ipynb").write_text("# not JSON", encoding="utf-8")
    done = run(tmp_path, "text.ipynb")
    assert done.returncode == 1
    assert "text.ipynb: expected a Jupyter notebook, got a file that is not JSON" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "broken.ipynb").write_text('{"nbformat": 4, "cells": [{"cell_type": "code"}]}', encoding="utf-8")
    done = run(tmp_path, "broken.ipynb")
    assert "broken.ipynb: expected a Jupyter notebook in format 4, got a broken one (KeyError('source'))" in done.stderr
    assert "Traceback" not in done.stderr
    missing = run(tmp_path, "missing.ipynb")
    assert missing.returncode == 1 and "missing.ipynb" in missing.stderr and "Traceback" not in missing.stderr
