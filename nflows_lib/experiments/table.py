"""The table of the named runs, which holds data only: a new run is one entry of ``RUNS``.

The names of models, data sets, augmentations and metrics are defined in :mod:`nflows_lib.experiments.runs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """One line of the table of runs.

    title: a description in a few words.
    model: the model, a key of ``MODELS`` of :mod:`nflows_lib.experiments.runs`, which also decides the optimizer.
    size: the model's arguments other than the shapes.
    data: the images, a key of ``DATA`` of :mod:`nflows_lib.experiments.runs`.
    shape: (C, H, W) of one image.
    context_shape: the shape of one context; None if the model needs no context.
    rates: the optimizer's arguments.
    training: batch size, augmentation, clipping, warm-up, average, for :func:`nflows_lib.experiments.trainer.train`.
    budget: seconds for the whole run, if the caller does not give another budget.
    held_out: how many of the training images are held out for the curve.
    paper: the result to compare with, in bits/dim on the test images, and its source; None if no result is published.
    metrics: further metrics on the test images, a key of ``METRICS`` of :mod:`nflows_lib.experiments.runs`, or None.
    """

    title: str
    model: str
    data: str
    shape: tuple[int, int, int]
    budget: float
    held_out: int
    rates: Mapping[str, float]
    training: Mapping[str, Any]
    size: Mapping[str, Any] = field(default_factory=dict)
    context_shape: tuple[int, ...] | None = None
    paper: tuple[float, str] | None = None
    metrics: str | None = None


MINUTES = 60
YEAR = 365 * 24 * 60 * MINUTES  # the longest budget

# Settings that several runs share.
STEADY = {"clip": 100.0, "warmup": 200, "cosine": True, "ema": 0.999, "batch_size": 64}
PHOTOGRAPHS = STEADY | {"augment": "random_flip"}
VECTORS = {"batch_size": 256, "warmup": 100, "cosine": True, "ema": 0.999}
MNIST = {"data": "mnist", "shape": (1, 28, 28)}
CIFAR10 = {"data": "cifar10", "shape": (3, 32, 32), "held_out": 500}
REALNVP_CIFAR10 = CIFAR10 | {
    "model": "realnvp",
    "paper": (3.49, "Dinh et al. 2016, two scales, networks of 8 blocks"),
}
GLOW_CIFAR10 = CIFAR10 | {
    "model": "glow",
    "paper": (3.35, "Kingma and Dhariwal 2018, 32 steps per scale, networks of 512 channels"),
}
# Glow on logits with learned noise. A trial without bounded priors and without logits had an infinite gradient at step
# 4,597.
LOGIT_GLOW = {"scales": 2, "bounded": True, "bounded_priors": True, "alpha": 1e-4}
GLOW_MNIST = MNIST | {
    "model": "glow",
    "held_out": 1000,
    "paper": (1.05, "second-hand, as others quote Kingma and Dhariwal 2018"),
    "metrics": "one bound",
}
GLOW_FLOWERS = {"model": "glow", "shape": (3, 64, 64), "held_out": 300}
LARGE_GLOW_FLOWERS = GLOW_FLOWERS | {
    "size": {"scales": 4, "steps": 16, "hidden": 256, "bounded": True},
    "rates": {"lr": 1e-3},
    "training": PHOTOGRAPHS,
    "budget": 25 * MINUTES,
}
HORSES = {
    "data": "horses",
    "held_out": 33,
    "training": STEADY | {"augment": "random_view", "batch_size": 32, "warmup": 100, "ema": 0.99},
    "metrics": "segmentation",
}
HORSES_32 = HORSES | {"shape": (1, 32, 32), "context_shape": (3, 32, 32)}
HORSES_64 = HORSES | {"shape": (1, 64, 64), "context_shape": (3, 64, 64)}
SMALL_UNET = HORSES_32 | {"model": "unet", "size": {"levels": 2, "hidden": 28}, "rates": {"lr": 1e-3}}


RUNS: dict[str, Run] = {
    "nice-digits": Run(
        title="NICE on the 8x8 digits, to try the trainer",
        model="nice",
        size={"levels": 17, "hidden": 128, "depth": 2},
        data="digits",
        shape=(1, 8, 8),
        budget=30,
        held_out=150,
        rates={"lr": 5e-3, "weight_decay": 1.0},
        training=VECTORS | {"batch_size": 128, "ema": 0.995},
    ),
    "nice-mnist-small": Run(
        title="NICE on MNIST, small enough to ship",
        model="nice",
        size={"levels": 256, "hidden": 240, "depth": 3},
        **MNIST,
        budget=15 * MINUTES,
        held_out=2000,
        rates={"lr": 1e-3, "weight_decay": 0.1},
        training=VECTORS,
        paper=(4.356, "Dinh et al. 2014, a network 16 times as large"),
    ),
    "nice-mnist": Run(
        title="NICE on MNIST at the paper's size",
        model="nice",
        size={"levels": 256},
        **MNIST,
        budget=35 * MINUTES,
        held_out=2000,
        rates={"lr": 1e-3, "weight_decay": 0.3},
        training=VECTORS,
        paper=(4.356, "Dinh et al. 2014"),
    ),
    "nice-svhn": Run(
        title="NICE on SVHN at the paper's size",
        model="nice",
        size={"levels": 256, "hidden": 2000, "depth": 4},
        data="svhn",
        shape=(3, 32, 32),
        budget=25 * MINUTES,
        held_out=2000,
        rates={"lr": 1e-3, "weight_decay": 0.3},
        training=VECTORS,
        paper=(2.60, "Dinh et al. 2014, 11,496.55 nats, of whitened images"),
    ),
    "realnvp-cifar10-small": Run(
        title="RealNVP on CIFAR-10, one scale, small enough for a CPU and to ship",
        **REALNVP_CIFAR10,
        size={"couplings": 8, "hidden": 32, "blocks": 2},
        budget=40 * MINUTES,
        rates={"lr": 2e-3},
        training=PHOTOGRAPHS | {"warmup": 100},
    ),
    "realnvp-cifar10-scales": Run(
        title="RealNVP on CIFAR-10, three scales, small enough for a CPU and to ship",
        **REALNVP_CIFAR10,
        size={"scales": 3, "couplings": 4, "hidden": 24, "blocks": 1},
        budget=20 * MINUTES,
        rates={"lr": 2e-3},
        training=PHOTOGRAPHS | {"warmup": 100},
    ),
    "realnvp-cifar10": Run(
        title="RealNVP on CIFAR-10, two scales, networks of 64 channels and 8 blocks",
        **REALNVP_CIFAR10,
        size={"scales": 2, "couplings": 4},
        budget=25 * MINUTES,
        rates={"lr": 1e-3},
        training=PHOTOGRAPHS | {"warmup": 100, "ema": 0.9995},
    ),
    "realnvp-celeba": Run(
        title="RealNVP on CelebA, 64x64, five scales, networks of 32 channels and 2 blocks at the first",
        model="realnvp",
        size={"scales": 5, "couplings": 4, "hidden": 32, "blocks": 2},
        data="celeba",
        shape=(3, 64, 64),
        budget=25 * MINUTES,
        held_out=500,
        rates={"lr": 1e-3},
        training=PHOTOGRAPHS | {"warmup": 100, "ema": 0.9995},
        paper=(3.02, "Dinh et al. 2016, whose squares are cut closer to the faces"),
    ),
    "glow-cifar10-small": Run(
        title="Glow on CIFAR-10, small enough for a CPU and to ship",
        **GLOW_CIFAR10,
        size={"steps": 8, "hidden": 64},
        budget=40 * MINUTES,
        rates={"lr": 4e-3},
        training=PHOTOGRAPHS,
    ),
    "glow-cifar10-bounded": Run(
        title="Glow on CIFAR-10 with bounded scales, small enough for a CPU and to ship",
        **GLOW_CIFAR10,
        size={"steps": 8, "hidden": 64, "bounded": True},
        budget=40 * MINUTES,
        rates={"lr": 4e-3},
        training=PHOTOGRAPHS,
    ),
    "mixture-cifar10-small": Run(
        title="Glow on CIFAR-10 with a mixture of logistics at each scale's end, small enough for a CPU and to ship",
        **GLOW_CIFAR10 | {"model": "mixture"},
        size={"steps": 16, "hidden": 32, "components": 4},
        budget=45 * MINUTES,
        rates={"lr": 6e-3},
        training=PHOTOGRAPHS | {"batch_size": 32},
    ),
    "glow-cifar10": Run(
        title="Glow on CIFAR-10 at the paper's size",
        **GLOW_CIFAR10,
        budget=25 * MINUTES,
        rates={"lr": 1e-3},
        training=PHOTOGRAPHS | {"ema": 0.9995},
    ),
    "glow-cifar10-10min": Run(
        title="Glow on CIFAR-10 with learned noise and bounded scales, for nine minutes of one H100 or H200",
        **GLOW_CIFAR10,
        size={"steps": 16, "noise": 64, "bounded": True, "bounded_priors": True},
        budget=9 * MINUTES,
        rates={"lr": 2e-3},
        training=PHOTOGRAPHS | {"batch_size": 512, "warmup": 500},
    ),
    "mixture-cifar10-10min": Run(
        title="glow-cifar10-10min with mixtures of logistics at the scales' ends, for nine minutes of one H100 or H200",
        **GLOW_CIFAR10 | {"model": "mixture"},
        size={"steps": 16, "components": 4, "noise": 64, "bounded_priors": True},
        budget=9 * MINUTES,
        rates={"lr": 2e-3},
        training=PHOTOGRAPHS | {"batch_size": 512, "warmup": 500},
    ),
    "glow-flowers": Run(
        title="Glow on Flowers-102, 64x64, four scales",
        data="flowers102",
        **LARGE_GLOW_FLOWERS,
    ),
    "glow-flowers5": Run(
        title="Glow on a folder of photographs of five kinds of flower, 64x64, four scales",
        data="flowers5",
        **LARGE_GLOW_FLOWERS,
    ),
    "glow-flowers5-small": Run(
        title="Glow on photographs of five kinds of flower, 64x64, small enough for a CPU and to ship",
        data="flowers5",
        **GLOW_FLOWERS,
        size={"scales": 4, "steps": 4, "hidden": 64, "bounded": True, "bounded_priors": True},
        budget=35 * MINUTES,
        rates={"lr": 3e-3},
        training=PHOTOGRAPHS | {"batch_size": 32},
    ),
    "glow-mnist": Run(
        title="Glow on MNIST's logits, with learned noise, two scales, small enough for a CPU and to ship",
        **GLOW_MNIST,
        size=LOGIT_GLOW | {"steps": 8, "hidden": 64, "noise": 16},
        budget=45 * MINUTES,
        rates={"lr": 4e-3},
        training=STEADY,
    ),
    "glow-mnist-10min": Run(
        title="Glow on MNIST's logits, larger than glow-mnist, for nine minutes of one H100 or H200",
        **GLOW_MNIST,
        size=LOGIT_GLOW | {"steps": 12, "hidden": 256, "noise": 64},
        budget=9 * MINUTES,
        rates={"lr": 2e-3},
        training=STEADY | {"batch_size": 512, "warmup": 500},
    ),
    "cglow-horses": Run(
        title="Conditional Glow on the Weizmann horses, 64x64, the released code's depth and couplings",
        model="cglow",
        size={"levels": 2},
        **HORSES_64,
        budget=25 * MINUTES,
        rates={"lr": 1e-3},
    ),
    "unet-horses": Run(
        title="A U-Net of the same size on the same horses, 64x64, each pixel for itself",
        model="unet",
        size={"levels": 2, "hidden": 94},
        **HORSES_64,
        budget=25 * MINUTES,
        rates={"lr": 1e-3},
    ),
    "cglow-horses-small": Run(
        title="Conditional Glow on the Weizmann horses, 32x32, small enough for a CPU and to ship",
        model="cglow",
        size={"levels": 2, "steps": 4, "hidden": 64, "conditioning": 32},
        **HORSES_32,
        budget=12 * MINUTES,
        rates={"lr": 4e-3},
    ),
    "unet-horses-small": Run(
        title="A U-Net of the same size on the same horses, each pixel for itself",
        **SMALL_UNET,
        budget=12 * MINUTES,
    ),
    "unet-horses-early": Run(
        title="The same U-Net, stopped where its held-out figure is best",
        **SMALL_UNET,
        budget=3 * MINUTES,
    ),
}


def find(name: str) -> Run:
    """The run of that name.

    Raises:
        ValueError: if no run has that name; the message lists all names.
    """
    if not isinstance(name, str) or name not in RUNS:
        raise ValueError(f"run: expected one of {', '.join(RUNS)}, got {name!r}")
    return RUNS[name]
