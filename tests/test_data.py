"""Data sets: shapes, ranges, splits, repeatability, and the errors of what is not there."""

from __future__ import annotations

import math
import struct

import pytest
import sklearn.datasets
import torch
from densities import assert_samples_follow, integral

from nflows_lib import data

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
    for part in (str(tmp_path), "mnist(download=True)", str(tmp_path / "MNIST" / "raw"), "NFLOWS_DATA"):
        assert part in message
    assert list(tmp_path.iterdir()) == []  # nothing fetched, nothing left behind


def test_mnist_part_error(tmp_path):
    with pytest.raises(ValueError, match='part: expected "train" or "test", got \'all\''):
        data.mnist("all", tmp_path)
