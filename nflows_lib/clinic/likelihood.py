"""Tests of the likelihood: whether discrete data can have it, and whether the flow's own numbers agree with it."""

from __future__ import annotations

import inspect
import math

import torch
from torch import nn

from nflows_lib.clinic.control import seeded
from nflows_lib.clinic.examination import EXACT, Case, Independent, arguments, drawn_from, first_of
from nflows_lib.clinic.registry import Finding, doctors_test
from nflows_lib.distributions import Base, StandardNormal


@doctors_test("D log n", finds=["F6", "F10"])
def bound(case: Case) -> Finding:
    """Whether the mean log-likelihood of discrete data is at most D log(1 / step) nats, as P(k) <= 1 demands."""
    if case.spacing is None:
        return Finding(None, "the data are real numbers, so log p(x) has no limit")
    limit, reached = case.dims * math.log(1 / case.spacing), case.data_pass.log_p.mean().item()
    measured = f"the mean of log p(x) is {reached:.4g} nats, the limit {limit:.4g}"
    if reached > limit:
        cause = "there is no noise, or the log-det of a scaling is not counted"
        return Finding(False, measured, cause, "F10" if case.random else "F6")
    return Finding(True, measured)


@doctors_test("bits/dim", finds=["F10", "F19", "F26"])
def bits_per_dim(case: Case) -> Finding:
    """Whether the flow's own bits_per_dim is -log p(x) / (D log 2)."""
    own = getattr(case.flow, "bits_per_dim", None)
    if not callable(own):
        return Finding(None, "the flow has no method bits_per_dim")
    with torch.no_grad(), seeded(0):
        said = own(*arguments(case.x, case.context)).mean().item()
    right = -case.data_pass.log_p.mean().item() / (case.dims * math.log(2))
    measured, off, n = f"the flow says {said:.3f}, -log p(x) / (D log 2) is {right:.3f}", said - right, case.levels
    if abs(off) < 1e-4:
        return Finding(True, f"the flow says {right:.3f}, as log p(x) does")
    if n == 2 and abs(abs(off) - 1) < 1e-4:
        cause = "D log 2 is counted, though the data are not scaled, or left out, though they are"
        return Finding(False, measured, cause, "F26")
    if n and abs(abs(off) - math.log2(n)) < 1e-4:
        return Finding(False, measured, f"D log {n} is left out, or counted twice", "F10")
    if n and 0 < -off < math.log2(n):
        kept = case.dims * (1 + off / math.log2(n))
        return Finding(False, measured, f"D is {case.dims}, but bits_per_dim counts {kept:.0f}", "F19")
    return Finding(False, measured, "divide -log p(x) by D log 2, where D is the dimension of the data", "F10")


@doctors_test("log_prob", finds=["F27"])
def own_log_prob(case: Case) -> Finding:
    """Whether the flow's own log_prob adds the log-det to the log-density of the latent."""
    own, done = getattr(case.flow, "log_prob", None), case.data_pass
    if not callable(own):
        return Finding(None, "the flow has no method log_prob")
    with torch.no_grad(), seeded(0):
        said = own(*arguments(case.x.clone(), case.context))
    if not isinstance(said, torch.Tensor) or said.shape != done.log_p.shape:
        return Finding(None, "log_prob does not return one number per example")
    of_latent, scale = done.log_p - done.log_det, max(1.0, done.log_p.abs().max().item())
    if (said - done.log_p).abs().max() <= EXACT * scale:
        return Finding(True, "log_prob is the base's log-density plus the log-det")
    if done.log_det.abs().max() > EXACT * scale:
        if (said - of_latent).abs().max() <= EXACT * scale:
            return Finding(False, "log_prob is the base's log-density alone", "the log-det is left out: add it", "F27")
        if (said - of_latent + done.log_det).abs().max() <= EXACT * scale:
            return Finding(False, "log_prob subtracts the log-det", "its sign is wrong: add it", "F27")
    return Finding(None, "log_prob uses another base density than the doctor: pass it as base=")


