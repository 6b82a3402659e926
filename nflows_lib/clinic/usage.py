"""Tests of the flow in use: at an edge value, in another batch, in the other mode, in float32, and after loading."""

from __future__ import annotations

import copy
import math
import re

import torch
from torch import nn

from nflows_lib.clinic import state
from nflows_lib.clinic.bijection import whole_round_trip
from nflows_lib.clinic.control import default_dtype, seeded
from nflows_lib.clinic.examination import EXACT, Case, all_modules, all_parameters, converted, copied, equal
from nflows_lib.clinic.registry import Finding, could_not_run, doctors_test

HALF = {torch.float16: "float16 ends at 65,504", torch.bfloat16: "bfloat16 has only 8 bits"}


@doctors_test("edges", finds=["F14"])
def edges(case: Case) -> Finding:
    """Whether layers without parameters on numbers in [0, 1) are finite at 0, which a random generator can return."""
    asked = 0
    for record in case.data_pass.leaves:
        if record.learned or not record.x.is_floating_point() or record.x.min() < 0 or record.x.max() > 1:
            continue
        z, log_det = record.again(torch.zeros_like(record.x[:1]))
        asked += 1
        if not (z.isfinite().all() and log_det.isfinite().all()):
            measured = f"{record.title} is not finite at 0"
            return Finding(False, measured, "the logit of 0 is infinite: keep a margin", "F14")
    if not asked:
        return Finding(None, "no layer is on the unit interval")
    return Finding(True, "every layer on the unit interval is finite at 0")


@doctors_test("neighbours", finds=["F15", "P15"])
def neighbours(case: Case) -> Finding:
    """Whether the likelihood of four examples depends on the rest of the batch, in the mode that the flow is in."""
    flow = copied(case.original, keep_mode=True)
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
        return Finding(False, measured, "only the log-det depends on the other examples", "P15")
    if flow.training:
        return Finding(False, measured, "batch statistics do not give a density of one example: call eval()", "F15")
    return Finding(False, measured, "the flow uses batch statistics in evaluation mode, too", "F15")


@doctors_test("modes", finds=["F15", "F16"])
def modes(case: Case) -> Finding:
    """Whether both modes give the same likelihood, and whether a round trip in training mode returns the data."""
    if _fresh_averages(case.flow):
        return Finding(None, "no batch has moved the running averages yet, so there is nothing to compare")
    training = copied(case.flow).train()
    done = case.through(training)
    gap = (done.log_p.mean() / case.dims).nan_to_num(nan=-math.inf).item()
    gap -= case.data_pass.log_p.mean().item() / case.dims
    if case.original.training and abs(gap) > 1e-9:
        off = whole_round_trip(case, training)
        if off is not None and off > 1e-3:
            measured = f"in training mode the round trip misses the data by {off:.2g}"
            drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p for m in training.modules())
            cause = "the inverse redraws dropout" if drops else "forward uses the batch, the inverse running averages"
            return Finding(False, measured, f"{cause}: call eval()", "F16")
    if not abs(gap) < 0.5:
        better = f"{gap:.3g} nats/dim" if math.isfinite(gap) else "not a finite number of nats"
        measured = f"the batch is likelier by {better} in training mode than in evaluation mode"
        cause = "the running averages are not the data's: they are stale, or of too few batches"
        return Finding(False, measured, cause, "F15")
    return Finding(True, f"training and evaluation mode differ by {abs(gap):.1g} nats/dim")


def _fresh_averages(flow: nn.Module) -> bool:
    """Whether the flow has running averages, and all still have their first values: mean 0 and variance 1."""
    buffers = {
        name: b
        for name, b in flow.named_buffers()
        if b.is_floating_point() and re.search("(running|moving|batch).*(mean|var)", name)
    }
    return bool(buffers) and all((b == (1 if "var" in name else 0)).all() for name, b in buffers.items())


