"""A picture of one examination: how exact each layer's inverse and log-det are, and how far the layer stretches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nflows_lib.clinic.bijection import (
    EXACT_BACK,
    SMALL,
    corner_of,
    is_steep,
    rounding_explains,
    small_rows,
    whole_nats,
    whole_round_trip,
)
from nflows_lib.clinic.control import InFloat64, default_dtype, seeded
from nflows_lib.clinic.examination import EXACT, Case, Record, jacobian, relative_error
from nflows_lib.clinic.report import _check
from nflows_lib.distributions import Base

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLES_OF_SMALL = 4  # a layer's stretch is measured at this number of examples, or at one if the layer is large
WHOLE = "the whole flow"


@dataclass
class Measured:
    """What is drawn of one layer: two errors and a range, or for each of them the words that say why it is missing."""

    title: str
    round_trip: float | str  # relative to the largest value
    log_det: float | str  # in nats
    stretch: tuple[float, float] | str  # least and largest log singular value of the Jacobian, in nats
    moved_round_trip: float | str = ""  # the same two errors in a copy with moved parameters
    moved_log_det: float | str = ""


def layer_picture(flow: nn.Module, batch: Tensor, context: Tensor | None = None, *, base: Base | None = None) -> Figure:
    """Draw what each layer of a flow does with a batch: two errors, and how far the layer stretches.

    The layers come from top to bottom in the order of their calls, an outer layer after those inside it, and last the
    whole flow. All is measured in float64, as :func:`doctor` does it. There are three panels:

    - the error of the round trip, relative to the largest value, on a logarithmic axis;
    - the difference in nats between the log-det and that of autograd's Jacobian, on a logarithmic axis. A large image
      is compared by its corner. "Too large" marks a layer that cannot be compared;
    - the log-scales: the least and the largest logarithm of the Jacobian's singular values. In a layer that only
      scales, the singular values are the scale factors.

    A bar is an error of the flow as it is, a circle one of a copy with moved parameters, because a new layer is often
    close to the identity map and shows no error. What is beyond the dashed line is vermilion: there the doctor fails
    a flow.

    Args:
        flow: the flow, as for :func:`doctor`.
        batch: examples of the data, (B, ...), at least 8.
        context: one row per example, if the flow is conditional.
        base: density of the latent, for a module that is not a Flow; the standard normal if None.

    Returns:
        The figure, which pyplot does not know: save it by ``figure.savefig("layers.png")``, or let a notebook show it.

    Raises:
        ValueError: if an argument is not as :func:`doctor` takes it.

    >>> import torch
    >>> from nflows_lib.models import realnvp_points
    >>> figure = layer_picture(realnvp_points(2).eval(), torch.randn(64, 2))
    >>> [axes.get_title() for axes in figure.axes]
    ['error of the round trip', 'error of the log-det', 'range of the log-scales']
    """
    from nflows_lib.clinic.drawing import draw  # imported here, because matplotlib takes a second

    return draw(measured(flow, batch, context, base=base))


def measured(
    flow: nn.Module, batch: Tensor, context: Tensor | None = None, *, base: Base | None = None
) -> list[Measured]:
    """What :func:`layer_picture` draws, from the first layer to the whole flow; its arguments are the same."""
    _check(flow, batch, context)
    with default_dtype(torch.float64), InFloat64(), seeded(2), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a flow may warn of what a copy with moved parameters does
        case = Case(flow, batch, context, base)
        rows = [] if case.alone else [_of_layer(case, record) for record in case.data_pass.records]
        rows.append(_of_whole(case))
        moved = [] if case.alone else case.woken_pass.records
        if len(moved) == len(rows) - 1:
            for row, record in zip(rows, moved, strict=False):
                row.moved_round_trip = _or_words(lambda r=record: _back(r, moved=True))
                row.moved_log_det = _or_words(lambda r=record: _log_det(case, r)[0])
        rows[-1].moved_round_trip = _or_words(lambda: _back_through_whole(case, case.woken_flow, moved=True))
        rows[-1].moved_log_det = _or_words(lambda: _log_det_of_whole(case, moved=True))
    return rows


def _of_layer(case: Case, record: Record) -> Measured:
    back = _or_words(lambda: _back(record))
    compared = _or_words(lambda: _log_det(case, record))
    if isinstance(compared, str):
        return Measured(record.title, back, compared, compared)
    others = range(1, EXAMPLES_OF_SMALL) if record.x[0].numel() <= SMALL else ()
    stretch = _or_words(lambda: _range([compared[1], *(_log_det(case, _from(record, i))[1] for i in others)]))
    return Measured(record.title, back, compared[0], stretch)


def _of_whole(case: Case) -> Measured:
    back = _or_words(lambda: _back_through_whole(case, case.flow))
    return Measured(WHOLE, back, _or_words(lambda: _log_det_of_whole(case)), _or_words(lambda: _stretch_of_whole(case)))


def _or_words(measure: Callable[[], Any]) -> Any:
    """What a measurement gives, or a few words that say why there is none."""
    try:
        return measure()
    except NotImplementedError:
        return "no inverse"
    except _Missing as missing:
        return str(missing)
    except Exception as error:
        return f"{type(error).__name__}"


class _Missing(Exception):
    """A measurement that a layer does not allow; the message says why."""


def _back(record: Record, moved: bool = False) -> float:
    """The relative error of a layer's round trip; with moved parameters only if rounding does not explain it."""
    with torch.no_grad(), seeded(1):
        back, _ = record.back()
    x = record.x.to(torch.float64)
    off = relative_error(back.to(torch.float64), x)
    if moved and off > EXACT_BACK and back.shape == x.shape:
        if not back.isfinite().all() or rounding_explains(lambda z: record.back(z)[0], record.z, back, x):
            raise _Missing("beyond what training reaches")
    return off


