"""Tests of the noise itself, and of noise layers against exact enumeration of all discrete data."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import scipy.stats
import torch
from bijections import mlp, randomize
from densities import assert_follows_cdf, midpoints
from torch import Tensor, nn

from nflows_lib.bijection import Bijection, sum_per_example
from nflows_lib.coupling import AffineCoupling, GlowCoupling, alternating_mask, checkerboard_mask
from nflows_lib.dequantization import Logit, Rescale, UniformDequantize, VariationalDequantize
from nflows_lib.distributions import StandardLogistic, StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.models import nice
from nflows_lib.networks import MLP, GlowNet, ResNet
from nflows_lib.normalization import ActNorm

# --- the noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_in_floats_of_the_same_level_out(dtype):
    torch.manual_seed(0)
    k = torch.arange(256, dtype=dtype).repeat(3, 1)
    y, contribution = UniformDequantize(256)(k)
    assert y.dtype == torch.float32
    assert (y >= k).all()
    assert (y < k.long() + 1).all()
    assert torch.equal(contribution, torch.zeros(3))


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24], ids=["lowest", "highest"])
def test_extreme_noise_stays_on_its_level(monkeypatch, noise):
    """In float32, 255 + (1 - 2^-24) would round up to 256, which is the next level."""
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, noise))
    layer = UniformDequantize(256)
    k = torch.arange(256)[None]
    y, _ = layer(k)
    assert torch.equal(y.floor(), k.float())
    assert torch.equal(layer.inverse(y), k)
    assert (y.frac() > 0.9).all() == (noise > 0)  # the generator was replaced


def test_noise_is_uniform():
    """The mean is 1/2 and the variance 1/12 within five standard errors, and the distribution is uniform."""
    torch.manual_seed(0)
    n = 20_000
    y, _ = UniformDequantize(4)(torch.full((n // 10, 10), 3))
    noise = (y - 3).double().flatten()
    assert abs(noise.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(noise.var() - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / n)
    assert_follows_cdf(noise, scipy.stats.uniform.cdf)


def test_noise_is_fresh_for_every_value_example_and_call():
    torch.manual_seed(0)
    layer = UniformDequantize(2)
    k = torch.zeros(50, 1, 5, 5, dtype=torch.long)
    noise = torch.stack([layer(k)[0], layer(k)[0]])
    # Among 2,500 draws of 2^24 numbers, a fifth of an equal pair is expected.
    assert noise.unique().numel() >= noise.numel() - 5


def test_noise_repeats_with_the_seed():
    k = torch.zeros(3, 4, dtype=torch.long)
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(UniformDequantize(2)(k)[0])
    assert torch.equal(*draws)


def test_inverse_floors_and_clamps():
    z = torch.tensor([[-300.0, -0.001, 0.0, 0.999, 1.0, 15.5, 16.0, 16.999, 17.0, 1e9]])
    k = UniformDequantize(17).inverse(z)
    assert k.dtype == torch.long
    assert k.tolist() == [[0, 0, 0, 0, 1, 15, 16, 16, 16, 16]]


every_noise = pytest.mark.parametrize("make", [UniformDequantize, lambda levels: VariationalDequantize([], levels)])


@every_noise
def test_nan_becomes_level_0_with_a_warning(make):
    """NaN changes nothing else, and the warning says how many there were."""
    z = torch.tensor([[math.nan, 1.5, math.inf], [16.2, math.nan, -math.inf]])
    with pytest.warns(UserWarning, match=r"^2 of 6 values are NaN and become level 0$") as caught:
        k = make(17).inverse(z)
    assert len(caught) == 1
    assert k.dtype == torch.long
    assert k.tolist() == [[0, 1, 16], [16, 0, 0]]


@every_noise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_infinity_goes_to_the_ends_without_a_warning(make, dtype):
    largest = torch.finfo(dtype).max
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        k = make(256).inverse(torch.tensor([[-math.inf, -largest, largest, math.inf]], dtype=dtype))
        assert make(256).inverse(torch.zeros(0, 3, dtype=dtype)).shape == (0, 3)
    assert k.tolist() == [[0, 0, 255, 255]]


def test_a_latent_that_is_nan_is_decoded_with_a_warning():
    flow = Flow([UniformDequantize(4), Rescale(1 / 4)], StandardNormal(), (2,))
    with pytest.warns(UserWarning, match=r"^1 of 4 values are NaN"):
        assert flow.decode(torch.tensor([[0.3, 0.9], [math.nan, 0.5]])).tolist() == [[1, 3], [0, 2]]


@pytest.mark.parametrize("levels", [-1, 0, 1])
def test_levels_below_two_are_refused(levels):
    with pytest.raises(ValueError, match=f"levels: expected at least 2, got {levels}"):
        UniformDequantize(levels)


def test_no_example_is_no_error():
    z, contribution = Rescale(0.5)(UniformDequantize(4)(torch.zeros(0, 3, dtype=torch.long))[0])
    assert z.shape == (0, 3)
    assert contribution.shape == (0,)


# --- levels through the logit -----------------------------------------------------------------------------------------


every_level = pytest.mark.parametrize(
    ("levels", "alpha"), [(levels, alpha) for levels in (2, 17, 256) for alpha in (1e-6, 0.05, 0.4)]
)


def through_the_logit(levels: int, alpha: float) -> tuple[Flow, Tensor]:
    """A flow on single values, and all values of the data."""
    flow = Flow([UniformDequantize(levels), Rescale(1 / levels), Logit(alpha)], StandardNormal(), (1,))
    return flow, torch.arange(levels)[:, None]


@every_level
@pytest.mark.parametrize("noise", [1e-3, 0.5, 1 - 1e-3], ids=["low", "middle", "high"])
@torch.no_grad()
def test_every_level_goes_through_the_logit_and_back(monkeypatch, levels, alpha, noise):
    flow, k = through_the_logit(levels, alpha)
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, noise))
    z = flow.encode(k)
    assert torch.equal(flow.decode(z), k)
    torch.testing.assert_close(z, torch.logit(alpha + (1 - 2 * alpha) * (k + noise) / levels), rtol=1e-3, atol=1e-3)
    assert flow.decode(torch.tensor([[-1e4], [1e4]])).flatten().tolist() == [0, levels - 1]  # beyond the levels


@every_level
@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24], ids=["lowest", "highest"])
@torch.no_grad()
def test_extreme_noise_is_finite_behind_the_logit(monkeypatch, levels, alpha, noise):
    """At the edge of a level the inverse may round into the next level and no further, as float32 allows."""
    flow, k = through_the_logit(levels, alpha)
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, noise))
    assert flow(k).isfinite().all()
    assert (flow.decode(flow.encode(k)) - k).abs().max() <= 1


# --- exact enumeration ------------------------------------------------------------------------------------------------


def every_value(levels: int, dims: int) -> Tensor:
    """All values of discrete data, (levels^dims, dims)."""
    return torch.tensor(list(itertools.product(range(levels), repeat=dims)))


class Staircase:
    """A density on the unit cube that is constant, P(cell) n^D, on each of its n^D cells."""

    def __init__(self, probabilities: Tensor, levels: int) -> None:
        self.probabilities, self.levels = probabilities, levels

    def log_prob(self, u: Tensor) -> Tensor:
        inside = ((u >= 0) & (u < 1)).all(1)
        index = (u * self.levels).floor().long().clamp(0, self.levels - 1)
        height = self.probabilities[tuple(index.T)] * self.levels ** u.shape[1]
        return torch.where(inside, height.log(), -torch.inf)


@pytest.mark.parametrize(("levels", "dims"), [(2, 1), (4, 1), (2, 3), (8, 2)])
def test_a_density_constant_on_every_cell_gives_the_probabilities_exactly(levels, dims):
    """The bound is an equality for every draw of the noise: log p(k) = log P(k), and the P(k) sum to 1."""
    torch.manual_seed(0)
    probabilities = torch.rand(levels**dims).add(0.1)
    probabilities = (probabilities / probabilities.sum()).reshape([levels] * dims)
    flow = Flow([UniformDequantize(levels), Rescale(1 / levels)], Staircase(probabilities, levels), (dims,))
    for _ in range(10):
        log_prob = flow(every_value(levels, dims))
        torch.testing.assert_close(log_prob, probabilities.flatten().log(), rtol=1e-5, atol=1e-5)
        assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)


class Slope:
    """The density prod 2 u_i on the unit cube, whose integrals are known."""

    def log_prob(self, u: Tensor) -> Tensor:
        return sum_per_example((2 * u).log())


@pytest.mark.parametrize(("levels", "dims"), [(2, 1), (5, 2), (3, 3)])
def test_the_bound_on_a_slope(levels, dims):
    """E log p = sum_i [log(2/n) + integral of log(k_i + eps)] - D log n, which is below log P(k)."""
    torch.manual_seed(0)
    k = every_value(levels, dims)
    flow = Flow([UniformDequantize(levels), Rescale(1 / levels)], Slope(), (dims,))
    a, b = k.double(), k.double() + 1
    log_probability = ((b**2 - a**2) / levels**2).log().sum(1)
    assert log_probability.exp().sum().item() == pytest.approx(1)
    bound = (math.log(2 / levels) + b * b.log() - torch.xlogy(a, a) - 1).sum(1) - dims * math.log(levels)
    assert (bound < log_probability).all()
    assert_mean(torch.stack([flow(k) for _ in range(4_000)]), bound)


def test_the_bound_of_a_real_flow():
    """The density of NICE with random parameters is integrated over each of 3 x 3 cells."""
    torch.manual_seed(0)
    levels, dims = 3, 2
    flow = nice(dims, levels=levels, hidden=16, depth=1, activation=nn.Tanh, base=StandardLogistic())
    randomize(flow, 0.8)
    continuous = flow[2:]
    k = every_value(levels, dims)
    within, _ = midpoints(0, 1, 100, dims)
    u = (k[:, None, :] + within) / levels
    with torch.no_grad():
        log_density = continuous(u.flatten(0, 1).float()).double().reshape(len(k), -1)
        log_probability = log_density.exp().mean(1).log() - dims * math.log(levels)
        bound = log_density.mean(1) - dims * math.log(levels)
        draws = flow(k.repeat(4_000, 1)).reshape(4_000, len(k))
    assert log_probability.exp().sum() < 1  # some of the mass lies outside the unit cube
    assert (bound < log_probability).all()
    assert (log_probability - bound).max() > 0.01  # the bound lies below log P(k)
    assert_mean(draws, bound)


def assert_mean(draws: Tensor, expected: Tensor) -> None:
    """Assert that the mean over the first dimension is the expected one within five standard errors."""
    draws = draws.double()
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    assert (error < 0.05).all()  # sharp enough to notice a missing log n


# --- variational dequantization ---------------------------------------------------------------------------------------


@pytest.fixture
def in_float64():
    """A fixture that makes float64 the default type, which noise and new networks then have."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def noise_layers(dims: int = 2, scale: float = 0.0) -> list[Bijection]:
    """Two affine couplings that see k, with random parameters unless the scale is 0."""
    couplings = [
        AffineCoupling(alternating_mask(dims, i), mlp((dims,), 1, context=dims, outputs=2, parity=i)) for i in (0, 1)
    ]
    for coupling in couplings:
        randomize(coupling, scale)
    return couplings


