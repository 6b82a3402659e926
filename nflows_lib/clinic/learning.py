"""Tests of what the flow can learn: its volume, its masks, its parameters, its scales, and its start."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from nflows_lib.clinic.bijection import MOVED, whole_jacobian
from nflows_lib.clinic.control import seeded
from nflows_lib.clinic.examination import (
    EXACT,
    LARGEST,
    Case,
    Pass,
    Record,
    all_parameters,
    copied,
    relative_error,
)
from nflows_lib.clinic.registry import TOO_LARGE, Finding, could_not_run, doctors_test
from nflows_lib.clinic.state import begin_again, looks_made_by_rule

STEP = 1e-5  # how far parameters are moved to take a difference


@doctors_test("gradient", finds=["F24", "P2", "P15", "P30", "P31"])
def gradient(case: Case) -> Finding:
    """Whether backward works, and gives the gradient that log p(x) has: the slope along one direction is compared."""
    if not any(p.requires_grad for p in all_parameters(case.flow)):
        return Finding(None, "the flow has no trainable parameters")
    flow, rows = case.woken(), case.rows(slice(0, None))
    parameters = [p for p in all_parameters(flow) if p.requires_grad]
    done = case.through(flow, *rows, grad=True)
    if not done.is_finite:  # the moved parameters are beyond what training reaches
        flow = copied(case.flow)
        parameters = [p for p in all_parameters(flow) if p.requires_grad]
        done = case.through(flow, *rows, grad=True)
    try:
        if not done.log_p.requires_grad:
            measured = "log p(x) has no gradient: forward leaves autograd's graph"
            return Finding(
                False, measured, "nothing can be learned: do not use no_grad, detach or .data in forward", "F24"
            )
        parts = {"log-det": _slope(done.log_det, parameters), "latent": _slope(done.log_p - done.log_det, parameters)}
    except RuntimeError as error:
        if "in-place" not in str(error) and "inplace" not in str(error):
            return could_not_run("backward", error)
        culprit = next((record.title for record in done.leaves if _cannot_go_back(record)), "forward")
        measured = f"{culprit} changes in place what backward needs"
        return Finding(False, measured, "no backward pass is possible: write h = h / 2, not h /= 2", "P2")
    if not all(map(math.isfinite, parts.values())):
        cause = "a branch that torch.where does not take, or a root of 0, has no gradient: clamp its input"
        return Finding(False, f"{MOVED}backward gives NaN or infinity, though log p(x) is finite", cause, "P30")
    if not any(parts.values()) and done.z.shape == rows[0].shape and relative_error(done.z, rows[0]) < 1e-12:
        cause = "the data lie outside of the interval on which the layers act: standardise them"
        return Finding(False, "the flow leaves the whole batch as it is, whatever its parameters are", cause, "P31")
    difference = _difference(case, flow, rows, parameters, STEP)
    for part, slope in parts.items():
        scale = max(1e-3, abs(difference[part]), abs(slope))
        if abs(slope - difference[part]) <= 0.01 * scale:
            continue
        truths = [difference[part], _difference(case, flow, rows, parameters, STEP / 4)[part]]
        if abs(truths[0] - truths[1]) > 1e-3 * scale or not math.isfinite(truths[0]):
            continue  # a kink or a jump
        if abs(slope - truths[0]) > 0.01 * scale:
            measured = f"{MOVED}the {part}'s gradient is {slope:.4g} along one direction, its slope {truths[0]:.4g}"
            if part == "log-det":
                return Finding(
                    False, measured, "a log-det is detached, or a number: keep it in autograd's graph", "P15"
                )
            return Finding(False, measured, "a tensor on the way to the latent is detached", "F24")
    return Finding(True, "backward gives the slope of log p(x)")


def _direction(parameters: list[nn.Parameter]) -> list[Tensor]:
    """One random number per number of the parameters, the same ones at every call."""
    with seeded(7):
        return [torch.randn_like(p) for p in parameters]


def _slope(values: Tensor, parameters: list[nn.Parameter]) -> float:
    """The slope of the mean of some values along the direction, from their gradient; 0 if they have none."""
    if not values.requires_grad:
        return 0.0
    grads = torch.autograd.grad(values.mean(), parameters, allow_unused=True, retain_graph=True)
    pairs = zip(grads, _direction(parameters), strict=True)
    return sum(((g * v).sum().item() for g, v in pairs if g is not None), 0.0)


def _difference(
    case: Case, flow: nn.Module, rows: tuple[Tensor, Tensor | None], parameters: list[nn.Parameter], step: float
) -> dict[str, float]:
    """The slopes of the means of the two parts of log p(x), from the flow's values a step before and after."""
    begin, ends = [p.detach().clone() for p in parameters], []
    with torch.no_grad():
        for sign in (1, -1):
            for parameter, at, v in zip(parameters, begin, _direction(parameters), strict=True):
                parameter.copy_(at + sign * step * v)
            done = case.through(flow, *rows)
            ends.append({"log-det": done.log_det.mean().item(), "latent": (done.log_p - done.log_det).mean().item()})
        for parameter, at in zip(parameters, begin, strict=True):
            parameter.copy_(at)
    return {part: (ends[0][part] - ends[1][part]) / (2 * step) for part in ends[0]}


