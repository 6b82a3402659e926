"""Time a training step of Glow against image size, depth and width: ``python -m benchmarks.scaling``.

The program writes ``benchmarks/scaling.json`` and prints a table of times and of multiply-adds counted by hand.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import models
from benchmarks.run import HERE, Task, alternate, processor, training_step
from nflows_lib.experiments import archive
from nflows_lib.training import keep_freed_memory

BATCH = 32
UPPER = 3  # the exponents are fitted to this number of a sweep's largest sizes
# By the size that grows: its values, and the model's other sizes, as keywords of benchmarks.models.glow.
SWEEPS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "side": ((8, 16, 32, 64), {"scales": 2, "steps": 1, "hidden": 256}),
    "steps": ((1, 2, 4, 8, 16), {"shape": (3, 16, 16), "scales": 2, "hidden": 64}),
    "hidden": ((16, 32, 64, 128, 256, 512), {"shape": (3, 32, 32), "scales": 1, "steps": 1}),
}


def sizes(name: str, value: int) -> dict[str, Any]:
    """The sizes of the model at one point of a sweep."""
    return SWEEPS[name][1] | ({"shape": (3, value, value)} if name == "side" else {name: value})


def multiply_adds(shape: tuple[int, int, int], scales: int, steps: int, hidden: int) -> int:
    """Multiply-adds of all convolutions in the forward pass of one image; a training step takes three times as many.

    A step at a scale with C channels has a C x C product and the network's three convolutions: 3x3 from C/2 to hidden
    channels, 1x1 from hidden to hidden, 3x3 from hidden to C.
    """
    channels, height, width = shape
    total = 0
    for _ in range(scales):
        channels, height, width = 4 * channels, height // 2, width // 2
        network = 9 * channels // 2 * hidden + hidden**2 + 9 * hidden * channels
        total += height * width * steps * (channels**2 + network)
        channels //= 2
    return total


def exponent(values: list[float], costs: list[float]) -> float:
    """The slope of the least-squares line through the last points, on two logarithmic axes."""
    return float(np.polyfit(np.log(values[-UPPER:]), np.log(costs[-UPPER:]), 1)[0])


def step_of(name: str, value: int) -> Task:
    """A training step of the model at one point of a sweep."""
    torch.manual_seed(0)
    flow = models.glow(**sizes(name, value))
    x: Tensor = torch.rand(BATCH, *flow.shape) - 0.5
    flow.initialize(x)
    return training_step(flow.parameters(), lambda: -flow.log_prob(x).mean())


def sweeps(found: dict[str, list[float]]) -> dict[str, Any]:
    """The file's entry for each sweep, from the rounds of each point, by the point's name."""
    result = {}
    for name, (values, fixed) in SWEEPS.items():
        points = []
        for value in values:
            rounds = [float(f"{time:.5g}") for time in found[f"{name} {value}"]]
            count = 3 * BATCH * multiply_adds(**sizes(name, value))
            points.append({"value": value, "count": count, "median": statistics.median(rounds), "rounds": rounds})
        counts, medians = ([point[key] for point in points] for key in ("count", "median"))
        exponents = {
            "expected": round(exponent(list(values), counts), 3),
            "found": round(exponent(list(values), medians), 3),
        }
        result[name] = {"fixed": fixed, "points": points, "exponents": exponents}
    return result


def table(content: dict[str, Any]) -> str:
    """The file's content as a table."""
    where = f"{content['processor']}, {content['threads']} threads, torch {content['torch']}"
    lines = [f"{where}, batch {content['batch']}"]
    for name, sweep in content["sweeps"].items():
        lines += ["", f"  {name:>6} {'multiply-adds':>16} {'ms':>9}"]
        lines += [f"  {point['value']:6} {point['count']:16,} {point['median']:9.2f}" for point in sweep["points"]]
        both = sweep["exponents"]
        lines.append(f"  exponent of the last {UPPER}: {both['expected']:.2f} expected, {both['found']:.2f} found")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    text = "Time a training step of Glow against image size, depth and width, write a JSON file and print a table."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=text)
    parser.add_argument("--threads", type=int, metavar="N", default=1, help="PyTorch's threads (default: 1)")
    parser.add_argument("--rounds", type=int, metavar="N", default=7, help="the number of rounds (default: 7)")
    parser.add_argument("--seconds", type=float, default=0.2, help="the time of one measurement (default: 0.2)")
    parser.add_argument(
        "--out", type=Path, default=HERE / "scaling.json", help="the file to write (default: benchmarks/scaling.json)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    began = time.monotonic()
    tasks = {f"{name} {value}": step_of(name, value) for name, (values, _) in SWEEPS.items() for value in values}
    found = alternate(tasks, options.rounds, options.seconds, "cpu")
    content = {
        **archive.origin(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "rounds": options.rounds,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "sweeps": sweeps(found),
    }
    archive.write_json(options.out, content)
    print(table(content))


if __name__ == "__main__":
    main()