def fix_noise(monkeypatch, v: Tensor) -> None:
    monkeypatch.setattr(StandardLogistic, "sample", lambda self, like: v)


class Shift(Bijection):
    """Noise in one dimension: v is scaled by a and shifted by the context."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.context = context
        return self.scale * x + context, x.new_full((len(x),), x[0].numel() * math.log(self.scale))


@torch.no_grad()
def test_untrained_variational_noise_is_uniform():
    torch.manual_seed(0)
    k = torch.randint(4, (5_000, 2))
    y, contribution = VariationalDequantize(noise_layers(), 4)(k)
    torch.testing.assert_close(contribution, torch.zeros(5_000), rtol=0, atol=1e-5)
    noise = (y - k).double()
    assert_follows_cdf(noise.flatten(), scipy.stats.uniform.cdf)
    assert abs(torch.corrcoef(noise.T)[0, 1]) < 5 / math.sqrt(5_000)


def test_variational_noise_in_one_dimension_by_hand():
    """eps = sigmoid(a v + c) of a logistic v: P(eps < e) = F((logit e - c) / a), and log q is the log of its slope."""
    torch.manual_seed(0)
    layer = Shift(0.6)
    k = torch.tensor([0, 1, 2, 4]).repeat(2_000)[:, None]
    y, contribution = VariationalDequantize([layer], 5)(k)
    assert torch.equal(layer.context, k / 2 - 1)  # 0 to 4 brought to [-1, 1]
    noise = (y - k).double()
    w = (noise.logit() - layer.context) / 0.6
    assert_follows_cdf(w.flatten(), scipy.stats.logistic.cdf)
    density = w.sigmoid() * (1 - w.sigmoid()) / 0.6 / (noise * (1 - noise))
    torch.testing.assert_close(contribution.double(), -density.log().sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("k", [[0, 0], [3, 1]])
def test_log_q_is_the_density_of_the_noise(monkeypatch, in_float64, k):
    """log q agrees with autograd's Jacobian of eps with respect to v, and q integrates to 1 over the cell."""
    torch.manual_seed(0)
    layer = VariationalDequantize(noise_layers(scale=0.4), 4)
    k = torch.tensor([k])
    v = StandardLogistic().sample(torch.empty(1, 2))

    def eps(v: Tensor) -> Tensor:
        fix_noise(monkeypatch, v)
        return layer(k)[0] - k

    matrix = torch.autograd.functional.jacobian(eps, v).reshape(2, 2)
    contribution = layer(k)[1].item()
    log_base = scipy.stats.logistic.logpdf(v).sum()
    assert contribution == pytest.approx(torch.linalg.slogdet(matrix).logabsdet.item() - log_base)
    assert abs(contribution) > 0.01

    # Over a grid of w = logit(eps), which is dense where eps is near 0 and 1: d eps = eps (1 - eps) dw.
    w, volume = midpoints(-60, 60, 400, 2)
    many = k.expand(len(w), 2)
    with torch.no_grad():
        fix_noise(monkeypatch, layer.noise.inverse(w, 2 * many / 3 - 1))
        y, contribution = layer(many)
    near = w.abs().amax(1) < 20
    torch.testing.assert_close((y - many)[near], w[near].sigmoid())
    log_measure = (nn.functional.logsigmoid(w) + nn.functional.logsigmoid(-w)).sum(1)
    assert (log_measure - contribution).exp().sum().item() * volume == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("levels", [3, 4])
