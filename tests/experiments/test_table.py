"""Tests of the table of runs: every entry builds its model, reads its images and can be trained.

All tests take their runs from the table itself, so a new run needs no line in this file. A new model needs an entry in
COUNTED and one in SMALL, a new data set needs an entry in tests/sets.py.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sets import SETS, accept_small_files, write_flowers5
from test_conditional import parameters_of_cglow
from test_pixelwise import parameters_of_unet
from torch.optim import Optimizer

from nflows_lib import models
from nflows_lib.data import Images
from nflows_lib.experiments import image_sets, precision, runs, segmentation, table, trainer
from nflows_lib.experiments.pixelwise import PixelClassifier
from nflows_lib.experiments.table import Run
from nflows_lib.flow import Flow
from nflows_lib.training import check_options, rate_factor

every_run = pytest.mark.parametrize("name", table.RUNS)


def test_the_table_is_read_without_torch():
    """A page or a shell completion that lists the runs does not wait for torch."""
    code = "import sys, nflows_lib.experiments.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_run_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"^run: expected one of .*, got 'nice-letters'$") as caught:
        table.find("nice-letters")
    assert all(name in str(caught.value) for name in table.RUNS)


@every_run
def test_every_word_of_a_run_stands_for_something(name):
    run = table.find(name)
    assert run.model in runs.MODELS
    assert run.data in runs.DATA
    assert run.training.get("augment") in {None, *runs.AUGMENTATIONS}
    assert run.metrics in {None, *runs.METRICS}
    assert run.title and run.budget > 0 and run.held_out > 0


def test_no_word_stands_for_nothing():
    """Every model, data set, augmentation and metric is used by some run, since the tests here test only those."""
    every = table.RUNS.values()
    assert runs.MODELS.keys() == {run.model for run in every}
    assert runs.DATA.keys() == {run.data for run in every}
    assert {*runs.AUGMENTATIONS, None} == {run.training.get("augment") for run in every}
    assert {*runs.METRICS, None} == {run.metrics for run in every}


# --- models -----------------------------------------------------------------------------------------------------------


class Built(NamedTuple):
    run: Run
    flow: Flow | PixelClassifier
    optimizer: Optimizer


@pytest.fixture(scope="module", params=table.RUNS)
def built(request) -> Iterator[Built]:
    """A run with its untrained model and its optimizer."""
    run = table.find(request.param)
    flow = runs.build(run)
    yield Built(run, flow, runs.optimizer_of(run, flow))


def parameters_of_nice(shape: tuple[int, int, int], couplings: int, hidden: int, depth: int, **others: Any) -> int:
    """The number of parameters, counted by hand.

    Each coupling has a network with biases from one half to the other, and the end has one scale per dimension.
    """
    dims = math.prod(shape)
    half = dims // 2
    network = (half + 1) * hidden + (depth - 1) * (hidden + 1) * hidden + (hidden + 1) * half
    return couplings * network + dims


def parameters_of_resnet(inputs: int, outputs: int, hidden: int, blocks: int) -> int:
    """The number of parameters, counted by hand.

    Every output has a length and a bias in addition to its weights. There are two 3x3 convolutions per block and one
    before the blocks, a 1x1 skip from each of these, and a 1x1 convolution at the end.
    """
    inside = 2 * blocks * (9 * hidden + 2) * hidden + (blocks + 1) * (hidden + 2) * hidden
    return (9 * inputs + 2) * hidden + inside + (hidden + 2) * outputs


def parameters_of_realnvp(
    shape: tuple[int, int, int], scales: int, couplings: int, hidden: int, blocks: int, **others: Any
) -> int:
    """The number of parameters, counted by hand.

    Each coupling has a gain and a network that sees [h, -h]. A scale that is not the last has six couplings, three of
    them after the squeeze. The next scale has half of those channels, and its networks are twice as wide.
    """

    def coupling(channels: int, width: int) -> int:
        return parameters_of_resnet(2 * channels, 2 * channels, width, blocks) + 1

    total, channels = 0, shape[0]
    for i in range(scales - 1):
        total += 3 * coupling(channels, hidden * 2**i) + 3 * coupling(4 * channels, hidden * 2**i)
        channels *= 2
    return total + couplings * coupling(channels, hidden * 2 ** (scales - 1))


def parameters_of_glow(
    shape: tuple[int, int, int],
    scales: int,
    steps: int,
    hidden: int,
    bounded: bool,
    bounded_priors: bool,
    noise: int,
    **others: Any,
) -> int:
    """The number of parameters, counted by hand.

    A step has an ActNorm, a matrix, and three convolutions, two of which have an ActNorm; between scales there are
    priors. The noise has two couplings, each with a gain and a network that sees [h, -h] and the image.
    """
    total, channels = 0, shape[0]
    if noise:
        total += 2 * (1 + parameters_of_resnet(3 * channels, 2 * channels, noise, 1))
    for left in range(scales - 1, -1, -1):
        channels *= 4
        half = channels // 2
        network = 9 * half * hidden + hidden**2 + 4 * hidden + 9 * hidden * channels + channels
        total += steps * (2 * channels + channels**2 + network + bounded)
        if left:
            total += 9 * half * channels + channels + bounded_priors
            channels = half
    return total


def parameters_of_mixture(run: Run) -> int:
    """The number of parameters, counted by hand: those of a bounded Glow, and what the mixtures have in addition.

    A mixture's second head gives three numbers per component and changed channel from each hidden channel, and its
    means have offsets.
    """
    size = size_of(run, models.glow) | {"bounded": True}
    mixtures, components = size.pop("mixtures", 1), size.pop("components", 4)
    total, half = parameters_of_glow(run.shape, **size), 2 * run.shape[0]
    for _ in range(size["scales"]):
        total += mixtures * (3 * components * half * (size["hidden"] + 1) + components * half)
        half *= 2
    return total


def size_of(run: Run, constructor: Callable) -> dict[str, Any]:
    """The arguments of a run's model by name: those of the run, and the constructor's defaults."""
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(run.size)


def count_of_cglow(run: Run) -> int:
    size = size_of(run, models.cglow)
    sizes = [size[name] for name in ("scales", "steps", "hidden", "conditioning")]
    return parameters_of_cglow(run.shape, run.context_shape, *sizes)


# By model: the number of parameters of a run, counted by hand.
COUNTED: dict[str, Callable[[Run], int]] = {
    "nice": lambda run: parameters_of_nice(run.shape, **size_of(run, models.nice)),
    "realnvp": lambda run: parameters_of_realnvp(run.shape, **size_of(run, models.realnvp)),
    "glow": lambda run: parameters_of_glow(run.shape, **size_of(run, models.glow)),
    "mixture": parameters_of_mixture,
    "cglow": count_of_cglow,
    "unet": lambda run: parameters_of_unet(
        run.context_shape[0], run.size["levels"] * run.shape[0], run.size["hidden"], 4
    ),
}


def test_a_run_builds_the_model_that_it_says(built):
    """The model is on images, or on vectors for NICE; every size changes the number of parameters."""
    run, flow, _ = built
    assert flow.shape == ((math.prod(run.shape),) if run.model == "nice" else run.shape)
    assert sum(parameter.numel() for parameter in flow.parameters()) == COUNTED[run.model](run)
    precisions = {module.precision for module in flow.modules() if hasattr(module, "precision")}
    assert precisions == (set() if run.model == "nice" else {precision.fastest(torch.device("cpu"))})


def test_a_run_s_optimizer_has_each_parameter_once_and_the_run_s_rates(built):
    run, flow, optimizer = built
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in flow.parameters())
    for name, value in run.rates.items():
        assert value in [group[name] for group in optimizer.param_groups]


def test_a_run_s_training_is_one_that_the_trainer_takes(built):
    """The options are the trainer's, are within their ranges, and are not among those that runs.train sets itself."""
    run, flow, optimizer = built
    given = {"folder", "steps", "budget", "context", "optimizer", "held_out", "held_out_context", "evaluations"}
    options = set(inspect.signature(trainer.train).parameters) - given
    assert run.training.keys() <= options
    assert 0 <= run.training.get("warmup", 0) < 1_000
    training = run.training
    check_options(flow, optimizer, 1_000, training["batch_size"], training.get("clip"), training.get("ema"))


