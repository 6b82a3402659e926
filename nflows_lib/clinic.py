"""The doctor: tests of a flow on a batch of its own data. Each looks for one thing and names the cause if it finds it.

Everything is measured on copies in float64: what is off by more than rounding there is a mistake, not a lack of digits.
Many tests look at a *woken* copy, every parameter of which has been moved at random, since a fresh flow is close to the
identity and hides what it is built of.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nflows_lib.distributions import Base
from nflows_lib.examination import (
    Case,
    Record,
    chain_of,
    computing_by_default_in,
    copied,
    detached,
    given,
    gradients,
    in_float64,
    jacobian,
    relative_error,
)
from nflows_lib.flow import check_context

LARGEST = 1024  # dimensions of which a whole Jacobian is taken
BEYOND = torch.finfo(torch.float32).max  # what float32 cannot hold, even if float64 can
CLOSED = 1e-5  # as far as an inverse that is iterated comes, relative to the largest value
EXACT = 1e-6  # more than rounding leaves in float64, relative to the largest value


@dataclass(frozen=True)
class Finding:
    """What one test found.

    ``passed`` is None where the test does not apply. ``entry`` names the entry of the book's clinic, "F3" say, that
    shows the failure and its mend.
    """

    test: str
    passed: bool | None
    measured: str
    cause: str = ""
    entry: str = ""

    def __str__(self) -> str:
        line = f"{ {True: '✓', False: '✗', None: '–'}[self.passed] } {self.test:15} {self.measured}"
        return f"{line}\n  {'cause':15} {self.cause} [{self.entry}]" if self.entry else line


def doctor(
    flow: nn.Module,
    batch: Tensor,
    context: Tensor | None = None,
    *,
    base: Base | None = None,
    grad_norms: Sequence[float] | None = None,
) -> list[Finding]:
    """Examine a flow on a batch of its data: print what each test finds, and return the findings.

    The flow, its mode and the random generator stay as they are. It is judged in the mode that it is in: call
    ``flow.eval()`` first, unless that is the question. Every module inside it that has an ``inverse`` and returns a
    pair is examined as a layer of its own.

    Args:
        flow: a :class:`~nflows_lib.flow.Flow`, or any module whose ``forward(x)`` goes from data to latent and returns
            ``(z, log_det)``, the log_det in nats, (B,), and whose ``inverse(z)`` returns x or a tuple that begins with
            it. Where there is a context, both take it as their second argument.
        batch: examples of the data as the flow takes them, (B, ...), at least 8; the first 64 are looked at.
        context: one row for each example, where the flow is conditional.
        base: density of the latent of a module that is no Flow; standard normal where None.
        grad_norms: lengths of the gradients of a training run as the optimizer took them (after clipping), one a step.

    Raises:
        ValueError: flow has no forward and inverse; batch has too few rows, or values that are not finite; context has
            another number of rows, or is not of finite floats.

    >>> import torch
    >>> from nflows_lib.models import realnvp_points
    >>> findings = doctor(realnvp_points(2).eval(), torch.randn(64, 2))  # doctest: +ELLIPSIS
    64 examples of (2,), 6 layers with an inverse, evaluation mode
    ...
    nothing found
    >>> any(finding.passed is False for finding in findings)
    False
    """
    _check(flow, batch, context)
    findings: list[Finding] = []
    with in_float64():
        try:
            case = Case(flow, batch, context, base)
            mode = "training" if flow.training else "evaluation"
            count = len({id(record.layer) for record in case.run.records})
            print(f"{len(case.x)} examples of {tuple(batch.shape[1:])}, {count} layers with an inverse, {mode} mode")
        except Exception as error:  # what the reader's own module raises is a finding
            findings.append(_does_not_run(error))
        else:
            for name, test in _TESTS.items():
                findings += _conducted(name, test, case)
                case.sound = all(finding.passed is not False for finding in findings)
                if test is _finite and not case.sound:
                    break  # nothing can be said of what is not a number
        findings += _gradient_lengths(grad_norms)
    for finding in findings:
        print(finding)
    failed = sum(finding.passed is False for finding in findings)
    print(f"{failed} of {len(findings)} tests failed: mend the first one first" if failed else "nothing found")
    return findings


def _check(flow: nn.Module, batch: Tensor, context: Tensor | None) -> None:
    if not isinstance(flow, nn.Module) or not callable(getattr(chain_of(flow), "inverse", None)):
        raise ValueError(f"flow: expected a Flow, or a module with forward and inverse, got {type(flow).__name__}")
    if not isinstance(batch, Tensor) or batch.dim() < 2 or len(batch) < 8:
        got = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise ValueError(f"batch: expected a tensor (B, ...) of at least 8 examples, got {got}")
    if batch.is_floating_point() and not batch.isfinite().all():
        raise ValueError("batch: expected finite values, got NaN or infinity")
    check_context(context, len(batch))


def _does_not_run(error: Exception) -> Finding:
    message = str(error).partition("\n")[0]
    cause = entry = ""
    if "computed outside of forward" in message:
        cause, entry = "its graph is freed by the first backward; the second step dies", "F4"
    elif "log_det" in message:
        cause, entry = "sum the log-det over all dimensions but the batch's", "P15"
    elif "initialize" in message:
        cause, entry = "no first batch was seen, or the flag that says so was not saved", "F20"
    return Finding("it runs", False, f"{type(error).__name__}: {message}", cause, entry)


def _conducted(name: str, test: Callable[[Case], Iterator[Finding]], case: Case) -> list[Finding]:
    """A test's findings. If it breaks on the reader's module it says so, and the others go on."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            found = list(test(case))
    except Exception as error:
        message = str(error).partition("\n")[0][:100]
        return [Finding(name, None, f"{type(error).__name__}: {message}")]
    first_of = {finding.entry: finding for finding in reversed(found)}  # the same in many layers is said once
    more = Counter(finding.entry for finding in found)
    return [
        replace(finding, measured=finding.measured + f" ({more[entry] - 1} more)" * (more[entry] > 1))
        for entry, finding in sorted(first_of.items(), key=lambda item: found.index(item[1]))
    ]


