"""Training that survives a kill: :func:`train`, around the same update step as :func:`nflows_lib.training.fit`."""

from __future__ import annotations

import json
import signal
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nflows_lib import settings
from nflows_lib.checks import is_number
from nflows_lib.distributions import random_state_kept
from nflows_lib.evaluation import log_likelihoods, mean_and_error
from nflows_lib.experiments import checkpoint, compiling, precision, processes
from nflows_lib.experiments.table import YEAR
from nflows_lib.flow import Flow, check_data
from nflows_lib.training import (
    Augment,
    Average,
    History,
    Shuffle,
    check_held_out,
    check_options,
    check_steps,
    is_due,
    keep_freed_memory,
    rate_factor,
    show,
    take,
    update,
)

CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
LOCK = ".training.lock"
RANDOM_STATES = "random_states", "cuda_random_states"  # the CPU's and the GPU's, by their names in a checkpoint
PROBE = 25  # a run with a time budget times this number of steps before it fixes the number of all steps
SLACK = 0.05  # share of the budget that is kept for pictures and for writing checkpoints
TIMED = 100  # this number of held-out examples is evaluated to learn how long an evaluation takes


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, finished its step and wrote a checkpoint; ``resume=True`` goes on from there."""


@dataclass
class Schedule:
    """A run's progress, from 0 to 1, and the factor of the learning rate that belongs to it.

    From step ``start``, at which the progress was ``reached``, the progress grows evenly to 1 at step ``total``. While
    the total is unknown (None), the progress stays the same.
    """

    warmup: int
    cosine: bool
    start: int = 0
    reached: float = 0.0
    total: int | None = None

    def plan(self, step: int, total: int | None) -> None:
        """Let the progress grow from this step on so that it reaches 1 at step ``total``; if None, let it wait.

        A warm-up that is longer than the whole run would keep the learning rate from ever reaching its full value, so
        it is shortened to half of the run.
        """
        self.start, self.reached, self.total = step, self.progress(step), total
        if total is not None and self.warmup > total:
            self.warmup = total // 2

    def progress(self, step: int) -> float:
        """The progress before that step, from 0 to 1."""
        if self.total is None or step <= self.start:
            return self.reached
        return self.reached + (1 - self.reached) * (step - self.start) / (self.total - self.start)

    def factor(self, step: int) -> float:
        """The factor by which the learning rates are multiplied in that step."""
        return rate_factor(step, self.progress(step), self.warmup, self.cosine)


def train(
    flow: Flow,
    data: Tensor,
    steps: int | None = None,
    *,
    folder: Path,
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
    afterwards: int = 0,
    save_every: float = 60.0,
    resume: bool = False,
    compiled: bool = False,
) -> History:
    """Train a flow as :func:`nflows_lib.training.fit` does, with checkpoints in a folder, and return the history.

    The run survives a kill: called again with the same arguments and ``resume=True``, it goes on from its last
    checkpoint and takes the same steps that it would have taken without the kill (on a CPU to the bit). On an interrupt
    (Ctrl-C, or SIGTERM) it finishes its step and writes a checkpoint. The folder is locked while a training runs in it.

    Under torchrun (:mod:`~nflows_lib.experiments.processes`) every process calls this function with the same data and
    the same random state, and takes its share of each batch. Each process initialises the flow on the whole first
    batch. Rank 0 draws the shuffle, evaluates and writes. Each process draws the noise and the augmentation of its own
    share from a seed of its own. All processes end with the same parameters.

    Args:
        flow, data, context, augment, lr, optimizer, clip, cosine, ema, held_out, held_out_context, evaluations, draws:
            as in :func:`nflows_lib.training.fit`. A resumed run checks the name of ``augment``, and the data by a
            checksum.
        steps: number of updates.
        folder: the folder for checkpoints; it is made if it is missing.
        budget: instead of steps, the seconds that the whole run may take, evaluations included. The first steps and
            an evaluation are timed, then the number of steps is fixed. If later steps are slower, so that the run would
            take longer than the budget, the next evaluation makes the number smaller. A resumed run keeps the number,
            unless it is given another budget: then the rest of the schedule is fitted to the rest of the time.
        batch_size: examples per update, in all processes together.
        warmup: as in ``fit``; if the run is shorter than the warm-up, the warm-up is shortened to half of the run.
        on_evaluation: a function that rank 0 calls after each evaluation, with the evaluated flow and the history so
            far.
        afterwards: how many examples the caller will evaluate after the training. If there are held-out data, a budget
            keeps the time for these examples, at most half of itself.
        save_every: seconds between two checkpoints.
        resume: whether to go on from the folder's checkpoint; without a checkpoint the run starts.
        compiled: whether torch.compile makes one graph of the training step's forward and backward pass. Compiling
            takes a minute or more, which counts in the budget. If it fails, the run says so and goes on without it. The
            checkpoint's settings say whether the steps are compiled; a resumed run may change that.

    Raises:
        ValueError: if an argument is out of its range, if the data do not fit the flow, if the folder cannot be written
            to, if another training runs in it, or if it holds a checkpoint and resume is False.
        checkpoint.CheckpointError: if a checkpoint cannot be written or read, or is another model's or another run's.
        NonFiniteLoss: if the loss or the norm of its gradient is NaN or infinite; the error's history ends there.
        Interrupted: if the run was asked to stop; it has written a checkpoint.
    """
    check_data(flow, data, context, ("data", "context"), need=1)
    optimizer = optimizer or torch.optim.Adam(flow.parameters(), lr=lr, fused=True)
    if (steps is None) == (budget is None):
        raise ValueError(f"steps, budget: expected exactly one of the two, got {steps} and {budget}")
    if budget is None:
        check_steps(steps, warmup)
    elif not is_number(budget) or budget <= 0:
        raise ValueError(f"budget: expected a finite number of seconds above 0, got {budget}")
    elif budget > YEAR:
        raise ValueError(f"budget: expected at most a year, {YEAR:,} seconds, got {budget:g}")
    elif warmup < 0:
        raise ValueError(f"warmup: expected at least 0, got {warmup}")
    check_options(flow, optimizer, len(data), batch_size, clip, ema)
    check_held_out(flow, held_out, held_out_context, evaluations, draws)
    count = processes.world_size()
    if batch_size % count:
        raise ValueError(f"batch_size: expected a multiple of {count}, the number of processes, got {batch_size}")
    keep_freed_memory()
    with _locked(folder), _stop_requested() as stop:
        schedule = Schedule(warmup, cosine)
        trainer = _Trainer(
            flow,
            data,
            context,
            augment,
            batch_size,
            optimizer,
            clip,
            ema,
            schedule,
            folder,
            held_out,
            held_out_context,
            evaluations,
            draws,
            afterwards,
        )
        latest = processes.broadcast(_latest(folder))
        if latest is None:
            trainer.start()
        elif resume:
            trainer.load(latest)
        else:
            raise ValueError(
                f"folder: expected a folder without a checkpoint, or resume=True, got {folder}, which holds one"
            )
        trainer.plan(steps, budget)
        if compiled:
            trainer.compile()
        saved = time.monotonic()
        with settings.progress_bar(trainer.schedule.total, batch_size, trainer.step, processes.rank() == 0) as bar:
            while trainer.step != trainer.schedule.total:
                trainer.take_step()
                if trainer.schedule.total is None and trainer.step == PROBE:
                    trainer.plan(steps, budget)
                before, now = (trainer.schedule.progress(step) for step in (trainer.step - 1, trainer.step))
                if held_out is not None and is_due(evaluations, before, now):
                    trainer.evaluate(on_evaluation)
                    if budget is not None:
                        trainer.hurry(budget)
                bar.total = trainer.schedule.total
                show(bar, flow, trainer.history)
                finished = trainer.step == trainer.schedule.total
                # The next step sees a request that comes after this line.
                stopping, due = processes.any_of(bool(stop), time.monotonic() - saved > save_every)
                if finished or stopping or due:
                    trainer.save()
                    saved = time.monotonic()
                if stopping and not finished:
                    total = trainer.schedule.total or "a number yet unknown"
                    raise Interrupted(f"stopped after step {trainer.step:,} of {total}")
    if trainer.average is not None:
        flow.load_state_dict(trainer.judged().state_dict())
    flow.eval()
    return trainer.history


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The facts of a folder's last checkpoint (steps taken, seconds trained, settings); None without a checkpoint."""
    path = _latest(folder)
    return None if path is None else checkpoint.load_facts(path)


