"""Tests of the likelihood: whether discrete data can have it, and whether it is converted to bits/dim correctly."""

from __future__ import annotations

import math

import torch

from nflows_lib.clinic.examination import Case, arguments
from nflows_lib.clinic.registry import Finding, doctors_test


@doctors_test("D log n", finds=["F6", "F10"])
def bound(case: Case) -> Finding:
    """Whether the mean log-likelihood of discrete data is at most D log(1 / step) nats, as P(k) <= 1 demands."""
    if case.spacing is None:
        return Finding(None, "the data are real numbers, so log p(x) has no limit")
    limit, reached = case.dims * math.log(1 / case.spacing), case.data_pass.log_p.mean().item()
    measured = f"the mean of log p(x) is {reached:.4g} nats, the limit {limit:.4g}"
    if reached > limit:
        cause = "there is no noise, or the log-det of a scaling is not counted"
        return Finding(False, measured, cause, "F6" if case.noise is None else "F10")
    return Finding(True, measured)


@doctors_test("bits/dim", finds=["F10", "F19", "F26"])
def bits_per_dim(case: Case) -> Finding:
    """Whether the flow's own bits_per_dim is -log p(x) / (D log 2)."""
    own = getattr(case.flow, "bits_per_dim", None)
    if not callable(own):
        return Finding(None, "the flow has no method bits_per_dim")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
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
