"""Tests of the flow in use: at an edge, in another batch, in the other mode, in float32, and after loading."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn

from nflows_lib.clinic.examination import EXACT, Case, copied, default_dtype, detached, init_flags, relative_error
from nflows_lib.clinic.registry import Finding, doctors_test


@doctors_test("edges", finds=["F14"])
def edges(case: Case) -> Finding:
    """Whether layers without parameters that take numbers of [0, 1) are finite at 0, which a generator can return."""
    for record in case.data_pass.leaves:
        if record.learned or not record.x.is_floating_point() or record.x.min() < 0 or record.x.max() > 1:
            continue
        z, log_det = record.again(torch.zeros_like(record.x[:1]))
        if not (z.isfinite().all() and log_det.isfinite().all()):
            return Finding(False, f"{record.title} of 0 is not finite", "a logit without a margin", "F14")
    return Finding(True, "finite at the edge of the unit interval")


@doctors_test("neighbours", finds=["F15", "P15"])
def neighbours(case: Case) -> Finding:
    """Whether the likelihood of four examples depends on the rest of the batch, in the mode that the flow is in."""
    flow = detached(case.original).to("cpu", torch.float64)
    _, context = case.rows(slice(0, 8))
    states, passes = copy.deepcopy(flow.state_dict()), []
    for company in (case.x[4:8], case.x[-4:], case.x[:4]):
        flow.load_state_dict(states)
        passes.append(case.through(flow, torch.cat([case.x[:4], company]), context))
    first = passes[0].log_p[:4]
    moved = max((other.log_p[:4] - first).abs().max().item() for other in passes[1:])
    if moved <= EXACT * max(1.0, first.abs().max().item()):
        return Finding(True, "an example's log p(x) is its own")
    measured = f"log p(x) moves by {moved:.3g} nats with the neighbours"
    if all(torch.equal(other.z[:4], passes[0].z[:4]) for other in passes[1:]):
        return Finding(False, measured, "the log-det is summed over the batch", "P15")
    if flow.training:
        return Finding(False, measured, "batch statistics make no density of one example: eval()", "F15")
    return Finding(False, measured, "batch statistics, and in evaluation mode, too", "F15")


@doctors_test("modes", finds=["F15", "F16"])
def modes(case: Case) -> Finding:
    """Whether training and evaluation mode give one likelihood, and the whole flow's round trip closes in training."""
    if _fresh_averages(case.flow):
        return Finding(None, "running averages that no batch has moved yet: nothing to compare")
    training = copied(case.flow).train()
    gap = case.log_p_of(training) - case.data_pass.log_p.mean().item() / case.dims
    if case.original.training and abs(gap) > 1e-9:
        off = _whole_round_trip(case, copied(case.flow).train())
        if off > 1e-3:
            measured = f"training mode: data to latent and back is off by {off:.2g}"
            drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p for m in training.modules())
            cause = "dropout draws again both ways" if drops else "forward uses the batch, the inverse the averages"
            return Finding(False, measured, f"{cause}: eval()", "F16")
    if not abs(gap) < 0.5:
        measured = f"training mode is likelier by {gap:.3g} nats/dim than evaluation"
        return Finding(False, measured, "running averages that are not the data's: stale, or too early", "F15")
    return Finding(True, f"training and evaluation differ by {abs(gap):.1g} nats/dim")


def _fresh_averages(flow: nn.Module) -> bool:
    """Whether there are running averages, and all have their first values: mean 0 and variance 1."""
    buffers = {name: b for name, b in flow.named_buffers() if b.is_floating_point() and re.search("mean|var", name)}
    return bool(buffers) and all((b == (1 if "var" in name else 0)).all() for name, b in buffers.items())


def _whole_round_trip(case: Case, flow: nn.Module) -> float:
    """Largest relative error of the whole flow's round trip, from the noise layer's output (or the data) and back."""
    with torch.no_grad():
        forward = case.through(flow)
        entered = case.x if case.noise is None else next(r.z for r in forward.records if r.name == case.noise.name)
        return relative_error(case.back_to_noise(flow, forward.z), entered)


@doctors_test("precision", finds=["P11"])
def precision(case: Case) -> Finding:
    """Whether the round trip of the whole flow closes in float32."""
    single = copy.copy(case)
    single.x = case.x.float() if case.x.is_floating_point() else case.x
    single.context = None if case.context is None else case.context.float()
    with default_dtype(torch.float32):
        off = _whole_round_trip(single, copied(case.flow).float())
    if not off < 0.01:
        measured = f"float32: data to latent and back is off by {off:.2g}"
        return Finding(False, measured, "scales too small or too large in a row", "P11")
    return Finding(True, f"float32: data to latent and back to {off:.0e}")


@doctors_test("saved state", finds=["F20"])
def saved_state(case: Case) -> Finding:
    """Whether a layer keeps in a plain attribute that it is initialised: after loading, it would do so again."""
    forgetful = [
        type(module).__name__
        for module in case.original.modules()
        if any(isinstance(v, bool) and re.search("initiali[sz]ed|inited", k) for k, v in vars(module).items())
        and not init_flags(module)
    ]
    if forgetful:
        measured = f"{forgetful[0]} keeps whether it is initialised in a plain attribute"
        return Finding(False, measured, "it starts again on load: make it a buffer", "F20")
    return Finding(True, "nothing is kept outside of the state dict")
