"""Maximum likelihood: :func:`update`, the one training step of the project, and :func:`fit`, the loop around it."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from nflows_lib import settings
from nflows_lib.checks import check_at_least, is_number
from nflows_lib.distributions import random_state_kept
from nflows_lib.evaluation import log_likelihoods, mean_and_error
from nflows_lib.flow import Flow, check_context, check_data
from nflows_lib.normalization import mean_over_processes

# Maps a batch to a batch; if the flow is conditional, a batch and its context to a batch and its context.
Augment = Callable[[Tensor], Tensor] | Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(repr=False)
class History:
    r"""The losses and gradient norms of a training run. A loss is the mean of :math:`-\log p(x)` in nats.

    ``loss`` and ``grad_norm`` have one value per step. ``held_out`` has one triple per evaluation: number of steps
    taken, loss on the held-out data, and its standard error over examples.
    """

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float, float]] = field(default_factory=list)

    def add(self, loss: float, grad_norm: float) -> None:
        """Append the loss and the gradient norm of one step.

        Raises:
            NonFiniteLoss: if one of them is not finite.
        """
        for values, value in ((self.loss, loss), (self.grad_norm, grad_norm)):
            values.append(value)
            if not math.isfinite(value):
                raise NonFiniteLoss(self)

    def __repr__(self) -> str:
        last = self.loss[-100:]
        mean = f", mean loss of the last {len(last)}: ≈ {sum(last) / len(last):.2f} nats" if last else ""
        return f"History of {len(self.loss):,} steps{mean}"


class NonFiniteLoss(RuntimeError):
    """The error of a run whose loss or gradient norm became NaN or infinite. Its ``history`` ends with that value."""

    def __init__(self, history: History) -> None:
        self.history = history
        finite = math.isfinite(history.loss[-1])
        what, value = ("gradient's norm", history.grad_norm[-1]) if finite else ("loss", history.loss[-1])
        super().__init__(
            f"the {what} is {value} at step {len(history.loss)}; the flow holds the parameters that gave this value, "
            "and .history of this error holds the run so far"
        )


class Average:
    r"""An exponential moving average of a flow's parameters, kept in a copy of the flow.

    After each update the average is :math:`d` times itself plus :math:`1 - d` times the current parameters. After n
    updates

    .. math::

        d = \min\left(\text{decay}, \frac{1 + n}{10 + n}\right)

    so that the memory is short at first. With a constant :math:`d`, the very first parameters would stay in the average
    for about :math:`1 / (1 - d)` steps.

    Args:
        flow: the flow that is trained.
        decay: largest :math:`d`, in [0, 1).
    """

    def __init__(self, flow: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.current, self.averaged = flow, copy.deepcopy(flow)
        self.pairs = list(self.averaged.parameters()), list(flow.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Take the flow's current parameters into the average."""
        n = self.updates
        kept = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        torch._foreach_lerp_(*self.pairs, 1 - kept)
        self.updates += 1

    def flow(self) -> nn.Module:
        """Return a flow with the averaged parameters and the current buffers of the trained flow."""
        for averaged, current in zip(self.averaged.buffers(), self.current.buffers(), strict=True):
            averaged.copy_(current.detach())
        return self.averaged


