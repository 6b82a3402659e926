"""Chain, Flow and the models made of them: log p by hand and by integral, samples, latents, errors."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from bijections import ConvNet, randomize
from densities import assert_follows_cdf, assert_samples_follow, integral
from torch import Tensor, nn

from nflows_lib.bijection import Bijection, Chain, Layer
from nflows_lib.coupling import AdditiveCoupling, AffineCoupling, alternating_mask, channel_mask, checkerboard_mask
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import StandardLogistic, StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.models import glow, nice
from nflows_lib.multiscale import FactorOut, PhaseOrder, Squeeze
from nflows_lib.networks import MLP, GlowNet, ResNet
from nflows_lib.normalization import ActNorm, DiagonalScaling

BASES = [(StandardNormal(), scipy.stats.norm), (StandardLogistic(), scipy.stats.logistic)]
every_base = pytest.mark.parametrize(("base", "reference"), BASES, ids=["normal", "logistic"])


def small_nice(dims: int = 2, base=None, levels: int | None = None, scale: float = 0.5) -> Flow:
    """NICE with random parameters, in which every layer changes its input."""
    flow = nice(dims, levels=levels, couplings=3, hidden=8, depth=1, activation=nn.Tanh, base=base)
    randomize(flow, scale)
    return flow


def image_flow() -> Flow:
    """Two couplings of (2, 4, 4) images, each of which changes one colour of the chess board."""
    shape = (2, 4, 4)
    couplings = [AdditiveCoupling(checkerboard_mask(shape, parity), ConvNet(2, 2)) for parity in (0, 1)]
    flow = Flow(couplings, StandardNormal(), shape)
    randomize(flow)
    return flow


class FixedContribution(Layer):
    """A layer that returns x and contributes the next of these numbers per call: noise whose draws the test knows."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values, self.calls = values, 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return x, x.new_full((len(x),), self.values[(self.calls - 1) % len(self.values)])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z


class DropHalf(Layer):
    """A layer that returns only the first half of a vector, as a factor-out does for the layers inside it."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, : x.shape[1] // 2], x.new_zeros(len(x))

    def output_shape(self, shape):
        return (shape[0] // 2,)


class SetMean(Bijection):
    """A layer that subtracts the mean of the batch that initialises it, and keeps that batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.seen.append(x.clone())
        self.shift.copy_(-x.mean())  # fails unless gradients are off

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + self.shift, x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z - self.shift


# --- Chain ------------------------------------------------------------------------------------------------------------


def test_chain_adds_the_contributions():
    x = torch.randn(3, 2)
    z, contribution = Chain([FixedContribution(0.25), FixedContribution(-2.0), FixedContribution(8.0)])(x)
    assert torch.equal(z, x)
    assert torch.equal(contribution, torch.full((3,), 6.25))


def test_chain_of_several_layers_against_slogdet():
    torch.manual_seed(0)
    chain = Chain(
        [
            Rescale(0.3),
            AdditiveCoupling(alternating_mask(5, 0), MLP(3, 2, 8, 1)),
            DiagonalScaling(5),
            AdditiveCoupling(alternating_mask(5, 1), MLP(2, 3, 8, 1)),
            Rescale(-2.0),
        ]
    ).double()
    randomize(chain)
    x = torch.randn(4, 5, dtype=torch.float64)
    z, contribution = chain(x)
    for i in range(4):
        matrix = torch.autograd.functional.jacobian(lambda v: chain(v[None])[0][0], x[i])
        torch.testing.assert_close(contribution[i], torch.linalg.slogdet(matrix).logabsdet)
    torch.testing.assert_close(chain.inverse(z), x)


def test_chain_applies_the_layers_in_order():
    shift = SetMean()
    with torch.no_grad():
        shift.shift.fill_(1.0)
    chain = Chain([Rescale(2.0), shift])
    assert chain(torch.full((1, 1), 3.0))[0].item() == 7
    assert chain.inverse(torch.full((1, 1), 7.0)).item() == 3
    assert len(chain) == 2
    assert list(chain) == [chain[0], chain[1]] == list(chain.layers)


