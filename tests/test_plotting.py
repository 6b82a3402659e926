"""The pictures hold what their docstrings say; how they look is judged by eye."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from nflows_lib import data, plotting
from nflows_lib.dequantization import Rescale
from nflows_lib.distributions import StandardNormal
from nflows_lib.flow import Flow


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_grid_runs_over_x_first():
    assert plotting.grid(1.0, 2).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]


def test_density_shows_the_density_where_it_is():
    """A normal around (1, -1): the brightest pixel is at low right and has the density's value there."""
    _, ax = plt.subplots()
    centre = torch.tensor([1.0, -1.0])
    image = plotting.density(ax, lambda x: StandardNormal().log_prob(x - centre), extent=2.0, n=41)
    values = image.get_array()
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert (column, row) == (30, 10)
    assert values.max() == pytest.approx(1 / (2 * math.pi))
    assert image.get_extent() == [-2, 2, -2, 2]
    assert image.origin == "lower"


def test_warp_moves_points_and_grid_by_each_layer():
    flow = Flow([Rescale(2.0), Rescale(3.0)], StandardNormal(), (2,))
    _, axes = plt.subplots(1, 3)
    plotting.warp(axes, flow, torch.ones(4, 2), extent=1.0, lines=3)
    for ax, scale in zip(axes, (1, 2, 6), strict=True):
        grid, points = ax.collections
        assert points.get_offsets().max() == pytest.approx(scale)
        assert max(segment.max() for segment in grid.get_segments()) == pytest.approx(scale)
        assert len(grid.get_segments()) == 6


def test_warp_wants_one_of_the_axes_for_the_data_and_each_layer():
    flow = Flow([Rescale(2.0)], StandardNormal(), (2,))
    _, axes = plt.subplots(1, 3)
    with pytest.raises(ValueError, match="axes: expected 2, one for the data and each layer, got 3"):
        plotting.warp(axes, flow, torch.ones(1, 2))


def test_tile_lays_images_row_by_row_on_white():
    batch = torch.tensor([[0, 4], [1, 3], [2, 2]])  # three images of one row and two columns, five levels
    sheet = data.tile(batch, columns=2, levels=5, shape=(1, 1, 2))
    expected = [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 0.25, 0.75, 1],
        [1, 1, 1, 1, 1, 1, 1],
        [1, 0.5, 0.5, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
    ]
    assert sheet.shape == (5, 7, 1)
    assert sheet[..., 0].tolist() == expected


def test_tile_keeps_colours():
    red = torch.tensor([255, 0, 0])[None]
    assert data.tile(red, columns=1, levels=256, shape=(3, 1, 1))[1, 1].tolist() == [1, 0, 0]


def test_curves_count_steps_from_one():
    _, ax = plt.subplots()
    plotting.curves(ax, {"loss": [3.0, 2.0]}, ylabel="nats")
    assert ax.lines[0].get_xydata().tolist() == [[1, 3], [2, 2]]
    assert ax.get_ylabel() == "nats"