@doctors_test("own samples", finds=["P1"])
def own_samples(case: Case) -> Finding:
    """Whether the flow's own samples, sent forward, have the spread of the base density."""
    own, flow, n = getattr(case.flow, "sample", None), case.flow, 512
    base = case.base_of(flow)
    if not callable(own) or not hasattr(base, "sample"):
        return Finding(None, "the flow has no method sample" if not callable(own) else "the base has no method sample")
    if case.context is not None or case.random:
        return Finding(None, "the flow is conditional, or the data get noise")
    if own_log_prob(case)[0].passed is not True and case.base is None and isinstance(base, StandardNormal):
        return Finding(None, "the doctor does not know the base density of the samples")
    with torch.no_grad(), seeded(0):
        drawn = flow.sample(n)
        drawn = first_of(drawn)
        if not isinstance(drawn, torch.Tensor) or drawn.shape != (n, *case.x.shape[1:]):
            return Finding(None, "sample(n) does not return n examples")
        z = case.through(flow, drawn.to(case.x.dtype)).z.flatten(1)
        right = drawn_from(base, torch.empty(n, z.shape[1]))
        there = case.through(flow, case.back(flow, right.view(n, *case.data_pass.z.shape[1:])).to(case.x.dtype)).z
        if not (there.flatten(1) - right).abs().max() < 1e-3:
            return Finding(None, "the inverse is wrong, or rounding hides what it does")
    if not z.isfinite().all():
        return Finding(False, "the flow's own samples, sent forward, are not finite", "sample is not the inverse", "P1")
    ours, theirs = (-base.log_prob(side.flatten(1)) for side in (z, right.view_as(z)))
    error = (ours.var() / n + theirs.var() / n).sqrt().item()
    off = (ours.mean() - theirs.mean()).item()
    shift = (z.mean(0) - right.view_as(z).mean(0)).abs().max() / right.std() * math.sqrt(n / 2)
    named = inspect.signature(own).parameters
    ratio = z.std().item() / right.std().item()
    measured = f"sent forward, they have standard deviation {z.std():.3g}, the base's draws {right.std():.3g}"
    if abs(off) <= 6 * error and shift < 6 + math.log(case.dims):
        return Finding(True, measured)
    same_shape = (z.std(0) / right.view_as(z).std(0) / ratio).sub(1).abs().max() < 0.3
    cooler = ratio < 0.97 and same_shape and shift < 6 + math.log(case.dims)
    if cooler and any("temp" in name or "std" in name for name in named):
        return Finding(None, f"{measured}: a temperature of {ratio:.2g}")
    cause = "sample does not invert this forward, or draws from another base than log p uses"
    return Finding(False, measured, cause, "P1")


@doctors_test("prior", finds=["P23"])
def prior(case: Case) -> Finding:
    """Whether a base with parameters stays normalised when they change.

    For a normalised density the mean of the gradient of log p with respect to each parameter is 0 over its own samples.
    """
    base = case.base_of(case.flow)
    if (mass := _mass(base)) is not None and abs(mass - 1) > 0.01:
        cause = "log_prob must be the logarithm of a density: check its constant"
        return Finding(False, f"in one dimension the base density integrates to {mass:.3g}", cause, "P23")
    parameters = [p for p in base.parameters() if p.requires_grad] if isinstance(base, nn.Module) else []
    if not parameters or not hasattr(base, "sample"):
        return Finding(None, "the prior has no parameters" if not parameters else "the prior has no method sample")
    if case.data_pass.z.dim() != 2 and case.data_pass.z[0].numel() > 4096:
        return Finding(None, "the latent is too large to draw from the prior often", why="too large")
    n, worst = 2000, 0.0
    with seeded(0), torch.no_grad():
        z = drawn_from(base, torch.empty(n, case.data_pass.z[0].numel()))
    halves = []
    for part in z.split(n // 2):
        gradient = torch.autograd.grad(base.log_prob(part).mean(), parameters, allow_unused=True)
        halves.append([torch.zeros(1) if g is None else g for g in gradient])
    for first, second in zip(*halves, strict=True):
        mean, spread = (first + second) / 2, (first - second).abs() / 2
        worst = max(worst, (mean.abs().mean() - 5 * spread.mean() - 5 / math.sqrt(n)).item())
    if worst > 0.05:
        cause = "log_prob lacks the term that normalises it, such as minus the log of the scale"
        return Finding(
            False, f"a parameter of the prior raises log p everywhere, by {worst:.2g} per unit", cause, "P23"
        )
    return Finding(True, "the prior stays normalised when its parameters change")


def _mass(base: Base) -> float | None:
    """The integral of a base density in one dimension; None if it does not take one dimension."""
    if isinstance(base, Independent):
        return None  # PyTorch's own density
    numbers = base.state_dict() if isinstance(base, nn.Module) else vars(base)
    if any(isinstance(value, torch.Tensor) and value.numel() > 1 for value in numbers.values()):
        return None
    grid = torch.linspace(-60, 60, 120_001)[:, None]
    try:
        with torch.no_grad():
            log_p = base.log_prob(grid)
    except Exception:  # the base has a number of dimensions of its own
        return None
    if log_p.shape != (len(grid),) or not (log_p < math.inf).all():
        return None
    mass = torch.trapezoid(log_p.exp(), grid[:, 0]).item()
    return mass if mass > 0 else None
