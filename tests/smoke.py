"""Try every chapter's full preset before a GPU is at hand: ``NFLOWS_DATA=… python tests/smoke.py chapters/*.ipynb``.

The chapters run as ``NFLOWS_PRESET=full python -m nflows_lib.notebook`` would run them, with the same models and data,
but each named run takes 20 steps in batches of eight, all of them warm-up, and is judged on 40 images. Every cell
tagged full-run must run. What a later cell claims of a trained model may not hold then: such cells are listed, and are
no failure. (At the papers' size Glow needs its warm-up: after five steps of it the loss was infinite.)
"""

import argparse
import os
import sys
import tempfile
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nflows_lib import data, notebook, runs, segmentation

IMAGES, HELD_OUT = 240, 20


def shortened(run: runs.Run) -> runs.Run:
    """The run on a few of its images, in small batches."""

    def few(part: str, folder: Path | None) -> data.Images:
        found = run.data(part, folder)
        return found.select(torch.arange(min(IMAGES if part == "train" else 40, len(found.images))))

    settings = {**run.settings, "batch_size": 8, "warmup": 20}
    return replace(run, data=few, held_out=HELD_OUT, settings=settings, measure=None)


def smoke(chapter: Path) -> list[int]:
    """Run a chapter; the full-run cells that failed."""
    cells = notebook.read_code_cells(chapter)
    failed, claims = [], []

    def run_cell(source: str, name: str, namespace: dict) -> None:
        number = int(name.rstrip(">").rpartition(" ")[2])
        try:
            original(source, name, namespace)
        except Exception as error:
            tags = cells[number - 1][1]
            if "raises-exception" in tags:
                raise
            (failed if "full-run" in tags else claims).append(number)
            if "full-run" in tags:
                traceback.print_exception(error)
            else:
                print(f"{type(error).__name__}: {error}")

    original, notebook.run_cell = notebook.run_cell, run_cell
    try:
        with tempfile.TemporaryDirectory() as figures:
            notebook.run_notebook(chapter, Path(figures))
    finally:
        notebook.run_cell = original
    tagged = [number for number, (_, tags) in enumerate(cells, start=1) if "full-run" in tags]
    print(
        f"{chapter.name}: full-run cells {tagged}, failed {failed}; other cells that did not hold: {claims}", flush=True
    )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", type=Path, nargs="+")
    return int(any([smoke(chapter) for chapter in parser.parse_args().chapters]))


if __name__ == "__main__":
    os.environ |= {"NFLOWS_PRESET": "full", "NFLOWS_PROGRESS": "0"}
    runs.RUNS.update({name: shortened(run) for name, run in runs.RUNS.items()})
    with tempfile.TemporaryDirectory() as folder:
        # The runs must not go on from, or be mistaken for, those of somebody's data folder.
        runs.work_folder = lambda name: Path(folder) / name
        runs.train = partial(runs.train, steps=20, draws=1)
        segmentation.figures = partial(segmentation.figures, samples=2, most=2)
        sys.exit(main())