# --- the tests: is it a bijection, and does it know its volume? -------------------------------------------------------

_DRAWN = "numbers of the latent are lost and drawn afresh: the inverse needs them all"
_UNMASKED = "what the network reads is changed as well: mask its output"


def _finite(case: Case) -> Iterator[Finding]:
    """Forward, on the data: the first layer that gives NaN or infinity."""
    for record in case.run.leaves:
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
        elif _elementwise(record):
            cause, entry = "a scale has grown for ever, as it does on data without noise", "F6"
        yield Finding("finite", False, f"{record.title} makes NaN or infinity of the data", cause, entry)
        return
    low, high = case.run.log_p.min(), case.run.log_p.max()
    if not (case.run.log_p.abs() < BEYOND).all():
        most = case.run.z.abs().max()
        cause = "values grow from layer to layer: start the networks' last layers at zero"
        yield Finding("finite", False, f"log p(x) is not finite: latents up to {most:.2g}", cause, "F21")
        return
    yield Finding("finite", True, f"log p(x) from {low:.4g} to {high:.4g} nats")


def _in_place(case: Case) -> Iterator[Finding]:
    """Whether a layer changes what it is given."""
    for record in case.run.inner_first:
        if record.overwritten:
            measured = f"{record.title} changes its input in place"
            yield Finding("input", False, measured, "the caller's data, or what another layer needs: make a copy", "P2")
            return
    yield Finding("input", True, "no layer changes what it is given")


def _round_trip(case: Case) -> Iterator[Finding]:
    """The inverse of each layer's output against its input, and whether it is the same when asked twice."""
    worst, closed, broken = 0.0, 0, set()
    with torch.no_grad():
        for record in case.run.inner_first:
            if record.is_within(broken):
                continue  # the one inside has been named
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
            yield Finding("round trip", False, *found)
    if not broken:
        measured = f"every layer's closes, to {worst:.0e}" if closed else "no layer has an inverse"
        yield Finding("round trip", True if closed else None, measured)


def _log_det(case: Case) -> Iterator[Finding]:
    """Each layer's log-det of one example against autograd's Jacobian, on a corner of it where it is large."""
    compared, too_large = 0, 0
    broken = {id(case.noise.layer)} if case.noise else set()
    for record in case.run.inner_first:
        square = record.z[0].numel() == record.x[0].numel() and record.x.is_floating_point()
        if record.is_within(broken) or not square:
            continue
        x = _corner(record)
        if x is None:
            too_large += 1
            continue
        claimed, again = record.again(x)[1].item(), record.again(x)[1].item()
        if claimed != again:
            continue  # an estimate, drawn afresh at every call
        if x.shape == record.x[:1].shape and abs(claimed - record.log_det[0].item()) > EXACT * max(1.0, abs(claimed)):
            broken.add(id(record.layer))
            measured = f"{record.title}: {claimed:.4g} alone, {record.log_det[0]:.4g} in the batch"
            yield Finding("log-det", False, measured, "sum over all dimensions but the batch's", "P15")
            continue
        true = torch.linalg.slogdet(jacobian(lambda v, r=record: r.again(v)[0], x)).logabsdet.item()
        off, compared = abs(claimed - true) / max(1.0, abs(true)), compared + 1
        if off <= EXACT:
            continue
        broken.add(id(record.layer))
        cause = _cause_of_log_det(record, (claimed - true) / x.numel(), case.levels)
        yield Finding("log-det", False, f"{record.title} says {claimed:.4f} nats, autograd {true:.4f}", *cause)
    if len(broken) == (case.noise is not None):
        left = f"; {too_large} are too large" if too_large else ""
        yield Finding("log-det", True if compared else None, f"{compared} layers agree with autograd{left}")


