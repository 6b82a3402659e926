"""Tests of flows on images: whether neighbouring pixels stay together, and whether the channels are mixed."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from nflows_lib.clinic.examination import Case, Record, jacobian
from nflows_lib.clinic.registry import Finding, doctors_test


@doctors_test("mixing", finds=["F17", "F22", "F23"])
def mixing(case: Case) -> Finding:
    """Whether squeezes keep neighbours together, channels are mixed, and couplings see a position's other channels."""
    images = [r for r in case.woken_pass.leaves if r.x.dim() == 4 and r.x.is_floating_point() and r is not case.noise]
    moved = [(record, source) for record in images if not record.learned and (source := _sources(record)) is not None]
    squeezes = [(record, source) for record, source in moved if source.shape != record.x.shape[1:]]
    for record, source in squeezes:
        if _torn(source, tuple(record.x.shape[1:])):
            measured = f"{record.title} puts pixels together that are not neighbours"
            return Finding(False, measured, "a plain reshape is not a squeeze: use pixel_unshuffle", "F17")
    mixed, sees = set(), {}  # shapes with a learned matrix; by shape, whether a coupling sees a position's channels
    for record in images:
        shape = tuple(record.x.shape[1:])
        if record.learned and record.x.shape == record.z.shape and min(shape[1:]) >= 2:
            across, elsewhere = _effects(record)
            if elsewhere:
                sees[shape] = sees.get(shape, False) or across
            elif across:
                mixed.add(shape)
    fixed = Counter(
        tuple(source.shape)
        for record, source in moved
        if source.shape == record.x.shape[1:] and not torch.equal(source.flatten(), torch.arange(source.numel()))
    )
    fixed = {shape: n for shape, n in fixed.items() if n > 1 and shape[0] > 2 and shape not in mixed}
    if fixed:
        shape, n = next(iter(fixed.items()))
        measured = f"{n} fixed permutations, and no learned one, mix {shape[0]} channels"
        return Finding(False, measured, "learn the mixing: put 1x1 convolutions between the couplings", "F22")
    if squeezes and not all(sees.get(shape, True) for shape in mixed):
        measured = "no coupling changes a channel by the other channels of its position"
        return Finding(False, measured, "checkerboard masks after a squeeze: split the channels instead", "F23")
    if not images:
        return Finding(None, "no layer works on images")
    return Finding(True, "squeezes and the mixing of channels are in order")


def _sources(record: Record) -> Tensor | None:
    """The index, in the flat input, of each number of a layer's output; None if the layer also changes values."""
    numbers = torch.arange(record.x[0].numel(), dtype=torch.float64)
    try:
        z = record.again(numbers.view(1, *record.x.shape[1:]))[0][0]
    except ValueError:  # the layer checks its values
        return None
    return z.long() if z.dim() == 3 and torch.equal(z.flatten().sort().values, numbers) else None


def _torn(source: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether pixels that a squeeze puts into one position were farther apart than the factor by which it shrinks."""
    rows, columns = source % (shape[1] * shape[2]) // shape[2], source % shape[2]
    spans = [(side.amax(0) - side.amin(0)).max().item() + 1 for side in (rows, columns)]
    return spans[0] > shape[1] // source.shape[1] or spans[1] > shape[2] // source.shape[2]


def _effects(record: Record) -> tuple[bool, bool]:
    """Whether a channel depends on other channels of its position, and whether on other positions.

    Two neighbouring positions are asked, since a checkerboard mask leaves every second one unchanged.
    """
    across = elsewhere = False
    for column in (0, 1):
        J = jacobian(lambda v, c=column: record.alone().again(v)[0][:, :, 1, c], record.x[:1]).abs()
        J = J.view(-1, *record.x.shape[1:])  # (channel of z, channel, row, column of x)
        here = J[:, :, 1, column].clone()
        J[:, :, 1, column] = 0
        across |= bool((here - here.diagonal().diag()).any())
        elsewhere |= bool(J.any())
    return across, elsewhere
