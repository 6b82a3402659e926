"""How the picture of one examination is drawn, in the style of the book; what it shows is in ``picture.py``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nflows_lib.clinic.bijection import EXACT_BACK
from nflows_lib.clinic.examination import EXACT
from nflows_lib.plotting import COLOURS, style

if TYPE_CHECKING:
    from nflows_lib.clinic.picture import Measured

FLOOR, TOP = 1e-18, 1e3  # the ends of an axis of errors,
ZERO = 4e-18  # and where an error of 0 is drawn
LONGEST = 34  # letters of a layer's name
CIRCLE = {"marker": "o", "ms": 4, "mfc": "white", "mec": COLOURS["black"], "mew": 1, "linestyle": ""}
LIMIT = {"color": COLOURS["black"], "linestyle": "--", "linewidth": 1}


def draw(rows: list[Measured]) -> Figure:
    """The figure of what was measured of each layer and, last, of the whole flow."""
    with plt.rc_context():
        style()
        figure = Figure(figsize=(11, 1.8 + 0.24 * len(rows)))
        axes = figure.subplots(1, 3, sharey=True)
        _draw_errors(axes[0], [(row.round_trip, row.moved_round_trip) for row in rows], EXACT_BACK)
        _draw_errors(axes[1], [(row.log_det, row.moved_log_det) for row in rows], EXACT)
        _draw_ranges(axes[2], [row.stretch for row in rows])
        axes[0].set(title="error of the round trip", xlabel="relative to the largest value")
        axes[1].set(title="error of the log-det", xlabel="nats, compared with autograd")
        axes[2].set(title="range of the log-scales", xlabel="log singular values, nats")
        axes[0].set_yticks(range(len(rows)), names([row.title for row in rows]), fontsize=9)
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
        for panel in axes:
            panel.tick_params(axis="x", labelsize=9)
        kinds = {"the flow as it is": "blue", "the flow as it is, beyond the limit": "vermilion"}
        handles = [Patch(color=COLOURS[colour], label=label) for label, colour in kinds.items()]
        handles += [Line2D([], [], label="with moved parameters", **CIRCLE)]
        handles += [Line2D([], [], label="the doctor's limit", **LIMIT)]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _draw_errors(axes: Axes, errors: list[tuple[float | str, float | str]], limit: float) -> None:
    """Draw one bar per error of the flow as it is, and one circle per error with moved parameters."""
    for i, (error, moved) in enumerate(errors):
        if isinstance(error, str):
            _write(axes, i, error)
        else:
            colour = COLOURS["blue" if error <= limit else "vermilion"]
            axes.barh(i, _within(error) - FLOOR, left=FLOOR, height=0.6, color=colour)
        if not isinstance(moved, str):
            edge = COLOURS["black" if moved <= limit else "vermilion"]
            axes.plot(_within(moved), i, **CIRCLE | {"mec": edge}, clip_on=False)
    axes.axvline(limit, **LIMIT)
    axes.set(xscale="log", xlim=(FLOOR, TOP), xticks=[1e-16, 1e-12, 1e-8, 1e-4, 1])


def _within(error: float) -> float:
    return min(max(error, ZERO), TOP)


def _draw_ranges(axes: Axes, ranges: list[tuple[float, float] | str]) -> None:
    """Draw one bar from the least to the largest log-scale of each layer, with a mark at either end."""
    axes.use_sticky_edges = False  # else the axis ends at the outermost bar
    for i, found in enumerate(ranges):
        if isinstance(found, str):
            _write(axes, i, found)
        else:
            axes.barh(i, found[1] - found[0], left=found[0], height=0.6, color=COLOURS["sky"])
            axes.plot(found, (i, i), "|", ms=8, mew=1.5, color=COLOURS["blue"])
    axes.axvline(0, color=COLOURS["black"], linewidth=1)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.5), max(right, 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _write(axes: Axes, row: int, words: str) -> None:
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    options = {"va": "center", "fontsize": 8, "color": "0.35", "bbox": white, "transform": axes.get_yaxis_transform()}
    axes.text(0.02, row, f"not compared: {words}", **options)


def names(titles: list[str]) -> list[str]:
    """The titles in short, except the last one, which is the whole flow's.

    The part of the names that all layers share is left out. If a title is still too long, all words between two
    numbers become "…", as in "9…7…3 GlowCoupling" for "9.inner.layers.7.inner.layers.3 GlowCoupling". If even that is
    too long, the middle of the title is cut out.
    """
    paths = [title.split(" ")[0].split(".")[:-1] for title in titles[:-1]]
    shared = 0
    while paths and all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    short = [".".join(title.split(".")[shared:]) for title in titles[:-1]]
    if any(len(title) > LONGEST for title in short):
        short = [re.sub(r"(?<=\d)\.(?:[^\W\d]\w*\.)+(?=\d)", "…", title) for title in short]
    return [*map(_cut, short), *titles[-1:]]


def _cut(title: str) -> str:
    end = LONGEST * 2 // 3
    return title if len(title) <= LONGEST else f"{title[: LONGEST - end - 1]}…{title[-end:]}"
