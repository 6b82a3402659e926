"""Tests of conditional Glow: its networks, each of its layers by hand, and the effect of the context on the model."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator

import pytest
import torch
from bijections import Fixed, randomize
from densities import gauss
from test_glow import NOT_YET, assert_same_state, levels_of, mean_and_std, nats_of, spread, stir
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib.bijection import Chain, Layer, Shape
from nflows_lib.conditional import Conditional1x1Conv, ConditionalActNorm, ConditionalNet, ConditioningNetwork
from nflows_lib.convolution import Invertible1x1Conv
from nflows_lib.coupling import BoundedGlowCoupling
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.models import cglow
from nflows_lib.multiscale import FactorOut, Squeeze
from nflows_lib.networks import BoundedPrior, GlowNet, ZeroConv
from nflows_lib.normalization import ActNorm

# --- from a context to numbers ----------------------------------------------------------------------------------------

# A context's shape, and the sizes to which its image is halved.
CONTEXTS: dict[Shape, list[tuple[int, int]]] = {
    (1,): [],
    (5,): [],
    (40,): [],
    (3, 4, 4): [],
    (2, 1, 16): [],
    (1, 5, 3): [],
    (1, 17, 1): [(9, 1)],
    (2, 5, 5): [(3, 3)],
    (2, 7, 33): [(4, 17), (2, 9), (1, 5)],
    (3, 64, 64): [(32, 32), (16, 16), (8, 8), (4, 4)],
}
every_context = pytest.mark.parametrize("context_shape", CONTEXTS, ids=lambda shape: "x".join(map(str, shape)))


def conditioning(context_shape: Shape, outputs: int = 7, hidden: int = 6, **options) -> ConditioningNetwork:
    """A conditioning network with random numbers also in its last layer."""
    torch.manual_seed(0)
    network = ConditioningNetwork(context_shape, outputs, hidden, **options)
    randomize(network.layers[-1])
    return network


@every_context
@torch.no_grad()
def test_a_conditioning_network_gives_a_vector_for_each_context(context_shape):
    network = conditioning(context_shape)
    for batch in (0, 1, 3):
        output = network(torch.randn(batch, *context_shape))
        assert output.shape == (batch, 7)
        assert output.dtype == torch.float32
    assert not torch.allclose(output[0], output[1])


@every_context
@torch.no_grad()
def test_a_conditioning_network_is_its_formula(context_shape):
    """3x3 convolutions with stride 2 until 16 pixels are left, then two linear layers, with ReLUs in between."""
    network = conditioning(context_shape).double()
    context = torch.randn(3, *context_shape, dtype=torch.float64)
    *inside, first, last = [layer for layer in network.layers if list(layer.parameters())]
    h = context
    for layer, size in zip(inside, CONTEXTS[context_shape], strict=True):
        h = F.conv2d(h, layer.weight, layer.bias, stride=2, padding=1).relu()
        assert h.shape == (3, 6, *size)
    h = F.linear(h.flatten(1), first.weight, first.bias).relu()
    assert h.shape == (3, 6)
    torch.testing.assert_close(network(context), F.linear(h, last.weight, last.bias))


@every_context
def test_only_the_last_layer_of_a_conditioning_network_starts_at_zero(context_shape):
    torch.manual_seed(0)
    network = ConditioningNetwork(context_shape, 7, 6)
    *others, weight, bias = network.parameters()
    assert weight.eq(0).all() and bias.eq(0).all()
    assert all(parameter.ne(0).any() for parameter in others)
    assert torch.equal(network(torch.randn(2, *context_shape)), torch.zeros(2, 7))


@pytest.mark.parametrize("context_shape", [(5,), (2, 5, 9)])
def test_a_conditioning_network_leaves_zero(context_shape):
    """The first step moves only the last layer; after it every parameter has a gradient."""
    torch.manual_seed(0)
    network = ConditioningNetwork(context_shape, 7, 16)
    context, target = torch.randn(8, *context_shape), torch.randn(8, 7)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        (network(context) - target).square().mean().backward()
        reached = [parameter.grad.abs().max() > 0 for parameter in network.parameters()]
        assert all(reached) if step else reached == [False] * (len(reached) - 2) + [True, True]
        optimizer.step()


@torch.no_grad()
def test_the_whole_image_counts():
    network = conditioning((2, 13, 20), hidden=32)
    context = torch.zeros(2 * 13 * 20 + 1, 2, 13, 20)
    context[1:] = 10 * torch.eye(2 * 13 * 20).view(-1, 2, 13, 20)
    output = network(context)
    assert ((output[1:] - output[0]).abs().amax(1) > 0).all()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context_shape", [(5,), (2, 9, 9)])
def test_networks_of_a_context_compute_in_their_precision(context_shape, precision):
    exact, rounded = (conditioning(context_shape, hidden=32, precision=p) for p in (torch.float32, precision))
    context = torch.randn(4, *context_shape)
    y, z = exact(context), rounded(context)
    assert z.dtype == torch.float32
    error = (z - y).norm() / y.norm()
    assert error == 0 if precision == torch.float32 else 1e-5 < error < 0.03


WRONG = [
    ((3,), None, "(B, 3), got None"),
    ((3,), (2, 4), "(B, 3), got (2, 4)"),
    ((3,), (2, 3, 1, 1), "(B, 3), got (2, 3, 1, 1)"),
    ((3, 8, 4), None, "(B, 3, 8, 4), got None"),
    ((3, 8, 4), (2, 3, 4, 8), "(B, 3, 8, 4), got (2, 3, 4, 8)"),
    ((3, 8, 4), (2, 1, 8, 4), "(B, 3, 8, 4), got (2, 1, 8, 4)"),
    ((3, 8, 4), (2, 3), "(B, 3, 8, 4), got (2, 3)"),
]


@pytest.mark.parametrize(("context_shape", "wrong", "message"), WRONG)
def test_a_context_of_another_shape_is_named(context_shape, wrong, message):
    context = None if wrong is None else torch.zeros(wrong)
    calls = [lambda: conditioning(context_shape)(context)]
    if len(context_shape) == 3:
        network = ConditionalNet(ZeroConv(2, 4, 5), context_shape, (4, 2), 5)
        x = torch.zeros(2, 2, 4, 2)
        calls += [lambda: network(x, context), lambda: network.initialize(x, context)]
    for call in calls:
        with pytest.raises(ValueError, match=f"^context: expected shape {re.escape(message)}$"):
            call()


@pytest.mark.parametrize("shape", [(), (3, 4), (0,), (3, 0, 4), (1, 1, 1, 1)])
def test_what_is_no_shape_of_a_context_is_named(shape):
    message = f"^{re.escape(f'context_shape: expected (K,) or (K, H, W), got {shape}')}$"
    for make in (
        lambda: ConditioningNetwork(shape, 2, 4),
        lambda: ConditionalNet(nn.Identity(), shape, (4, 4), 4),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_other_precisions_are_refused():
    message = "^precision: expected torch.float32 or torch.bfloat16, got torch.float16$"
    for make in (
        lambda: ConditioningNetwork((3,), 2, 4, torch.float16),
        lambda: ConditionalNet(nn.Identity(), (3, 4, 4), (4, 4), 4, torch.float16),
        lambda: cglow((1, 4, 4), (3,), scales=1, steps=1, precision=torch.float16),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# --- features of a context as additional input ------------------------------------------------------------------------


class Told(nn.Module):
    """A network that keeps its inputs and returns zeros."""

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.first = (x, context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.seen = (x, context)
        return torch.zeros_like(x).repeat(1, 2, 1, 1)


@pytest.mark.parametrize(
    ("full", "size"), [((4, 6), (4, 6)), ((4, 6), (2, 3)), ((12, 20), (3, 5)), ((8, 8), (1, 1)), ((7, 1), (7, 1))]
)
@torch.no_grad()
def test_a_network_sees_features_of_the_context_of_the_input_s_size(full, size):
    """3x3 convolutions with stride 2 go down to that size, one more keeps it; ReLUs follow each; x is unchanged."""
    torch.manual_seed(0)
    network = ConditionalNet(Told(), (3, *full), size, 5).double()
    x, context = torch.randn(2, 2, *size).double(), torch.randn(2, 3, *full).double()
    network(x, context)
    network.initialize(x, context)
    *halving, last = [layer for layer in network.features if list(layer.parameters())]
    h = context
    for layer in halving:
        h = F.conv2d(h, layer.weight, layer.bias, stride=2, padding=1).relu()
    h = F.conv2d(h, last.weight, last.bias, padding=1).relu()
    assert h.shape == (2, 5, *size)
    for seen, features in (network.network.seen, network.network.first):
        assert seen is x
        torch.testing.assert_close(features, h)


def test_features_are_computed_in_their_precision_and_are_given_in_single():
    features = []
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        network = ConditionalNet(Told(), (3, 8, 8), (4, 4), 16, precision)
        network(torch.randn(2, 2, 4, 4), torch.randn(2, 3, 8, 8))
        features.append(network.network.seen[1])
    exact, rounded = features
    assert rounded.dtype == torch.float32
    assert 1e-5 < (exact - rounded).norm() / exact.norm() < 0.03


@pytest.mark.parametrize(
    ("context_shape", "size"),
    [
        ((5,), (4, 4)),
        ((3, 6, 6), (4, 4)),
        ((3, 12, 12), (4, 4)),
        ((3, 8, 4), (4, 4)),
        ((3, 4, 8), (4, 4)),
        ((3, 9, 8), (4, 4)),
        ((3, 2, 2), (4, 4)),  # the context has half the size, and no convolution makes an image larger
        ((3, 1, 1), (4, 4)),
        ((3, 2, 4), (4, 8)),
    ],
)
def test_a_context_of_another_size_is_named(context_shape, size):
    message = f"context_shape: expected (K, H, W), with (H, W) = {size} times a power of 2, got"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{message} {context_shape}')}$"):
        ConditionalNet(nn.Identity(), context_shape, size, 5)


def test_the_log_scale_of_a_bounded_prior_is_a_gain_times_a_tanh():
    """The mean is the network's output; the network sees the context, and is initialised from the first batch."""
    torch.manual_seed(0)
    prior = BoundedPrior(ZeroConv(2, 4, 3))
    assert prior.gain.item() == 1
    randomize(prior)
    x, context = torch.randn(5, 2, 3, 4), torch.randn(5, 3)
    mean, raw = prior.network(x, context).chunk(2, 1)
    torch.testing.assert_close(prior(x, context), torch.cat([mean, prior.gain * raw.tanh()], 1))
    assert prior.gain != 1
    told = BoundedPrior(Told())
    told.initialize(x, context)
    assert told.network.first == (x, context)
    BoundedPrior(nn.Identity()).initialize(x, context)
    with torch.no_grad():
        prior.network.conv.weight.mul_(1e6)
    _, wild = prior(x, context).chunk(2, 1)
    assert wild.abs().max() <= prior.gain.abs()


