"""Named runs from the command line to their records: written whole, read back, described by themselves."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from test_conditional import parameters_of_cglow
from test_pixelwise import parameters_of_unet
from torch import nn

from nflows_lib import data, plotting, settings, training
from nflows_lib.__main__ import main
from nflows_lib.coupling import BoundedGlowCoupling, GlowCoupling
from nflows_lib.data import Images
from nflows_lib.dequantization import Logit, Rescale, UniformDequantize, VariationalDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments import archive, checkpoint, runs, segmentation, sheets, table
from nflows_lib.experiments.pixelwise import PixelClassifier
from nflows_lib.flow import Flow
from nflows_lib.models import cglow
from nflows_lib.multiscale import FactorOut
from nflows_lib.networks import BoundedPrior, GlowNet, ZeroConv


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return tmp_path


def test_a_record_comes_back_with_where_it_was_made(root, monkeypatch):
    monkeypatch.setenv("NFLOWS_SEED", "2")
    archive.save("small", {"nats": 1.5, "curve": [1.0, 2.0]})
    record = archive.load("small")
    assert record["nats"] == 1.5
    assert record["curve"] == [1.0, 2.0]
    assert record["run"] == "small"
    assert record["seed"] == 2000
    assert record["torch"] == torch.__version__
    assert record["commit"] == archive.commit()
    assert os.listdir(archive.folder("small")) == ["run.json"]


def test_a_failed_write_keeps_the_record_there_is(root, monkeypatch):
    archive.save("small", {"nats": 1.5})

    def disk_full(source, target):
        raise OSError("no space left")

    monkeypatch.setattr(runs.os, "replace", disk_full)
    with pytest.raises(OSError, match="no space left"):
        archive.save("small", {"nats": 2.5})
    assert archive.load("small")["nats"] == 1.5


def test_an_unknown_run_is_refused_by_name(root):
    with pytest.raises(ValueError, match=r"run: expected one of \(no record yet\), got 'large'"):
        archive.load("large")
    archive.save("small", {})
    with pytest.raises(ValueError, match="run: expected one of small, got 'large'"):
        archive.load("large")


def test_the_shipped_records_say_what_made_them():
    found = sorted((archive.ROOT / "data" / "pretrained").glob("*/run.json"))
    assert found
    for path in found:
        record = json.loads(path.read_text())
        assert record.keys() >= {"command", "commit", "seed", "python", "torch", "hardware", "minutes", "parameters"}
        assert record["run"] == path.parent.name
        assert not record["commit"].endswith("-dirty")


def test_the_records_of_other_seeds_come_after_the_first(root):
    with pytest.raises(ValueError, match=r"run: expected one of \(no record yet\), got 'small'"):
        archive.load_seeds("small")
    archive.save("small", {"nats": 0})
    assert [record["nats"] for record in archive.load_seeds("small")] == [0]
    for seed in (2, 1):
        archive.write_json(archive.folder("small") / f"run-seed-{seed}.json", {"nats": seed})
    assert [record["nats"] for record in archive.load_seeds("small")] == [0, 1, 2]


# --- the table --------------------------------------------------------------------------------------------------------

# Shape, scales, steps at each, channels inside the networks, whether the scales are bounded, and those of the priors,
# and the channels inside the networks of the noise.
GLOWS = {
    "glow-cifar10-small": ((3, 32, 32), 3, 8, 64, False, False, 0),
    "glow-cifar10-bounded": ((3, 32, 32), 3, 8, 64, True, False, 0),
    "glow-cifar10": ((3, 32, 32), 3, 32, 512, False, False, 0),
    "glow-cifar10-10min": ((3, 32, 32), 3, 16, 512, True, True, 64),
    "glow-flowers": ((3, 64, 64), 4, 16, 256, True, False, 0),
    "glow-flowers5": ((3, 64, 64), 4, 16, 256, True, False, 0),
    "glow-flowers5-small": ((3, 64, 64), 4, 4, 64, True, True, 0),
    "glow-mnist": ((1, 28, 28), 2, 8, 64, True, True, 16),
    "glow-mnist-10min": ((1, 28, 28), 2, 12, 256, True, True, 64),
}
# Learning rate and batch size of those that do not have 1e-3 and 64.
RATES = {"glow-cifar10-small": 4e-3, "glow-cifar10-bounded": 4e-3, "glow-flowers5-small": 3e-3, "glow-mnist": 4e-3}
RATES |= {"glow-cifar10-10min": 2e-3, "glow-mnist-10min": 2e-3}
BATCHES = {"glow-flowers5-small": 32, "glow-cifar10-10min": 512, "glow-mnist-10min": 512}


def parameters_of_glow(
    shape: tuple[int, int, int], scales: int, steps: int, hidden: int, bounded: bool, bounded_priors: bool, noise: int
) -> int:
    """Counted by hand: ActNorm, matrix, three convolutions of which two have an ActNorm; priors between scales.

    The noise has two couplings with a gain and a network each, of two 3x3 convolutions between a 3x3 and a 1x1, with
    two 1x1 skips; each output has a length and a bias beside its weights.
    """
    total, channels = 0, shape[0]
    if noise:
        inner = (9 * 3 * channels + 2) * noise + 2 * (9 * noise + 2) * noise + 2 * (noise + 2) * noise
        total += 2 * (1 + inner + (noise + 2) * 2 * channels)
    for left in range(scales - 1, -1, -1):
        channels *= 4
        half = channels // 2
        network = 9 * half * hidden + hidden**2 + 4 * hidden + 9 * hidden * channels + channels
        total += steps * (2 * channels + channels**2 + network + bounded)
        if left:
            total += 9 * half * channels + channels + bounded_priors
            channels = half
    return total


def test_every_run_of_glow_is_tested():
    assert [name for name in table.RUNS if name.startswith("glow")] == list(GLOWS)


@pytest.mark.parametrize("name", GLOWS)
def test_a_run_of_glow_builds_the_flow_that_it_says(name):
    run, (shape, scales, steps, hidden, bounded, bounded_priors, noise) = table.find(name), GLOWS[name]
    with torch.device("meta" if hidden > 64 and not noise else "cpu"):  # no place for large ones; masks need values
        flow = run.model()
        optimizer = run.optimizer(flow)
    assert run.shape == flow.shape == shape
    assert flow.levels == 256
    couplings = [type(module) for module in flow.modules() if isinstance(module, GlowCoupling)]
    assert couplings == [BoundedGlowCoupling if bounded else GlowCoupling] * (scales * steps)
    priors = [module.prior for module in flow.modules() if isinstance(module, FactorOut)]
    assert [type(prior) for prior in priors] == [BoundedPrior if bounded_priors else ZeroConv] * (scales - 1)
    assert type(flow.chain[0]) is (VariationalDequantize if noise else UniformDequantize)
    assert [layer.alpha for layer in flow.chain if isinstance(layer, Logit)] == ([1e-4] if "mnist" in name else [])
    networks = [module for module in flow.modules() if isinstance(module, GlowNet)]
    assert {(network.precision, network.context) for network in networks} == {(torch.bfloat16, 0)}
    assert sum(parameter.numel() for parameter in flow.parameters()) == parameters_of_glow(*GLOWS[name])
    (group,) = optimizer.param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in flow.parameters()}
    assert group["lr"] == RATES.get(name, 1e-3)
    assert run.settings["batch_size"] == BATCHES.get(name, 64)


def test_glow_at_the_paper_s_size_has_44_million_parameters():
    assert round(parameters_of_glow(*GLOWS["glow-cifar10"]) / 1e6) == 44


@pytest.mark.parametrize("name", [name for name, size in GLOWS.items() if size[3] == 64])
def test_a_small_run_of_glow_has_a_finite_likelihood(name):
    """Of random levels, that no model can tell in less than 8 bits; as its networks compute, a first step included."""
    torch.manual_seed(0)
    run = table.find(name)
    flow = run.model()
    k = torch.randint(256, (4, *run.shape), dtype=torch.uint8)
    augment = run.settings.get("augment", lambda x: x)
    flow.initialize(augment(k))
    loss = flow.bits_per_dim(augment(k)).mean()
    assert 8 < loss < 12
    loss.backward()
    run.optimizer(flow).step()
    assert flow.bits_per_dim(k).isfinite().all()


@pytest.mark.parametrize("name", GLOWS)
def test_a_run_of_glow_reads_its_data_and_mirrors_photographs(name):
    """Digits that are mirrored are no digits; the flowers are tested below."""
    run = table.find(name)
    assert run.settings.get("augment") is (None if "mnist" in name else data.random_flip)
    if "flowers" not in name:
        assert run.data is (data.mnist if "mnist" in name else data.cifar10)


def numbered(n: int, classes: int) -> Images:
    """n images that tell their number, class after class."""
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
    """Of 40 images of each kind: the share in 20 does not come from sorted ones."""
    assert runs.shuffled(numbered(200, 5)).labels[:20].unique().tolist() == [0, 1, 2, 3, 4]


def test_the_flowers_of_oxford_are_shuffled(monkeypatch, tmp_path):
    asked = []

    def flowers102(part: str, folder: Path | None) -> Images:
        asked.append((part, folder))
        return numbered(50, 5)

    monkeypatch.setattr(data, "flowers102", flowers102)
    for part, folder in (("train", None), ("test", tmp_path)):
        found = table.find("glow-flowers").data(part, folder)
        assert torch.equal(found.images, runs.shuffled(numbered(50, 5)).images)
    assert asked == [("train", None), ("test", tmp_path)]


@pytest.fixture
def flowers(tmp_path) -> Path:
    """A folder with six photographs of two kinds of flower: the pixels of each say which it is."""
    for i, name in enumerate(["rose/1.jpg", "rose/2.png", "rose/3.jpeg", "tulip/1.png", "tulip/2.JPG", "tulip/3.png"]):
        path = tmp_path / "flowers5" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((70 + 5 * i, 90, 3), 40 * i, np.uint8)).save(path)
    return tmp_path


def test_flowers5_reads_and_splits_its_folder(flowers, monkeypatch):
    """Every sixth photograph is for testing, the others come shuffled, each with its kind."""
    load = table.find("glow-flowers5").data
    train, test = load("train", flowers), load("test", flowers)
    assert (train.images.shape, test.images.shape) == ((5, 3, 64, 64), (1, 3, 64, 64))
    assert (train.images.dtype, train.levels) == (torch.uint8, 256)
    greys = train.images[:, 0, 0, 0].tolist()
    assert sorted(greys) == [0, 40, 80, 120, 160]
    assert greys != sorted(greys)
    assert [label == (grey > 100) for label, grey in zip(train.labels.tolist(), greys, strict=True)] == [True] * 5
    assert (test.images[0, 0, 0, 0], test.labels.tolist()) == (200, [1])
    assert torch.equal(load("train", flowers).images, train.images)
    monkeypatch.setenv("NFLOWS_DATA", str(flowers))
    assert torch.equal(load("train", None).images, train.images)


def test_flowers5_that_are_not_there_are_named(tmp_path):
    place = re.escape(str(tmp_path / "flowers5"))
    with pytest.raises(FileNotFoundError, match=f"expected one with images .*, got {place}, which is no folder"):
        runs.flowers5("train", tmp_path)


# What the runs on horses build: height and width, and the sizes of what is inside.
HORSES = {
    "cglow-horses": (64, {"steps": 8, "hidden": 256, "conditioning": 64}),
    "unet-horses": (64, {"hidden": 94}),
    "cglow-horses-small": (32, {"steps": 4, "hidden": 64, "conditioning": 32}),
    "unet-horses-small": (32, {"hidden": 28}),
    "unet-horses-early": (32, {"hidden": 28}),
}


def test_every_run_on_horses_is_tested_and_they_alone_are_conditional():
    assert [name for name, run in table.RUNS.items() if run.context_shape] == list(HORSES)
    measured = [name for name, run in table.RUNS.items() if run.measure]
    assert measured == ["glow-mnist", "glow-mnist-10min", *HORSES]


@pytest.mark.parametrize("name", HORSES)
def test_a_run_on_horses_builds_what_it_says(name):
    run, (size, inside) = table.find(name), HORSES[name]
    with torch.device("meta"):
        flow = run.model()
        optimizer = run.optimizer(flow)
    assert run.shape == flow.shape == (1, size, size)
    assert run.context_shape == (3, size, size)
    assert flow.levels == 2
    if name.startswith("cglow"):
        assert isinstance(flow, Flow)
        counted = parameters_of_cglow((1, size, size), (3, size, size), 3, **inside)
    else:
        assert isinstance(flow, PixelClassifier)
        counted = parameters_of_unet(3, 2, inside["hidden"], 4)
    assert sum(parameter.numel() for parameter in flow.parameters()) == counted
    precisions = {module.precision for module in flow.modules() if hasattr(module, "precision")}
    assert precisions == {torch.bfloat16}
    (group,) = optimizer.param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in flow.parameters()}
    assert group["lr"] == (4e-3 if name == "cglow-horses-small" else 1e-3)
    assert run.settings["augment"] is segmentation.random_view
    assert run.measure is segmentation.metrics


@pytest.mark.parametrize("size", ["", "-small"])
def test_flow_and_u_net_on_the_horses_are_of_one_size(size):
    with torch.device("meta"):
        flow, net = (table.find(f"{kind}-horses{size}").model() for kind in ("cglow", "unet"))
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (flow, net)]
    assert counts[1] == pytest.approx(counts[0], rel=0.05)


@pytest.mark.parametrize("name", [name for name in HORSES if "small" in name])
def test_a_small_run_on_horses_has_a_finite_likelihood(name):
    """Of random masks, that no model can tell in less than a bit; as its networks compute, a first step included."""
    torch.manual_seed(0)
    run = table.find(name)
    flow = run.model()
    masks, photographs = torch.randint(2, (8, *run.shape), dtype=torch.uint8), torch.rand(8, 3, *run.shape[1:])
    flow.initialize(masks, photographs)
    bits = -flow(masks, photographs).mean() / (flow.dims * math.log(2))
    assert 0.9 < bits < 5
    bits.backward()
    run.optimizer(flow).step()
    assert flow(masks, photographs).isfinite().all()
    assert flow.sample(2, context=photographs[:2]).shape == (2, *run.shape)


@pytest.mark.parametrize("name", HORSES)
def test_the_horses_are_shuffled(name, monkeypatch, tmp_path):
    asked = []

    def horses(part: str, folder: Path | None, *, size: int) -> Images:
        asked.append((part, folder, size))
        return in_context(50)

    monkeypatch.setattr(data, "horses", horses)
    found = table.find(name).data("train", tmp_path)
    assert asked == [("train", tmp_path, HORSES[name][0])]
    assert torch.equal(found.images, runs.shuffled(in_context(50)).images)


def in_context(n: int) -> Images:
    """n images that tell their number, as their contexts do."""
    images = numbered(n, 5)
    return Images(images.images, images.labels, images.levels, images.images.float())


def test_shuffled_images_keep_their_contexts():
    found = runs.shuffled(in_context(50))
    assert torch.equal(found.contexts, found.images.float())
    assert found.labels.tolist() == [number // 10 for number in found.images[:, 0, 0, 0].tolist()]
    assert not torch.equal(found.images, in_context(50).images)
    assert runs.shuffled(numbered(50, 5)).contexts is None


# --- the command line -------------------------------------------------------------------------------------------------

NAME = "nice-digits"
STEPS = 120


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run, made by the command line."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", NAME, "--steps", str(STEPS), "--draws", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def record(trained) -> dict:
    return json.loads((trained / "run.json").read_text())


def shown(figure: dict) -> str:
    return f"test: {figure['bits_per_dim']:.4f} ± {figure['error']:.4f} bits/dim, {figure['nats']:.1f} nats"


def test_the_record_of_a_run_says_what_it_was(record):
    assert record["run"] == NAME
    assert record["command"] == f"python -m nflows_lib train {NAME} --steps {STEPS}"  # no folders in it
    assert record["commit"] == archive.commit()
    assert record["seed"] == 0
    assert record["torch"] == torch.__version__
    assert record.keys() >= {"python", "hardware", "title"}
    assert record["parameters"] == sum(p.numel() for p in table.find(NAME).model().parameters())
    assert record["steps"] == STEPS
    assert 0 < record["minutes"] < 5
    assert record["settings"]["batch_size"] == 128
    assert record["settings"]["examples"] == len(data.digits("train").images) - table.find(NAME).held_out
    assert [group["lr"] for group in record["settings"]["optimizer"][1]] == [5e-3, 1e-2]  # not the schedule's last


def test_the_figure_of_a_run_is_in_bits_and_in_nats(record):
    figure = record["figure"]
    assert figure.keys() == {"bits_per_dim", "error", "images", "draws", "nats"}
    assert figure["images"] == len(data.digits("test").images)
    assert figure["draws"] == 2
    assert 0 < figure["error"] < 0.1
    assert 2 < figure["bits_per_dim"] < record["curve"]["training"][0]
    assert figure["nats"] == pytest.approx(64 * math.log(2) * (math.log2(17) - figure["bits_per_dim"]), abs=1e-3)
    assert record["figure_in_half_precision"]["bits_per_dim"] == pytest.approx(figure["bits_per_dim"], abs=0.01)


def test_the_curve_of_a_run_is_in_bits(record):
    curve = record["curve"]
    assert len(curve["step"]) == len(curve["training"]) == STEPS / 2  # at most 100 points
    assert curve["step"][-1] == STEPS
    assert curve["training"][-1] < curve["training"][0]
    assert [step for step, _, _ in curve["held_out"]] == list(range(6, STEPS + 1, 6))
    assert curve["held_out"][-1][1] == pytest.approx(record["figure"]["bits_per_dim"], abs=0.1)


def test_a_run_leaves_a_model_and_samples(trained):
    found = sorted(os.listdir(trained))
    steps = [f"samples-{step:07d}.png" for step in range(6, STEPS + 1, 6)]
    expected = ["run.json", "model.safetensors", "samples.png", "stages.png", training.CHECKPOINT, *steps]
    assert found == sorted(expected)
    tensors, facts = checkpoint.load(trained / "model.safetensors")
    assert facts == {"run": NAME}
    assert {tensor.dtype for tensor in tensors.values() if tensor.dim() == 2} == {torch.float16}
    assert plt.imread(trained / "samples.png").shape[:2] == (6 * 9 + 1, 10 * 9 + 1)


def test_evaluate_gives_the_figure_of_the_record(trained, record, capsys):
    assert main(["evaluate", NAME, "--draws", "2", "--out", str(trained)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(shown(record["figure_in_half_precision"]))  # of the model as it is stored
    assert "2 draws of the noise" in printed


def test_a_run_without_model_is_evaluated_in_full_precision_from_its_checkpoint(trained, record, tmp_path, capsys):
    (tmp_path / training.CHECKPOINT).write_bytes((trained / training.CHECKPOINT).read_bytes())
    assert main(["evaluate", NAME, "--draws", "2", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(shown(record["figure"]))  # the average's, not the last parameters'


def test_sample_draws_as_many_as_asked_for(trained, tmp_path, capsys):
    target = tmp_path / "some.png"
    assert main(["sample", NAME, "--n", "25", "--out", str(trained), "--to", str(target)]) == 0
    assert plt.imread(target).shape[:2] == (3 * 9 + 1, 10 * 9 + 1)
    assert str(target) in capsys.readouterr().out
    again = tmp_path / "again.png"
    assert main(["sample", NAME, "--n", "25", "--out", str(trained), "--to", str(again)]) == 0
    assert again.read_bytes() == target.read_bytes()
    cold = ["sample", NAME, "--n", "25", "--temperature", "0.1", "--out", str(trained), "--to", str(again)]
    assert main(cold) == 0
    assert again.read_bytes() != target.read_bytes()


def test_runs_lists_every_run(capsys):
    assert main(["runs"]) == 0
    printed = capsys.readouterr().out
    for name, run in table.RUNS.items():
        assert f"{name}\n    {run.title}" in printed
        assert run.paper is None or str(run.paper[0]) in printed


@pytest.mark.parametrize("command", ["train", "evaluate", "sample"])
def test_an_unknown_run_is_refused_with_the_names_there_are(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "nice-letters"])
    assert caught.value.code != 0
    said = capsys.readouterr().err
    assert "nice-letters" in said
    assert all(name in said for name in table.RUNS)
    with pytest.raises(ValueError, match=r"run: expected one of nice-digits, .*, got 'nice-letters'"):
        runs.train("nice-letters")


@pytest.mark.parametrize("arguments", [["--budget", "30"], ["--budget", "-5s"], ["--save-every", "1d"]])
def test_a_time_that_is_none_is_refused(arguments, tmp_path, capsys):
    option, text = arguments
    try:
        code = main(["train", NAME, f"{option}={text}", "--out", str(tmp_path)])
    except SystemExit as exit:
        code = exit.code
    assert code not in (0, None)
    assert f"expected a time such as 90s, 30m or 1.5h, got '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "ValueError: steps: expected at least 1, got 0"),
        (["--budget", "0s"], "ValueError: budget: expected seconds above 0, got 0.0"),
        (["--steps", "100", "--budget", "1m"], "ValueError: steps, budget: expected one of them, got 100 and 60.0"),
    ],
)
def test_a_length_that_makes_no_sense_is_refused(arguments, message, tmp_path, capsys):
    assert main(["train", NAME, *arguments, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_with_a_run_in_it_is_not_overwritten(trained, capsys):
    before = (trained / training.CHECKPOINT).read_bytes()
    assert main(["train", NAME, "--steps", "100", "--out", str(trained)]) == 1
    assert "ValueError: folder: expected one without a checkpoint, or resume=True" in capsys.readouterr().err
    assert (trained / training.CHECKPOINT).read_bytes() == before


def test_a_folder_that_cannot_be_made_is_an_error_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", NAME, "--steps", "100", "--out", str(tmp_path / "file" / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_without_a_model_is_not_found(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no checkpoint of nice-digits in"):
        runs.load_flow(NAME, tmp_path)
    assert main(["evaluate", NAME, "--out", str(tmp_path)]) == 1
    assert main(["sample", NAME, "--out", str(tmp_path)]) == 1
    assert "FileNotFoundError: no model.safetensors" in capsys.readouterr().err


def test_another_runs_model_is_refused(tmp_path):
    other = table.find("nice-mnist-small").model()
    checkpoint.save(tmp_path / "model.safetensors", other.state_dict(), {})
    with pytest.raises(checkpoint.CheckpointError, match="nice-digits: another model's"):
        runs.load_flow(NAME, tmp_path)


def test_a_finished_run_resumed_keeps_its_record(trained, record, tmp_path, capsys):
    """Its length is that of the checkpoint, and so are the command and the figure."""
    for path in (trained / training.CHECKPOINT, *trained.glob("samples-*.png")):
        shutil.copy(path, tmp_path)
    assert main(["train", NAME, "--resume", "--draws", "2", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "run.json").read_text())
    assert {**again, "minutes": None} == {**record, "minutes": None}
    model = "model.safetensors"
    assert (tmp_path / model).read_bytes() == (trained / model).read_bytes()


def test_a_finished_run_resumed_without_its_sheets_keeps_its_figures(trained, record, tmp_path):
    shutil.copy(trained / training.CHECKPOINT, tmp_path)
    assert main(["train", NAME, "--resume", "--draws", "2", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "run.json").read_text())
    assert {**again, "minutes": None, "stages": []} == {**record, "minutes": None, "stages": []}


def test_load_flow_gives_a_flow_to_use(trained):
    flow = runs.load_flow(NAME, trained)
    assert not flow.training
    assert next(flow.parameters()).dtype == torch.float32
    assert flow.sample(2).shape == (2, 64)


def test_figures_and_samples_leave_the_random_state_alone_and_do_not_depend_on_it(trained, tmp_path):
    flow = runs.load_flow(NAME, trained)
    images = data.digits("test")
    figures, pictures = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        figures.append(runs.evaluate(flow, images, draws=1))
        sheets.save_samples(flow, (1, 8, 8), tmp_path / "new" / "a.png")
        pictures.append((tmp_path / "new" / "a.png").read_bytes())
        assert torch.equal(torch.get_rng_state(), state)
    assert figures[0] == figures[1]
    assert pictures[0] == pictures[1]


# --- stages -----------------------------------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    """(height, width, 3), bytes."""
    return np.asarray(Image.open(path).convert("RGB"))


def draw_sheets(folder: Path, steps: list[int], shape: tuple[int, int, int], levels: int) -> None:
    """What evaluations leave: random images, twelve of them in two rows, another sheet for each step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(levels, (12, *shape), generator=generator)
        picture = plotting.tile(images, columns=10, levels=levels, shape=shape)
        plt.imsave(folder / f"samples-{step:07d}.png", picture.squeeze(), cmap="gray", vmin=0, vmax=1)