def _corner(record: Record) -> Tensor | None:
    """One example for the layer whose Jacobian is not too large; None if there is none."""
    x = record.x[:1]
    if x.numel() <= LARGEST:
        return x
    try:
        corner = x[..., :4, :4]
        return corner if corner.numel() <= LARGEST and record.again(corner)[0].numel() == corner.numel() else None
    except (ValueError, RuntimeError, IndexError):
        return None


def _cause_of_log_det(record: Record, each: float, n: int | None) -> tuple[str, str]:
    """From how much the log-det is too large, in each dimension."""
    if n and abs(each - math.log(n)) < 1e-6:
        return f"a scaling by 1/{n} that is not counted", "F10"
    if n and abs(abs(each) - math.log(n / (n - 1))) < 1e-6:
        return f"one of {n} and {n - 1} scales, the other is counted", "F9"
    if _unmasked(record):
        return _UNMASKED, "F3"
    return "its formula is not that of what forward does", "P15"


def _unmasked(record: Record) -> bool:
    """Whether it has a mask and changes what that lets pass."""
    masks = [b for b in record.layer.buffers() if b.dtype == torch.bool and b.shape == record.x.shape[1:]]
    return any(not torch.equal(record.x[:, mask], record.z[:, mask]) for mask in masks)


def _elementwise(record: Record) -> bool:
    """Whether the first number of the output depends on the first number of an example alone, and no other does."""
    step = torch.zeros_like(record.x[0], memory_format=torch.contiguous_format)
    step.view(-1)[0] = 1
    first, others = ((record.again(record.x + s)[0] != record.z).flatten(1).any(0) for s in (step, 1 - step))
    return first.numel() == record.x[0].numel() and not first[1:].any() and not others[0]


def _sum_of_log_dets(case: Case) -> Iterator[Finding]:
    """What the flow returns against what its layers returned."""
    total = sum(record.log_det for record in case.run.outermost)
    off = (case.run.log_det - total).abs().max().item()
    numbers = case.run.z[0].numel()
    if off > EXACT * max(1.0, case.run.log_det.abs().max().item()):
        yield Finding("sum", False, f"off by {off:.4g} nats", "a layer's log-det is not added, or added twice", "P15")
    elif numbers != case.dims:
        yield Finding("sum", False, f"{case.dims} numbers go in, {numbers} come out", _DRAWN, "F18")
    else:
        yield Finding("sum", True, "the layers' log-dets add up to the flow's")


# --- the tests: is it a likelihood of these data? ---------------------------------------------------------------------


def _noise(case: Case) -> Iterator[Finding]:
    """Discrete data need noise: fresh for every value, and nothing after it that makes them discrete again."""
    noise, x = case.noise, case.x
    if noise is None and case.spacing is not None:
        shifted = [record for record in case.run.records if _adds_one_vector(record)]
        if shifted:
            measured = f"{shifted[0].title} adds the same numbers to every example, at every call"
            yield Finding("noise", False, measured, "a shifted grid is as discrete as the grid", "F8")
        else:
            measured = f"data on a grid of step {case.spacing:.4g}, and the flow adds no noise"
            yield Finding("noise", False, measured, "a density on a grid has no best value: dequantize", "F6")
        return
    if noise is not None:
        with torch.no_grad():
            rows, _ = noise.again(noise.x[:1].expand(8, *noise.x.shape[1:]))
        if torch.equal(rows, rows[:1].expand_as(rows)):
            measured = f"{noise.title} gives eight copies of an example the same noise"
            yield Finding("noise", False, measured, "one vector for the whole batch: draw one for each value", "F8")
            return
    noisy = x if noise is None else noise.z
    values, counts = noisy.unique(return_counts=True)
    share = counts.max().item() / noisy.numel()
    if counts.max() > 3 and share > 0.005:
        measured = f"{100 * share:.1f} % of the values that enter are exactly {values[counts.argmax()]:.4g}"
        cause = "a clamp after the noise" if noise is not None else "clamped after the noise, or discrete in part"
        yield Finding("noise", False, measured, cause, "F7")
    else:
        yield Finding("noise", True, "real numbers" if noise is None else f"{noise.title}: fresh for every value")


def _adds_one_vector(record: Record) -> bool:
    """Whether it adds to integers what is not the same for all dimensions, but for all examples."""
    if record.x.shape != record.z.shape or record.learned:
        return False
    added = record.z - record.x
    same = (added - added[:1]).abs().max() < 1e-9
    return bool(same and added.flatten(1)[0].std() > 1e-3 and torch.equal(record.x, record.x.round()))


def _bound(case: Case) -> Iterator[Finding]:
    """On discrete data no mean log-likelihood is honestly above D log(1 / step), since P(k) <= 1."""
    if case.spacing is None:
        yield Finding("D log n", None, "real numbers: no bound")
        return
    limit, reached = case.dims * math.log(1 / case.spacing), case.run.log_p.mean().item()
    measured = f"mean log p(x) {reached:.4g} nats, the limit {limit:.4g}"
    if reached > limit:
        cause = "no noise, or a scaling that is not counted: a file of less than no length"
        yield Finding("D log n", False, measured, cause, "F6" if case.noise is None else "F10")
    else:
        yield Finding("D log n", True, measured)


