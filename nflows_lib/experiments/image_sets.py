"""Photographs for long runs: house numbers, faces and flowers from torchvision, and folders of your own images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nflows_lib.checks import check_at_least, check_tensor
from nflows_lib.data import Images, every_sixth, torchvision_set

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # the files that image_folder reads


def svhn(part: str = "train", folder: Path | str | None = None, download: bool = False) -> Images:
    """SVHN through torchvision: 32x32 photographs of house numbers, 73,257 to train on and 26,032 to test.

    Arguments and errors are those of :func:`nflows_lib.data.mnist`. A download takes 180 MB for the training images and
    64 MB for the test images; each part has its own call.
    """
    size, files = "180 MB to train on, 64 MB to test", {f"{part}_32x32.mat": None}
    found = torchvision_set("SVHN", size, files, part, folder, download, split=part)
    return Images(torch.from_numpy(found.data).contiguous(), torch.from_numpy(found.labels), levels=256)


def celeba(part: str = "train", folder: Path | str | None = None, download: bool = False, *, size: int = 64) -> Images:
    """CelebA through torchvision: faces of celebrities, 162,770 to train on and 19,962 to test; all labels are 0.

    The square in the middle of each aligned image (178x218) is resized. That takes some minutes and, at size 64, 2 GB
    of memory. The other arguments and errors are those of :func:`nflows_lib.data.mnist`. A download takes 1.4 GB and
    needs the package gdown.

    Args:
        size: height and width to resize to.

    Raises:
        ValueError: if size is below 1, or if an image cannot be read.
    """
    lists = ("list_attr_celeba", "identity_CelebA", "list_bbox_celeba", "list_landmarks_align_celeba")
    names = ("img_align_celeba", *(f"{name}.txt" for name in (*lists, "list_eval_partition")))
    files = {f"celeba/{name}": None for name in names}
    options = {"split": part, "target_transform": lambda attributes: 0}
    found = torchvision_set("CelebA", "1.4 GB", files, part, folder, download, **options)
    return _squares(_pictures_of(found), len(found), size)


def flowers102(
    part: str = "train", folder: Path | str | None = None, download: bool = False, *, size: int = 64
) -> Images:
    """Flowers-102 of Oxford through torchvision: photographs of 102 kinds, 7,169 to train on and 1,020 to test.

    The published split has ten photographs of each kind to train a classifier, ten to validate it, and 6,149 to test
    it. A density needs many examples. So here the training part is the published validation part followed by the
    published test part, and the test part is the published training part. The square in the middle of each photograph
    is resized. The other arguments and errors are those of :func:`nflows_lib.data.mnist`. A download takes 345 MB.

    Args:
        size: height and width to resize to.

    Raises:
        ValueError: if size is below 1, or if an image cannot be read.
    """
    files = {f"flowers-102/{name}": None for name in ("jpg", "imagelabels.mat", "setid.mat")}
    found = [
        torchvision_set("Flowers102", "345 MB", files, part, folder, download, split=split)
        for split in (("val", "test") if part == "train" else ("train",))
    ]
    return _squares(chain.from_iterable(map(_pictures_of, found)), sum(map(len, found)), size)


def image_folder(folder: Path | str, size: int = 64, part: str = "train") -> Images:
    """Images of your own, in RGB with 256 levels, in the order of their paths.

    The square in the middle of each image is resized. The folders directly inside ``folder`` are the classes, numbered
    in the order of their names. Images that are in none of these folders form the first class. :func:`picture_files`
    says which files are images, and :func:`read_picture` how they are read.

    Args:
        folder: the folder that holds the images, at any depth.
        size: height and width to resize to.
        part: "train", "test" (every sixth image) or "all".

    Raises:
        ValueError: if part is another word, if size is below 1, if an image cannot be read, or if part is "test" and
            there are fewer than six images.
        FileNotFoundError: if the folder does not exist or holds no image.
    """
    folder = Path(folder)
    paths = picture_files(folder.rglob("*"))
    if not paths:
        got = "which holds no image" if folder.is_dir() else "which is not a folder"
        raise FileNotFoundError(f"folder: expected a folder with images ({', '.join(SUFFIXES)}), got {folder}, {got}")
    classes = [path.relative_to(folder).parts[:-1][:1] for path in paths]
    number = {name: i for i, name in enumerate(sorted(set(classes)))}
    keep = every_sixth(len(paths), part)

    pictures = ((read_picture(path), number[name]) for path, name in compress(zip(paths, classes, strict=True), keep))
    return _squares(pictures, keep.sum().item(), size)


def picture_files(paths: Iterable[Path]) -> list[Path]:
    """The paths of images in the order of their names: files with a suffix out of ``SUFFIXES``.

    Files whose names begin with ``._`` are left out: macOS writes them next to the files of other file systems.
    """
    return sorted(
        path for path in paths if path.suffix.lower() in SUFFIXES and path.name[:2] != "._" and path.is_file()
    )


def read_picture(path: Path) -> Image.Image:
    """The image in a file, in RGB with 256 levels.

    Grey integers of 16 bits are scaled, so that 65,535 becomes 255, and so are grey floats in [0, 1]. Pillow would clip
    both. Images of up to 178,956,970 pixels are read; Pillow refuses larger ones.

    Raises:
        ValueError: if the file cannot be read as an image, or if its grey values are outside of these ranges; the
            message names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from half of Pillow's largest size on
            image = Image.open(path)
        if image.mode == "F" or image.mode.startswith("I"):
            image, most = (image, 1) if image.mode == "F" else (image.convert("I"), 65_535)
            low, high = image.getextrema()
            if not 0 <= low <= high <= most:
                raise ValueError(f"expected grey values from 0 to {most:,}, got {low:g} to {high:g}")
            image = image.point(lambda value: value * (255 / most) + 0.5)
        return image.convert("RGB")
    except Exception as error:  # for a broken file Pillow raises errors of many kinds
        raise ValueError(f"folder: expected images that can be read, got {path}: {error}") from error


def random_flip(x: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2: (B, C, H, W) to the same shape.

    Raises:
        ValueError: if x has another number of dimensions than four.
    """
    check_tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, C, H, W), got {tuple(x.shape)}")
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)


def _pictures_of(found: Any) -> Iterator[tuple[Image.Image, int]]:
    """The images and labels of one of torchvision's data sets, which reads a file when its image is asked for."""
    for i in range(len(found)):
        try:
            picture, label = found[i]
            picture.load()
        except Exception as error:  # as in read_picture
            got = f"image {i} of {type(found).__name__} in {found.root}"
            raise ValueError(f"folder: expected images that can be read, got {got}: {error}") from error
        yield picture, label


def _squares(pictures: Iterable[tuple[Image.Image, int]], n: int, size: int) -> Images:
    """n pictures with labels as one tensor: the square in the middle of each picture, resized with antialiasing."""
    check_at_least(1, size=size)
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)  # filled in place: a list would take twice the memory
    labels = torch.empty(n, dtype=torch.int64)
    for i, (picture, label) in enumerate(pictures):
        square = ImageOps.fit(ImageOps.exif_transpose(picture), (size, size), Image.Resampling.BICUBIC)
        images[i] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        labels[i] = label
    return Images(images, labels, levels=256)
