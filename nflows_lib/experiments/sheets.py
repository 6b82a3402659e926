"""Sheets of pictures: a run's samples, the stages of its training, and the frames of a flow's layers."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nflows_lib import settings
from nflows_lib.data import tile
from nflows_lib.distributions import random_state_kept
from nflows_lib.experiments.archive import PICTURES
from nflows_lib.flow import Flow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = "stages.png"


def save_samples(
    flow: Flow,
    shape: tuple[int, int, int],
    path: Path,
    n: int = 60,
    temperature: float = 1.0,
    contexts: Tensor | None = None,
) -> None:
    """Draw n samples, ten in a row, into a PNG; all calls use the same latents, so that pictures can be compared.

    If the flow is conditional, ``contexts`` holds one context per row of the sheet; with too few of them, they repeat.

    Raises:
        ValueError: if the path's suffix is none of ``archive.PICTURES``, or if :meth:`~nflows_lib.flow.Flow.sample`
            raises it.
    """
    path = Path(path)
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"path: expected a file name in {', '.join(PICTURES)}, got {path}")
    if contexts is not None:
        rows = torch.arange(n, device=contexts.device) // 10 % len(contexts)
        contexts = contexts[rows].to(next(flow.parameters()).device)
    with random_state_kept(next(flow.parameters()).device):
        torch.manual_seed(settings.seed(2))
        drawn = flow.sample(n, temperature, contexts).cpu()
    picture = (255 * tile(drawn, columns=10, levels=flow.levels, shape=shape)).round().astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.squeeze()).convert("RGB").save(path)


def save_stages(
    out: Path,
    shape: tuple[int, int, int],
    steps: Collection[int] | None = None,
    parts: tuple[float, ...] = (0.05, 0.15, 0.4, 1),
) -> list[int]:
    """Write ``stages.png``, a sheet that shows how the samples change in training, in 256 colours.

    All rows of the sheet are from the same latents. A folder without samples of evaluations gets no file.

    Args:
        out: the run's folder, which holds the samples of its evaluations.
        shape: (C, H, W) of one image.
        steps: the steps of the evaluations to choose from; all that the folder has if None.
        parts: for each row, which evaluation's first row of samples it shows, as a share of all evaluations.

    Returns:
        The steps of the rows.
    """
    drawn = {int(path.stem.removeprefix("samples-")): path for path in sorted(out.glob("samples-*.png"))}
    drawn = [path for step, path in drawn.items() if steps is None or step in steps]
    if not drawn:
        return []
    chosen = list(dict.fromkeys(drawn[math.ceil(part * len(drawn)) - 1] for part in parts))
    sheets = [np.asarray(Image.open(path).convert("RGB")) for path in chosen]
    height = shape[1] + 1  # a row, and the white line above it
    sheet = np.concatenate([sheet[:height] for sheet in sheets] + [sheets[0][:1]])
    Image.fromarray(sheet).quantize(256).save(out / STAGES, optimize=True)
    return [int(path.stem.removeprefix("samples-")) for path in chosen]


@torch.no_grad()
def filmstrip(
    figure: Figure, flow: Flow, points: Tensor, *, columns: int = 4, between: int = 1, extent: float = 3.5
) -> int:
    """The warp of :func:`nflows_lib.plotting.warp` as a sheet of equal frames, in reading order.

    The first frame shows the data, the next ones show the points and a grid after each layer. Between one layer's
    output and the next one's, points and grid move on straight lines, in ``between`` frames. The last frame shows only
    the latents, with circles around the origin of radius 1, 2 and 3. In a cell tagged ``frames-4x3`` (columns x rows)
    the page turns the sheet into one frame with a slider. The figure should have the size of columns x rows squares.

    Returns:
        The number of frames.
    """
    # Not at the top, since a run that draws samples needs no matplotlib.
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle, Rectangle

    from nflows_lib import plotting

    mesh = plotting.mesh_lines(extent, 13, 80).to(points.device)
    hue, frames = points[:, 0].cpu(), [("data", points, mesh)]
    for i, layer in enumerate(flow.chain):
        moved = layer(points)[0], layer(mesh.flatten(0, 1))[0].unflatten(0, mesh.shape[:2])
        for part in torch.linspace(0, 1, between + 1)[1:].tolist():
            frames.append((f"layer {i + 1}", torch.lerp(points, moved[0], part), torch.lerp(mesh, moved[1], part)))
        points, mesh = moved
    frames.append(("latent $z$", points, mesh[:0]))
    height = -(-len(frames) // columns)
    figure.set_layout_engine("none")
    figure.add_axes((0, 0, 1, 1)).set_axis_off()  # so that a figure that is cut to its content keeps its size
    figure.axes[0].add_patch(Rectangle((0, 0), 1, 1, color="white"))
    for i, (title, dots, lines) in enumerate(frames):
        box = (i % columns / columns, 1 - (i // columns + 1) / height, 1 / columns, 1 / height)
        ax = figure.add_axes(box, xlim=(-extent, extent), ylim=(-extent, extent))
        ax.set_axis_off()
        # Lines without half tones make the file of a sheet half as large.
        thin = {"colors": "0.8", "linewidths": 0.4, "antialiaseds": False, "zorder": 1}
        ax.add_collection(LineCollection(lines.cpu().numpy(), **thin))
        ax.scatter(*dots.cpu().T, s=2, c=hue, cmap="coolwarm", linewidths=0, zorder=2)
        ax.text(0.04, 0.96, title, transform=ax.transAxes, va="top", fontsize="small")
        if i == len(frames) - 1:
            for radius in (1, 2, 3):
                ax.add_patch(Circle((0, 0), radius, fill=False, linewidth=0.8, zorder=3))
    return len(frames)