def _cannot_go_back(record: Record) -> bool:
    """Whether no backward pass through this layer alone is possible."""
    try:
        with torch.enable_grad():
            z, log_det = record.again(record.x.detach().to(torch.float64))
            (z.sum() + log_det.sum()).backward()
    except RuntimeError as error:
        return "inplace" in str(error) or "in-place" in str(error)
    return False


@doctors_test("volume", finds=["F1"])
def volume(case: Case) -> Finding:
    """Whether some parameter changes the flow's log-det, and whether some layer can enlarge volume."""
    base = case.base_of(case.flow)
    if isinstance(base, nn.Module) and any(True for _ in base.parameters()):
        return Finding(None, "the prior has parameters")
    if case.whole_is_right is False:
        return Finding(None, "a log-det is wrong")
    done = case.through(case.flow, grad=True)
    parameters = [p for p in all_parameters(case.flow) if p.requires_grad]
    if not parameters:
        return Finding(None, "no layer has parameters to train")
    total = done.log_det.sum()
    grads = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else []
    fixed = all(g is None or not g.any() for g in grads)
    if fixed and not any(r.log_det.any() for r in done.records if r.learned) and not _varies(case, done):
        cause = "every learned layer keeps volume, so the loss has a lower limit: add a scaling layer"
        return Finding(False, "no parameter moves a log-det", cause, "F1")
    if not fixed and not case.alone and done.gapless and _only_shrinks(case):
        measured = "whatever is learned, no layer's log-det rises above 0"
        cause = "scales that can only shrink give log p(x) an upper limit: add a layer that scales both ways"
        return Finding(False, measured, cause, "F1")
    return Finding(True, "parameters change the log-det")


def _varies(case: Case, done: Pass) -> bool:
    """Whether the flow's log-det differs from example to example, or from that of its layers without parameters."""
    own = done.log_det - sum(record.log_det for record in done.leaves if not record.learned)
    constant = (own - own[0]).abs().max() <= EXACT
    return not constant or bool(own.abs().max() > EXACT and case.spacing is None and not case.random)


def _only_shrinks(case: Case) -> bool:
    """Whether no learned layer has a positive log-det for any example under strongly moved parameters."""
    shrinks = False
    for seed in range(12):
        flow = copied(case.flow)
        with torch.no_grad(), seeded(seed):
            for parameter in all_parameters(flow):
                parameter += (0.3, 1.0, 3.0)[seed % 3] * torch.randn_like(parameter)
            try:
                learned = [record for record in case.through(flow).leaves if record.learned]
            except Exception:  # the flow does not take any parameters
                return False
        if any((record.log_det > 1e-9).any() or record.log_det.isnan().any() for record in learned):
            return False  # as in the first copy, if some layer scales both ways
        shrinks |= any((record.log_det < -1e-3).any() for record in learned)
    return shrinks


