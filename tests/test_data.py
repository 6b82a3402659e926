"""Data sets: shapes, ranges, splits, repeatability, and the errors of what is not there."""

from __future__ import annotations

import itertools
import math
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import sklearn.datasets
import torch
from densities import FIVE_SIGMA, assert_samples_follow, integral, midpoints
from PIL import Image
from scipy.stats import binomtest
from torch.nn import functional as F

from nflows_lib import data
from nflows_lib.experiments import segmentation

MIXTURES = pytest.mark.parametrize("mixture", [data.two_gaussians(), data.four_gaussians()], ids=["two", "four"])

# --- points in the plane ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data.TOYS)
@pytest.mark.parametrize("n", [1, 501])
def test_toy_points(name, n):
    torch.manual_seed(0)
    points = data.toy(name, n)
    assert points.shape == (n, 2)
    assert points.dtype == torch.float32
    assert points.isfinite().all()
    assert (points.abs() < 4.5).all()


@pytest.mark.parametrize("name", data.TOYS)
def test_toy_fills_its_frame(name):
    """Centred and of a size that a standard base density can begin with."""
    torch.manual_seed(0)
    points = data.toy(name, 2_000)
    assert (points.mean(0).abs() < 0.5).all()
    assert ((points.std(0) > 0.4) & (points.std(0) < 2.5)).all()
    assert points.std(0).max() > 1


@pytest.mark.parametrize("name", data.TOYS)
def test_toy_repeats_with_the_seed_and_only_with_it(name):
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(data.toy(name, 50))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(data.toy(name, 50), draws[2])  # a second draw is another one


def test_unknown_toy_is_named_with_the_known():
    with pytest.raises(ValueError, match=r"name: expected one of two_gaussians, .*, swiss_roll, got 'spiral'"):
        data.toy("spiral", 3)


@MIXTURES
def test_mixture_integrates_to_one(mixture):
    assert integral(mixture.log_prob, 2, -6, 6) == pytest.approx(1, abs=1e-6)


@MIXTURES
def test_mixture_samples_follow_its_density(mixture):
    torch.manual_seed(0)
    n = 10_000
    x = mixture.sample(n)
    assert x.shape == (n, 2)
    assert_samples_follow(x, mixture.log_prob, -4, 4, cells=10)
    variance = mixture.means.square().mean(0) + mixture.std**2
    assert (x.mean(0).abs() < 5 * (variance / n).sqrt()).all()


def test_mixture_by_hand():
    """At one mean of two, the other is 4 / 0.5 = 8 standard deviations away."""
    expected = math.log(0.5 * (1 + math.exp(-32)) / (2 * math.pi * 0.25))
    assert data.two_gaussians().log_prob(torch.tensor([[2.0, 0.0]])).item() == pytest.approx(expected)


def test_moons_integrate_to_one():
    assert integral(data.moons().log_prob, 2, -3, 3, points=300) == pytest.approx(1, abs=1e-6)


def test_more_nodes_do_not_change_the_moons():
    grid, _ = midpoints(-2.5, 2.5, 150, 2)
    few, many = data.moons().log_prob(grid), data.moons(256).log_prob(grid)
    torch.testing.assert_close(few.exp(), many.exp(), rtol=0, atol=1e-5)
    near = many > many.max() - 10
    torch.testing.assert_close(few[near], many[near], rtol=0, atol=1e-4)


@pytest.mark.parametrize("draw", [lambda n: data.toy("moons", n), data.moons().sample], ids=["scikit-learn", "mixture"])
def test_moons_follow_their_density(draw):
    torch.manual_seed(0)
    assert_samples_follow(draw(20_000), data.moons().log_prob, -3, 3, cells=20)


