"""Photographs that long runs read: house numbers, faces and flowers from torchvision, and folders of images."""

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

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # of the files that image_folder reads


def svhn(part: str = "train", folder: Path | str | None = None, download: bool = False) -> Images:
    """SVHN through torchvision: 32x32 photographs of house numbers, 73,257 to train on and 26,032 to test.

    Arguments and errors as of :func:`nflows_lib.data.mnist`. To fetch: 180 MB to train on, 64 MB to test, each by its
    own call.
    """
    size = "180 MB to train on, 64 MB to test"
    found = torchvision_set("SVHN", size, f"{part}_32x32.mat", "", part, folder, download, split=part)
    return Images(torch.from_numpy(found.data).contiguous(), torch.from_numpy(found.labels), levels=256)


def celeba(part: str = "train", folder: Path | str | None = None, download: bool = False, *, size: int = 64) -> Images:
    """CelebA through torchvision: faces of celebrities, 162,770 to train on and 19,962 to test; all labels are 0.

    The aligned images, 178x218: of each the square in its middle, resized. That takes some minutes and, at size 64,
    2 GB of memory. Arguments and errors as of :func:`nflows_lib.data.mnist`. To fetch: 1.4 GB, with the package gdown.

    Raises:
        ValueError: size is below 1.
    """
    files = "img_align_celeba/ and its five lists"
    options = {"split": part, "target_transform": lambda attributes: 0}
    found = torchvision_set("CelebA", "1.4 GB", files, "celeba", part, folder, download, **options)
    return _squares(found, len(found), size)


def flowers102(
    part: str = "train", folder: Path | str | None = None, download: bool = False, *, size: int = 64
) -> Images:
    """Flowers-102 of Oxford through torchvision: photographs of 102 kinds, 7,169 to train on and 1,020 to test.

    The published split trains a classifier on ten of each kind and tests it on 6,149. A density needs many examples:
    here those are trained on, with the ten of each kind for validation, which come first; the test is on the other ten.
    Of each photograph the square in its middle, resized. Arguments and errors as of :func:`nflows_lib.data.mnist`. To
    fetch: 345 MB.

    Raises:
        ValueError: size is below 1.
    """
    files = "jpg/, imagelabels.mat and setid.mat"
    found = [
        torchvision_set("Flowers102", "345 MB", files, "flowers-102", part, folder, download, split=split)
        for split in (("val", "test") if part == "train" else ("train",))
    ]
    return _squares(chain.from_iterable(found), sum(map(len, found)), size)


def image_folder(folder: Path | str, size: int = 64, part: str = "train") -> Images:
    """Images of your own, in the order of their paths, 256 levels: in RGB, of each the square in its middle, resized.

    The folders in the folder are the classes, numbered in the order of their names. Images that lie beside them, or in
    a folder without any, form a class of their own, the first.

    Args:
        folder: where they lie, at any depth.
        size: height and width to resize to.
        part: "train", "test" (every sixth), or "all".

    Raises:
        ValueError: another part, size is below 1, or an image that cannot be read.
        FileNotFoundError: no such folder, or no image in it.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        got = "which holds none" if folder.is_dir() else "which is no folder"
        raise FileNotFoundError(f"folder: expected one with images ({', '.join(SUFFIXES)}), got {folder}, {got}")
    classes = [path.relative_to(folder).parts[:-1][:1] for path in paths]
    number = {name: i for i, name in enumerate(sorted(set(classes)))}
    keep = every_sixth(len(paths), part)

    def pictures() -> Iterator[tuple[Image.Image, int]]:
        for path, name in compress(zip(paths, classes, strict=True), keep):
            try:
                yield Image.open(path).convert("RGB"), number[name]
            except (OSError, SyntaxError) as error:  # the latter is pillow's word for a broken PNG
                raise ValueError(f"folder: expected images that can be read, got {path}: {error}") from error

    return _squares(pictures(), keep.sum().item(), size)


def random_flip(x: Tensor) -> Tensor:
    """Mirror each image left to right, or leave it, with equal chances: (B, C, H, W) to the same shape.

    Raises:
        ValueError: x has another number of dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, C, H, W), got {tuple(x.shape)}")
    return torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)


def _squares(pictures: Iterable[tuple[Image.Image, int]], n: int, size: int) -> Images:
    """n pictures with labels, one tensor: of each the square in its middle, resized (antialiased)."""
    check_positive(size=size)
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)  # filled in place: a list would take it all twice
    labels = torch.empty(n, dtype=torch.int64)
    for i, (picture, label) in enumerate(pictures):
        square = ImageOps.fit(ImageOps.exif_transpose(picture), (size, size), Image.Resampling.BICUBIC)
        images[i] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        labels[i] = label
    return Images(images, labels, levels=256)
