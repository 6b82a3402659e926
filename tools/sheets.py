"""Decode the playground's sheets of pictures with the shipped models: ``python tools/sheets.py`` (about a minute).

Every latent is drawn from the prior, so these files hold no picture of a data set. The draws were chosen by eye: digits
that can be read, and flowers of different colours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nflows_lib.experiments import runs
from nflows_lib.flow import Flow
from nflows_lib.multiscale import split_latent

FOLDER = Path(__file__).parents[1] / "chapters" / "assets" / "playground"
MAX_BYTES, MAX_BYTES_IN_ALL = 100_000, 500_000
DIGITS, FLOWERS = "glow-mnist", "glow-flowers5-small"
# The numbers of the draws at top left, top right, bottom left and bottom right.
FOUR_DIGITS = (44, 302, 352, 73)  # they read 7, 3, 0, 8
FOUR_FLOWERS = (63, 47, 83, 65)  # red, white, yellow, under a blue sky
BASES = (63, 83, 5)  # red, yellow, pink


def draws(flow: Flow, which: Sequence[int]) -> Tensor:
    """Some of 400 latents from the prior, (n, D); every call draws the same 400."""
    return torch.randn(400, flow.dims, generator=torch.Generator().manual_seed(0))[list(which)]


def between(corners: Tensor, side: int) -> Tensor:
    """A square of latents between four corners, (4, D) to (side * side, D), as long as draws from the prior.

    A mean of independent draws with weights w has variance sum w^2 < 1 in each coordinate, so it is too short: the
    prior has almost no mass there. Divided by the root of that variance, every point of the square is itself
    distributed as the prior.
    """
    line = torch.linspace(0, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    weights = torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], dim=-1).reshape(-1, 4)
    return weights / weights.norm(dim=1, keepdim=True) @ corners


def at_temperatures(latents: Tensor, temperatures: Sequence[float]) -> Tensor:
    """The latents at each temperature, one row of the sheet per temperature."""
    return torch.cat([temperature * latents for temperature in temperatures])


def one_scale_redrawn(flow: Flow, bases: Tensor, n: int) -> Tensor:
    """Rows of latents, for each base one row per scale, finest scale first.

    A row holds the base and n latents in which the piece of that scale is redrawn, with the same draws for all bases.
    """
    rows = []
    for base in bases:
        pieces = split_latent(flow.chain, base[None])
        for i, piece in enumerate(pieces):
            again = torch.randn(n, *piece.shape[1:], generator=torch.Generator().manual_seed(i + 1))
            kept = [p.expand(n + 1, -1, -1, -1) for p in pieces]
            kept[i] = torch.cat([piece, again])
            rows.append(torch.cat([p.flatten(1) for p in kept], dim=1))
    return torch.cat(rows)


@dataclass(frozen=True)
class Sheet:
    """A sheet of columns x rows pictures that a model decodes from ``latents``, with ``gap`` pixels between them."""

    model: str
    columns: int
    rows: int
    latents: Callable[[Flow], Tensor]
    gap: int = 0
    quality: int = 0  # the quality of a WebP; 0 for a PNG


SHEETS: dict[str, Sheet] = {
    "digits-between.png": Sheet(DIGITS, 17, 17, lambda flow: 0.7 * between(draws(flow, FOUR_DIGITS), 17)),
    "flowers-between.webp": Sheet(
        FLOWERS, 11, 11, lambda flow: 0.8 * between(draws(flow, FOUR_FLOWERS), 11), quality=85
    ),
    "digits-temperature.png": Sheet(
        DIGITS, 12, 25, lambda flow: at_temperatures(draws(flow, range(12)), [i / 20 for i in range(25)])
    ),
    "flowers-temperature.webp": Sheet(
        FLOWERS, 12, 13, lambda flow: at_temperatures(draws(flow, range(12)), [i / 10 for i in range(13)]), quality=85
    ),
    "flowers-scales.webp": Sheet(
        FLOWERS, 7, 12, lambda flow: 0.8 * one_scale_redrawn(flow, draws(flow, BASES), 6), gap=2, quality=90
    ),
}


@functools.cache
def model(name: str) -> Flow:
    """A shipped model, loaded once."""
    return runs.load_flow(name)


@torch.no_grad()
def decoded(name: str, cells: Sequence[int] | None = None) -> np.ndarray:
    """A sheet's pictures, or some of them, as (N, H, W, C) levels from 0 to 255."""
    flow = model(SHEETS[name].model)
    latents = SHEETS[name].latents(flow)
    batches = (latents if cells is None else latents[list(cells)]).split(16)
    return torch.cat([flow.decode(z) for z in batches]).permute(0, 2, 3, 1).byte().numpy()


def stored(name: str) -> np.ndarray:
    """The pictures of the stored file, in the form of :func:`decoded`."""
    sheet = SHEETS[name]
    image = Image.open(FOLDER / name)
    pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    height, width = ((n + sheet.gap) // k for n, k in zip(pixels.shape, (sheet.rows, sheet.columns), strict=False))
    return np.stack(
        [
            pixels[y * height : (y + 1) * height - sheet.gap, x * width : (x + 1) * width - sheet.gap]
            for y in range(sheet.rows)
            for x in range(sheet.columns)
        ]
    )


def put_together(sheet: Sheet, pictures: np.ndarray) -> Image.Image:
    """The picture of a sheet, with white gaps."""
    n, height, width, channels = pictures.shape
    framed = np.full((n, height + sheet.gap, width + sheet.gap, channels), 255, np.uint8)
    framed[:, :height, :width] = pictures
    rows = framed.reshape(sheet.rows, sheet.columns, *framed.shape[1:]).swapaxes(1, 2)
    whole = rows.reshape(sheet.rows * framed.shape[1], sheet.columns * framed.shape[2], channels)
    return Image.fromarray(whole[: len(whole) - sheet.gap, : whole.shape[1] - sheet.gap].squeeze())


def main() -> None:
    """Decode all sheets and write their files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, sheet in SHEETS.items():
        image = put_together(sheet, decoded(name))
        options = {"quality": sheet.quality, "method": 6} if sheet.quality else {"optimize": True}
        image.save(FOLDER / name, **options)
        print(f"{name}: {image.width} x {image.height}, {(FOLDER / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
