"""Everything follows its device: layers, bases, models, training, runs and pictures.

Each test runs on a pretended GPU (pretended_gpu.py), which finds a tensor on the wrong device. On a machine with a real
one it is marked ``cuda`` and runs there, where its numbers count, too: ``pytest -m cuda tests/test_device.py``. A lent
machine may have no more than torch and pytest: nothing here imports what only the book needs.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from bijections import BATCH, BIJECTIONS, build, randomize
from torch import Tensor, nn

from nflows_lib import data, plotting, settings
from nflows_lib.bijection import Bijection
from nflows_lib.data import Images
from nflows_lib.dequantization import Rescale
from nflows_lib.distributions import StandardLogistic, StandardNormal
from nflows_lib.evaluation import log_likelihoods
from nflows_lib.experiments import archive, checkpoint, image_sets, runs, segmentation, sheets
from nflows_lib.experiments.pixelwise import PixelClassifier, UNet
from nflows_lib.experiments.trainer import Interrupted, train
from nflows_lib.flow import Flow
from nflows_lib.models import cglow, glow, nice, realnvp, realnvp_points
from nflows_lib.multiscale import split_latent
from nflows_lib.networks import GlowNet, ResNet
from nflows_lib.normalization import DiagonalScaling
from nflows_lib.training import History, NonFiniteLoss, fit

HAS_CUDA = torch.cuda.is_available()
DEVICES = [pytest.param("cuda", marks=pytest.mark.cuda) if HAS_CUDA else "pretended"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with request.getfixturevalue("pretended") if request.param == "pretended" else contextlib.nullcontext():
        yield torch.device(request.param, 0)


@pytest.fixture
def cuda() -> torch.device:
    if not HAS_CUDA:
        pytest.skip("no GPU that PyTorch finds")
    return torch.device("cuda", 0)


# --- layers and bases -------------------------------------------------------------------------------------------------

CASES = [(name, shape) for name, example in BIJECTIONS.items() for shape in example.shapes[:2]]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_bijection_is_on_its_device_what_it_is_on_the_cpu(name, shape, device):
    layer, x, context = build(name, shape, torch.float32)
    there = copy.deepcopy(layer).to(device)
    x_there, context_there = x.to(device), None if context is None else context.to(device)
    z, log_det = there(x_there, context_there)
    assert {z.device, log_det.device} == {device}
    expected_z, expected_log_det = layer(x, context)
    torch.testing.assert_close(z.cpu(), expected_z, rtol=1e-3, atol=1e-3)  # convolutions may use TF32
    torch.testing.assert_close(log_det.cpu(), expected_log_det, rtol=1e-3, atol=1e-2)
    back = there.inverse(z.detach(), context_there)
    assert back.device == device
    torch.testing.assert_close(back.cpu(), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_bijection_is_initialised_and_trained_on_its_device(name, shape, device):
    example = BIJECTIONS[name]
    torch.manual_seed(0)
    layer = example.make(shape).to(device)
    x = example.to_domain(torch.randn(BATCH, *shape, device=device))
    context = None if example.context is None else torch.randn(BATCH, *example.context, device=device)
    layer.initialize(x, context)
    z, log_det = layer(x, context)
    (z.square().sum() - log_det.sum()).backward() if z.requires_grad else None
    assert all(value.device == device for value in layer.state_dict().values())
    assert all(parameter.grad.device == device for parameter in layer.parameters() if parameter.grad is not None)


@pytest.mark.cuda
def test_log_dets_on_cuda_are_autograds(cuda):
    for name, shape in CASES:
        layer, x, context = (part if part is None else part.to(cuda) for part in build(name, shape, torch.float64))
        x, context = x[:1], None if context is None else context[:1]
        matrix = torch.autograd.functional.jacobian(lambda v, f=layer, c=context: f(v, c)[0].flatten(), x)
        expected = torch.linalg.slogdet(matrix.reshape(x.numel(), x.numel())).logabsdet
        assert layer(x, context)[1].item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9), (name, shape)


@pytest.mark.parametrize("base", [StandardNormal(), StandardLogistic()], ids=lambda base: type(base).__name__)
def test_a_base_draws_where_it_is_asked_to(base, device):
    drawn = base.sample(torch.empty(5, 3, device=device))
    assert drawn.device == base.log_prob(drawn).device == device
    assert drawn.isfinite().all()


# --- models -----------------------------------------------------------------------------------------------------------

LEVELS = 17
SIZE = {"scales": 2, "steps": 1, "hidden": 8}
MODELS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...] | None]] = {
    "nice": (lambda: nice(6, levels=LEVELS, couplings=2, hidden=8, depth=1), (6,), None),
    "realnvp": (lambda: realnvp((1, 4, 4), levels=LEVELS, scales=2, couplings=2, hidden=4, blocks=1), (1, 4, 4), None),
    "glow": (lambda: glow((3, 8, 8), levels=LEVELS, **SIZE), (3, 8, 8), None),
    "glow, plain, by class": (lambda: glow((1, 8, 8), levels=LEVELS, lu=False, classes=3, **SIZE), (1, 8, 8), (3,)),
    "glow, learned noise, bounded": (
        lambda: glow((1, 8, 8), levels=LEVELS, bounded=True, bounded_priors=True, alpha=0.05, noise=4, **SIZE),
        (1, 8, 8),
        None,
    ),
    "cglow": (lambda: cglow((1, 8, 8), (3, 8, 8), levels=LEVELS, conditioning=4, **SIZE), (1, 8, 8), (3, 8, 8)),
    "cglow, of a vector": (lambda: cglow((1, 8, 8), (5,), levels=LEVELS, conditioning=4, **SIZE), (1, 8, 8), (5,)),
    "pixels": (lambda: PixelClassifier(UNet(3, LEVELS, 4, 2), (1, 8, 8), LEVELS), (1, 8, 8), (3, 8, 8)),
    "points": (lambda: realnvp_points(2, couplings=2, hidden=8, depth=1), (2,), None),
}
OPTIONS = {"batch_size": 8, "lr": 1e-3, "clip": 50.0, "warmup": 2, "cosine": True, "ema": 0.9}


def examples(name: str, device: torch.device, n: int = 40) -> tuple[nn.Module, Tensor, Tensor | None]:
    """A model on its device, data for it, and contexts if it needs them."""
    make, shape, context_shape = MODELS[name]
    torch.manual_seed(0)
    model = make().to(device)
    x = torch.randn(n, *shape) if name == "points" else torch.randint(LEVELS, (n, *shape))
    context = None if context_shape is None else torch.rand(n, *context_shape)
    return model, x.to(device), None if context is None else context.to(device)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_trained_judged_and_sampled_on_its_device(name, device):
    model, x, context = examples(name, device)
    given = {} if context is None else {"context": context, "held_out_context": context[:9]}
    history = fit(model, x, 12, held_out=x[:9], evaluations=2, **given, **OPTIONS)
    assert len(history.loss) == len(history.grad_norm) == 12
    assert all(map(math.isfinite, history.loss + history.grad_norm))
    assert [step for step, *_ in history.held_out] == [6, 12]
    assert all(value.device == device for value in model.state_dict().values())
    assert model(x, context).device == device
    assert log_likelihoods(model, x.cpu(), None if context is None else context.cpu()).isfinite().all()
    drawn = model.sample(9, 0.7, None if context is None else context[:9])
    assert drawn.device == device
    assert drawn.shape == x[:9].shape


@pytest.mark.parametrize("name", [name for name in MODELS if name != "pixels"])
def test_a_flow_encodes_and_decodes_on_its_device(name, device):
    flow, x, context = examples(name, device)
    flow.initialize(x, context)
    flow.eval()
    z = flow.encode(x, context)
    assert z.device == device
    assert all(piece.device == device for piece in split_latent(flow.chain, z))
    back = flow.decode(z.detach(), context)
    assert back.device == device
    assert (back - x).abs().float().mean() < 1e-3


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nice", "glow, learned noise, bounded", "cglow"])
def test_data_on_the_cpu_are_brought_to_the_flow(name, device):
    losses = []
    for place in (device, torch.device("cpu")):
        model, x, context = examples(name, device)
        torch.manual_seed(1)
        context = None if context is None else context.to(place)
        losses.append(fit(model, x.to(place), 6, context=context, **OPTIONS).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("name", ["glow, learned noise, bounded", "realnvp", "cglow"])
def test_a_step_waits_for_the_gpu_once(name, pretended):
    """The CPU reads a step's loss and gradient norm together, fetches one shuffle per epoch, and waits no more."""
    waits = []
    with pretended:
        for steps in (1, 11):
            model, x, context = examples(name, torch.device("pretended", 0))
            before = pretended.waits
            history = fit(model, x, steps, context=context, **OPTIONS | {"warmup": 1})
            waits.append(pretended.waits - before)
            assert len(history.loss) == len(history.grad_norm) == steps
    epochs = 2  # 40 examples in batches of 8
    assert waits[1] - waits[0] == 10 + epochs


