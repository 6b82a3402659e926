"""Tensors and facts in one file, written whole or not at all: safetensors with JSON in its header, never pickle."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nflows_lib.coupling import AdditiveCoupling, AffineCoupling
from nflows_lib.networks import MLP


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message says what is wrong and what is left."""


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write tensors and facts (anything that JSON can hold) to a file; an older one moves to ``previous``, if given.

    The file is first written beside its place and forced to the disk, and only then takes the place of an older one.
    A kill or a power cut at any moment leaves the old file (at its own place or as ``previous``) or the new one, never
    half a file.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written to. An older file is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    # Copies, since the format refuses tensors that share memory: a mask that two layers use, say.
    content = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(content, metadata={"facts": json.dumps(facts)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it must not hide the error that counts
            partial.unlink()
        kept = f"; the last good one, {path.name}, is as it was" if path.exists() else ""
        raise CheckpointError(
            f"{path.name}: cannot write {len(data) / 2**20:.1f} MiB to {path.parent}: {error.strerror or error}{kept}"
        ) from error


def load_facts(path: Path) -> dict[str, Any]:
    """Only the facts. Raises what :func:`load` does."""
    return _read(path, with_tensors=False)[1]


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors (on the CPU) and facts back.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, or no checkpoint at all.
    """
    return _read(path, with_tensors=True)


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            names = file.keys() if with_tensors else []
            return {name: file.get_tensor(name) for name in names}, facts
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: expected a whole checkpoint, got {size:,} bytes that are none ({error})"
        ) from error


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module's parameters and buffers, if names and shapes are just its own.

    Tensors of masked couplings on vectors are cut by :func:`unmasked` first.

    Raises:
        CheckpointError: they are another model's. The module is as it was.
    """
    own, tensors = module.state_dict(), unmasked(module, tensors)
    for name in sorted(own.keys() | tensors.keys()):
        ours = "none" if name not in own else f"shape {tuple(own[name].shape)}"
        theirs = "none" if name not in tensors else f"shape {tuple(tensors[name].shape)}"
        if ours != theirs:
            raise CheckpointError(f"{source}: another model's: expected {name} with {ours}, got {theirs}")
    module.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})


def unmasked(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, or moments of an optimizer under the same names, without what the masks of earlier versions hid.

    In those a coupling on vectors gave its network b x instead of the passing half, and masked the network's output. So
    the first matrix had columns that met zeros, and the last matrix and bias had rows that were dropped. Without them
    the function is the same, and so is its training, since their gradients were 0. Other tensors are left alone.
    """
    cut = dict(tensors)
    for path, layer in module.named_modules():
        if isinstance(layer, AdditiveCoupling | AffineCoupling) and isinstance(layer.network, MLP):
            prefix = f"{path}." if path else ""
            mask = tensors.get(f"{prefix}mask", layer.mask).bool().cpu()
            if mask.dim() > 1 or mask.shape != layer.mask.shape:
                continue
            weights = list(layer.network.named_parameters(f"{prefix}network"))
            columns = torch.cat([mask, mask.new_ones(layer.network.context)])
            rows = (~mask).repeat(len(weights[-1][1]) // len(layer.changing))
            for (name, own), kept, dim in ((weights[0], columns, 1), (weights[-2], rows, 0), (weights[-1], rows, 0)):
                masked_shape = (*own.shape[:dim], len(kept), *own.shape[dim + 1 :])
                if name in cut and cut[name].shape == masked_shape:
                    cut[name] = cut[name].index_select(dim, kept.nonzero().flatten())
    return cut


def halve(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices and kernels in half precision; vectors (scales, biases) as they are."""
    return {
        name: tensor.half() if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor
        for name, tensor in tensors.items()
    }
