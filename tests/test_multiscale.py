"""Tests of squeeze, phase order and factor-out: places of values, formulas by hand, densities against enumeration."""

from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch
from bijections import BIJECTIONS, ConvNet, build, channel_couplings, learned_prior, nested_factor_out, randomize
from densities import assert_samples_follow, gauss, integral
from torch import Tensor, nn

from nflows_lib.bijection import Bijection, Chain, Layer, Shape
from nflows_lib.coupling import AffineCoupling, checkerboard_mask
from nflows_lib.dequantization import Logit, Rescale, UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.multiscale import FactorOut, PhaseOrder, Squeeze, split_latent
from nflows_lib.normalization import DiagonalScaling, FlowBatchNorm


def labelled(channels: int, height: int = 4, width: int = 6) -> Tensor:
    """One image, (1, C, H, W), whose pixel in channel c, row i and column j is 100 c + 10 i + j."""
    c, i, j = torch.meshgrid(*map(torch.arange, (channels, height, width)), indexing="ij")
    return (100.0 * c + 10 * i + j)[None]


one_and_three = pytest.mark.parametrize("channels", [1, 3])


@pytest.mark.parametrize("name", [name for name, example in BIJECTIONS.items() if example.only_moves])
def test_what_only_moves_keeps_every_value(name):
    for shape in BIJECTIONS[name].shapes:
        layer, x, _ = build(name, shape)
        z, contribution = layer(x)
        assert torch.equal(z.flatten(1).sort().values, x.flatten(1).sort().values)
        assert torch.equal(contribution, torch.zeros(len(x), dtype=x.dtype))
        assert torch.equal(layer.inverse(z), x)


# --- squeeze ----------------------------------------------------------------------------------------------------------


def test_squeeze_by_hand():
    """[[0, 1, 2, 3], [10, 11, 12, 13]] becomes top left, top right, bottom left and bottom right."""
    z, _ = Squeeze()(labelled(2, 2, 4))
    first = [[[0, 2]], [[1, 3]], [[10, 12]], [[11, 13]]]
    assert z[0].tolist() == first + [[[value + 100 for value in row] for row in rows] for rows in first]


@one_and_three
def test_squeeze_takes_each_pixel_to_its_channel(channels):
    x = labelled(channels)
    z, _ = Squeeze()(x)
    assert z.shape == (1, 4 * channels, 2, 3)
    for c, dy, dx in itertools.product(range(channels), (0, 1), (0, 1)):
        assert torch.equal(z[:, 4 * c + 2 * dy + dx], x[:, c, dy::2, dx::2])
    assert not torch.equal(
        z, x.reshape(1, 4 * channels, 2, 3)
    )  # a plain reshape has the same shape, but other neighbours
    assert torch.equal(Squeeze().inverse(z), x)


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 4, 3), (3, 5, 7), (4, 4), (1, 1, 4, 4), ()])
def test_squeeze_refuses_odd_sizes(shape):
    message = f"^{re.escape(f'shape: expected (C, H, W) with even height and width, got {shape}')}$"
    with pytest.raises(ValueError, match=message):
        Squeeze()(torch.zeros(2, *shape))
    with pytest.raises(ValueError, match=message):
        Squeeze().output_shape(shape)
    if shape:
        with pytest.raises(ValueError, match=message):
            Flow([Squeeze()], StandardNormal(), shape)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 6, 2, 2), (2, 4, 4), (2, 4)])
def test_squeeze_refuses_what_no_squeeze_gives(shape):
    with pytest.raises(ValueError, match=f"^{re.escape(f'z: expected shape (B, 4 C, H, W), got {shape}')}$"):
        Squeeze().inverse(torch.zeros(shape))


# --- phase order ------------------------------------------------------------------------------------------------------

PLACES = [(0, 0), (1, 1), (0, 1), (1, 0)]  # (dy, dx): top left, bottom right, top right, bottom left