# --- ActNorm and 1x1 convolution --------------------------------------------------------------------------------------

sizes = pytest.mark.parametrize("size", [(), (4, 2)], ids=["vectors", "images"])


@sizes
@torch.no_grad()
def test_conditional_act_norm_is_its_formula_for_each_example(size):
    """z = e^(s + tanh s(x)) y + b + b(x), log-det H W sum(s + tanh s(x)); here the network returns the context."""
    torch.manual_seed(0)
    layer = ConditionalActNorm(3, nn.Identity()).double()
    layer.initialize(spread((16, 3, *size)), torch.zeros(16, 6).double())
    y, context = torch.randn(5, 3, *size).double(), torch.randn(5, 6).double()
    z, contribution = layer(y, context)
    for i, c in itertools.product(range(5), range(3)):
        log_scale = layer.log_scale[c] + math.tanh(context[i, c])
        torch.testing.assert_close(z[i, c], log_scale.exp() * y[i, c] + layer.bias[c] + context[i, 3 + c])
    expected = math.prod(size) * (layer.log_scale.sum() + context[:, :3].tanh().sum(1))
    torch.testing.assert_close(contribution, expected)
    torch.testing.assert_close(layer.inverse(z, context), y)


@sizes
@torch.no_grad()
def test_the_first_batch_leaves_a_conditional_act_norm_standardised(size):
    """Contexts do not matter, since their part starts at 0; a loaded state is not initialised again."""
    x, context = spread((16, 3, *size)), torch.randn(16, 5).double()
    layer, other = (ConditionalActNorm(3, conditioning((5,), 6)).double() for _ in range(2))
    nn.init.zeros_(layer.network.layers[-1].weight)
    nn.init.zeros_(layer.network.layers[-1].bias)
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=NOT_YET):
            direction(x, context)
    layer.initialize(x, context)
    mean, std = mean_and_std(layer(x, context)[0])
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-12, atol=0)
    randomize(layer)
    assert "initialized" in layer.state_dict()
    other.load_state_dict(layer.state_dict())
    other.initialize(3 * x + 1, context)
    assert_same_state(other, layer.state_dict())
    assert torch.equal(other(x, context)[0], layer(x, context)[0])


