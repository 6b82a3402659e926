"""Maximum likelihood in one loop: :func:`fit`, and :func:`log_likelihoods` to judge the result."""

from __future__ import annotations

import json
import math
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from nflows_lib import checkpoint, parallel, settings
from nflows_lib.distributions import random_state_kept
from nflows_lib.flow import Flow, check_context, check_data

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
PROBE = 25  # steps of a run with a time budget that are timed before their number is fixed
READ_EVERY = 5  # steps on a GPU, between two moments at which the CPU waits for it and reads the losses
SLACK = 0.05  # share of the budget kept for evaluations and for writing checkpoints


# From a batch, and its context where there is one, to the same.
Augment = Callable[[Tensor], Tensor] | Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class History:
    """What a training run leaves behind. Losses are mean negative log-likelihoods in nats per example.

    ``held_out`` holds triples (steps taken, loss on the held-out data, its standard error over examples).
    """

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float, float]] = field(default_factory=list)


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


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop. It finished its step and saved; ``fit`` with ``resume=True`` goes on from there."""


@dataclass
class Schedule:
    """How far a run has come, from 0 to 1, and the learning rate that goes with it.

    From step ``start``, where the progress was ``reached``, it grows evenly to 1 at step ``total``. Before the total is
    known (None) it stays where it is.
    """

    warmup: int
    cosine: bool
    start: int = 0
    reached: float = 0.0
    total: int | None = None

    def plan(self, step: int, total: int | None) -> None:
        """From this step on, arrive at the end in the given total number of steps, or wait to be told it."""
        self.start, self.reached, self.total = step, self.progress(step), total

    def progress(self, step: int) -> float:
        if self.total is None or step <= self.start:
            return self.reached
        return self.reached + (1 - self.reached) * (step - self.start) / (self.total - self.start)

    def factor(self, step: int) -> float:
        """What the learning rates are multiplied by in this step."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rise * 0.5 * (1 + math.cos(math.pi * self.progress(step))) if self.cosine else rise


