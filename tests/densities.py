"""Checks of a density that several tests share: whether it integrates to 1, and whether samples follow it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.stats
import torch
from torch import Tensor

# Every statistical assertion rejects at five standard deviations, so a correct library almost never fails by chance.
FIVE_SIGMA = 5.7e-7

LogProb = Callable[[Tensor], Tensor]


def midpoints(low: float, high: float, points: int, dims: int) -> tuple[Tensor, float]:
    """The centres of the cells of a regular grid, (points**dims, dims), float64, and the volume of one cell."""
    width = (high - low) / points
    axis = low + width * (torch.arange(points, dtype=torch.float64) + 0.5)
    return torch.cartesian_prod(*[axis] * dims).reshape(-1, dims), width**dims


def gauss(points: int, dims: int) -> tuple[Tensor, Tensor]:
    """Gauss's rule on the unit cube: its nodes, (points**dims, dims), float64, and their weights, which sum to 1."""
    node, weight = (torch.from_numpy(values) / 2 for values in np.polynomial.legendre.leggauss(points))
    return torch.cartesian_prod(*[node + 0.5] * dims), torch.cartesian_prod(*[weight] * dims).prod(1)


@torch.no_grad()
def integral(log_prob: LogProb, dims: int, low: float = -30.0, high: float = 30.0, points: int = 600) -> float:
    """The integral of the density over [low, high]^dims by the midpoint rule."""
    grid, volume = midpoints(low, high, points, dims)
    return log_prob(grid).exp().sum().item() * volume


def assert_follows_cdf(values: Tensor, cdf: Callable) -> None:
    """Kolmogorov-Smirnov test of values, (N,), against a cumulative distribution function."""
    p_value = scipy.stats.kstest(values.numpy(), cdf).pvalue
    assert p_value > FIVE_SIGMA, f"the values do not follow the distribution: p = {p_value:.1e}"


@torch.no_grad()
def assert_samples_follow(samples: Tensor, log_prob: LogProb, low: float, high: float, cells: int = 8) -> None:
    """Chi-square test of the histogram of samples, (N, 2), against the density integrated over each cell."""
    fine = 20  # midpoints along a side of a cell
    grid, volume = midpoints(low, high, cells * fine, 2)
    expected = (log_prob(grid).exp() * volume).reshape(cells, fine, cells, fine).sum((1, 3)).flatten() * len(samples)
    index = ((samples.double() - low) / (high - low) * cells).floor().long()
    inside = ((index >= 0) & (index < cells)).all(1)
    index = index[inside]
    observed = torch.bincount(index[:, 0] * cells + index[:, 1], minlength=cells**2).double()
    well_filled = expected > 10
    assert well_filled.sum() >= 10, "too few cells hold samples for the test to say anything"
    # One last cell counts all other samples, inside of the square and outside.
    expected = torch.cat([expected[well_filled], len(samples) - expected[well_filled].sum().reshape(1)])
    observed = torch.cat([observed[well_filled], len(samples) - observed[well_filled].sum().reshape(1)])
    statistic = ((observed - expected).square() / expected.clamp(min=1.0)).sum().item()
    p_value = scipy.stats.chi2.sf(statistic, df=len(expected) - 1)
    assert p_value > FIVE_SIGMA, f"the samples do not follow the density: p = {p_value:.1e}"