def test_chain_can_be_sliced_and_joined_like_a_list_and_shares_its_layers():
    chain = small_nice().chain
    assert list(chain[1:]) == list(chain)[1:]
    assert list(chain[:-1]) == list(chain)[:-1]
    assert isinstance(chain[1:3], Chain)
    layer = Rescale(2.0)
    for joined in ([layer] + chain[1:], Chain([layer]) + chain[1:]):  # noqa: RUF005
        assert isinstance(joined, Chain)
        assert list(joined) == [layer, *list(chain)[1:]]
    assert list(chain[:2] + (layer,)) == [*list(chain)[:2], layer]  # noqa: RUF005
    x = torch.randn(5, 2)
    whole, parts = chain(x), (chain[:2] + chain[2:])(x)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert len(chain) == 4  # is as long as before


def test_a_slice_of_a_flow_is_the_flow_of_those_layers():
    flow = small_nice(4, levels=5)
    continuous = flow[1:]
    assert (flow.levels, continuous.levels) == (5, None)
    k = torch.randint(5, (6, 4))
    torch.manual_seed(0)
    expected = flow.log_prob(k)
    torch.manual_seed(0)
    torch.testing.assert_close(continuous.log_prob(k + torch.rand(6, 4)), expected)
    assert {id(p) for p in continuous.parameters()} == {id(p) for p in flow.parameters()}
    assert flow.eval()[1:].training is False


def test_a_slice_of_a_flow_has_the_shape_that_reaches_it():
    flow = Flow([Rescale(2.0), Squeeze(), PhaseOrder(4)], StandardNormal(), (1, 4, 4))
    assert flow[2:].shape == (4, 2, 2)
    assert flow[:1].shape == flow[-3:].shape == (1, 4, 4)
    assert flow[2:].decode(torch.randn(3, 16)).shape == (3, 4, 2, 2)


@pytest.mark.parametrize("part", [0, slice(None, None, 2), slice(None, None, -1)])
def test_only_neighbouring_layers_make_a_flow(part):
    with pytest.raises(ValueError, match=r"part: expected a slice of consecutive layers, as in flow\[1:\], got"):
        small_nice()[part]


def test_chain_takes_layers_only():
    with pytest.raises(ValueError, match="layers: expected Layer objects, got Linear at position 1"):
        Chain([Rescale(2.0), nn.Linear(1, 1)])


def test_context_reaches_every_layer_in_both_directions():
    torch.manual_seed(0)
    layers = [AdditiveCoupling(alternating_mask(2, i), MLP(1, 1, 8, 1, nn.Tanh, context=1)) for i in (0, 1)]
    flow = Flow(layers, StandardNormal(), (2,)).double()
    randomize(flow)
    x, context = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    torch.testing.assert_close(flow.decode(flow.encode(x, context), context), x)
    assert not torch.allclose(flow.encode(x, context), flow.encode(x, context + 1))
    assert flow.sample(3, context=context).shape == (3, 2)
    for method in (flow, flow.log_prob, flow.bits_per_dim, flow.encode, flow.decode, flow.initialize):
        with pytest.raises(ValueError, match="context: expected shape"):
            method(x)
    with pytest.raises(ValueError, match="context: expected shape"):
        flow.sample(3)


# --- log p ------------------------------------------------------------------------------------------------------------


@every_base
def test_log_prob_by_hand(base, reference):
    """z = e^s x / 2 has the base density, so x has it with location 0 and scale 2 e^-s."""
    flow = Flow([Rescale(0.5), DiagonalScaling(3)], base, (3,)).double()
    log_scale = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    with torch.no_grad():
        flow.chain[1].log_scale.copy_(log_scale)
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.from_numpy(reference.logpdf(x, scale=2 * (-log_scale).exp())).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected)
    torch.testing.assert_close(flow(x), expected)


@every_base
def test_integrates_to_one_in_one_dimension(base, reference):
    torch.manual_seed(0)
    flow = Flow([Rescale(0.7), DiagonalScaling(1)], base, (1,)).double()
    randomize(flow)
    assert integral(flow, 1, -60, 60, points=5_000) == pytest.approx(1, abs=1e-6)


@every_base
def test_integrates_to_one_in_two_dimensions(base, reference):
    torch.manual_seed(0)
    assert integral(small_nice(base=base).double(), 2) == pytest.approx(1, abs=1e-4)


