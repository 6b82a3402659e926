"""Photographs for long runs: house numbers, faces and flowers from torchvision, and folders of your own images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, compress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nflows_lib.bijection import check_positive
from nflows_lib.data import Images, every_sixth, torchvision_set

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # the files that image_folder reads


def svhn(part: str = "train", folder: Path | str | None = None, download: bool = False) -> Images:
    """SVHN through torchvision: 32x32 photographs of house numbers, 73,257 to train on and 26,032 to test.

    Arguments and errors are those of :func:`nflows_lib.data.mnist`. A download takes 180 MB for the training images and
    64 MB for the test images; each part has its own call.
    """
    size = "180 MB to train on, 64 MB to test"
    found = torchvision_set("SVHN", size, f"{part}_32x32.mat", "", part, folder, download, split=part)
    return Images(torch.from_numpy(found.data).contiguous(), torch.from_numpy(found.labels), levels=256)


def celeba(part: str = "train", folder: Path | str | None = None, download: bool = False, *, size: int = 64) -> Images:
    """CelebA through torchvision: faces of celebrities, 162,770 to train on and 19,962 to test; all labels are 0.

    The square in the middle of each aligned image (178x218) is resized. That takes some minutes and, at size 64, 2 GB
    of memory. The other arguments and errors are those of :func:`nflows_lib.data.mnist`. A download takes 1.4 GB and
    needs the package gdown.

    Args:
        size: height and width to resize to.

    Raises:
        ValueError: if size is below 1.
    """
    files = "img_align_celeba/ and its five lists"
    options = {"split": part, "target_transform": lambda attributes: 0}
    found = torchvision_set("CelebA", "1.4 GB", files, "celeba", part, folder, download, **options)
    return _squares(found, len(found), size)


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
        ValueError: if size is below 1.
    """
    files = "jpg/, imagelabels.mat and setid.mat"
    found = [
        torchvision_set("Flowers102", "345 MB", files, "flowers-102", part, folder, download, split=split)
        for split in (("val", "test") if part == "train" else ("train",))
    ]
    return _squares(chain.from_iterable(found), sum(map(len, found)), size)


def image_folder(folder: Path | str, size: int = 64, part: str = "train") -> Images:
    """Images of your own, in RGB with 256 levels, in the order of their paths.

    The square in the middle of each image is resized. The folders directly inside ``folder`` are the classes, numbered
    in the order of their names. Images that are in none of these folders form the first class.

    Args:
        folder: the folder that holds the images, at any depth.
        size: height and width to resize to.
        part: "train", "test" (every sixth image) or "all".

    Raises:
        ValueError: if part is another word, if size is below 1, or if an image cannot be read.
        FileNotFoundError: if the folder does not exist or holds no image.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        got = "which holds no image" if folder.is_dir() else "which is not a folder"
        raise FileNotFoundError(f"folder: expected a folder with images ({', '.join(SUFFIXES)}), got {folder}, {got}")
    classes = [path.relative_to(folder).parts[:-1][:1] for path in paths]
    number = {name: i for i, name in enumerate(sorted(set(classes)))}
    keep = every_sixth(len(paths), part)

    def pictures() -> Iterator[tuple[Image.Image, int]]:
        for path, name in compress(zip(paths, classes, strict=True), keep):
            try:
                yield Image.open(path).convert("RGB"), number[name]
            except (OSError, SyntaxError) as error:  # pillow raises a SyntaxError for a broken PNG
                raise ValueError(f"folder: expected images that can be read, got {path}: {error}") from error

    return _squares(pictures(), keep.sum().item(), size)


def random_flip(x: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2: (B, C, H, W) to the same shape.

    Raises:
        ValueError: if x has another number of dimensions than four.
    """
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, C, H, W), got {tuple(x.shape)}")
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)


def _squares(pictures: Iterable[tuple[Image.Image, int]], n: int, size: int) -> Images:
    """n pictures with labels as one tensor: the square in the middle of each picture, resized with antialiasing."""
    check_positive(size=size)
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)  # filled in place: a list would take twice the memory
    labels = torch.empty(n, dtype=torch.int64)
    for i, (picture, label) in enumerate(pictures):
        square = ImageOps.fit(ImageOps.exif_transpose(picture), (size, size), Image.Resampling.BICUBIC)
        images[i] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        labels[i] = label
    return Images(images, labels, levels=256)