@doctors_test("precision", finds=["P11"])
def precision(case: Case) -> Finding:
    """Whether the round trip through the whole flow returns the data in float32, or in the type of the flow."""
    if not case.inverse_is_right:
        return Finding(None, "the round trip fails in float64, too")
    own = {p.dtype for p in all_parameters(case.original)}
    half = [dtype for dtype in (*own, case.everything.dtype) if dtype in HALF]
    if own == {torch.float64}:
        return Finding(None, "the flow computes in float64")
    dtype = half[0] if half else torch.float32
    _ = case.noise, case.draws  # these stay what they are in float64
    single = copy.copy(case)
    with default_dtype(torch.float32):
        single.x = case.x.to(dtype) if case.x.is_floating_point() else case.x
        if case.context is not None and case.context.is_floating_point():
            single.context = case.context.to(dtype)
        if isinstance(case.base, nn.Module):
            single.own_base = converted(copied(case.base), dtype)
        flow = converted(copied(case.flow), dtype)
        try:
            off = whole_round_trip(single, flow)
            finite = single.through(flow).log_p.isfinite().all()
        except Exception as error:
            return could_not_run(f"in {str(dtype)[6:]}", error)
    if off is None:
        return Finding(None, "the round trip of data with noise cannot be compared")
    name = str(dtype).removeprefix("torch.")
    if not (off < 0.01 and finite):
        how = f"the round trip misses the data by {off:.2g}" if finite else "log p(x) is not finite"
        matrix = _nearly_singular(case)
        if dtype in HALF:
            cause = f"{HALF[dtype]}: keep log-dets and sums in float32"
        elif matrix:
            cause = f"the matrix of {matrix[0]} is nearly singular (condition number {matrix[1]:.1g})"
        else:
            cause = "the layers' scale factors multiply to too small or too large ones"
        return Finding(False, f"in {name} {how}", cause, "P11")
    return Finding(True, f"in {name} the round trip returns the data within {off:.0e}")


def _nearly_singular(case: Case) -> tuple[str, float] | None:
    """The layer with the worst condition number of a map that is the same matrix everywhere, if that is above 1e4."""
    worst = None
    for record in case.data_pass.leaves:
        if not record.learned or record.x.dim() not in (2, 4) or record.x.shape != record.z.shape:
            continue
        channels = record.x.shape[1]
        with torch.no_grad(), seeded(3):
            units = torch.zeros(channels + 1, *record.x.shape[1:])
            units[torch.arange(channels), torch.arange(channels)] = 1
            rows = record.again(units)[0].flatten(2)[..., 0] if record.x.dim() == 4 else record.again(units)[0]
            matrix = rows[:-1] - rows[-1]
        if matrix.isfinite().all() and (condition := torch.linalg.cond(matrix).item()) > 1e4:
            worst = max(worst or ("", 0.0), (record.title, condition), key=lambda pair: pair[1])
    return worst


@doctors_test("saved state", finds=["F20"])
def saved_state(case: Case) -> Finding:
    """Whether a loaded copy is the same flow: nothing that it needs is kept outside of the state dict."""
    flow = case.flow
    forgetful = [
        type(module).__name__
        for module in all_modules(flow).values()
        if any(isinstance(v, bool) and re.search("initiali[sz]ed|inited", k) for k, v in vars(module).items())
        and not any("init" in name and buffer.numel() == 1 for name, buffer in module.named_buffers())
    ]
    forgetful += [type(place.owner(case.flow)).__name__ for place in case.flags if not place.saved]
    if forgetful:
        measured = f"{forgetful[0]} keeps in a plain attribute whether it is initialised"
        return Finding(False, measured, "the layer initialises again after loading: make the flag a buffer", "F20")
    if outside := state.modules_outside(flow):
        more = f" ({len(outside) - 1} more)" * (len(outside) > 1)
        kind = type(all_modules(flow)[outside[0]]).__name__
        measured = f"{outside[0]} {kind} is not in the state dict{more}"
        return Finding(
            False, measured, "a plain list hides it from saving and from the optimizer: nn.ModuleList", "F20"
        )
    behind = None
    for place, value in state.values_outside(case.flow):
        if state.looks_made_by_rule(value):
            if behind is None and value.dim() and state.stays_behind(case, place):
                behind = place
        elif state.matters(case, place, value):
            measured = f"{place.title(flow)} keeps {place.attribute} outside of the state dict"
            return Finding(False, measured, "a loaded flow has another one: register it as a buffer", "F20")
    if behind is not None:
        measured = f"{behind.title(flow)}: {behind.attribute} stays on the CPU when the flow moves to a GPU"
        return Finding(False, measured, "a plain tensor is neither moved nor saved: register it as a buffer", "F20")
    try:
        same = _same_after_loading(case)
    except Exception as error:
        return could_not_run("loading a state dict", error)
    if not same:
        cause = "forward or inverse uses what was computed before loading: compute it again"
        return Finding(False, "a flow that loads this state dict is another one", cause, "F20")
    return Finding(True, "nothing that the flow needs is outside of the state dict")


def _same_after_loading(case: Case) -> bool:
    """Whether a copy with other numbers, after it has been used and has loaded the state dict, is the same flow."""
    other = case.woken()
    with torch.no_grad():
        z = case.through(other).z
        if case.inverse_is_right:
            case.back(other, z)
        other.load_state_dict(case.flow.state_dict())
        again = case.through(other)
        same = torch.equal(again.z, case.data_pass.z) and torch.equal(again.log_det, case.data_pass.log_det)
        if same and case.inverse_is_right:
            backs = [case.back(case.flow, again.z), case.back(other, again.z)]
            same = equal(*backs)
    return same