@every_base
def test_samples_follow_a_known_density(base, reference):
    """x = z / (1.5 e^s) has location 0 and a known scale; its standard deviation is within five standard errors."""
    torch.manual_seed(0)
    flow = Flow([Rescale(1.5), DiagonalScaling(2)], base, (2,))
    randomize(flow)
    n = 10_000
    x = flow.sample(n)
    scale = (-flow.chain[1].log_scale.detach()).exp() / 1.5
    kurtosis = reference.stats(moments="k") + 3
    for i in range(2):
        std = reference.std(scale=scale[i].item())
        assert abs(x[:, i].mean()) < 5 * std / math.sqrt(n)
        assert abs(x[:, i].var() / std**2 - 1) < 5 * math.sqrt((kurtosis - 1) / n)
        assert_follows_cdf(x[:, i], reference(scale=scale[i].item()).cdf)


@every_base
def test_samples_follow_log_prob(base, reference):
    torch.manual_seed(5)
    flow = small_nice(base=base, scale=0.8)
    assert_samples_follow(flow.sample(20_000), lambda x: flow(x.float()).double(), -6, 6)


def test_samples_of_discrete_data_are_levels():
    torch.manual_seed(0)
    x = small_nice(4, levels=17).sample(100)
    assert x.dtype == torch.long
    assert x.min() == 0
    assert x.max() == 16


# --- bits per dimension -----------------------------------------------------------------------------------------------


def test_bits_per_dim_of_noise():
    """A uniform density over n levels costs log2 n bits per dimension."""

    class Uniform:
        def log_prob(self, u: Tensor) -> Tensor:
            return u.new_zeros(len(u))

    flow = Flow([UniformDequantize(32), Rescale(1 / 32)], Uniform(), (3, 2, 2))
    assert flow.bits_per_dim(torch.randint(32, (5, 3, 2, 2))).tolist() == pytest.approx([5.0] * 5)


def test_bits_per_dim_by_hand():
    flow = Flow([Rescale(0.5)], StandardNormal(), (1, 2, 3))
    nats = 0.5 * 6 * math.log(2 * math.pi) + 6 * math.log(2)
    assert flow.bits_per_dim(torch.zeros(1, 1, 2, 3)).item() == pytest.approx(nats / (6 * math.log(2)))


def test_bits_per_dim_counts_the_dimensions_of_the_input():
    """It does not count the dimensions that are left at the end of the chain."""
    flow = Flow([DropHalf()], StandardNormal(), (8,))
    assert flow.bits_per_dim(torch.zeros(1, 8)).item() == pytest.approx(0.5 * 4 * math.log2(2 * math.pi) / 8)


def test_bits_per_dim_averages_the_logs_of_its_draws():
    layer = FixedContribution(0.0, -10.0, -50.0)
    flow = Flow([layer], StandardNormal(), (1,))
    at_zero = 0.5 * math.log2(2 * math.pi)
    assert flow.bits_per_dim(torch.zeros(2, 1), draws=3).tolist() == pytest.approx([at_zero + 20 / math.log(2)] * 2)
    assert layer.calls == 3
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        flow.bits_per_dim(torch.zeros(2, 1), draws=0)


# --- latents and samples ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encode_and_decode_images():
    torch.manual_seed(0)
    flow = image_flow().double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    z = flow.encode(x)
    assert z.shape == (3, 32)
    torch.testing.assert_close(flow.decode(z), x)
    torch.testing.assert_close(z, flow.chain(x)[0].flatten(1))
    with pytest.raises(ValueError, match=re.escape("z: expected shape (B, 32), got (3, 2, 4, 4)")):
        flow.decode(x)


@torch.no_grad()
def test_decode_returns_the_integers_that_were_encoded():
    torch.manual_seed(0)
    flow = small_nice(6, levels=16)
    k = torch.randint(16, (200, 6))
    assert torch.equal(flow.decode(flow.encode(k)), k)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
@torch.no_grad()
def test_temperature_multiplies_the_latent(temperature):
    torch.manual_seed(0)
    flow = small_nice(base=StandardLogistic())
    torch.manual_seed(1)
    x = flow.sample(7, temperature)
    torch.manual_seed(1)
    z = flow.base.sample(torch.empty(7, 2))
    assert torch.equal(x, flow.decode(temperature * z))


@torch.no_grad()
def test_temperature_zero_is_the_decoded_zero():
    torch.manual_seed(0)
    flow = image_flow()
    torch.testing.assert_close(flow.sample(3, temperature=0), flow.decode(torch.zeros(3, 32)))


