"""Tests of the bijection: whether each inverse undoes its layer, and whether each log-det is the true one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nflows_lib.clinic.examination import EXACT, LARGEST, Case, Record, jacobian, relative_error
from nflows_lib.clinic.registry import Finding, doctors_test

EXACT_BACK = 1e-5  # a larger error of an inverse, relative to the largest value, is a failure; inverses may iterate

_DRAWN = "forward drops numbers of the latent, and the inverse redraws them: keep them all"
_UNMASKED = "the layer also changes what its network reads: mask the network's output"


@doctors_test("round trip", finds=["F3", "F18", "P1"])
def round_trip(case: Case) -> Iterator[Finding]:
    """Whether each layer's inverse returns the layer's input, and returns the same at a second call."""
    worst, exact, broken = 0.0, 0, set()
    with torch.no_grad():
        for record in case.data_pass.inner_first:
            if record.is_within(broken):
                continue  # a layer inside this one is broken, and has been named
            try:
                back, again = record.back(), record.back()
            except NotImplementedError:
                continue
            off = relative_error(back.to(record.x.dtype), record.x)
            measured = f"{record.title}: the inverse of its output misses its input by {off:.2g}"
            if not torch.equal(back, again):
                found = f"{record.title}: its inverse returns something else at each call", _DRAWN, "F18"
            elif off <= EXACT_BACK:
                worst, exact = max(worst, off), exact + 1
                continue
            elif record.z[0].numel() < record.x[0].numel():
                found = measured, _DRAWN, "F18"
            elif _unmasked(record):
                found = measured, _UNMASKED, "F3"
            else:
                found = measured, "the layer's inverse does not undo its forward", "P1"
            broken.add(id(record.layer))
            yield Finding(False, *found)
    if not broken:
        measured = f"every layer's inverse returns its input within {worst:.0e}" if exact else "no layer has an inverse"
        yield Finding(True if exact else None, measured)


@doctors_test("log-det", finds=["F3", "F9", "F10", "P15"])
def log_det(case: Case) -> Iterator[Finding]:
    """Whether each layer's log-det of one example is that of autograd's Jacobian.

    A large image is compared by its corner alone, if the layer takes the corner.
    """
    compared, too_large = 0, 0
    broken = {id(case.noise.layer)} if case.noise else set()
    for record in case.data_pass.inner_first:
        square = record.z[0].numel() == record.x[0].numel() and record.x.is_floating_point()
        if record.is_within(broken) or not square:
            continue
        x = _corner(record)
        if x is None:
            too_large += 1
            continue
        claimed, again = record.again(x)[1].item(), record.again(x)[1].item()
        if claimed != again:
            continue  # the layer estimates its log-det at random: two calls differ
        if x.shape == record.x[:1].shape and abs(claimed - record.log_det[0].item()) > EXACT * max(1.0, abs(claimed)):
            broken.add(id(record.layer))
            measured = f"{record.title}: {claimed:.4g} nats alone, {record.log_det[0]:.4g} in the batch"
            yield Finding(False, measured, "sum over the dimensions of each example, not over the batch", "P15")
            continue
        true = torch.linalg.slogdet(jacobian(lambda v, r=record: r.again(v)[0], x)).logabsdet.item()
        off, compared = abs(claimed - true) / max(1.0, abs(true)), compared + 1
        if off <= EXACT:
            continue
        broken.add(id(record.layer))
        cause = _cause_of_log_det(record, (claimed - true) / x.numel(), case.levels)
        yield Finding(False, f"{record.title} says {claimed:.4f} nats, autograd gives {true:.4f}", *cause)
    if len(broken) == (case.noise is not None):
        left = f"; {too_large} are too large to compare" if too_large else ""
        yield Finding(True if compared else None, f"agrees with autograd in {compared} layers{left}")


def _corner(record: Record) -> Tensor | None:
    """One example, or a corner of it, small enough for a Jacobian; None if the layer does not take the corner."""
    x = record.x[:1]
    if x.numel() <= LARGEST:
        return x
    try:
        corner = x[..., :4, :4]
        return corner if corner.numel() <= LARGEST and record.again(corner)[0].numel() == corner.numel() else None
    except (ValueError, RuntimeError, IndexError):
        return None


def _cause_of_log_det(record: Record, each: float, n: int | None) -> tuple[str, str]:
    """The cause and the entry of a log-det that is too large by ``each`` nats per dimension, for data with n levels."""
    if n and abs(each - math.log(n)) < 1e-6:
        return f"the log-det of a scaling by 1/{n} is not counted", "F10"
    if n and abs(abs(each) - math.log(n / (n - 1))) < 1e-6:
        return f"one of {n} and {n - 1} scales the data, the other is counted in the log-det", "F9"
    if _unmasked(record):
        return _UNMASKED, "F3"
    return "the formula of the log-det does not belong to this forward", "P15"


def _unmasked(record: Record) -> bool:
    """Whether the layer has a mask and changes numbers that the mask tells it to leave unchanged."""
    masks = [b for b in record.layer.buffers() if b.dtype == torch.bool and b.shape == record.x.shape[1:]]
    return any(not torch.equal(record.x[:, mask], record.z[:, mask]) for mask in masks)


@doctors_test("sum", finds=["F18", "P15"])
def sum_of_log_dets(case: Case) -> Finding:
    """Whether the flow's log-det is the sum of its layers' log-dets, and the latent has as many numbers as the data."""
    total = sum(record.log_det for record in case.data_pass.outermost)
    off = (case.data_pass.log_det - total).abs().max().item()
    numbers = case.data_pass.z[0].numel()
    if off > EXACT * max(1.0, case.data_pass.log_det.abs().max().item()):
        measured = f"differs from the flow's log-det by {off:.4g} nats"
        return Finding(False, measured, "a layer's log-det is not added, or added twice", "P15")
    if numbers != case.dims:
        return Finding(False, f"{case.dims} numbers go into the flow, {numbers} come out", _DRAWN, "F18")
    return Finding(True, "the layers' log-dets add up to the flow's")