@one_and_three
def test_phase_order_sorts_by_place(channels):
    """Channel k C + c holds the pixels of place k; the first half is one colour of the chess board."""
    x = labelled(channels)
    squeezed, _ = Squeeze()(x)
    layer = PhaseOrder(4 * channels)
    z, _ = layer(squeezed)
    for (k, (dy, dx)), c in itertools.product(enumerate(PLACES), range(channels)):
        assert torch.equal(z[:, k * channels + c], x[:, c, dy::2, dx::2])
    even = checkerboard_mask(tuple(x.shape[1:]), 0)
    assert torch.equal(z[:, : 2 * channels].flatten().sort().values, x[0, even].sort().values)
    assert torch.equal(z[:, 2 * channels :].flatten().sort().values, x[0, ~even].sort().values)
    assert torch.equal(layer.inverse(z), squeezed)
    assert not torch.equal(layer(z)[0], squeezed)  # the order is not its own inverse


def test_phase_order_by_hand():
    """Two channels, numbered 4 c + phase, come in the order 0 4

    3 7 | 1 5 | 2 6.
    """
    z, _ = PhaseOrder(8)(torch.arange(8.0).view(1, 8, 1, 1))
    assert z.flatten().tolist() == [0, 4, 3, 7, 1, 5, 2, 6]
    assert PhaseOrder(8).inverse(torch.arange(8.0).view(1, 8, 1, 1)).flatten().tolist() == [0, 4, 6, 2, 1, 5, 7, 3]


@pytest.mark.parametrize("channels", [-4, 0, 1, 2, 3, 6])
def test_phase_order_needs_a_multiple_of_four(channels):
    with pytest.raises(ValueError, match=f"^channels: expected a multiple of 4, got {channels}$"):
        PhaseOrder(channels)


@pytest.mark.parametrize("shape", [(4, 2, 2), (12, 2, 2), (8, 2)])
def test_phase_order_names_wrong_channels(shape):
    layer, got = PhaseOrder(8), re.escape(str((2, *shape)))
    for name, call in (("x", layer), ("z", layer.inverse)):
        with pytest.raises(ValueError, match=rf"^{name}: expected shape \(B, 8\) or \(B, 8, H, W\), got {got}$"):
            call(torch.zeros(2, *shape))
    message = f"channels: expected 8, as in (8,) or (8, H, W), got {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer.output_shape(shape)


def test_phase_order_moves_with_the_module():
    assert list(PhaseOrder(4).state_dict()) == ["order"]
    assert PhaseOrder(4).to("meta").order.device.type == "meta"
    assert PhaseOrder(4).double().order.dtype == torch.int64


# --- factor-out -------------------------------------------------------------------------------------------------------


def test_factor_out_without_prior_is_flat_and_finest_first():
    """The second half of the channels comes first and unchanged, then the inner layers' output of the first half."""
    x = labelled(4, 2, 3)
    z, contribution = FactorOut((4, 2, 3), [Rescale(2.0)])(x)
    assert z.shape == (1, 24)
    assert torch.equal(z, torch.cat([x[:, 2:].flatten(1), 2 * x[:, :2].flatten(1)], dim=1))
    assert contribution.item() == pytest.approx(12 * math.log(2))


@torch.no_grad()
def test_factor_out_by_hand():
    """eps = (x2 - mu(x1)) / exp(s(x1)); the log-det is -sum s plus that of the inner layers."""
    layer, x, _ = build("factor_out_prior", (6, 3, 1))
    x1, x2 = x[:, :3], x[:, 3:]
    output = layer.prior(x1)
    mean, log_scale = output[:, :3], output[:, 3:]
    assert min(mean.abs().min(), log_scale.abs().min(), (mean - log_scale).abs().min()) > 1e-3
    z, contribution = layer(x)
    torch.testing.assert_close(z[:, :9], ((x2 - mean) / log_scale.exp()).flatten(1))
    torch.testing.assert_close(z[:, 9:], (0.7 * x1).flatten(1))
    torch.testing.assert_close(contribution, 9 * math.log(0.7) - log_scale.sum((1, 2, 3)))