def test_samples_have_the_precision_of_the_flow_and_no_graph():
    flow = small_nice().double()
    x = flow.sample(2)
    assert x.dtype == torch.float64
    assert not x.requires_grad
    assert Flow([Rescale(2.0)], StandardNormal(), (2,)).sample(2).shape == (2, 2)  # no parameters to learn it from


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n: expected at least 1, got 0"),
        ({"n": torch.tensor(3)}, r"n: expected a whole number, got tensor\(3\)"),
        ({"n": 1, "temperature": -0.5}, "temperature: expected a finite number >= 0, got -0.5"),
        ({"n": 1, "temperature": math.nan}, "temperature: expected a finite number >= 0, got nan"),
        ({"n": 1, "temperature": math.inf}, "temperature: expected a finite number >= 0, got inf"),
        ({"n": 1, "temperature": "hot"}, "temperature: expected a finite number >= 0, got hot"),
        ({"n": 1, "context": [[1.0]]}, "context: expected a tensor, got list"),
    ],
)
def test_sample_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_nice().sample(**arguments)


# --- initialisation and summary ---------------------------------------------------------------------------------------


def test_initialize_goes_layer_after_layer_on_transformed_data():
    first, second = SetMean(), SetMean()
    flow = Flow([Rescale(2.0), first, Rescale(3.0), second], StandardNormal(), (2,))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    flow.initialize(x)
    assert torch.equal(first.seen[0], 2 * x)
    assert torch.equal(second.seen[0], 3 * (2 * x - 5))  # behind the first, which is initialised by then
    assert [len(first.seen), len(second.seen)] == [1, 1]
    assert flow.encode(x).mean().item() == 0


def test_summary():
    flow = nice(4, levels=17, couplings=2, hidden=10, depth=1)
    assert flow.summary() == "\n".join(
        [
            "data                              (4,)",
            "UniformDequantize(levels=17)      (4,)                     0",
            "Rescale(0.05882)                  (4,)                     0",
            "AdditiveCoupling(changes 2 of 4)  (4,)                    52",
            "AdditiveCoupling(changes 2 of 4)  (4,)                    52",
            "DiagonalScaling()                 (4,)                     4",
            "StandardLogistic                  (4,)            108 in all",
        ]
    )


def test_summary_indents_what_stands_inside_a_factor_out():
    """The factor-out's own line counts the prior; the lines below begin with the half that goes on."""
    layers = [Rescale(2.0), Squeeze(), FactorOut((8, 2, 4), [Squeeze(), PhaseOrder(16)], ConvNet(4, 8)), Rescale(1.0)]
    flow = Flow(layers, StandardNormal(), (2, 4, 8))
    prior = (4 * 4 * 9 + 4) + (4 * 8 * 9 + 8)
    assert flow.summary() == "\n".join(
        [
            "data                          (2, 4, 8)",
            "Rescale(2)                    (2, 4, 8)                0",
            "Squeeze()                     (8, 2, 4)                0",
            f"FactorOut(finishes 32 of 64)  (64,)                  {prior}",
            "  Squeeze()                   (16, 1, 2)               0",
            "  PhaseOrder()                (16, 1, 2)               0",
            "Rescale(1)                    (64,)                    0",
            f"StandardNormal                (64,)           {prior} in all",
        ]
    )
    coupling = AffineCoupling(channel_mask((2, 1, 2), 0), ConvNet(2, 4))
    inner = FactorOut((4, 1, 2), [coupling], ConvNet(2, 4))
    flow = Flow([FactorOut((2, 2, 4), [Squeeze(), inner])], StandardNormal(), (2, 2, 4))
    network = (4 * 2 * 9 + 4) + (4 * 4 * 9 + 4)
    assert flow.summary() == "\n".join(
        [
            "data                                (2, 2, 4)",
            "FactorOut(finishes 8 of 16)         (16,)                    0",
            "  Squeeze()                         (4, 1, 2)                0",
            f"  FactorOut(finishes 4 of 8)        (8,)                   {network}",
            f"    AffineCoupling(changes 2 of 4)  (2, 1, 2)              {network + 1}",
            f"StandardNormal                      (16,)           {2 * network + 1} in all",
        ]
    )


# --- what a flow refuses ----------------------------------------------------------------------------------------------