def assert_rows_are_first_rows(folder: Path, steps: list[int], height: int, tolerance: int) -> None:
    """Of the sheets of these steps, in this order, each under a white line; and one more at the end."""
    sheet = pixels(folder / "stages.png").astype(int)
    first = [pixels(folder / f"samples-{step:07d}.png").astype(int) for step in steps]
    assert sheet.shape == (len(steps) * (height + 1) + 1, *first[0].shape[1:])
    for i, expected in enumerate(first):
        found = sheet[i * (height + 1) :][: height + 1]
        assert np.abs(found - expected[: height + 1]).max() <= tolerance
    assert (sheet[:: height + 1] == 255).all()


@pytest.mark.parametrize("shape", [(1, 4, 3), (3, 3, 5)])
@pytest.mark.parametrize(
    ("drawn", "chosen"),
    [(20, [1, 3, 8, 20]), (10, [1, 2, 4, 10]), (7, [1, 2, 3, 7]), (3, [1, 2, 3]), (2, [1, 2]), (1, [1])],
)
def test_the_stages_are_the_first_rows_of_a_few_evaluations(tmp_path, shape, drawn, chosen):
    """After a twentieth, 3/20 and 2/5 of them, rounded up, and the last; none comes twice. Few colours stay exact."""
    (tmp_path / "samples.png").write_bytes(b"of the end, not of a stage")
    draw_sheets(tmp_path, [123_450 * i for i in range(1, drawn + 1)], shape, levels=5)
    steps = [123_450 * i for i in chosen]
    assert sheets.save_stages(tmp_path, shape) == steps
    assert_rows_are_first_rows(tmp_path, steps, shape[1], tolerance=0)


