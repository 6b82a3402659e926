"""Tests of named runs from the command line to their records: train, resume, evaluate, sample, compile."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_sheets_of_samples import assert_rows_are_first_rows, pixels
from torch import Tensor, nn

from nflows_lib import data, evaluation, settings
from nflows_lib.__main__ import main
from nflows_lib.data import Images
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments import archive, checkpoint, runs, sheets, table, trainer
from nflows_lib.experiments.pixelwise import PixelClassifier
from nflows_lib.flow import Flow

# --- the command line -------------------------------------------------------------------------------------------------

NAME = "nice-digits"
STEPS = 120


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run on the command line."""
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
    assert record["command"] == f"python -m nflows_lib train {NAME} --steps {STEPS}"  # it names no folders
    assert record["commit"] == archive.commit()
    assert record["seed"] == 0
    assert record["torch"] == torch.__version__
    assert record.keys() >= {"python", "hardware", "title"}
    assert record["parameters"] == sum(p.numel() for p in runs.build(table.find(NAME)).parameters())
    assert record["steps"] == STEPS
    assert 0 < record["minutes"] < 5
    assert record["settings"]["batch_size"] == table.find(NAME).training["batch_size"]
    trained_on = data.digits("train").images[table.find(NAME).held_out :]
    assert record["settings"]["examples"] == len(trained_on)
    assert record["settings"]["checksum"] == zlib.crc32(trained_on.numpy().tobytes())
    assert [group["lr"] for group in record["settings"]["optimizer"][1]] == [
        table.find(NAME).rates["lr"],
        1e-2,
    ]  # not the schedule's last


def test_the_figure_of_a_run_is_in_bits_and_in_nats(record):
    figure = record["figure"]
    assert figure.keys() == {"bits_per_dim", "error", "images", "draws", "nats"}
    assert figure["images"] == len(data.digits("test").images)
    assert figure["draws"] == 2
    assert 0 < figure["error"] < 0.1
    assert 2 < figure["bits_per_dim"] < record["curve"]["training"][0]
    assert figure["nats"] == pytest.approx(64 * math.log(2) * (math.log2(17) - figure["bits_per_dim"]), abs=1e-3)
    adds = record["half_precision_adds"]
    assert adds["images"] == figure["images"]  # all, as there are fewer than a thousand
    assert abs(adds["bits_per_dim"]) < 0.01
    assert 0 < adds["error"] < 0.001


def test_the_curve_of_a_run_is_in_bits(record):
    curve = record["curve"]
    assert len(curve["step"]) == len(curve["training"]) == STEPS / 2  # at most 100 points
    assert curve["step"][-1] == STEPS
    assert curve["training"][-1] < curve["training"][0]
    assert [step for step, _, _ in curve["held_out"]] == list(range(6, STEPS + 1, 6))
    assert curve["held_out"][-1][1] == pytest.approx(record["figure"]["bits_per_dim"], abs=0.1)


def test_a_run_leaves_a_model_and_samples(trained):
    found = sorted({*os.listdir(trained)} - {trainer.LOCK})
    steps = [f"samples-{step:07d}.png" for step in range(6, STEPS + 1, 6)]
    expected = ["run.json", "model.safetensors", "samples.png", "stages.png", trainer.CHECKPOINT, *steps]
    assert found == sorted(expected)
    tensors, facts = checkpoint.load(trained / "model.safetensors")
    assert facts == {"run": NAME}
    assert {tensor.dtype for tensor in tensors.values() if tensor.dim() == 2} == {torch.float16}
    assert plt.imread(trained / "samples.png").shape[:2] == (6 * 9 + 1, 10 * 9 + 1)


def test_evaluate_gives_the_figure_of_the_record(trained, record, capsys):
    assert main(["evaluate", NAME, "--draws", "2", "--out", str(trained)]) == 0
    printed = capsys.readouterr().out
    own = runs.evaluate(runs.load_flow(NAME, trained), data.digits("test"), 2)  # of the model as it is stored
    assert printed.startswith(shown(own))
    assert "2 draws of the noise" in printed
    bits = record["figure"]["bits_per_dim"] + record["half_precision_adds"]["bits_per_dim"]
    assert own["bits_per_dim"] == pytest.approx(bits, abs=1e-4)


