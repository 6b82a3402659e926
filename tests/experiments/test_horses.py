"""Tests of the horses: how photographs and masks are read, and random views that move both alike."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from densities import FIVE_SIGMA
from PIL import Image
from scipy.stats import binomtest
from sets import assert_masks, save_horse, save_picture
from torch.nn import functional as F

from nflows_lib.experiments import segmentation

# --- horses -----------------------------------------------------------------------------------------------------------


def test_horses_are_in_the_order_of_their_names_and_every_sixth_is_for_testing(tmp_path, monkeypatch):
    for i in (7, 3, 12, 1, 0, 2, 11, 10, 9, 8, 6, 5, 4):
        save_horse(tmp_path, f"horse{i:03d}.png", 21 * i, right=i % 12)
    (tmp_path / "weizmann_horse_db" / "horse" / "notes.txt").write_text("no image")
    monkeypatch.setenv("NFLOWS_DATA", str(tmp_path / "elsewhere"))
    parts = {"train": [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12], "test": [5, 11], "all": list(range(13))}
    for part, expected in parts.items():
        found = segmentation.horses(part, tmp_path, size=12)
        assert_masks(found, len(expected), 12)
        assert (255 * found.contexts[:, 0, 0, 0]).round().tolist() == [21 * i for i in expected]
        columns = torch.tensor([[column >= 12 - i % 12 for column in range(12)] for i in expected])
        assert torch.equal(found.images, columns[:, None, None].expand(-1, 1, 12, 12).to(torch.uint8))
        assert found.labels.eq(0).all()
    monkeypatch.setenv("NFLOWS_DATA", str(tmp_path))
    assert segmentation.horses().images.shape == (11, 1, 32, 32)


def test_a_photograph_that_is_trained_on_is_not_tested(tmp_path):
    """Twins within the test set stay, and so do twins within the training set."""
    # 11 is like 0, 17 like 23, 2 like 3
    greys = [0, 22, 44, 44, 88, 110, 132, 154, 176, 198, 220, 0, *[242] * 5, 66, *[250] * 5, 66]
    for i, grey in enumerate(greys):
        save_horse(tmp_path, f"horse{i:03d}.png", grey)
    found = {part: segmentation.horses(part, tmp_path, size=8) for part in ("train", "test", "all")}
    assert {part: len(images.images) for part, images in found.items()} == {"train": 20, "test": 3, "all": 24}
    assert (255 * found["test"].contexts[:, 0, 0, 0]).round().tolist() == [110, 66, 66]
    assert len(found["test"].labels) == 3


def test_twins_are_pairs_of_photographs_that_are_almost_the_same():
    photographs = torch.rand(4, 3, 8, 8)
    photographs[3] = photographs[1] + 0.079
    photographs = torch.cat([photographs, photographs[2:3] + 0.081])
    assert segmentation.twins(photographs) == [(1, 3)]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *itertools.product(["L", "RGB", "1"], [".png", ".bmp", ".JPG"]),
        *itertools.product(["P", "RGBA"], [".png", ".bmp"]),
        ("LA", ".png"),
    ],
)
def test_masks_of_any_mode_and_suffix(tmp_path, mode, suffix):
    save_horse(tmp_path, "horse001.jpg", 0, "1" + suffix, mode)
    found = segmentation.horses("all", tmp_path, size=8)
    assert torch.equal(found.images[0, 0, 0], torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.uint8))


def test_a_pixel_of_a_small_mask_is_what_most_of_its_pixels_are(tmp_path):
    """Of 24 columns the last 10 or 14 are bright, so of the middle 8 columns two or six are."""
    save_horse(tmp_path, "1.png", 0, right=5)
    assert segmentation.horses("all", tmp_path, size=3).images[0, 0, 0].tolist() == [0, 0, 1]
    save_horse(tmp_path, "1.png", 0, right=7)
    assert segmentation.horses("all", tmp_path, size=3).images[0, 0, 0].tolist() == [0, 1, 1]


def test_horses_are_squashed_and_not_cut(tmp_path):
    """A photograph that brightens to the right and downwards has another size than its mask."""
    save_horse(tmp_path, "1.png", 0)
    ramp = np.stack(
        [np.tile(np.arange(40), (20, 1)), np.tile(5 * np.arange(20)[:, None], (1, 40)), np.full((20, 40), 200)]
    )
    save_picture(tmp_path / "weizmann_horse_db" / "horse" / "1.png", ramp.transpose(1, 2, 0).astype(np.uint8))
    red, green, blue = 255 * segmentation.horses("all", tmp_path, size=4).contexts[0]
    assert (red - (4.5 + 10 * torch.arange(4))).abs().max() <= 2
    assert (green.T - (10 + 25 * torch.arange(4))).abs().max() <= 5
    assert blue.eq(200).all()


def test_horses_errors(tmp_path):
    place = re.escape(f"no photographs in {tmp_path / 'weizmann_horse_db' / 'horse'}")
    with pytest.raises(FileNotFoundError, match=place):
        segmentation.horses("all", tmp_path)
    (tmp_path / "weizmann_horse_db" / "horse").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=place):
        segmentation.horses("all", tmp_path)
    for i in range(8):
        save_horse(tmp_path, f"{i}.png", 0)
    for part, size, message in (
        ("all", 0, "size: expected at least 1, got 0"),
        ("validation", 4, 'part: expected "train", "test" or "all", got \'validation\''),
    ):
        with pytest.raises(ValueError, match=message):
            segmentation.horses(part, tmp_path, size=size)
    for i in (2, 4):
        (tmp_path / "weizmann_horse_db" / "mask" / f"{i}.png").unlink()
    with pytest.raises(ValueError, match=r"^folder: expected a mask for every photograph, got none for 2.png, 4.png$"):
        segmentation.horses("test", tmp_path)


@pytest.mark.parametrize("kind", ["horse", "mask"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, kind):
    save_horse(tmp_path, "1.png", 100)
    path = tmp_path / "weizmann_horse_db" / kind / "1.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"^folder: expected images that can be read, got {path}: "):
        segmentation.horses("all", tmp_path, size=8)


def test_photographs_that_are_all_trained_on_leave_none_to_test_on(tmp_path):
    for i in range(6):
        save_horse(tmp_path, f"{i}.png", 100)  # each other's twins
    with pytest.raises(ValueError, match=r"^folder: expected a photograph to test on that is not trained on, too"):
        segmentation.horses("test", tmp_path, size=8)


def test_masks_with_nothing_bright_in_them_are_named(tmp_path):
    """Masks of 0 and 1, for example, would all be empty."""
    save_horse(tmp_path, "1.png", 100)
    path = tmp_path / "weizmann_horse_db" / "mask" / "1.png"
    Image.fromarray(np.array(Image.open(path)) // 255).save(path)
    with pytest.raises(ValueError, match=r"^folder: expected masks that are bright, 255, on what they show"):
        segmentation.horses("all", tmp_path, size=8)


# --- the same view of two ---------------------------------------------------------------------------------------------


def view(masks: torch.Tensor, photographs: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return segmentation.random_view(masks, photographs)


def blobs(n: int, size: int) -> torch.Tensor:
    """Masks of a half disc around the middle, (n, 1, size, size), which no turn and no mirror maps to itself."""
    axis = (torch.arange(size) + 0.5) / size - 0.5
    inside = (axis[:, None].square() + axis.square() < 0.3**2) & (axis[:, None] < axis / 2)
    return inside.to(torch.uint8).expand(n, 1, size, size).clone()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
def test_a_view_keeps_levels_types_and_shapes(kind):
    masks = torch.randint(17, (40, 2, 6, 6)).to(kind)
    photographs = torch.rand(40, 3, 9, 9)
    before = masks.clone(), photographs.clone()
    seen, shown = view(masks, photographs)
    assert (seen.dtype, shown.dtype) == (kind, torch.float32)
    assert (seen.shape, shown.shape) == (masks.shape, photographs.shape)
    assert set(seen.unique().tolist()) <= set(range(17))
    assert 0 <= shown.min() < 0.01 and 0.99 < shown.max() <= 1
    assert torch.equal(masks, before[0]) and torch.equal(photographs, before[1])
    for i in range(40):
        assert set(seen[i].unique().tolist()) <= set(masks[i].unique().tolist())


@pytest.mark.parametrize("size", [24, 12, 48])
def test_mask_and_photograph_move_alike(size):
    """With the mask as photograph, also at another size, the photograph stays bright where the mask is."""
    seen, shown = view(blobs(60, 24), blobs(60, size).float())
    middle = (shown.amax((1, 2, 3)) + shown.amin((1, 2, 3))) / 2
    bright = F.interpolate((shown > middle[:, None, None, None]).float(), (24, 24), mode="nearest")
    agree = ((bright == seen).float().flatten(1).mean(1)).tolist()
    assert min(agree) > (0.9 if size == 24 else 0.85)
    assert seen.float().mean() > 0.03
    others = (bright.roll(1, 0) == seen).float().mean()
    assert others < sum(agree) / 60 - 0.03


def test_a_view_is_drawn_with_torch_s_generator_for_each_example():
    masks, photographs = blobs(30, 24), torch.rand(30, 3, 24, 24)
    first, again, other = view(masks, photographs), view(masks, photographs), view(masks, photographs, seed=1)
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
    assert len({tuple(mask.flatten().tolist()) for mask in first[0]}) > 25


def moments(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The centre of each mask in [-1/2, 1/2], (N, 2), x first, and the share of pixels that are 1."""
    size = masks.shape[-1]
    axis = (torch.arange(size) + 0.5) / size - 0.5
    m = masks[:, 0].float()
    total = m.sum((1, 2))
    return torch.stack([(m * axis).sum((1, 2)), (m * axis[:, None]).sum((1, 2))], 1) / total[:, None], total / size**2


