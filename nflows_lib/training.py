"""Maximum likelihood in one loop: :func:`fit`, and :func:`log_likelihoods` to judge the result."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import trange

from nflows_lib import settings
from nflows_lib.flow import Flow


@dataclass
class History:
    """What a training run leaves behind. Losses are mean negative log-likelihoods in nats per example.

    ``held_out`` holds pairs (steps taken, loss on the held-out data).
    """

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


class NonFiniteLoss(RuntimeError):
    """The loss, or the norm of its gradient, became NaN or infinite. ``history`` ends with the value that did."""

    def __init__(self, history: History) -> None:
        self.history = history
        finite = math.isfinite(history.loss[-1])
        what, value = ("gradient's norm", history.grad_norm[-1]) if finite else ("loss", history.loss[-1])
        super().__init__(
            f"the {what} is {value} at step {len(history.loss)}; the flow holds the parameters that gave it, "
            "and this error's .history the run so far"
        )


def fit(
    flow: Flow,
    data: Tensor,
    steps: int,
    *,
    context: Tensor | None = None,
    batch_size: int = 256,
    lr: float = 1e-3,
    optimizer: Optimizer | None = None,
    clip: float | None = None,
    warmup: int = 0,
    cosine: bool = False,
    ema: float | None = None,
    held_out: Tensor | None = None,
    held_out_context: Tensor | None = None,
    evaluate_every: int | None = None,
) -> History:
    """Minimise the mean of -log p(x) over minibatches. Afterwards the flow is trained and in evaluation mode.

    Batches are whole ones from a fresh shuffle every epoch. All randomness comes from torch's global generator: call
    ``torch.manual_seed`` for a run that repeats. Evaluations do not disturb it.

    Args:
        flow: initialised on the first batch (:meth:`Flow.initialize`), then trained in place.
        data: all examples, (N, *flow.shape), on the CPU or on the flow's device.
        steps: number of updates.
        context: one row for each example, where the flow is conditional.
        batch_size: examples for each update.
        lr: learning rate of Adam, where no optimizer is given.
        optimizer: takes the place of Adam; its learning rates are those that the schedule multiplies.
        clip: largest norm of the gradient; a longer one is scaled down to it. None: no clipping.
        warmup: number of first steps over which the learning rate grows linearly to its full value.
        cosine: let the learning rate fall to 0 along half a cosine; constant otherwise.
        ema: decay of an exponential moving average of the parameters, in [0, 1). The average is what is evaluated,
            and what the flow holds in the end. None: no averaging.
        held_out: examples to evaluate on, with held_out_context where the flow is conditional.
        evaluate_every: steps between two evaluations; None: only after the last step.

    Raises:
        ValueError: an argument is out of its range.
        NonFiniteLoss: the loss or the norm of its gradient is NaN or infinite. Its history ends there.
    """
    _check_arguments(data, steps, context, batch_size, clip, warmup, ema, held_out, evaluate_every)
    device = next(flow.parameters()).device
    batches = _batches(data, context, batch_size, device)
    first = next(batches)
    flow.train()
    flow.initialize(*first)  # before the first step, which must find the parameters that the data set

    optimizer = optimizer or torch.optim.Adam(flow.parameters(), lr=lr, fused=True)
    schedule = LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps, warmup, cosine))
    average = None if ema is None else AveragedModel(flow, multi_avg_fn=_ema_update(ema))
    history = History()
    bar = trange(steps, disable=not settings.progress(), leave=False, mininterval=0.5)
    for step in bar:
        batch = first if step == 0 else next(batches)
        loss = -flow(*batch).mean()
        history.loss.append(loss.item())
        if not math.isfinite(history.loss[-1]):
            raise NonFiniteLoss(history)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(flow.parameters(), math.inf if clip is None else clip)
        history.grad_norm.append(norm.item())
        if not math.isfinite(history.grad_norm[-1]):
            raise NonFiniteLoss(history)  # a step along it would lose the parameters
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(flow)
        bar.set_postfix(loss=f"{history.loss[-1]:.2f}", grad=f"{history.grad_norm[-1]:.1f}", refresh=False)
        last = step + 1 == steps
        if held_out is not None and (last or (evaluate_every and (step + 1) % evaluate_every == 0)):
            judged = flow if average is None else average.module
            value = -log_likelihoods(judged, held_out, held_out_context).mean().item()
            history.held_out.append((step + 1, value))
    if average is not None:
        flow.load_state_dict(average.module.state_dict())
    flow.eval()
    return history


@torch.no_grad()
def log_likelihoods(
    flow: Flow, data: Tensor, context: Tensor | None = None, draws: int = 1, batch_size: int = 1000
) -> Tensor:
    """log p of every example in nats, (N,), on the CPU, in evaluation mode, averaged over draws of the noise.

    The global random state is the same before and after.
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    device = next(flow.parameters(), data).device  # a flow need not have parameters to be evaluated
    training = flow.training
    flow.eval()
    values = []
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for i in range(0, len(data), batch_size):
                x = data[i : i + batch_size].to(device)
                c = None if context is None else context[i : i + batch_size].to(device)
                values.append(torch.stack([flow(x, c) for _ in range(draws)]).mean(0).cpu())
    finally:
        flow.train(training)
    return torch.cat(values)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent values and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def _batches(
    data: Tensor, context: Tensor | None, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    while True:
        order = torch.randperm(len(data))
        for i in range(0, len(data) - batch_size + 1, batch_size):
            index = order[i : i + batch_size].to(data.device)
            yield data[index].to(device), None if context is None else context[index].to(device)


def _learning_rate_factor(step: int, steps: int, warmup: int, cosine: bool) -> float:
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps)) if cosine else rise


def _ema_update(decay: float):
    def update(averages: list[Tensor], currents: list[Tensor], updates: Tensor) -> None:
        # A short memory at first, or the very first parameters would stay in the average for 1 / (1 - decay) steps.
        now = min(decay, (1 + updates.item()) / (10 + updates.item()))
        torch._foreach_lerp_(averages, currents, 1 - now)

    return update


def _check_arguments(
    data: Tensor,
    steps: int,
    context: Tensor | None,
    batch_size: int,
    clip: float | None,
    warmup: int,
    ema: float | None,
    held_out: Tensor | None,
    evaluate_every: int | None,
) -> None:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 1 <= batch_size <= len(data):
        raise ValueError(f"batch_size: expected 1 to {len(data)}, the number of examples, got {batch_size}")
    if context is not None and len(context) != len(data):
        raise ValueError(f"context: expected {len(data)} rows, one for each example, got {len(context)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0, got {clip}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup: expected 0 to {steps}, the number of steps, got {warmup}")
    if ema is not None and not 0 <= ema < 1:
        raise ValueError(f"ema: expected a decay in [0, 1), got {ema}")
    if evaluate_every is not None and evaluate_every < 1:
        raise ValueError(f"evaluate_every: expected at least 1, got {evaluate_every}")
    if evaluate_every is not None and held_out is None:
        raise ValueError("held_out: expected data to evaluate on every so many steps, got None")