def _bits(case: Case) -> Iterator[Finding]:
    """The flow's own bits_per_dim against -log p(x) / (D log 2)."""
    own = getattr(case.flow, "bits_per_dim", None)
    if not callable(own):
        yield Finding("bits/dim", None, "the flow has no bits_per_dim")
        return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        said = own(*given(case.x, case.context)).mean().item()
    right = -case.run.log_p.mean().item() / (case.dims * math.log(2))
    measured, off, n = f"says {said:.3f}, is {right:.3f}", said - right, case.levels
    if abs(off) < 1e-4:
        yield Finding("bits/dim", True, f"{right:.3f}")
    elif n == 2 and abs(abs(off) - 1) < 1e-4:
        yield Finding("bits/dim", False, measured, "log 2 for two levels, counted where nothing was scaled", "F26")
    elif n and abs(abs(off) - math.log2(n)) < 1e-4:
        yield Finding("bits/dim", False, measured, f"log {n} is left out, or counted twice", "F10")
    elif n and 0 < -off < math.log2(n):
        kept = case.dims * (1 + off / math.log2(n))
        yield Finding("bits/dim", False, measured, f"D is {case.dims}, it counts {kept:.0f}", "F19")
    else:
        yield Finding("bits/dim", False, measured, "it is -log p(x) / (D log 2), D that of the data", "F10")


# --- the tests: what can it learn? ------------------------------------------------------------------------------------


def _volume(case: Case) -> Iterator[Finding]:
    """Whether any parameter moves any log-det."""
    base = case.base_of(case.flow)
    if isinstance(base, nn.Module) and any(True for _ in base.parameters()):
        yield Finding("volume", None, "the prior has parameters")
        return
    flow = copied(case.flow)
    run = case.through(flow, grad=True)
    learned = [record for record in run.leaves if record.learned]
    total = sum((record.log_det.sum() for record in learned), torch.zeros(()))
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not learned or not parameters:
        yield Finding("volume", None, "no layer learns")
        return
    grads = [None] * len(parameters)
    if total.requires_grad:
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
    if all(g is None or not g.any() for g in grads) and not any(r.log_det.any() for r in learned):
        cause = "every learned layer keeps volume, so log p stops at the prior's peak: add a scaling"
        yield Finding("volume", False, "no parameter moves a log-det", cause, "F1")
    else:
        yield Finding("volume", True, "learned")


def _changed(case: Case) -> Iterator[Finding]:
    """Of a woken copy: does every number of the latent depend on more than one of the data?"""
    if case.dims < 2 or case.run.z[0].numel() > LARGEST:
        yield Finding("masks", None, "one dimension" if case.dims < 2 else "too large for a Jacobian")
        return
    if not any(record.learned for record in case.run.records):
        yield Finding("masks", None, "no layer learns")
        return
    entered, woken = [], case.woken()

    def enter(u: Tensor) -> Tensor:
        entered.append(u.detach().requires_grad_())
        return entered[-1]

    depends = torch.zeros(case.run.z[0].numel(), case.dims, dtype=torch.bool)
    for i in (0, 1):
        x, context = case.rows(slice(i, i + 1))
        if case.noise is None:
            x = enter(x.to(torch.float64))
        run = case.through(woken, x, context, grad=True, after_noise=enter)
        depends |= gradients(run.z.flatten(), entered[-1]) != 0
    alone = (depends.sum(1) <= 1).float().mean().item()
    if alone > 0:
        measured = f"{100 * alone:.0f} % of the latent depends on one number of the data each"
        yield Finding("masks", False, measured, "no coupling changes that part: alternate masks, or mix", "F2")
    else:
        yield Finding("masks", True, "every part of the vector is changed by another")