def test_views_are_mirrored_half_of_the_time():
    """What was on the right is then on the left, which no turn by at most 0.2 can do."""
    n = 600
    masks = torch.zeros(n, 1, 40, 40, dtype=torch.uint8)
    masks[:, :, 16:24, 16:24] = 1  # a square in the middle, that says where the middle is ...
    stroke = torch.zeros_like(masks)
    stroke[:, :, 16:24, 26:29] = 1  # ... and what lies to its right
    torch.manual_seed(0)
    seen, _ = segmentation.random_view(torch.cat([masks, stroke], 1), torch.rand(n, 3, 4, 4))
    centre = moments(seen[:, :1])[0]
    right = moments(seen[:, 1:])[0][:, 0] > centre[:, 0]
    assert binomtest(int(right.sum()), n).pvalue > FIVE_SIGMA
    for side in (centre[right], centre[~right]):  # either is shifted to every side
        assert side.amin(0).max() < -0.08
        assert side.amax(0).min() > 0.08


def test_views_are_shifted_turned_and_zoomed_within_bounds():
    """A bar of many pixels shows shifts up to a tenth, turns up to 0.2 and zooms from 1 / 1.1 to 1 / 0.75."""
    n, size = 400, 80
    bar = torch.zeros(n, 1, size, size, dtype=torch.uint8)
    bar[..., size // 2 - 4 : size // 2 + 4, size // 2 - 16 : size // 2 + 16] = 1
    seen, _ = view(bar, torch.rand(n, 3, 4, 4))
    centre, share = moments(seen)
    assert centre.abs().max() < 0.1 * 1.34 * 1.25 + 0.02
    assert centre.amin(0).max() < -0.08 and centre.amax(0).min() > 0.08
    assert centre.mean(0).abs().max() < 0.02
    zoom = (share / (8 * 32 / size**2)).sqrt()
    assert zoom.min() == pytest.approx(1 / 1.1, abs=0.03)
    assert zoom.max() == pytest.approx(1 / 0.75, abs=0.05)
    axis = (torch.arange(size) + 0.5) / size - 0.5
    m = seen[:, 0].float() / seen[:, 0].float().sum((1, 2), keepdim=True)
    x, y = axis - centre[:, :1, None], axis[:, None] - centre[:, 1:, None]
    angle = 0.5 * torch.atan2(2 * (m * x * y).sum((1, 2)), (m * (x * x - y * y)).sum((1, 2)))
    assert 0.17 < angle.max() < 0.22
    assert -0.22 < angle.min() < -0.17


def test_light_and_contrast_of_a_photograph_change_and_those_of_a_mask_do_not():
    """A grey a becomes (a - 1/2) c + 1/2 + l, with the same c and l in all pixels of a photograph."""
    n = 400
    photographs = torch.stack([torch.full((4, 4), grey) for grey in (0.4, 0.5, 0.6)]).expand(n, 3, 4, 4)
    seen, shown = view(torch.ones(n, 1, 4, 4, dtype=torch.uint8), photographs)
    assert seen.eq(1).all()
    assert (shown - shown[:, :, :1, :1]).abs().max() < 1e-6
    low, light, high = (shown[:, i, 0, 0] for i in range(3))
    contrast = (high - low) / 0.2
    assert contrast.min() == pytest.approx(0.7, abs=0.02) and contrast.max() == pytest.approx(1.3, abs=0.02)
    light = light - 0.5
    assert light.min() == pytest.approx(-0.15, abs=0.01) and light.max() == pytest.approx(0.15, abs=0.01)
    assert torch.corrcoef(torch.stack([contrast, light]))[0, 1].abs() < 5 / math.sqrt(n)


def test_beyond_a_border_lies_a_copy_of_it():
    """An image of one value keeps that value everywhere."""
    seen, shown = view(torch.ones(50, 1, 8, 8, dtype=torch.uint8), torch.full((50, 3, 8, 8), 0.5))
    assert seen.eq(1).all()
    assert (shown - shown[:, :1, :1, :1]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("masks", "photographs", "message"),
    [
        ([1], torch.zeros(2, 3, 4, 4), "masks: expected a tensor, got list"),
        (torch.zeros(2, 4), torch.zeros(2, 3, 4, 4), "masks: expected shape (2, C, H, W), got (2, 4)"),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(3, 3, 4, 4),
            "photographs: expected shape (2, C, H, W), got (3, 3, 4, 4)",
        ),
    ],
)
def test_what_has_no_view_is_named(masks, photographs, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        segmentation.random_view(masks, photographs)
