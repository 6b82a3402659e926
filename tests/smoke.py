"""Try the chapters on a device, or in the full preset, before a GPU is at hand.

    NFLOWS_DATA=DIR python tests/smoke.py chapters/*.ipynb
    python tests/smoke.py --preset quick --device pretended chapters/*.ipynb

The chapters run as ``python -m nflows_lib.notebook`` would run them. In the full preset they have the full models and
data, but every training takes at most 20 steps. A named run takes its steps in small batches, all of them in the
warm-up, and is evaluated on 40 images. (At the papers' size Glow needs its warm-up: with a warm-up of five steps its
loss was infinite.) A check that does not hold is counted, and its cell goes on. Every cell tagged full-run must run,
and no cell may fail because of a device. Other cells that fail, because a trained or shipped model is missing, are
listed. In the quick preset every cell must run and every check must hold. The device "pretended" is that of
tests/pretended_gpu.py. With ``--stand-ins`` the data sets are random numbers of the same shapes, for a machine without
the data sets.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nflows_lib import checks, data, settings, training
from nflows_lib.experiments import ablations, archive, notebooks, runs, segmentation, table

STEPS, IMAGES, HELD_OUT = 20, 240, 20


def stand_in(shape: tuple[int, ...], levels: int = 256, context_shape: tuple[int, ...] | None = None) -> data.Images:
    """Random images with random labels, as many as a test needs, and with contexts if the data set has them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(levels, (1000, *shape), generator=generator).byte()
    contexts = None if context_shape is None else torch.rand(1000, *context_shape, generator=generator)
    return data.Images(images, torch.randint(10, (1000,), generator=generator), levels, contexts)


def use_stand_ins() -> None:
    """Replace the data sets that the chapters read by random images."""
    data.mnist = lambda part="train", folder=None: stand_in((1, 28, 28))
    data.cifar10 = lambda part="train", folder=None: stand_in((3, 32, 32))
    segmentation.horses = lambda part="train", folder=None, size=32: stand_in((1, size, size), 2, (3, size, size))
    runs.images_of = lambda run, part, folder=None: stand_in(run.shape, run.size.get("levels", 256), run.context_shape)


def use_few_images() -> None:
    """Let the named runs train and be evaluated on a few of their images."""
    images_of = runs.images_of

    def few(run: table.Run, part: str, folder: Path | None = None) -> data.Images:
        found = images_of(run, part, folder)
        return found.select(torch.arange(min(IMAGES if part == "train" else 40, len(found.images))))

    runs.images_of = few


def shortened(run: table.Run, batch_size: int) -> table.Run:
    """The run with small batches, all of them in the warm-up."""
    fewer = {**run.training, "batch_size": batch_size, "warmup": STEPS}
    return replace(run, held_out=HELD_OUT, training=fewer, metrics=None)


def use_few_steps() -> list[str]:
    """Limit trainings to 20 steps, let checks not raise, and return a list that collects the claims that fail."""
    broken: list[str] = []
    fit, check = training.fit, checks.check

    def short(flow, examples, steps, **options):
        steps = min(steps, STEPS)
        options["warmup"] = min(options.get("warmup", 0), steps)
        return fit(flow, examples, steps, **options)

    def noted(claim, holds):
        try:
            check(claim, holds)
        except AssertionError as error:
            print(error)
            broken.append(claim)

    for module in (training, ablations.nice, ablations.realnvp, ablations.glow):
        module.fit = short
    checks.check = noted
    return broken


def smoke(chapter: Path, full: bool, broken: list[str]) -> list[int]:
    """Run a chapter and return the numbers of the cells that failed."""
    cells = notebooks.read_code_cells(chapter)
    failed, others = [], []
    broken.clear()

    def run_cell(source: str, name: str, namespace: dict) -> None:
        number = int(name.rstrip(">").rpartition(" ")[2])
        try:
            original(source, name, namespace)
        except Exception as error:
            tags = cells[number - 1][1]
            if "raises-exception" in tags:
                raise
            device_mixed = isinstance(error, RuntimeError | TypeError) and "device" in str(error)
            must_run = not full or "full-run" in tags or device_mixed
            (failed if must_run else others).append(number)
            if must_run:
                traceback.print_exception(error)
            else:
                print(f"{type(error).__name__}: {error}")

    original, notebooks.run_cell = notebooks.run_cell, run_cell
    try:
        with tempfile.TemporaryDirectory() as figures:
            notebooks.run_notebook(chapter, Path(figures))
    finally:
        notebooks.run_cell = original
    tagged = [number for number, (_, tags) in enumerate(cells, start=1) if "full-run" in tags]
    print(
        f"{chapter.name}: full-run cells {tagged}, failed {failed}; other cells that did not run: {others}; "
        f"{len(broken)} checks do not hold",
        flush=True,
    )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("full", "quick"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps", "pretended"), default="cpu")
    parser.add_argument("--batch-size", type=int, default=8, help="of the named runs in the full preset (8)")
    parser.add_argument("--stand-ins", action="store_true", help="random numbers instead of the data sets")
    parser.add_argument("chapters", type=Path, nargs="+")
    options = parser.parse_args()
    full = options.preset == "full"
    os.environ |= {"NFLOWS_PRESET": options.preset, "NFLOWS_PROGRESS": "0", "NFLOWS_DEVICE": options.device}
    if options.stand_ins:
        use_stand_ins()
    use_few_images()
    table.RUNS.update({name: shortened(run, options.batch_size) for name, run in table.RUNS.items()})
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if options.device == "pretended":
            from pretended_gpu import NAME, install

            stack.enter_context(install())
            settings.device = lambda prefer_gpu=None: torch.device(NAME, 0)
        # The runs must neither resume runs in the user's data folder nor be mistaken for them.
        archive.work_folder = lambda name: Path(folder) / name
        runs.train = partial(runs.train, steps=STEPS, draws=1)
        segmentation.metrics = partial(segmentation.metrics, samples=2, most=2)
        broken = use_few_steps() if full else []
        failed = [chapter.name for chapter in options.chapters if smoke(chapter, full, broken)]
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
