"""Named runs: the meaning of the table's words, and the functions that train, evaluate and load a run by its name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from tqdm.auto import tqdm

from nflows_lib import data, settings
from nflows_lib.checks import check_at_least, is_number
from nflows_lib.data import Images
from nflows_lib.distributions import random_state_kept
from nflows_lib.evaluation import log_likelihoods, log_mean_exp, mean_and_error
from nflows_lib.experiments import (
    archive,
    checkpoint,
    compiling,
    image_sets,
    precision,
    processes,
    segmentation,
    sheets,
    table,
    trainer,
)
from nflows_lib.experiments.archive import MODEL, RECORD, SAMPLES
from nflows_lib.experiments.mixture import mixture_glow
from nflows_lib.experiments.pixelwise import PixelClassifier, UNet
from nflows_lib.experiments.table import Run
from nflows_lib.flow import Flow
from nflows_lib.models import cglow, glow, nice, realnvp
from nflows_lib.training import History

CPU = torch.device("cpu")
ROUNDED = 1000  # a run measures on this number of test images what half-precision weights cost

# --- what the table's words stand for ---------------------------------------------------------------------------------


def nice_optimizer(flow: Flow, lr: float, weight_decay: float) -> Optimizer:
    """AdamW, with a higher rate and no decay for the log-scales of NICE's last layer, which move far in training."""
    scales = flow.chain[-1].log_scale
    networks = [parameter for parameter in flow.parameters() if parameter is not scales]
    groups = [
        {"params": networks, "lr": lr, "weight_decay": weight_decay},
        {"params": [scales], "lr": 1e-2, "weight_decay": 0.0},
    ]
    return AdamW(groups, betas=(0.9, 0.99), fused=True)


def realnvp_optimizer(flow: Flow, lr: float) -> Optimizer:
    """Adam, with the paper's L2 of 5e-5 only on the lengths of the normalised weights and on the couplings' gains."""
    groups: dict[bool, list[torch.nn.Parameter]] = {False: [], True: []}
    for name, parameter in flow.named_parameters():
        groups[name.endswith(("weight.original0", "gain"))].append(parameter)
    return Adam([{"params": groups[False]}, {"params": groups[True], "weight_decay": 5e-5}], lr=lr, fused=True)


def adam(flow: Flow | PixelClassifier, lr: float) -> Optimizer:
    """Adam, with one rate for all parameters."""
    return Adam(flow.parameters(), lr=lr, fused=True)


def unet_classifier(
    shape: tuple[int, int, int],
    context_shape: tuple[int, int, int],
    *,
    levels: int,
    hidden: int,
    precision: torch.dtype,
) -> PixelClassifier:
    """The deterministic network that :func:`nflows_lib.models.cglow` is compared with: a U-Net of four sizes."""
    return PixelClassifier(UNet(context_shape[0], levels * shape[0], hidden, 4, precision), shape, levels)


# By a model's name: its constructor and its optimizer. Every constructor takes the precision of the networks except
# that of NICE, which takes vectors and computes in float32.
MODELS: dict[str, tuple[Callable[..., Any], Callable[..., Optimizer]]] = {
    "nice": (lambda shape, precision, **size: nice(math.prod(shape), **size), nice_optimizer),
    "realnvp": (realnvp, realnvp_optimizer),
    "glow": (glow, adam),
    "mixture": (mixture_glow, adam),
    "cglow": (cglow, adam),
    "unet": (unet_classifier, adam),
}

# By a data set's name: a function of the part, the folder (the usual one if None) and the size to resize to. If
# torchvision can fetch the set, the function also takes ``download``.
DATA: dict[str, Callable[..., Images]] = {
    "digits": lambda part, folder, size: data.digits(part),
    "mnist": lambda part, folder, size, download=False: data.mnist(part, folder, download),
    "cifar10": lambda part, folder, size, download=False: data.cifar10(part, folder, download),
    "svhn": lambda part, folder, size, download=False: image_sets.svhn(part, folder, download),
    "celeba": lambda part, folder, size, download=False: image_sets.celeba(part, folder, download, size=size),
    "flowers102": lambda part, folder, size, download=False: shuffled(
        image_sets.flowers102(part, folder, download, size=size)
    ),
    "flowers5": lambda part, folder, size: shuffled(
        image_sets.image_folder(Path(folder or settings.data_folder()) / "flowers5", size, part)
    ),
    "horses": lambda part, folder, size: shuffled(segmentation.horses(part, folder, size=size)),
}