class Spoiled(Bijection):
    """The identity map, whose log-determinant or gradient is not finite in one training step and in no later one."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__()
        self.at, self.what, self.calls = at, what, 0
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            self.calls += 1
        if self.calls != self.at or not torch.is_grad_enabled():
            return x, 0 * self.weight.expand(len(x))
        if self.what == "loss":
            return x, math.nan * self.weight.expand(len(x))
        return x, (self.weight - self.weight.detach()).sqrt().expand(len(x))  # 0, with an infinite slope

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("at", [1, 7, 10])
@pytest.mark.parametrize("fused", [True, False])
def test_from_the_first_step_that_is_not_finite_nothing_changes(fused, at, what, device):
    """History and parameters are those of the CPU: neither that step nor a later one is taken."""
    ends = []
    for place in (device, torch.device("cpu")):
        flow = Flow([Spoiled(at, what), DiagonalScaling(2)], StandardNormal(), (2,)).to(place)
        optimizer = torch.optim.Adam(flow.parameters(), lr=0.1, fused=fused)
        torch.manual_seed(0)
        points = torch.randn(40, 2)
        with pytest.raises(NonFiniteLoss) as raised:
            fit(flow, points.to(place), 30, batch_size=8, optimizer=optimizer, ema=0.9, clip=0.05)
        assert flow.chain[0].calls == at
        ends.append((raised.value.history, flow.chain[1].log_scale.detach().cpu()))
    (found, log_scale), (expected, expected_log_scale) = ends
    assert len(found.loss) == len(expected.loss) == at
    assert len(found.grad_norm) == len(expected.grad_norm) == at - (what == "loss")
    assert found.loss == pytest.approx(expected.loss, rel=1e-5, nan_ok=True)
    torch.testing.assert_close(log_scale, expected_log_scale)


def test_a_run_goes_on_to_the_same_parameters(device, tmp_path, monkeypatch):
    """The checkpoint holds the GPU's random state, so parameters are equal to the bit, on a real GPU as well."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def run(folder: Path, stop: int | None = None, **more: Any) -> tuple[dict[str, Tensor], History]:
        flow, x, _ = examples("glow, learned noise, bounded", device)
        if more:
            torch.manual_seed(99)  # nothing that a resumed process starts with may show in the end

        def on_evaluation(judged: Flow, history: History) -> None:
            torch.rand(3, device=device)
            if history.held_out[-1][0] == stop:
                raise Interrupted

        options = {**OPTIONS, "held_out": x[:9], "evaluations": 4, "on_evaluation": on_evaluation, **more}
        history = train(flow, x, 12, folder=folder, save_every=0.0, **options)
        return flow.state_dict(), history

    whole = run(tmp_path / "whole")
    for at in (3, 9):
        folder = tmp_path / f"stopped at {at}"
        with pytest.raises(Interrupted):
            run(folder, stop=at)
        state, history = run(folder, resume=True)
        most = max((state[name].cpu().double() - whole[0][name].cpu().double()).abs().max().item() for name in whole[0])
        print(f"a run resumed at step {at} differs from the whole one by at most {most:.1g}")
        assert most == 0, at
        assert history == whole[1], at