@torch.no_grad()
def test_variational_noise_against_exact_enumeration(monkeypatch, in_float64, levels):
    """E p(k + eps) / q(eps

    k) = P(k), the density integrated over the cell; E log of it is below log P(k).
    """
    torch.manual_seed(0)
    dims = 2
    couplings = [AffineCoupling(alternating_mask(dims, i), mlp((dims,), 1, outputs=2, parity=i)) for i in (0, 1)]
    noise = VariationalDequantize(noise_layers(scale=0.3), levels)
    flow = Flow([noise, Rescale(1 / levels), Logit(), *couplings], StandardNormal(), (dims,))
    for coupling in couplings:
        randomize(coupling, 0.15)
    assert flow.levels == levels
    k = every_value(levels, dims)
    continuous = flow[1:]
    within, volume = midpoints(0, 1, 100, dims)
    density = continuous((k[:, None, :] + within).flatten(0, 1)).exp().reshape(len(k), -1)
    probability = density.sum(1) * volume
    assert 0.5 < probability.sum() < 1  # the rest lies beyond the unit square

    # The mean over the noise by a sum over v, each weighted by its own logistic density.
    v, volume = midpoints(-40, 40, 300, dims)
    weight = torch.from_numpy(scipy.stats.logistic.pdf(v)).prod(1) * volume
    with monkeypatch.context() as patch:
        fix_noise(patch, v.repeat(len(k), 1))
        log_prob = flow(k.repeat_interleave(len(v), 0)).reshape(len(k), -1)
    torch.testing.assert_close(log_prob.exp() @ weight, probability, rtol=1e-3, atol=0)
    bound = log_prob @ weight
    assert (bound < probability.log()).all()
    assert (probability.log() - bound).max() > 0.01
    assert_mean(flow(k.repeat(8_000, 1)).reshape(8_000, len(k)), bound)