def fit(
    flow: Flow,
    data: Tensor,
    steps: int | None = None,
    *,
    budget: float | None = None,
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
    on_evaluation: Callable[[Flow, History], None] | None = None,
    folder: Path | None = None,
    save_every: float = 60.0,
    resume: bool = False,
) -> History:
    """Minimise the mean of -log p(x) over minibatches. Afterwards the flow is trained and in evaluation mode.

    Batches are whole ones from a fresh shuffle every epoch. All randomness comes from torch's global generator: call
    ``torch.manual_seed`` for a run that repeats. Evaluations do not disturb it.

    Under torchrun (:mod:`nflows_lib.parallel`) every process calls it alike, with the same data, and takes its share of
    each batch. Number 0 draws the shuffle, initialises the flow on the whole first batch, evaluates and writes; noise
    and augmentation are drawn by each for its own share, from a seed of its own. All end with the same parameters.

    The data are checked once, not in every step. On a GPU, with a fused optimizer (the default one is), losses and
    gradient norms are read every few steps only, since the CPU waits for the GPU each time. From the first one on that
    is not finite no step changes parameters or optimizer; the history ends with that one all the same. (The running
    averages of a batch norm go on until then.)

    With a folder the run outlives a kill: called again with the same arguments and ``resume=True``, it goes on from its
    last checkpoint and takes the very steps that it would have taken (on a CPU to the bit). An interrupt (Ctrl-C, or
    SIGTERM) then lets it finish its step and save.

    Args:
        flow: initialised on the first batch (:meth:`Flow.initialize`), then trained in place.
        data: all examples, ``(N, *flow.shape)``, on the flow's device, or on the CPU, from where each batch is copied.
        steps: number of updates.
        budget: in place of steps, the seconds that the whole run may take; the first steps are timed, then the number
            of steps is fixed. A run whose later steps are slower would overrun: an evaluation that sees this coming
            makes the number smaller. A resumed run keeps the number unless it is given another budget: then the rest
            of the schedule is fitted to the rest of the time.
        context: one row for each example, where the flow is conditional.
        augment: changes each batch before the flow sees it, on its device, the first one included; where there is a
            context it is called with both and returns both. Held-out data stay as they are. Like the shuffle it draws
            from torch's global generator. A resumed run checks its name.
        batch_size: examples for each update, those of all processes together.
        lr: learning rate of Adam, where no optimizer is given.
        optimizer: takes the place of Adam; its learning rates are those that the schedule multiplies.
        clip: largest norm of the gradient; a longer one is scaled down to it. None: no clipping.
        warmup: number of first steps over which the learning rate grows linearly to its full value.
        cosine: let the learning rate fall to 0 along half a cosine; constant otherwise.
        ema: decay of an exponential moving average of the parameters, in [0, 1). The average is what is evaluated,
            and what the flow holds in the end. None: no averaging.
        held_out: examples to evaluate on, with held_out_context where the flow is conditional.
        evaluations: how many times, evenly over the run; the last is after the last step.
        draws: draws of the noise that an evaluation averages over.
        on_evaluation: called after each evaluation with the flow that was judged and the history so far.
        folder: where checkpoints go; made if missing. None: none are written.
        save_every: seconds between two checkpoints.
        resume: go on from the folder's checkpoint; without one, start.

    Raises:
        ValueError: an argument is out of its range, data are not the flow's, or the folder holds a checkpoint and
            resume is False.
        checkpoint.CheckpointError: a checkpoint cannot be written or read, or is another model's or another run's.
        NonFiniteLoss: the loss or the norm of its gradient is NaN or infinite. Its history ends there.
        Interrupted: the run was asked to stop, and has saved.
    """
    _check_arguments(data, steps, budget, batch_size, clip, warmup, ema, held_out, evaluations)
    check_data(data, context, flow.shape, flow.levels, ("data", "context"))
    if held_out is None:
        check_context(held_out_context, 0, "held_out_context")
    else:
        check_data(held_out, held_out_context, flow.shape, flow.levels, ("held_out", "held_out_context"))
    keep_freed_memory()
    run = _Run(flow, data, context, augment, batch_size, lr, optimizer, clip, Schedule(warmup, cosine), ema)
    latest = None if folder is None else parallel.shared(_latest(folder))
    if latest is None:
        run.start()
    elif resume:
        run.load(latest)
    else:
        raise ValueError(f"folder: expected one without a checkpoint, or resume=True, got {folder}, which holds one")
    run.plan(steps, budget)

    bar = tqdm(
        total=run.schedule.total,
        initial=run.step,
        unit=" images",
        unit_scale=batch_size,
        disable=not settings.progress() or parallel.number() > 0,
        leave=False,
        mininterval=0.5 if sys.stderr.isatty() or "ipykernel" in sys.modules else 30.0,  # a log file fills slowly
    )
    saved = time.monotonic()
    with _stop_requested(active=folder is not None) as stop:
        while run.step != run.schedule.total:
            run.take_step()
            if budget is not None and run.schedule.total is None and run.step == PROBE:
                run.plan(steps, budget)
                bar.total = run.schedule.total
            bar.set_postfix(run.figures(), refresh=False)
            bar.update()
            done, before = (run.schedule.progress(step) for step in (run.step, run.step - 1))
            if held_out is not None and math.floor(evaluations * done + 1e-9) > math.floor(evaluations * before + 1e-9):
                run.evaluate(held_out, held_out_context, draws, on_evaluation)
                if budget is not None:
                    bar.total = run.hurry(budget)
            finished = run.step == run.schedule.total
            # Asked later to stop, it saves after the next step.
            stopping, due = parallel.any_of(bool(stop), time.monotonic() - saved > save_every)
            if folder is not None and (finished or stopping or due):
                run.save(folder)
                saved = time.monotonic()
            if stopping and not finished:
                bar.close()
                raise Interrupted(f"stopped after step {run.step:,} of {run.schedule.total or 'a number yet unknown'}")
        run.read()
    bar.close()
    if run.average is not None:
        flow.load_state_dict(run.judged().state_dict())
    flow.eval()
    return run.history


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, so that no step waits for the system to hand the same pages out anew.

    It does so once it has seen a block of almost 32 MiB come and go. Without, that took 12 % of Glow's steps.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The facts of a folder's last checkpoint (steps taken, seconds trained, settings); None where there is none."""
    path = _latest(folder)
    return None if path is None else checkpoint.load_facts(path)


def read_model(folder: Path) -> dict[str, Tensor] | None:
    """The state dict of the model in a folder's last checkpoint, averaged if the run averages; None without one."""
    path = _latest(folder)
    if path is None:
        return None
    tensors, _ = checkpoint.load(path)
    return _under("average.module.", tensors) or _under("flow.", tensors)


