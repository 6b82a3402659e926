"""Tests of the residual network: its formula, its dependencies, weight norm, gradients, precision."""

from __future__ import annotations

import re

import pytest
import torch
from bijections import randomize
from torch import nn
from torch.nn.utils import parametrize

from nflows_lib.coupling import AffineCoupling, checkerboard_mask
from nflows_lib.networks import ResNet


def resnet(context: int = 0, blocks: int = 2, scale: float = 0.3, **options) -> ResNet:
    """A ResNet from 2 to 4 channels with random parameters."""
    torch.manual_seed(0)
    network = ResNet(2, 4, hidden=6, blocks=blocks, context=context, **options)
    randomize(network, scale)
    return network


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 6)])
@pytest.mark.parametrize("size", [(5, 4), (1, 1), (2, 7)])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_shapes(inputs, outputs, size, blocks):
    network = ResNet(inputs, outputs, hidden=4, blocks=blocks)
    for batch in (0, 1, 3):
        y = network(torch.randn(batch, inputs, *size))
        assert y.dtype == torch.float32
        assert y.shape == (batch, outputs, *size)
        assert y.isfinite().all()


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("blocks", [0, 2])
@torch.no_grad()
def test_resnet_is_its_formula(context, blocks):
    """[h, -h], ReLU, 3x3; blocks of ReLU, 3x3, ReLU, 3x3 plus their input; a sum of 1x1 skips; ReLU, 1x1."""
    network = resnet(context, blocks).double()
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    image = torch.randn(3, context, 5, 4, dtype=torch.float64) if context else None
    kernels = [3, *[3, 3] * blocks, *[1] * (blocks + 1), 1]
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.kernel_size for conv in convolutions] == [(size, size) for size in kernels]

    def conv(layer: nn.Conv2d, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(h, layer.weight, layer.bias, padding="same")

    first, *inner, last = convolutions
    h = conv(first, torch.cat([torch.cat([x, -x], 1).relu()] + ([image] if context else []), 1))
    skips = inner[2 * blocks :]
    total = conv(skips[0], h)
    for i in range(blocks):
        h = h + conv(inner[2 * i + 1], conv(inner[2 * i], h.relu()).relu())
        total = total + conv(skips[i + 1], h)
    expected = conv(last, total.relu())
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(network(x, image), expected)


@torch.no_grad()
def test_resnet_keeps_both_signs():
    """A ReLU alone would drop negative inputs."""
    network = resnet()
    positive, negative = torch.rand(1, 2, 4, 4) + 0.1, -torch.rand(1, 2, 4, 4) - 0.1
    assert (network(positive) - network(0 * positive)).abs().max() > 0.01
    assert (network(negative) - network(0 * negative)).abs().max() > 0.01
    assert (network(positive) - network(-positive)).abs().max() > 0.01


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_one_image_does_not_depend_on_the_others(training):
    network = resnet(context=1).train(training)
    x, context = torch.randn(4, 2, 5, 3), torch.randn(4, 1, 5, 3)
    alone = network(x[:1], context[:1])
    others = network(torch.cat([x[:1], 9 * x[1:]]), torch.cat([context[:1], 9 * context[1:]]))
    torch.testing.assert_close(others[:1], alone)
    torch.testing.assert_close(network(x, context)[:1], alone)


def test_weights_are_normalised():
    """Each output channel's weight is g v / |v|, so the length of v has no effect."""
    network = resnet(blocks=3)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 1 + 2 * 3 + 4 + 1
    assert all(parametrize.is_parametrized(conv, "weight") for conv in convolutions)
    x = torch.randn(2, 2, 4, 4)
    before = network(x)
    with torch.no_grad():
        for conv in convolutions:
            gain, direction = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
            torch.testing.assert_close(conv.weight.flatten(1).norm(dim=1), gain.flatten().abs())
            direction.mul_(3.0)
    torch.testing.assert_close(network(x), before)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_parameter_from_the_start(precision):
    torch.manual_seed(0)
    network = ResNet(2, 4, hidden=6, blocks=2, context=1, precision=precision)
    x, context, target = torch.randn(3, 2, 5, 4), torch.randn(3, 1, 5, 4), torch.randn(3, 4, 5, 4)
    (network(x, context) - target).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_context_image():
    network = resnet(context=3)
    x, context = torch.randn(2, 2, 4, 5), torch.randn(2, 3, 4, 5)
    y = network(x, context)
    for channel in range(3):
        other = context.clone()
        other[:, channel] = -other[:, channel]  # sign and all: the context joins as it is
        assert not torch.allclose(network(x, other), y)
    assert torch.equal(resnet()(x, context), resnet()(x))  # without one, it is ignored


def test_errors():
    network = resnet(context=3)
    x = torch.zeros(2, 2, 4, 5)
    with pytest.raises(ValueError, match=re.escape("context: expected shape (B, 3, 4, 5), got None")):
        network(x)
    with pytest.raises(ValueError, match=re.escape("context: expected shape (B, 3, 4, 5), got (2, 3, 5, 4)")):
        network(x, torch.zeros(2, 3, 5, 4))
    with pytest.raises(ValueError, match=f"^{re.escape('context: expected shape (B, 3), got (2, 4)')}$"):
        network(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="blocks: expected at least 0, got -1"):
        ResNet(1, 1, hidden=4, blocks=-1)


# --- precision --------------------------------------------------------------------------------------------------------


def test_bfloat16_is_near_float32():
    """bfloat16 keeps 8 bits: an error of 2^-9 per rounding, a few roundings, so a few per cent at most."""
    exact, rounded = resnet(context=1), resnet(context=1, precision=torch.bfloat16)
    x, context = torch.randn(3, 2, 6, 5), torch.randn(3, 1, 6, 5)
    y, z = exact(x, context), rounded(x, context)
    assert z.dtype == torch.float32
    error = (z - y).norm() / y.norm()
    assert 1e-5 < error < 0.03  # rounded indeed, and not by more

    for network, output in ((exact, y), (rounded, z)):
        output.square().sum().backward()
        assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in network.parameters())
    ours, theirs = (torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (exact, rounded))
    assert (ours - theirs).norm() / ours.norm() < 0.05


@torch.no_grad()
def test_bfloat16_inside_a_coupling_still_closes_the_round_trip():
    """Both directions round the same numbers in the same way, and use them in float32."""
    layer = AffineCoupling(checkerboard_mask((2, 5, 4), 0), resnet(precision=torch.bfloat16))
    x = torch.randn(3, 2, 5, 4)
    z, contribution = layer(x)
    assert z.dtype == contribution.dtype == torch.float32
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(layer.inverse(z), x, rtol=1e-5, atol=1e-5)