@torch.no_grad()
def test_a_conditional_act_norm_stays_tame():
    """A network whose output explodes moves each log-scale by 1 and no more."""
    for sign in (-1, 1):
        layer = ConditionalActNorm(3, Fixed(*[sign * 1e30] * 3, *[0.25] * 3))
        layer.initialize(spread((16, 3), torch.float32))
        y = torch.randn(4, 3)
        z, contribution = layer(y, torch.zeros(4, 1))
        torch.testing.assert_close(contribution, (layer.log_scale.sum() + 3 * sign).expand(4))
        assert layer.inverse(z, torch.zeros(4, 1)).isfinite().all()


def conditional_conv(channels: int, seed: int = 0) -> Conditional1x1Conv:
    """A conditional convolution whose network returns the context."""
    torch.manual_seed(seed)
    layer = Conditional1x1Conv(channels, nn.Identity()).double()
    randomize(layer, 0.3)
    return layer


def matrices_of(layer: Conditional1x1Conv, context: Tensor) -> Tensor:
    """P L(x) (U(x) + diag(s(x))), built entry by entry, as (B, C, C)."""
    channels, matrices = layer.channels, []
    for raw in context:
        numbers = layer.factors + raw.view(channels, channels).tanh()
        lower, upper = torch.eye(channels).double(), torch.zeros(channels, channels).double()
        for i, j in itertools.product(range(channels), repeat=2):
            if i > j:
                lower[i, j] = numbers[i, j]
            else:
                upper[i, j] = numbers[i, j] if i < j else layer.sign[i] * numbers[i, i].exp()
        matrices.append(layer.permutation @ lower @ upper)
    return torch.stack(matrices)


