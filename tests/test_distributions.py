"""Tests of the base densities against scipy's, and of their integrals and samples."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from densities import assert_follows_cdf, integral

from nflows_lib.distributions import StandardLogistic, StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.normalization import DiagonalScaling

BASES = [(StandardNormal(), scipy.stats.norm), (StandardLogistic(), scipy.stats.logistic)]
every_base = pytest.mark.parametrize(("base", "reference"), BASES, ids=["normal", "logistic"])


@every_base
def test_log_prob_is_that_of_scipy(base, reference):
    z = torch.linspace(-300, 300, 1201, dtype=torch.float64)[:, None]  # far enough for exp to overflow in float32
    torch.testing.assert_close(base.log_prob(z), torch.from_numpy(reference.logpdf(z[:, 0])))
    in_float32 = base.log_prob(z.float())
    assert in_float32.dtype == torch.float32
    torch.testing.assert_close(in_float32.double(), base.log_prob(z), rtol=1e-5, atol=1e-5)


@every_base
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3, 4)])
def test_log_prob_sums_over_an_example(base, reference, shape):
    torch.manual_seed(0)
    z = torch.randn(3, *shape, dtype=torch.float64)
    expected = torch.from_numpy(reference.logpdf(z)).reshape(3, -1).sum(1)
    torch.testing.assert_close(base.log_prob(z), expected)


@pytest.mark.parametrize(
    ("base", "one_dimension"), [(StandardNormal(), -0.5 * math.log(2 * math.pi)), (StandardLogistic(), -math.log(4))]
)
def test_highest_density_is_at_zero(base, one_dimension):
    """D log 4 nats is the limit of the loss of a volume-preserving flow with a logistic prior."""
    assert base.log_prob(torch.zeros(1, 784)).item() == pytest.approx(784 * one_dimension, rel=1e-6)


@every_base
@pytest.mark.parametrize("dims", [1, 2])
def test_integrates_to_one(base, reference, dims):
    assert integral(base.log_prob, dims) == pytest.approx(1, abs=1e-6)


@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_follow_the_density(base, reference, dtype):
    torch.manual_seed(0)
    z = base.sample(torch.empty(5_000, 2, dtype=dtype))
    assert z.shape == (5_000, 2)
    assert z.dtype == dtype
    assert_follows_cdf(z.flatten(), reference.cdf)
    assert abs(torch.corrcoef(z.T)[0, 1]) < 5 / math.sqrt(5_000)  # the dimensions are drawn independently


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_logistic_samples_are_finite_at_both_ends_of_the_generator(monkeypatch, extreme):
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, extreme))
    z = StandardLogistic().sample(torch.empty(1, 2))
    assert z.abs() == pytest.approx(24 * math.log(2), rel=1e-5)


@every_base
def test_base_adds_no_parameter(base, reference):
    flow = Flow([DiagonalScaling(3)], base, (3,))
    assert [name for name, _ in flow.named_parameters()] == ["chain.layers.0.log_scale"]
