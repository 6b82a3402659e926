"""Tests of the bijection: whether each inverse undoes its layer, and whether each log-det is the true one.

Each layer is asked first, then the whole flow: an error of the whole that no layer has lies outside of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nflows_lib.clinic.control import HeldNoise, seeded
from nflows_lib.clinic.examination import (
    EXACT,
    LARGEST,
    Case,
    Pass,
    Record,
    all_modules,
    chain_of,
    copied,
    equal,
    gradients,
    jacobian,
    relative_error,
    same_numbers,
)
from nflows_lib.clinic.registry import COULD_NOT_RUN, TOO_LARGE, Finding, could_not_run, doctors_test, in_one_line

EXACT_BACK = 1e-5  # a larger error of an inverse, relative to the largest value, is a failure; inverses may iterate
ROUGH = 1e-4  # a log-det that comes from a numerical solution may be off by this much, relative to its size or to 1
SMALL = 64  # a layer on images of more numbers is compared with autograd on their corner, if it takes the corner
MOVED = "with moved parameters, "  # said of a woken copy

_DRAWN = "forward drops numbers of the latent, and the inverse redraws them: keep them all"
_UNMASKED = "the layer also changes what its network reads: mask the network's output"
_NOT_UNDONE = "the layer's inverse does not undo its forward"
_DROPOUT = "dropout draws in each direction: leave it out, or pass training=self.training to it"
_ONE_WAY = "the condition is used in one direction only"


# --- round trips ------------------------------------------------------------------------------------------------------


@doctors_test("round trip", finds=["F3", "F16", "F18", "P1"])
def round_trip(case: Case) -> Iterator[Finding]:
    """Whether each inverse, of a layer and of the whole flow, returns what forward got, and the same at each call."""
    worst, exact, unable = 0.0, 0, 0
    for done, when, flow in ((case.data_pass, "", case.flow), (case.woken_pass, MOVED, case.woken_flow)):
        if not done.is_finite:
            break  # the moved parameters are beyond what training reaches
        broken: set[int] = set()
        whole = None if case.alone else _whole_back(case, flow, when)
        if when and isinstance(whole, float) and whole <= EXACT_BACK:
            break  # nothing in it is wrong
        for record in done.inner_first:
            if record.is_within(broken):
                continue  # a layer inside this one is broken, and has been named
            try:
                step = case.spacing if case.noise is not None and record.name == case.noise.name else None
                found = _layer_back(record, when, step)
            except NotImplementedError:
                continue
            except Exception as error:
                if not when:
                    unable += 1
                    yield could_not_run(f"{record.title}, its inverse", error)
                continue
            if isinstance(found, Finding):
                broken.add(id(record.layer))
                yield found
            elif found is not None:
                worst, exact = max(worst, found), exact + 1
        if isinstance(whole, Finding) and not broken:
            broken.add(id(done.whole.layer))
            yield whole
        elif isinstance(whole, float):
            worst, exact = max(worst, whole), exact + 1
        if broken:
            case.inverse_is_right = False
            return
    case.inverse_is_right = True
    if exact or not unable:
        what = "the flow's inverse returns its input" if case.alone else "every inverse returns its input"
        yield Finding(True if exact else None, f"{what} within {worst:.0e}" if exact else "no layer has an inverse")


def _layer_back(record: Record, when: str, step: float | None) -> Finding | float | None:
    """What is wrong with a layer's inverse, or its relative error; None if rounding hides it.

    The inverse of a noise layer on levels that are ``step`` apart need not round.
    """
    with torch.no_grad(), HeldNoise() as draws:
        with seeded(1):
            back, _ = record.back()
        with seeded(2):
            again, _ = record.back(record.z[:4])
        with seeded(1):
            first, _ = record.back(record.z[:4])
    off = relative_error(back.to(torch.float64), record.x.to(torch.float64))
    measured = f"{when}{record.title}: the inverse of its output misses its input by {off:.2g}"
    if back.shape != record.x.shape:
        got, expected = tuple(back.shape[1:]), tuple(record.x.shape[1:])
        measured = f"{record.title}: the inverse of its output has shape {got}, its input {expected}"
    if not equal(first, again):
        cause = (_DROPOUT, "F16") if draws.dropped else (_DRAWN, "F18")
        return Finding(False, f"{record.title}: its inverse returns something else at each call", *cause)
    if off <= EXACT_BACK:
        return off
    if (
        step is not None
        and back.shape == record.x.shape
        and (((back - record.x) / step - 0.5).abs() <= 0.5 + EXACT).all()
    ):
        return 0.0
    if when and not back.isfinite().all():
        return None  # the moved parameters are beyond what training reaches
    if record.z[0].numel() < record.x[0].numel():
        return Finding(False, measured, _DRAWN, "F18")
    if _unmasked(record):
        return Finding(False, measured, _UNMASKED, "F3")
    if rounding_explains(lambda nudged: record.back(nudged)[0], record.z, back, record.x):
        return None
    return Finding(False, measured, _ONE_WAY if _in_one_direction(record) else _NOT_UNDONE, "P1")


def _in_one_direction(record: Record) -> bool:
    """Whether the context changes what forward returns and not what the inverse returns, or the reverse."""
    if not any(isinstance(value, Tensor) for value in record.further):
        return False
    rolled = tuple(value.roll(1, 0) if isinstance(value, Tensor) else value for value in record.further)
    other = replace(record, further=rolled)
    with torch.no_grad(), seeded(1):
        return equal(other.again(record.x)[0], record.again(record.x)[0]) != equal(other.back()[0], record.back()[0])


def rounding_explains(inverse: Callable[[Tensor], Tensor], z: Tensor, back: Tensor, x: Tensor) -> bool:
    """Whether an inverse that does not return x is moved as far by latents that differ in their last digits."""
    with torch.no_grad(), seeded(1):
        nudged = inverse(z * (1 + 1e-14 * torch.randn_like(z)))
    return bool((nudged - back).abs().max() > (back - x).abs().max() / 100)


def _whole_back(case: Case, flow: nn.Module, when: str) -> Finding | float | None:
    """What is wrong with the whole flow's inverse, or its relative error; None if it cannot be compared."""
    with torch.no_grad(), HeldNoise(0.5):
        z = case.through(flow).z
    try:
        with torch.no_grad(), HeldNoise() as draws:
            first, second = case.back(flow, z, seed=1), case.back(flow, z, seed=2)
        if not equal(first, second):
            shapes = draws.uniform + draws.normal
            if case.context is not None and tuple(case.context.shape) in shapes:
                cause = "the condition gets fresh noise in each direction: draw it once, and give it to both"
                return Finding(False, "the whole flow's inverse returns something else at each call", cause, "P1")
            cause = (_DROPOUT, "F16") if draws.dropped else (_DRAWN, "F18")
            return Finding(False, "the whole flow's inverse returns something else at each call", *cause)
        off = whole_round_trip(case, flow)
    except NotImplementedError:
        return None
    except Exception as error:
        cause = _cause_of_inverse(case, flow, z, None) or "the inverse does not take what forward returns"
        return Finding(False, f"the whole flow's inverse raises {in_one_line(error)}", cause, "P1")
    if off is None or off <= EXACT_BACK:
        return off
    if when and not first.isfinite().all():
        return None  # the moved parameters are beyond what training reaches
    if z[0].numel() < case.dims:
        return Finding(False, f"{when}the whole flow's inverse misses the data by {off:.2g}", _DRAWN, "F18")
    cause = _cause_of_inverse(case, flow, z, first)
    if not cause and first.shape == case.x.shape:
        with torch.no_grad():
            back = case.back_to_noise(flow, z)  # without rounding to levels, which would hide how far it moves
        if when and not back.isfinite().all():
            return None  # the moved parameters are beyond what training reaches
        if rounding_explains(lambda nudged: case.back_to_noise(flow, nudged), z, back, case.x):
            return None  # the test of precision speaks of it
    cause = cause or "the inverse of the whole flow does not undo its forward"
    return Finding(False, f"{when}the whole flow's inverse misses the data by {off:.2g}", cause, "P1")


