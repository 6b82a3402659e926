"""Tests of RealNVP on images and on points: layers, likelihood at the start, copies, round trips, samples."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from bijections import randomize
from densities import assert_samples_follow, integral
from torch import Tensor, nn

from nflows_lib.coupling import AffineCoupling, alternating_mask, channel_mask, checkerboard_mask
from nflows_lib.distributions import StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.models import realnvp, realnvp_points
from nflows_lib.multiscale import FactorOut, split_latent
from nflows_lib.networks import MLP, ResNet
from nflows_lib.normalization import FlowBatchNorm

SHAPES = [(1, 5, 3), (3, 4, 6), (1, 1, 2)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def small(shape=(1, 5, 3), levels: int = 256, seed: int = 0, random: bool = True) -> Flow:
    """A small RealNVP in evaluation mode, with random parameters and running averages."""
    torch.manual_seed(seed)
    flow = realnvp(shape, levels=levels, couplings=4, hidden=6, blocks=1)
    if random:
        randomize(flow, 0.2)
        for layer in flow.chain:
            if isinstance(layer, FlowBatchNorm):
                layer.running_mean.normal_()
                layer.running_variance.uniform_(0.5, 2.0)
    return flow.eval()


def levels_of(shape, levels: int = 256) -> Tensor:
    """Images in which every level occurs at every place, (levels, *shape), bytes."""
    k = torch.arange(levels).view(-1, 1) + torch.randperm(levels)[torch.arange(math.prod(shape)) % levels]
    return (k % levels).to(torch.uint8).reshape(-1, *shape)


def nats_of(flow: Flow, k: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return flow(k)


# --- images -----------------------------------------------------------------------------------------------------------


def test_realnvp_compiles_to_one_graph():
    """Weight norm, flow batch norms and a factor-out are included."""
    torch._dynamo.reset()
    flow = realnvp((1, 4, 4), levels=17, scales=2, couplings=2, hidden=2, blocks=0)
    explained = torch._dynamo.explain(flow)(torch.randint(17, (3, 1, 4, 4)))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


def test_realnvp_is_its_list_of_layers():
    flow = realnvp((3, 4, 5), couplings=3, hidden=8, blocks=2, levels=32, alpha=0.1)
    names = [type(layer).__name__ for layer in flow.chain]
    assert names == ["UniformDequantize", "Rescale", "Logit", *["AffineCoupling", "FlowBatchNorm"] * 3]
    assert (flow.levels, flow.chain[1].scale, flow.chain[2].alpha) == (32, 1 / 32, 0.1)
    for i in range(3):
        coupling, norm = flow.chain[3 + 2 * i], flow.chain[4 + 2 * i]
        assert torch.equal(coupling.mask, checkerboard_mask((3, 4, 5), i % 2))
        assert isinstance(coupling.network, ResNet)
        assert len(coupling.network.blocks) == 2
        assert coupling.network.first.out_channels == 8
        assert coupling.network.precision == torch.float32
        assert len(norm.running_mean) == 3
    assert isinstance(flow.base, StandardNormal)
    assert flow.shape == flow.latent_shape == (3, 4, 5)
    half = realnvp((1, 2, 2), hidden=4, blocks=0, precision=torch.bfloat16)
    assert {layer.network.precision for layer in half.chain if isinstance(layer, AffineCoupling)} == {torch.bfloat16}


def test_realnvp_has_the_defaults_of_the_paper():
    flow = realnvp((3, 32, 32))
    couplings = [layer for layer in flow.chain if isinstance(layer, AffineCoupling)]
    assert len(couplings) == 6
    assert all(len(layer.network.blocks) == 8 for layer in couplings)
    assert all(layer.network.first.out_channels == 64 for layer in couplings)
    assert (flow.levels, flow.chain[2].alpha) == (256, 0.05)


def test_summary():
    # The network: 3x3 from 2 to 4, 1x1 from 4 to 4 and 1x1 from 4 to 2, each with a bias and a length for an output.
    parameters = (4 * 2 * 9 + 4 + 4) + (4 * 4 + 4 + 4) + (2 * 4 + 2 + 2)
    coupling = f"AffineCoupling(changes 3 of 6)  (1, 2, 3)              {parameters + 1}"  # the gain
    assert realnvp((1, 2, 3), couplings=2, hidden=4, blocks=0).summary() == "\n".join(
        [
            "data                            (1, 2, 3)",
            "UniformDequantize(levels=256)   (1, 2, 3)                0",
            "Rescale(0.003906)               (1, 2, 3)                0",
            "Logit(0.05)                     (1, 2, 3)                0",
            coupling,
            "FlowBatchNorm()                 (1, 2, 3)                0",
            coupling,
            "FlowBatchNorm()                 (1, 2, 3)                0",
            f"StandardNormal                  (6,)            {2 * parameters + 2} in all",
        ]
    )


@pytest.mark.parametrize("levels", [32, 256])
@every_shape
@torch.no_grad()
def test_likelihood_at_the_start(shape, levels):
    """It is near log2 n bits per value in either mode."""
    flow = small(shape, levels, random=False)
    k = levels_of(shape, levels)
    for training in (True, False):
        bits = flow.train(training).bits_per_dim(k)
        assert bits.shape == (levels,)
        assert bits.isfinite().all()
        assert abs(bits.mean().item() - math.log2(levels)) < 2


@pytest.mark.parametrize("levels", [32, 256])
@every_shape
@torch.no_grad()
def test_likelihood_while_the_couplings_do_nothing(shape, levels):
    """Uniform levels cost log2 n bits plus the cost of a logit-normal density on a uniform number."""
    flow = small(shape, levels, random=False)
    for layer in flow.chain:
        if isinstance(layer, AffineCoupling):
            nn.init.zeros_(layer.network.last.parametrizations.weight.original0)
            nn.init.zeros_(layer.network.last.bias)
    bits = flow.bits_per_dim(levels_of(shape, levels), draws=40)
    u = (torch.arange(1_000, dtype=torch.float64) + 0.5) / 1_000
    p = 0.05 + 0.9 * u
    nats = 0.5 * (p.logit().square() + math.log(2 * math.pi)) - (0.9 / (p * (1 - p))).log()
    assert bits.mean().item() == pytest.approx(math.log2(levels) + nats.mean().item() / math.log(2), abs=0.02)


@every_shape
@torch.no_grad()
def test_encode_and_decode_every_level(monkeypatch, shape):
    """The noise avoids the edges of a level, where one in 10^5 values would round into the next level."""
    rand_like = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda like: 0.01 + 0.98 * rand_like(like))
    flow = small(shape)
    k = levels_of(shape)
    z = flow.encode(k)
    assert z.shape == (256, math.prod(shape))
    assert torch.equal(flow.decode(z), k.long())
    assert flow(k).isfinite().all()


@every_shape
@torch.no_grad()
def test_samples_are_levels(shape):
    flow = small(shape, levels=8)
    x = flow.sample(50)
    assert x.shape == (50, *shape)
    assert x.dtype == torch.long
    assert x.min() >= 0
    assert x.max() <= 7
    assert len(x.unique()) > 4
    assert flow(x).isfinite().all()


@torch.no_grad()
def test_log_prob_of_an_image_does_not_depend_on_the_others_in_evaluation_mode():
    flow = small((3, 4, 6))
    k = torch.randint(256, (4, 3, 4, 6))
    layers = list(flow.chain[1:])
    continuous = Flow(layers, flow.base, (3, 4, 6))
    x = k + 0.5
    torch.testing.assert_close(continuous(x)[:1], continuous(x[:1]))
    continuous.train()
    assert abs(continuous(x)[0] - continuous(torch.cat([x[:1], x[:1], x[:1] + 0.1]))[0]) > 0.1


@torch.no_grad()
def test_realnvp_integrates_to_one():
    """The density after the logit is integrated over two pixels, in evaluation mode."""
    flow = small((1, 1, 2)).double()
    continuous = flow[3:]
    assert integral(lambda x: continuous(x.view(-1, 1, 1, 2)), 2, -20, 20, points=250) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_a_copy_has_the_same_likelihood(training):
    flow = small().train(training)
    k = torch.randint(256, (5, 1, 5, 3))
    other = copy.deepcopy(flow)
    before = nats_of(other, k)
    assert torch.equal(nats_of(flow, k), before)
    with torch.no_grad():
        randomize(flow)
    flow.chain[-1].running_mean.add_(1)
    assert not torch.equal(nats_of(flow.eval(), k), nats_of(copy.deepcopy(other).eval(), k))
    other.load_state_dict(flow.state_dict())
    assert torch.equal(nats_of(flow, k), nats_of(other.eval(), k))


def test_state_dict_round_trip():
    """The state dict holds masks, lengths and directions of the weights, gains and running averages."""
    flow, other = small(seed=0), small(seed=1)
    k = torch.randint(256, (5, 1, 5, 3))
    assert not torch.allclose(nats_of(other, k), nats_of(flow, k))
    state = {name: value.clone() for name, value in flow.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(nats_of(other, k), nats_of(flow, k))
    fresh = realnvp((1, 5, 3), couplings=4, hidden=6, blocks=1).eval()
    fresh.load_state_dict(state)
    assert torch.equal(nats_of(fresh, k), nats_of(flow, k))


def test_a_few_steps_of_training_lower_the_loss():
    """The running averages follow, so evaluation mode agrees."""
    torch.manual_seed(0)
    flow = realnvp((1, 4, 4), levels=8, couplings=2, hidden=8, blocks=1)
    k = torch.randint(3, (64, 1, 4, 4)) + 2
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = flow.bits_per_dim(k).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    with torch.no_grad():
        assert flow.eval().bits_per_dim(k).mean().item() == pytest.approx(losses[-1], abs=0.1)


@pytest.mark.parametrize("couplings", [0, 1])
def test_two_couplings_at_least(couplings):
    message = re.escape(f"couplings: expected at least 2, so that each half is changed, got {couplings}")
    with pytest.raises(ValueError, match=message):
        realnvp((1, 2, 2), hidden=2, blocks=0, couplings=couplings)
    with pytest.raises(ValueError, match=message):
        realnvp_points(2, couplings=couplings)


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 1)])
def test_realnvp_refuses_what_is_no_image(shape):
    message = f"shape: expected (C, H, W) with at least two pixels, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        realnvp(shape, hidden=2, blocks=0)


# --- images at several scales -----------------------------------------------------------------------------------------

SCALES = [((1, 4, 6), 2), ((3, 2, 4), 2), ((1, 4, 8), 3), ((3, 8, 4), 3)]
several_scales = pytest.mark.parametrize(
    ("shape", "scales"), SCALES, ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
)


def multi_scale(shape, scales: int, levels: int = 256, seed: int = 0, random: bool = True) -> Flow:
    """A small RealNVP of several scales in evaluation mode, with random parameters and running averages."""
    torch.manual_seed(seed)
    flow = realnvp(shape, levels=levels, scales=scales, couplings=2, hidden=4, blocks=1)
    if random:
        randomize(flow, 0.1)
        for layer in flow.modules():
            if isinstance(layer, FlowBatchNorm):
                layer.running_mean.normal_(std=0.3)
                layer.running_variance.uniform_(0.5, 2.0)
    return flow.eval()


@several_scales
def test_realnvp_of_several_scales_is_its_list_of_layers(shape, scales):
    """Three checkerboards, a squeeze, three channel masks, an order; half goes on to networks twice as wide."""
    flow = realnvp(shape, scales=scales, couplings=4, hidden=3, blocks=2, levels=32, precision=torch.bfloat16)
    coupled = ["AffineCoupling", "FlowBatchNorm"]
    layers, width = list(flow.chain), 3
    assert [type(layer).__name__ for layer in layers[:3]] == ["UniformDequantize", "Rescale", "Logit"]
    layers, here = layers[3:], shape
    for _ in range(scales - 1):
        names = [type(layer).__name__ for layer in layers]
        assert names == [*coupled * 3, "Squeeze", *coupled * 3, "PhaseOrder", "FactorOut"]
        squeezed = (4 * here[0], here[1] // 2, here[2] // 2)
        for i in range(3):
            assert torch.equal(layers[2 * i].mask, checkerboard_mask(here, i % 2))
            assert torch.equal(layers[7 + 2 * i].mask, channel_mask(squeezed, i % 2))
            assert_network(layers[2 * i].network, here[0], width)
            assert_network(layers[7 + 2 * i].network, squeezed[0], width)
            assert len(layers[8 + 2 * i].running_mean) == squeezed[0]
        assert layers[-1].shape == squeezed
        assert layers[-1].prior is None
        layers, here, width = list(layers[-1].inner), (squeezed[0] // 2, *squeezed[1:]), 2 * width
    assert [type(layer).__name__ for layer in layers] == coupled * 4
    for i in range(4):
        assert torch.equal(layers[2 * i].mask, checkerboard_mask(here, i % 2))
        assert_network(layers[2 * i].network, here[0], width)
    assert flow.latent_shape == (math.prod(shape),)
    assert flow.dims == math.prod(shape)


def assert_network(network: nn.Module, channels: int, width: int) -> None:
    assert isinstance(network, ResNet)
    assert (network.first.in_channels, network.last.out_channels) == (2 * channels, 2 * channels)
    assert (network.first.out_channels, len(network.blocks), network.precision) == (width, 2, torch.bfloat16)


def test_one_scale_is_what_it_was():
    torch.manual_seed(0)
    flow = realnvp((1, 3, 5), hidden=2, blocks=1)
    torch.manual_seed(0)
    one = realnvp((1, 3, 5), hidden=2, blocks=1, scales=1)
    assert [type(layer) for layer in one.chain] == [type(layer) for layer in flow.chain]
    assert len(one.chain) == 3 + 2 * 6
    assert not any(isinstance(layer, FactorOut) for layer in one.modules())
    assert one.latent_shape == (1, 3, 5)
    assert one.state_dict().keys() == flow.state_dict().keys()
    for ours, theirs in zip(one.state_dict().values(), flow.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@several_scales
def test_summary_of_several_scales(shape, scales):
    flow = multi_scale(shape, scales)
    lines = flow.summary().splitlines()
    rows = [re.fullmatch(r"( *)(\w+)\(.*\)  +(\(.*\)) +([\d,]+)", line).groups() for line in lines[1:-1]]
    expected, here, indent = [("", name, shape) for name in ("UniformDequantize", "Rescale", "Logit")], shape, ""
    for _ in range(scales - 1):
        squeezed = (4 * here[0], here[1] // 2, here[2] // 2)
        expected += [(indent, name, here) for name in ["AffineCoupling", "FlowBatchNorm"] * 3]
        expected += [(indent, "Squeeze", squeezed)]
        expected += [(indent, name, squeezed) for name in ["AffineCoupling", "FlowBatchNorm"] * 3]
        expected += [(indent, "PhaseOrder", squeezed), (indent, "FactorOut", (math.prod(squeezed),))]
        indent, here = indent + "  ", (squeezed[0] // 2, *squeezed[1:])
    expected += [(indent, name, here) for name in ["AffineCoupling", "FlowBatchNorm"] * 2]
    assert [row[:3] for row in rows] == [(indent, name, str(shape)) for indent, name, shape in expected]
    total = sum(p.numel() for p in flow.parameters())
    assert sum(int(row[3].replace(",", "")) for row in rows) == total
    assert lines[-1].endswith(f"  {total:,} in all")
    assert all(row[3] == "0" for row in rows if row[1] == "FactorOut")


@several_scales
@torch.no_grad()
def test_several_scales_encode_and_decode_every_level(monkeypatch, shape, scales):
    rand_like = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda like: 0.01 + 0.98 * rand_like(like))
    flow = multi_scale(shape, scales)
    k = levels_of(shape)
    z = flow.encode(k)
    assert z.shape == (256, math.prod(shape))
    assert torch.equal(flow.decode(z), k.long())
    assert flow(k).isfinite().all()
    pieces = split_latent(flow.chain, z)
    assert [piece[0].numel() for piece in pieces] == [math.prod(shape) // n for n in ([2, 2], [2, 4, 4])[scales - 2]]
    assert torch.equal(torch.cat([piece.flatten(1) for piece in pieces], 1), z)


@several_scales
@torch.no_grad()
def test_likelihood_of_several_scales_at_the_start(shape, scales):
    """It is near log2 n bits per value in either mode: D is the dimension of the input."""
    flow = multi_scale(shape, scales, random=False)
    for training in (True, False):
        bits = flow.train(training).bits_per_dim(levels_of(shape))
        assert bits.isfinite().all()
        assert abs(bits.mean().item() - 8) < 2
    x = flow.sample(20)
    assert x.shape == (20, *shape)
    assert flow(x).isfinite().all()


@torch.no_grad()
def test_the_finest_piece_is_one_colour_of_the_chess_board():
    """Couplings that do nothing leave the pixels with odd row + column as the first factored-out piece."""
    flow = multi_scale((3, 4, 8), 3, random=False)
    for layer in flow.modules():
        if isinstance(layer, AffineCoupling):
            nn.init.zeros_(layer.network.last.parametrizations.weight.original0)
            nn.init.zeros_(layer.network.last.bias)
    mask = checkerboard_mask((3, 4, 8), 0)
    k = torch.where(mask, 0, 255)[None]  # dark at even places, so its latent is below 0
    pieces = split_latent(flow.chain, flow.encode(k))
    assert [tuple(piece.shape[1:]) for piece in pieces] == [(6, 2, 4), (12, 1, 2), (12, 1, 2)]
    assert (pieces[0] > 0).all()
    assert (pieces[1] < 0).all()
    assert (pieces[2] < 0).all()


@several_scales
def test_gradients_reach_every_parameter_of_several_scales(shape, scales):
    flow = multi_scale(shape, scales).train()
    flow.bits_per_dim(levels_of(shape)[::8]).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@several_scales
def test_state_dict_of_several_scales(shape, scales):
    flow, other = multi_scale(shape, scales), multi_scale(shape, scales, seed=1)
    k = levels_of(shape)[::16]
    assert not torch.allclose(nats_of(other, k), nats_of(flow, k))
    other.load_state_dict({name: value.clone() for name, value in flow.state_dict().items()})
    assert torch.equal(nats_of(other, k), nats_of(flow, k))
    assert torch.equal(nats_of(copy.deepcopy(flow), k), nats_of(flow, k))


@pytest.mark.parametrize("scales", [0, -1])
def test_one_scale_at_least(scales):
    with pytest.raises(ValueError, match=f"^scales: expected at least 1, got {scales}$"):
        realnvp((1, 4, 4), hidden=2, blocks=0, scales=scales)


@pytest.mark.parametrize(
    ("shape", "scales", "message"),
    [
        ((1, 5, 4), 2, "(C, H, W) with even height and width, got (1, 5, 4)"),
        ((1, 6, 4), 3, "(C, H, W) with even height and width, got (2, 3, 2)"),
        ((3, 4, 6), 3, "(C, H, W) with even height and width, got (6, 2, 3)"),
        ((1, 2, 2), 2, "(C, H, W) with at least two pixels, got (2, 1, 1)"),
        ((1, 4, 4), 3, "(C, H, W) with at least two pixels, got (4, 1, 1)"),
        ((1, 1, 1), 2, "(C, H, W) with at least two pixels, got (1, 1, 1)"),
        ((4, 4), 2, "(C, H, W) with at least two pixels, got (4, 4)"),
    ],
)
def test_images_that_do_not_fit_the_scales_are_named(shape, scales, message):
    with pytest.raises(ValueError, match=f"^shape: expected {re.escape(message)}$"):
        realnvp(shape, hidden=2, blocks=0, scales=scales)


# --- points -----------------------------------------------------------------------------------------------------------


def small_points(scale: float = 0.4) -> Flow:
    torch.manual_seed(2)
    flow = realnvp_points(2, couplings=4, hidden=8, depth=1)
    randomize(flow, scale)
    return flow


def test_realnvp_points_is_its_list_of_layers():
    flow = realnvp_points(5)
    assert [type(layer) for layer in flow.chain] == [AffineCoupling] * 6
    for i, layer in enumerate(flow.chain):
        assert torch.equal(layer.mask, alternating_mask(5, i % 2))
        assert isinstance(layer.network, MLP)
        linear = [part for part in layer.network.layers if isinstance(part, nn.Linear)]
        assert (
            linear[0].in_features == 3 - i % 2
        )  # of five numbers, three are left unchanged at parity 0 and two at parity 1
        assert [part.out_features for part in linear] == [64, 64, 2 * (2 + i % 2)]
    assert isinstance(flow.base, StandardNormal)
    assert flow.levels is None
    x = torch.randn(3, 5)
    assert torch.equal(flow.encode(x), x)


def test_realnvp_points_integrates_to_one():
    flow = small_points().double()
    assert integral(flow, 2, -20, 20) == pytest.approx(1, abs=1e-3)
    grid = torch.randn(50, 2, dtype=torch.float64)
    assert (flow(grid) - flow.base.log_prob(grid)).abs().max() > 0.5


def test_realnvp_points_samples_follow_log_prob():
    flow = small_points()
    x = flow.sample(20_000)
    assert x.shape == (20_000, 2)
    assert x.dtype == torch.float32
    assert_samples_follow(x, lambda x: flow(x.float()).double(), -4, 4)


@torch.no_grad()
def test_realnvp_points_encode_and_decode():
    flow = small_points().double()
    x = torch.randn(20, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.decode(flow.encode(x)), x)
