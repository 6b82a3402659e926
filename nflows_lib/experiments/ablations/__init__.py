"""Ablations: stored experiments on open questions, each with a few variants that run with several seeds.

``make ablations`` runs all of them and stores the records as ``data/ablations/<name>.json``, which the chapters plot. A
new ablation is one entry in the ``ABLATIONS`` of its model's module.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from nflows_lib.experiments import archive
from nflows_lib.experiments.ablations import cglow, glow, grid, mixture, multiscale, nice, realnvp
from nflows_lib.experiments.ablations.experiment import Ablation

MODELS = (nice, realnvp, multiscale, glow, grid, cglow, mixture)
ABLATIONS: dict[str, Ablation] = {name: entry for model in MODELS for name, entry in model.ABLATIONS.items()}


def path(name: str) -> Path:
    """The file that holds the record of an ablation."""
    return archive.ROOT / "data" / "ablations" / f"{name}.json"


def run(name: str, made: dict[str, Any]) -> None:
    """Run every variant with every seed, and store the results together with ``made``, the :func:`archive.origin`."""
    ablation = find(name)
    start = time.process_time()  # this process's own time, whatever else the machine does
    results = {arm: [measure(seed) for seed in ablation.seeds] for arm, measure in ablation.arms.items()}
    record = {
        "ablation": name,
        "question": ablation.question,
        "command": f"python -m nflows_lib.ablations {name}",
        **made,
        "seeds": list(ablation.seeds),
        "minutes": (time.process_time() - start) / 60,
        "results": results,
    }
    archive.write_json(path(name), record)


def load(name: str) -> dict[str, Any]:
    """The stored record of an ablation.

    Raises:
        ValueError: if no ablation has that name, or if the record's file is broken.
        FileNotFoundError: if the ablation has not been run.
    """
    find(name)
    return archive.read_json(path(name))


def find(name: str) -> Ablation:
    """The ablation of that name.

    Raises:
        ValueError: if no ablation has that name; the message lists all names.
    """
    if name not in ABLATIONS:
        raise ValueError(f"ablation: expected one of {', '.join(ABLATIONS)}, got {name!r}")
    return ABLATIONS[name]


def print_table(
    record: Mapping[str, Any],
    measures: Mapping[str, str] | None = None,
    variants: Mapping[str, str] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Print a record's origin and a table: one row per variant, one column per measure, mean ± standard deviation.

    Args:
        record: as :func:`load` returns it.
        measures: the heading of each column by the measure's key in the record; ``{"test": "test bits/dim"}`` if None.
        variants: the name of each row by the variant's key in the record; all variants by their keys if None.

    Returns:
        The values behind the table, one per seed, as ``values[measure][variant]`` by the record's keys.
    """
    measures = measures or {"test": "test bits/dim"}
    variants = variants or {variant: variant for variant in record["results"]}
    values = {
        measure: {variant: [run[measure] for run in record["results"][variant]] for variant in variants}
        for measure in measures
    }
    archive.print_origin(record)
    print(f"mean ± standard deviation over {len(record['seeds'])} seeds")
    columns = [["", *variants.values()]]
    for measure, heading in measures.items():
        found = values[measure].values()
        columns.append([heading, *(f"{statistics.mean(row):.3f} ± {statistics.stdev(row):.3f}" for row in found)])
    widths = [max(map(len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
    return values


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: the named ablations, or all of them, each in a process of its own."""
    parser = argparse.ArgumentParser(
        prog="python -m nflows_lib.ablations", description="Run ablations and store their records in data/ablations."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"the ablations to run (default: all), out of {', '.join(ABLATIONS)}"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="how many ablations run at a time (default: 1)"
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in ABLATIONS]:
        parser.error(f"NAME: expected some of {', '.join(ABLATIONS)}, got {', '.join(unknown)}")
    made = archive.origin()  # before the first record is stored, which makes the checkout dirty
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        done = {pool.submit(run, name, made): name for name in options.names or ABLATIONS}
        for future in as_completed(done):
            future.result()
            print(f"stored: {path(done[future])}", flush=True)
