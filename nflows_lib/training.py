"""Maximum likelihood: :func:`update`, the one training step of the project, and :func:`fit`, the loop around it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from nflows_lib import settings
from nflows_lib.bijection import check_positive
from nflows_lib.distributions import random_state_kept
from nflows_lib.evaluation import log_likelihoods, mean_and_error
from nflows_lib.flow import Flow, check_context, check_data
from nflows_lib.normalization import mean_over_processes

# From a batch to a batch; where the flow is conditional, from a batch and its context to the same two.
Augment = Callable[[Tensor], Tensor] | Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(repr=False)
class History:
    """What a training run leaves behind. Losses are mean negative log-likelihoods in nats per example.

    ``loss`` and ``grad_norm`` have one value per step; ``held_out`` has triples (steps taken, loss on the held-out
    data, its standard error over examples).
    """

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float, float]] = field(default_factory=list)

    def add(self, loss: float, grad_norm: float) -> None:
        """Append one step's values; raise :class:`NonFiniteLoss` if one of them is not finite."""
        for values, value in ((self.loss, loss), (self.grad_norm, grad_norm)):
            values.append(value)
            if not math.isfinite(value):
                raise NonFiniteLoss(self)

    def __repr__(self) -> str:
        last = self.loss[-100:]
        mean = f", mean loss of the last {len(last)}: ≈ {sum(last) / len(last):.2f} nats" if last else ""
        return f"History of {len(self.loss):,} steps{mean}"


class NonFiniteLoss(RuntimeError):
    """The loss, or the norm of its gradient, became NaN or infinite. ``history`` ends with that value."""

    def __init__(self, history: History) -> None:
        self.history = history
        finite = math.isfinite(history.loss[-1])
        what, value = ("gradient's norm", history.grad_norm[-1]) if finite else ("loss", history.loss[-1])
        super().__init__(
            f"the {what} is {value} at step {len(history.loss)}; the flow holds the parameters that gave it, "
            "and this error's .history the run so far"
        )