class _Run:
    """All that a run needs in order to go on: parameters, optimizer, average, schedule, shuffle, random state."""

    def __init__(
        self,
        flow: Flow,
        data: Tensor,
        context: Tensor | None,
        augment: Augment | None,
        batch_size: int,
        lr: float,
        optimizer: Optimizer | None,
        clip: float | None,
        schedule: Schedule,
        ema: float | None,
    ) -> None:
        self.flow, self.data, self.context, self.batch_size = flow, data, context, batch_size
        self.augment, self.clip, self.schedule, self.ema = augment, clip, schedule, ema
        self.parameters = list(flow.parameters())  # once: to walk through the modules takes a small flow a while
        self.device = self.parameters[0].device
        self.optimizer = optimizer or torch.optim.Adam(self.parameters, lr=lr, fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average: AveragedModel | None = None
        self.replica: nn.Module = flow  # what a step calls: one of several averages the gradients of all
        self.history = History()
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        self.read_every = READ_EVERY if self.device.type != "cpu" and fused else 1
        self.unread: list[tuple[Tensor, Tensor]] = []  # losses and gradients' norms that are not in the history yet
        self.stop = torch.zeros((), device=self.device)  # 1 from the first of them on that is not finite
        self.order = torch.empty(0, dtype=torch.long, device=data.device)  # this epoch's shuffle
        self.position = 0  # how many of it are used up
        self.first: tuple[Tensor, Tensor | None] | None = None
        self.asked: dict[str, float | None] = {}  # steps or budget, as the caller gave them
        self.durations: list[float] = []  # of this process's first steps, in seconds
        self.planned = 0, 0.0  # steps and seconds of the run when this process planned last, or the run began
        self.seconds = 0.0  # trained so far, before this process
        self.started = time.monotonic()

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.history.grad_norm) + len(self.unread)

    def start(self) -> None:
        index = self._next_index()
        self.flow.train()
        if parallel.number() == 0:
            self.first = self._batch(index)
            with parallel.alone():
                self.flow.initialize(*self.first)  # the first step must find the parameters that the data set
        else:
            torch.manual_seed(torch.initial_seed() + 1_000_003 * parallel.number())
        if parallel.processes() > 1:
            self.first = self._batch(parallel.share(index))
        self._replicate()
        self._average()

    def plan(self, steps: int | None, budget: float | None) -> None:
        """Fix the number of steps, if it is given or can be told by now, and unless that has been done."""
        asked = {"steps": steps, "budget": budget}
        if self.schedule.total is not None and asked == self.asked:
            return
        self.asked = asked
        if steps is not None:
            total = steps
        elif self.step < PROBE:
            self.schedule.plan(self.step, None)
            return
        else:
            timed = self.durations[5:] or self.durations  # the first ones are slow
            pace = statistics.median(timed) if timed else self._elapsed() / self.step
            total = parallel.shared(self.step + int((budget * (1 - SLACK) - self._elapsed()) / pace))
        if self.schedule.total is not None and self.step == self.schedule.total:
            raise ValueError(f"resume: expected an unfinished run, got one that has taken its {self.step:,} steps")
        if total <= self.step:
            raise ValueError(f"{'steps' if steps else 'budget'}: expected more than the {self.step:,} steps taken")
        self._plan(total)

    def hurry(self, budget: float) -> int:
        """Plan fewer steps, if at the pace since the last plan the rest would not fit the budget; their number."""
        (step, seconds), total = self.planned, self.schedule.total
        if self.step not in (step, total):
            pace = (self._elapsed() - seconds) / (self.step - step)
            fits = parallel.shared(self.step + max(1, int((budget - self._elapsed()) / pace)))
            if fits < total:
                self._plan(fits)
        return self.schedule.total

    def _plan(self, total: int) -> None:
        self.schedule.plan(self.step, total)
        self.planned = self.step, self._elapsed()

    def take_step(self) -> None:
        if not self.unread:
            self.began = self.step, time.monotonic()
        batch, self.first = self.first or self._batch(parallel.share(self._next_index())), None
        loss = -self.replica(*batch, validate=False).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.unread.append((parallel.mean(loss.detach()), norm))
        if self.read_every == 1:
            self.read()  # before the step: one along a gradient that is not finite would lose the parameters
            too_long = self.clip is not None and self.history.grad_norm[-1] > self.clip
        else:
            finite = torch.stack(self.unread[-1]).isfinite().all()
            self.stop = torch.where(finite, self.stop, 1.0)
            self.optimizer.found_inf = self.stop  # a fused optimizer that finds a 1 here takes no step
            too_long = self.clip is not None  # not known yet; a norm below it is left as it is
        if too_long:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        factor = self.schedule.factor(self.step - 1)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        if self.average is not None:
            self._update_average()
        if self.read_every > 1:
            del self.optimizer.found_inf
            if self.step % self.read_every == 0:
                self.read()
        if not self.unread and len(self.durations) < PROBE:  # all that was queued is done
            step, began = self.began
            count = self.step - step
            self.durations += [(time.monotonic() - began) / count] * count

    def read(self) -> None:
        """Take the losses and norms of the steps since the last time into the history; a GPU is waited for."""
        if not self.unread:
            return
        losses, norms = (torch.stack(values).tolist() for values in zip(*self.unread, strict=True))
        self.unread.clear()
        for loss, norm in zip(losses, norms, strict=True):
            self.history.loss.append(loss)
            if not math.isfinite(loss):
                raise NonFiniteLoss(self.history)
            self.history.grad_norm.append(norm)
            if not math.isfinite(norm):
                raise NonFiniteLoss(self.history)

    def evaluate(
        self,
        held_out: Tensor,
        context: Tensor | None,
        draws: int,
        on_evaluation: Callable[[Flow, History], None] | None,
    ) -> None:
        self.read()
        judged = self.judged()
        leads = parallel.number() == 0
        found = mean_and_error(-log_likelihoods(judged, held_out, context, draws)) if leads else None
        self.history.held_out.append((self.step, *parallel.shared(found)))
        if on_evaluation is not None and leads:
            training = judged.training
            judged.eval()
            with parallel.alone(), random_state_kept(self.device):
                on_evaluation(judged, self.history)
            judged.train(training)

    def judged(self) -> nn.Module:
        """What is evaluated, and what the flow holds in the end: the average, with the flow's buffers; or the flow."""
        if self.average is None:
            return self.flow
        for average, current in zip(self.average.module.buffers(), self.flow.buffers(), strict=True):
            average.copy_(current.detach())
        return self.average.module

    def figures(self) -> dict[str, str]:
        """What the progress bar shows."""
        if not self.history.grad_norm:
            return {}
        loss = self.history.loss[-1]
        bits = {} if self.flow.levels is None else {"bits/dim": f"{loss / (self.flow.dims * math.log(2)):.3f}"}
        return {"loss": f"{loss:.2f}"} | bits | {"grad": f"{self.history.grad_norm[-1]:.1f}"}

    def save(self, folder: Path) -> None:
        self.read()
        random_states = parallel.gathered(torch.get_rng_state())
        gpu = None if self.device.type == "cpu" else torch.get_device_module(self.device)
        gpu_random_states = parallel.gathered(gpu.get_rng_state(self.device)) if gpu else []
        if parallel.number() > 0:
            return
        tensors = {f"flow.{name}": tensor for name, tensor in self.flow.state_dict().items()}
        if self.average is not None:
            self.judged()  # its buffers are up to date
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        tensors["run.order"] = self.order
        tensors["run.random_states"] = torch.stack(random_states)
        if gpu:
            tensors["run.cuda_random_states"] = torch.stack(gpu_random_states)
        for name, values in asdict(self.history).items():
            tensors[f"history.{name}"] = torch.tensor(values, dtype=torch.float64)
        facts = {
            "step": self.step,
            "position": self.position,
            "seconds": self._elapsed(),
            "asked": self.asked,
            "schedule": asdict(self.schedule),
            "settings": self._settings(),
        }
        checkpoint.save(folder / CHECKPOINT, tensors, facts, previous=folder / PREVIOUS)

    def load(self, path: Path) -> None:
        try:
            tensors, facts = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            if path.with_name(PREVIOUS).exists() and path.name != PREVIOUS:
                raise checkpoint.CheckpointError(
                    f"{error}; the one before it is kept: remove {path.name} to go on from {PREVIOUS}"
                ) from error
            raise
        ours, theirs = self._settings(), facts["settings"]
        # Names and shapes first: of another model's checkpoint the settings tell little.
        checkpoint.load_into(self.flow, _under("flow.", tensors), path.name)
        for name in ours:
            if ours[name] != theirs.get(name, 1 if name == "processes" else None):
                raise checkpoint.CheckpointError(
                    f"{path.name}: another run's: expected {name} {ours[name]}, got {theirs.get(name)}"
                )
        self._average()
        if self.average is not None:
            checkpoint.load_into(self.average, _under("average.", tensors), path.name)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.flow.train()
        self.order, self.position = tensors["run.order"].to(self.data.device), facts["position"]
        self.seconds, self.asked = facts["seconds"], facts["asked"]
        self.schedule = Schedule(**facts["schedule"])
        history = _under("history.", tensors)
        self.history = History(
            history["loss"].tolist(),
            history["grad_norm"].tolist(),
            [(int(step), loss, error) for step, loss, error in history["held_out"].tolist()],
        )
        # Copies, not views: what is set is read from the start of the storage.
        torch.set_rng_state(tensors["run.random_states"][parallel.number()].clone())
        if self.device.type != "cpu":
            state = tensors["run.cuda_random_states"][parallel.number()].clone()
            torch.get_device_module(self.device).set_rng_state(state, self.device)
        self._replicate()

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, as JSON gives it back."""
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self._groups()]
        found = {
            "examples": len(self.data),
            "batch_size": self.batch_size,
            "processes": parallel.processes(),
            "augment": self.augment and getattr(self.augment, "__name__", type(self.augment).__name__),
            "clip": self.clip,
            "warmup": self.schedule.warmup,
            "cosine": self.schedule.cosine,
            "ema": self.ema,
            "optimizer": [type(self.optimizer).__name__, groups],
        }
        return json.loads(json.dumps(found))

    def _groups(self) -> list[dict[str, Any]]:
        pairs = zip(self.optimizer.param_groups, self.rates, strict=True)
        return [group | {"lr": rate} for group, rate in pairs]

    def _average(self) -> None:
        if self.ema is not None:
            self.average = AveragedModel(self.flow)
            self.averages = list(self.average.module.parameters())

    @torch.no_grad()
    def _update_average(self) -> None:
        # A short memory at first, or the very first parameters would stay in the average for 1 / (1 - decay) steps.
        before = self.step - 1
        kept = min(self.ema, (1 + before) / (10 + before)) if before else 0.0
        torch._foreach_lerp_(self.averages, self.parameters, 1 - kept)
        self.average.n_averaged += 1

    def _replicate(self) -> None:
        if parallel.processes() > 1:
            self.replica = DistributedDataParallel(self.flow)  # which gives all of them what number 0 holds

    def _next_index(self) -> Tensor:
        """Which examples come next, for all processes together."""
        if self.position + self.batch_size > len(self.order):
            # On the data's device as a whole: to bring each batch's part there, the CPU would wait for the GPU.
            self.order, self.position = parallel.shared(torch.randperm(len(self.data))).to(self.data.device), 0
        index = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return index

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        context = None if self.context is None else self.context[index].to(self.device)
        batch = self.data[index].to(self.device)
        if self.augment is None:
            return batch, context
        return (self.augment(batch), None) if context is None else self.augment(batch, context)


@contextmanager
def _stop_requested(active: bool) -> Iterator[list[int]]:
    """A list that is empty until the process is asked to stop (Ctrl-C, SIGTERM). Asked again, it stops at once.

    Not so under torchrun, which asks again by itself, and ends after 30 seconds what has not stopped by then.
    """
    noted: list[int] = []
    if not active or threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        noted.append(number)
        if not parallel.torchrun():
            signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _latest(folder: Path) -> Path | None:
    """The folder's checkpoint. Killed between two renames, a run leaves the one before as the only one."""
    return next((path for path in (folder / CHECKPOINT, folder / PREVIOUS) if path.exists()), None)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def log_likelihoods(
    flow: Flow, data: Tensor, context: Tensor | None = None, draws: int = 1, batch_size: int = 250
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
        with random_state_kept(device):
            for i in range(0, len(data), batch_size):
                x = data[i : i + batch_size].to(device)
                c = None if context is None else context[i : i + batch_size].to(device)
                values.append(torch.stack([flow(x, c) for _ in range(draws)]).mean(0).cpu())
    finally:
        flow.train(training)
    return torch.cat(values)


def log_mean_exp(log_p: Tensor) -> Tensor:
    """log of the mean of p over the first dimension: all draws of the noise in one bound."""
    return log_p.logsumexp(0) - math.log(len(log_p))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent values and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def _check_arguments(
    data: Tensor,
    steps: int | None,
    budget: float | None,
    batch_size: int,
    clip: float | None,
    warmup: int,
    ema: float | None,
    held_out: Tensor | None,
    evaluations: int,
) -> None:
    if (steps is None) == (budget is None):
        raise ValueError(f"steps, budget: expected one of them, got {steps} and {budget}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget: expected seconds above 0, got {budget}")
    if not 1 <= batch_size <= len(data):
        raise ValueError(f"batch_size: expected 1 to {len(data)}, the number of examples, got {batch_size}")
    if batch_size % parallel.processes():
        raise ValueError(f"batch_size: expected a multiple of the {parallel.processes()} processes, got {batch_size}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a number above 0, got {clip}")
    if warmup < 0 or (steps is not None and warmup > steps):
        most = "" if steps is None else f"{steps}, "
        raise ValueError(f"warmup: expected 0 to {most}the number of steps, got {warmup}")
    if ema is not None and not 0 <= ema < 1:
        raise ValueError(f"ema: expected a decay in [0, 1), got {ema}")
    if evaluations < 1:
        raise ValueError(f"evaluations: expected at least 1, got {evaluations}")
    if evaluations > 1 and held_out is None:
        raise ValueError(f"held_out: expected data for {evaluations} evaluations, got None")
