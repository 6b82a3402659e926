"""Tests of data sets: shapes, ranges, splits, repeatability, and errors for missing files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.datasets
import torch
from densities import FIVE_SIGMA, assert_samples_follow, integral, midpoints
from PIL import Image
from scipy.stats import binomtest
from sets import (
    accept_small_files,
    assert_images,
    noise,
    plain,
    save_picture,
    write_celeba,
    write_cifar10,
    write_flowers102,
    write_mnist,
    write_svhn,
)

from nflows_lib import data
from nflows_lib.experiments import image_sets

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
    """The points are centred, and their size suits a standard base density."""
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
    assert not torch.equal(data.toy(name, 50), draws[2])  # a second call draws other points


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
    """At one of two means, the other mean is 4 / 0.5 = 8 standard deviations away."""
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
    """The images are replaced by their numbers: the parts follow one order, and their union is the whole set."""
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
    """Patches go row by row; training patches end before the border, test patches begin at it."""
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


@pytest.mark.parametrize("by_variable", [True, False])
def test_mnist_reads_the_raw_files(tmp_path, monkeypatch, by_variable):
    torch.manual_seed(0)
    sets = {}
    for part, n in (("train", 7), ("test", 3)):
        sets[part] = torch.randint(256, (n, 28, 28), dtype=torch.uint8), torch.randint(10, (n,))
        write_mnist(tmp_path, part, *sets[part])
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
    assert list(tmp_path.iterdir()) == []  # nothing is fetched or left behind


def test_mnist_part_error(tmp_path):
    with pytest.raises(ValueError, match='part: expected "train" or "test", got \'all\''):
        data.mnist("all", tmp_path)


@pytest.mark.parametrize("cut", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("left", [0, 2, 1000])
def test_a_damaged_file_of_mnist_is_named(tmp_path, cut, left):
    """The other files have the size of the real ones; they are empty of content, so that they take no disk."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half, n in (("train", 60_000), ("t10k", 10_000)):
        for kind, header in (("images-idx3", [0x803, n, 28, 28]), ("labels-idx1", [0x801, n])):
            with open(raw / f"{half}-{kind}-ubyte", "wb") as file:
                file.write(np.array(header, ">i4").tobytes())
                file.truncate(4 * len(header) + math.prod(header[1:]))
    assert data.mnist("train", tmp_path).images.shape == (60_000, 1, 28, 28)
    with open(raw / cut, "r+b") as file:
        file.truncate(left)
    with pytest.raises(ValueError, match=f"^folder: expected whole MNIST files, got {cut} damaged in {raw}"):
        data.mnist("train", tmp_path)


def test_damaged_files_of_cifar10_are_named(tmp_path):
    write_cifar10(tmp_path, noise(12, (3, 32, 32)), [0] * 12)  # far smaller than the real ones
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(bytes(158))
    with pytest.raises(ValueError, match=r"whole CIFAR10 files, got data_batch_1 or .* or test_batch damaged in .*py"):
        data.cifar10("test", tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="no CIFAR10 in"):
        data.cifar10("test", tmp_path)


def test_a_damaged_file_of_svhn_is_named(tmp_path):
    (tmp_path / "test_32x32.mat").write_bytes(bytes(10))
    with pytest.raises(ValueError, match=r"^folder: expected whole SVHN files, got test_32x32.mat damaged in"):
        image_sets.svhn("test", tmp_path)


# --- what else torchvision reads, in small ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose files torchvision accepts as the real ones."""
    accept_small_files(monkeypatch)
    return tmp_path


