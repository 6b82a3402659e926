"""Tests of the bijection: does each inverse undo its layer, and is each log-det the true one?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nflows_lib.clinic.examination import EXACT, LARGEST, Case, Record, jacobian, relative_error
from nflows_lib.clinic.registry import Finding, doctors_test

CLOSED = 1e-5  # error of an iterated inverse that still passes, relative to the largest value

_DRAWN = "numbers of the latent are lost and drawn again: the inverse needs them all"
_UNMASKED = "what the network reads is changed as well: mask its output"


@doctors_test("round trip", finds=["F3", "F18", "P1"])
def round_trip(case: Case) -> Iterator[Finding]:
    """Whether the inverse of each layer's output is the layer's input, and is the same at a second call."""
    worst, closed, broken = 0.0, 0, set()
    with torch.no_grad():
        for record in case.data_pass.inner_first:
            if record.is_within(broken):
                continue  # the layer inside has been named
            try:
                back, again = record.back(), record.back()
            except NotImplementedError:
                continue
            off = relative_error(back.to(record.x.dtype), record.x)
            measured = f"{record.title}: the inverse of its output is off by {off:.2g}"
            if not torch.equal(back, again):
                found = f"{record.title}: its inverse answers differently each time", _DRAWN, "F18"
            elif off <= CLOSED:
                worst, closed = max(worst, off), closed + 1
                continue
            elif record.z[0].numel() < record.x[0].numel():
                found = measured, _DRAWN, "F18"
            elif _unmasked(record):
                found = measured, _UNMASKED, "F3"
            else:
                found = measured, "forward and inverse are not inverse to each other", "P1"
            broken.add(id(record.layer))
            yield Finding(False, *found)
    if not broken:
        measured = f"every layer's closes, to {worst:.0e}" if closed else "no layer has an inverse"
        yield Finding(True if closed else None, measured)


@doctors_test("log-det", finds=["F3", "F9", "F10", "P15"])
def log_det(case: Case) -> Iterator[Finding]:
    """Whether each layer's log-det of one example is that of autograd's Jacobian; a corner stands for a large image."""
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
            continue  # a random estimate, which differs from call to call
        if x.shape == record.x[:1].shape and abs(claimed - record.log_det[0].item()) > EXACT * max(1.0, abs(claimed)):
            broken.add(id(record.layer))
            measured = f"{record.title}: {claimed:.4g} alone, {record.log_det[0]:.4g} in the batch"
            yield Finding(False, measured, "sum over all dimensions but the batch's", "P15")
            continue
        true = torch.linalg.slogdet(jacobian(lambda v, r=record: r.again(v)[0], x)).logabsdet.item()
        off, compared = abs(claimed - true) / max(1.0, abs(true)), compared + 1
        if off <= EXACT:
            continue
        broken.add(id(record.layer))
        cause = _cause_of_log_det(record, (claimed - true) / x.numel(), case.levels)
        yield Finding(False, f"{record.title} says {claimed:.4f} nats, autograd {true:.4f}", *cause)
    if len(broken) == (case.noise is not None):
        left = f"; {too_large} are too large" if too_large else ""
        yield Finding(True if compared else None, f"{compared} layers agree with autograd{left}")


def _corner(record: Record) -> Tensor | None:
    """One example, or a corner of it, whose Jacobian is not too large; None if the layer takes no corner."""
    x = record.x[:1]
    if x.numel() <= LARGEST:
        return x
    try:
        corner = x[..., :4, :4]
        return corner if corner.numel() <= LARGEST and record.again(corner)[0].numel() == corner.numel() else None
    except (ValueError, RuntimeError, IndexError):
        return None


def _cause_of_log_det(record: Record, each: float, n: int | None) -> tuple[str, str]:
    """Cause and entry of a log-det that is too large by ``each`` nats per dimension, for data of n levels."""
    if n and abs(each - math.log(n)) < 1e-6:
        return f"a scaling by 1/{n} that is not counted", "F10"
    if n and abs(abs(each) - math.log(n / (n - 1))) < 1e-6:
        return f"one of {n} and {n - 1} scales, the other is counted", "F9"
    if _unmasked(record):
        return _UNMASKED, "F3"
    return "its formula is not that of what forward does", "P15"


def _unmasked(record: Record) -> bool:
    """Whether the layer has a mask and changes numbers that the mask lets pass."""
    masks = [b for b in record.layer.buffers() if b.dtype == torch.bool and b.shape == record.x.shape[1:]]
    return any(not torch.equal(record.x[:, mask], record.z[:, mask]) for mask in masks)


@doctors_test("sum", finds=["F18", "P15"])
def sum_of_log_dets(case: Case) -> Finding:
    """Whether the flow's log-det is the sum of its layers' log-dets, and the latent has as many numbers as the data."""
    total = sum(record.log_det for record in case.data_pass.outermost)
    off = (case.data_pass.log_det - total).abs().max().item()
    numbers = case.data_pass.z[0].numel()
    if off > EXACT * max(1.0, case.data_pass.log_det.abs().max().item()):
        return Finding(False, f"off by {off:.4g} nats", "a layer's log-det is not added, or added twice", "P15")
    if numbers != case.dims:
        return Finding(False, f"{case.dims} numbers go in, {numbers} come out", _DRAWN, "F18")
    return Finding(True, "the layers' log-dets add up to the flow's")