def whole_round_trip(case: Case, flow: nn.Module) -> float | None:
    """The largest relative error of a round trip through a whole copy of the flow; None if it cannot be compared.

    Noise on the data is held in the middle of its interval, and the inverse does not round, so the inverse must miss
    all values by the same number, which is at most one step. At the lowest and the highest level it may clamp. Where
    noise is learned or normal, the round trip starts after the noise layer.
    """
    drawn = [torch.Size(shape).numel() for shape in case.draws.uniform]
    normal = [torch.Size(shape).numel() for shape in case.draws.normal]
    if case.noise is not None and (case.noise.learned or case.x.numel() in normal):
        with torch.no_grad():
            done = case.through(flow)
            begin = next(record for record in done.records if record.name == case.noise.name)
            if not same_numbers(begin.x, case.x):
                return None
            return relative_error(case.back_to_noise(flow, done.z), begin.z)
    noisy = case.random and case.x.numel() in drawn
    if case.random and not noisy and case.x.numel() in normal:
        return None
    with torch.no_grad(), HeldNoise(0.5):
        z = case.through(flow).z
        if not noisy:
            return relative_error(case.back(flow, z).to(case.x.dtype), case.x)
        back = case.back_unrounded(flow, z)
    if back.shape != case.x.shape:
        return math.inf
    step = case.spacing or 0.0
    off = back - case.x
    held = off.median().clamp(-step, step)
    edge = (case.x == case.x.min()) | (case.x == case.x.max())
    excess = torch.where(edge, (off - held / 2).abs() - held.abs() / 2, (off - held).abs()).clamp(min=0)
    return (excess.max() / max(1.0, case.x.abs().max().item())).nan_to_num(nan=math.inf).item()