def test_cifar10_reads_its_batches(folder):
    images = noise(12, (3, 32, 32))
    write_cifar10(folder, images, [0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 5, 4])
    train, test = data.cifar10("train", folder), data.cifar10("test", folder)
    assert_images(train, (3, 32, 32), [0, 9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert_images(test, (3, 32, 32), [5, 4])
    assert np.array_equal(torch.cat([train.images, test.images]), images)


def test_svhn_reads_its_files(folder):
    for seed, part in enumerate(("train", "test")):
        images = noise(3, (3, 32, 32), seed)
        write_svhn(folder, part, images, [1, 0, 9])
        found = image_sets.svhn(part, folder)
        assert_images(found, (3, 32, 32), [1, 0, 9])
        assert np.array_equal(found.images, images)


def test_celeba_reads_its_parts(folder):
    write_celeba(folder, [0, 50, 100, 150, 200], [0, 2, 1, 0, 2])
    train = image_sets.celeba("train", folder, size=8)
    assert_images(train, (3, 8, 8), [0, 0])
    assert train.images[:, 0, 0, 0].tolist() == [0, 150]
    assert image_sets.celeba("test", folder).images.unique().tolist() == [50, 200]


def test_flowers102_reads_its_parts(folder):
    write_flowers102(folder, [60, 120, 180, 240], [102, 7, 7, 1], trnid=[1, 2], valid=[4, 3], tstid=[3, 1])
    train = image_sets.flowers102("train", folder, size=8)
    assert_images(train, (3, 8, 8), [0, 6, 6, 101])
    assert train.images[:, 0, 0, 0].tolist() == [240, 180, 180, 60]
    assert_images(image_sets.flowers102("test", folder), (3, 64, 64), [101, 6])
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        image_sets.flowers102("test", folder, size=0)


@pytest.mark.parametrize(
    ("name", "place", "size"),
    [
        ("cifar10", "cifar-10-batches-py", "170 MB"),
        ("svhn", "", "64 MB"),
        ("celeba", "celeba", "1.4 GB"),
        ("flowers102", "flowers-102", "345 MB"),
    ],
)
def test_a_missing_set_says_where_and_how(tmp_path, name, place, size):
    read = getattr(data if name == "cifar10" else image_sets, name)
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


# --- a folder of images -----------------------------------------------------------------------------------------------


def test_image_folder_numbers_its_classes_and_sorts(tmp_path):
    for grey, name in enumerate(["b/2.png", "b/10.PNG", "a/x/1.webp", "a/1.bmp", "c/1.JPEG", "c/0.jpg"]):
        save_picture(tmp_path / name, plain(40 * grey))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "0").mkdir()  # holds no image, so it is not a class
    found = image_sets.image_folder(tmp_path, 8, "all")
    assert_images(found, (3, 8, 8), [0, 0, 1, 1, 2, 2])
    assert found.images[:, 0, 0, 0].tolist() == [120, 80, 40, 0, 200, 160]


def test_image_folder_without_classes(tmp_path):
    for i in range(13):
        save_picture(tmp_path / f"{i:02d}.png", plain(i))
    assert_images(image_sets.image_folder(str(tmp_path), 4, "all"), (3, 4, 4), [0] * 13)
    assert image_sets.image_folder(tmp_path, 4, "test").images[:, 0, 0, 0].tolist() == [5, 11]
    assert image_sets.image_folder(tmp_path, 4).images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12]


@pytest.mark.parametrize("upright", [True, False])
def test_images_keep_their_middle(tmp_path, upright):
    """A ramp of 100 columns and 40 rows loses 30 columns on the left and on the right."""
    ramp = np.tile(np.arange(100, dtype=np.uint8), (40, 1))
    save_picture(tmp_path / "1.png", ramp.T if upright else ramp)
    image = image_sets.image_folder(tmp_path, 4, "all").images[0].float()
    image = image.mT if upright else image
    assert (image - (34.5 + 10 * torch.arange(4))).abs().max() <= 0.5


def test_images_are_averaged_as_they_shrink(tmp_path):
    save_picture(tmp_path / "1.png", np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255)  # a fine chequerboard
    image = image_sets.image_folder(tmp_path, 8, "all").images.int()
    assert ((image - 127).abs() < 10).all()


def test_images_of_a_turned_camera_stand_upright(tmp_path):
    pixels = plain(0, 8, 8)
    pixels[:, :4] = 255  # left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes above
    Image.fromarray(pixels).save(tmp_path / "1.png", exif=exif)
    image = image_sets.image_folder(tmp_path, 8, "all").images[0]
    assert image[:, :4].eq(255).all() and image[:, 4:].eq(0).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    Image.fromarray(plain(255)).convert(mode).save(tmp_path / ("1.jpg" if mode == "CMYK" else "1.png"))
    found = image_sets.image_folder(tmp_path, 4, "all")
    assert_images(found, (3, 4, 4), [0])
    assert (found.images > 250).all()