def test_evaluations_leave_the_random_state_of_the_device_alone(device):
    flow, x, _ = examples("glow, learned noise, bounded", device)
    flow.initialize(x)
    torch.manual_seed(3)
    expected = torch.rand(4, device=device).cpu()
    torch.manual_seed(3)
    log_likelihoods(flow, x, draws=2)
    runs.evaluate(flow, Images(x.cpu(), torch.zeros(len(x)), LEVELS), draws=2)
    runs.in_one_bound(flow, Images(x.cpu(), torch.zeros(len(x)), LEVELS), draws=2)
    assert torch.equal(torch.rand(4, device=device).cpu(), expected)


def test_augmentation_stays_on_its_device(device):
    images = torch.randint(2, (6, 1, 8, 8), device=device)
    photographs = torch.rand(6, 3, 8, 8, device=device)
    assert image_sets.random_flip(images).device == device
    masks, seen = segmentation.random_view(images, photographs)
    assert masks.device == seen.device == device
    assert masks.dtype == images.dtype
    assert set(masks.unique().tolist()) <= {0, 1}


@pytest.mark.cuda
@pytest.mark.parametrize("network", [GlowNet(6, 12, 32), ResNet(6, 12, 32, 2)], ids=["glow", "resnet"])
def test_bfloat16_inside_the_networks_is_float32_to_a_percent(network, cuda):
    torch.manual_seed(0)
    network = copy.deepcopy(network).to(cuda)
    x = torch.randn(16, 6, 8, 8, device=cuda)
    if isinstance(network, GlowNet):
        network.initialize(x)
    randomize(network, 0.05)
    exact = network(x)
    network.precision = torch.bfloat16
    rounded = network(x)
    assert rounded.dtype == torch.float32
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    print(f"bfloat16 against float32: {error:.2%}")
    assert 0 < error < 0.05