def _cause_of_inverse(case: Case, flow: nn.Module, z: Tensor, back: Tensor | None) -> str:
    """Why the whole flow's inverse is none, though every layer's is: from the calls that it makes; "" if unclear."""
    forward = [record.name for record in case.data_pass.outermost]
    calls: list[tuple[str, str, bool]] = []  # layer, direction, whether it got a second tensor
    hooks, modules = [], all_modules(chain_of(flow))
    for name in forward:
        layer, inverse = modules[name], modules[name].inverse

        def watched(*args: object, name: str = name, inverse: Callable = inverse, **options: object) -> object:
            calls.append((name, "inverse", sum(isinstance(a, Tensor) for a in (*args, *options.values())) > 1))
            return inverse(*args, **options)

        layer.inverse = watched
        hooks.append(layer.register_forward_pre_hook(lambda m, a, name=name: calls.append((name, "forward", False))))
    try:
        with torch.no_grad():
            case.back(flow, z)
    except Exception as error:
        if case.context is not None and isinstance(error, TypeError):
            return "the inverse does not take the condition that forward takes"
        if calls and calls[-1][1] == "inverse":
            return f"it stops in the inverse of {calls[-1][0]}"
        return ""
    finally:
        for hook in hooks:
            hook.remove()
        for name in forward:
            vars(modules[name]).pop("inverse", None)
    inverted = [name for name, direction, _ in calls if direction == "inverse"]
    if forward and not inverted and any(direction == "forward" for _, direction, _ in calls):
        return "the inverse calls its layers' forward: call their inverse, in the reverse order"
    if len(forward) > 1 and inverted == forward:
        return "the inverse goes through the layers in forward's order: reverse it"
    if len(inverted) < len(forward) and {*inverted} < {*forward}:
        missing = [name for name in forward if name not in inverted]
        return f"the inverse leaves out {len(missing)} of the layers, the first is {missing[0]}"
    given = {r.name for r in case.data_pass.outermost if any(isinstance(v, Tensor) for v in r.further)}
    if case.context is not None and {n for n, d, context in calls if d == "inverse" and context} < given:
        return "the condition reaches the layers in forward, and not in the inverse"
    if back is not None and _in_one_direction(replace(case.data_pass.whole, layer=chain_of(flow), z=z)):
        return _ONE_WAY
    if back is not None and back.shape == case.x.shape and not case.random and _affine(back, case.x):
        return "a scaling or a shift that forward applies is not undone, or undone twice"
    return ""


def _affine(back: Tensor, x: Tensor) -> bool:
    """Whether each column of a round trip is an affine function of the same column of the data."""
    a, b = (side.flatten(1) - side.flatten(1).mean(0) for side in (back, x))
    slope = (a * b).sum(0) / b.square().sum(0).clamp(min=1e-300)
    return bool((a - slope * b).abs().max() <= 1e-6 * a.abs().max())


# --- log-dets ---------------------------------------------------------------------------------------------------------