def test_image_folder_errors(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"folder: expected a folder with images \(.jpg, .*nowhere, which is not a folder"
    ):
        image_sets.image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"got {tmp_path}, which holds no image"):
        image_sets.image_folder(tmp_path)
    save_picture(tmp_path / "1.png", plain(0))
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        image_sets.image_folder(tmp_path, 0)
    with pytest.raises(ValueError, match='part: expected "train", "test" or "all", got \'validation\''):
        image_sets.image_folder(tmp_path, 8, "validation")


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("I;16", np.array([0, 257, 32_896, 65_535], np.uint16)),
        ("I;16B", np.array([0, 257, 32_896, 65_535], np.uint16)),
        ("I", np.array([0, 257, 32_896, 65_535], np.int32)),
        ("F", np.array([0, 1 / 255, 128 / 255, 1], np.float32)),
    ],
)
def test_grey_values_of_more_than_8_bits_are_scaled(tmp_path, mode, values):
    picture = Image.fromarray(values[None])
    (picture.convert("I").convert(mode) if mode == "I;16B" else picture).save(tmp_path / "1.tiff")
    (tmp_path / "1.tiff").rename(tmp_path / "1.png")
    with Image.open(tmp_path / "1.png") as found:
        assert found.mode == mode
    assert np.array(image_sets.read_picture(tmp_path / "1.png")).tolist() == [[[v] * 3 for v in (0, 1, 128, 255)]]


@pytest.mark.parametrize(("dtype", "high", "most"), [(np.int32, 70_000, "65,535"), (np.float32, 1.5, "1")])
def test_grey_values_out_of_range_are_named(tmp_path, dtype, high, most):
    Image.fromarray(np.array([[0, high]], dtype)).save(tmp_path / "1.tiff")
    (tmp_path / "1.tiff").rename(tmp_path / "1.png")
    with pytest.raises(ValueError, match=f"1.png: expected grey values from 0 to {most}, got 0 to {high:g}$"):
        image_sets.image_folder(tmp_path, 4, "all")


def test_what_only_looks_like_an_image_is_left_out(tmp_path):
    save_picture(tmp_path / "folder.png" / "1.png", plain(100))
    (tmp_path / "folder.png" / "._1.png").write_bytes(b"not an image, but what macOS writes next to one")
    found = image_sets.image_folder(tmp_path, 4, "all")
    assert_images(found, (3, 4, 4), [0])
    assert found.images.unique().tolist() == [100]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("most", "reads"), [(108, True), (100, True), (54, True), (53, False)])
def test_an_image_is_read_up_to_twice_the_size_that_pillow_warns_of(tmp_path, monkeypatch, most, reads):
    save_picture(tmp_path / "1.png", plain(0))  # 108 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    if reads:
        assert_images(image_sets.image_folder(tmp_path, 4, "all"), (3, 4, 4), [0])
    else:
        with pytest.raises(ValueError, match=r"folder: expected images that can be read, got .*1.png: Image size"):
            image_sets.image_folder(tmp_path, 4, "all")


@pytest.mark.parametrize("n", [1, 5])
def test_a_part_to_test_on_needs_six_images(tmp_path, n):
    for i in range(n):
        save_picture(tmp_path / f"{i}.png", plain(0))
    with pytest.raises(ValueError, match=f"^part: expected at least 6 examples, of which every sixth .*, got {n}$"):
        image_sets.image_folder(tmp_path, 4, "test")
    assert len(image_sets.image_folder(tmp_path, 4, "train").images) == n


def test_a_damaged_photograph_of_a_torchvision_set_is_numbered(folder):
    write_flowers102(folder, [60, 120], [1, 2], trnid=[1, 2], valid=[1], tstid=[2])
    path = folder / "flowers-102" / "jpg" / "image_00002.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"^folder: expected images that can be read, got image 1 of Flowers102 in "):
        image_sets.flowers102("test", folder)


@pytest.mark.parametrize("broken", ["empty", "truncated", "garbled"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, broken):
    save_picture(tmp_path / "1.png", plain(0))
    path = tmp_path / "2.png"
    save_picture(path, np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8))
    whole = path.read_bytes()
    garbled = whole.replace(b"IDAT", b"\0\0\0\0")
    path.write_bytes({"empty": b"", "truncated": whole[:2000], "garbled": garbled}[broken])
    with pytest.raises(ValueError, match=f"folder: expected images that can be read, got {path}: "):
        image_sets.image_folder(tmp_path, 8, "all")


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_random_flip_mirrors_half_of_the_images(dtype):
    torch.manual_seed(0)
    x = torch.randint(256, (1000, 3, 2, 5)).to(dtype)
    before = x.clone()
    flipped = image_sets.random_flip(x)
    assert flipped.dtype == dtype
    assert torch.equal(x, before)
    same = (flipped == x).flatten(1).all(1)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert binomtest(int(mirrored.sum()), 1000).pvalue > FIVE_SIGMA
    assert not torch.equal(image_sets.random_flip(x), flipped)


def test_random_flip_shape_error():
    with pytest.raises(ValueError, match=r"x: expected shape \(B, C, H, W\), got \(2, 784\)"):
        image_sets.random_flip(torch.zeros(2, 784))
