"""Tests of sheets of pictures: samples with one context per row, stages of a training, frames of a flow's layers."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nflows_lib import data
from nflows_lib.dequantization import Rescale
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments import sheets
from nflows_lib.experiments.pixelwise import PixelClassifier
from nflows_lib.flow import Flow


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


# --- samples ----------------------------------------------------------------------------------------------------------


class Shows(nn.Module):
    """A network whose logits say with certainty that an image is its context."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1e4))

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.cat([0.5 - context, context - 0.5], 1)


@pytest.mark.parametrize(("n", "given"), [(60, 3), (25, 40), (7, 1), (60, 6)])
def test_all_samples_of_a_row_have_one_context(tmp_path, n, given):
    """The rows have the given contexts in order, and begin again with the first."""
    torch.manual_seed(0)
    contexts = (torch.rand(given, 1, 3, 5) > 0.5).float()
    sheets.save_samples(PixelClassifier(Shows(), (1, 3, 5), 2), (1, 3, 5), tmp_path / "a.png", n, contexts=contexts)
    drawn = torch.stack([contexts[i // 10 % given] for i in range(n)]).long()
    expected = data.tile(drawn, columns=10, levels=2, shape=(1, 3, 5)).squeeze()
    assert np.allclose(plt.imread(tmp_path / "a.png")[..., 0], expected, atol=0.01)


# --- stages -----------------------------------------------------------------------------------------------------------


def pixels(path: Path) -> np.ndarray:
    """A picture as (height, width, 3) bytes."""
    return np.asarray(Image.open(path).convert("RGB"))


def draw_sheets(folder: Path, steps: list[int], shape: tuple[int, int, int], levels: int) -> None:
    """Write the sheets of evaluations: twelve random images in two rows, another sheet for each step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(levels, (12, *shape), generator=generator)
        picture = data.tile(images, columns=10, levels=levels, shape=shape)
        plt.imsave(folder / f"samples-{step:07d}.png", picture.squeeze(), cmap="gray", vmin=0, vmax=1)


def assert_rows_are_first_rows(folder: Path, steps: list[int], height: int, tolerance: int) -> None:
    """Assert that the rows are these steps' first rows, each under a white line, with a line at the end."""
    sheet = pixels(folder / "stages.png").astype(int)
    first = [pixels(folder / f"samples-{step:07d}.png").astype(int) for step in steps]
    assert sheet.shape == (len(steps) * (height + 1) + 1, *first[0].shape[1:])
    for i, expected in enumerate(first):
        found = sheet[i * (height + 1) :][: height + 1]
        assert np.abs(found - expected[: height + 1]).max() <= tolerance
    assert (sheet[:: height + 1] == 255).all()


@pytest.mark.parametrize("shape", [(1, 4, 3), (3, 3, 5)])
@pytest.mark.parametrize(
    ("drawn", "chosen"),
    [(20, [1, 3, 8, 20]), (10, [1, 2, 4, 10]), (7, [1, 2, 3, 7]), (3, [1, 2, 3]), (2, [1, 2]), (1, [1])],
)
def test_the_stages_are_the_first_rows_of_a_few_evaluations(tmp_path, shape, drawn, chosen):
    """These are at 1/20, 3/20 and 2/5 of them, rounded up, and the last, without repetition; few colours stay exact."""
    (tmp_path / "samples.png").write_bytes(b"of the end, not of a stage")
    draw_sheets(tmp_path, [123_450 * i for i in range(1, drawn + 1)], shape, levels=5)
    steps = [123_450 * i for i in chosen]
    assert sheets.save_stages(tmp_path, shape) == steps
    assert_rows_are_first_rows(tmp_path, steps, shape[1], tolerance=0)


def test_the_parts_of_the_stages_can_be_chosen(tmp_path):
    draw_sheets(tmp_path, list(range(1, 9)), (1, 2, 2), levels=2)
    assert sheets.save_stages(tmp_path, (1, 2, 2), parts=(0.25, 0.5)) == [2, 4]
    assert_rows_are_first_rows(tmp_path, [2, 4], 2, tolerance=0)


def test_the_stages_of_photographs_have_256_colours(tmp_path):
    """The nearest colours are used; the white of the lines stays white."""
    draw_sheets(tmp_path, [1, 2, 3], (3, 16, 16), levels=256)
    assert len(np.unique(pixels(tmp_path / "samples-0000001.png").reshape(-1, 3), axis=0)) > 1000
    sheets.save_stages(tmp_path, (3, 16, 16))
    with Image.open(tmp_path / "stages.png") as picture:
        assert picture.mode == "P"
    assert len(np.unique(pixels(tmp_path / "stages.png").reshape(-1, 3), axis=0)) <= 256
    assert_rows_are_first_rows(tmp_path, [1, 2, 3], 16, tolerance=80)
    sheet = np.concatenate([pixels(tmp_path / f"samples-000000{i}.png")[:17].astype(int) for i in (1, 2, 3)])
    found = pixels(tmp_path / "stages.png")[:-1]
    assert np.abs(found - sheet).mean() < 20


def test_an_area_of_one_colour_stays_one_in_the_stages(tmp_path):
    """Above 256 colours, no colour is mixed from dots."""
    images = torch.randint(256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    picture = data.tile(images, columns=10, levels=256, shape=(3, 32, 32))
    plt.imsave(tmp_path / "samples-0000001.png", picture)
    sheets.save_stages(tmp_path, (3, 32, 32))
    before, after = (pixels(tmp_path / name)[:33].reshape(-1, 3) for name in ("samples-0000001.png", "stages.png"))
    colours = len(np.unique(before, axis=0))
    assert colours > 256
    assert len(np.unique(np.concatenate([before, after], 1), axis=0)) == colours


def test_stages_are_those_of_the_run_and_not_of_an_earlier_one_in_the_folder(tmp_path):
    for step in (1, 2, 5, 9):
        plt.imsave(tmp_path / f"samples-{step:07d}.png", np.full((9, 91), step / 10), cmap="gray", vmin=0, vmax=1)
    assert sheets.save_stages(tmp_path, (1, 8, 8), [2, 5, 7], (0.5, 1)) == [2, 5]
    assert sheets.save_stages(tmp_path, (1, 8, 8), [3]) == []


# --- the frames of a flow's way ---------------------------------------------------------------------------------------


def test_filmstrip_has_equal_frames_in_reading_order():
    """The data come first, then two frames per layer; halfway through a doubling the points are at 1.5."""
    flow = Flow([Rescale(2.0), Rescale(0.5)], StandardNormal(), (2,))
    figure = plt.figure(figsize=(3, 2))
    assert sheets.filmstrip(figure, flow, torch.ones(4, 2), columns=3, between=2) == 6
    frames = figure.axes[1:]
    boxes = [ax.get_position().bounds for ax in frames]
    assert all(box[2:] == pytest.approx((1 / 3, 1 / 2)) for box in boxes)
    assert [(round(3 * x), round(2 * y)) for x, y, _, _ in boxes] == [(0, 1), (1, 1), (2, 1), (0, 0), (1, 0), (2, 0)]
    assert [ax.texts[0].get_text() for ax in frames] == [
        "data",
        "layer 1",
        "layer 1",
        "layer 2",
        "layer 2",
        "latent $z$",
    ]
    places = [ax.collections[1].get_offsets().max() for ax in frames]
    assert places == pytest.approx([1, 1.5, 2, 1.5, 1, 1])
    assert [len(ax.patches) for ax in frames] == [0, 0, 0, 0, 0, 3]


def test_a_filmstrip_cut_to_its_content_keeps_its_size(tmp_path):
    """Jupyter saves figures with bbox_inches="tight", and the page divides the picture into equal frames."""
    figure = plt.figure(figsize=(6, 2), dpi=100)
    sheets.filmstrip(figure, Flow([Rescale(2.0)], StandardNormal(), (2,)), torch.ones(4, 2), columns=3)
    figure.savefig(tmp_path / "strip.png", dpi=100, bbox_inches="tight", pad_inches=0)
    assert plt.imread(tmp_path / "strip.png").shape[:2] == (200, 600)
