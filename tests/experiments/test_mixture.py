"""Tests of the mixture coupling and of Glow with mixtures; tests/test_bijections.py has what holds for all layers."""

from __future__ import annotations

import math

import pytest
import torch
from bijections import Fixed, build
from torch import Tensor, nn

from nflows_lib import doctor
from nflows_lib.bijection import Layer
from nflows_lib.coupling import BoundedGlowCoupling
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments import mixture
from nflows_lib.experiments.mixture import MixtureCoupling, TwoHeads, mixture_glow
from nflows_lib.flow import Flow
from nflows_lib.multiscale import FactorOut


def test_it_is_the_formula():
    """By hand, for one number that changes: two components, in float64."""
    a, t, weights, means, raw_scales = 0.3, -0.7, [0.2, -1.0], [0.5, 2.0], [0.4, -0.6]
    layer = MixtureCoupling(2, Fixed(a, t, *weights, *means, *raw_scales), 2).double()
    gain = 1.5
    with torch.no_grad():
        layer.gain.fill_(gain)
    x = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    z, log_det = layer(x)
    total = sum(math.exp(weight) for weight in weights)
    F = density = 0.0
    for weight, mean, offset, raw in zip(weights, means, [-1.0, 1.0], raw_scales, strict=True):
        scale = math.exp(gain * math.tanh(raw))
        below = 1 / (1 + math.exp(-(0.9 - mean - offset) / scale))
        F += math.exp(weight) / total * below
        density += math.exp(weight) / total * below * (1 - below) / scale
    factor = gain * math.tanh(a)
    assert z.tolist()[0] == pytest.approx([0.1, math.log(F / (1 - F)) * math.exp(factor) + t], rel=1e-6)
    assert log_det.item() == pytest.approx(math.log(density / (F * (1 - F))) + factor, rel=1e-6)


def test_one_component_is_an_affine_coupling():
    layer, x, _ = build("mixture_coupling_single", (4,))
    z, log_det = layer(x)
    slope = (z[:, 2:] - layer(torch.cat([x[:, :2], x[:, 2:] + 1], 1))[0][:, 2:]).abs()
    torch.testing.assert_close(log_det, slope.log().sum(1))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-15)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@torch.no_grad()
def test_the_inverse_uses_the_whole_precision(dtype, bound, size):
    """Near the data, far below and far above the means: the error is relative to the larger of input and means."""
    torch.manual_seed(0)
    layer = MixtureCoupling(2, Fixed(*torch.randn(2 + 3 * 5).tolist()), 5).to(dtype)
    x = size * torch.randn(2000, 2, dtype=dtype)
    back = layer.inverse(layer(x)[0])
    assert ((back - x).abs() / x.abs().clamp(min=5)).max() < 4 * bound


def test_the_components_start_apart_and_learn_apart():
    """With equal means, a network of zeros would give all components the same gradient in every step."""
    torch.manual_seed(0)
    head = TwoHeads(8, 3, 4)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.head(x.repeat(1, 3, 1, 1)[:, :8])

    layer = MixtureCoupling(6, Network(), 4)
    x = torch.randn(16, 6, 4, 4)
    z, log_det = layer(x)
    (z.square().flatten(1).sum(1) / 2 - log_det).mean().backward()
    means = head.mixture.bias.grad.view(3, 4, 3)[1]  # of the components' means
    apart = (means[:, None] - means[None]).abs().amax(-1)
    assert (apart + torch.eye(4) > 1e-3).all()


@pytest.mark.parametrize(("found", "count"), [([], None), (["P1"], 6)], ids=["sound", "stops early"])
def test_the_doctor_finds_an_inverse_that_stops_too_early(monkeypatch, found, count):
    """The clinic's F29 says that the doctor calls it P1."""
    torch.manual_seed(0)
    layer, _, _ = build("mixture_coupling", (5,))
    if count is not None:
        monkeypatch.setattr(mixture, "halvings", lambda dtype: count)
    flow = Flow([layer.float()], StandardNormal(), (5,))
    findings = doctor(flow, torch.randn(64, 5), report=False)
    assert [finding.entry for finding in findings if finding.test == "round trip" and finding.passed is False] == found


def kinds(layers: Layer) -> list[list[type]]:
    """The kinds of the couplings of each scale."""
    found = [[type(layer) for layer in layers if isinstance(layer, BoundedGlowCoupling | MixtureCoupling)]]
    return found + (kinds(layers[-1].inner) if isinstance(layers[-1], FactorOut) else [])


@pytest.mark.parametrize("mixtures", [1, 2, 3, 9])
def test_the_last_couplings_of_each_scale_are_mixtures(mixtures):
    flow = mixture_glow((1, 8, 8), mixtures=mixtures, components=2, hidden=4, scales=3, steps=3)
    few = min(mixtures, 3)
    assert kinds(flow.chain) == [[BoundedGlowCoupling] * (3 - few) + [MixtureCoupling] * few] * 3


def sampled_and_scored(flow: Flow, context: Tensor | None) -> None:
    x = torch.randint(256, (4, *flow.shape))
    flow.initialize(x, context)
    assert flow(x, context).isfinite().all()
    assert flow.sample(4, context=context).shape == x.shape


def test_its_size_is_glow_s_size():
    """Classes, learned noise and bounded priors reach the flow; a mixture's network sees the label, too."""
    torch.manual_seed(0)
    flow = mixture_glow((1, 8, 8), hidden=4, scales=2, steps=1, classes=3, noise=4, bounded_priors=True)
    labels = torch.eye(3)[[0, 1, 2, 0]]
    sampled_and_scored(flow, labels)
    mixture = next(module for module in flow.modules() if isinstance(module, MixtureCoupling))
    assert mixture.network.context == 3
    sampled_and_scored(mixture_glow((1, 8, 8), hidden=4, scales=2, steps=1), None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureCoupling(1, nn.Identity(), 2), "channels: .* got 1"),
        (lambda: MixtureCoupling(4, nn.Identity(), 0), "components: .* got 0"),
        (lambda: mixture_glow((1, 8, 8), mixtures=0), "mixtures: .* got 0"),
        (lambda: mixture_glow((1, 8, 8), scales=1, steps=1, hidden=4, components=0), "components: .* got 0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_network_of_another_shape_is_refused():
    layer = MixtureCoupling(4, nn.Linear(2, 5), 2)
    layer.network.forward = lambda x, context: x
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=r"network's output: expected shape \(B, 16\), got \(3, 2\)"):
            direction(torch.zeros(3, 4))
