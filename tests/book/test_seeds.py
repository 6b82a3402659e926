"""Tests of ``make seeds``: it reports a check that fails, a text that changed, a crash, and each comparison's slack."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

TOOL = Path(__file__).parents[1] / "seeds.py"
# A copy of nflows_lib.checks that needs no PyTorch.
CHECK = """def check(claim, holds):
    assert holds, f'✗ {claim}'
    print(f'✓ {claim}')"""
CELLS = {
    "sound": (f"{CHECK}\n\ncheck('two is two', 1 + 1 == 2)", "✓ two is two\n"),
    "seeded": (
        "import os\nseed = int(os.environ['NFLOWS_SEED'])\nprint(f'≈ {seed}')\n"
        "check('seed plus one is below ten', all(i + seed < 10 for i in (0, 1)))",
        "≈ 5\n✓ seed plus one is below ten\n",
    ),
    "both sides": ("check('the seed lies between', -1 < seed <= 4)", "✓ the seed lies between\n"),
    "no check": ("print(seed < 3)", "True\n"),
    "raises": ("raise ValueError('as it should')", ""),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """The report of one chapter under the seeds 2, 4 and 12."""
    folder = tmp_path_factory.mktemp("seeds")
    cells = []
    for name, (source, stored) in CELLS.items():
        outputs = [v4.new_output("stream", text=stored)] if stored else []
        cell = v4.new_code_cell(source, outputs=outputs)
        cell.metadata["tags"] = ["raises-exception"] if name == "raises" else []
        cells.append(cell)
    nbformat.write(v4.new_notebook(cells=cells), folder / "chapter.ipynb")
    command = [sys.executable, str(TOOL), "--seeds", "2", "4", "12", "--every", str(folder / "chapter.ipynb")]
    environment = {name: value for name, value in os.environ.items() if name != "NFLOWS_SEED"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120)


def test_a_seed_under_which_all_holds_is_in_order(report):
    assert report.returncode == 1, report.stderr
    assert "chapter, seed 2: 0 s" in report.stdout
    assert report.stdout.split("chapter, seed 2")[1].splitlines()[0].endswith("; 0 cells wrong")


def test_a_text_that_changed_is_named(report):
    said = report.stdout.split("chapter, seed 4")[1].split("chapter, seed 12")[0]
    assert said.splitlines()[0].endswith("; 1 cells wrong")
    assert "cell 4: stored 'True', printed 'False'" in said


def test_checks_that_fail_are_named_and_the_chapter_goes_on(report):
    said = report.stdout.split("chapter, seed 12")[1]
    assert said.splitlines()[0].endswith("; 3 cells wrong")
    assert "cell 2: AssertionError: ✗ seed plus one is below ten" in said
    assert "cell 3: AssertionError: ✗ the seed lies between" in said
    assert "cell 5:" not in said


def test_the_slack_of_each_comparison_is_measured(report):
    """A comparison of several values has the least of their slacks, and one of two parts the lesser slack."""
    lines = report.stdout.splitlines()
    (below,) = [line for line in lines if "i + seed < 10" in line]
    assert "mean 3.333 sd 4.7 least -2  cell 2, line 004" in below  # slacks 7, 5 and, where the first fails, -2
    (between,) = [line for line in lines if "-1 < seed <= 4" in line]
    assert "least -8  cell 3" in between
    assert not [line for line in lines if "seed < 3" in line]  # the comparison is in no check