def _back_through_whole(case: Case, flow: nn.Module, moved: bool = False) -> float:
    """The same error of a whole copy of the flow."""
    off = whole_round_trip(case, flow)
    if off is None:
        raise _Missing("random noise")
    if moved and EXACT_BACK < off:
        with torch.no_grad():
            z = case.through(flow).z
            back = case.back(flow, z)
        of_other_shape = back.shape != case.x.shape
        if not (off < math.inf or of_other_shape):
            raise _Missing("beyond what training reaches")
        if not of_other_shape and rounding_explains(lambda nudged: case.back(flow, nudged), z, back, case.x):
            raise _Missing("beyond what training reaches")
    return off


def _log_det(case: Case, record: Record) -> tuple[float | str, Tensor]:
    """The error of a layer's log-det at its first example, or why it is unknown, and all log singular values."""
    is_noise = case.noise is not None and record.name == case.noise.name
    if is_noise and record.learned:
        raise _Missing("learned noise")
    if record.z[0].numel() != record.x[0].numel():
        raise _Missing("another number of values")
    if not (record.x.is_floating_point() or is_noise):
        raise _Missing("integers")
    x = corner_of(record)
    if x is None:
        raise _Missing("too large")

    def asked(v: Tensor, seed: int = 3) -> tuple[Tensor, Tensor]:
        with seeded(seed):
            return record.again(v)

    J = jacobian(lambda v: asked(v)[0], x.to(torch.float64))
    if is_noise and not J.any():
        raise _Missing("integers")
    values = torch.linalg.svdvals(J).log()
    with torch.no_grad():
        z, claimed = asked(x)
        claims = [claimed.item()]
        if not is_noise and asked(x, seed=4)[1].item() != claims[0]:
            return "an estimate", values
    if is_steep(J):
        return "too steep", values
    if x.shape == record.x[:1].shape and not is_noise and relative_error(z, record.z[:1]) <= EXACT:
        claims.append(record.log_det[0].item())  # in the batch it must be the same
    return _largest_error(claims, torch.linalg.slogdet(J).logabsdet.item()), values


def _log_det_of_whole(case: Case, moved: bool = False) -> float:
    """The error of the whole flow's log-det at the first example, or of a smaller image."""
    x, context = _one_example(case)
    flow, done = (case.woken_flow, case.woken_pass) if moved else (case.flow, case.data_pass)
    claimed, true = whole_nats(case, flow, x, context)
    if claimed is None:
        raise _Missing("too steep, or an estimate")
    claims = [claimed]
    if x.shape == case.x[:1].shape and not case.random:
        with torch.no_grad():
            alone = case.through(flow, x, context).z
        claims += [done.log_det[0].item()] * (relative_error(alone, done.z[:1]) <= EXACT)
    return _largest_error(claims, true)


def _stretch_of_whole(case: Case) -> tuple[float, float] | str:
    """The range of the whole flow's log-scales at one example."""
    x, context = _one_example(case)
    if case.noise is not None and case.noise.learned:
        raise _Missing("learned noise")
    J = jacobian(lambda v: case.through(case.flow, v, context, grad=True).z, x.to(torch.float64))
    return _range([torch.linalg.svdvals(J).log()]) if J.any() else "integers"


def _one_example(case: Case) -> tuple[Tensor, Tensor | None]:
    x, context = small_rows(case)
    if case.data_pass.z[0].numel() != case.dims:
        raise _Missing("another number of values")
    if x is None:
        raise _Missing("too large")
    return x, context


def _largest_error(claims: list[float], true: float) -> float:
    """The largest difference from the true log-det; infinite if one is NaN or infinite."""
    return max(abs(claim - true) if math.isfinite(claim - true) else math.inf for claim in claims)


def _range(values: list[Tensor]) -> tuple[float, float] | str:
    every = torch.cat(values)
    return (every.min().item(), every.max().item()) if every.isfinite().all() else "singular"


def _from(record: Record, first: int) -> Record:
    """The same call, whose first example is another one of the batch."""

    def rolled(value: Any) -> Any:
        its = isinstance(value, Tensor) and value.dim() and len(value) == len(record.x)
        return value.roll(-first, 0) if its else value

    further = tuple(map(rolled, record.further))
    options = {key: rolled(value) for key, value in record.options.items()}
    x, z, log_det = rolled(record.x), rolled(record.z), rolled(record.log_det)
    return replace(record, x=x, further=further, options=options, z=z, log_det=log_det)