@doctors_test("masks", finds=["F2"])
def masks(case: Case) -> Finding:
    """Whether every number of a woken copy's latent depends on more than one number of the data."""
    if not all_parameters(case.flow):
        return Finding(None, "the flow has no parameters")
    if case.dims == 1:
        return _in_one_dimension(case)
    if case.data_pass.z[0].numel() > LARGEST:
        return Finding(None, "the latent is too large for a Jacobian", why=TOO_LARGE)
    depends = torch.zeros(case.data_pass.z[0].numel(), case.dims, dtype=torch.bool)
    for i in (0, 1):
        depends |= whole_jacobian(case, case.woken_flow, *case.rows(slice(i, i + 1)))[0] != 0
    if not depends.any():
        return Finding(None, "the latent has no derivative with respect to the data")
    alone = (depends.sum(1) <= 1).float().mean().item()
    count = round(alone * case.data_pass.z[0].numel())
    if count == 1 and case.dims > 2:
        return Finding(None, "one number depends on itself alone, as the first of an autoregressive flow does")
    if alone == 1 and case.context is not None:
        return Finding(None, "given the context, the numbers of the latent are independent")
    if 0 < alone < 0.5 and any(map(_shuffles, case.data_pass.leaves)):
        why = f"{100 * alone:.0f} % of the latent's numbers depend on a single number of the data, by chance"
        return Finding(None, why)
    if alone > 0:
        measured = f"{100 * alone:.0f} % of the latent's numbers depend on a single number of the data"
        cause = "no coupling changes these numbers: alternate the masks, or mix the dimensions"
        return Finding(False, measured, cause, "F2")
    return Finding(True, "every number of the latent depends on several numbers of the data")


def _shuffles(record: Record) -> bool:
    """Whether a layer without parameters puts the numbers of an example in an order that looks random."""
    if record.learned or record.x.shape != record.z.shape or not record.x.is_floating_point():
        return False
    before, after = (list(map(tuple, side.flatten(1).T.tolist())) for side in (record.x, record.z))
    if len({*before}) < len(before) or {*before} != {*after}:
        return False
    order = torch.tensor([before.index(column) for column in after])
    return not looks_made_by_rule(order)


def _in_one_dimension(case: Case) -> Finding:
    """Whether a flow with networks is more than a scale and a shift of its only dimension."""
    if all(p.dim() < 2 or p.numel() == 1 for p in all_parameters(case.flow)) or case.random:
        return Finding(None, "the data have one dimension")
    x, z = (side.flatten().to(torch.float64) for side in (case.x, case.woken_pass.z))
    a, b = x - x.mean(), z - z.mean()
    if (b - (a * b).sum() / a.square().sum() * a).abs().max() > EXACT * b.abs().max():
        return Finding(True, "the flow is more than a scale and a shift of its only dimension")
    cause = "a coupling has no second dimension to read: use another bijection"
    return Finding(False, "the flow can only scale and shift its only dimension", cause, "F2")


@doctors_test("mirrored", finds=["F4"])
def mirrored(case: Case) -> Finding:
    """Whether two parameter tensors of a woken copy always have opposite gradients, so that one is superfluous."""
    seen: list[dict[str, Tensor]] = []
    if not any(p.requires_grad for p in case.flow.parameters()):
        return Finding(None, "the flow has no trainable parameters")
    for rows in (slice(0, 4), slice(4, 8)):
        named = {name: p for name, p in case.woken_flow.named_parameters() if p.requires_grad}
        mean = case.through(case.woken_flow, *case.rows(rows), grad=True).log_p.mean()
        grads = zip(named, torch.autograd.grad(mean, [*named.values()], allow_unused=True), strict=True)
        seen.append({name: grad.flatten() for name, grad in grads if grad is not None and grad.any()})
    names = sorted(seen[0].keys() & seen[1].keys())
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if all(s[a].shape == s[b].shape and (s[a] + s[b]).norm() < EXACT * s[a].norm() for s in seen):
                cause = "only the difference of the two counts, and it learns at twice the rate: keep one"
                return Finding(False, f"{a} and {b} have opposite gradients", cause, "F4")
    return Finding(True, "no two parameter tensors have opposite gradients")


@doctors_test("dead parameters", finds=["F24"])
def dead_parameters(case: Case) -> Finding:
    """Whether a parameter gets no gradient in any of four steps of a copy, each as long as Adam's first one."""
    flow = copied(case.flow)
    named = {name: p for name, p in flow.named_parameters() if p.requires_grad}
    if not named:
        return Finding(None, "the flow has no trainable parameters")
    alive = set()
    for step in range(4):
        loss = -case.through(flow, seed=step, grad=True).log_p.mean()
        grads = dict(zip(named, torch.autograd.grad(loss, [*named.values()], allow_unused=True), strict=True))
        grads = {name: grad for name, grad in grads.items() if grad is not None and grad.any()}
        alive |= {*grads}
        with torch.no_grad():
            for name, grad in grads.items():
                named[name] -= 1e-3 * grad.sign()
    dead = [name for name in named if name not in alive]
    if dead:
        measured = f"{len(dead)} of {len(named)} parameter tensors get no gradient: {', '.join(dead[:2])}"
        cause = "two layers of zeros in a row, or a layer never used: start only the last at zero"
        return Finding(False, measured, cause, "F24")
    return Finding(True, f"all {len(named)} parameter tensors get a gradient")