def read_model(folder: Path) -> dict[str, Tensor] | None:
    """The model's state dict in a folder's last checkpoint, averaged if the run averages; None without a checkpoint."""
    path = _latest(folder)
    if path is None:
        return None
    tensors, _ = checkpoint.load(path)
    return _under("average.module.", tensors) or _under("flow.", tensors)


@dataclass
class _Trainer:
    """A run's state, all that it needs to go on: parameters, optimizer, average, schedule, shuffle, random states."""

    flow: Flow
    data: Tensor
    context: Tensor | None
    augment: Augment | None
    batch_size: int
    optimizer: Optimizer
    clip: float | None
    ema: float | None
    schedule: Schedule
    folder: Path
    held_out: Tensor | None
    held_out_context: Tensor | None
    evaluations: int
    draws: int
    afterwards: int  # examples that the caller evaluates after the training

    def __post_init__(self) -> None:
        self.device = next(self.flow.parameters()).device
        self.replica: nn.Module = self.flow  # an update calls it; of several processes it averages the gradients
        self.compiled = False
        self.shuffle = Shuffle(self.batch_size, self._permutation)
        self.history = History()
        self.average: Average | None = None
        self.first: tuple[Tensor, Tensor | None] | None = None  # the first step's batch, drawn before it
        self.settings = self._settings()
        self.asked: dict[str, float | None] = {}  # steps or budget, as the caller gave them
        self.durations: list[float] = []  # seconds of each of this process's first steps
        self.planned = 0, 0.0  # steps and seconds when the run was last planned
        self.seconds_each: float | None = None  # seconds to evaluate one example, once that has been timed
        self.seconds = 0.0  # the run's seconds before this process
        self.started = time.monotonic()

    @property
    def step(self) -> int:
        """The number of steps taken."""
        return len(self.history.grad_norm)

    def start(self) -> None:
        """Initialise the flow on the whole first batch, the same in every process; then let random states differ."""
        index = self.shuffle.next()
        self.flow.train()
        self._replicate()
        self._set_random_states(processes.broadcast(self._random_states()))
        self.first = take(index, self.data, self.context, self.augment, self.device)
        self.flow.initialize(*self.first)
        self._make_average()
        if processes.rank() > 0:
            torch.manual_seed(torch.initial_seed() + 1_000_003 * processes.rank())
        if processes.world_size() > 1:
            self.first = self._batch(index)

    def compile(self) -> None:
        """Let updates call a compiled graph of the flow, if compiling works; evaluations still call the flow itself."""
        with random_state_kept(self.device):
            batch = self._batch(torch.arange(self.batch_size, device=self.data.device))
        plain, self.replica = self.replica, compiling.compile_flow(self.replica, *batch)
        self.compiled = self.replica is not plain

    def plan(self, steps: int | None, budget: float | None) -> None:
        """Fix the number of steps, if it is given or steps have been timed, and if it is not yet fixed."""
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
            timed = self.durations[5:] or self.durations  # the first five steps are slow
            pace = statistics.median(timed) if timed else self._elapsed() / self.step
            if self.seconds_each is None and self.held_out is not None and processes.rank() == 0:
                self.seconds_each = self._time_evaluation()
            during = 0 if self.held_out is None else self.evaluations * len(self.held_out) * self.draws
            left = budget * (1 - SLACK) - self._elapsed() - self._kept(budget, during + self.afterwards)
            total = processes.broadcast(self.step + int(left / pace))
        if self.schedule.total is not None and self.step == self.schedule.total:
            raise ValueError(f"resume: expected an unfinished run, got one that has taken its {self.step:,} steps")
        if total <= self.step:
            raise ValueError(f"{'steps' if steps else 'budget'}: expected more than the {self.step:,} steps taken")
        self._plan(total)

    def hurry(self, budget: float) -> None:
        """Plan fewer steps if, at the pace since the last plan, the remaining steps do not fit into the budget."""
        (step, seconds), total = self.planned, self.schedule.total
        if self.step not in (step, total):
            pace = (self._elapsed() - seconds) / (self.step - step)
            left = budget - self._elapsed() - self._kept(budget, self.afterwards)
            fits = processes.broadcast(self.step + max(1, int(left / pace)))
            if fits < total:
                self._plan(fits)

    def _kept(self, budget: float, examples: int) -> float:
        """The seconds that evaluating this number of examples takes, at most half of the budget."""
        return min((self.seconds_each or 0.0) * examples, budget / 2)

    def _time_evaluation(self) -> float:
        """Seconds to evaluate one example, from the second of two evaluations, since the first is slow."""
        part = slice(TIMED)
        for _ in range(2):
            began = time.monotonic()
            context = None if self.held_out_context is None else self.held_out_context[part]
            log_likelihoods(self.judged(), self.held_out[part], context)
        return (time.monotonic() - began) / len(self.held_out[part])

    def _plan(self, total: int) -> None:
        self.schedule.plan(self.step, total)
        self.planned = self.step, self._elapsed()

    def take_step(self) -> None:
        """Take the next batch and update the flow with it."""
        began = time.monotonic()
        batch, self.first = self.first or self._batch(self.shuffle.next()), None
        options = {"factor": self.schedule.factor(self.step), "clip": self.clip, "average": self.average}
        update(self.replica, self.optimizer, self.history, *batch, **options)
        if len(self.durations) < PROBE:
            self.durations.append(time.monotonic() - began)

    def evaluate(self, on_evaluation: Callable[[Flow, History], None] | None) -> None:
        """Evaluate the flow on held-out data on rank 0, and tell all ranks the loss."""
        judged, leads, found = self.judged(), processes.rank() == 0, None
        if leads:
            began = time.monotonic()
            found = mean_and_error(-log_likelihoods(judged, self.held_out, self.held_out_context, self.draws))
            self.seconds_each = (time.monotonic() - began) / (len(self.held_out) * self.draws)
        self.history.held_out.append((self.step, *processes.broadcast(found)))
        if on_evaluation is not None and leads:
            training = judged.training
            judged.eval()
            with random_state_kept(self.device):
                on_evaluation(judged, self.history)
            judged.train(training)

    def judged(self) -> nn.Module:
        """The flow that is evaluated and that the run ends with: the average if there is one, else the flow."""
        return self.flow if self.average is None else self.average.flow()

    def save(self) -> None:
        """Write the run's state to the folder's checkpoint, on rank 0."""
        random_states = processes.all_gather(self._random_states())
        if processes.rank() > 0:
            return
        tensors = {f"flow.{name}": tensor for name, tensor in self.flow.state_dict().items()}
        if self.average is not None:
            averaged = self.average.flow().state_dict()
            tensors |= {f"average.module.{name}": tensor for name, tensor in averaged.items()}
            tensors["average.n_averaged"] = torch.tensor(self.average.updates)
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        tensors["run.order"] = self.shuffle.order
        for name, states in zip(RANDOM_STATES, zip(*random_states, strict=True), strict=False):
            tensors[f"run.{name}"] = torch.stack(states)
        for name, values in asdict(self.history).items():
            tensors[f"history.{name}"] = torch.tensor(values, dtype=torch.float64)
        facts = {
            "step": self.step,
            "position": self.shuffle.position,
            "seconds": self._elapsed(),
            "asked": self.asked,
            "schedule": asdict(self.schedule),
            "settings": self.settings | {"compiled": self.compiled},
        }
        checkpoint.save(self.folder / CHECKPOINT, tensors, facts, previous=self.folder / PREVIOUS)

    def load(self, path: Path) -> None:
        """Read the run's state from a checkpoint.

        Raises:
            checkpoint.CheckpointError: if the checkpoint cannot be read, or is another model's or another run's.
        """
        try:
            tensors, facts = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            if path.with_name(PREVIOUS).exists() and path.name != PREVIOUS:
                raise checkpoint.CheckpointError(
                    f"{error}; the previous checkpoint is kept: remove {path.name} to go on from {PREVIOUS}"
                ) from error
            raise
        # Names and shapes are compared first: they show another model better than the settings do.
        checkpoint.load_into(self.flow, _under("flow.", tensors), path.name)
        # Checkpoints of earlier versions lack some settings: one process trained; data and precision are unknown.
        unknown = {name: self.settings[name] for name in ("checksum", "precision")}
        theirs = {"processes": 1, **unknown, **facts["settings"]}
        for name, ours in self.settings.items():
            if ours != theirs.get(name):
                raise checkpoint.CheckpointError(
                    f"{path.name}: another run's: expected {name} {ours}, got {theirs.get(name)}"
                )
        self._make_average()
        if self.average is not None:
            checkpoint.load_into(self.average.averaged, _under("average.module.", tensors), path.name)
            self.average.updates = int(tensors["average.n_averaged"])
        names = {parameter: name for name, parameter in self.flow.named_parameters()}
        order = [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            moments.setdefault(key, {})[order[int(index)]] = tensor
        state: dict[int, dict[str, Tensor]] = {}
        for key, named in moments.items():
            for name, tensor in checkpoint.unmasked(self.flow, named).items():
                state.setdefault(order.index(name), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.flow.train()
        self.shuffle.order, self.shuffle.position = tensors["run.order"].to(self.data.device), facts["position"]
        self.seconds, self.asked = facts["seconds"], facts["asked"]
        self.schedule = Schedule(**facts["schedule"])
        history = _under("history.", tensors)
        self.history = History(
            history["loss"].tolist(),
            history["grad_norm"].tolist(),
            [(int(step), loss, error) for step, loss, error in history["held_out"].tolist()],
        )
        rank, saved = processes.rank(), (f"run.{name}" for name in RANDOM_STATES)
        # These are copies, not views, since the generator reads from the start of the storage.
        self._set_random_states([tensors[name][rank].clone() for name in saved if name in tensors])
        self._replicate()

    def _random_states(self) -> list[Tensor]:
        """The random states of the CPU and, if the flow is on a GPU, of the GPU."""
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def _set_random_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(states[1], self.device)

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _settings(self) -> dict[str, Any]:
        """The settings that must stay the same for a run to be resumed, as JSON returns them."""
        groups = [{name: v for name, v in group.items() if name != "params"} for group in self.optimizer.param_groups]
        found = {
            "examples": len(self.data),
            "batch_size": self.batch_size,
            "processes": processes.world_size(),
            "augment": self.augment and getattr(self.augment, "__name__", type(self.augment).__name__),
            "clip": self.clip,
            "warmup": self.schedule.warmup,
            "cosine": self.schedule.cosine,
            "ema": self.ema,
            "optimizer": [type(self.optimizer).__name__, groups],
            "checksum": _checksum(self.data, self.context),
            "precision": precision.name_of(self.flow),
        }
        return json.loads(json.dumps(found))

    def _make_average(self) -> None:
        if self.ema is not None:
            self.average = Average(self.flow, self.ema)

    def _replicate(self) -> None:
        if processes.world_size() > 1:
            self.replica = DistributedDataParallel(self.flow)  # which copies rank 0's parameters to all

    def _permutation(self) -> Tensor:
        """A permutation of the examples, the same in every process, on the data's device."""
        return processes.broadcast(torch.randperm(len(self.data))).to(self.data.device)

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return take(processes.shard(index), self.data, self.context, self.augment, self.device)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A context that keeps other trainings out of the folder; rank 0 holds the lock for all processes.

    Raises:
        ValueError: if the folder cannot be made or written to, or if another training runs in it.
    """
    if processes.rank() > 0:
        yield
        return
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"folder: expected a folder in which no other training runs, got {folder}") from error
    except OSError as error:
        raise ValueError(
            f"folder: expected a folder that can be written to, got {folder}: {error.strerror or error}"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """A context with a list that is empty until the process is asked to stop (Ctrl-C, SIGTERM).

    Asked a second time, the process stops at once, but not under torchrun: torchrun asks again by itself, and kills a
    process that has not stopped after 30 seconds.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # other threads cannot set handlers
        yield noted
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        noted.append(number)
        if not processes.torchrun():
            signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _checksum(*tensors: Tensor | None) -> int:
    """The CRC-32 checksum of the tensors' numbers."""
    found = 0
    for tensor in tensors:
        if tensor is not None:
            found = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data, found)
    return found


def _latest(folder: Path) -> Path | None:
    """The folder's checkpoint, or the previous one, if a kill between two renames left only that one."""
    return next((path for path in (folder / CHECKPOINT, folder / PREVIOUS) if path.exists()), None)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