AUGMENTATIONS = {augment.__name__: augment for augment in (image_sets.random_flip, segmentation.random_view)}

# By a metric's name: what measures it, and how many passes of the images through the flow that takes (for a budget).
METRICS: dict[str, tuple[Callable[[Flow, Images], dict[str, Any]], int]] = {
    "one bound": (lambda flow, images: in_one_bound(flow, images), 8),
    "segmentation": (segmentation.metrics, 230),
}


def build(run: Run, device: torch.device = CPU, networks_in: torch.dtype | None = None) -> Flow | PixelClassifier:
    """A run's untrained model on a device; if no precision is given, its networks have the device's fastest."""
    constructor, _ = MODELS[run.model]
    shapes = [run.shape] if run.context_shape is None else [run.shape, run.context_shape]
    return constructor(*shapes, precision=networks_in or precision.fastest(device), **run.size).to(device)


def optimizer_of(run: Run, flow: Flow | PixelClassifier) -> Optimizer:
    """The optimizer that trains a run's model."""
    _, constructor = MODELS[run.model]
    return constructor(flow, **run.rates)


def images_of(run: Run, part: str, folder: Path | None = None, *, download: bool = False) -> Images:
    """A run's images.

    Args:
        run: the run.
        part: "train" or "test".
        folder: the folder that holds the data sets; the usual one if None.
        download: whether to fetch the data set into the folder if it is missing.

    Raises:
        ValueError: if download is True and torchvision cannot fetch the data set, or if a file is damaged.
        FileNotFoundError: if the data set is not in the folder.
        OSError: if the download fails.
    """
    if not download:
        return DATA[run.data](part, folder, run.shape[1])
    fetched = [name for name, read in DATA.items() if "download" in inspect.signature(read).parameters]
    if run.data not in fetched:
        raise ValueError(f"download: expected a run on one of the sets {', '.join(fetched)}, got a run on {run.data}")
    try:
        return DATA[run.data](part, folder, run.shape[1], download=True)
    except RuntimeError as error:
        raise OSError(f"the download of {run.data} failed: {error}") from error


def shuffled(images: Images) -> Images:
    """The images in a fixed random order: a run holds out the first ones, which must not all be of one class."""
    return images.select(torch.randperm(len(images.images), generator=torch.Generator().manual_seed(0)))


# --- training, evaluating, loading ------------------------------------------------------------------------------------