CONTINUOUS = Flow([Rescale(2.0)], StandardNormal(), (2,))
DISCRETE = Flow([UniformDequantize(256), Rescale(1 / 256)], StandardNormal(), (2,))
BAD_DATA = {
    "vectors of another size": (CONTINUOUS, torch.zeros(3, 4), "x: expected shape (B, 2), got (3, 4)"),
    "a list": (CONTINUOUS, [[0.0, 1.0]], "x: expected a tensor, got list"),
    "an array": (CONTINUOUS, np.zeros((3, 2)), "x: expected a tensor, got ndarray"),
    "nothing": (CONTINUOUS, None, "x: expected shape (B, 2), got None"),
    "no batch": (CONTINUOUS, torch.zeros(2), "x: expected shape (B, 2), got (2,)"),
    "one number": (CONTINUOUS, torch.zeros(()), "x: expected shape (B, 2), got ()"),
    "images": (DISCRETE, torch.zeros(3, 1, 2, 1), "x: expected shape (B, 2), got (3, 1, 2, 1)"),
    "integers, not dequantized": (
        CONTINUOUS,
        torch.zeros(3, 2, dtype=torch.long),
        "x: expected floating-point numbers, got torch.int64; discrete data need UniformDequantize first",
    ),
    "NaN": (CONTINUOUS, torch.tensor([[0.0, math.nan]]), "x: expected finite values, got NaN or infinity"),
    "infinity": (CONTINUOUS, torch.tensor([[-math.inf, 0.0]]), "x: expected finite values, got NaN or infinity"),
    "floats as integers": (DISCRETE, torch.zeros(3, 2), "x: expected integers from 0 to 255, got torch.float32"),
    "truth values": (
        DISCRETE,
        torch.zeros(3, 2, dtype=torch.bool),
        "x: expected integers from 0 to 255, got torch.bool",
    ),
    "below the levels": (
        DISCRETE,
        torch.tensor([[3, -1]]),
        "x: expected integers from 0 to 255, got values from -1 to 3",
    ),
    "above the levels": (
        DISCRETE,
        torch.tensor([[0, 256]]),
        "x: expected integers from 0 to 255, got values from 0 to 256",
    ),
    "8-bit images for 17 levels": (
        Flow([UniformDequantize(17)], StandardNormal(), (2,)),
        torch.tensor([[17, 0]], dtype=torch.uint8),
        "x: expected integers from 0 to 16, got values from 0 to 17",
    ),
}


@pytest.mark.parametrize(("flow", "x", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data(flow, x, message):
    for method in (flow, flow.log_prob, flow.bits_per_dim, flow.encode, flow.initialize):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            method(x)


@pytest.mark.parametrize(
    ("flow", "x"), [(CONTINUOUS, torch.zeros(0, 2)), (DISCRETE, torch.zeros(0, 2, dtype=torch.uint8))]
)
def test_a_first_batch_of_nothing_is_refused(flow, x):
    with pytest.raises(ValueError, match=r"^x: expected at least one example, got none$"):
        flow.initialize(x)
    flow.initialize(x.new_zeros(1, 2))


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 4])
def test_a_context_has_one_row_for_each_example(conditional, rows):
    """This holds whether or not a layer reads the context; one row is not broadcast."""
    layers = [AdditiveCoupling(alternating_mask(2, 0), MLP(1, 1, 8, 1, context=5))] if conditional else [Rescale(2.0)]
    flow = Flow(layers, StandardNormal(), (2,))
    x, context = torch.zeros(3, 2), torch.zeros(rows, 5)
    message = f"^context: expected one row per example, 3 in all, got {rows}$"
    for method in (flow, flow.log_prob, flow.bits_per_dim, flow.encode, flow.decode, flow.initialize):
        with pytest.raises(ValueError, match=message):
            method(x, context)
    with pytest.raises(ValueError, match=message):
        flow.sample(3, context=context)
    with pytest.raises(ValueError, match=r"^x: expected shape"):  # the data come first
        flow(torch.zeros(3, 4), context)
    right = torch.zeros(3, 5)
    for method in (flow, flow.log_prob, flow.bits_per_dim, flow.encode, flow.decode):
        assert len(method(x, right)) == 3
    assert flow.initialize(x, right) is None
    assert flow.sample(3, context=right).shape == (3, 2)