@dataclass
class Compared:
    """How a test of log-dets fared: the number of layers that agree, and of those that it could not compare."""

    agree: int = 0
    too_large: int = 0
    unable: int = 0


@doctors_test("log-det", finds=["F3", "F9", "F10", "P1", "P15", "P26"])
def log_det(case: Case) -> Iterator[Finding]:
    """Whether each log-det of one example, a layer's and the whole flow's, is that of autograd's Jacobian.

    A large image is compared by its corner alone, if the layer takes the corner. An inverse that returns a log-det
    must return minus that of forward.
    """
    count = Compared()
    for done, when in ((case.data_pass, ""), (case.woken_pass, MOVED)):
        if not done.is_finite:
            break  # the moved parameters are beyond what training reaches
        broken: set[int] = set()
        whole = [] if case.alone else _whole_log_det(case, done, when, count)
        if when and case.whole_is_right and not whole:
            break  # nothing in it is wrong
        for record in done.inner_first:
            if record.is_within(broken):
                continue
            try:
                found = _layer_log_det(case, record, when, count)
            except Exception as error:
                count.unable += 1
                found = None if when else could_not_run(record.title, error)
            if found is not None:
                if found.passed is False:
                    broken.add(id(record.layer))
                yield found
        for found in whole if not broken else ():
            if found.passed is False:
                broken.add(id(done.whole.layer))
            yield found
        if broken:
            case.whole_is_right = False
            return
    if case.original.training:
        training = case.through(copied(case.original, keep_mode=True))
        if (found := next(filter(None, map(_other_statistics, training.leaves)), None)) is not None:
            yield found
            return
    if case.alone:
        case.whole_is_right = bool(count.agree)
    left = f"; {count.too_large} too large to compare" if count.too_large else ""
    what = "the flow's agrees with autograd's" if case.alone else _counted(count.agree, case.whole_is_right)
    if count.agree or case.whole_is_right:
        yield Finding(True, what + left)
    elif count.too_large:
        yield Finding(None, "every layer is too large for a Jacobian", why=TOO_LARGE)
    elif count.unable:
        yield Finding(None, "rounding, or an error, hides what autograd's log-det is", why=COULD_NOT_RUN)
    else:
        yield Finding(None, "no log-det can be compared with autograd's")


def _counted(layers: int, whole: bool | None) -> str:
    parts = [f"{layers} layer{'s' * (layers > 1)}"] * bool(layers) + ["the whole flow"] * bool(whole)
    return f"agrees with autograd in {' and '.join(parts)}"


def _layer_log_det(case: Case, record: Record, when: str, count: Compared) -> Finding | None:
    """What is wrong with the log-det of a layer, if anything."""
    is_noise = case.noise is not None and record.name == case.noise.name
    if is_noise and record.learned:
        return None  # its contribution is the density of the noise
    if record.z[0].numel() != record.x[0].numel() or not (record.x.is_floating_point() or is_noise):
        return None
    x = corner_of(record)
    if x is None:
        count.too_large += not when
        return None

    def asked(v: Tensor, seed: int = 3) -> tuple[Tensor, Tensor]:
        return asked_again(record, v, seed)

    claimed = asked(x)[1].item()
    asked(record.x[1:2, ..., : x.shape[-2], : x.shape[-1]] if x.dim() == 4 else record.x[1:2])
    if asked(x)[1].item() != claimed:
        measured = f"{when}{record.title} returns another log-det at a second call with the same example"
        return Finding(False, measured, "the log-det comes from an earlier call: compute it from this input", "P15")
    if not is_noise and asked(x, seed=4)[1].item() != claimed:
        return None  # the layer estimates its log-det at random
    for i in (0, 1) if x.shape == record.x[:1].shape and not is_noise else ():
        alone = asked_again(record.alone(i), record.x[i : i + 1])[1].item()
        if _differs(alone, record.log_det[i].item()):
            return _in_company(record, i, alone, when)
    J = layer_jacobian(record, x)
    if is_noise and not J.any():
        return None  # the levels are made integers, which have no derivative
    if is_steep(J):
        count.unable += 1
        return None
    true = torch.linalg.slogdet(J).logabsdet.item()
    if not _differs(claimed, true):
        count.agree += not when
        return _log_det_of_inverse(record, when)
    if case.whole_is_right or (_is_rough(claimed, true) and not _cause_of_scale((claimed - true) / x.numel(), case)):
        return None  # the flow counts it in another way, for example as that of the inverse, or solves an equation
    measured = f"{when}{record.title} says {claimed:.4f} nats, autograd gives {true:.4f}"
    if true == -math.inf:
        measured = f"{when}{record.title} says {claimed:.4f} nats, autograd's Jacobian is singular"
    cause = _cause_of_log_det(record, (claimed - true) / x.numel(), case)
    return Finding(False, measured, *cause)