def test_a_run_without_model_is_evaluated_in_full_precision_from_its_checkpoint(trained, record, tmp_path, capsys):
    (tmp_path / trainer.CHECKPOINT).write_bytes((trained / trainer.CHECKPOINT).read_bytes())
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


TIME, COUNT = "expected a time such as 90s, 30m or 1.5h, got", "expected a whole number of at least 1, got"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget=30"], f"argument --budget: {TIME} '30'"),
        (["--budget=-5s"], f"argument --budget: {TIME} '-5s'"),
        (["--budget=0s"], "argument --budget: expected a time above 0, got '0s'"),
        (["--budget=100000000000000000000h"], "argument --budget: expected a time up to a year, 8760h, got '1000"),
        (["--steps=" + "9" * 5000], "argument --steps: expected at most 1,000,000,000, got '999"),
        (["--draws=20000"], "argument --draws: expected at most 10,000, got '20000'"),
        (["--save-every=1d"], f"argument --save-every: {TIME} '1d'"),
        (["--steps=0"], f"argument --steps: {COUNT} '0'"),
        (["--draws=1.5"], f"argument --draws: {COUNT} '1.5'"),
        (["--steps=100", "--budget=1m"], "argument --budget: not allowed with argument --steps"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", NAME, *arguments, "--out", str(tmp_path)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=inf"], "argument --temperature: expected a finite number of at least 0, got 'inf'"),
        (["--temperature=nan"], "argument --temperature: expected a finite number of at least 0, got 'nan'"),
        (["--temperature=-1"], "argument --temperature: expected a finite number of at least 0, got '-1'"),
        (["--temperature=hot"], "argument --temperature: expected a finite number of at least 0, got 'hot'"),
        (["--to=x.txt"], "argument --to: expected a file name in .png, .jpg, .jpeg, .webp, .bmp, got 'x.txt'"),
        (["--to=x"], "argument --to: expected a file name in .png, .jpg, .jpeg, .webp, .bmp, got 'x'"),
        (["--to=no/where.png"], "argument --to: expected a file in a folder that exists, got 'no/where.png'"),
        (["--n=99999999999999"], "argument --n: expected at most 10,000, got '99999999999999'"),
    ],
)
def test_samples_that_make_no_sense_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["sample", "nice-mnist-small", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.txt", "x"])
def test_samples_are_only_written_in_a_format_of_pictures(trained, tmp_path, name):
    with pytest.raises(ValueError, match=r"^path: expected a file name in \.png, .*\.bmp, got "):
        sheets.save_samples(runs.load_flow(NAME, trained), (1, 8, 8), tmp_path / name)


@pytest.mark.parametrize("words", ["runs", "train --help"])
def test_a_reader_that_has_read_enough_is_no_error(words, tmp_path):
    command = f"{shlex.quote(sys.executable)} -u -m nflows_lib {words} | head -n 1"
    environment = os.environ | {"PYTHONPATH": str(archive.ROOT)}
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_data_set_that_can_be_fetched_is_fetched_first(tmp_path, monkeypatch, capsys):
    asked = []

    def read(part, folder, size, download=False):
        asked.append((part, folder, download))
        raise RuntimeError("the connection broke")

    monkeypatch.setitem(runs.DATA, "mnist", read)
    folders = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["train", "nice-mnist-small", "--steps", "1", "--download", *folders]) == 1
    assert main(["evaluate", "nice-mnist-small", "--download", "--data", str(tmp_path)]) == 1
    assert asked == [("train", tmp_path, True), ("test", tmp_path, True)]
    assert capsys.readouterr().err == 2 * "OSError: the download of mnist failed: the connection broke\n"


@pytest.mark.parametrize("name", [NAME, "cglow-horses-small", "glow-flowers5"])
def test_a_data_set_that_cannot_be_fetched_is_named(name):
    message = "^download: expected a run on one of the sets mnist, cifar10, svhn, celeba, flowers102, got a run on "
    with pytest.raises(ValueError, match=message + table.find(name).data):
        runs.images_of(table.find(name), "train", download=True)


@pytest.mark.parametrize("n", [0, 149, 150])
def test_images_that_are_all_held_out_leave_none_to_train_on(tmp_path, monkeypatch, n):
    few = data.digits("train").select(torch.arange(n))
    monkeypatch.setitem(runs.DATA, "digits", lambda part, folder, size: few)
    message = f"^data_folder: expected more than 150 images to train on, the number that the run holds out, got {n}$"
    with pytest.raises(ValueError, match=message):
        runs.train(NAME, tmp_path, steps=1)