@doctors_test("scales", finds=["F12", "F13"])
def scales(case: Case) -> Finding:
    """Whether each affine coupling's log-scale stays bounded far from the data, by a bound that training can move.

    A shift may be unbounded, but must have no bound that training cannot move.
    """
    here = {record.name: record for record in case.data_pass.leaves}
    checked, one_sided = 0, 0
    for record in case.woken_pass.leaves:
        changes = _changes(record) if record.learned and record.x.is_floating_point() else None
        if changes is None:
            continue
        checked += 1
        (near, _), (wide, shift) = (_log_scale_and_shift(record, *changes, far) for far in (1e2, 1e4))
        if _grows(near.max(), wide.max()):
            cause = "the inverse divides by an unbounded scale: use g tanh(s)"
            return Finding(False, f"{record.title}: nothing bounds the log-scale", cause, "F12")
        one_sided += _grows(-near.min(), -wide.min())
        limit = _limit_for_ever(record, changes, wide, shift, here[record.name])
        if limit:
            cause = "training cannot move this bound: multiply by a learned gain"
            return Finding(False, f"{record.title}: {limit}", cause, "F13")
    if not checked:
        return Finding(None, "the flow has no affine couplings")
    note = f"; in {one_sided} the scale can shrink to 0" if one_sided else ""
    return Finding(True, f"the log-scale is bounded in {checked - one_sided} of {checked} couplings{note}")


def _grows(near: Tensor, wide: Tensor) -> bool:
    """Whether a log-scale goes on growing between 100 times and 10,000 times the distance of the data."""
    return not wide.isfinite().item() or (wide > 10 * max(near.item(), 1.0)).item()


def _limit_for_ever(
    record: Record, changes: tuple[Tensor, Tensor], log_scale: Tensor, shift: Tensor, here: Record
) -> str:
    """What to say of a shift with a bound that no parameter moves, or of a log-scale at such a bound; "" if neither."""
    tenfold = copy.deepcopy(record.layer)
    with torch.no_grad():
        for parameter in tenfold.parameters():
            parameter *= 10
    moved = _log_scale_and_shift(replace(record, layer=tenfold), *changes, 1e4)
    now = _log_scale_and_shift(here, *changes, 1.0)
    for i, (what, far) in enumerate({"log-scale": log_scale, "shift": shift}.items()):
        limit = far.abs().max()
        share = 100 * (now[i].abs() > 0.95 * limit).double().mean().item()
        if limit > 1e-3 and abs(moved[i].abs().max() / limit - 1) < 0.01 and (share > 50 or what == "shift"):
            return f"the {what} stays within {limit:.3g} whatever is learned, {share:.0f} % are at this bound"
    return ""


def _changes(record: Record) -> tuple[Tensor, Tensor] | None:
    """Masks of the numbers that an affine coupling changes: in its input, and in its flat output.

    None if the layer is not an affine coupling. A number that the coupling leaves unchanged may have been moved to
    another place: its values in the batch show where it is.
    """
    before, after = (list(map(tuple, side.flatten(1).T.tolist())) for side in (record.x, record.z))
    passing, known = set(after), set(before)
    changed = torch.tensor([column not in passing for column in before]).view(record.x.shape[1:])
    outputs = torch.tensor([column not in known for column in after])
    if changed.all() or not changed.any() or changed.sum() != outputs.sum():
        return None
    with torch.no_grad():
        steps = [record.again(record.x + step * changed)[0].flatten(1)[:, outputs] for step in (0.0, 1.0, 2.0)]
    straight = relative_error(steps[2] - steps[1], steps[1] - steps[0]) < EXACT
    return (changed, outputs) if straight else None


def _log_scale_and_shift(record: Record, changed: Tensor, outputs: Tensor, far: float) -> tuple[Tensor, Tensor]:
    """Log-scale and shift of the changed numbers, if the unchanged ones are ``far`` times as large, with both signs."""
    scales, shifts = [], []
    with torch.no_grad():
        for x in (far * record.x * ~changed, -far * record.x * ~changed):
            at_zero, at_one = (record.again(x + step * changed)[0].flatten(1)[:, outputs] for step in (0.0, 1.0))
            scales.append((at_one - at_zero).abs().log().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf))
            shifts.append(at_zero)
    return torch.cat(scales), torch.cat(shifts)