def train(
    name: str,
    out: Path | None = None,
    *,
    data_folder: Path | None = None,
    steps: int | None = None,
    budget: float | None = None,
    draws: int | None = None,
    save_every: float = 60.0,
    resume: bool = False,
    compiled: bool | None = None,
    download: bool = False,
) -> Flow:
    """Train a named run, on the GPU if there is one, and return the flow on its device.

    Under torchrun several processes share the run. The folder ``out`` gets checkpoints and samples during the training
    and, at the end, the model, samples and ``run.json``: command, commit, versions, hardware, seed, settings, curve and
    result.

    Args:
        name: a key of ``RUNS`` in :mod:`nflows_lib.experiments.table`.
        out: the run's folder; ``runs/<name>`` next to the data sets if None.
        data_folder: the folder that holds the data sets; the usual one if None.
        steps: number of updates; as many as the budget allows if None.
        budget: seconds for the whole run, evaluation included. If None, the budget of the checkpoint that is resumed,
            else the table's.
        draws: draws of the noise that the final result averages over; what :func:`draws_enough` returns if None.
        save_every: seconds between two checkpoints.
        resume: whether to go on from the folder's checkpoint, if there is one.
        compiled: whether torch.compile makes one graph of the flow, which takes a minute or more and then makes steps
            faster. If None, a resumed run does what it did before. A new run is then compiled if its budget, given or
            the table's, is longer than ten minutes (on a CPU also longer than two seconds per parameter tensor), unless
            ``steps`` is given, there is no compiler, torchrun started the run, or it is on mps.
        download: whether to fetch the data set first, if it is missing.

    Raises:
        ValueError: if the run is unknown, if the folder holds a checkpoint and resume is False, if draws is below 1, if
            compiled is True under torchrun or on mps, if the data set has no more images than the run holds out, or if
            :func:`images_of` or :func:`~nflows_lib.experiments.trainer.train` raises it.
        FileNotFoundError, OSError: as in :func:`images_of`.
    """
    run = table.find(name)
    check_at_least(1, draws=1 if draws is None else draws)
    out = Path(out or archive.work_folder(name))
    made = archive.origin()
    earlier = trainer.read_checkpoint(out) if resume else None
    if steps is None and budget is None:
        asked = earlier["asked"] if earlier else {"steps": None, "budget": run.budget}
        steps, budget = asked["steps"], asked["budget"]
    # A resumed run keeps its precision. Checkpoints that name no precision are from when all runs had bfloat16.
    kept = getattr(torch, earlier["settings"].get("precision", "bfloat16")) if earlier else None
    if budget is not None and not is_number(budget):
        raise ValueError(f"budget: expected a finite number of seconds above 0, got {budget!r}")
    torch.manual_seed(settings.seed())

    def report(judged: Flow, history: History) -> None:
        step, loss, error = history.held_out[-1]
        bits = 1 / (judged.dims * math.log(2))
        recent = history.loss[-100:]
        tqdm.write(
            f"step {step:,}: training {sum(recent) / len(recent) * bits:.4f}, "
            f"held out {loss * bits:.4f} ± {error * bits:.4f} bits/dim"
        )
        sheets.save_samples(judged, run.shape, out / f"samples-{step:07d}.png", contexts=contexts)

    with processes.process_group() as device:
        before = earlier["settings"].get("compiled", False) if earlier else None
        flow = build(run, device, kept)
        worth_it = compiling.is_worth_it(budget, flow, device)
        chosen = compiling.choose(compiled, before, worth_it, device)
        images, test = _both_parts(run, data_folder, download)
        examples = images.images.reshape(-1, *flow.shape).to(device)  # batches are drawn, flipped and dequantized there
        contexts = None if images.contexts is None else images.contexts.to(device)
        passes = (draws or 2) + (METRICS[run.metrics][1] if run.metrics else 0)
        options = dict(run.training)
        augment = options.pop("augment", None)
        history = trainer.train(
            flow,
            examples[run.held_out :],
            steps,
            folder=out,
            budget=budget,
            context=None if contexts is None else contexts[run.held_out :],
            augment=None if augment is None else AUGMENTATIONS[augment],
            optimizer=optimizer_of(run, flow),
            held_out=examples[: run.held_out],
            held_out_context=None if contexts is None else contexts[: run.held_out],
            evaluations=20,
            on_evaluation=report,
            afterwards=len(test.images) * passes + 2 * ROUNDED,
            save_every=save_every,
            resume=resume,
            compiled=chosen,
            **options,
        )
    if processes.rank() > 0:
        return flow
    facts = trainer.read_checkpoint(out)
    count = facts["settings"]["processes"]
    result = evaluate(flow, test, draws)
    halved = checkpoint.halve(flow.state_dict())
    stored = build(run, device, getattr(torch, facts["settings"]["precision"]))
    checkpoint.load_into(stored, halved, MODEL)
    record = made | {
        "title": run.title,
        # The command names what decides the result, not the folders.
        "command": f"{processes.launcher()} -m nflows_lib train {name} "
        + (f"--steps {steps}" if steps else f"--budget {budget:g}s")
        + (" --compile" if facts["settings"]["compiled"] else " --no-compile" if worth_it else ""),
        "hardware": (f"{count} × " if count > 1 else "") + made["hardware"],
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "steps": len(history.grad_norm),
        "minutes": facts["seconds"] / 60,
        "settings": facts["settings"],
        "figure": result,
        "half_precision_adds": difference(stored, flow, test.select(torch.arange(len(test.images))[:ROUNDED])),
        "curve": _curve(flow, history),
    }
    if facts["schedule"]["warmup"] != facts["settings"]["warmup"]:
        record["warmup_shortened_to"] = facts["schedule"]["warmup"]
    if run.metrics is not None:
        measure, _ = METRICS[run.metrics]
        record["measured"] = measure(flow, test)
    checkpoint.save(out / MODEL, halved, {"run": name})
    sheets.save_samples(flow, run.shape, out / SAMPLES, contexts=test.contexts)
    record["stages"] = sheets.save_stages(out, run.shape, [step for step, *_ in history.held_out])
    archive.save(name, record, out)
    return flow


