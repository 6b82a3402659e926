"""Checkpoints: tensors and facts in one file, written whole or not at all, as safetensors with JSON in its header."""

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
    """A checkpoint cannot be written or read; the message says why, and which checkpoint is left."""


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write tensors and facts (anything that JSON can hold) to a file.

    The file is first written under another name and forced to the disk; only then does it replace an older file, which
    moves to ``previous`` if that path is given. A kill or a power cut at any moment leaves the old file (in its place
    or as ``previous``) or the new one, never half a file.

    Raises:
        CheckpointError: if the disk is full or the folder cannot be written to. An older file stays as it was.
    """
    partial = path.with_name(path.name + ".partial")
    # Copies, since the format refuses tensors that share memory, such as a mask that two layers use.
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
        with contextlib.suppress(OSError):  # a second error must not hide the first
            partial.unlink()
        kept = f"; the last good one, {path.name}, is as it was" if path.exists() else ""
        raise CheckpointError(
            f"{path.name}: cannot write {len(data) / 2**20:.1f} MiB to {path.parent}: {error.strerror or error}{kept}"
        ) from error


def load_facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint, without its tensors; raises what :func:`load` raises."""
    return _read(path, with_tensors=False)[1]


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the facts of a checkpoint.

    Raises:
        FileNotFoundError: if the file does not exist.
        CheckpointError: if the file is truncated or is not a checkpoint.
    """
    return _read(path, with_tensors=True)


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = Path(path)
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
            f"{path}: expected a whole checkpoint, got {size:,} bytes that cannot be read as one ({error})"
        ) from error


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module's parameters and buffers.

    :func:`unmasked` first cuts tensors that an earlier version wrote for couplings on vectors. ``source`` is what an
    error message calls the tensors.

    Raises:
        CheckpointError: if a name or a shape is not the module's. The module stays as it was.
    """
    own, tensors = module.state_dict(), unmasked(module, tensors)
    for name in sorted(own.keys() | tensors.keys()):
        ours, theirs = (tuple(side[name].shape) if name in side else None for side in (own, tensors))
        if ours != theirs:
            expected = f"no tensor {name}" if ours is None else f"{name} with shape {ours}"
            got = "no such tensor" if theirs is None else f"shape {theirs}"
            raise CheckpointError(f"{source}: another model's: expected {expected}, got {got}")
    module.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})


def unmasked(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the rows and columns that the masks of earlier versions made useless.

    In earlier versions a coupling on vectors gave its network b x instead of the unchanged half of x, and masked the
    network's output. So the first matrix had columns that only met zeros, and the last matrix and bias had rows whose
    output was dropped. Without these rows and columns the function is the same, and so is its training, since their
    gradients were 0. Other tensors stay as they are.

    Args:
        module: the model.
        tensors: the model's parameters and buffers, or an optimizer's moments under the parameters' names.
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
    """The tensors with matrices and kernels in half precision; vectors (scales, biases) keep their precision."""
    return {
        name: tensor.half() if tensor.dtype == torch.float32 and tensor.dim() > 1 else tensor
        for name, tensor in tensors.items()
    }
