"""Pictures of flows: density heat maps, warped grids, sheets of images and curves, each drawn into given axes."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.image import AxesImage
from torch import Tensor, nn

from nflows_lib.data import tile
from nflows_lib.flow import Flow

# Okabe and Ito's palette: colour-blind readers can tell its colours apart, on white and in print.
COLOURS = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
}


def style() -> None:
    """Set the look of the book's figures. A chapter calls it once, in its first cell."""
    plt.rcParams.update(
        {
            "axes.grid": True,
            "axes.prop_cycle": plt.cycler(color=list(COLOURS.values())),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": "medium",
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.w_pad": 0.1,
            "figure.dpi": 100,
            "figure.facecolor": "white",  # not transparent, so that labels stay readable on the dark theme
            "font.size": 11,
            "grid.alpha": 0.25,
            "image.cmap": "magma",
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "savefig.dpi": 100,
            "savefig.facecolor": "white",
        }
    )


def grid(extent: float, n: int) -> Tensor:
    """Return the points of an n x n grid from -extent to extent in both directions, ``(n * n, 2)``; x runs fastest."""
    line = torch.linspace(-extent, extent, n)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


@torch.no_grad()
def density(
    ax: Axes, log_prob: Callable[[Tensor], Tensor], *, extent: float = 4.0, points: Tensor | None = None, n: int = 200
) -> AxesImage:
    """Draw a heat map of a density over a square around the origin, with points on it if they are given.

    Args:
        ax: the axes to draw into.
        log_prob: log-density in nats: a function of points ``(B, 2)`` on the CPU. A flow, or a method of one, gets the
            points on its own device.
        extent: half the side of the square.
        points: points to draw on the heat map, ``(N, 2)``.
        n: number of pixels of the heat map per side.
    """
    owner = getattr(log_prob, "__self__", log_prob)  # the flow, if log_prob is a method of one
    device = next(owner.parameters()).device if isinstance(owner, nn.Module) else None
    values = log_prob(grid(extent, n).to(device)).exp().reshape(n, n).cpu().numpy()
    side = (-extent, extent)
    image = ax.imshow(values, origin="lower", extent=side + side, vmin=0, interpolation="bilinear")
    if points is not None:
        ax.scatter(*points.cpu().T, s=3, color="white", alpha=0.35, linewidths=0)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xlim=side, ylim=side)
    ax.grid(False)
    return image


@torch.no_grad()
def warp(axes: Sequence[Axes], flow: Flow, points: Tensor, *, extent: float = 3.5, lines: int = 15) -> None:
    """Draw a square grid and points on the data plane, as they are and after each layer of the flow.

    The points keep one colour throughout, from left to right in the data.

    Args:
        axes: one for the data, then one per layer.
        flow: a flow on the plane.
        points: ``(N, 2)``.
        extent: half the side of the grid.
        lines: number of lines of the grid in each direction.

    Raises:
        ValueError: if the number of axes is not the number of layers plus 1.
    """
    if len(axes) != len(flow.chain) + 1:
        raise ValueError(f"axes: expected {len(flow.chain) + 1}, one for the data and each layer, got {len(axes)}")
    mesh = mesh_lines(extent, lines, 200).to(points.device)
    hue = points[:, 0].cpu()
    titles = ["data $x$", *[f"after layer {i + 1}\n{type(layer).__name__}" for i, layer in enumerate(flow.chain)]]
    for i, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        if i > 0:
            layer = flow.chain[i - 1]
            points = layer(points)[0]
            mesh = layer(mesh.flatten(0, 1))[0].unflatten(0, mesh.shape[:2])
        ax.add_collection(LineCollection(mesh.cpu().numpy(), colors="0.55", linewidths=0.5, zorder=1))
        ax.scatter(*points.cpu().T, s=3, c=hue, cmap="coolwarm", linewidths=0, zorder=2)
        ax.set(title=title, aspect="equal")
        reach = 1.25 * max(points.abs().max().item(), 1.0)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
        ax.grid(False)


def mesh_lines(extent: float, lines: int, n: int) -> Tensor:
    """Return the lines of a grid, first the horizontal and then the vertical ones: ``(2 * lines, n, 2)``.

    Each line has n points, from -extent to extent.
    """
    smooth, ticks = torch.linspace(-extent, extent, n), torch.linspace(-extent, extent, lines)
    rows = torch.stack([torch.stack([smooth, torch.full_like(smooth, t)], -1) for t in ticks])
    return torch.cat([rows, rows.flip(-1)])


def images(ax: Axes, batch: Tensor, *, columns: int, levels: int, shape: Sequence[int], title: str = "") -> None:
    """Draw a sheet of images, arranged by :func:`nflows_lib.data.tile`."""
    sheet(ax, tile(batch, columns=columns, levels=levels, shape=shape), title)


def sheet(ax: Axes, picture: np.ndarray, title: str = "") -> None:
    """Draw one picture, ``(height, width, channels)`` with 1 or 3 channels in [0, 1], without axes."""
    ax.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=title)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def curves(ax: Axes, series: Mapping[str, Sequence[float]], *, ylabel: str) -> None:
    """Draw one line per named series, with one value per training step, and a legend."""
    for name, values in series.items():
        ax.plot(range(1, len(values) + 1), values, label=name)
    ax.set(xlabel="training step", ylabel=ylabel)
    ax.legend()