@pytest.mark.parametrize(
    ("context", "got"),
    [
        ([[0.0]] * 3, "expected a tensor, got list"),
        (np.zeros((3, 5)), "expected a tensor, got ndarray"),
        (torch.zeros(3, 5, dtype=torch.long), "expected floating-point numbers, got torch.int64"),
        (torch.full((3, 5), torch.nan), "expected finite values, got NaN or infinity"),
        (torch.full((3, 5), torch.inf), "expected finite values, got NaN or infinity"),
    ],
)
def test_a_context_is_finite_floats(context, got):
    flow = Flow([DiagonalScaling(2)], StandardNormal(), (2,))
    x = torch.zeros(3, 2)
    calls = (flow, flow.log_prob, flow.encode, flow.decode, flow.initialize)
    for call in (*(lambda f=f: f(x, context) for f in calls), lambda: flow.sample(3, context=context)):
        with pytest.raises(ValueError, match=f"^context: {got}$"):
            call()


def test_a_context_that_is_one_number_has_no_rows():
    flow = Flow([Rescale(2.0)], StandardNormal(), (2,))
    x, context = torch.zeros(3, 2), torch.tensor(3.0)
    for method in (flow, flow.log_prob, flow.bits_per_dim, flow.encode, flow.decode, flow.initialize):
        with pytest.raises(ValueError, match=r"^context: expected one row per example, 3 in all, got a single number$"):
            method(x, context)
    with pytest.raises(ValueError, match=r"^context: expected one row per example, 1 in all, got a single number$"):
        flow.sample(1, context=context)


@pytest.mark.parametrize(
    ("flow", "x"),
    [
        (DISCRETE, torch.tensor([[0, 255]], dtype=torch.uint8)),  # 256 does not fit into uint8
        (DISCRETE, torch.tensor([[0, 255]])),
        (DISCRETE, torch.zeros(0, 2, dtype=torch.uint8)),
        (CONTINUOUS, torch.zeros(0, 2)),
    ],
    ids=["uint8", "int64", "no integers", "no floats"],
)
def test_good_data(flow, x):
    assert flow(x).shape == (len(x),)
    assert flow(x).isfinite().all()


@pytest.mark.parametrize("layer", [DiagonalScaling(3), AdditiveCoupling(alternating_mask(3, 0), nn.Identity())])
def test_flow_refuses_a_layer_that_does_not_fit(layer):
    with pytest.raises(ValueError, match=re.escape("(2,)")):
        Flow([layer], StandardNormal(), (2,))


# --- models and networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "position"),
    [
        (lambda: [UniformDequantize(4), UniformDequantize(4)], "1"),
        (lambda: [Rescale(0.5), UniformDequantize(4)], "1"),
        (lambda: [Rescale(0.5), Chain([Rescale(2.0), UniformDequantize(4)])], r"1\.layers\.1"),
        (lambda: [Chain([UniformDequantize(4), Rescale(0.5)])], r"0\.layers\.0"),
    ],
    ids=["two", "second", "inside a chain", "inside the first"],
)
def test_noise_belongs_at_the_first_position_alone(layers, position):
    message = f"layers: expected a noise layer only at position 0, got UniformDequantize at position {position}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        Flow(layers(), StandardNormal(), (2,))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nice(4, hidden=0), "hidden"),
        (lambda: nice(4, depth=0), "depth"),
        (lambda: MLP(0, 2, 8, 1), "inputs"),
        (lambda: MLP(2, 0, 8, 1), "outputs"),
        (lambda: ResNet(0, 2, 8, 1), "inputs"),
        (lambda: ResNet(1, 2, 0, 1), "hidden"),
        (lambda: GlowNet(2, 4, 0), "hidden"),
        (lambda: DiagonalScaling(0), "dims"),
        (lambda: ActNorm(0), "channels"),
    ],
)
def test_sizes_of_zero_are_named(make, name):
    with pytest.raises(ValueError, match=f"^{name}: expected at least 1, got 0$"):
        make()


@pytest.mark.parametrize("shape", [(0,), (1, 0, 4), 2, None, (2.0,), "2"])
def test_what_is_no_shape_of_an_example_is_named(shape):
    message = f"shape: expected sizes of at least 1, such as (2,) or (1, 28, 28), got {shape!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Flow([Rescale(2.0)], StandardNormal(), shape)


