"""Tests of the flow in use: at an edge value, in another batch, in the other mode, in float32, and after loading."""

from __future__ import annotations

import copy
import re

import torch
from torch import nn

from nflows_lib.clinic.examination import EXACT, Case, copied, default_dtype, detached, init_flags, relative_error
from nflows_lib.clinic.registry import Finding, doctors_test


@doctors_test("edges", finds=["F14"])
def edges(case: Case) -> Finding:
    """Whether layers without parameters on numbers in [0, 1) are finite at 0, which a random generator can return."""
    for record in case.data_pass.leaves:
        if record.learned or not record.x.is_floating_point() or record.x.min() < 0 or record.x.max() > 1:
            continue
        z, log_det = record.again(torch.zeros_like(record.x[:1]))
        if not (z.isfinite().all() and log_det.isfinite().all()):
            measured = f"{record.title} is not finite at 0"
            return Finding(False, measured, "the logit of 0 is infinite: keep a margin", "F14")
    return Finding(True, "every layer on the unit interval is finite at 0")


@doctors_test("neighbours", finds=["F15", "P15"])
def neighbours(case: Case) -> Finding:
    """Whether the likelihood of four examples depends on the rest of the batch, in the mode that the flow is in."""
    flow = detached(case.original).to("cpu", torch.float64)
    _, context = case.rows(slice(0, 8))
    states, passes = copy.deepcopy(flow.state_dict()), []
    for rest in (case.x[4:8], case.x[-4:], case.x[:4]):
        flow.load_state_dict(states)
        passes.append(case.through(flow, torch.cat([case.x[:4], rest]), context))
    first = passes[0].log_p[:4]
    moved = max((other.log_p[:4] - first).abs().max().item() for other in passes[1:])
    if moved <= EXACT * max(1.0, first.abs().max().item()):
        return Finding(True, "log p(x) of an example does not depend on the rest of the batch")
    measured = f"log p(x) moves by {moved:.3g} nats with the other examples of the batch"
    if all(torch.equal(other.z[:4], passes[0].z[:4]) for other in passes[1:]):
        return Finding(False, measured, "the log-det is summed over the batch", "P15")
    if flow.training:
        return Finding(False, measured, "batch statistics do not give a density of one example: call eval()", "F15")
    return Finding(False, measured, "the flow uses batch statistics in evaluation mode, too", "F15")


@doctors_test("modes", finds=["F15", "F16"])
def modes(case: Case) -> Finding:
    """Whether both modes give the same likelihood, and whether a round trip in training mode returns the data."""
    if _fresh_averages(case.flow):
        return Finding(None, "no batch has moved the running averages yet, so there is nothing to compare")
    training = copied(case.flow).train()
    gap = case.log_p_of(training) - case.data_pass.log_p.mean().item() / case.dims
    if case.original.training and abs(gap) > 1e-9:
        off = _whole_round_trip(case, copied(case.flow).train())
        if off > 1e-3:
            measured = f"in training mode the round trip misses the data by {off:.2g}"
            drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p for m in training.modules())
            cause = "the inverse redraws dropout" if drops else "forward uses the batch, the inverse running averages"
            return Finding(False, measured, f"{cause}: call eval()", "F16")
    if not abs(gap) < 0.5:
        measured = f"the batch is likelier by {gap:.3g} nats/dim in training mode than in evaluation mode"
        cause = "the running averages are not the data's: they are stale, or of too few batches"
        return Finding(False, measured, cause, "F15")
    return Finding(True, f"training and evaluation mode differ by {abs(gap):.1g} nats/dim")


def _fresh_averages(flow: nn.Module) -> bool:
    """Whether the flow has running averages, and all still have their first values: mean 0 and variance 1."""
    buffers = {name: b for name, b in flow.named_buffers() if b.is_floating_point() and re.search("mean|var", name)}
    return bool(buffers) and all((b == (1 if "var" in name else 0)).all() for name, b in buffers.items())


def _whole_round_trip(case: Case, flow: nn.Module) -> float:
    """The largest relative error of a round trip through the whole flow, which starts after the noise layer if any."""
    with torch.no_grad():
        forward = case.through(flow)
        entered = case.x if case.noise is None else next(r.z for r in forward.records if r.name == case.noise.name)
        return relative_error(case.back_to_noise(flow, forward.z), entered)


@doctors_test("precision", finds=["P11"])
def precision(case: Case) -> Finding:
    """Whether the round trip through the whole flow returns the data in float32."""
    single = copy.copy(case)
    single.x = case.x.float() if case.x.is_floating_point() else case.x
    single.context = None if case.context is None else case.context.float()
    with default_dtype(torch.float32):
        off = _whole_round_trip(single, copied(case.flow).float())
    if not off < 0.01:
        measured = f"in float32 the round trip misses the data by {off:.2g}"
        return Finding(False, measured, "the layers' scale factors multiply to too small or too large ones", "P11")
    return Finding(True, f"in float32 the round trip returns the data within {off:.0e}")


@doctors_test("saved state", finds=["F20"])
def saved_state(case: Case) -> Finding:
    """Whether a layer keeps in a plain attribute that it is initialised, so that it initialises again after loading."""
    forgetful = [
        type(module).__name__
        for module in case.original.modules()
        if any(isinstance(v, bool) and re.search("initiali[sz]ed|inited", k) for k, v in vars(module).items())
        and not init_flags(module)
    ]
    if forgetful:
        measured = f"{forgetful[0]} keeps in a plain attribute whether it is initialised"
        return Finding(False, measured, "the layer initialises again after loading: make the flag a buffer", "F20")
    return Finding(True, "no layer keeps its flag outside of the state dict")