def test_the_variational_bound_is_tight_where_q_is_the_posterior(in_float64):
    """With a logistic base on v = logit(eps) and the same noise, every draw of log p(k) is log P(k)."""

    class WithinLevel(Bijection):
        """A layer from k + eps to logit(eps): the density of the data is that of eps, the same in every cell."""

        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            eps = x.frac()
            return (eps.logit() + 1) / 0.6, -(0.6 * eps * (1 - eps)).log().sum(1)

    torch.manual_seed(0)
    flow = Flow([VariationalDequantize([Shift(0.6)], 3), WithinLevel()], StandardLogistic(), (2,))
    log_prob = flow(torch.zeros(100, 2, dtype=torch.long))  # 2 k / 2 - 1 = -1 is the shift of the noise
    torch.testing.assert_close(log_prob, torch.zeros(100), rtol=0, atol=1e-8)


def test_inverse_of_the_variational_layer_floors_and_clamps():
    layer = VariationalDequantize(noise_layers(), 17)
    z = torch.tensor([[-300.0, -0.001, 0.0, 0.999, 1.0, 15.5, 16.0, 16.999, 17.0, 1e9]])
    k = layer.inverse(z)
    assert k.dtype == torch.long
    assert k.tolist() == [[0, 0, 0, 0, 1, 15, 16, 16, 16, 16]]
    with pytest.raises(ValueError, match="levels: expected at least 2, got 1"):
        VariationalDequantize([], 1)
    with pytest.raises(ValueError, match="layers: expected Layer objects, got Linear at position 0"):
        VariationalDequantize([nn.Linear(1, 1)], 2)


