"""Tests of the input: whether the flow stays finite, leaves its input unchanged, and gets data that have a density."""

from __future__ import annotations

import torch

from nflows_lib.clinic.examination import Case, Record
from nflows_lib.clinic.registry import Finding, doctors_test

BEYOND = torch.finfo(torch.float32).max  # larger numbers are infinite in float32, in which flows are trained


@doctors_test("finite", finds=["F6", "F9", "F14", "F20", "F21"])
def finite(case: Case) -> Finding:
    """Whether every number is finite, and which layer is the first to return NaN or infinity."""
    for record in case.data_pass.leaves:
        if (record.z.abs() < BEYOND).all() and (record.log_det.abs() < BEYOND).all():
            continue
        values = record.x.transpose(0, 1).flatten(1)
        cause, entry = "a scale overflows: bound it, and start the networks' last layers at zero", "F21"
        if not record.learned and (values.min() < 0 or values.max() > 1):
            cause, entry = f"its input, from {values.min():.4g} to {values.max():.4g}, leaves the unit interval", "F9"
        elif not record.learned:
            cause, entry = "the logit of exactly 0 or 1 is infinite: keep a margin", "F14"
        elif (values.amin(1) == values.amax(1)).any():
            cause, entry = "a channel is constant: no scale gives it a variance of 1", "F20"
        elif record.is_elementwise():
            cause, entry = "a scale has grown without limit, as it does on data without noise", "F6"
        return Finding(False, f"{record.title} turns the data into NaN or infinity", cause, entry)
    low, high = case.data_pass.log_p.min(), case.data_pass.log_p.max()
    if not (case.data_pass.log_p.abs() < BEYOND).all():
        most = case.data_pass.z.abs().max()
        cause = "values grow from layer to layer: start the networks' last layers at zero"
        return Finding(False, f"log p(x) is not finite, and the largest latent is {most:.2g}", cause, "F21")
    return Finding(True, f"log p(x) is between {low:.4g} and {high:.4g} nats")


@doctors_test("input", finds=["P2"])
def in_place(case: Case) -> Finding:
    """Whether a layer changes its input in place."""
    for record in case.data_pass.inner_first:
        if record.overwritten:
            measured = f"{record.title} changes its input in place"
            return Finding(False, measured, "the data, or another layer's input, are destroyed: make a copy", "P2")
    return Finding(True, "no layer changes its input in place")


@doctors_test("noise", finds=["F6", "F7", "F8"])
def noise(case: Case) -> Finding:
    """Whether discrete data get noise, whether every value gets its own, and whether the result stays real numbers."""
    noise, x = case.noise, case.x
    if noise is None and case.spacing is not None:
        shifted = [record for record in case.data_pass.records if _adds_one_vector(record)]
        if shifted:
            measured = f"{shifted[0].title} adds the same numbers to every example, at every call"
            return Finding(False, measured, "a shifted grid is still a grid: draw noise for each value", "F8")
        measured = f"the data lie on a grid of step {case.spacing:.4g}, and the flow adds no noise"
        return Finding(False, measured, "a density has no best value on a grid: dequantize the data", "F6")
    if noise is not None:
        with torch.no_grad():
            rows, _ = noise.again(noise.x[:1].expand(8, *noise.x.shape[1:]))
        if torch.equal(rows, rows[:1].expand_as(rows)):
            measured = f"{noise.title} gives eight copies of an example the same noise"
            return Finding(False, measured, "one noise vector serves the whole batch: draw noise for each value", "F8")
    noisy = x if noise is None else noise.z
    values, counts = noisy.unique(return_counts=True)
    share = counts.max().item() / noisy.numel()
    if counts.max() > 3 and share > 0.005:
        measured = f"{100 * share:.1f} % of the values that enter the flow are exactly {values[counts.argmax()]:.4g}"
        also = "" if noise is not None else ", or the data are discrete in part"
        return Finding(False, measured, f"the values are clamped after the noise{also}", "F7")
    return Finding(True, "the data are real numbers" if noise is None else f"{noise.title} draws noise for every value")


def _adds_one_vector(record: Record) -> bool:
    """Whether a layer without parameters adds the same vector of unequal numbers to every example of integers."""
    if record.x.shape != record.z.shape or record.learned:
        return False
    added = record.z - record.x
    same = (added - added[:1]).abs().max() < 1e-9
    return bool(same and added.flatten(1)[0].std() > 1e-3 and torch.equal(record.x, record.x.round()))
