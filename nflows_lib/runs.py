"""The named full-scale runs: what each one trains, how, and the record that it leaves behind."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from tqdm.auto import tqdm

from nflows_lib import checkpoint, data, parallel, plotting, segmentation, settings
from nflows_lib.bijection import Shape
from nflows_lib.data import Images
from nflows_lib.distributions import random_state_kept
from nflows_lib.flow import Flow
from nflows_lib.models import cglow, glow, nice, realnvp
from nflows_lib.networks import UNet
from nflows_lib.pixelwise import PixelClassifier
from nflows_lib.training import (
    History,
    fit,
    log_likelihoods,
    log_mean_exp,
    mean_and_error,
    read_checkpoint,
    read_model,
)

ROOT = Path(__file__).resolve().parent.parent
MODEL, RECORD, SAMPLES, STAGES = "model.safetensors", "run.json", "samples.png", "stages.png"


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One line of the table of runs.

    title: what it is, in a few words.
    model: builds the flow.
    data: (part, folder) to images; part is "train" or "test", folder None means the usual place.
    optimizer: builds the optimizer for the flow.
    budget: seconds of training where none are asked for.
    shape: (C, H, W) of one image.
    held_out: how many of the training images are kept back for the curve.
    paper: the figure to compare with, in bits/dim on the test images, and whose it is; None where there is none.
    settings: batch size, augmentation, clipping, warm-up and average, for :func:`nflows_lib.training.fit`.
    measure: further figures on the test images, for the record; None where there are none.
    context_shape: of the contexts that come with the images and that the flow needs; None where there are none.
    """

    title: str
    model: Callable[[], Flow]
    data: Callable[[str, Path | None], Images]
    optimizer: Callable[[Flow], Optimizer]
    budget: float
    shape: tuple[int, int, int]
    held_out: int
    paper: tuple[float, str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    measure: Callable[[Flow, Images], dict[str, Any]] | None = None
    context_shape: Shape | None = None


def nice_optimizer(flow: Flow, lr: float, weight_decay: float) -> Optimizer:
    """AdamW with a rate of its own, and no decay, for the log-scales of NICE's last layer, which have far to go."""
    scales = flow.chain[-1].log_scale
    networks = [parameter for parameter in flow.parameters() if parameter is not scales]
    groups = [
        {"params": networks, "lr": lr, "weight_decay": weight_decay},
        {"params": [scales], "lr": 1e-2, "weight_decay": 0.0},
    ]
    return AdamW(groups, betas=(0.9, 0.99), fused=True)


def realnvp_optimizer(flow: Flow, lr: float) -> Optimizer:
    """Adam; L2 of 5e-5, the paper's, on the lengths of the normalised weights and on the couplings' gains alone."""
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for name, parameter in flow.named_parameters():
        groups[name.endswith(("weight.original0", "gain"))].append(parameter)
    return Adam([{"params": groups[False]}, {"params": groups[True], "weight_decay": 5e-5}], lr=lr, fused=True)


def glow_optimizer(flow: Flow, lr: float) -> Optimizer:
    """Adam, one rate for all."""
    return Adam(flow.parameters(), lr=lr, fused=True)


def on_photographs(
    model: Callable[..., Flow],
    shape: tuple[int, int, int],
    optimizer: Callable[..., Optimizer],
    title: str,
    *,
    images: Callable[[str, Path | None], Images],
    lr: float,
    budget: float,
    warmup: int,
    ema: float,
    held_out: int = 500,
    batch_size: int = 64,
    paper: tuple[float, str] | None = None,
    **size: int,
) -> Run:
    """What all runs on photographs share; ``size`` goes to the model."""
    return Run(
        title=title,
        model=partial(model, shape, precision=torch.bfloat16, **size),
        data=images,
        optimizer=partial(optimizer, lr=lr),
        budget=budget,
        shape=shape,
        held_out=held_out,
        paper=paper,
        settings={
            "augment": data.random_flip,
            "batch_size": batch_size,
            "clip": 100.0,
            "warmup": warmup,
            "cosine": True,
            "ema": ema,
        },
    )


realnvp_cifar10 = partial(
    on_photographs,
    realnvp,
    (3, 32, 32),
    realnvp_optimizer,
    images=data.cifar10,
    warmup=100,
    paper=(3.49, "Dinh et al. 2016, two scales, networks of 8 blocks"),
)
glow_cifar10 = partial(
    on_photographs,
    glow,
    (3, 32, 32),
    glow_optimizer,
    images=data.cifar10,
    warmup=200,
    paper=(3.35, "Kingma and Dhariwal 2018, 32 steps a scale, networks of 512 channels"),
)


def glow_mnist(title: str, *, lr: float, budget: float, batch_size: int, warmup: int, **size: int) -> Run:
    """Glow on MNIST's logits with learned noise; ``size`` goes to the model."""
    return Run(
        title=title,
        model=partial(
            glow,
            (1, 28, 28),
            scales=2,
            bounded=True,
            bounded_priors=True,  # without, and without logits, a gradient was infinite at step 4,597
            alpha=1e-4,
            precision=torch.bfloat16,
            **size,
        ),
        data=data.mnist,
        optimizer=partial(glow_optimizer, lr=lr),
        budget=budget,
        shape=(1, 28, 28),
        held_out=1000,
        paper=(1.05, "second-hand, as others quote Kingma and Dhariwal 2018"),
        settings={"batch_size": batch_size, "clip": 100.0, "warmup": warmup, "cosine": True, "ema": 0.999},
        measure=lambda flow, images: in_one_bound(flow, images),
    )


glow_flowers = partial(
    on_photographs, glow, (3, 64, 64), glow_optimizer, warmup=200, ema=0.999, held_out=300, scales=4, bounded=True
)
glow_flowers_large = partial(glow_flowers, lr=1e-3, budget=25 * 60, steps=16, hidden=256)


def unet_classifier(
    shape: tuple[int, int, int],
    context_shape: tuple[int, int, int],
    *,
    levels: int,
    hidden: int,
    precision: torch.dtype = torch.float32,
) -> PixelClassifier:
    """The deterministic network beside :func:`nflows_lib.models.cglow`: a U-Net of four sizes."""
    return PixelClassifier(UNet(context_shape[0], levels * shape[0], hidden, 4, precision), shape, levels)


def on_horses(
    model: Callable[..., Flow | PixelClassifier], title: str, *, size: int, lr: float, budget: float, **settings: Any
) -> Run:
    """What the runs on the Weizmann horses share; ``settings`` are the model's."""
    return Run(
        title=title,
        model=partial(model, (1, size, size), (3, size, size), levels=2, precision=torch.bfloat16, **settings),
        data=lambda part, folder: shuffled(data.horses(part, folder, size=size)),
        optimizer=partial(glow_optimizer, lr=lr),
        budget=budget,
        shape=(1, size, size),
        held_out=33,
        settings={
            "augment": data.random_view,
            "batch_size": 32,
            "clip": 100.0,
            "warmup": 100,
            "cosine": True,
            "ema": 0.99,
        },
        measure=segmentation.figures,
        context_shape=(3, size, size),
    )


unet_horses = partial(on_horses, unet_classifier, lr=1e-3)
unet_horses_small = partial(unet_horses, size=32, hidden=28)


def shuffled(images: Images) -> Images:
    """In a fixed random order: what a run holds out, the first ones, must not all be of one class."""
    return images.select(torch.randperm(len(images.images), generator=torch.Generator().manual_seed(0)))


def flowers102(part: str, folder: Path | None) -> Images:
    """The flowers of Oxford, 64x64."""
    return shuffled(data.flowers102(part, folder))


def flowers5(part: str, folder: Path | None) -> Images:
    """The folder ``flowers5`` beside the data sets: photographs of five kinds of flower, 64x64."""
    return shuffled(data.image_folder((folder or settings.data_folder()) / "flowers5", 64, part))


RUNS: dict[str, Run] = {
    "nice-digits": Run(
        title="NICE on the 8x8 digits, to try the trainer",
        model=partial(nice, 64, levels=17, hidden=128, depth=2),
        data=lambda part, folder: data.digits(part),
        optimizer=partial(nice_optimizer, lr=5e-3, weight_decay=1.0),
        budget=30,
        shape=(1, 8, 8),
        held_out=150,
        settings={"batch_size": 128, "warmup": 100, "cosine": True, "ema": 0.995},
    ),
    "nice-mnist-small": Run(
        title="NICE on MNIST, small enough to ship",
        model=partial(nice, 784, levels=256, hidden=240, depth=3),
        data=data.mnist,
        optimizer=partial(nice_optimizer, lr=1e-3, weight_decay=0.1),
        budget=15 * 60,
        shape=(1, 28, 28),
        held_out=2000,
        paper=(4.356, "Dinh et al. 2014, a network 11 times as large"),
        settings={"batch_size": 256, "warmup": 100, "cosine": True, "ema": 0.999},
    ),
    "nice-mnist": Run(
        title="NICE on MNIST at the paper's size",
        model=partial(nice, 784, levels=256),
        data=data.mnist,
        optimizer=partial(nice_optimizer, lr=1e-3, weight_decay=0.3),
        budget=35 * 60,
        shape=(1, 28, 28),
        held_out=2000,
        paper=(4.356, "Dinh et al. 2014"),
        settings={"batch_size": 256, "warmup": 100, "cosine": True, "ema": 0.999},
    ),
    "realnvp-cifar10-small": realnvp_cifar10(
        "RealNVP on CIFAR-10, one scale, small enough for a CPU and to ship",
        lr=2e-3,
        budget=40 * 60,
        ema=0.999,
        couplings=8,
        hidden=32,
        blocks=2,
    ),
    "realnvp-cifar10-scales": realnvp_cifar10(
        "RealNVP on CIFAR-10, three scales, small enough for a CPU and to ship",
        lr=2e-3,
        budget=20 * 60,
        ema=0.999,
        scales=3,
        couplings=4,
        hidden=24,
        blocks=1,
    ),
    "realnvp-cifar10": realnvp_cifar10(
        "RealNVP on CIFAR-10, two scales, networks of 64 channels and 8 blocks",
        lr=1e-3,
        budget=25 * 60,
        ema=0.9995,
        scales=2,
        couplings=4,
    ),
    "glow-cifar10-small": glow_cifar10(
        "Glow on CIFAR-10, small enough for a CPU and to ship",
        lr=4e-3,
        budget=40 * 60,
        ema=0.999,
        steps=8,
        hidden=64,
    ),
    "glow-cifar10-bounded": glow_cifar10(
        "Glow on CIFAR-10 with bounded scales, small enough for a CPU and to ship",
        lr=4e-3,
        budget=40 * 60,
        ema=0.999,
        steps=8,
        hidden=64,
        bounded=True,
    ),
    "glow-cifar10": glow_cifar10("Glow on CIFAR-10 at the paper's size", lr=1e-3, budget=25 * 60, ema=0.9995),
    "glow-cifar10-10min": glow_cifar10(
        "Glow on CIFAR-10 with learned noise and bounded scales, for nine minutes of one H100 or H200",
        lr=2e-3,
        budget=9 * 60,
        warmup=500,
        ema=0.999,
        steps=16,
        noise=64,
        bounded=True,
        bounded_priors=True,
        batch_size=512,
    ),
    "glow-flowers": glow_flowers_large("Glow on Flowers-102, 64x64, four scales", images=flowers102),
    "glow-flowers5": glow_flowers_large(
        "Glow on a folder of photographs of five kinds of flower, 64x64, four scales",
        images=flowers5,
    ),
    "glow-flowers5-small": glow_flowers(
        "Glow on the same photographs, small enough for a CPU and to ship",
        images=flowers5,
        lr=3e-3,
        budget=35 * 60,
        steps=4,
        hidden=64,
        bounded_priors=True,
        batch_size=32,
    ),
    "glow-mnist": glow_mnist(
        "Glow on MNIST's logits, with learned noise, two scales, small enough for a CPU and to ship",
        lr=4e-3,
        budget=45 * 60,
        batch_size=64,
        warmup=200,
        steps=8,
        hidden=64,
        noise=16,
    ),
    "glow-mnist-10min": glow_mnist(
        "The same Glow, larger, for nine minutes of one H100 or H200",
        lr=2e-3,
        budget=9 * 60,
        batch_size=512,
        warmup=500,
        steps=12,
        hidden=256,
        noise=64,
    ),
    "cglow-horses": on_horses(
        cglow,
        "Conditional Glow on the Weizmann horses, 64x64, the released code's depth and couplings",
        size=64,
        lr=1e-3,
        budget=25 * 60,
    ),
    "unet-horses": unet_horses(
        "A U-Net of the same size on the same horses, 64x64, each pixel for itself",
        size=64,
        budget=25 * 60,
        hidden=94,
    ),
    "cglow-horses-small": on_horses(
        cglow,
        "Conditional Glow on the Weizmann horses, 32x32, small enough for a CPU and to ship",
        size=32,
        lr=4e-3,
        budget=12 * 60,
        steps=4,
        hidden=64,
        conditioning=32,
    ),
    "unet-horses-small": unet_horses_small(
        "A U-Net of the same size on the same horses, each pixel for itself", budget=12 * 60
    ),
    "unet-horses-early": unet_horses_small("The same U-Net, stopped where its held-out figure is best", budget=3 * 60),
}


def find(name: str) -> Run:
    """The run of that name; a ValueError lists the names there are."""
    if name not in RUNS:
        raise ValueError(f"run: expected one of {', '.join(RUNS)}, got {name!r}")
    return RUNS[name]


# --- training, evaluating, sampling -----------------------------------------------------------------------------------


def train(
    name: str,
    out: Path | None = None,
    *,
    data_folder: Path | None = None,
    steps: int | None = None,
    budget: float | None = None,
    draws: int = 10,
    save_every: float = 60.0,
    resume: bool = False,
    compiled: bool = False,
) -> Flow:
    """Train a named run on the GPU, if there is one, and return the flow, on its device. Several processes share it.

    The folder ``out`` (by default ``runs/<name>`` beside the data sets) gets checkpoints and samples as it goes, and at
    the end the model, samples and ``run.json``: command, commit, versions, hardware, seed, settings, curve, figure.

    Args:
        name: one of RUNS.
        out: the folder.
        data_folder: where the data sets lie.
        steps: number of updates; None: as many as the budget allows.
        budget: seconds for the whole run; None: that of the checkpoint that is resumed, else the table's.
        draws: draws of the noise that the final figure averages over.
        save_every: seconds between checkpoints.
        resume: go on from the folder's checkpoint, if there is one.
        compiled: let torch.compile make one graph of the flow: about a minute at first, then faster steps.

    Raises:
        ValueError: an unknown run, a folder with a checkpoint and no resume, or compiled under torchrun; and
            what :func:`nflows_lib.training.fit` raises.
    """
    run = find(name)
    if compiled and parallel.torchrun():
        raise ValueError("compiled: expected False under torchrun, where it is untried, got True")
    out = out or work_folder(name)
    if steps is None and budget is None:
        earlier = read_checkpoint(out) if resume else None
        asked = earlier["asked"] if earlier else {"steps": None, "budget": run.budget}
        steps, budget = asked["steps"], asked["budget"]
    out.mkdir(parents=True, exist_ok=True)  # what is wrong with it shows before the training
    torch.manual_seed(settings.seed())

    def report(judged: Flow, history: History) -> None:
        step, loss, error = history.held_out[-1]
        bits = 1 / (judged.dims * math.log(2))
        recent = history.loss[-100:]
        tqdm.write(
            f"step {step:,}: training {sum(recent) / len(recent) * bits:.4f}, "
            f"held out {loss * bits:.4f} ± {error * bits:.4f} bits/dim"
        )
        save_samples(judged, run.shape, out / f"samples-{step:07d}.png", contexts=contexts)

    with parallel.joined() as device:
        flow = run.model().to(device)
        images = run.data("train", data_folder)
        examples = images.images.reshape(-1, *flow.shape).to(device)  # drawn, flipped and dequantized there
        contexts = None if images.contexts is None else images.contexts.to(device)
        optimizer = run.optimizer(flow)
        if compiled:
            flow.compile()  # in place: names of parameters stay as they are
        history = fit(
            flow,
            examples[run.held_out :],
            steps,
            budget=budget,
            context=None if contexts is None else contexts[run.held_out :],
            optimizer=optimizer,
            held_out=examples[: run.held_out],
            held_out_context=None if contexts is None else contexts[: run.held_out],
            evaluations=20,
            on_evaluation=report,
            folder=out,
            save_every=save_every,
            resume=resume,
            **run.settings,
        )
    if parallel.number() > 0:
        return flow
    facts = read_checkpoint(out)
    count = facts["settings"]["processes"]
    test = run.data("test", data_folder)
    figure = evaluate(flow, test, draws)
    halved = run.model().to(device)
    checkpoint.load_into(halved, checkpoint.halve(flow.state_dict()), MODEL)
    record = {
        "title": run.title,
        # What decides the result, not where its files lay.
        "command": f"{parallel.launcher()} -m nflows_lib train {name} "
        + (f"--steps {steps}" if steps else f"--budget {budget:g}s")
        + (" --compile" if compiled else ""),
        "hardware": (f"{count} × " if count > 1 else "") + origin()["hardware"],
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "steps": len(history.grad_norm),
        "minutes": facts["seconds"] / 60,
        "settings": facts["settings"],
        "figure": figure,
        "figure_in_half_precision": evaluate(halved, test, draws),
        "curve": _curve(flow, history),
    }
    if run.measure is not None:
        record["measured"] = run.measure(flow, test)
    checkpoint.save(out / MODEL, checkpoint.halve(flow.state_dict()), {"run": name})
    save_samples(flow, run.shape, out / SAMPLES, contexts=test.contexts)
    record["stages"] = save_stages(out, run.shape, [step for step, *_ in history.held_out])
    save(name, record, out)
    return flow


def measure_again(name: str, out: Path, data_folder: Path | None = None) -> dict[str, Any]:
    """Take a run's figures on the test images anew, of the model in its folder, and put them into its ``run.json``.

    For when a run has learned to measure more, or the test images have changed. The model is in half precision, so the
    whole one's figure stays where the images are as many as before; ``measured_at`` says at which commit it was done.

    Raises:
        ValueError: an unknown run, or one without further figures.
    """
    run = find(name)
    if run.measure is None:
        raise ValueError(f"run: expected one with further figures, got {name}")
    record = json.loads((out / RECORD).read_text())
    flow, test = load_flow(name, out), run.data("test", data_folder)
    figure = evaluate(flow, test, record["figure"]["draws"])
    record["figure_in_half_precision"] = figure
    if record["figure"]["images"] != figure["images"]:  # the test images are others: the whole figure is past
        record["figure"] = figure
    record |= {"measured": run.measure(flow, test), "measured_at": COMMIT}
    write_json(out / RECORD, record)
    return record["measured"]


def evaluate(flow: Flow, images: Images, draws: int = 10) -> dict[str, float]:
    """Bits/dim on images: mean, standard error over images, how many, and draws of the noise that each averages over.

    ``nats`` is the mean of log p(u), u in [0, 1), which papers on NICE quote.
    """
    with random_state_kept(next(flow.parameters(), images.images).device):
        torch.manual_seed(settings.seed(1))
        log_p = log_likelihoods(flow, images.images.reshape(-1, *flow.shape), images.contexts, draws)
    mean, error = mean_and_error(-log_p / (flow.dims * math.log(2)))
    nats = log_p.mean().item() + flow.dims * math.log(images.levels)
    return {"bits_per_dim": mean, "error": error, "images": len(log_p), "draws": draws, "nats": nats}


def in_one_bound(flow: Flow, images: Images, draws: int = 8) -> dict[str, Any]:
    """Bits/dim on images with the draws of the noise in one bound, log of the mean of p: tighter than their average.

    For comparisons with figures that were taken so (importance sampling; Burda et al. 2016).

    Raises:
        ValueError: draws is below 1.
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    log_p = []
    with random_state_kept(next(flow.parameters(), images.images).device):
        for i in range(draws):
            torch.manual_seed(settings.seed(100 + i))
            log_p.append(log_likelihoods(flow, images.images.reshape(-1, *flow.shape), images.contexts))
    mean, error = mean_and_error(-log_mean_exp(torch.stack(log_p)) / (flow.dims * math.log(2)))
    return {"draws_in_one_bound": draws, "bits_per_dim": mean, "error": error}


def save_samples(
    flow: Flow,
    shape: tuple[int, int, int],
    path: Path,
    n: int = 60,
    temperature: float = 1.0,
    contexts: Tensor | None = None,
) -> None:
    """Draw n samples, ten in a row, into a PNG: from the same latents every time, so that pictures can be compared.

    Where the flow is conditional, all of a row have the same context: the first of those that are given, the second ...
    """
    if contexts is not None:
        rows = torch.arange(n, device=contexts.device) // 10 % len(contexts)
        contexts = contexts[rows].to(next(flow.parameters()).device)
    with random_state_kept(next(flow.parameters()).device):
        torch.manual_seed(settings.seed(2))
        drawn = flow.sample(n, temperature, contexts).cpu()
    picture = plotting.tile(drawn, columns=10, levels=flow.levels, shape=shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.imsave(path, picture.squeeze(), cmap="gray", vmin=0, vmax=1)


def save_stages(
    out: Path,
    shape: tuple[int, int, int],
    steps: Collection[int] | None = None,
    parts: tuple[float, ...] = (0.05, 0.15, 0.4, 1),
) -> list[int]:
    """One sheet of how the samples came to be: for each part of the evaluations the first row of its samples.

    All rows are from the same latents. Into ``stages.png``, in 256 colours; the steps at which they were drawn. In a
    folder without such samples there are none, and no file. ``steps``: those of the evaluations; None: all that the
    folder has.
    """
    drawn = {int(path.stem.removeprefix("samples-")): path for path in sorted(out.glob("samples-*.png"))}
    drawn = [path for step, path in drawn.items() if steps is None or step in steps]
    if not drawn:
        return []
    chosen = list(dict.fromkeys(drawn[math.ceil(part * len(drawn)) - 1] for part in parts))
    sheets = [np.asarray(Image.open(path).convert("RGB")) for path in chosen]
    height = shape[1] + 1  # with the white line above it
    sheet = np.concatenate([sheet[:height] for sheet in sheets] + [sheets[0][:1]])
    Image.fromarray(sheet).quantize(256).save(out / STAGES, optimize=True)
    return [int(path.stem.removeprefix("samples-")) for path in chosen]


def load_flow(name: str, source: Path | None = None) -> Flow:
    """The trained flow of a run, on the CPU, in evaluation mode: from ``source``, else the one that is shipped.

    A folder of a run that has not ended yet gives the model of its last checkpoint.

    Raises:
        ValueError: an unknown run, or a file of another model.
        FileNotFoundError: the folder holds no model.
    """
    flow = find(name).model()
    source = source or folder(name)
    if (source / MODEL).exists():
        tensors, _ = checkpoint.load(source / MODEL)
    else:
        tensors = read_model(source)
        if tensors is None:
            raise FileNotFoundError(f"no {MODEL} and no checkpoint of {name} in {source}")
    checkpoint.load_into(flow, tensors, name)
    return flow.eval()


def _curve(flow: Flow, history: History, points: int = 100) -> dict[str, list[Any]]:
    """At most so many means of the training loss, and the held-out figures, all in bits/dim, rounded for the file."""
    bits = 1 / (flow.dims * math.log(2))
    width = -(-len(history.loss) // points)
    blocks = torch.tensor(history.loss).split(width)
    return {
        "step": [min((i + 1) * width, len(history.loss)) for i in range(len(blocks))],
        "training": [round(block.mean().item() * bits, 5) for block in blocks],
        "held_out": [[step, round(loss * bits, 5), round(error * bits, 5)] for step, loss, error in history.held_out],
    }


# --- records ----------------------------------------------------------------------------------------------------------


def _commit() -> str:
    """The checkout's commit, with "-dirty" where files were changed since; "unknown" outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


COMMIT = _commit()  # on import: by the end of a long run the checkout may have moved on


def origin() -> dict[str, Any]:
    """Where and with what a result was made: commit, versions, hardware."""
    return {
        "commit": COMMIT,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": _hardware(settings.device(prefer_gpu=True)),
    }


def _hardware(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} CPU threads"
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def folder(run: str) -> Path:
    """Where the record of a shipped run lies: ``run.json``, and beside it samples and, if it is small, the model."""
    return ROOT / "data" / "pretrained" / run


def work_folder(run: str) -> Path:
    """Where a run is trained if no other folder is named: beside the data sets, ignored by git."""
    return settings.data_folder() / "runs" / run


def save(run: str, record: Mapping[str, Any], out: Path | None = None) -> None:
    """Write ``run.json``: the record, and with it the run's name, its seed and its :func:`origin`."""
    write_json((out or folder(run)) / RECORD, {"run": run, "seed": settings.seed(), **origin(), **record})


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def load(run: str) -> dict[str, Any]:
    """The record of a shipped run.

    Raises:
        ValueError: there is none.
    """
    path = folder(run) / RECORD
    if not path.exists():
        known = sorted(p.parent.name for p in path.parent.parent.glob(f"*/{RECORD}"))
        raise ValueError(f"run: expected one of {', '.join(known) or '(no record yet)'}, got {run!r}")
    return json.loads(path.read_text())


def load_seeds(run: str) -> list[dict[str, Any]]:
    """The record of a shipped run, and those of the same run with other seeds, ``run-seed-1.json`` and so on.

    Raises:
        ValueError: there is none.
    """
    return [load(run), *(json.loads(path.read_text()) for path in sorted(folder(run).glob("run-seed-*.json")))]