def test_log_prob_of_many_points_is_that_of_each():
    x = torch.linspace(-2, 2, 10_000).reshape(-1, 2)
    values = data.moons().log_prob(x)
    assert values.shape == (5_000,)
    torch.testing.assert_close(values[4090:4100], torch.cat([data.moons().log_prob(row) for row in x[4090:4100, None]]))


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "n"), [("train", 1498), ("test", 299), ("all", 1797)])
def test_digits(part, n):
    digits = data.digits(part)
    assert digits.images.shape == (n, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    assert digits.labels.shape == (n,)
    assert digits.labels.dtype == torch.int64
    assert digits.levels == 17
    assert (digits.images.min(), digits.images.max()) == (0, 16)
    assert digits.labels.unique().tolist() == list(range(10))


def test_digits_split_is_disjoint_and_complete():
    """The images number themselves here: parts of one order, whose union is the whole."""
    whole = data.digits("all")
    bunch = sklearn.datasets.load_digits()
    assert torch.equal(whole.images.squeeze(1).double(), torch.from_numpy(bunch.images))
    assert whole.labels.tolist() == bunch.target.tolist()
    is_test = [i % 6 == 5 for i in range(1797)]
    for part, wanted in (("test", True), ("train", False)):
        keep = torch.tensor([flag == wanted for flag in is_test])
        assert torch.equal(data.digits(part).images, whole.images[keep])
        assert torch.equal(data.digits(part).labels, whole.labels[keep])


def test_digits_part_error():
    with pytest.raises(ValueError, match='part: expected "train", "test" or "all", got \'validation\''):
        data.digits("validation")


@pytest.mark.parametrize("part", ["train", "test", "all"])
def test_digit_halves_put_together_are_the_digits(part):
    halves, whole = data.digit_halves(part), data.digits(part)
    n = len(whole.images)
    assert (halves.images.shape, halves.contexts.shape) == ((n, 1, 4, 8), (n, 1, 4, 8))
    assert (halves.images.dtype, halves.contexts.dtype, halves.levels) == (torch.uint8, torch.float32, 17)
    assert halves.images.is_contiguous()
    assert (halves.contexts.min(), halves.contexts.max()) == (0, 1)
    assert torch.equal(torch.cat([16 * halves.contexts, halves.images], 2), whole.images.float())
    assert torch.equal(halves.labels, whole.labels)


def test_only_halves_have_contexts():
    assert data.digits().contexts is None
    assert len(data.digit_halves().images) == 1_498
    with pytest.raises(ValueError, match='part: expected "train", "test" or "all", got \'validation\''):
        data.digit_halves("validation")


BORDER = 533  # five sixths of 640 columns, rounded down


@pytest.mark.parametrize(
    ("part", "size", "n"),
    [("train", 16, 26_780), ("test", 16, 312), ("train", 64, 2 * 91 * 118), ("test", 64, 2 * 6), ("test", 4, 2 * 2756)],
)
def test_patches(part, size, n):
    patches = data.patches(part, size)
    assert patches.images.shape == (n, 3, size, size)
    assert patches.images.dtype == torch.uint8
    assert patches.images.is_contiguous()
    assert patches.labels.dtype == torch.int64
    assert torch.equal(patches.labels, torch.arange(2).repeat_interleave(n // 2))
    assert patches.levels == 256
    assert patches.images.min() < 5
    assert patches.images.max() > 250


@pytest.mark.parametrize(("part", "size"), [("train", 16), ("test", 16), ("test", 31), ("train", 50)])
def test_patches_are_the_photographs_at_their_places(part, size):
    """Row by row; training patches end before the border, test patches begin at it: no pixel is in both parts."""
    patches = data.patches(part, size).images
    step, columns = (4, range(0, BORDER - size + 1, 4)) if part == "train" else (size, range(BORDER, 641 - size, size))
    expected = [
        photograph[row : row + size, column : column + size]
        for photograph in sklearn.datasets.load_sample_images().images
        for row in range(0, 427 - size + 1, step)
        for column in columns
    ]
    assert torch.equal(patches, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))


def test_patches_have_a_default_part_and_size():
    assert data.patches().images.shape == (26_780, 3, 16, 16)


@pytest.mark.parametrize("part", ["all", "validation"])
def test_patches_part_error(part):
    with pytest.raises(ValueError, match=f'^part: expected "train" or "test", got \'{part}\'$'):
        data.patches(part)


@pytest.mark.parametrize("size", [3, 65, 0, -16])
def test_patches_size_error(size):
    with pytest.raises(ValueError, match=f"^size: expected 4 to 64, got {size}$"):
        data.patches("train", size)


# --- MNIST, without the real files ------------------------------------------------------------------------------------


def write_mnist(folder, part: str, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Images and labels in the format of the original files: a header of big-endian integers, then bytes."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, magic, values in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
        header = struct.pack(f">{1 + values.dim()}i", magic, *values.shape)
        (raw / f"{part}-{name}-ubyte").write_bytes(header + values.to(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("by_variable", [True, False])
def test_mnist_reads_the_raw_files(tmp_path, monkeypatch, by_variable):
    torch.manual_seed(0)
    sets = {}
    for part, file, n in (("train", "train", 7), ("test", "t10k", 3)):
        sets[part] = torch.randint(256, (n, 28, 28), dtype=torch.uint8), torch.randint(10, (n,))
        write_mnist(tmp_path, file, *sets[part])
    monkeypatch.setenv("NFLOWS_DATA", str(tmp_path if by_variable else tmp_path / "elsewhere"))
    for part, (images, labels) in sets.items():
        found = data.mnist(part) if by_variable else data.mnist(part, tmp_path)
        assert torch.equal(found.images, images[:, None])
        assert torch.equal(found.labels, labels)
        assert (found.images.dtype, found.labels.dtype, found.levels) == (torch.uint8, torch.int64, 256)


def test_missing_mnist_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("NFLOWS_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        data.mnist()
    message = str(caught.value)
    for part in (str(tmp_path), 'mnist("train", download=True)', str(tmp_path / "MNIST" / "raw"), "NFLOWS_DATA"):
        assert part in message
    assert list(tmp_path.iterdir()) == []  # nothing fetched, nothing left behind


def test_mnist_part_error(tmp_path):
    with pytest.raises(ValueError, match='part: expected "train" or "test", got \'all\''):
        data.mnist("all", tmp_path)


# --- what torchvision reads besides, in small -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose files torchvision takes for the real ones."""
    for module in ("cifar", "svhn", "celeba", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5: Path(path).exists())
    return tmp_path


def save_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def plain(grey: int, width: int = 12, height: int = 9) -> np.ndarray:
    return np.full((height, width, 3), grey, np.uint8)


def assert_images(found: data.Images, shape: tuple[int, ...], labels: list[int]) -> None:
    assert found.images.shape == (len(labels), *shape)
    assert (found.images.dtype, found.labels.dtype, found.levels) == (torch.uint8, torch.int64, 256)
    assert found.images.is_contiguous()
    assert found.labels.tolist() == labels


def test_cifar10_reads_its_batches(folder):
    images = np.random.default_rng(0).integers(256, size=(12, 3, 32, 32), dtype=np.uint8)
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        batch = {"data": images[2 * i : 2 * i + 2].reshape(2, 3072), "labels": [i, 9 - i]}
        (batches / name).write_bytes(pickle.dumps(batch))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    train, test = data.cifar10("train", folder), data.cifar10("test", folder)
    assert_images(train, (3, 32, 32), [0, 9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert_images(test, (3, 32, 32), [5, 4])
    assert np.array_equal(torch.cat([train.images, test.images]), images)


def test_svhn_reads_its_files(folder):
    images = np.random.default_rng(0).integers(256, size=(3, 3, 32, 32), dtype=np.uint8)
    for part in ("train", "test"):
        y = np.array([[1], [10], [9]], np.uint8)  # 10 stands for the digit 0
        scipy.io.savemat(folder / f"{part}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": y})
        found = data.svhn(part, folder)
        assert_images(found, (3, 32, 32), [1, 0, 9])
        assert np.array_equal(found.images, images)


def test_celeba_reads_its_parts(folder):
    lists = folder / "celeba"
    for i in range(5):
        save_picture(lists / "img_align_celeba" / f"{i}.jpg", plain(50 * i, 178, 218))
    for name, header in (("list_attr_celeba", "2\na b\n"), ("list_bbox_celeba", "2\na b\n"), ("identity_CelebA", "")):
        (lists / f"{name}.txt").write_text(header + "".join(f"{i}.jpg 1 -1\n" for i in range(5)))
    (lists / "list_landmarks_align_celeba.txt").write_text((lists / "list_bbox_celeba.txt").read_text())
    (lists / "list_eval_partition.txt").write_text("0.jpg 0\n1.jpg 2\n2.jpg 1\n3.jpg 0\n4.jpg 2\n")
    train = data.celeba("train", folder, size=8)
    assert_images(train, (3, 8, 8), [0, 0])
    assert train.images[:, 0, 0, 0].tolist() == [0, 150]
    assert data.celeba("test", folder).images.unique().tolist() == [50, 200]


def test_flowers102_reads_its_parts(folder):
    place = folder / "flowers-102"
    for i in range(1, 5):
        save_picture(place / "jpg" / f"image_{i:05d}.jpg", plain(60 * i))
    scipy.io.savemat(place / "imagelabels.mat", {"labels": np.array([[102, 7, 7, 1]])})
    scipy.io.savemat(place / "setid.mat", {"trnid": [[1, 2]], "valid": [[4, 3]], "tstid": [[3, 1]]})
    train = data.flowers102("train", folder, size=8)
    assert_images(train, (3, 8, 8), [0, 6, 6, 101])
    assert train.images[:, 0, 0, 0].tolist() == [240, 180, 180, 60]
    assert_images(data.flowers102("test", folder), (3, 64, 64), [101, 6])
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        data.flowers102("test", folder, size=0)


def assert_masks(found: data.Images, n: int, size: int) -> None:
    assert (found.images.shape, found.contexts.shape) == ((n, 1, size, size), (n, 3, size, size))
    assert (found.images.dtype, found.contexts.dtype) == (torch.uint8, torch.float32)
    assert (found.labels.dtype, found.labels.shape, found.levels) == (torch.int64, (n,), 2)
    assert set(found.images.unique().tolist()) <= {0, 1}
    assert 0 <= found.contexts.min() <= found.contexts.max() <= 1


def write_pets(folder: Path, lists: dict[str, list[tuple[str, int]]]) -> None:
    """Photographs of one grey each, twice as wide as high: background left, border in the middle, a pet to the right.

    The k-th of all has the grey 20 k.
    """
    place, k = folder / "oxford-iiit-pet", 0
    for part, entries in lists.items():
        for name, _ in entries:
            save_picture(place / "images" / f"{name}.jpg", plain(20 * k, 16, 8))
            trimap = np.full((8, 16), 2, np.uint8)
            trimap[:, 4:8], trimap[:, 8:] = 3, 1
            save_picture(place / "annotations" / "trimaps" / f"{name}.png", trimap)
            k += 1
        lines = [f"{name} {label} {1 + label % 2} {label}\n" for name, label in entries]
        (place / "annotations" / f"{part}.txt").write_text("".join(lines))


def test_pets_reads_its_parts(tmp_path):
    """1 on the pet and on its border; squashed, not cut."""
    write_pets(
        tmp_path,
        {"trainval": [("Abyssinian_10", 1), ("yorkshire_terrier_2", 37), ("beagle_3", 5)], "test": [("beagle_1", 5)]},
    )
    train, test = data.pets("train", tmp_path, size=8), data.pets("test", tmp_path)
    assert_masks(train, 3, 8)
    assert_masks(test, 1, 32)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 36, 4], [4])
    assert torch.equal(train.images, torch.tensor([0, 0, 1, 1, 1, 1, 1, 1], dtype=torch.uint8).expand(3, 1, 8, 8))
    greys = (255 * train.contexts).flatten(1)
    assert (greys - torch.tensor([[0.0], [20.0], [40.0]])).abs().max() < 3
    assert (255 * test.contexts - 60).abs().max() < 3
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        data.pets("test", tmp_path, size=0)


@pytest.mark.parametrize(
    ("name", "place", "size"),
    [
        ("pets", "oxford-iiit-pet", "800 MB"),
        ("cifar10", "cifar-10-batches-py", "170 MB"),
        ("svhn", "", "64 MB"),
        ("celeba", "celeba", "1.4 GB"),
        ("flowers102", "flowers-102", "345 MB"),
    ],
)
def test_a_missing_set_says_where_and_how(tmp_path, name, place, size):
    read = getattr(data, name)
    with pytest.raises(FileNotFoundError) as caught:
        read("test", tmp_path)
    for part in (f'{name}("test", download=True)', f" {tmp_path / place},", size, "NFLOWS_DATA"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match='part: expected "train" or "test", got \'all\''):
        read("all", tmp_path)


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    def download(self) -> None:
        raise RuntimeError("the connection broke")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    with pytest.raises(RuntimeError, match="the connection broke"):
        data.cifar10(folder=tmp_path, download=True)


# --- horses -----------------------------------------------------------------------------------------------------------


def save_horse(folder: Path, name: str, grey: int, mask: str = "1.png", mode: str = "L", right: int = 6) -> None:
    """A photograph of one grey, 12x9, and a mask, 24x18, that is bright in twice so many columns to the right."""
    save_picture(folder / "weizmann_horse_db" / "horse" / name, plain(grey))
    pixels = np.zeros((18, 24), np.uint8)
    pixels[:, 24 - 2 * right :] = 255
    path = folder / "weizmann_horse_db" / "mask" / Path(name).with_suffix(Path(mask).suffix).name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


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
    """Two of the test set that are each other's twins stay; so does what is in the training set twice."""
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
    """Of 24 columns the last 10 are bright, or the last 14: of the middle 8 two, or six."""
    save_horse(tmp_path, "1.png", 0, right=5)
    assert segmentation.horses("all", tmp_path, size=3).images[0, 0, 0].tolist() == [0, 0, 1]
    save_horse(tmp_path, "1.png", 0, right=7)
    assert segmentation.horses("all", tmp_path, size=3).images[0, 0, 0].tolist() == [0, 1, 1]


def test_horses_are_squashed_and_not_cut(tmp_path):
    """A photograph brighter from left to right and from top to bottom, of another size than its mask."""
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


def test_masks_with_nothing_bright_in_them_are_named(tmp_path):
    """As masks of 0 and 1 would be: they would all be empty."""
    save_horse(tmp_path, "1.png", 100)
    path = tmp_path / "weizmann_horse_db" / "mask" / "1.png"
    Image.fromarray(np.array(Image.open(path)) // 255).save(path)
    with pytest.raises(ValueError, match=r"^folder: expected masks that are bright, 255, on what they show"):
        segmentation.horses("all", tmp_path, size=8)


# --- a folder of images -----------------------------------------------------------------------------------------------


def test_image_folder_numbers_its_classes_and_sorts(tmp_path):
    for grey, name in enumerate(["b/2.png", "b/10.PNG", "a/x/1.webp", "a/1.bmp", "c/1.JPEG", "c/0.jpg"]):
        save_picture(tmp_path / name, plain(40 * grey))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "0").mkdir()  # holds none, so it is no class
    found = data.image_folder(tmp_path, 8, "all")
    assert_images(found, (3, 8, 8), [0, 0, 1, 1, 2, 2])
    assert found.images[:, 0, 0, 0].tolist() == [120, 80, 40, 0, 200, 160]


def test_image_folder_without_classes(tmp_path):
    for i in range(13):
        save_picture(tmp_path / f"{i:02d}.png", plain(i))
    assert_images(data.image_folder(str(tmp_path), 4, "all"), (3, 4, 4), [0] * 13)
    assert data.image_folder(tmp_path, 4, "test").images[:, 0, 0, 0].tolist() == [5, 11]
    assert data.image_folder(tmp_path, 4).images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12]


@pytest.mark.parametrize("upright", [True, False])
def test_images_keep_their_middle(tmp_path, upright):
    """A ramp of 100 columns and 40 rows: of 30 columns to the left and to the right nothing is left."""
    ramp = np.tile(np.arange(100, dtype=np.uint8), (40, 1))
    save_picture(tmp_path / "1.png", ramp.T if upright else ramp)
    image = data.image_folder(tmp_path, 4, "all").images[0].float()
    image = image.mT if upright else image
    assert (image - (34.5 + 10 * torch.arange(4))).abs().max() <= 0.5


def test_images_are_averaged_as_they_shrink(tmp_path):
    save_picture(tmp_path / "1.png", np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255)  # a fine chequerboard
    image = data.image_folder(tmp_path, 8, "all").images.int()
    assert ((image - 127).abs() < 10).all()


def test_images_of_a_turned_camera_stand_upright(tmp_path):
    pixels = plain(0, 8, 8)
    pixels[:, :4] = 255  # left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes above
    Image.fromarray(pixels).save(tmp_path / "1.png", exif=exif)
    image = data.image_folder(tmp_path, 8, "all").images[0]
    assert image[:, :4].eq(255).all() and image[:, 4:].eq(0).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    Image.fromarray(plain(255)).convert(mode).save(tmp_path / ("1.jpg" if mode == "CMYK" else "1.png"))
    found = data.image_folder(tmp_path, 4, "all")
    assert_images(found, (3, 4, 4), [0])
    assert (found.images > 250).all()


def test_image_folder_errors(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"folder: expected one with images \(.jpg, .*nowhere, which is no folder"
    ):
        data.image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"got {tmp_path}, which holds none"):
        data.image_folder(tmp_path)
    save_picture(tmp_path / "1.png", plain(0))
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        data.image_folder(tmp_path, 0)
    with pytest.raises(ValueError, match='part: expected "train", "test" or "all", got \'validation\''):
        data.image_folder(tmp_path, 8, "validation")


@pytest.mark.parametrize("broken", ["empty", "truncated", "garbled"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, broken):
    save_picture(tmp_path / "1.png", plain(0))
    path = tmp_path / "2.png"
    save_picture(path, np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))
    whole = path.read_bytes()
    garbled = whole.replace(b"IDAT", b"\0\0\0\0")
    path.write_bytes({"empty": b"", "truncated": whole[:2000], "garbled": garbled}[broken])
    with pytest.raises(ValueError, match=f"folder: expected images that can be read, got {path}: "):
        data.image_folder(tmp_path, 8, "all")


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_random_flip_mirrors_half_of_the_images(dtype):
    torch.manual_seed(0)
    x = torch.randint(256, (1000, 3, 2, 5)).to(dtype)
    before = x.clone()
    flipped = data.random_flip(x)
    assert flipped.dtype == dtype
    assert torch.equal(x, before)
    same = (flipped == x).flatten(1).all(1)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert binomtest(int(mirrored.sum()), 1000).pvalue > FIVE_SIGMA
    assert not torch.equal(data.random_flip(x), flipped)


def test_random_flip_shape_error():
    with pytest.raises(ValueError, match=r"x: expected shape \(B, C, H, W\), got \(2, 784\)"):
        data.random_flip(torch.zeros(2, 784))


# --- the same view of two ---------------------------------------------------------------------------------------------


def view(masks: torch.Tensor, photographs: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return segmentation.random_view(masks, photographs)


def blobs(n: int, size: int) -> torch.Tensor:
    """Masks of a half disc around the middle, which no turn and no mirror maps to itself: (n, 1, size, size)."""
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
    """The mask itself as photograph, at another size, too: where it is bright is where the mask is."""
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
    """Centre of each mask in [-1/2, 1/2], (N, 2), x first, and the share that is 1."""
    size = masks.shape[-1]
    axis = (torch.arange(size) + 0.5) / size - 0.5
    m = masks[:, 0].float()
    total = m.sum((1, 2))
    return torch.stack([(m * axis).sum((1, 2)), (m * axis[:, None]).sum((1, 2))], 1) / total[:, None], total / size**2


def test_views_are_mirrored_half_of_the_time():
    """What lay to the right then lies to the left: no turn by 0.2 does that."""
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
    """By a tenth of the size, by 0.2 and from 1 / 1.1 to 1 / 0.75, as far as a bar of many pixels tells."""
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
    """Grey a becomes (a - 1/2) c + 1/2 + l, the same all over a photograph, for the same c and l in all its pixels."""
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
    """Nothing that the image does not hold comes into sight: one value stays one value."""
    seen, shown = view(torch.ones(50, 1, 8, 8, dtype=torch.uint8), torch.full((50, 3, 8, 8), 0.5))
    assert seen.eq(1).all()
    assert (shown - shown[:, :1, :1, :1]).abs().max() < 1e-6