def _dead(case: Case) -> Iterator[Finding]:
    """Four steps of training of a copy: is there a parameter that never has a gradient?"""
    flow = copied(case.flow)
    named = {name: p for name, p in flow.named_parameters() if p.requires_grad}
    if not named:
        yield Finding("dead parameters", None, "no parameters")
        return
    alive, optimizer = set(), torch.optim.Adam(named.values(), lr=1e-3)
    for step in range(4):
        loss = -case.through(flow, seed=step, grad=True).log_p.mean()
        optimizer.zero_grad()
        loss.backward()
        alive |= {name for name, p in named.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    dead = [name for name in named if name not in alive]
    if dead:
        measured = f"{len(dead)} of {len(named)} tensors get no gradient: {', '.join(dead[:2])}"
        yield Finding(
            "dead parameters", False, measured, "two zeros in a row, or never used: zero the last only", "F24"
        )
    else:
        yield Finding("dead parameters", True, f"all {len(named)} tensors get a gradient")


def _mirrored(case: Case) -> Iterator[Finding]:
    """Of a woken copy: two tensors whose gradients are always opposite do one thing twice."""
    seen: list[dict[str, Tensor]] = []
    if not any(p.requires_grad for p in case.flow.parameters()):
        yield Finding("mirrored", None, "no parameters")
        return
    for rows in (slice(0, 4), slice(4, 8)):
        flow = case.woken()
        case.through(flow, *case.rows(rows), grad=True).log_p.mean().backward()
        seen.append({n: p.grad.flatten() for n, p in flow.named_parameters() if p.grad is not None and p.grad.any()})
    names = sorted(seen[0].keys() & seen[1].keys())
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if all(s[a].shape == s[b].shape and (s[a] + s[b]).norm() < EXACT * s[a].norm() for s in seen):
                cause = "only their difference counts, at twice the rate: keep one of them"
                yield Finding("mirrored", False, f"{a} and {b} have opposite gradients", cause, "F4")
                return
    yield Finding("mirrored", True, "no two tensors do the same")


def _scales(case: Case) -> Iterator[Finding]:
    """Couplings far from the data: is the log-scale bounded, and may it grow? Is a shift bounded?"""
    here = {record.name: record for record in case.run.leaves}
    checked, one_sided = 0, 0
    for record in case.woken_run.leaves:
        changes = _changes(record) if record.learned and record.x.is_floating_point() else None
        if changes is None:
            continue
        checked += 1
        (near, _), (wide, shift) = (_log_scale_and_shift(record, *changes, far) for far in (1e2, 1e4))
        if _grows(near.max(), wide.max()):
            cause = "the inverse divides by it, far from the data: g tanh"
            yield Finding("scales", False, f"{record.title}: log-scale unbounded", cause, "F12")
            return
        one_sided += _grows(-near.min(), -wide.min())
        limit = _limit_for_ever(record, changes, wide, shift, here[record.name])
        if limit:
            cause = "a bound that nothing can move: multiply by a learned gain"
            yield Finding("scales", False, f"{record.title}: {limit}", cause, "F13")
            return
    note = f"; {one_sided} can shrink without limit" if one_sided else ""
    measured = f"bounded in {checked - one_sided} of {checked} couplings{note}" if checked else "no affine couplings"
    yield Finding("scales", True if checked else None, measured)


def _grows(near: Tensor, wide: Tensor) -> bool:
    return not wide.isfinite().item() or (wide > 10 * max(near.item(), 1.0)).item()


def _limit_for_ever(
    record: Record, changes: tuple[Tensor, Tensor], log_scale: Tensor, shift: Tensor, here: Record
) -> str:
    """What is bounded whatever is learned, if it is a shift, or a log-scale that has come there; "" if nothing is."""
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
            return f"{what} within {limit:.3g} whatever is learned, {share:.0f} % there"
    return ""


def _changes(record: Record) -> tuple[Tensor, Tensor] | None:
    """What an affine coupling changes: masks of an example's numbers before it and, flat, after it. None if it is none.

    What passes may have been moved: it is known by its values.
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
    """Of what a coupling changes, with the numbers that pass so many times as far out, on both sides."""
    scales, shifts = [], []
    with torch.no_grad():
        for x in (far * record.x * ~changed, -far * record.x * ~changed):
            at_zero, at_one = (record.again(x + step * changed)[0].flatten(1)[:, outputs] for step in (0.0, 1.0))
            scales.append((at_one - at_zero).abs().log().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf))
            shifts.append(at_zero)
    return torch.cat(scales), torch.cat(shifts)


def _start(case: Case) -> Iterator[Finding]:
    """Would another start be likelier: scales at 0, a first batch again, networks that end in zeros and that, too?

    In training mode: of running averages nothing is asked here.
    """
    now = case.log_p_of(copied(case.flow).train())
    arms = {
        "F5": (lambda flow: _scales_at_zero(flow, case), "log-scales at 0", "log-scales that start at random: zeros"),
        "F20": (lambda flow: _first_batch(flow, case), "initialised from this batch", "not initialised from data"),
        "F21": (
            lambda flow: _networks_at_zero(flow, case) | _first_batch(flow, case),
            "the networks' last layers at zero",
            "networks that do not start at zero",
        ),
    }
    found = {}
    for entry, (change, what, cause) in arms.items():
        flow = copied(case.flow)
        with torch.no_grad():
            if change(flow):
                found[entry] = (case.log_p_of(flow.train()) - now, what, cause)
    if not found:
        yield Finding("start", None, "nothing that has a better start")
        return
    entry, (gain, what, cause) = max(found.items(), key=lambda item: item[1][0])
    if gain > 0.15:
        yield Finding("start", False, f"with {what} likelier by {gain:.2g} nats/dim", f"{cause}; or not trained", entry)
    else:
        yield Finding("start", True, "no fresh start is likelier")


def _scales_at_zero(flow: nn.Module, case: Case) -> bool:
    """Set to 0 what scales each number by itself, and is not initialised from data."""
    done = False
    for record in case.run.leaves:
        if record.learned and record.x.is_floating_point() and not _flags(record.layer) and _elementwise(record):
            for parameter in chain_of(flow).get_submodule(record.name).parameters():
                parameter.zero_()
                done = True
    return done


def _flags(module: nn.Module) -> list[Tensor]:
    """Buffers that say whether a first batch has been seen, by their names in the common libraries."""
    return [buffer for name, buffer in module.named_buffers() if "init" in name and buffer.numel() == 1]


def _first_batch(flow: nn.Module, case: Case) -> bool:
    """Let the flow initialise itself from this batch."""
    flags = _flags(flow)
    for flag in flags:
        flag.fill_(0)
    if flags and hasattr(flow, "initialize"):
        flow.initialize(case.x, case.context)
    elif flags:
        case.through(flow.train())
    return bool(flags)


def _networks_at_zero(flow: nn.Module, case: Case) -> bool:
    """Set to 0 the last linear or convolutional layer inside each coupling."""
    done = False
    for record in case.run.leaves:
        layer = chain_of(flow).get_submodule(record.name)
        last = [m for m in layer.modules() if m is not layer and isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        if last:
            for name, parameter in last[-1].named_parameters():
                if not name.endswith("original1"):  # the direction of a normalised weight, whose length is original0
                    parameter.zero_()
            done = True
    return done


# --- the tests: images ------------------------------------------------------------------------------------------------


def _mixing(case: Case) -> Iterator[Finding]:
    """Of images: do squeezes keep neighbours together, do channels mix, do couplings see the channels of a position?"""
    images = [r for r in case.woken_run.leaves if r.x.dim() == 4 and r.x.is_floating_point() and r is not case.noise]
    moved = [(record, source) for record in images if not record.learned and (source := _sources(record)) is not None]
    squeezes = [(record, source) for record, source in moved if source.shape != record.x.shape[1:]]
    for record, source in squeezes:
        if _torn(source, tuple(record.x.shape[1:])):
            measured = f"{record.title} puts pixels together that are no neighbours"
            yield Finding("mixing", False, measured, "a reshape is no squeeze: pixel_unshuffle", "F17")
            return
    mixed, sees = set(), {}  # by shape: is there a learned matrix; does a coupling see the channels of a position
    for record in images:
        shape = tuple(record.x.shape[1:])
        if record.learned and record.x.shape == record.z.shape and min(shape[1:]) >= 2:
            across, elsewhere = _effects(record)
            if elsewhere:
                sees[shape] = sees.get(shape, False) or across
            elif across:
                mixed.add(shape)
    fixed = Counter(
        tuple(source.shape)
        for record, source in moved
        if source.shape == record.x.shape[1:] and not torch.equal(source.flatten(), torch.arange(source.numel()))
    )
    fixed = {shape: n for shape, n in fixed.items() if n > 1 and shape[0] > 2 and shape not in mixed}
    if fixed:
        shape, n = next(iter(fixed.items()))
        measured = f"{n} fixed permutations of {shape[0]} channels"
        yield Finding("mixing", False, measured, "learn it: an invertible 1x1 convolution", "F22")
    elif squeezes and not all(sees.get(shape, True) for shape in mixed):
        measured = "no coupling tells one channel of a position from another"
        yield Finding("mixing", False, measured, "checkerboards after a squeeze: split the channels", "F23")
    else:
        yield Finding("mixing", True if images else None, "squeezes and channels in order" if images else "no images")


def _sources(record: Record) -> Tensor | None:
    """Where each value of the output comes from, if the layer only moves values: indices into the input."""
    numbers = torch.arange(record.x[0].numel(), dtype=torch.float64)
    try:
        z = record.again(numbers.view(1, *record.x.shape[1:]))[0][0]
    except ValueError:  # a layer that checks its values
        return None
    return z.long() if z.dim() == 3 and torch.equal(z.flatten().sort().values, numbers) else None


def _torn(source: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the channels of one position come from farther apart than the factor by which the image shrank."""
    rows, columns = source % (shape[1] * shape[2]) // shape[2], source % shape[2]
    spans = [(side.amax(0) - side.amin(0)).max().item() + 1 for side in (rows, columns)]
    return spans[0] > shape[1] // source.shape[1] or spans[1] > shape[2] // source.shape[2]


def _effects(record: Record) -> tuple[bool, bool]:
    """Whether a channel depends on others of its position, and on other positions: at two neighbouring positions."""
    across = elsewhere = False
    for column in (0, 1):
        J = jacobian(lambda v, c=column: record.again(v)[0][:, :, 1, c], record.x[:1]).abs()
        J = J.view(-1, *record.x.shape[1:])  # (channel of z, channel, row, column of x)
        here = J[:, :, 1, column].clone()
        J[:, :, 1, column] = 0
        across |= bool((here - here.diagonal().diag()).any())
        elsewhere |= bool(J.any())
    return across, elsewhere


# --- the tests: how it is used ----------------------------------------------------------------------------------------


def _latent(case: Case) -> Iterator[Finding]:
    """Mean and spread of the latents; after training they are those of the base density."""
    z = case.run.z.flatten(1)
    measured = f"mean {z.mean():.2f}, standard deviation {z.std():.2f}, largest {z.abs().max():.3g}"
    yield Finding("latent moments", None, measured)


def _flag_saved(case: Case) -> Iterator[Finding]:
    """A layer that initialises itself from data and says so in a plain attribute does it again after loading."""
    forgetful = [
        type(module).__name__
        for module in case.given.modules()
        if any(isinstance(v, bool) and re.search("initiali[sz]ed|inited", k) for k, v in vars(module).items())
        and not _flags(module)
    ]
    if forgetful:
        measured = f"{forgetful[0]} keeps whether it is initialised in a plain attribute"
        yield Finding("saved state", False, measured, "it starts again on load: make it a buffer", "F20")
    else:
        yield Finding("saved state", True, "nothing is kept outside of the state dict")


def _neighbours(case: Case) -> Iterator[Finding]:
    """In the mode that the flow is in: the likelihood of four examples in the company of others."""
    flow = detached(case.given).to("cpu", torch.float64)
    _, context = case.rows(slice(0, 8))
    others = [case.x[4:8], case.x[-4:], case.x[:4]]
    states, runs = copy.deepcopy(flow.state_dict()), []
    for company in others:
        flow.load_state_dict(states)
        runs.append(case.through(flow, torch.cat([case.x[:4], company]), context))
    first = runs[0].log_p[:4]
    moved = max((run.log_p[:4] - first).abs().max().item() for run in runs[1:])
    if moved <= EXACT * max(1.0, first.abs().max().item()):
        yield Finding("neighbours", True, "an example's log p(x) is its own")
        return
    measured = f"log p(x) moves by {moved:.3g} nats with the neighbours"
    if all(torch.equal(run.z[:4], runs[0].z[:4]) for run in runs[1:]):
        yield Finding("neighbours", False, measured, "the log-det is summed over the batch", "P15")
    elif flow.training:
        yield Finding("neighbours", False, measured, "batch statistics make no density of one example: eval()", "F15")
    else:
        yield Finding("neighbours", False, measured, "batch statistics, and in evaluation mode, too", "F15")


def _two_modes(case: Case) -> Iterator[Finding]:
    """Training against evaluation mode: likelihood, and in the flow's own mode the round trip of the whole."""
    if _fresh_averages(case.flow):
        yield Finding("modes", None, "running averages that no batch has moved yet: nothing to compare")
        return
    training = copied(case.flow).train()
    gap = case.log_p_of(training) - case.run.log_p.mean().item() / case.dims
    if case.given.training and abs(gap) > 1e-9:
        off = _whole_round_trip(case, copied(case.flow).train())
        if off > 1e-3:
            measured = f"training mode: data to latent and back is off by {off:.2g}"
            drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p for m in training.modules())
            cause = "dropout draws afresh both ways" if drops else "forward uses the batch, the inverse the averages"
            yield Finding("modes", False, measured, f"{cause}: eval()", "F16")
            return
    if not abs(gap) < 0.5:
        measured = f"training mode is likelier by {gap:.3g} nats/dim than evaluation"
        yield Finding("modes", False, measured, "running averages that are not the data's: stale, or too early", "F15")
    else:
        yield Finding("modes", True, f"training and evaluation differ by {abs(gap):.1g} nats/dim")


