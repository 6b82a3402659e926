"""The picture of an examination shows the layer that is broken, and says what it could not compare."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from nflows_lib.bijection import Bijection
from nflows_lib.clinic import drawing, layer_picture, picture
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.models import glow, realnvp_points

POINTS = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))


class Wrong(Bijection):
    """A scaling with a parameter: its log-det is off by a factor, or its inverse by a constant."""

    def __init__(self, scale: float, *, counted: float = 1.0, off: float = 0.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((2,), math.log(scale)))
        self.counted, self.off = counted, off

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.counted * self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z / self.log_scale.exp() + self.off


def with_layer(layer: nn.Module) -> Flow:
    sound = realnvp_points(2)
    return Flow([*sound.chain[:2], layer, *sound.chain[2:4]], StandardNormal(), (2,)).eval()


def drawn(figure: Figure) -> list[dict[str, tuple[float, float]]]:
    """For each panel, both ends of each layer's bar under the layer's name."""
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    found = []
    for axes in figure.axes:
        ends = {round(bar.get_y() + bar.get_height() / 2): bar.get_extents() for bar in axes.patches}
        inverse = axes.transData.inverted()
        found.append({labels[i]: tuple(inverse.transform(box.get_points())[:, 0]) for i, box in ends.items()})
    return found


def circles(figure: Figure, panel: int) -> list[float]:
    """The errors with moved parameters, from the first layer to the whole flow."""
    return [line.get_xdata()[0] for line in figure.axes[panel].lines if line.get_marker() == "o"]


@pytest.mark.parametrize(
    ("layer", "panel", "error"),
    [(Wrong(2.0, counted=2.0), 1, 2 * math.log(2)), (Wrong(2.0, off=0.01), 0, 0.005)],
    ids=["log-det", "inverse"],
)
def test_the_broken_layer_has_the_only_long_bars(layer: nn.Module, panel: int, error: float) -> None:
    figure = layer_picture(with_layer(layer), POINTS)
    bars = drawn(figure)[panel]
    assert list(bars) == [f"{i} AffineCoupling" for i in (0, 1)] + ["2 Wrong"] + [
        *(f"{i} AffineCoupling" for i in (3, 4)),
        "the whole flow",
    ]
    broken = {name for name, (_, end) in bars.items() if end > 1e-3}
    assert broken == {"2 Wrong", "the whole flow"}
    assert all(end < 1e-9 for name, (_, end) in bars.items() if name not in broken)
    assert all(end < 1e-9 for _, end in drawn(figure)[1 - panel].values())
    if panel == 1:
        assert bars["2 Wrong"][1] == pytest.approx(error, rel=1e-6)


def test_an_error_that_a_new_layer_hides_is_shown_with_moved_parameters() -> None:
    figure = layer_picture(with_layer(Wrong(1.0, counted=2.0)), POINTS)
    assert all(end < 1e-9 for _, end in drawn(figure)[1].values())
    moved = circles(figure, 1)
    assert [error > 1e-3 for error in moved] == [False, False, True, False, False, True]
    assert all(error < 1e-9 for error in circles(figure, 0))


def test_a_log_det_that_sums_over_the_batch_is_wrong_in_the_picture() -> None:
    class Summed(Wrong):
        def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return x * self.log_scale.exp(), (0 * x + self.log_scale).sum()

    rows = picture.measured(with_layer(Summed(2.0)), POINTS)
    assert [row.log_det > 1e-3 for row in rows] == [False, False, True, False, False, True]
    assert rows[2].log_det == pytest.approx(63 * 2 * math.log(2))


def test_the_range_of_a_scaling_is_its_log_scales() -> None:
    layer = Wrong(1.0)
    layer.log_scale.data = torch.tensor([-1.0, 3.0])
    figure = layer_picture(with_layer(layer), POINTS)
    ranges = drawn(figure)[2]
    assert ranges["2 Wrong"] == pytest.approx((-1, 3), abs=1e-6)
    left, right = figure.axes[2].get_xlim()
    assert left < -1.1 and right > 3.1  # the marks at both ends are seen
    assert ranges["0 AffineCoupling"] == pytest.approx((0, 0), abs=1e-6)  # new, so the identity


def test_images_have_their_noise_and_what_is_too_large_is_not_compared() -> None:
    images = torch.randint(0, 256, (8, 3, 32, 32))
    flow = glow((3, 32, 32), scales=2, steps=1, hidden=4)
    flow.initialize(images)
    rows = picture.measured(flow.eval(), images)
    assert [row.title.split()[-1] for row in rows[:3]] == ["UniformDequantize", "Rescale", "Squeeze"]
    assert rows[-1].log_det == rows[-1].stretch == "too large"
    assert all(row.round_trip < 1e-9 for row in rows)
    compared = [row for row in rows if not isinstance(row.log_det, str)]
    assert all(row.log_det < 1e-9 for row in compared) and len(compared) > 8
    assert rows[1].stretch == pytest.approx((-math.log(256),) * 2)
    texts = [text.get_text() for text in drawing.draw(rows).axes[1].texts]
    assert texts == ["not compared: too large"] * (len(rows) - len(compared))


def test_levels_that_become_vectors_are_measured() -> None:
    flow = Flow([UniformDequantize(17), Rescale(17)], StandardNormal(), (4,)).eval()
    rows = picture.measured(flow, torch.randint(0, 17, (64, 4)))
    assert [row.title for row in rows] == ["layers.0 UniformDequantize", "layers.1 Rescale", picture.WHOLE]
    assert all(row.round_trip < 1e-9 and row.log_det < 1e-9 for row in rows)


class Plain(nn.Module):
    """A flow without layers, with a context, whose inverse somebody has still to write."""

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return x * context.exp(), context.sum(1)

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        raise NotImplementedError


def test_a_flow_without_layers_has_one_row_and_a_context() -> None:
    context = torch.randn(64, 2)
    (row,) = picture.measured(Plain().eval(), POINTS, context)
    assert row.title == "the whole flow"
    assert row.round_trip == "no inverse"
    assert row.log_det < 1e-9
    assert row.stretch == pytest.approx((context[0].min().item(), context[0].max().item()))


def test_the_picture_leaves_the_flow_and_the_style_as_they_are() -> None:
    import matplotlib.pyplot as plt

    flow, before, figures = realnvp_points(2), dict(plt.rcParams), plt.get_fignums()
    state = {name: value.clone() for name, value in flow.state_dict().items()}
    layer_picture(flow, POINTS)
    assert flow.training and all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())
    assert dict(plt.rcParams) == before and plt.get_fignums() == figures
    assert torch.get_default_dtype() is torch.float32


def test_wrong_arguments_are_refused_as_by_the_doctor() -> None:
    with pytest.raises(
        ValueError, match=r"^batch: expected a tensor \(B, \.\.\.\) of at least 8 examples, got \(3, 2\)"
    ):
        layer_picture(realnvp_points(2), POINTS[:3])


def test_names_are_short_and_different() -> None:
    kinds = ["Squeeze", "Invertible1x1Conv", "GlowCoupling"]
    titles = [f"chain.layers.9.inner.layers.{i} {kind}" for i, kind in enumerate(kinds)]
    whole = [*titles, "chain.layers.9 FactorOut", picture.WHOLE]
    short = ["9.inner.layers.0 Squeeze", "9.inner.layers.1 Invertible1x1Conv", "9.inner.layers.2 GlowCoupling"]
    assert drawing.names(whole) == [*short, "9 FactorOut", picture.WHOLE]
    deep = [title.replace("9.inner", "9.inner.layers.7.inner") for title in titles]
    assert drawing.names([*deep, *whole])[:4] == [
        *(f"9…7…{i} {kind}" for i, kind in enumerate(kinds)),
        "9…0 Squeeze",
    ]
    assert drawing.names(["a.b Kind", "the whole flow"]) == ["b Kind", "the whole flow"]
    assert drawing.names(["the whole flow"]) == ["the whole flow"]
    assert len(drawing.names(["x" * 50 + " Layer", "the whole flow"])[0]) == drawing.LONGEST
