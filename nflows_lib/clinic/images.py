"""Tests of flows on images: are neighbouring pixels kept together, and are the channels mixed?"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from nflows_lib.clinic.examination import Case, Record, jacobian
from nflows_lib.clinic.registry import Finding, doctors_test


@doctors_test("mixing", finds=["F17", "F22", "F23"])
def mixing(case: Case) -> Finding:
    """Whether squeezes keep neighbours together, channels mix, and couplings see the other channels of a position."""
    images = [r for r in case.woken_pass.leaves if r.x.dim() == 4 and r.x.is_floating_point() and r is not case.noise]
    moved = [(record, source) for record in images if not record.learned and (source := _sources(record)) is not None]
    squeezes = [(record, source) for record, source in moved if source.shape != record.x.shape[1:]]
    for record, source in squeezes:
        if _torn(source, tuple(record.x.shape[1:])):
            measured = f"{record.title} puts pixels together that are no neighbours"
            return Finding(False, measured, "a reshape is no squeeze: pixel_unshuffle", "F17")
    mixed, sees = set(), {}  # by shape: is there a learned matrix; does a coupling see the channels of a position
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
        measured = f"{n} fixed permutations of {shape[0]} channels"
        return Finding(False, measured, "learn it: an invertible 1x1 convolution", "F22")
    if squeezes and not all(sees.get(shape, True) for shape in mixed):
        measured = "no coupling tells one channel of a position from another"
        return Finding(False, measured, "checkerboards after a squeeze: split the channels", "F23")
    return Finding(True if images else None, "squeezes and channels in order" if images else "no images")


def _sources(record: Record) -> Tensor | None:
    """For a layer that only moves values, the flat index in its input of each number of its output; None for others."""
    numbers = torch.arange(record.x[0].numel(), dtype=torch.float64)
    try:
        z = record.again(numbers.view(1, *record.x.shape[1:]))[0][0]
    except ValueError:  # a layer that checks its values
        return None
    return z.long() if z.dim() == 3 and torch.equal(z.flatten().sort().values, numbers) else None


def _torn(source: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the channels of one position come from farther apart than the factor by which the image shrank."""
    rows, columns = source % (shape[1] * shape[2]) // shape[2], source % shape[2]
    spans = [(side.amax(0) - side.amin(0)).max().item() + 1 for side in (rows, columns)]
    return spans[0] > shape[1] // source.shape[1] or spans[1] > shape[2] // source.shape[2]


def _effects(record: Record) -> tuple[bool, bool]:
    """Whether a channel depends on other channels of its position, and on other positions (asked of two neighbours)."""
    across = elsewhere = False
    for column in (0, 1):
        J = jacobian(lambda v, c=column: record.again(v)[0][:, :, 1, c], record.x[:1]).abs()
        J = J.view(-1, *record.x.shape[1:])  # (channel of z, channel, row, column of x)
        here = J[:, :, 1, column].clone()
        J[:, :, 1, column] = 0
        across |= bool((here - here.diagonal().diag()).any())
        elsewhere |= bool(J.any())
    return across, elsewhere