def _fresh_averages(flow: nn.Module) -> bool:
    """Whether there are running averages, all of them as they are made: mean 0 and variance 1."""
    buffers = {name: b for name, b in flow.named_buffers() if b.is_floating_point() and re.search("mean|var", name)}
    return bool(buffers) and all((b == (1 if "var" in name else 0)).all() for name, b in buffers.items())


def _whole_round_trip(case: Case, flow: nn.Module) -> float:
    """Largest relative error, noise left out, of the values that leave the noise layer (or of the data)."""
    with torch.no_grad():
        run = case.through(flow)
        entered = case.x if case.noise is None else next(r.z for r in run.records if r.name == case.noise.name)
        return relative_error(_back_to_noise(case, flow, run.z), entered)


def _back_to_noise(case: Case, flow: nn.Module, z: Tensor) -> Tensor:
    """The inverse of the whole flow, short of rounding: what would be rounded to levels."""
    if case.noise is not None:
        chain_of(flow).get_submodule(case.noise.name).inverse = lambda z, context=None: z
    context = None if case.context is None else case.context[torch.arange(len(z)) % len(case.context)]
    x = chain_of(flow).inverse(*given(z, context))
    return x[0] if isinstance(x, tuple) else x


def _single_precision(case: Case) -> Iterator[Finding]:
    """The round trip of the whole in float32."""
    single = copy.copy(case)
    single.x = case.x.float() if case.x.is_floating_point() else case.x
    single.context = None if case.context is None else case.context.float()
    with computing_by_default_in(torch.float32):
        off = _whole_round_trip(single, copied(case.flow).float())
    if not off < 0.01:
        measured = f"float32: data to latent and back is off by {off:.2g}"
        yield Finding("precision", False, measured, "scales too small or too large in a row", "P11")
    else:
        yield Finding("precision", True, f"float32: data to latent and back to {off:.0e}")