@doctors_test("start", finds=["F5", "F20", "F21"])
def start(case: Case) -> Finding:
    """Whether another start makes the batch likelier: log-scales at 0, a new first batch, or last layers at zero.

    All likelihoods are taken in training mode, so that stale running averages play no part.
    """
    now = case.log_p_of(copied(case.flow).train())
    if (wrong := _not_standardised(case)) is not None:
        return wrong
    starts = {
        "F5": (lambda flow: _scales_at_zero(flow, case), "log-scales at 0", "the log-scales start at random"),
        "F20": (
            lambda flow: _first_batch(flow, case),
            "ActNorm set from this batch",
            "the flow was not initialised from data",
        ),
        "F21": (
            lambda flow: _networks_at_zero(flow, case) | _first_batch(flow, case),
            "the networks' last layers at 0",
            "the networks' last layers do not start at zero",
        ),
    }
    found = {}
    for entry, (change, what, cause) in starts.items():
        flow = copied(case.flow)
        with torch.no_grad():
            if change(flow):
                found[entry] = (case.log_p_of(flow.train()) - now, what, cause)
    if not found:
        return Finding(None, "the flow has no start to compare with")
    # A first batch and zeros must beat a first batch alone by more than their noise does.
    entry, (gain, what, cause) = max(found.items(), key=lambda item: item[1][0] - 0.02 * (item[0] == "F21"))
    if gain > 0.15:
        measured = f"with {what} the batch is likelier by {gain:.2g} nats/dim"
        return Finding(False, measured, f"{cause}, or the flow is not trained", entry)
    return Finding(True, "no other start makes the batch likelier")


def _scales_at_zero(flow: nn.Module, case: Case) -> bool:
    """Set to 0 the parameters of elementwise layers not initialised from data; return whether there are any."""
    done = False
    for record in case.data_pass.leaves:
        flagged = any(flag.owner(case.flow) is record.layer for flag in case.flags)
        if record.learned and record.x.is_floating_point() and not flagged and record.is_elementwise():
            for parameter in record.layer_in(flow).parameters():
                parameter.zero_()
                done = True
    return done


def _first_batch(flow: nn.Module, case: Case) -> bool:
    """Let the flow initialise itself from this batch; return whether it has layers that do so."""
    flags = case.flags
    if hasattr(flow, "initialize"):  # its layers need not set themselves in forward
        buffers = (b for name, b in flow.named_buffers() if "init" in name and b.numel() == 1)
        flags = [buffer.fill_(0) for buffer in buffers]
        if flags:
            flow.initialize(case.x, case.context)
    elif flags:
        begin_again(flow, flags, case)
    return bool(flags)


def _not_standardised(case: Case) -> Finding | None:
    """What is wrong with a layer that sets a scale and a shift per channel from its first batch; None if nothing is."""
    if not case.flags:
        return None
    flow = copied(case.flow)
    with torch.no_grad():
        begin_again(flow, case.flags, case)
        done = case.through(flow)
    owners = {id(flag.owner(flow)) for flag in case.flags}
    for record in done.leaves:
        if id(record.layer) not in owners or not record.is_elementwise():
            continue
        values = record.z.transpose(0, 1).flatten(1)
        mean, deviation = values.mean(1).abs().max().item(), (values.std(1) - 1).abs().max().item()
        if mean > 0.05 or deviation > 0.05:
            measured = f"{record.title}, set from this batch, gives means up to {mean:.2g}"
            measured += f" and standard deviations off 1 by up to {deviation:.2g}"
            return Finding(False, measured, "the first batch must leave it with mean 0 and variance 1", "F20")
    return None


def _networks_at_zero(flow: nn.Module, case: Case) -> bool:
    """Set to 0 the last linear or convolutional layer inside each coupling; return whether there are any."""
    done = False
    for record in case.data_pass.leaves:
        layer = record.layer_in(flow)
        last = [m for m in layer.modules() if m is not layer and isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        if last:
            for name, parameter in last[-1].named_parameters():
                if not name.endswith("original1"):  # the direction of a normalised weight; its length is original0
                    parameter.zero_()
            done = True
    return done