@pytest.mark.parametrize("channels", [1, 2, 5])
@sizes
@torch.no_grad()
def test_conditional_conv_is_its_formula_for_each_example(channels, size):
    """Every pixel becomes W(x) y; det W has one sign for all contexts, and the log-det is H W log|det W(x)|."""
    layer = conditional_conv(channels)
    y, context = torch.randn(6, channels, *size).double(), torch.randn(6, channels**2).double()
    matrices = matrices_of(layer, context)
    sign, log_det = torch.linalg.slogdet(matrices)
    z, contribution = layer(y, context)
    torch.testing.assert_close(z, torch.einsum("bij,bj...->bi...", matrices, y))
    torch.testing.assert_close(contribution, math.prod(size) * log_det)
    torch.testing.assert_close(layer.inverse(z, context), y)
    assert len(sign.unique()) == 1
    if channels == 5:
        assert not torch.equal(layer.permutation, torch.eye(5))  # one that counts


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_no_context_makes_a_conditional_conv_singular(seed):
    """With outputs of +-1000 an entry moves by 1: det W(x) keeps its sign, its log is within C, W^-1 is finite."""
    layer = conditional_conv(6, seed)
    y, context = torch.randn(20, 6).double(), 1e3 * torch.randn(20, 36).double()
    context[0], context[1] = 1e3, -1e3
    z, contribution = layer(y, context)
    start = layer.factors.diagonal().sum()
    assert ((contribution - start).abs() <= 6 + 1e-9).all()
    torch.testing.assert_close(contribution[:2], start + torch.tensor([6.0, -6.0]).double())
    sign, _ = torch.linalg.slogdet(matrices_of(layer, context))
    assert len(sign.unique()) == 1
    back = layer.inverse(z, context)
    assert back.isfinite().all()
    torch.testing.assert_close(back, y, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_conditional_conv_starts_as_a_random_rotation():
    """It is the same for every context, and equals the unconditional layer from the same draws."""
    network = ConditioningNetwork((3,), 25, 4)
    torch.manual_seed(0)
    layer = Conditional1x1Conv(5, network)
    torch.manual_seed(0)
    other = Invertible1x1Conv(5)
    x = torch.randn(4, 5, 2, 3)
    for found, expected in zip(layer(x, torch.randn(4, 3)), other(x), strict=True):
        torch.testing.assert_close(found, expected)
    assert layer.lu


@pytest.mark.parametrize(
    ("make", "outputs"), [(ConditionalActNorm, 6), (Conditional1x1Conv, 9)], ids=["act_norm", "conv1x1"]
)
@torch.no_grad()
def test_a_network_of_another_size_is_named(make, outputs):
    """This includes a network whose output would broadcast."""
    for wrong in (1, 2, 3, outputs + 1):
        layer = make(3, Fixed(*[0.0] * wrong))
        layer.initialize(torch.randn(8, 3))
        expected = re.escape(f"network's output: expected shape (B, {outputs}), got (2, {wrong})")
        for direction in (layer, layer.inverse):
            with pytest.raises(ValueError, match=f"^{expected}$"):
                direction(torch.zeros(2, 3), torch.zeros(2, 1))


# --- the model --------------------------------------------------------------------------------------------------------

# Shape of y and of its context, and how many scales.
MODELS: dict[str, tuple[Shape, Shape, int]] = {
    "vector": ((1, 8, 4), (3,), 2),
    "image": ((1, 8, 4), (2, 8, 4), 2),
    "larger": ((1, 4, 8), (3, 8, 16), 1),
    "smaller": ((1, 8, 8), (3, 4, 4), 3),
}
every_model = pytest.mark.parametrize("name", MODELS)
STEPS, HIDDEN, CONDITIONING = 2, 8, 9


def contexts_of(name: str, n: int) -> Tensor:
    return torch.rand(n, *MODELS[name][1], generator=torch.Generator().manual_seed(1))


def fresh(name: str, levels: int = 32, **options) -> Flow:
    """A small conditional Glow that is initialised on every level and not changed otherwise."""
    torch.manual_seed(0)
    shape, context_shape, scales = MODELS[name]
    options = {"steps": STEPS, "hidden": HIDDEN, "conditioning": CONDITIONING, **options}
    flow = cglow(shape, context_shape, levels=levels, scales=scales, **options)
    flow.initialize(levels_of(shape, levels), contexts_of(name, levels))
    return flow


def small(name: str, scale: float = 0.1, **options) -> Flow:
    """The same flow with parameters moved by random numbers, in evaluation mode."""
    flow = fresh(name, **options)
    stir(flow, scale)
    return flow.eval()


def places_of(flow: Flow) -> dict[str, nn.Module]:
    """The networks of the layers and priors that depend on the context, by the layer's name."""
    found = {}
    for label, module in flow.named_modules():
        if isinstance(module, ConditionalActNorm | Conditional1x1Conv | BoundedGlowCoupling):
            found[label] = module.network
        if isinstance(module, FactorOut):
            found[label] = module.prior
    return found


def last_layer(network: nn.Module) -> nn.Module:
    """The network's layer that starts at zero."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if isinstance(network, ConditionalNet | BoundedPrior):  # whose features come last in the list
        last = [
            layer
            for made in network.modules()
            if isinstance(made, GlowNet | ZeroConv)
            for layer in made.modules()
            if isinstance(layer, nn.Conv2d)
        ]
    return last[-1]


@every_model
def test_cglow_is_its_list_of_layers(name):
    """The order is Glow's; each layer and prior has a network of its own, with features of the given width."""
    shape, context_shape, scales = MODELS[name]
    flow = fresh(name, precision=torch.bfloat16)
    layers = list(flow.chain)
    assert [type(layer) for layer in layers[:2]] == [UniformDequantize, Rescale]
    assert (flow.levels, layers[0].levels, layers[1].scale) == (32, 32, 1 / 32)
    is_image = len(context_shape) == 3
    width = CONDITIONING if is_image else context_shape[0]
    layers, here = layers[2:], shape
    for left in range(scales - 1, -1, -1):
        channels, *size = (4 * here[0], here[1] // 2, here[2] // 2)
        steps = [ConditionalActNorm, Conditional1x1Conv, BoundedGlowCoupling] * STEPS
        assert [type(layer) for layer in layers] == [Squeeze, *steps, *([FactorOut] if left else [])]
        for i in range(STEPS):
            norm, mix, coupling = layers[1 + 3 * i : 4 + 3 * i]
            assert norm.channels == mix.channels == coupling.channels == channels
            for made, outputs in ((norm.network, 2 * channels), (mix.network, channels**2)):
                assert isinstance(made, ConditioningNetwork)
                assert (made.context_shape, made.precision) == (context_shape, torch.bfloat16)
                assert made.layers[-1].weight.shape == (outputs, CONDITIONING)
            inner = coupling.network
            if is_image:
                assert isinstance(inner, ConditionalNet)
                assert (inner.context_shape, inner.precision) == (context_shape, torch.bfloat16)
                inner = inner.network
            assert isinstance(inner, GlowNet)
            assert (inner.context, inner.precision) == (width, torch.bfloat16)
            assert [len(p) for p in inner.parameters() if p.dim() == 4] == [HIDDEN, HIDDEN, channels]
        if left:
            assert layers[-1].shape == (channels, *size)
            prior = layers[-1].prior
            assert isinstance(prior, BoundedPrior)
            inner = prior.network.network if is_image else prior.network
            assert isinstance(inner, ZeroConv)
            assert inner.context == width
            layers, here = list(layers[-1].inner), (channels // 2, *size)
    assert isinstance(flow.base, StandardNormal)
    networks = places_of(flow).values()
    assert len({id(network) for network in networks}) == len(networks) == 3 * STEPS * scales + scales - 1


def test_cglow_has_the_defaults_of_the_released_code():
    flow = cglow((1, 8, 8), (1,))
    assert flow.levels == 256
    networks = [module for module in flow.modules() if isinstance(module, GlowNet)]
    assert len(networks) == 3 * 8
    assert {len(p) for network in networks for p in network.layers[0].parameters()} == {256}
    assert networks[0].precision == torch.float32
    assert {m.layers[-1].in_features for m in flow.modules() if isinstance(m, ConditioningNetwork)} == {64}


def parameters_of_cglow(
    shape: Shape, context_shape: Shape, scales: int, steps: int, hidden: int, conditioning: int
) -> int:
    """The number of parameters, counted by hand: the shared ones, and a conditioning network or features per layer."""
    channels_x, *full = context_shape
    pixels, halvings = list(full), 0
    while math.prod(pixels) > 16:
        pixels, halvings = [math.ceil(side / 2) for side in pixels], halvings + 1

    def convs(number: int) -> int:
        """The parameters of so many 3x3 convolutions with biases, from the context on."""
        widths = [channels_x, *[conditioning] * number]
        return sum(9 * a * b + b for a, b in itertools.pairwise(widths))

    def generator(outputs: int) -> int:
        flat = (conditioning if halvings else channels_x) * math.prod(pixels)
        return convs(halvings) + (flat + 1) * conditioning + (conditioning + 1) * outputs

    total, channels, height = 0, shape[0], shape[1]
    for left in range(scales - 1, -1, -1):
        channels, height = 4 * channels, height // 2
        half = channels // 2
        features = convs(1 + int(math.log2(full[0] // height))) if full else 0
        seen = half + (conditioning if full else channels_x)
        network = 9 * seen * hidden + hidden**2 + 4 * hidden + 9 * hidden * channels + channels
        step = 2 * channels + generator(2 * channels) + channels**2 + generator(channels**2)
        total += steps * (step + network + features + 1)
        if left:
            total += 9 * seen * channels + channels + features + 1
            channels = half
    return total


@every_model
def test_cglow_s_parameters_are_those_counted_by_hand(name):
    flow = fresh(name)
    counted = parameters_of_cglow(*MODELS[name], STEPS, HIDDEN, CONDITIONING)
    assert sum(parameter.numel() for parameter in flow.parameters()) == counted


@every_model
@torch.no_grad()
def test_cglow_starts_without_a_word_from_the_context(name):
    flow, k = fresh(name), levels_of(MODELS[name][0], 32)[:6]
    nats = nats_of(flow, k, contexts_of(name, 6))
    assert torch.equal(nats_of(flow, k, contexts_of(name, 6).flip(0)), nats)
    assert nats.isfinite().all()


@every_model
@torch.no_grad()
def test_each_place_by_itself_makes_the_likelihood_depend_on_the_context(name):
    """Places are ActNorm, 1x1 convolution, coupling and prior, at every step and scale; each image has its context."""
    flow, k, context = fresh(name).double(), levels_of(MODELS[name][0], 32)[:4], contexts_of(name, 4).double()
    other = context.clone()
    other[1] = 1 - context[1]
    places = places_of(flow)
    assert len(places) == 3 * STEPS * MODELS[name][2] + MODELS[name][2] - 1
    for label, network in places.items():
        last = last_layer(network)
        assert last.weight.eq(0).all(), label
        torch.manual_seed(0)
        randomize(last)
        changed = (nats_of(flow, k, other) - nats_of(flow, k, context)).abs() > 1e-9
        assert changed.tolist() == [False, True, False, False], label
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


@every_model
def test_cglow_against_autograd(name):
    """The log-determinant of the whole flow after the noise, and its inverse, with one context per example."""
    flow, shape = small(name).double(), MODELS[name][0]
    continuous = flow[1:]
    y, context = 32 * torch.rand(3, *shape, dtype=torch.float64), contexts_of(name, 3).double()
    z, contribution = continuous.chain(y, context)
    dims = math.prod(shape)
    for i in range(3):
        matrix = torch.autograd.functional.jacobian(
            lambda v, i=i: continuous.chain(v, context[i : i + 1])[0].flatten(), y[i : i + 1]
        )
        log_det = torch.linalg.slogdet(matrix.reshape(dims, dims)).logabsdet
        torch.testing.assert_close(contribution[i], log_det, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(continuous(y, context), StandardNormal().log_prob(z.flatten(1)) + contribution)
    torch.testing.assert_close(continuous.decode(continuous.encode(y, context), context), y, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(continuous.decode(z.flatten(1), context.flip(0)), y, atol=0.1)


def with_inputs(layers: Chain, y: Tensor, context: Tensor) -> Iterator[tuple[Layer, Tensor]]:
    """Every layer, except the last one of a scale that is not the coarsest, with its input."""
    for layer in layers:
        if isinstance(layer, FactorOut):
            yield from with_inputs(layer.inner, y.chunk(2, dim=1)[0], context)
        else:
            yield layer, y
            y, _ = layer(y, context)


@every_model
def test_cglow_with_networks_in_bfloat16_is_as_consistent(name):
    """The layers use the networks' outputs in single precision, so log-determinants and inverses stay exact."""
    flow, exact, shape = small(name, precision=torch.bfloat16), small(name), MODELS[name][0]
    flow, exact = (made[1:] for made in (flow, exact))
    y, context = 32 * torch.rand(3, *shape), contexts_of(name, 3)
    z, contribution = flow.chain(y, context)
    assert z.dtype == contribution.dtype == torch.float32
    assert (flow.decode(z.flatten(1), context) - y).abs().max() < 0.5
    for layer, x in with_inputs(flow.chain, y, context):
        back = layer.inverse(layer(x, context)[0], context)
        torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-4)
        matrix = torch.autograd.functional.jacobian(lambda v, f=layer: f(v, context[:1])[0].flatten(), x[:1].detach())
        log_det = torch.linalg.slogdet(matrix.view(x[0].numel(), -1).double()).logabsdet
        torch.testing.assert_close(layer(x, context)[1][0].double(), log_det, rtol=1e-5, atol=1e-4)
    assert not torch.equal(exact(y, context), flow(y, context))
    torch.testing.assert_close(flow(y, context), exact(y, context), rtol=0.05, atol=1.0)


@every_model
@torch.no_grad()
def test_encode_and_decode_every_level(monkeypatch, name):
    """The noise avoids the edges of a level, which float32 may round into the next level."""
    rand_like = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda like: 0.01 + 0.98 * rand_like(like))
    flow, k, context = small(name), levels_of(MODELS[name][0], 32), contexts_of(name, 32)
    assert torch.equal(flow.decode(flow.encode(k, context), context), k.long())


@every_model
@torch.no_grad()
def test_one_example_does_not_depend_on_the_contexts_of_others(name):
    flow, k, context = small(name).double(), levels_of(MODELS[name][0], 32)[:4], contexts_of(name, 4).double()
    continuous = flow[1:]
    y = k.double() + 0.5
    alone = torch.cat([continuous(y[i : i + 1], context[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(continuous(y, context), alone)
    z = torch.randn(4, flow.dims).double()
    alone = torch.cat([continuous.decode(z[i : i + 1], context[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(continuous.decode(z, context), alone)


@pytest.mark.parametrize("context_shape", [(2,), (1, 2, 2)], ids=["vector", "image"])
@torch.no_grad()
def test_cglow_against_exact_enumeration(context_shape):
    """P(k

    x) of all 16 images of 2 x 2 bits sums to nearly 1 for either context, and samples follow it.
    """
    torch.manual_seed(0)
    flow = cglow((1, 2, 2), context_shape, levels=2, scales=1, steps=1, hidden=4, conditioning=4).double()
    continuous = flow[1:]
    both = torch.eye(2).double() if len(context_shape) == 1 else torch.rand(2, *context_shape).double()
    continuous.initialize(1 + 0.2 * torch.randn(1_000, 1, 2, 2).double(), both.repeat_interleave(500, 0))
    stir(flow, 0.15)
    k = torch.tensor(list(itertools.product((0, 1), repeat=4))).view(16, 1, 2, 2)
    within, weights = gauss(8, 4)
    within = within.view(-1, 1, 2, 2)
    n, found = 20_000, []
    for context in both:
        rows = context.expand(n, *context_shape)
        density = torch.stack([continuous(image + within, rows[: len(within)]).exp() for image in k])
        probability = density @ weights
        assert 0.95 < probability.sum() < 1 + 1e-3
        found.append(probability)
        y = flow.sample(n, context=rows).flatten(1)
        counts = torch.bincount(y @ torch.tensor([8, 4, 2, 1]), minlength=16).double()
        # Samples outside of the cube are clamped into it.
        error = 5 * (probability * (1 - probability) / n).sqrt() + (1 - probability.sum()).clamp(min=0)
        assert ((counts / n - probability).abs() < error).all()
    assert (found[0] - found[1]).abs().max() > 0.01


@every_model
@torch.no_grad()
def test_a_context_is_asked_for_and_has_its_shape(name):
    flow, k, shape = small(name), levels_of(MODELS[name][0], 32)[:5], MODELS[name][1]
    calls = [lambda c, call=call: call(k, c) for call in (flow, flow.encode, flow.bits_per_dim)]
    calls += [lambda c: fresh(name).initialize(k, c), lambda c: flow.sample(5, context=c)]
    expected = re.escape(f"expected shape ({', '.join(['B', *map(str, shape)])}")
    for call in calls:
        for context in (None, torch.zeros(5, shape[0] + 1, *shape[1:])):
            with pytest.raises(ValueError, match=f"^context: {expected}.*, got "):
                call(context)
        with pytest.raises(ValueError, match=r"^context: expected one row per example, 5 in all, got 1$"):
            call(torch.zeros(1, *shape))


@every_model
@torch.no_grad()
def test_samples_have_one_context_each(name):
    """At temperature 0 each context has one image, and another context has another image."""
    flow = small(name)
    context = contexts_of(name, 3)[torch.arange(7) % 3]
    x = flow.sample(7, context=context)
    assert x.shape == (7, *MODELS[name][0])
    assert x.dtype == torch.long
    assert 0 <= x.min() <= x.max() <= 31
    assert nats_of(flow, x, context).isfinite().all()
    x = flow.sample(7, temperature=0.0, context=context)
    for i, j in itertools.combinations(range(7), 2):
        assert torch.equal(x[i], x[j]) == (i % 3 == j % 3)


@every_model
def test_every_network_of_a_context_learns(name):
    """The first step moves only what starts at zero in each network; after it every parameter has a gradient."""
    flow, k, context = fresh(name, hidden=16, conditioning=16), levels_of(MODELS[name][0], 32), contexts_of(name, 32)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    for step in range(4):
        optimizer.zero_grad()
        flow.bits_per_dim(k, context).mean().backward()
        if step == 0:
            for label, network in places_of(flow).items():
                last = set(last_layer(network).parameters())
                for parameter in network.parameters():
                    assert (parameter.grad.abs().max() > 0) == (parameter in last), label
        optimizer.step()
    for label, parameter in flow.named_parameters():
        assert parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0, label


@every_model
def test_a_copy_of_cglow_has_the_same_likelihood(name):
    flow, k, context = small(name), levels_of(MODELS[name][0], 32)[:8], contexts_of(name, 8)
    nats = nats_of(flow, k, context)
    assert torch.equal(nats_of(copy.deepcopy(flow), k, context), nats)
    other = cglow(
        *MODELS[name][:2], levels=32, scales=MODELS[name][2], steps=STEPS, hidden=HIDDEN, conditioning=CONDITIONING
    )
    other.load_state_dict(flow.state_dict())
    other.initialize(k // 2, context)  # of no effect
    assert torch.equal(nats_of(other, k, context), nats)
    assert sum(isinstance(module, ActNorm) for module in other.modules()) == STEPS * MODELS[name][2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": 0}, "scales: expected at least 1, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
        ({"conditioning": 0}, "conditioning: expected at least 1, got 0"),
        ({"shape": (1, 6, 4)}, "shape: expected (C, H, W) with even height and width, got (2, 3, 2)"),
        ({"context_shape": (3, 6, 6)}, "context_shape: expected (K, H, W), with (H, W) = (4, 4) times a power of 2"),
        ({"context_shape": (3, 2, 2)}, "context_shape: expected (K, H, W), with (H, W) = (4, 4) times a power of 2"),
        ({"context_shape": (3, 8, 4)}, "context_shape: expected (K, H, W), with (H, W) = (4, 4) times a power of 2"),
        ({"context_shape": ()}, "context_shape: expected (K,) or (K, H, W), got ()"),
    ],
)
def test_what_cglow_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        cglow(**{"shape": (1, 8, 8), "context_shape": (3,), "scales": 2, "steps": 1, "hidden": 2, **options})
