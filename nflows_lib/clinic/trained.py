"""Tests of what the flow has learned: its use of the context, its samples, and its latents."""

from __future__ import annotations

import math

import torch

from nflows_lib.clinic.examination import Case, drawn_from
from nflows_lib.clinic.registry import Finding, doctors_test


@doctors_test("context", finds=["F25"])
def context(case: Case) -> Finding:
    """Whether an example is likelier under its own context than under another example's."""
    if case.context is None:
        return Finding(None, "no context was given")
    shifts = [case.context.roll(shift, 0) for shift in range(1, len(case.context))]
    changed = [(other != case.context).view(len(other), -1).any(1) for other in shifts]  # labels may repeat
    best = max(range(len(shifts)), key=lambda i: changed[i].sum().item())
    others, changed = shifts[best], changed[best]
    if not changed.any():
        return Finding(None, "all examples have the same context")
    margin = (case.data_pass.log_p - case.through(case.flow, context=others).log_p)[changed]
    mean, error = margin.mean().item(), margin.std().item() / math.sqrt(len(margin))
    measured = f"an example is likelier by {mean:.3g} ± {error:.1g} nats under its own than under another's"
    if not margin.any():
        flow = case.woken_flow
        if not (case.woken_pass.log_p - case.through(flow, context=others).log_p).any():
            return Finding(False, "log p(x) does not depend on it", "the context does not reach the layers", "F25")
        return Finding(None, "not used yet: the flow is new, or its conditioning network never learns (F24)")
    if mean < 3 * error:
        cause = "the pairs are mixed up, the context is ignored, or the flow is not trained"
        return Finding(False, measured, cause, "F25")
    return Finding(True, measured)


@doctors_test("samples", finds=["F12", "F14"])
def samples(case: Case) -> Finding:
    """Whether samples are finite, not far larger than the data, and within the range of the levels."""
    flow, n = case.flow, 256
    if not hasattr(case.base_of(flow), "sample"):
        return Finding(None, "the base density has no method sample")
    if case.inverse_is_right is False:
        return Finding(None, "the flow's inverse is wrong")
    with torch.no_grad():
        base, like = case.base_of(flow), torch.empty(n, *case.data_pass.z.shape[1:])
        z = drawn_from(base, like.flatten(1)).view_as(like)
        drawn = case.back_to_noise(flow, z)
    lost = 1 - drawn.flatten(1).isfinite().all(1).float().mean().item()
    entered = case.x if case.noise is None else case.noise.z
    most = drawn.nan_to_num(nan=math.inf).abs().max() / max(entered.abs().max(), 1e-12)
    farther = (z.abs().max() / case.data_pass.z.abs().max()).clamp(min=1)  # data's latents are small before training
    if lost or most > 1e3 * farther:
        measured = f"{100 * lost:.0f} % are not finite, the largest value is {most:.2g} times the data's"
        return Finding(False, measured, "the inverse divides by a scale that is almost 0", "F12")
    measured = f"{n} samples, the largest value is {most:.2g} times the data's"
    top = case.levels * case.spacing if case.noise is not None and case.spacing is not None else None
    learned = top is not None and case.data_pass.log_p.mean() > -case.dims * math.log(top)  # likelier than uniform
    if learned and case.sound:
        outside = ((drawn < -0.1 * top) | (drawn > 1.1 * top)).float().mean().item()
        at_edges = ((case.x < case.spacing / 2) | (case.x > top - 1.5 * case.spacing)).float().mean().item()
        measured += f", {100 * outside:.1f} % are well outside the levels"
        if outside > 0.02 and at_edges > 0.25:
            cause = "the flow puts mass where no data can be: use a logit after the noise"
            return Finding(False, measured, cause, "F14")
    return Finding(True, measured)


@doctors_test("latent moments")
def latent_moments(case: Case) -> Finding:
    """The mean and standard deviation of the latents, without a verdict; training brings them to the base density's."""
    z = case.data_pass.z.flatten(1)
    measured = f"mean {z.mean():.2f}, standard deviation {z.std():.2f}, largest {z.abs().max():.3g}"
    return Finding(None, measured)