class Fixed(nn.Module):
    """A prior that returns the same numbers for every example, and keeps its input."""

    def __init__(self, *output: float) -> None:
        super().__init__()
        self.output = torch.tensor(output).view(-1, 1, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.seen = (x, context)
        return self.output.expand(len(x), -1, -1, -1)


def test_factor_out_in_numbers():
    """x = (5, 8), mu = 2, s = ln 3: eps = (8 - 2) / 3 = 2, log-determinant -ln 3. The prior sees x1 both ways."""
    prior = Fixed(2.0, math.log(3))
    layer = FactorOut((2, 1, 1), [], prior)
    x, context = torch.tensor([5.0, 8.0]).view(1, 2, 1, 1), torch.zeros(1, 7)
    z, contribution = layer(x, context)
    assert z.tolist() == [pytest.approx([2, 5])]
    assert contribution.item() == pytest.approx(-math.log(3))
    assert prior.seen[0].tolist() == [[[[5]]]]
    assert prior.seen[1] is context
    prior.seen = None
    torch.testing.assert_close(layer.inverse(z, context), x)
    assert prior.seen[0].tolist() == [[[[5]]]]
    assert prior.seen[1] is context


@torch.no_grad()
def test_temperature_zero_gives_the_priors_mean():
    """eps is 0 at every scale, so x2 = mu(x1), where x1 is what the inner layers decode from 0."""
    layer, _, _ = build("factor_out_nested", (2, 2, 4))
    x = layer.inverse(torch.zeros(1, 16, dtype=torch.float64))
    x1 = layer.inner.inverse(torch.zeros(1, 8, dtype=torch.float64))
    torch.testing.assert_close(x, torch.cat([x1, layer.prior(x1)[:, :1]], dim=1))
    assert x.abs().min() > 1e-6
    flow = Flow([layer], StandardNormal(), (2, 2, 4))
    torch.testing.assert_close(flow.sample(3, temperature=0), x.expand(3, -1, -1, -1))


class SetMean(Bijection):
    """A layer that subtracts the mean of the batch that initialises it, and keeps that batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.seen.append((x.clone(), context))
        self.shift.copy_(-x.mean())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + self.shift, x.new_zeros(len(x))


def test_initialize_reaches_inner_layers_with_what_goes_on():
    """That is the first half of the channels at either depth, after all layers before it."""
    first, second, third = SetMean(), SetMean(), SetMean()
    inner = FactorOut((4, 1, 2), [third])
    flow = Flow([Rescale(2.0), FactorOut((2, 2, 4), [first, Squeeze(), second, inner])], StandardNormal(), (2, 2, 4))
    x, context = labelled(2, 2, 4), torch.zeros(1, 3)
    flow.initialize(x, context)
    x1 = 2 * x[:, :1]
    torch.testing.assert_close(first.seen[0][0], x1)
    squeezed, _ = Squeeze()(x1 - x1.mean())
    torch.testing.assert_close(second.seen[0][0], squeezed)
    torch.testing.assert_close(third.seen[0][0], (squeezed - squeezed.mean())[:, :2])
    for layer in (first, second, third):
        assert len(layer.seen) == 1
        assert layer.seen[0][1] is context


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 2, 2), (4, 4), (8,)])
def test_factor_out_needs_even_channels(shape):
    message = f"shape: expected (C, H, W) with an even number of channels, got {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FactorOut(shape, [])


def test_factor_out_refuses_inner_layers_that_do_not_fit():
    with pytest.raises(ValueError, match=re.escape("even height and width, got (1, 3, 2)")):
        FactorOut((2, 3, 2), [Squeeze()])
    with pytest.raises(ValueError, match="layers: expected Layer objects, got Linear at position 0"):
        FactorOut((2, 2, 2), [nn.Linear(1, 1)])


@pytest.mark.parametrize("outputs", [1, 2, 8])
def test_factor_out_refuses_a_prior_of_another_shape(outputs):
    """One channel would broadcast, and half as many channels would split into halves that broadcast."""
    layer = FactorOut((4, 2, 3), [], ConvNet(2, outputs))
    message = f"prior's output: expected shape (B, 4, 2, 3), got (5, {outputs}, 2, 3)"
    for direction, batch in ((layer, torch.zeros(5, 4, 2, 3)), (layer.inverse, torch.zeros(5, 24))):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            direction(batch)


def test_factor_out_comes_last():
    with pytest.raises(ValueError, match=re.escape("got (8,)")):
        Flow([FactorOut((2, 2, 2), []), Squeeze()], StandardNormal(), (2, 2, 2))


# --- in a flow --------------------------------------------------------------------------------------------------------


def multi_scale(shape: Shape = (1, 4, 8), prior: bool = True, seed: int = 0) -> Flow:
    """A flow of three scales on continuous (C, H, W), with random parameters, float64; C is 1 or 3."""
    torch.manual_seed(seed)
    squeezed = (4 * shape[0], shape[1] // 2, shape[2] // 2)
    half = (squeezed[0] // 2, *squeezed[1:])
    again = (4 * half[0], half[1] // 2, half[2] // 2)
    last = (again[0] // 2, *again[1:])
    norm = FlowBatchNorm(half[0])
    norm.running_mean.normal_()
    norm.running_variance.uniform_(0.5, 2.0)
    deepest = [AffineCoupling(checkerboard_mask(last, i), ConvNet(last[0], 2 * last[0])) for i in (0, 1)]
    second = FactorOut(again, deepest, learned_prior(again) if prior else None)
    middle = [*channel_couplings(half), norm, Squeeze(), *channel_couplings(again), PhaseOrder(again[0]), second]
    first = FactorOut(squeezed, middle, learned_prior(squeezed) if prior else None)
    start = AffineCoupling(checkerboard_mask(shape, 0), ConvNet(shape[0], 2 * shape[0]))
    layers = [start, Squeeze(), *channel_couplings(squeezed), PhaseOrder(squeezed[0]), first]
    flow = Flow(layers, StandardNormal(), shape).double()
    randomize(flow, 0.2)
    return flow.eval()


@pytest.mark.parametrize("shape", [(1, 4, 8), (3, 8, 4)])
@pytest.mark.parametrize("prior", [False, True])
@torch.no_grad()
def test_a_multi_scale_flow_encodes_decodes_and_samples(shape, prior):
    flow = multi_scale(shape, prior)
    dims = math.prod(shape)
    assert flow.latent_shape == (dims,)
    x = torch.randn(5, *shape, dtype=torch.float64)
    z = flow.encode(x)
    assert z.shape == (5, dims)
    torch.testing.assert_close(flow.decode(z), x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flow.encode(flow.decode(z)), z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flow.bits_per_dim(x), -flow(x) / (dims * math.log(2)))
    assert flow.sample(2).shape == (2, *shape)
    torch.manual_seed(1)
    warm = flow.sample(7, temperature=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(warm, flow.decode(0.5 * torch.randn(7, dims, dtype=torch.float64)))


def test_a_multi_scale_flow_counts_the_dimensions_of_the_input():
    """Factor-outs of layers that only move values contribute 0: the likelihood is that of the base density."""
    shape = (1, 4, 4)
    deep = FactorOut((8, 1, 1), [Rescale(1.0)])
    layers = [Squeeze(), PhaseOrder(4), FactorOut((4, 2, 2), [Squeeze(), PhaseOrder(8), deep])]
    flow, plain = Flow(layers, StandardNormal(), shape), Flow([Rescale(1.0)], StandardNormal(), shape)
    x = torch.randn(3, *shape)
    torch.testing.assert_close(flow.bits_per_dim(x), plain.bits_per_dim(x))
    assert flow.dims == 16


def test_a_multi_scale_flow_against_autograd():
    flow = multi_scale((1, 4, 8))
    x = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    z, contribution = flow.chain(x)
    for i in range(2):
        matrix = torch.autograd.functional.jacobian(lambda v: flow.chain(v)[0].flatten(), x[i : i + 1]).reshape(32, 32)
        torch.testing.assert_close(contribution[i], torch.linalg.slogdet(matrix).logabsdet)
    torch.testing.assert_close(flow(x), StandardNormal().log_prob(z) + contribution)


# --- pieces of the latent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "shape", "shapes"),
    [
        ([FactorOut((4, 2, 3), [])], (4, 2, 3), [(2, 2, 3), (2, 2, 3)]),
        ([Squeeze(), FactorOut((4, 2, 4), [Squeeze()])], (1, 4, 8), [(2, 2, 4), (8, 1, 2)]),
        ([Rescale(2.0), nested_factor_out((2, 2, 4))], (2, 2, 4), [(1, 2, 4), (2, 1, 2), (2, 1, 2)]),
        ([FactorOut((4, 2, 3), [FactorOut((2, 2, 3), [])])], (4, 2, 3), [(2, 2, 3), (1, 2, 3), (1, 2, 3)]),
    ],
    ids=["one", "one and a squeeze", "two", "two of one size"],
)
@torch.no_grad()
def test_split_latent(layers, shape, shapes):
    """The pieces are images, finest first, and together they are the latent."""
    flow = Flow(layers, StandardNormal(), shape)
    z = flow.encode(torch.randn(3, *shape))
    pieces = split_latent(flow.chain, z)
    assert [tuple(piece.shape[1:]) for piece in pieces] == shapes
    assert torch.equal(torch.cat([piece.flatten(1) for piece in pieces], dim=1), z)


def test_split_latent_gives_each_piece_its_pixels():
    """Without a prior and inner layers, the finest piece is the second half of the channels, pixel by pixel."""
    x = labelled(4, 2, 3)
    flow = Flow([FactorOut((4, 2, 3), [FactorOut((2, 2, 3), [])])], StandardNormal(), (4, 2, 3))
    pieces = split_latent(flow.chain, flow.encode(x))
    for piece, expected in zip(pieces, (x[:, 2:], x[:, 1:2], x[:, :1]), strict=True):
        assert torch.equal(piece, expected)


@pytest.mark.parametrize("layers", [[], [Rescale(2.0)], [DiagonalScaling(4), DiagonalScaling(4)]])
def test_split_latent_without_a_factor_out_is_one_piece(layers):
    z = torch.randn(3, 4)
    (piece,) = split_latent(Chain(layers), z)
    assert torch.equal(piece.flatten(1), z)


@pytest.mark.parametrize("shape", [(3, 15), (3, 17), (3, 8), (3, 2, 2, 4)])
def test_split_latent_names_a_wrong_latent(shape):
    chain = Chain([nested_factor_out((2, 2, 4))])
    with pytest.raises(ValueError, match=f"^{re.escape(f'z: expected shape (B, 16), got {shape}')}$"):
        split_latent(chain, torch.zeros(shape))


# --- the papers' design: a list of what is finished -------------------------------------------------------------------


class Threaded:
    """A plain layer in the other design, in which it hands on the factored-out latents."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, finished: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        z, log_det = self.layer(x)
        return z, finished, log_det


class ThreadedFactorOut:
    """A factor-out in the other design: it appends one half to the factored-out latents, and contains no layer."""

    def __init__(self, prior: nn.Module | None) -> None:
        self.prior = prior

    def __call__(self, x: Tensor, finished: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        x1, x2 = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        if self.prior is None:
            return x1, [*finished, x2], torch.zeros(len(x))
        mean, log_scale = self.prior(x1).tensor_split(2, dim=1)
        return x1, [*finished, (x2 - mean) / log_scale.exp()], -log_scale.sum((1, 2, 3))


def threaded(layers: Chain) -> list[Threaded | ThreadedFactorOut]:
    """The same layers, one after the other, none inside another."""
    steps: list[Threaded | ThreadedFactorOut] = []
    for layer in layers:
        if isinstance(layer, FactorOut):
            steps += [ThreadedFactorOut(layer.prior), *threaded(layer.inner)]
        else:
            steps.append(Threaded(layer))
    return steps


@pytest.mark.parametrize("shape", [(1, 4, 8), (3, 8, 4)])
@pytest.mark.parametrize("prior", [False, True])
@torch.no_grad()
def test_nesting_is_the_same_as_a_list_of_what_is_finished(shape, prior):
    flow = multi_scale(shape, prior)
    steps = threaded(flow.chain)
    assert len(steps) == 16
    data = torch.randn(6, *shape, dtype=torch.float64)
    x, finished, total = data, [], torch.zeros(6)
    for step in steps:
        x, finished, log_det = step(x, finished)
        total = total + log_det
    pieces = [*finished, x]
    assert [len(piece[0].flatten()) for piece in pieces] == [math.prod(shape) // n for n in (2, 4, 4)]
    z = flow.encode(data)
    torch.testing.assert_close(z, torch.cat([piece.flatten(1) for piece in pieces], dim=1), rtol=0, atol=1e-6)
    for ours, theirs in zip(split_latent(flow.chain, z), pieces, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    log_prob = sum(StandardNormal().log_prob(piece.flatten(1)) for piece in pieces) + total
    torch.testing.assert_close(flow(data), log_prob, rtol=0, atol=1e-6)


# --- densities --------------------------------------------------------------------------------------------------------


def test_a_factor_out_in_the_plane_integrates_to_one_and_is_sampled_from():
    """Couplings before the factor-out and the prior bend two channels of one pixel; an inner layer rescales x1."""
    torch.manual_seed(0)
    layers = [*channel_couplings((2, 1, 1)), FactorOut((2, 1, 1), [Rescale(1.4)], learned_prior((2, 1, 1)))]
    flow = Flow(layers, StandardNormal(), (2, 1, 1))
    randomize(flow, 0.4)
    double = copy.deepcopy(flow).double()
    x = torch.randn(1_000, 2, 1, 1, dtype=torch.float64)
    assert (double.chain[2].prior(x[:, :1]).std(0) > 0.1).all()  # a prior that does something
    assert integral(lambda x: double(x.view(-1, 2, 1, 1)), 2, -15, 15, points=400) == pytest.approx(1, abs=1e-3)
    assert_samples_follow(flow.sample(20_000).flatten(1), lambda x: flow(x.float().view(-1, 2, 1, 1)).double(), -3, 3)


def tiny(levels: int = 2) -> Flow:
    """A flow with two scales on images of 2 x 2 bits, of which there are 16."""
    torch.manual_seed(0)
    factor_out = FactorOut((4, 1, 1), channel_couplings((2, 1, 1)), learned_prior((4, 1, 1)))
    layers = [UniformDequantize(levels), Rescale(1 / levels), Logit(), Squeeze(), *channel_couplings((4, 1, 1))]
    flow = Flow([*layers, PhaseOrder(4), factor_out], StandardNormal(), (1, 2, 2))
    randomize(flow, 0.15)
    return flow


@torch.no_grad()
def test_a_multi_scale_flow_against_exact_enumeration():
    """P(k) of all 16 images by integrals over cells agrees with samples, and the mean log with the bound."""
    flow = tiny()
    k = torch.tensor(list(itertools.product((0, 1), repeat=4))).view(16, 1, 2, 2)
    continuous = copy.deepcopy(flow[1:]).double()

    def integrated(points: int) -> tuple[Tensor, Tensor]:
        """The density and the log-density, averaged over each cell by Gauss's rule."""
        within, weights = gauss(points, 4)
        within = within.view(-1, 1, 2, 2)
        log_density = torch.stack([continuous(image + within) for image in k])
        return log_density.exp() @ weights, log_density @ weights

    probability, bound = integrated(10)
    torch.testing.assert_close(integrated(8), (probability, bound), rtol=1e-3, atol=0)  # enough nodes
    assert probability.max() > 3 * probability.min()
    assert 0.5 < probability.sum() < 1  # the rest of the mass is outside of the cube
    assert (bound < probability.log()).all()
    assert (probability.log() - bound).max() > 0.01

    # The inverse's outputs fall into the cells with these frequencies.
    n = 40_000
    x = continuous.decode(StandardNormal().sample(torch.empty(n, 4, dtype=torch.float64))).flatten(1)
    inside = x[((x >= 0) & (x < 2)).all(1)].floor().long()
    counts = torch.bincount(inside @ torch.tensor([8, 4, 2, 1]), minlength=16).double()
    for count, expected in [(len(inside), probability.sum()), *zip(counts, probability, strict=True)]:
        assert abs(count / n - expected) < 5 * (expected * (1 - expected) / n).sqrt()

    # The mean of many draws is the integrated mean log; D is 4.
    draws = flow(k.repeat(8_000, 1, 1, 1)).double().view(8_000, 16)
    error = draws.std(0) / math.sqrt(8_000)
    assert (error < 0.05).all()
    assert ((draws.mean(0) - bound).abs() < 5 * error).all()
    bits = flow.bits_per_dim(k, draws=500).double()
    assert ((bits + bound / (4 * math.log(2))).abs() < 5 * draws.std(0) / math.sqrt(500) / (4 * math.log(2))).all()
