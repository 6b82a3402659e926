"""Tests of what enters: do the data pass through the flow, are they left alone, and do they have a density at all?"""

from __future__ import annotations

import torch

from nflows_lib.clinic.examination import Case, Record
from nflows_lib.clinic.registry import Finding, doctors_test

BEYOND = torch.finfo(torch.float32).max  # larger numbers are infinite where a flow is trained, in float32


@doctors_test("finite", finds=["F6", "F9", "F14", "F20", "F21"])
def finite(case: Case) -> Finding:
    """Which layer is the first to make NaN or infinity of the data."""
    for record in case.data_pass.leaves:
        if (record.z.abs() < BEYOND).all() and (record.log_det.abs() < BEYOND).all():
            continue
        values = record.x.transpose(0, 1).flatten(1)
        cause, entry = "a scale overflows: bound it, and start the networks' last layers at zero", "F21"
        if not record.learned and (values.min() < 0 or values.max() > 1):
            cause, entry = f"it is given {values.min():.4g} to {values.max():.4g}, more than the unit interval", "F9"
        elif not record.learned:
            cause, entry = "a logit of exactly 0 or 1: keep a margin", "F14"
        elif (values.amin(1) == values.amax(1)).any():
            cause, entry = "a channel is constant: no scale gives it a variance of 1", "F20"
        elif record.is_elementwise():
            cause, entry = "a scale has grown for ever, as it does on data without noise", "F6"
        return Finding(False, f"{record.title} makes NaN or infinity of the data", cause, entry)
    low, high = case.data_pass.log_p.min(), case.data_pass.log_p.max()
    if not (case.data_pass.log_p.abs() < BEYOND).all():
        most = case.data_pass.z.abs().max()
        cause = "values grow from layer to layer: start the networks' last layers at zero"
        return Finding(False, f"log p(x) is not finite: latents up to {most:.2g}", cause, "F21")
    return Finding(True, f"log p(x) from {low:.4g} to {high:.4g} nats")


@doctors_test("input", finds=["P2"])
def in_place(case: Case) -> Finding:
    """Whether a layer changes its input in place."""
    for record in case.data_pass.inner_first:
        if record.overwritten:
            measured = f"{record.title} changes its input in place"
            return Finding(False, measured, "the caller's data, or what another layer needs: make a copy", "P2")
    return Finding(True, "no layer changes what it is given")


@doctors_test("noise", finds=["F6", "F7", "F8"])
def noise(case: Case) -> Finding:
    """Whether discrete data get noise, new noise for every value, and stay real numbers afterwards."""
    noise, x = case.noise, case.x
    if noise is None and case.spacing is not None:
        shifted = [record for record in case.data_pass.records if _adds_one_vector(record)]
        if shifted:
            measured = f"{shifted[0].title} adds the same numbers to every example, at every call"
            return Finding(False, measured, "a shifted grid is as discrete as the grid", "F8")
        measured = f"data on a grid of step {case.spacing:.4g}, and the flow adds no noise"
        return Finding(False, measured, "a density on a grid has no best value: dequantize", "F6")
    if noise is not None:
        with torch.no_grad():
            rows, _ = noise.again(noise.x[:1].expand(8, *noise.x.shape[1:]))
        if torch.equal(rows, rows[:1].expand_as(rows)):
            measured = f"{noise.title} gives eight copies of an example the same noise"
            return Finding(False, measured, "one vector for the whole batch: draw one for each value", "F8")
    noisy = x if noise is None else noise.z
    values, counts = noisy.unique(return_counts=True)
    share = counts.max().item() / noisy.numel()
    if counts.max() > 3 and share > 0.005:
        measured = f"{100 * share:.1f} % of the values that enter are exactly {values[counts.argmax()]:.4g}"
        cause = "a clamp after the noise" if noise is not None else "clamped after the noise, or discrete in part"
        return Finding(False, measured, cause, "F7")
    return Finding(True, "real numbers" if noise is None else f"{noise.title}: fresh for every value")


def _adds_one_vector(record: Record) -> bool:
    """Whether a layer adds the same vector to every example of integers, a vector whose numbers differ."""
    if record.x.shape != record.z.shape or record.learned:
        return False
    added = record.z - record.x
    same = (added - added[:1]).abs().max() < 1e-9
    return bool(same and added.flatten(1)[0].std() > 1e-3 and torch.equal(record.x, record.x.round()))