def is_small(run: Run) -> bool:
    return run.model in COUNTED and COUNTED[run.model](run) < 2_000_000


def few(run: Run, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """n images of random levels, with contexts if the run has contexts."""
    torch.manual_seed(0)
    contexts = None if run.context_shape is None else torch.rand(n, *run.context_shape)
    return torch.randint(run.size.get("levels", 256), (n, *run.shape), dtype=torch.uint8), contexts


def augmented(run: Run, x: torch.Tensor, contexts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A run's augmentation, called as the trainer calls it."""
    augment = runs.AUGMENTATIONS.get(run.training.get("augment"))
    if augment is None:
        return x, contexts
    return (augment(x), None) if contexts is None else augment(x, contexts)


@pytest.mark.parametrize("built", [name for name, run in table.RUNS.items() if is_small(run)], indirect=True)
def test_a_small_run_has_a_finite_likelihood(built):
    """Random levels cost every model at least log2 of their number, and the first step of training keeps it finite.

    The step has the rate that the run's warm-up gives it.
    """
    run, flow, optimizer = built
    x, contexts = few(run, 8)
    x, contexts = augmented(run, x.view(-1, *flow.shape), contexts)
    flow.initialize(x, contexts)
    bits = -flow(x, contexts).mean() / (flow.dims * math.log(2))
    assert math.log2(flow.levels) - 0.1 < bits < math.log2(flow.levels) + 4
    bits.backward()
    for group in optimizer.param_groups:
        group["lr"] *= rate_factor(0, 0.0, run.training.get("warmup", 0), cosine=False)
    optimizer.step()
    assert flow(x, contexts).isfinite().all()
    drawn = flow.sample(2, context=None if contexts is None else contexts[:2])
    assert drawn.shape == (2, *flow.shape)


# Facts that the pages rely on and that no entry of the table states.


def test_glow_at_the_paper_s_size_has_44_million_parameters():
    assert round(COUNTED["glow"](table.find("glow-cifar10")) / 1e6) == 44


@pytest.mark.parametrize("size", ["", "-small"])
def test_flow_and_u_net_on_the_horses_are_of_one_size(size):
    flow, net = (table.find(f"{kind}-horses{size}") for kind in ("cglow", "unet"))
    assert COUNTED["unet"](net) == pytest.approx(COUNTED["cglow"](flow), rel=0.05)


def test_digits_are_not_mirrored():
    """A mirrored digit is not a digit."""
    digits = {"digits", "mnist", "svhn"}
    assert {run.training.get("augment") for run in table.RUNS.values() if run.data in digits} == {None}


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Iterator[Path]:
    """A folder with a few images of every data set that a run reads from files, in the real formats."""
    assert SETS.keys() == runs.DATA.keys() - {"digits"}, "a data set needs its small files in tests/sets.py"
    folder = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        accept_small_files(patch)
        for write in SETS.values():
            write(folder)
        yield folder


def test_the_images_of_a_run_are_those_of_its_model(built, sets):
    """Shape, levels and contexts fit before and after the augmentation; labels are not needed."""
    run, flow, _ = built
    for part in ("train", "test"):
        images = runs.images_of(run, part, sets)
        assert images.images.shape == (len(images.labels), *run.shape)
        assert (images.images.dtype, images.levels) == (torch.uint8, flow.levels)
        assert len(images.images) > 0
        if run.context_shape is None:
            assert images.contexts is None
        else:
            assert images.contexts.shape == (len(images.labels), *run.context_shape)
        x, contexts = augmented(run, images.images.view(-1, *flow.shape), images.contexts)
        assert (x.shape, x.dtype) == ((len(images.labels), *flow.shape), torch.uint8)
        assert contexts is None or contexts.shape == images.contexts.shape


def test_images_are_looked_for_where_the_environment_says(sets, monkeypatch):
    run = table.find("nice-svhn")
    monkeypatch.setenv("NFLOWS_DATA", str(sets))
    assert torch.equal(runs.images_of(run, "train").images, runs.images_of(run, "train", sets).images)
    monkeypatch.setenv("NFLOWS_DATA", str(sets / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="SVHN"):
        runs.images_of(run, "train")


# By model: sizes small enough to train for two steps.
SMALL: dict[str, dict[str, int]] = {
    "nice": {"couplings": 2, "hidden": 4, "depth": 1},
    "realnvp": {"scales": 2, "couplings": 2, "hidden": 2, "blocks": 1},
    "glow": {"steps": 1, "hidden": 2},
    "cglow": {"steps": 1, "hidden": 4, "conditioning": 4},
    "unet": {"hidden": 2},
}
# By data set: the first of its runs with the smallest images.
BY_SIZE = sorted(reversed(table.RUNS.items()), key=lambda item: -math.prod(item[1].shape))
SMALLEST = {run.data: name for name, run in BY_SIZE if run.data in SETS}


@pytest.mark.parametrize("name", sorted({*SMALLEST.values(), "nice-svhn", "realnvp-celeba"}))
def test_a_run_of_every_data_set_is_trained_from_its_files(name, sets, tmp_path, monkeypatch):
    """Two steps lead from files in the real formats to a record; the model is small, the rest is the table's."""
    run = table.find(name)
    training = dict(run.training) | {"batch_size": 2, "warmup": 0}
    small = replace(run, size=dict(run.size) | SMALL[run.model], held_out=2, training=training)
    monkeypatch.setitem(table.RUNS, name, small)
    monkeypatch.setitem(runs.METRICS, "segmentation", (partial(segmentation.metrics, samples=2, most=4), 10))
    flow = runs.train(name, tmp_path, data_folder=sets, steps=2, draws=1)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["run"], record["steps"]) == (name, 2)
    assert record["settings"]["examples"] == len(runs.images_of(run, "train", sets).images) - 2
    assert record["settings"]["augment"] == run.training.get("augment")
    assert record["figure"]["images"] == len(runs.images_of(run, "test", sets).images)
    assert math.isfinite(record["figure"]["bits_per_dim"])
    assert ("measured" in record) == (run.metrics is not None)
    assert flow.shape == runs.build(small).shape
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "samples.png").exists()


# --- the order of images ----------------------------------------------------------------------------------------------


def numbered(n: int, classes: int) -> Images:
    """n images that hold their own number, class after class."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, 2, 2)
    return Images(images, torch.arange(n) * classes // n, levels=200)


@pytest.mark.parametrize("n", [1, 7, 200])
def test_shuffled_is_one_order_for_ever(n):
    """Images and labels stay together; the random state is neither used nor changed."""
    images, found = numbered(n, 5), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(runs.shuffled(images))
        assert torch.equal(torch.get_rng_state(), state)
    first, again = found
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    number = first.images[:, 0, 0, 0].long()
    assert torch.equal(first.images, images.images[number])
    assert torch.equal(first.labels, images.labels[number])
    assert number.sort().values.tolist() == list(range(n))
    assert first.levels == 200
    if n > 1:
        assert number.tolist() != list(range(n))


def test_what_is_held_out_of_shuffled_images_is_of_every_class():
    """With 40 images of each class, the share within 20 images is not that of sorted ones."""
    assert runs.shuffled(numbered(200, 5)).labels[:20].unique().tolist() == [0, 1, 2, 3, 4]


def in_context(n: int) -> Images:
    """n images that hold their own number as their contexts."""
    images = numbered(n, 5)
    return Images(images.images, images.labels, images.levels, images.images.float())


def test_shuffled_images_keep_their_contexts():
    found = runs.shuffled(in_context(50))
    assert torch.equal(found.contexts, found.images.float())
    assert found.labels.tolist() == [number // 10 for number in found.images[:, 0, 0, 0].tolist()]
    assert not torch.equal(found.images, in_context(50).images)
    assert runs.shuffled(numbered(50, 5)).contexts is None


@pytest.mark.parametrize(("name", "read"), [("flowers102", image_sets.flowers102), ("horses", segmentation.horses)])
def test_sets_that_lie_sorted_come_shuffled(name, read, sets):
    run = table.find(SMALLEST[name])
    expected = runs.shuffled(read("train", sets, size=run.shape[1]))
    found = runs.images_of(run, "train", sets)
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)
    assert found.contexts is expected.contexts or torch.equal(found.contexts, expected.contexts)


def test_flowers5_reads_and_splits_its_folder(tmp_path, monkeypatch):
    """Every sixth photograph is for testing; the others are shuffled, each with its class."""
    run, greys = table.find("glow-flowers5"), [0, 40, 80, 120, 160, 200]
    write_flowers5(tmp_path, greys)
    train, test = runs.images_of(run, "train", tmp_path), runs.images_of(run, "test", tmp_path)
    assert (train.images.shape, test.images.shape) == ((5, 3, 64, 64), (1, 3, 64, 64))
    found = train.images[:, 0, 0, 0].tolist()
    assert sorted(found) == greys[:5] != found
    assert train.labels.tolist() == [int(grey > 100) for grey in found]
    assert (test.images[0, 0, 0, 0], test.labels.tolist()) == (200, [1])
    assert torch.equal(runs.images_of(run, "train", tmp_path).images, train.images)
    monkeypatch.setenv("NFLOWS_DATA", str(tmp_path))
    assert torch.equal(runs.images_of(run, "train").images, train.images)


def test_flowers5_that_are_not_there_are_named(tmp_path):
    place = re.escape(str(tmp_path / "flowers5"))
    message = f"expected a folder with images .*, got {place}, which is not a folder"
    with pytest.raises(FileNotFoundError, match=message):
        runs.images_of(table.find("glow-flowers5"), "train", tmp_path)