def asked_again(record: Record, x: Tensor, seed: int = 3) -> tuple[Tensor, Tensor]:
    """A layer's output and its log-det for other examples, with the noise held in the middle of its interval."""
    with seeded(seed), HeldNoise(0.5):
        return record.again(x)


def layer_jacobian(record: Record, x: Tensor) -> Tensor:
    """The Jacobian of a layer at x, one example with the context of the record's first."""
    alone = record.alone()
    return jacobian(lambda v: asked_again(alone, v)[0], x.to(torch.float64))


def _other_statistics(record: Record) -> Finding | None:
    """What is wrong with the log-det of a layer that scales and shifts each channel, seen over the batch."""
    if record.x.shape != record.z.shape or not record.x.is_floating_point() or len(record.x) < 8:
        return None
    x, z = (side.transpose(0, 1).flatten(1) for side in (record.x, record.z))
    a, b = x - x.mean(1, keepdim=True), z - z.mean(1, keepdim=True)
    slope = (a * b).sum(1) / a.square().sum(1)
    if not slope.isfinite().all() or (b - slope[:, None] * a).abs().max() > 1e-9 * b.abs().max():
        return None
    true = (slope.abs().log().sum() * record.x[0, 0].numel()).item()
    if (record.log_det - true).abs().max().item() <= 1e-4 * max(1.0, abs(true)):
        return None
    measured = f"{record.title} scales by {true:.4g} nats in training mode, and counts {record.log_det[0]:.4g}"
    return Finding(False, measured, "the log-det uses other statistics than the output", "P15")


def _differs(a: float, b: float) -> bool:
    """Whether two log-dets differ by more than rounding does."""
    return a != b and not abs(a - b) <= EXACT * max(1.0, abs(a))


def _is_rough(a: float, b: float) -> bool:
    """Whether two log-dets differ by as little as those of a differential equation's solver do."""
    return abs(a - b) <= ROUGH * max(1.0, abs(a))


def _in_company(record: Record, i: int, alone: float, when: str) -> Finding | None:
    """What is wrong with a log-det of example i that is another one in a batch; None if the output is, too."""
    with torch.no_grad():
        each = [record.alone(j).again(record.x[j : j + 1]) for j in range(8)]
        z, together = record.again(record.x[:8])
    if relative_error(z[:1], each[0][0]) > EXACT:
        return None
    measured = f"{when}{record.title}: {alone:.4g} nats alone, {record.log_det[i]:.4g} in the batch"
    total = sum(log_det.item() for _, log_det in each)
    if i == 1 and not _differs(together[1].item(), each[0][1].item()):
        return Finding(False, measured, "every example gets the log-det of the first one", "P15")
    if any(not _differs(together[0].item(), some) for some in (total, total / 8)):
        return Finding(False, measured, "sum over the dimensions of each example, not over the batch", "P15")
    return Finding(False, measured, "the log-det uses other statistics than the output, which no batch changes", "P15")


def _log_det_of_inverse(record: Record, when: str) -> Finding | None:
    """What is wrong with the log-det that a layer's inverse returns, if it returns one."""
    if not callable(getattr(record.layer, "inverse", None)):
        return None
    try:
        with torch.no_grad(), seeded(1):
            _, back = record.back()
    except Exception:  # the test of round trips says so
        return None
    if back is None or len(back) != len(record.log_det):
        return None
    off = (back + record.log_det).abs().max().item()
    if off <= 1e-4 * max(1.0, record.log_det.abs().max().item()):
        return None
    measured = f"{when}{record.title}: the inverse's log-det is {back[0]:.4g}, forward's {record.log_det[0]:.4g} nats"
    cause = "the two must cancel"
    if (back - record.log_det).abs().max() <= 1e-4 * max(1.0, record.log_det.abs().max().item()):
        cause = "the inverse returns the log-det with the sign of forward"
    return Finding(False, measured, cause, "P15")


