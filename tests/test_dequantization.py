"""The noise itself, and noise layers against exact enumeration of all discrete data."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch
from bijections import randomize
from densities import assert_follows_cdf, midpoints
from torch import Tensor, nn

from nflows_lib.bijection import sum_per_example
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import StandardLogistic
from nflows_lib.flow import Flow
from nflows_lib.models import nice

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
    assert (y.frac() > 0.9).all() == (noise > 0)  # the generator was indeed replaced


def test_noise_is_uniform():
    """Mean 1/2 and variance 1/12 within five standard errors, and the whole distribution."""
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
    # Of 2,500 draws among 2^24 numbers, a fifth of one pair is expected to be equal.
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


@pytest.mark.parametrize("levels", [-1, 0, 1])
def test_levels_below_two_are_refused(levels):
    with pytest.raises(ValueError, match=f"levels: expected at least 2, got {levels}"):
        UniformDequantize(levels)


def test_no_example_is_no_error():
    z, contribution = Rescale(0.5)(UniformDequantize(4)(torch.zeros(0, 3, dtype=torch.long))[0])
    assert z.shape == (0, 3)
    assert contribution.shape == (0,)


# --- exact enumeration ------------------------------------------------------------------------------------------------


def every_value(levels: int, dims: int) -> Tensor:
    """All discrete data there are, (levels^dims, dims)."""
    return torch.tensor(list(itertools.product(range(levels), repeat=dims)))


class Staircase:
    """A density on the unit cube, constant on each of its n^D cells: probability(cell) n^D."""

    def __init__(self, probabilities: Tensor, levels: int) -> None:
        self.probabilities, self.levels = probabilities, levels

    def log_prob(self, u: Tensor) -> Tensor:
        inside = ((u >= 0) & (u < 1)).all(1)
        index = (u * self.levels).floor().long().clamp(0, self.levels - 1)
        height = self.probabilities[tuple(index.T)] * self.levels ** u.shape[1]
        return torch.where(inside, height.log(), -torch.inf)


@pytest.mark.parametrize(("levels", "dims"), [(2, 1), (4, 1), (2, 3), (8, 2)])
def test_a_density_constant_on_every_cell_gives_the_probabilities_exactly(levels, dims):
    """Then the bound is an equality, for every draw of the noise: log p(k) = log P(k), and the P(k) sum to 1."""
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
    """E log p = sum_i [log(2/n) + integral of log(k_i + eps)] - D log n, below log P(k)."""
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
    """NICE with random parameters on 3 x 3 values: the density of its continuous part, integrated over each cell."""
    torch.manual_seed(0)
    levels, dims = 3, 2
    flow = nice(dims, levels=levels, hidden=16, depth=1, activation=nn.Tanh, base=StandardLogistic())
    randomize(flow, 0.8)
    continuous = Flow(list(flow.chain)[2:], flow.base, (dims,))
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
    assert (log_probability - bound).max() > 0.01  # and the bound is a bound, not the value
    assert_mean(draws, bound)


def assert_mean(draws: Tensor, expected: Tensor) -> None:
    """The mean over the first dimension is the expected one within five standard errors."""
    draws = draws.double()
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    assert (error < 0.05).all()  # sharp enough to notice a missing log n