@pytest.mark.parametrize(
    ("text", "got"), [("{", "that is not JSON"), ("[1]", "without a JSON object"), ("{}", "without figure")]
)
def test_a_broken_record_is_named(trained, tmp_path, monkeypatch, capsys, text, got):
    path = tmp_path / "cglow-horses-small" / "run.json"
    path.parent.mkdir()
    path.write_text(text)
    monkeypatch.setattr(archive, "folder", lambda run: tmp_path / run)
    assert main(["runs"]) == 1
    assert f"ValueError: {path}: expected a record, got a file {got}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"^{path}: expected a record, got a file {got}"):
        runs.measure_again("cglow-horses-small", path.parent)


@pytest.mark.parametrize(
    ("arguments", "loads", "code"),
    [
        (["--help"], False, 0),
        (["train", "--help"], False, 0),
        (["runs"], False, 0),
        (["train", "nice-letters"], False, 2),
        (["train", NAME, "--steps", "0"], False, 2),
        (["sample", NAME, "--n", "none"], False, 2),
        (["sample", "nice-mnist-small", "--n", "2"], True, 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_imports_what_it_needs_and_no_more(arguments, loads, code, tmp_path):
    """Commands without PyTorch do not wait for it; drawing samples needs neither scikit-learn nor matplotlib."""
    ask = f"""
import sys
from nflows_lib.__main__ import main
try:
    code = main({arguments!r})
except SystemExit as stopped:
    code = stopped.code or 0
print([name for name in ("torch", "sklearn", "matplotlib", "torchvision") if name in sys.modules], code)
"""
    found = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == f"{['torch'] if loads else []} {code}", found.stderr


def test_a_folder_with_a_run_in_it_is_not_overwritten(trained, capsys):
    before = (trained / trainer.CHECKPOINT).read_bytes()
    assert main(["train", NAME, "--steps", "100", "--out", str(trained)]) == 1
    assert "ValueError: folder: expected a folder without a checkpoint, or resume=True" in capsys.readouterr().err
    assert (trained / trainer.CHECKPOINT).read_bytes() == before


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
    other = runs.build(table.find("nice-mnist-small"))
    checkpoint.save(tmp_path / "model.safetensors", other.state_dict(), {})
    with pytest.raises(checkpoint.CheckpointError, match="nice-digits: another model's"):
        runs.load_flow(NAME, tmp_path)


def test_a_finished_run_resumed_keeps_its_record(trained, record, tmp_path, capsys):
    """The checkpoint's length, the command and the result stay the same."""
    for path in (trained / trainer.CHECKPOINT, *trained.glob("samples-*.png")):
        shutil.copy(path, tmp_path)
    assert main(["train", NAME, "--resume", "--draws", "2", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "run.json").read_text())
    assert {**again, "minutes": None} == {**record, "minutes": None}
    model = "model.safetensors"
    assert (tmp_path / model).read_bytes() == (trained / model).read_bytes()


def test_a_finished_run_resumed_without_its_sheets_keeps_its_figures(trained, record, tmp_path):
    shutil.copy(trained / trainer.CHECKPOINT, tmp_path)
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
        found.append(evaluation.log_likelihoods(flow, images.images.reshape(-1, *flow.shape), images.contexts).double())
    return torch.stack(found).numpy()


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_draws_in_one_bound_by_hand(trained, draws):
    """The number is -log2 of the mean of p over the draws, with its standard error over images."""
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


@pytest.mark.parametrize(
    ("name", "draws", "passes"), [(NAME, None, 2), (NAME, 5, 5), ("glow-mnist", None, 2 + 8), ("glow-mnist", 1, 1 + 8)]
)
def test_a_budget_knows_what_is_evaluated_after_the_training(monkeypatch, tmp_path, name, draws, passes):
    """These are the test images for each draw and each pass of the metrics, and twice a thousand of them."""
    asked = {}

    def train(flow, images, steps, **options):
        asked.update(options)
        raise trainer.Interrupted

    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(runs, "images_of", lambda run, part, folder: data.digits(part))
    monkeypatch.setattr(runs, "build", lambda run, device, kept: Flow([], StandardNormal(), (1, 8, 8)))
    monkeypatch.setattr(runs, "optimizer_of", lambda run, flow: None)
    with pytest.raises(trainer.Interrupted):
        runs.train(name, tmp_path, draws=draws)
    assert asked["afterwards"] == passes * 299 + 2 * 1000
    assert asked["budget"] == table.find(name).budget


class Noisy(Flow):
    """A flow whose log p differs between images by about 1 and between draws of one image by about ``noise``."""

    def __init__(self, noise: float) -> None:
        super().__init__([], StandardNormal(), (1, 1, 4))
        self.noise, self.levels = noise, 256

    def forward(self, x, context=None, validate=True):
        return x.flatten(1).float().sum(1) / 147.8 + self.noise * torch.randn(len(x))  # 4 levels' sum has sd 147.8


@pytest.mark.parametrize(("noise", "enough"), [(0.0, {1}), (0.1, {1}), (0.3, {4, 5, 6}), (2.0, {10})])
def test_draws_are_as_few_as_leave_the_printed_error_what_it_is(noise, enough):
    """With d draws a mean has the variance 1 + noise^2 / d, which should be at most 1.02."""
    generator = torch.Generator().manual_seed(0)
    images = Images(torch.randint(256, (2000, 1, 1, 4), generator=generator).byte(), torch.zeros(2000), 256)
    flow = Noisy(noise)
    assert runs.draws_enough(flow, images, part=2000) in enough
    found = runs.evaluate(flow, images)
    assert found["draws"] == runs.draws_enough(flow, images)
    assert found == runs.evaluate(flow, images, found["draws"])
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        runs.evaluate(flow, images, 0)


def test_a_flow_is_worse_than_another_by_the_difference_of_their_figures():
    images = Images(torch.randint(2, (50, 1, 1, 2)), torch.zeros(50), levels=2)
    flow, other = (Flow([UniformDequantize(2), Rescale(scale)], StandardNormal(), (1, 1, 2)) for scale in (1.5, 1.0))
    found = runs.difference(flow, other, images)
    bits = [runs.evaluate(one, images, 1)["bits_per_dim"] for one in (flow, other)]
    assert found["bits_per_dim"] == pytest.approx(bits[0] - bits[1], abs=1e-5)
    assert found["images"] == 50
    assert runs.difference(flow, flow, images)["bits_per_dim"] == 0


def test_no_draws_in_one_bound_are_refused(trained):
    with pytest.raises(ValueError, match=r"^draws: expected at least 1, got 0$"):
        runs.in_one_bound(runs.load_flow(NAME, trained), data.digits("test"), 0)


def test_draws_in_one_bound_are_tighter_than_their_average():
    """More draws are tighter, up to the exact value: for pairs of bits P is a product of the normal's masses."""
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
    measure, passes = runs.METRICS[table.find("glow-mnist").metrics]
    assert measure(flow, images) == runs.in_one_bound(flow, images)
    assert passes == 8


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
        model="cglow",
        size={"levels": 17, "scales": 1, "steps": 1, "hidden": 4, "conditioning": 4},
        data="halves",
        shape=(1, 4, 8),
        context_shape=(1, 4, 8),
        budget=5,
        held_out=40,
        rates={"lr": 1e-2},
        training={"augment": "random_view", "batch_size": 32, "warmup": 2, "ema": 0.5},
        metrics="count",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table.RUNS, HALVES, run)
        patch.setitem(runs.DATA, "halves", lambda part, folder, size: data.digit_halves(part))
        patch.setitem(runs.METRICS, "count", (measure, 1))
        out = tmp_path_factory.mktemp("runs") / "halves"
        assert main(["train", HALVES, "--steps", "40", "--draws", "2", "--out", str(out)]) == 0
        yield out


def test_the_record_of_a_conditional_run_holds_what_it_measures(halves):
    """The record measures the test images with the final flow."""
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
    bits = record["figure"]["bits_per_dim"] + record["half_precision_adds"]["bits_per_dim"]
    assert own["bits_per_dim"] == pytest.approx(bits, abs=1e-3)
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


def test_results_can_be_taken_again(halves, tmp_path, monkeypatch, capsys):
    """The folder's model is measured; other entries stay, also bits/dim if the number of images is the same."""
    out = tmp_path / "copy"
    shutil.copytree(halves, out)
    before = json.loads((out / "run.json").read_text())
    monkeypatch.setattr(archive, "commit", lambda: "later")
    bits = lambda flow, images: {"bits": runs.evaluate(flow, images, 1)}  # noqa: E731
    monkeypatch.setitem(runs.METRICS, "count", (bits, 1))
    assert main(["evaluate", HALVES, "--draws", "1", "--out", str(out), "--record"]) == 0
    after = json.loads((out / "run.json").read_text())
    own = runs.evaluate(runs.load_flow(HALVES, out), data.digit_halves("test"), 1)
    assert after == before | {"measured": {"bits": own}, "measured_at": "later"}
    assert json.dumps(after["measured"], indent=1) in capsys.readouterr().out
    few = data.digit_halves("test").select(torch.arange(20))
    monkeypatch.setitem(runs.DATA, "halves", lambda part, folder, size: few)
    runs.measure_again(HALVES, out)
    after = json.loads((out / "run.json").read_text())
    assert after["figure"] == runs.evaluate(runs.load_flow(HALVES, out), few, before["figure"]["draws"])
    assert after["figure"]["images"] == 20


def test_a_run_without_further_metrics_has_none_to_take_again(tmp_path):
    with pytest.raises(ValueError, match=r"^run: expected a run with further metrics, got nice-digits$"):
        runs.measure_again(NAME, tmp_path)


class Copies(nn.Module):
    """A network whose logits say with certainty that an image is its context."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1e4))

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.cat([0.5 - context, context - 0.5], 1)


def copies(part: str) -> Images:
    """Random images of two levels that are their own contexts."""
    generator = torch.Generator().manual_seed(["train", "test"].index(part))
    images = torch.randint(2, (300, 1, 4, 8), generator=generator)
    return Images(images.to(torch.uint8), torch.zeros(300, dtype=torch.int64), 2, images.float())


def test_every_image_of_a_conditional_run_keeps_its_context(monkeypatch, tmp_path):
    """In training, evaluations and result, a model that copies the context is right about every image."""
    run = table.Run(
        title="Copies",
        model="copies",
        data="copies",
        shape=(1, 4, 8),
        context_shape=(1, 4, 8),
        budget=5,
        held_out=40,
        rates={"lr": 1e-9},
        training={"batch_size": 32},
    )
    model = lambda shape, context_shape, precision: PixelClassifier(Copies(), shape, 2)  # noqa: E731
    monkeypatch.setitem(runs.MODELS, "copies", (model, runs.adam))
    monkeypatch.setitem(runs.DATA, "copies", lambda part, folder, size: copies(part))
    monkeypatch.setitem(table.RUNS, "copies", run)
    flow = runs.train("copies", tmp_path, steps=20, draws=1)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["curve"]["training"] == [0] * 20
    assert [loss for _, loss, _ in record["curve"]["held_out"]] == [0] * 20
    assert record["figure"]["bits_per_dim"] == 0
    others = Images(copies("test").images, copies("test").labels, 2, copies("train").contexts)
    assert runs.evaluate(flow, others, 1)["bits_per_dim"] > 100
    # The pictures show copies of the held-out images, which come first, and the last one shows copies of test images.
    for name, part in (("samples-0000020.png", "train"), ("samples.png", "test")):
        sheets.save_samples(flow, run.shape, tmp_path / "again.png", contexts=copies(part).contexts[:40])
        assert (tmp_path / name).read_bytes() == (tmp_path / "again.png").read_bytes()


def test_sample_draws_given_the_contexts_of_the_test_images(halves, monkeypatch, tmp_path):
    """The test images are those of the folder that --data names."""
    asked = []

    def spy(part: str, folder: Path | None, size: int) -> Images:
        asked.append((part, folder))
        return data.digit_halves(part)

    monkeypatch.setitem(runs.DATA, "halves", spy)
    options = ["--out", str(halves), "--data", str(tmp_path / "sets"), "--to", str(tmp_path / "a.png"), "--n", "20"]
    assert main(["sample", HALVES, *options]) == 0
    assert asked == [("test", tmp_path / "sets")]
    flow, contexts = runs.load_flow(HALVES, halves), data.digit_halves("test").contexts
    sheets.save_samples(flow, (1, 4, 8), tmp_path / "b.png", 20, contexts=contexts)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sheets.save_samples(flow, (1, 4, 8), tmp_path / "b.png", 20, contexts=contexts.flip(0))
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_sample_asks_for_no_data_where_none_are_needed(trained, monkeypatch, tmp_path):
    monkeypatch.setitem(runs.DATA, "digits", lambda *_: pytest.fail("read"))
    assert main(["sample", NAME, "--out", str(trained), "--to", str(tmp_path / "a.png")]) == 0


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """A list that collects the graphs to compile, which then run uncompiled, since the compiler takes a minute."""
    graphs, compile = [], torch.compile

    def eager(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda flow: compile(flow, backend=eager))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def assert_same_run(found: Path, expected: Path, compiled: bool) -> None:
    """Assert that two checkpoints hold the same numbers, up to rounding, and that the records agree.

    The command and the settings may differ, since they say whether the run's last part was compiled.
    """
    ours, theirs = (checkpoint.load(folder / trainer.CHECKPOINT)[0] for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    mine, other = (json.loads((folder / "run.json").read_text()) for folder in (found, expected))
    assert mine["figure"] == pytest.approx(other["figure"], rel=1e-4)
    assert mine["command"] == other["command"] + " --compile" * compiled
    assert other["settings"]["compiled"] is False
    assert mine["settings"] == other["settings"] | {"compiled": compiled}
    for key in ("parameters", "steps", "run"):
        assert mine[key] == other[key]


def test_a_compiled_run_is_the_same_run(trained, compiled, tmp_path):
    """One graph serves the trial step and all others; an uncompiled program loads the stored model."""
    options = ["--steps", str(STEPS), "--draws", "2", "--out", str(tmp_path)]
    assert main(["train", NAME, *options, "--compile"]) == 0
    assert len(compiled) == 1
    assert_same_run(tmp_path, trained, compiled=True)
    images = data.digits("test").images.reshape(-1, 64)
    nats = []
    for loaded in (runs.load_flow(NAME, tmp_path), runs.load_flow(NAME, trained)):
        torch.manual_seed(0)
        nats.append(loaded(images))
    torch.testing.assert_close(*nats, rtol=1e-3, atol=0.1)


def test_a_compiler_that_fails_does_not_stop_a_run(trained, monkeypatch, tmp_path, capsys):
    """The run prints a line, takes the steps of an uncompiled run, and its record says so."""
    compile = torch.compile

    def fail(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        raise OSError("g++: not found")

    monkeypatch.setattr(torch, "compile", lambda flow: compile(flow, backend=fail))
    options = ["--steps", str(STEPS), "--draws", "2", "--out", str(tmp_path)]
    assert main(["train", NAME, *options, "--compile"]) == 0
    assert_same_run(tmp_path, trained, compiled=False)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "torch.compile" in line)
    assert said == "torch.compile failed, so the run goes on without it: OSError: g++: not found"


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [("--compile", [], True), ("--compile", ["--no-compile"], False), ("--no-compile", ["--compile"], True)],
)
def test_a_stopped_run_goes_on_as_it_began_or_as_it_is_told(
    trained, compiled, first, then, expected, monkeypatch, tmp_path, capsys
):
    """The printed command keeps the run's choice; with either flag the run has the same result."""
    save_samples = sheets.save_samples

    def stop_at_60(flow: Flow, shape: tuple[int, ...], path: Path, **options) -> None:
        save_samples(flow, shape, path, **options)
        if path.name == "samples-0000060.png":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sheets, "save_samples", stop_at_60)
    start = ["train", NAME, "--steps", str(STEPS), "--draws", "2", "--out", str(tmp_path)]
    assert main([*start, first]) == 130
    assert len(compiled) == (first == "--compile")
    facts = trainer.read_checkpoint(tmp_path)
    assert (facts["step"], facts["settings"]["compiled"]) == (60, first == "--compile")
    monkeypatch.setattr(sheets, "save_samples", save_samples)
    compiled.clear()
    torch._dynamo.reset()  # as in another process: the first part's graph would serve the second
    again = shlex.split(re.search(r"To go on: python -m nflows_lib (.*)", capsys.readouterr().err)[1])
    assert again == ["train", NAME, "--resume", "--out", str(tmp_path)]
    assert main([*again, "--draws", "2", *then]) == 0
    assert len(compiled) == expected
    assert_same_run(tmp_path, trained, compiled=expected)