def _both_parts(run: Run, folder: Path | None, download: bool) -> list[Images]:
    """A run's images to train on and to test; of several processes, rank 0 downloads them while the others wait."""
    leads, parts = processes.rank() == 0, ("train", "test")
    if download and not leads:
        processes.broadcast(None)
    options = {"download": True} if download and leads else {}
    images, test = (images_of(run, part, folder, **options) for part in parts)
    if download and leads:
        processes.broadcast(None)
    if len(images.images) <= run.held_out:
        expected = f"more than {run.held_out:,} images to train on, the number that the run holds out"
        raise ValueError(f"data_folder: expected {expected}, got {len(images.images):,}")
    return [images, test]


def measure_again(name: str, out: Path, data_folder: Path | None = None) -> dict[str, Any]:
    """Measure a run's further metrics again, with the model in the folder ``out``, and write them to its ``run.json``.

    This is for runs whose metrics or test images have changed. If the number of test images is another one, bits/dim
    are measured again as well. ``measured_at`` in the record is the commit at which this was done.

    Raises:
        ValueError: if the run is unknown, if it has no further metrics, or if its ``run.json`` is broken.
        FileNotFoundError: if the folder holds no ``run.json``, or the data set is missing.
    """
    run = table.find(name)
    if run.metrics is None:
        raise ValueError(f"run: expected a run with further metrics, got {name}")
    record = archive.read_json(Path(out) / RECORD, "figure")
    flow = load_flow(name, out, settings.device(prefer_gpu=True))
    test = images_of(run, "test", data_folder)
    if record["figure"]["images"] != len(test.images):
        record["figure"] = evaluate(flow, test, record["figure"]["draws"])
    measure, _ = METRICS[run.metrics]
    record |= {"measured": measure(flow, test), "measured_at": archive.commit()}
    archive.write_json(Path(out) / RECORD, record)
    return record["measured"]


def evaluate(flow: Flow, images: Images, draws: int | None = None) -> dict[str, float]:
    """Bits/dim on images, as a dictionary for the record.

    Args:
        flow: the model.
        images: the images.
        draws: draws of the noise that each image's log p averages over; what :func:`draws_enough` returns if None.

    Returns:
        ``bits_per_dim``, the mean over images; ``error``, its standard error over images; ``images``, their number;
        ``draws``; and ``nats``, the mean of log p(u) for u in [0, 1), which papers on NICE quote.
    """
    draws = draws_enough(flow, images) if draws is None else draws
    log_p = _log_likelihoods(flow, images, draws)
    mean, error = mean_and_error(-log_p / (flow.dims * math.log(2)))
    nats = log_p.mean().item() + flow.dims * math.log(images.levels)
    return {"bits_per_dim": mean, "error": error, "images": len(log_p), "draws": draws, "nats": nats}


