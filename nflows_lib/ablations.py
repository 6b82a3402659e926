"""Open questions put to the test: each is a few arms, run with several seeds, and a file with what came out.

``make ablations`` runs them all and stores ``data/ablations/<name>.json``; the chapters plot the files.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nflows_lib import data, runs
from nflows_lib.flow import Flow
from nflows_lib.models import nice
from nflows_lib.training import NonFiniteLoss, fit, log_likelihoods


@dataclass(frozen=True)
class Ablation:
    """A question, and the arms that answer it: each takes a seed and returns its measures."""

    question: str
    seeds: tuple[int, ...]
    arms: dict[str, Callable[[int], dict[str, Any]]]


def nice_activation(slope: float, seed: int) -> dict[str, Any]:
    """NICE on the digits, networks with LeakyReLU of this slope (0 is ReLU): bits/dim on the test digits."""
    torch.manual_seed(20 + seed)
    train, test = (data.digits(part).images.flatten(1) for part in ("train", "test"))
    flow = nice(64, levels=17, hidden=64, depth=2, activation=partial(nn.LeakyReLU, slope))
    fit(flow, train, 1200, batch_size=128, lr=5e-3, cosine=True)
    return {"bits_per_dim": -log_likelihoods(flow, test, draws=4).mean().item() / (64 * math.log(2))}


def no_dequantization(noise: bool, seed: int, steps: int = 90_000, every: int = 200) -> dict[str, Any]:
    """NICE on the digits, Adam at 1e-3, with noise or without: mean log p(u) over every so many steps, and the end."""
    torch.manual_seed(seed)
    images = data.digits("train").images.flatten(1)
    flow = nice(64, levels=17, couplings=2, hidden=64, depth=2)
    if not noise:
        flow, images = Flow([*flow.chain][1:], flow.base, (64,)), images.float()
    broke_at = broke_with = None
    try:
        loss = fit(flow, images, steps, batch_size=128, lr=1e-3).loss
    except NonFiniteLoss as error:
        *loss, last = error.history.loss
        broke_at, broke_with = len(loss) + 1, str(last)
    blocks = torch.tensor(loss).split(every)
    return {
        "steps": len(loss),
        "log_p": [round(64 * math.log(17) - block.mean().item(), 2) for block in blocks],
        "broke_at": broke_at,
        "broke_with": broke_with,
    }


ABLATIONS: dict[str, Ablation] = {
    "nice-activation": Ablation(
        "Q1: ReLU or LeakyReLU in the networks of NICE?",
        (0, 1, 2),
        {"ReLU": partial(nice_activation, 0.0)}
        | {f"Leaky {slope}": partial(nice_activation, slope) for slope in (0.01, 0.2)},
    ),
    "no-dequantization": Ablation(
        "F6: what becomes of NICE on integers without noise, nothing provoked?",
        (0,),
        {"left out": partial(no_dequantization, False), "put back": partial(no_dequantization, True)},
    ),
}


def path(name: str) -> Path:
    """Where the results of an ablation are stored."""
    return runs.ROOT / "data" / "ablations" / f"{name}.json"


def run(name: str) -> None:
    """Run every arm with every seed, and store what came out."""
    ablation = find(name)
    start = time.perf_counter()
    results = {arm: [measure(seed) for seed in ablation.seeds] for arm, measure in ablation.arms.items()}
    record = {
        "ablation": name,
        "question": ablation.question,
        "command": f"python -m nflows_lib.ablations {name}",
        **runs.origin(),
        "seeds": list(ablation.seeds),
        "minutes": (time.perf_counter() - start) / 60,
        "results": results,
    }
    runs.write_json(path(name), record)


def load(name: str) -> dict[str, Any]:
    """The stored record of an ablation.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: it has not been run.
    """
    find(name)
    return json.loads(path(name).read_text())


def find(name: str) -> Ablation:
    """The ablation of that name; a ValueError lists the names there are."""
    if name not in ABLATIONS:
        raise ValueError(f"ablation: expected one of {', '.join(ABLATIONS)}, got {name!r}")
    return ABLATIONS[name]


def mean_and_spread(record: dict[str, Any], measure: str) -> dict[str, tuple[float, float]]:
    """{arm: (mean, standard deviation over seeds)} of one measure."""
    columns = {arm: [result[measure] for result in results] for arm, results in record["results"].items()}
    return {arm: (statistics.mean(values), statistics.stdev(values)) for arm, values in columns.items()}


if __name__ == "__main__":
    for name in sys.argv[1:] or ABLATIONS:
        print(f"{name}: {find(name).question}", flush=True)
        run(name)