class Shuffle:
    """The order of the examples: full batches from a new permutation of all examples in every epoch.

    Args:
        batch_size: number of examples per batch.
        permutation: gives a new permutation of all examples, on the device on which it will index them.
    """

    def __init__(self, batch_size: int, permutation: Callable[[], Tensor]) -> None:
        self.batch_size, self.permutation = batch_size, permutation
        self.order = torch.empty(0, dtype=torch.long)  # this epoch's permutation
        self.position = 0  # number of entries of the order that have been used

    def next(self) -> Tensor:
        """Return the indices of the next batch, ``(batch_size,)``."""
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
    r"""Take one training step, with the optimizer, on the mean of :math:`-\log p(x)` over a batch.

    The loss and the gradient norm go into the history. Reading them makes the CPU wait for a GPU once per step.

    Args:
        flow: a flow, or a wrapper of one that averages gradients over processes.
        optimizer: holds the parameters that are trained.
        history: gets the loss (averaged over all processes) and the norm of the gradient before clipping.
        batch: ``(B, *shape)``; it is not checked again.
        context: one row per example, if the flow is conditional.
        factor: factor on the optimizer's learning rates in this step.
        clip: largest norm of the gradient; a longer gradient is scaled down to it. None: no clipping.
        average: moving average that is updated after the step. None: no averaging.

    Raises:
        NonFiniteLoss: if the loss or the gradient norm is not finite. No parameter has been changed in this step.
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
    r"""Train a flow: minimise the mean of :math:`-\log p(x)` over minibatches.

    Afterwards the flow is in evaluation mode.

    Batches are full and come from a new shuffle in every epoch. All randomness comes from torch's global generator:
    call ``torch.manual_seed`` first for a run that repeats. Evaluations and the callback do not change the generator's
    state. The data are checked once, before the first step.

    :func:`~nflows_lib.experiments.trainer.train` is the trainer of the long runs, which must survive a kill. It is
    built around the same :func:`update`.

    Args:
        flow: initialised on the first batch (:meth:`~nflows_lib.flow.Flow.initialize`), then trained in place.
        data: all examples, ``(N, *flow.shape)``, on the flow's device, or on the CPU, from where each batch is copied.
        steps: number of updates.
        context: one row per example, if the flow is conditional.
        augment: changes each batch, the first one included, on the flow's device before the flow sees it. If there is a
            context, it is called with batch and context and returns both. Held-out data are not augmented.
        batch_size: number of examples per update.
        lr: learning rate of Adam, if no optimizer is given.
        optimizer: used instead of Adam; the schedule multiplies its learning rates.
        clip: largest norm of the gradient; a longer gradient is scaled down to it. None: no clipping.
        warmup: number of first steps over which the learning rate grows linearly to its full value.
        cosine: whether the learning rate falls to 0 along half a cosine; if not, it is constant.
        ema: decay of an exponential moving average of the parameters, in [0, 1). The average is evaluated, and the flow
            holds it in the end. None: no averaging.
        held_out: examples to evaluate on.
        held_out_context: contexts of the held-out examples, if the flow is conditional.
        evaluations: number of evaluations, spread evenly over the run; the last is after the last step.
        draws: number of draws of the noise that an evaluation averages over.
        callback: called after each step, and after its evaluation if there is one, with the flow and the history.

    Returns:
        the history of the run: losses and gradient norms.

    Raises:
        ValueError: if an argument is out of its range, the data are not the flow's, or the optimizer has parameters
            that are not the flow's.
        NonFiniteLoss: if the loss or the gradient norm becomes NaN or infinite. The error's history ends there.
    """
    check_data(flow, data, context, ("data", "context"), need=1)
    optimizer = optimizer or torch.optim.Adam(flow.parameters(), lr=lr, fused=True)
    check_steps(steps, warmup)
    check_options(flow, optimizer, len(data), batch_size, clip, ema)
    check_held_out(flow, held_out, held_out_context, evaluations, draws)
    keep_freed_memory()
    device = next(flow.parameters()).device
    # The whole permutation goes to the data's device at once: copying each batch's part would force a GPU sync.
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
    """Return the examples at these indices and their contexts, augmented, on the device."""
    batch = data[index].to(device)
    if context is None:
        return (batch if augment is None else augment(batch)), None
    contexts = context[index].to(device)
    return (batch, contexts) if augment is None else augment(batch, contexts)


def rate_factor(step: int, progress: float, warmup: int, cosine: bool) -> float:
    """Return the factor on the learning rates at a step: linear warm-up times half a cosine, if there is one.

    Args:
        step: number of steps taken before this one.
        progress: share of the run that is over, from 0 to 1, which the cosine follows.
        warmup: number of steps of the warm-up.
        cosine: whether the rate falls along half a cosine.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * progress)) if cosine else rise


def is_due(evaluations: int, before: float, now: float) -> bool:
    """Return whether an evaluation falls between two points of the progress from 0 to 1.

    Args:
        evaluations: number of evaluations, spread evenly over the progress.
        before: progress before this step.
        now: progress after this step.
    """
    return math.floor(evaluations * now + 1e-9) > math.floor(evaluations * before + 1e-9)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, so that no step waits for the system to hand out the same pages again.

    glibc does so once a block of almost 32 MiB has been allocated and freed. Without this call, the waits took 12 % of
    the time of Glow's steps.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def show(bar: tqdm, flow: Flow, history: History) -> None:
    """Advance the bar by one step; show the gradient norm and the loss, in bits/dim too if the data are discrete."""
    loss = history.loss[-1]
    bits = {} if flow.levels is None else {"bits/dim": f"{loss / (flow.dims * math.log(2)):.3f}"}
    postfix = {"loss": f"{loss:.2f}"} | bits | {"grad": f"{history.grad_norm[-1]:.1f}"}
    bar.set_postfix(postfix, refresh=False)
    bar.update()


def check_held_out(flow: Flow, held_out: Tensor | None, context: Tensor | None, evaluations: int, draws: int) -> None:
    """Raise a ValueError unless the held-out data are the flow's, or are None and only one evaluation is asked for."""
    check_at_least(1, evaluations=evaluations, draws=draws)
    if held_out is not None:
        check_data(flow, held_out, context, ("held_out", "held_out_context"), need=1)
        return
    check_context(context, 0, "held_out_context")
    if evaluations > 1:
        raise ValueError(f"held_out: expected data for {evaluations} evaluations, got None")


def check_options(
    flow: Flow, optimizer: Optimizer, examples: int, batch_size: int, clip: float | None, ema: float | None
) -> None:
    """Raise a ValueError unless these options are in their ranges and the optimizer's parameters are the flow's."""
    if not isinstance(batch_size, Integral) or not 1 <= batch_size <= examples:
        raise ValueError(f"batch_size: expected 1 to {examples}, the number of examples, got {batch_size}")
    if clip is not None and not (isinstance(clip, Real) and clip > 0):
        raise ValueError(f"clip: expected a number above 0, got {clip}")
    if ema is not None and not (is_number(ema) and 0 <= ema < 1):
        raise ValueError(f"ema: expected a decay in [0, 1), got {ema}")
    own = {id(parameter) for parameter in flow.parameters()}
    others = sum(id(parameter) not in own for group in optimizer.param_groups for parameter in group["params"])
    if others:
        raise ValueError(f"optimizer: expected only parameters of this flow, got {others} not in it")


def check_steps(steps: int, warmup: int) -> None:
    """Raise a ValueError unless there is at least one step, and no more steps of warm-up than steps."""
    check_at_least(1, steps=steps)
    if not isinstance(warmup, Integral) or not 0 <= warmup <= steps:
        raise ValueError(f"warmup: expected 0 to {steps}, the number of steps, got {warmup}")