def _samples(case: Case) -> Iterator[Finding]:
    """Draws from the base, decoded: finite, of the data's size, within the range of levels."""
    flow, n = copied(case.flow), 256
    if not hasattr(case.base_of(flow), "sample"):
        yield Finding("samples", None, "the base density has no sample")
        return
    with torch.no_grad():
        base, like = case.base_of(flow), torch.empty(n, *case.run.z.shape[1:])
        z = base.sample((n,)) if isinstance(base, torch.distributions.Distribution) else base.sample(like)
        z = z.view_as(like).to(like)
        drawn = _back_to_noise(case, flow, z)
    lost = 1 - drawn.flatten(1).isfinite().all(1).float().mean().item()
    entered = case.x if case.noise is None else case.noise.z
    most = drawn.nan_to_num(nan=math.inf).abs().max() / entered.abs().max()
    farther = (z.abs().max() / case.run.z.abs().max()).clamp(min=1)  # than the latents of data that are not learned yet
    if lost or most > 1e3 * farther:
        measured = f"{100 * lost:.0f} % not finite, the largest {most:.2g} times the data's"
        yield Finding("samples", False, measured, "the inverse divides by a scale that is almost 0", "F12")
        return
    measured = f"{n} draws, the largest {most:.2g} times the data's"
    top = case.levels * case.spacing if case.noise is not None and case.spacing is not None else None
    learned = top is not None and case.run.log_p.mean() > -case.dims * math.log(top)  # more than knowing nothing
    if learned and case.sound:
        outside = ((drawn < -0.1 * top) | (drawn > 1.1 * top)).float().mean().item()
        at_edges = ((case.x < case.spacing / 2) | (case.x > top - 1.5 * case.spacing)).float().mean().item()
        measured += f", {100 * outside:.1f} % well outside the levels"
        if outside > 0.02 and at_edges > 0.25:
            yield Finding("samples", False, measured, "mass where no data can be: a logit after the noise", "F14")
            return
    yield Finding("samples", True, measured)