@pytest.mark.parametrize("kind", ["points", "images", "multi-scale"])
def test_vmap_and_jacrev_go_through_log_prob_and_encode(kind):
    """Per-example gradients and Jacobians by ``torch.func`` equal those of one example after the other."""
    torch.manual_seed(0)
    if kind == "points":
        flow = small_nice()
    elif kind == "images":
        flow = image_flow()
    else:
        flow = glow((1, 4, 4), levels=4, scales=2, steps=1, hidden=4)
        flow.initialize(torch.randint(4, (16, 1, 4, 4)))
        randomize(flow, 0.3)
        flow = flow[1:]
    flow, x = flow.double(), torch.rand(3, *flow.shape, dtype=torch.float64)

    def log_prob(one: Tensor) -> Tensor:
        return flow.log_prob(one[None])[0]

    def encode(one: Tensor) -> Tensor:
        return flow.encode(one[None])[0]

    torch.testing.assert_close(torch.func.vmap(log_prob)(x), flow.log_prob(x))
    torch.testing.assert_close(torch.func.vmap(encode)(x), flow.encode(x))
    jacobians = torch.func.vmap(torch.func.jacrev(encode))(x).reshape(3, flow.dims, flow.dims)
    expected = torch.stack([torch.autograd.functional.jacobian(encode, one) for one in x]).reshape_as(jacobians)
    torch.testing.assert_close(jacobians, expected)
    gradients = torch.func.vmap(torch.func.grad(log_prob))(x)
    x.requires_grad_()
    torch.testing.assert_close(gradients, torch.autograd.grad(flow.log_prob(x).sum(), x)[0])


def test_vmap_goes_through_the_log_prob_of_levels():
    flow = small_nice(4, levels=5)
    k = torch.randint(5, (6, 4))
    found = torch.func.vmap(lambda one: flow.log_prob(one[None])[0], randomness="different")(k)
    assert found.shape == (6,)
    assert found.isfinite().all()


def test_nice_is_the_list_of_the_paper():
    flow = nice(784, levels=256)
    names = [type(layer).__name__ for layer in flow.chain]
    assert names == ["UniformDequantize", "Rescale", *["AdditiveCoupling"] * 4, "DiagonalScaling"]
    assert (flow.chain[0].levels, flow.chain[1].scale) == (256, 1 / 256)
    for i in range(4):
        assert torch.equal(flow.chain[2 + i].mask, alternating_mask(784, i % 2))
    linear = [layer for layer in flow.chain[2].network.layers if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] == [392] + [1000] * 5
    assert [layer.out_features for layer in linear] == [1000] * 5 + [392]
    assert sum(isinstance(layer, nn.ReLU) for layer in flow.chain[2].network.layers) == 5
    assert isinstance(flow.base, StandardLogistic)
    assert [type(layer).__name__ for layer in nice(4, couplings=2, hidden=2).chain] == [*names[2:4], names[-1]]


def test_nice_starts_as_the_identity():
    torch.manual_seed(0)
    flow = nice(6, hidden=4, base=StandardNormal())
    x = torch.randn(3, 6)
    assert torch.equal(flow.encode(x), x)
    assert isinstance(flow.base, StandardNormal)


def test_nice_needs_two_couplings():
    with pytest.raises(ValueError, match=r"couplings: expected at least 2, .*got 1"):
        nice(4, couplings=1)


def test_mlp():
    torch.manual_seed(0)
    network = MLP(3, 5, hidden=4, depth=2, activation=nn.Tanh, context=2)
    x, context = torch.randn(6, 3), torch.randn(6, 2)
    assert torch.equal(network(x, context), torch.zeros(6, 5))  # its last layer starts at zero
    randomize(network)
    first, second, last = (layer for layer in network.layers if isinstance(layer, nn.Linear))
    expected = last(second(first(torch.cat([x, context], 1)).tanh()).tanh())
    torch.testing.assert_close(network(x, context), expected)
    with pytest.raises(ValueError, match=re.escape("context: expected shape (B, 2), got None")):
        network(x)
    with pytest.raises(ValueError, match=re.escape("context: expected shape (B, 2), got (6, 3)")):
        network(x, x)
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        MLP(3, 5, hidden=4, depth=0)


def test_an_act_norm_that_loads_a_state_of_before_its_first_batch_wants_one_again():
    flow = Flow([ActNorm(2)], StandardNormal(), (2,))
    fresh = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    x = torch.randn(16, 2)
    flow.initialize(x)
    assert flow.log_prob(x).isfinite().all()
    flow.load_state_dict(fresh)
    with pytest.raises(ValueError, match=r"ActNorm: expected one call of Flow\.initialize"):
        flow.log_prob(x)
    flow.initialize(x)
    assert flow.log_prob(x).isfinite().all()