def _whole_log_det(case: Case, done: Pass, when: str, count: Compared) -> list[Finding]:
    """What is wrong with the log-det of the whole flow; ``case.whole_is_right`` says whether it was compared."""
    case.whole_is_right = None
    x, context = small_rows(case)
    if x is None:
        count.too_large += not when
    if x is None or done.z[0].numel() != case.dims:
        return []
    try:
        claimed, true = whole_nats(case, case.woken_flow if when else case.flow, x, context)
    except Exception as error:
        count.unable += 1
        return [] if when else [could_not_run("the whole flow", error)]
    if claimed is None:
        return []
    case.whole_is_right = not _differs(claimed, true)
    if _is_rough(claimed, true) and not _cause_of_scale((claimed - true) / x.numel(), case):
        case.whole_is_right = True
    if case.whole_is_right:
        wrong = None if case.random else _log_det_of_inverse(done.whole, when)
        return [wrong] * (wrong is not None)
    measured = f"{when}the whole flow says {claimed:.4f} nats, autograd gives {true:.4f}"
    total = sum(record.log_det[0].item() for record in done.outermost)
    if true == -math.inf:
        measured = f"{when}autograd's Jacobian of the whole flow is singular"
        cause = "two numbers of the latent tell the same: the flow has no inverse", "P1"
    elif found := _cause_of_scale((claimed - true) / x.numel(), case):
        cause = found
    elif done.records and x.shape == case.x[:1].shape and not case.random and not _differs(total, true):
        cause = "the layers are right: one's log-det is not added, or added twice", "P15"
    elif done.records:
        cause = (
            "forward scales, or changes the data in another way, outside of its layers, and does not count it",
            "P15",
        )
    else:
        cause = "the formula of the log-det is another map's", "P15"
    return [Finding(False, measured, *cause)]


def whole_nats(case: Case, flow: nn.Module, x: Tensor, context: Tensor | None) -> tuple[float | None, float]:
    """The log-det that the whole flow claims at x, one example, and that of autograd, with the noise held fixed.

    Both are those of the part after the noise layer if :func:`whole_jacobian` says so. None if the flow estimates its
    log-det, or float64 cannot tell it.
    """
    with HeldNoise(0.5):
        claimed = case.through(flow, x, context).log_det.item()
        if not case.random and case.through(flow, x, context, seed=1).log_det.item() != claimed:
            return None, 0.0
    J, after_noise = whole_jacobian(case, flow, x, context)
    if is_steep(J) or not J.any():
        return None, 0.0
    return claimed if after_noise is None else after_noise, torch.linalg.slogdet(J).logabsdet.item()


def whole_jacobian(case: Case, flow: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, float | None]:
    """The Jacobian of the whole flow at x, one example, with the noise held in the middle, and None.

    If the noise is learned, or the levels are made integers, which have no derivative: the Jacobian of the part after
    the noise layer, and the log-det that this part claims.
    """
    if case.noise is None or not case.noise.learned:
        further = () if context is None else (context,)
        J = layer_jacobian(replace(case.data_pass.whole, layer=chain_of(flow), x=x, further=further), x)
        if case.noise is None or J.any():
            return J, None
    entered: list[Tensor] = []

    def enter(u: Tensor) -> Tensor:
        entered.append(u.detach().requires_grad_())
        return entered[-1]

    done = case.through(flow, x, context, grad=True, after_noise=enter)
    its = next(record.log_det for record in done.records if record.name == case.noise.name)
    return gradients(done.z.flatten(), entered[-1]), (done.log_det - its).item()


def is_steep(J: Tensor) -> bool:
    """Whether float64 cannot tell the determinant of a Jacobian, though it is not 0."""
    values = torch.linalg.svdvals(J)
    return not values.isfinite().all() or bool(1e-300 < values[-1] / values[0] < 1e-12)