def test_the_parts_of_the_stages_can_be_chosen(tmp_path):
    draw_sheets(tmp_path, list(range(1, 9)), (1, 2, 2), levels=2)
    assert sheets.save_stages(tmp_path, (1, 2, 2), parts=(0.25, 0.5)) == [2, 4]
    assert_rows_are_first_rows(tmp_path, [2, 4], 2, tolerance=0)


def test_the_stages_of_photographs_have_256_colours(tmp_path):
    """Whichever come nearest; the white of the lines stays white."""
    draw_sheets(tmp_path, [1, 2, 3], (3, 16, 16), levels=256)
    assert len(np.unique(pixels(tmp_path / "samples-0000001.png").reshape(-1, 3), axis=0)) > 1000
    sheets.save_stages(tmp_path, (3, 16, 16))
    with Image.open(tmp_path / "stages.png") as picture:
        assert picture.mode == "P"
    assert len(np.unique(pixels(tmp_path / "stages.png").reshape(-1, 3), axis=0)) <= 256
    assert_rows_are_first_rows(tmp_path, [1, 2, 3], 16, tolerance=80)
    sheet = np.concatenate([pixels(tmp_path / f"samples-000000{i}.png")[:17].astype(int) for i in (1, 2, 3)])
    found = pixels(tmp_path / "stages.png")[:-1]
    assert np.abs(found - sheet).mean() < 20