@pytest.mark.parametrize("extreme", [-1e4, -17.0, 17.0, 1e4])
@torch.no_grad()
def test_extreme_variational_noise_stays_on_its_level(monkeypatch, extreme):
    layer = VariationalDequantize([Shift(2.0)], 256)
    fix_noise(monkeypatch, torch.full((1, 256), extreme))
    k = torch.arange(256)[None]
    y, contribution = layer(k)
    assert contribution.isfinite().all()
    assert torch.equal(y.floor(), k.float())
    assert torch.equal(layer.inverse(y), k)


@pytest.mark.parametrize("shape", [(1, 3, 5), (3, 4, 2)])
def test_variational_noise_of_images(shape):
    """A residual network sees the image, with checkerboards and bytes; gradients reach every parameter."""
    torch.manual_seed(0)
    channels = shape[0]
    layers = [
        AffineCoupling(checkerboard_mask(shape, i), ResNet(channels, 2 * channels, 6, 1, context=channels))
        for i in (0, 1)
    ]
    dequantize = VariationalDequantize(layers)
    randomize(dequantize, 0.3)
    flow = Flow([dequantize, Rescale(1 / 256), Logit()], StandardNormal(), shape)
    assert flow.levels == 256
    k = torch.randint(256, (6, *shape), dtype=torch.uint8)
    y, contribution = dequantize(k)
    assert y.dtype == contribution.dtype == torch.float32
    assert contribution.shape == (6,)
    assert torch.equal(dequantize.inverse(y), k.long())
    assert torch.equal(flow.decode(flow.encode(k)), k.long())

    # The same draws give another image other noise, since the network sees k.
    torch.manual_seed(1)
    there = dequantize(k)[0] - k.float()
    torch.manual_seed(1)
    elsewhere = dequantize(255 - k)[0] - (255 - k).float()
    assert (there - elsewhere).abs().max() > 0.01

    flow.bits_per_dim(k).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


class KeepsFirst(Shift):
    """A layer that keeps the batch that initialises it."""

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.first = (x.clone(), context)


