"""Cut the clinic's thumbnails out of the chapters' figures: ``python tools/thumbnails.py``.

A thumbnail is a small picture of a chapter's figure, or of a part of it. `make notebooks` runs this after the chapters.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "chapters" / "assets" / "clinic"
WIDTH, HEIGHT = 480, 360  # largest size in pixels; the page shows half of it

# By failure: the chapter, the figure, and the part that is shown, as fractions (left, top, right, bottom).
SOURCES: dict[str, tuple[str, str, tuple[float, float, float, float]]] = {
    "f1": ("01_nice", "fig-f1", (0, 0, 1, 1)),
    "f2": ("01_nice", "fig-f2", (0, 0, 1, 1)),
    "f3": ("01_nice", "fig-f3", (0, 0, 1, 1)),
    "f4": ("01_nice", "fig-f4", (0, 0, 1, 1)),
    "f5": ("01_nice", "fig-f5", (0, 0, 0.51, 1)),
    "f6": ("02_dequantization", "fig-f6-break", (0, 0, 0.475, 1)),
    "f7": ("02_dequantization", "fig-wrong-noise", (0, 0, 0.34, 1)),
    "f8": ("02_dequantization", "fig-wrong-noise", (0.345, 0, 0.68, 1)),
    "f9": ("02_dequantization", "fig-wrong-noise", (0.68, 0, 1, 1)),
    "f10": ("02_dequantization", "fig-cells", (0, 0, 0.405, 1)),
    "f11": ("03_realnvp", "fig-f11", (0, 0, 0.5, 1)),
    "f12": ("03_realnvp", "fig-f12", (0, 0, 0.445, 1)),
    "f13": ("03_realnvp", "fig-f13", (0, 0, 1, 1)),
    "f14": ("03_realnvp", "fig-f14", (0, 0, 1, 1)),
    "f15": ("03_realnvp", "fig-f15", (0, 0, 0.6, 1)),
    "f16": ("03_realnvp", "fig-f15", (0.62, 0, 1, 1)),
    "f17": ("04_multiscale", "fig-squeeze", (0, 0, 1, 1)),
    "f18": ("04_multiscale", "fig-scales", (0, 0, 1, 1)),
    "f19": ("04_multiscale", "fig-pieces", (0, 0, 1, 1)),
    "f20": ("05_glow", "fig-first-batch", (0, 0, 1, 1)),
    "f21": ("05_glow", "fig-first-steps", (0, 0, 1, 1)),
    "f22": ("05_glow", "fig-ablations", (0, 0, 1, 1)),
    "f23": ("05_glow", "fig-glow-jacobian", (0, 0, 1, 1)),
    "f24": ("06_cglow", "fig-dead", (0, 0, 1, 1)),
    "f25": ("06_cglow", "fig-margins", (0, 0, 0.555, 1)),
    "f26": ("06_cglow", "fig-one-bit", (0, 0, 1, 1)),
    "f27": ("01_nice", "fig-f27", (0, 0, 0.375, 1)),
    "f28": ("02_dequantization", "fig-f28", (0, 0, 0.53, 1)),
    "f29": ("07_after_glow", "fig-f29", (0, 0, 0.4, 1)),
}


def figure(chapter: str, name: str) -> Image.Image:
    """A chapter's stored figure of this label."""
    notebook = json.loads((ROOT / "chapters" / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") == name:
            pictures = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
            return Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("RGB")
    raise ValueError(f"name: expected a figure of {chapter}, got {name}")


def thumbnail(failure: str) -> Image.Image:
    """The picture of a failure, at most WIDTH by HEIGHT pixels."""
    chapter, name, part = SOURCES[failure]
    whole = figure(chapter, name)
    edges = (whole.width, whole.height) * 2
    small = whole.crop(tuple(round(at * edge) for at, edge in zip(part, edges, strict=True)))
    small.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    return small


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for failure in SOURCES:
        picture = thumbnail(failure).quantize(64, dither=Image.Dither.NONE)
        picture.save(FOLDER / f"{failure}.png", optimize=True)