class Average:
    """Exponential moving average of a flow's parameters, beside the flow: avg = d avg + (1 - d) current.

    The memory is short at first, d = min(decay, (1 + n) / (10 + n)) after n updates: otherwise the very first
    parameters would stay in the average for 1 / (1 - decay) steps.
    """

    def __init__(self, flow: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.current, self.averaged = flow, copy.deepcopy(flow)
        self.pairs = list(self.averaged.parameters()), list(flow.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Take the flow's present parameters into the average."""
        n = self.updates
        kept = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        torch._foreach_lerp_(*self.pairs, 1 - kept)
        self.updates += 1

    def flow(self) -> nn.Module:
        """A flow with the averaged parameters, and with the buffers that the trained flow has now."""
        for averaged, current in zip(self.averaged.buffers(), self.current.buffers(), strict=True):
            averaged.copy_(current.detach())
        return self.averaged


class Shuffle:
    """Which examples come next: whole batches, from a new permutation of all examples in every epoch.

    The permutation is as long as there are examples, and on the device on which it will index them.
    """

    def __init__(self, batch_size: int, permutation: Callable[[], Tensor]) -> None:
        self.batch_size, self.permutation = batch_size, permutation
        self.order = torch.empty(0, dtype=torch.long)  # this epoch's permutation
        self.position = 0  # how many of the order have been used

    def next(self) -> Tensor:
        """Indices of the next batch, (batch_size,)."""
        if self.position + self.batch_size > len(self.order):
            self.order, self.position = self.permutation(), 0
        index = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return index


def update(
    flow: nn.Module,
    optimizer: Optimizer,
    history: History,
    batch: Tensor,
    context: Tensor | None = None,
    *,
    factor: float = 1.0,
    clip: float | None = None,
    average: Average | None = None,
) -> None:
    """One training step: a batch's mean -log p(x), its gradient, and the optimizer's step along it.

    Loss and gradient norm go into the history. To read them, the CPU waits for a GPU once per step.

    Args:
        flow: a flow, or a wrapper of one that averages gradients over processes.
        optimizer: of the parameters that are trained.
        history: gets the loss (over all processes) and the norm of the gradient before clipping.
        batch: ``(B, *shape)``; it is not checked again.
        context: one row for each example, where the flow is conditional.
        factor: what the optimizer's learning rates are multiplied by in this step.
        clip: largest norm of the gradient; a longer one is scaled down to it. None: no clipping.
        average: is updated after the step.

    Raises:
        NonFiniteLoss: the loss or the norm is not finite; no parameter has been changed.
    """
    loss = -flow(batch, context, validate=False).mean()
    optimizer.zero_grad()
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    history.add(*torch.stack([mean_over_processes(loss.detach()), norm]).tolist())
    if clip is not None and history.grad_norm[-1] > clip:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if average is not None:
        average.update()


def fit(
    flow: Flow,
    data: Tensor,
    steps: int,
    *,
    context: Tensor | None = None,
    augment: Augment | None = None,
    batch_size: int = 256,
    lr: float = 1e-3,
    optimizer: Optimizer | None = None,
    clip: float | None = None,
    warmup: int = 0,
    cosine: bool = False,
    ema: float | None = None,
    held_out: Tensor | None = None,
    held_out_context: Tensor | None = None,
    evaluations: int = 1,
    draws: int = 1,
    callback: Callable[[Flow, History], None] | None = None,
) -> History:
    """Minimise the mean of -log p(x) over minibatches. Afterwards the flow is trained and in evaluation mode.

    Batches are whole ones from a new shuffle in every epoch. All randomness comes from torch's global generator: call
    ``torch.manual_seed`` for a run that repeats. Neither evaluations nor the callback disturb it. The data are checked
    once, before the first step. Long runs that must outlive a kill have a trainer of their own,
    :func:`nflows_lib.experiments.trainer.train`, around the same :func:`update`.

    Args:
        flow: initialised on the first batch (:meth:`Flow.initialize`), then trained in place.
        data: all examples, ``(N, *flow.shape)``, on the flow's device, or on the CPU, from where each batch is copied.
        steps: number of updates.
        context: one row for each example, where the flow is conditional.
        augment: changes each batch before the flow sees it, on its device, the first one included; where there is a
            context it is called with both and returns both. Held-out data stay as they are.
        batch_size: examples for each update.
        lr: learning rate of Adam, where no optimizer is given.
        optimizer: takes the place of Adam; the schedule multiplies its learning rates.
        clip: largest norm of the gradient; a longer one is scaled down to it. None: no clipping.
        warmup: number of first steps over which the learning rate grows linearly to its full value.
        cosine: let the learning rate fall to 0 along half a cosine; constant otherwise.
        ema: decay of an exponential moving average of the parameters, in [0, 1). The average is what is evaluated,
            and what the flow holds in the end. None: no averaging.
        held_out: examples to evaluate on, with held_out_context where the flow is conditional.
        evaluations: how many times, evenly over the run; the last is after the last step.
        draws: draws of the noise that an evaluation averages over.
        callback: called after each step, and after its evaluation if there is one, with the flow and the history.

    Raises:
        ValueError: an argument is out of its range, the data are not the flow's, or the optimizer has parameters that
            are not the flow's.
        NonFiniteLoss: the loss or the norm of its gradient is NaN or infinite. Its history ends there.
    """
    optimizer = optimizer or torch.optim.Adam(flow.parameters(), lr=lr, fused=True)
    check_steps(steps, warmup)
    check_options(flow, optimizer, len(data), batch_size, clip, ema)
    check_held_out(flow, held_out, held_out_context, evaluations, draws)
    check_data(flow, data, context, ("data", "context"))
    keep_freed_memory()
    device = next(flow.parameters()).device
    # A whole permutation goes to the data's device: to copy each batch's part, the CPU would wait for a GPU.
    shuffle = Shuffle(batch_size, lambda: torch.randperm(len(data)).to(data.device))
    history, average = History(), None
    flow.train()
    with settings.progress_bar(steps, batch_size) as bar:
        for step in range(steps):
            batch = take(shuffle.next(), data, context, augment, device)
            if step == 0:
                flow.initialize(*batch)
                average = None if ema is None else Average(flow, ema)
            factor = rate_factor(step, step / steps, warmup, cosine)
            update(flow, optimizer, history, *batch, factor=factor, clip=clip, average=average)
            if held_out is not None and is_due(evaluations, step / steps, (step + 1) / steps):
                judged = flow if average is None else average.flow()
                loss = mean_and_error(-log_likelihoods(judged, held_out, held_out_context, draws))
                history.held_out.append((step + 1, *loss))
            if callback is not None:
                with random_state_kept(device):
                    callback(flow, history)
            show(bar, flow, history)
    if average is not None:
        flow.load_state_dict(average.flow().state_dict())
    flow.eval()
    return history


def take(
    index: Tensor, data: Tensor, context: Tensor | None, augment: Augment | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The examples of these indices and their contexts, on the device, augmented."""
    batch = data[index].to(device)
    if context is None:
        return (batch if augment is None else augment(batch)), None
    contexts = context[index].to(device)
    return (batch, contexts) if augment is None else augment(batch, contexts)


def rate_factor(step: int, progress: float, warmup: int, cosine: bool) -> float:
    """What the learning rates are multiplied by: linear warm-up, and half a cosine over the progress from 0 to 1."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * progress)) if cosine else rise


def is_due(evaluations: int, before: float, now: float) -> bool:
    """Whether, of evaluations spread evenly over the progress from 0 to 1, one lies between before and now."""
    return math.floor(evaluations * now + 1e-9) > math.floor(evaluations * before + 1e-9)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, so that no step waits for the system to hand out the same pages again.

    glibc does so once it has seen a block of almost 32 MiB come and go. Without it, that took 12 % of Glow's steps.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def show(bar: tqdm, flow: Flow, history: History) -> None:
    """One more step on the bar, with the loss, in bits/dim too where the data are discrete, and the gradient norm."""
    loss = history.loss[-1]
    bits = {} if flow.levels is None else {"bits/dim": f"{loss / (flow.dims * math.log(2)):.3f}"}
    postfix = {"loss": f"{loss:.2f}"} | bits | {"grad": f"{history.grad_norm[-1]:.1f}"}
    bar.set_postfix(postfix, refresh=False)
    bar.update()


def check_held_out(flow: Flow, held_out: Tensor | None, context: Tensor | None, evaluations: int, draws: int) -> None:
    """Raise a ValueError unless there are data to evaluate on, if more than one evaluation is asked for."""
    check_positive(evaluations=evaluations, draws=draws)
    if held_out is not None:
        check_data(flow, held_out, context, ("held_out", "held_out_context"))
        return
    check_context(context, 0, "held_out_context")
    if evaluations > 1:
        raise ValueError(f"held_out: expected data for {evaluations} evaluations, got None")


def check_options(
    flow: Flow, optimizer: Optimizer, examples: int, batch_size: int, clip: float | None, ema: float | None
) -> None:
    """Raise a ValueError unless these are in their ranges, and the optimizer's parameters are the flow's."""
    if not isinstance(batch_size, Integral) or not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size: expected 1 to {examples}, the number of examples, got {batch_size}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0, got {clip}")
    if ema is not None and not 0 <= ema < 1:
        raise ValueError(f"ema: expected a decay in [0, 1), got {ema}")
    own = {id(parameter) for parameter in flow.parameters()}
    others = sum(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"])
    if others:
        raise ValueError(f"optimizer: expected parameters of this flow alone, got {others} that are not in it")


def check_steps(steps: int, warmup: int) -> None:
    """Raise a ValueError unless there is a step, and no more steps of warm-up than steps."""
    check_positive(steps=steps)
    if not isinstance(warmup, Integral) or not 0 <= warmup <= steps:
        raise ValueError(f"warmup: expected 0 to {steps}, the number of steps, got {warmup}")