def draws_enough(flow: Flow, images: Images, most: int = 10, part: int = 250) -> int:
    """The number of draws of the noise beyond which the standard error of the mean would shrink by less than 1 %.

    That error comes from two variances: that of log p between images, and that between draws of one image divided by
    the number of draws. Both are estimated from two draws for each of the first ``part`` images. The result is at most
    ``most``.
    """
    first = images.select(torch.arange(min(part, len(images.images))))
    pair = [_log_likelihoods(flow, first, 1, seed=settings.seed(i)) for i in (1, 2)]
    between_draws = (pair[0] - pair[1]).var().item() / 2
    between_images = torch.stack(pair).mean(0).var().item() - between_draws / 2
    if not between_draws > 0:  # there is no noise, or log p is NaN
        return 1
    needed = between_draws / (0.02 * between_images) if between_images > 0 else most
    return math.ceil(min(needed, most))


def difference(flow: Flow, other: Flow, images: Images) -> dict[str, float]:
    """How many bits/dim a flow is worse than another on images with the same noise: mean, standard error, count."""
    log_p = _log_likelihoods(other, images, 1) - _log_likelihoods(flow, images, 1)
    mean, error = mean_and_error(log_p / (flow.dims * math.log(2)))
    return {"bits_per_dim": mean, "error": error, "images": len(log_p)}


def _log_likelihoods(flow: Flow, images: Images, draws: int, seed: int | None = None) -> Tensor:
    """log p of every image in nats, (N,), with noise that depends only on the seed."""
    with random_state_kept(next(flow.parameters(), images.images).device):
        torch.manual_seed(settings.seed(1) if seed is None else seed)
        return log_likelihoods(flow, images.images.reshape(-1, *flow.shape), images.contexts, draws)


def in_one_bound(flow: Flow, images: Images, draws: int = 8) -> dict[str, Any]:
    """Bits/dim on images by the importance-weighted bound: the log of the mean of p over draws of the noise.

    This bound is tighter than the mean of log p over the draws. It is for comparisons with results that are
    importance-weighted as well (Burda et al. 2016).

    Raises:
        ValueError: if draws is below 1.
    """
    check_at_least(1, draws=draws)
    log_p = [_log_likelihoods(flow, images, 1, seed=settings.seed(100 + i)) for i in range(draws)]
    mean, error = mean_and_error(-log_mean_exp(torch.stack(log_p)) / (flow.dims * math.log(2)))
    return {"draws_in_one_bound": draws, "bits_per_dim": mean, "error": error}


def load_flow(name: str, source: Path | None = None, device: torch.device = CPU) -> Flow:
    """The trained flow of a run, in evaluation mode on a device.

    The flow is read from the folder ``source``, by default that of the shipped run. The folder of a run that has not
    ended yet gives the model of its last checkpoint. In whatever precision the flow was trained, its networks compute
    in the device's fastest one, bfloat16 or float32.

    Raises:
        ValueError: if the run is unknown or the file holds another model.
        FileNotFoundError: if the folder holds no model.
    """
    flow = build(table.find(name), device)
    source = Path(source or archive.folder(name))
    if (source / MODEL).exists():
        tensors, _ = checkpoint.load(source / MODEL)
    else:
        tensors = trainer.read_model(source)
        if tensors is None:
            raise FileNotFoundError(f"no {MODEL} and no checkpoint of {name} in {source}")
    checkpoint.load_into(flow, tensors, name)
    return flow.eval()


def _curve(flow: Flow, history: History, points: int = 100) -> dict[str, list[Any]]:
    """The curve of a record in rounded bits/dim: means of the training loss, one per point, and the held-out losses."""
    bits = 1 / (flow.dims * math.log(2))
    width = -(-len(history.loss) // points)
    blocks: tuple[Tensor, ...] = torch.tensor(history.loss).split(width)
    return {
        "step": [min((i + 1) * width, len(history.loss)) for i in range(len(blocks))],
        "training": [round(block.mean().item() * bits, 5) for block in blocks],
        "held_out": [[step, round(loss * bits, 5), round(error * bits, 5)] for step, loss, error in history.held_out],
    }