def _edges(case: Case) -> Iterator[Finding]:
    """A layer without parameters that is given numbers of [0, 1): is it finite at 0, which a generator can return?"""
    for record in case.run.leaves:
        if record.learned or not record.x.is_floating_point() or record.x.min() < 0 or record.x.max() > 1:
            continue
        z, log_det = record.again(torch.zeros_like(record.x[:1]))
        if not (z.isfinite().all() and log_det.isfinite().all()):
            yield Finding("edges", False, f"{record.title} of 0 is not finite", "a logit without a margin", "F14")
            return
    yield Finding("edges", True, "finite at the edge of the unit interval")


def _context(case: Case) -> Iterator[Finding]:
    """Each example under its own context and under another's."""
    if case.context is None:
        yield Finding("context", None, "none")
        return
    others = case.context.roll(1, 0)
    margin = case.run.log_p - case.through(case.flow, context=others).log_p
    mean, error = margin.mean().item(), margin.std().item() / math.sqrt(len(margin))
    measured = f"its own makes an example likelier by {mean:.3g} ± {error:.1g} nats than another's"
    if not margin.any():
        flow = case.woken()
        if not (case.through(flow).log_p - case.through(flow, context=others).log_p).any():
            yield Finding("context", False, "it moves nothing", "it does not reach the layers", "F25")
        else:
            yield Finding("context", None, "not used yet: a fresh flow, or conditioning that never learns (F24)")
    elif mean < 3 * error:
        yield Finding("context", False, measured, "pairs mixed up, the condition ignored, or not trained", "F25")
    else:
        yield Finding("context", True, measured)


def _gradient_lengths(grad_norms: Sequence[float] | None) -> list[Finding]:
    """The longest gradient that the optimizer took, in units of the median."""
    if not grad_norms:
        return [Finding("gradients", None, "no grad_norms given")]
    values = torch.as_tensor(list(grad_norms), dtype=torch.float64)
    ratio = (values.max() / values.median()).nan_to_num(nan=math.inf).item()
    measured = f"the longest is {ratio:.3g} times the median"
    if ratio > 10:
        return [Finding("gradients", False, measured, "Adam's memory of it shortens every later step: clip", "F11")]
    return [Finding("gradients", True, measured)]


_TESTS = {
    "finite": _finite,
    "input": _in_place,
    "noise": _noise,
    "round trip": _round_trip,
    "log-det": _log_det,
    "sum": _sum_of_log_dets,
    "D log n": _bound,
    "bits/dim": _bits,
    "edges": _edges,
    "neighbours": _neighbours,
    "modes": _two_modes,
    "precision": _single_precision,
    "saved state": _flag_saved,
    "volume": _volume,
    "masks": _changed,
    "mirrored": _mirrored,
    "dead parameters": _dead,
    "scales": _scales,
    "start": _start,
    "mixing": _mixing,
    "context": _context,
    "samples": _samples,
    "latent moments": _latent,
}