@pytest.mark.parametrize("levels", [2, 17, 256])
@torch.no_grad()
def test_the_layers_of_the_noise_are_initialised_from_logistic_noise_and_k(levels):
    """Each is initialised from the output of those before it, also on bytes, and without the flow's own context."""
    torch.manual_seed(0)
    layers = [KeepsFirst(0.6), KeepsFirst(2.0)]
    flow = Flow([VariationalDequantize(layers, levels), Rescale(1 / levels)], StandardNormal(), (4,))
    k = torch.randint(levels, (2_000, 4), dtype=torch.uint8)
    flow.initialize(k, torch.zeros(2_000, 7))
    (v, context), (behind, context_behind) = (layer.first for layer in layers)
    assert_follows_cdf(v.double().flatten(), scipy.stats.logistic.cdf)
    torch.testing.assert_close(context, k / ((levels - 1) / 2) - 1, rtol=0, atol=1e-6)
    assert torch.equal(context, context_behind)
    assert torch.equal(behind, layers[0](v, context)[0])


@torch.no_grad()
def test_flow_initialises_an_act_norm_and_a_glow_net_inside_the_noise():
    """Otherwise the first call would ask for an initialisation that no call can give."""
    torch.manual_seed(0)
    norm, network = ActNorm(2), GlowNet(1, 2, hidden=6, context=2)
    noise = VariationalDequantize([norm, GlowCoupling(2, network)], 16)
    flow = Flow([noise, Rescale(1 / 16), ActNorm(2)], StandardNormal(), (2, 3, 4))
    k = torch.randint(16, (500, 2, 3, 4))
    with pytest.raises(ValueError, match=r"^ActNorm: expected one call of Flow\.initialize"):
        flow(k)
    flow.initialize(k)
    flags = [value for name, value in flow.state_dict().items() if name.endswith("initialized")]
    assert torch.stack(flags).tolist() == [True] * 4
    fresh = StandardLogistic().sample(torch.empty(500, 2, 3, 4))
    z = norm(fresh)[0]
    std = z.transpose(0, 1).flatten(1).std(1)
    assert (std - 1).abs().max() < 0.05  # another draw: 5 standard errors of 6,000
    assert (norm.log_scale.exp() - math.sqrt(3) / math.pi).abs().max() < 0.05
    h = network.layers[0](torch.cat([z[:, :1], 2 * k.float() / 15 - 1], 1)).transpose(0, 1).flatten(1)
    assert h.mean(1).abs().max() < 0.15
    assert (h.std(1) - 1).abs().max() < 0.15
    assert flow(k).isfinite().all()


@pytest.mark.parametrize("make", [list, lambda: [ActNorm(2)], lambda: [GlowCoupling(2, MLP(1, 2, 4, 1, context=2))]])
def test_initialising_the_noise_leaves_the_random_state_alone(make):
    """This holds whether there is something to initialise or not."""
    dequantize = VariationalDequantize(make(), 16)
    k = torch.randint(16, (50, 2))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    dequantize.initialize(k)
    assert torch.equal(torch.get_rng_state(), state)


def test_initialising_the_noise_draws_from_the_seed():
    k, scales = torch.randint(16, (50, 2)), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        norm = ActNorm(2)
        VariationalDequantize([norm], 16).initialize(k)
        scales.append(norm.log_scale.detach())
    assert torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[0], scales[2])


@torch.no_grad()
def test_a_flow_refuses_a_first_batch_of_nothing_before_its_noise():
    flow = Flow([VariationalDequantize([ActNorm(2)], 4)], StandardNormal(), (2,))
    with pytest.raises(ValueError, match=r"^x: expected at least one example, got none$"):
        flow.initialize(torch.zeros(0, 2, dtype=torch.long))
    assert not flow.chain[0].noise[0].initialized


def test_no_example_is_no_variational_error():
    z, contribution = VariationalDequantize(noise_layers(), 4)(torch.zeros(0, 2, dtype=torch.long))
    assert z.shape == (0, 2)
    assert contribution.shape == (0,)