@pytest.mark.cuda
def test_a_compiled_step_on_cuda_is_the_plain_one(cuda):
    losses = []
    for compiled in (False, True):
        flow, x, _ = examples("glow", cuda)
        if compiled:
            flow.compile()
        torch.manual_seed(1)
        losses.append(fit(flow, x, 6, **OPTIONS).loss)
    # The compiled one draws other noise than the plain one.
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# --- runs, measures, pictures -----------------------------------------------------------------------------------------


def test_a_named_run_stays_on_its_device_and_says_which(device, monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "device", lambda prefer_gpu=None: device)
    flow = runs.train("nice-digits", tmp_path, steps=100, draws=1)
    assert next(flow.parameters()).device == device
    record = json.loads((tmp_path / archive.RECORD).read_text())
    assert "CPU" not in record["hardware"]
    assert record["steps"] == 100
    shipped, _ = checkpoint.load(tmp_path / archive.MODEL)
    assert all(tensor.device.type == "cpu" for tensor in shipped.values())
    assert (tmp_path / archive.SAMPLES).exists()


def test_measures_of_masks_follow_the_model(device):
    model = cglow((1, 8, 8), (3, 8, 8), levels=2, conditioning=4, **SIZE).to(device)
    masks, photographs = torch.randint(2, (6, 1, 8, 8)), torch.rand(6, 3, 8, 8)
    model.initialize(masks.to(device), photographs.to(device))
    images = Images(masks, torch.zeros(6), 2, photographs)
    for judged in (model.eval(), PixelClassifier(UNet(3, 2, 4, 2), (1, 8, 8), 2).to(device)):
        found = segmentation.metrics(judged, images, samples=2, most=4)
        assert all(math.isfinite(value) for value in found.values() if isinstance(value, float))


def test_pictures_follow_the_flow(device):
    flow, points, _ = examples("points", device)
    flow.initialize(points)
    with torch.no_grad():
        _, ax = plt.subplots()
        plotting.density(ax, flow.log_prob, points=points, n=10)
        plotting.density(ax, flow, n=10)
        plotting.density(ax, data.two_gaussians().log_prob, n=10)
        _, axes = plt.subplots(1, len(flow.chain) + 1)
        plotting.warp(axes, flow, points, lines=3)
        sheets.filmstrip(plt.figure(), flow, points)
        images, _ = examples("nice", device)[1:]
        plotting.images(ax, images, columns=5, levels=LEVELS, shape=(1, 2, 3))
    plt.close("all")


# --- the pretended GPU itself -----------------------------------------------------------------------------------------


def test_the_pretended_gpu_refuses_what_a_gpu_refuses(pretended):
    with pretended:
        x = torch.randn(3, 2, device="pretended")
        for mixed in (
            lambda: x + torch.zeros(3, 2),
            lambda: torch.cat([x, torch.zeros(3, 2)]),
            lambda: x @ torch.eye(2),
        ):
            with pytest.raises(RuntimeError, match="expected all tensors on pretended"):
                mixed()
        with pytest.raises(TypeError, match="Use Tensor"):
            x.numpy()
        with pytest.raises(TypeError, match="Use Tensor"):
            plt.plot(x)
        # What a GPU lets pass.
        assert (x * torch.tensor(2.0)).device == x[torch.tensor([0, 1])].device == x.device
        x[0] = torch.ones(2)
        assert x.cpu()[0].tolist() == [1, 1]


def test_the_pretended_gpu_has_a_random_state_of_its_own(pretended):
    with pretended:
        torch.manual_seed(0)
        first, on_cpu = torch.rand(3, device="pretended").cpu(), torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(torch.rand(3), on_cpu)
        assert torch.equal(torch.rand(3, device="pretended").cpu(), first)


class Planted(Rescale):
    """A layer with one of the faults that the suite must find: a tensor that is always on the CPU."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(len(x))


def test_a_planted_fault_is_seen(device):
    flow = Flow([Planted(1.0), DiagonalScaling(2)], StandardNormal(), (2,)).to(device)
    with pytest.raises(RuntimeError, match=r"device|pretended"):
        flow(torch.randn(3, 2, device=device))