def small_rows(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """One example and its context, of a smaller image if the batch's are too large and the flow takes it; else None."""
    x, context = case.rows(slice(0, 1))
    if x.numel() <= LARGEST:
        return x, context
    if x.dim() == 4:
        for size in (8, 4):
            corner = x[..., :size, :size]
            cut = context[..., :size, :size] if context is not None and context.dim() == 4 else context
            for its in (cut, context):
                try:
                    if case.through(case.flow, corner, its).z.numel() == corner.numel() <= LARGEST:
                        return corner, its
                except Exception:
                    continue
    return None, None


def corner_of(record: Record) -> Tensor | None:
    """One example, or a corner of it that the layer takes, small enough for a Jacobian; None if there is none."""
    x = record.x[:1]
    if x.numel() > SMALL and x.dim() == 4:
        corner = x[..., :4, :4] if x.shape[1] * 16 <= SMALL else x[..., :2, :2]
        try:
            if corner.numel() <= LARGEST and record.again(corner)[0].numel() == corner.numel():
                return corner
        except (ValueError, RuntimeError, IndexError):
            pass
    return x if x.numel() <= LARGEST else None


def _cause_of_log_det(record: Record, each: float, case: Case) -> tuple[str, str]:
    """The cause and the entry of a log-det that is too large by ``each`` nats per dimension."""
    if found := _cause_of_scale(each, case):
        return found
    if _unmasked(record):
        return _UNMASKED, "F3"
    with HeldNoise() as watched, torch.no_grad():
        record.again(record.x)
    if watched.half:
        return "it computes in float16 or bfloat16: keep log-dets and sums in float32", "P26"
    return "the formula of the log-det does not belong to this forward", "P15"


def _cause_of_scale(each: float, case: Case) -> tuple[str, str] | None:
    """What a log-det that is too large by ``each`` nats per dimension says about the scaling of discrete data."""
    if case.levels is None:
        return None
    for n in dict.fromkeys((case.levels, 256)):
        if abs(each - math.log(n)) < 1e-6:
            return f"the log-det of a scaling by 1/{n} is not counted", "F10"
        if abs(each + math.log(n)) < 1e-6:
            return f"the log-det of a scaling by 1/{n} is counted twice, or nothing is scaled by it", "F10"
        if abs(each - 2 * math.log(n)) < 1e-6:
            return f"the log-det of a scaling by 1/{n} has the wrong sign", "F10"
        if case.dims > 1 and abs(each - math.log(n) * (1 - 1 / case.dims)) < 1e-6:
            return f"log {n} is counted once per example, not once per dimension", "F10"
        if abs(abs(each) - math.log(n / (n - 1))) < 1e-6:
            return f"one of {n} and {n - 1} scales the data, the other is counted in the log-det", "F9"
    return None


def _unmasked(record: Record) -> bool:
    """Whether the layer has a mask and changes numbers that the mask tells it to leave unchanged."""
    masks = [b for b in record.layer.buffers() if b.dtype == torch.bool and b.shape == record.x.shape[1:]]
    return any(not torch.equal(record.x[:, mask], record.z[:, mask]) for mask in masks)


@doctors_test("sum", finds=["F18", "P15", "P18"])
def sum_of_log_dets(case: Case) -> Finding:
    """Whether the flow's log-det is the sum of its layers', and the latent has as many numbers as the data.

    A flow may do something outside of its layers, if the log-det of the whole is right.
    """
    done, numbers = case.data_pass, case.data_pass.z[0].numel()
    if numbers < case.dims:
        return Finding(False, f"{case.dims} numbers go into the flow, {numbers} come out", _DRAWN, "F18")
    if numbers > case.dims:
        cause = "a padded example fills no volume, so it has no density: pad with noise, or not at all"
        return Finding(False, f"{case.dims} numbers go into the flow, {numbers} come out", cause, "P18")
    if not done.records or case.alone:
        return Finding(None, "the flow has no layers with an inverse")
    off = (done.log_det - sum(record.log_det for record in done.outermost)).abs().max().item()
    measured = f"differs from the flow's log-det by {off:.4g} nats"
    if off <= EXACT * max(1.0, done.log_det.abs().max().item()):
        return Finding(True, "the layers' log-dets add up to the flow's")
    if case.whole_is_right:
        return Finding(True, f"{off:.4g} nats come from what forward does outside of its layers")
    if done.gapless or case.whole_is_right is False:
        return Finding(False, measured, "a layer's log-det is not added, or added twice", "P15")
    return Finding(None, f"{measured}, and forward does more than its layers", why=COULD_NOT_RUN)