def test_an_area_of_one_colour_stays_one_in_the_stages(tmp_path):
    """Colours are not mixed from dots, where there are more than 256."""
    images = torch.randint(256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    picture = plotting.tile(images, columns=10, levels=256, shape=(3, 32, 32))
    plt.imsave(tmp_path / "samples-0000001.png", picture)
    sheets.save_stages(tmp_path, (3, 32, 32))
    before, after = (pixels(tmp_path / name)[:33].reshape(-1, 3) for name in ("samples-0000001.png", "stages.png"))
    colours = len(np.unique(before, axis=0))
    assert colours > 256
    assert len(np.unique(np.concatenate([before, after], 1), axis=0)) == colours


def test_a_run_leaves_its_stages(trained, record):
    assert record["stages"] == [6, 18, 48, 120]
    assert_rows_are_first_rows(trained, record["stages"], 8, tolerance=0)
    rows = [pixels(trained / "stages.png")[9 * i : 9 * i + 9] for i in range(4)]
    assert not any(np.array_equal(*pair) for pair in itertools.pairwise(rows))


# --- draws in one bound -----------------------------------------------------------------------------------------------


def draws_of(flow: Flow, images: Images, draws: int) -> np.ndarray:
    """log p in nats, (draws, N), with the noise of the experiment's seeds from 100 on."""
    found = []
    for i in range(draws):
        torch.manual_seed(settings.seed(100 + i))
        found.append(training.log_likelihoods(flow, images.images.reshape(-1, *flow.shape), images.contexts).double())
    return torch.stack(found).numpy()


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_draws_in_one_bound_by_hand(trained, draws):
    """-log of the mean of p over the draws, in bits, and its error over the images."""
    flow, images = runs.load_flow(NAME, trained), data.digits("test")
    found = runs.in_one_bound(flow, images, draws)
    log_p = draws_of(flow, images, draws)
    largest = log_p.max(0)
    bits = -(np.log(np.exp(log_p - largest).mean(0)) + largest) / (64 * math.log(2))
    assert found == {
        "draws_in_one_bound": draws,
        "bits_per_dim": pytest.approx(bits.mean(), rel=1e-6),
        "error": pytest.approx(bits.std(ddof=1) / math.sqrt(len(bits)), rel=1e-4),
    }


def test_stages_are_those_of_the_run_and_not_of_an_earlier_one_in_the_folder(tmp_path):
    for step in (1, 2, 5, 9):
        plt.imsave(tmp_path / f"samples-{step:07d}.png", np.full((9, 91), step / 10), cmap="gray", vmin=0, vmax=1)
    assert sheets.save_stages(tmp_path, (1, 8, 8), [2, 5, 7], (0.5, 1)) == [2, 5]
    assert sheets.save_stages(tmp_path, (1, 8, 8), [3]) == []


def test_no_draws_in_one_bound_are_refused(trained):
    with pytest.raises(ValueError, match=r"^draws: expected at least 1, got 0$"):
        runs.in_one_bound(runs.load_flow(NAME, trained), data.digits("test"), 0)


def test_draws_in_one_bound_are_tighter_than_their_average():
    """The more the tighter, up to the exact figure: of pairs of bits, P is a product of the normal's masses."""
    flow = Flow([UniformDequantize(2), Rescale(1.5)], StandardNormal(), (1, 1, 2))
    images = torch.randint(2, (500, 1, 1, 2), generator=torch.Generator().manual_seed(0))
    images = Images(images, torch.zeros(500), levels=2)
    mass = torch.special.ndtr(torch.tensor([0, 1.5, 3.0])).diff()
    exact = -mass[images.images].log2().mean().item()
    found = [runs.in_one_bound(flow, images, draws)["bits_per_dim"] for draws in (1, 8, 64)]
    averages = [-draws_of(flow, images, draws).mean() / (2 * math.log(2)) for draws in (1, 8, 64)]
    assert found[0] == pytest.approx(averages[0], rel=1e-6)
    assert exact < found[2] < found[1] - 0.01 < found[0] - 0.1
    assert found[2] == pytest.approx(exact, abs=0.02)
    assert all(ours < average - 0.1 for ours, average in zip(found[1:], averages[1:], strict=True))
    assert runs.in_one_bound(flow, images) == runs.in_one_bound(flow, images, 8)


def test_draws_in_one_bound_leave_the_random_state_alone_and_do_not_depend_on_it(trained, monkeypatch):
    """They depend on the experiment's seed."""
    flow, images, found = runs.load_flow(NAME, trained), data.digits("test"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(runs.in_one_bound(flow.train(), images, 2))
        assert torch.equal(torch.get_rng_state(), state)
        assert flow.training
    assert found[0] == found[1]
    monkeypatch.setenv("NFLOWS_SEED", "9")
    assert runs.in_one_bound(flow, images, 2) != found[0]


def test_the_run_on_mnist_measures_its_draws_in_one_bound(trained):
    flow, images = runs.load_flow(NAME, trained), data.digits("test")
    assert table.find("glow-mnist").measure(flow, images) == runs.in_one_bound(flow, images)


# --- a conditional run ------------------------------------------------------------------------------------------------

HALVES = "cglow-halves"
MEASURED: list[tuple[object, Images]] = []


def measure(flow: Flow, images: Images) -> dict[str, float]:
    MEASURED.append((flow, images))
    return {"n": len(images.contexts)}


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Iterator[Path]:
    """The folder of a few steps on halves of digits; while this module's tests run, their run is in the table."""
    run = table.Run(
        title="Conditional Glow on halves of digits",
        model=partial(cglow, (1, 4, 8), (1, 4, 8), levels=17, scales=1, steps=1, hidden=4, conditioning=4),
        data=lambda part, folder: data.digit_halves(part),
        optimizer=partial(runs.glow_optimizer, lr=1e-2),
        budget=5,
        shape=(1, 4, 8),
        held_out=40,
        settings={"augment": segmentation.random_view, "batch_size": 32, "warmup": 2, "ema": 0.5},
        measure=measure,
        context_shape=(1, 4, 8),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table.RUNS, HALVES, run)
        out = tmp_path_factory.mktemp("runs") / "halves"
        assert main(["train", HALVES, "--steps", "40", "--draws", "2", "--out", str(out)]) == 0
        yield out


def test_the_record_of_a_conditional_run_holds_what_it_measures(halves):
    """On the test images, with the flow as it is in the end."""
    record = json.loads((halves / "run.json").read_text())
    assert record["measured"] == {"n": 299}
    (measured,) = MEASURED
    assert isinstance(measured[0], Flow)
    assert torch.equal(measured[1].contexts, data.digit_halves("test").contexts)
    assert record["settings"]["augment"] == "random_view"
    assert record["settings"]["examples"] == 1_498 - 40
    assert record["figure"]["images"] == 299
    assert record["curve"]["held_out"][-1][1] < record["curve"]["held_out"][0][1]


def test_a_run_that_measures_nothing_says_nothing_of_it(record):
    assert "measured" not in record


def test_a_conditional_run_is_evaluated_given_its_contexts(halves, capsys):
    record, images = json.loads((halves / "run.json").read_text()), data.digit_halves("test")
    flow = runs.load_flow(HALVES, halves)
    own = runs.evaluate(flow, images, 2)
    assert own == record["figure_in_half_precision"]
    others = Images(images.images, images.labels, images.levels, images.contexts.roll(1, 0))
    assert runs.evaluate(flow, others, 2)["bits_per_dim"] != own["bits_per_dim"]
    with pytest.raises(ValueError, match=r"context: expected shape \(B, 1, 4, 8\), got None"):
        runs.evaluate(flow, Images(images.images, images.labels, images.levels), 2)
    assert main(["evaluate", HALVES, "--draws", "2", "--out", str(halves)]) == 0
    assert capsys.readouterr().out.startswith(shown(own))


def test_draws_in_one_bound_are_given_their_contexts(halves):
    flow, images = runs.load_flow(HALVES, halves), data.digit_halves("test")
    own = runs.in_one_bound(flow, images, 2)
    assert own["bits_per_dim"] < -draws_of(flow, images, 2).mean() / (32 * math.log(2))
    others = Images(images.images, images.labels, images.levels, images.contexts.roll(1, 0))
    assert runs.in_one_bound(flow, others, 2)["bits_per_dim"] != own["bits_per_dim"]
    with pytest.raises(ValueError, match=r"context: expected shape \(B, 1, 4, 8\), got None"):
        runs.in_one_bound(flow, Images(images.images, images.labels, images.levels), 2)


def test_figures_can_be_taken_anew(halves, tmp_path, monkeypatch, capsys):
    """Of the model in the folder; the rest of the record stays, with the whole model's figure if the images do."""
    out = tmp_path / "copy"
    shutil.copytree(halves, out)
    before = json.loads((out / "run.json").read_text())
    monkeypatch.setattr(runs, "COMMIT", "later")
    patched = replace(table.RUNS[HALVES], measure=lambda flow, images: {"bits": runs.evaluate(flow, images, 1)})
    monkeypatch.setitem(table.RUNS, HALVES, patched)
    assert main(["evaluate", HALVES, "--draws", "1", "--out", str(out), "--record"]) == 0
    after = json.loads((out / "run.json").read_text())
    own = runs.evaluate(runs.load_flow(HALVES, out), data.digit_halves("test"), 1)
    figure = runs.evaluate(runs.load_flow(HALVES, out), data.digit_halves("test"), before["figure"]["draws"])
    assert figure == before["figure_in_half_precision"]
    assert figure != before["figure"]
    taken = {"figure_in_half_precision": figure, "measured": {"bits": own}, "measured_at": "later"}
    assert after == before | taken
    assert json.dumps(after["measured"], indent=1) in capsys.readouterr().out
    fewer = replace(patched, data=lambda part, folder: data.digit_halves(part).select(torch.arange(20)))
    monkeypatch.setitem(table.RUNS, HALVES, fewer)
    runs.measure_again(HALVES, out)
    after = json.loads((out / "run.json").read_text())
    assert after["figure"] == after["figure_in_half_precision"]
    assert after["figure"]["images"] == 20
    with pytest.raises(ValueError, match=r"^run: expected one with further figures, got nice-digits$"):
        runs.measure_again("nice-digits", out)


def test_a_conditional_run_keeps_the_contexts_of_its_images(halves, monkeypatch, tmp_path):
    """In training, in evaluations held out, and in the pictures: of those held out, and in the end of those to test."""
    fit, save_samples, given, pictured = runs.fit, sheets.save_samples, [], []

    def spy(flow: Flow, examples: torch.Tensor, *arguments, **options) -> training.History:
        given.extend([(examples, options["context"]), (options["held_out"], options["held_out_context"])])
        return fit(flow, examples, *arguments, **options)

    def draw(flow: Flow, shape: tuple[int, ...], path: Path, *, contexts: torch.Tensor) -> None:
        pictured.append(contexts)
        save_samples(flow, shape, path, contexts=contexts)

    monkeypatch.setattr(runs, "fit", spy)
    monkeypatch.setattr(runs, "save_samples", draw)
    runs.train(HALVES, tmp_path, steps=2, draws=1)
    images = data.digit_halves("train")
    (trained_on, contexts), (held_out, held_out_contexts) = given
    assert torch.equal(held_out, images.images[:40]) and torch.equal(held_out_contexts, images.contexts[:40])
    assert torch.equal(trained_on, images.images[40:]) and torch.equal(contexts, images.contexts[40:])
    assert all(torch.equal(contexts[:40], images.contexts[:40]) for contexts in pictured[:-1])
    assert len(pictured) == 3
    assert torch.equal(pictured[-1], data.digit_halves("test").contexts)


class Shows(nn.Module):
    """Logits that leave no doubt that an image is its context."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1e4))

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.cat([0.5 - context, context - 0.5], 1)


@pytest.mark.parametrize(("n", "given"), [(60, 3), (25, 40), (7, 1), (60, 6)])
def test_all_samples_of_a_row_have_one_context(tmp_path, n, given):
    """The first of those that are given, the second ..., and again from the first."""
    torch.manual_seed(0)
    contexts = (torch.rand(given, 1, 3, 5) > 0.5).float()
    sheets.save_samples(PixelClassifier(Shows(), (1, 3, 5), 2), (1, 3, 5), tmp_path / "a.png", n, contexts=contexts)
    drawn = torch.stack([contexts[i // 10 % given] for i in range(n)]).long()
    expected = plotting.tile(drawn, columns=10, levels=2, shape=(1, 3, 5)).squeeze()
    assert np.allclose(plt.imread(tmp_path / "a.png")[..., 0], expected, atol=0.01)


def test_sample_draws_given_the_contexts_of_the_test_images(halves, monkeypatch, tmp_path):
    asked, load = [], table.RUNS[HALVES].data

    def spy(part: str, folder: Path | None) -> Images:
        asked.append((part, folder))
        return load(part, folder)

    monkeypatch.setitem(table.RUNS, HALVES, replace(table.RUNS[HALVES], data=spy))
    options = ["--out", str(halves), "--data", str(tmp_path / "sets"), "--to", str(tmp_path / "a.png"), "--n", "20"]
    assert main(["sample", HALVES, *options]) == 0
    assert asked == [("test", tmp_path / "sets")]
    flow = runs.load_flow(HALVES, halves)
    sheets.save_samples(flow, (1, 4, 8), tmp_path / "b.png", 20, contexts=load("test", None).contexts)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sheets.save_samples(flow, (1, 4, 8), tmp_path / "b.png", 20, contexts=load("test", None).contexts.flip(0))
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_sample_asks_for_no_data_where_none_are_needed(trained, monkeypatch, tmp_path):
    monkeypatch.setitem(table.RUNS, NAME, replace(table.RUNS[NAME], data=lambda *_: pytest.fail("read")))
    assert main(["sample", NAME, "--out", str(trained), "--to", str(tmp_path / "a.png")]) == 0


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """The flows that are compiled, to graphs that PyTorch runs as they are: its compiler takes a minute."""
    flows, compile = [], nn.Module.compile

    def eager(flow: Flow) -> None:
        flows.append(flow)
        compile(flow, backend="eager")

    monkeypatch.setattr(Flow, "compile", eager)
    torch._dynamo.reset()
    yield flows
    torch._dynamo.reset()


def assert_same_run(found: Path, expected: Path, compiled: bool) -> None:
    """The checkpoints hold the same numbers, up to rounding, under the same names, and the records tell the same.

    But for the command, which says whether the run (its last part) was compiled.
    """
    ours, theirs = (checkpoint.load(folder / training.CHECKPOINT)[0] for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    mine, other = (json.loads((folder / "run.json").read_text()) for folder in (found, expected))
    assert mine["figure"] == pytest.approx(other["figure"], rel=1e-4)
    assert mine["command"] == other["command"] + " --compile" * compiled
    for key in ("parameters", "steps", "settings", "run"):
        assert mine[key] == other[key]


def test_a_compiled_run_is_the_same_run(trained, compiled, tmp_path):
    """The flow itself is compiled, once and in place; what is stored is loaded where nothing is."""
    options = ["--steps", str(STEPS), "--draws", "2", "--out", str(tmp_path)]
    assert main(["train", NAME, *options, "--compile"]) == 0
    (flow,) = compiled
    assert flow._compiled_call_impl is not None
    assert_same_run(tmp_path, trained, compiled=True)
    images = data.digits("test").images.reshape(-1, 64)
    nats = []
    for loaded in (runs.load_flow(NAME, tmp_path), runs.load_flow(NAME, trained)):
        torch.manual_seed(0)
        nats.append(loaded(images))
    torch.testing.assert_close(*nats, rtol=1e-3, atol=0.1)
    assert len(compiled) == 1


def test_nothing_is_compiled_unless_asked_for(compiled, tmp_path):
    assert main(["train", NAME, "--steps", "100", "--draws", "1", "--out", str(tmp_path / "a")]) == 0
    assert compiled == []
    flow = runs.train(NAME, tmp_path / "b", steps=100, draws=1, compiled=True)
    assert compiled == [flow]
    assert flow.sample(2).shape == (2, 64)
    assert flow(torch.zeros(2, 64, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("before", [True, False], ids=["compiled, then not", "not, then compiled"])
def test_a_stopped_run_goes_on_compiled_or_not(trained, compiled, before, monkeypatch, tmp_path, capsys):
    """As the line says that it prints; with the flag at one end and without it at the other it is the same run."""
    save_samples = sheets.save_samples

    def stop_at_60(flow: Flow, shape: tuple[int, ...], path: Path, **options) -> None:
        save_samples(flow, shape, path, **options)
        if path.name == "samples-0000060.png":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runs, "save_samples", stop_at_60)
    flag = ["--compile"]
    start = ["train", NAME, "--steps", str(STEPS), "--draws", "2", "--out", str(tmp_path)]
    assert main(start + flag * before) == 130
    assert len(compiled) == before
    assert training.read_checkpoint(tmp_path)["step"] == 60
    monkeypatch.setattr(runs, "save_samples", save_samples)
    again = shlex.split(re.search(r"To go on: python -m nflows_lib (.*)", capsys.readouterr().err)[1])
    assert again == ["train", NAME, "--resume", "--out", str(tmp_path), *(flag * before)]
    without = [word for word in again if word not in flag]
    assert main([*without, "--draws", "2", *(flag * (not before))]) == 0
    assert len(compiled) == 1
    assert_same_run(tmp_path, trained, compiled=not before)
