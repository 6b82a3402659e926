"""The work of two processes in test_processes.py.

Each process writes its results to a file of its own in a folder. The same functions, called in one process, give the
expected results.

torchrun, its agent and the two processes are forked from a process that has imported PyTorch, since otherwise each of
the three would import it.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import run
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nflows_lib.bijection import Layer
from nflows_lib.coupling import AffineCoupling, alternating_mask
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments import command, processes
from nflows_lib.experiments.trainer import Interrupted, train
from nflows_lib.flow import Flow
from nflows_lib.models import glow
from nflows_lib.networks import MLP
from nflows_lib.normalization import ActNorm, FlowBatchNorm, mean_over_processes
from nflows_lib.training import History, NonFiniteLoss

STOP = 6  # the step after which a run is stopped
OPTIONS = {"steps": 12, "batch_size": 16, "lr": 1e-2, "clip": 1.0, "warmup": 3, "cosine": True, "ema": 0.9}


def state(flow: Flow) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in flow.state_dict().items()}


def points(folder: Path) -> dict:
    """A run without noise, in double precision, with a batch norm and a context: one process gives its numbers."""
    torch.set_default_dtype(torch.float64)
    try:
        # Each process starts with other weights and another random state; those of rank 0 must reach all.
        torch.manual_seed(processes.rank())
        layers: list[Layer] = [ActNorm(2)]
        for i in range(4):
            network = MLP(1, 2, 8, 1, torch.nn.Tanh, context=1)
            layers += [AffineCoupling(alternating_mask(2, i % 2), network), FlowBatchNorm(2)]
        flow = Flow(layers, StandardNormal(), (2,))
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        drawn = torch.Generator().manual_seed(0)
        data = torch.randn(40, 2, generator=drawn) * torch.tensor([3.0, 0.5]) + 5
        context = data.sum(1, keepdim=True) + 0.1 * torch.randn(40, 1, generator=drawn)
        torch.manual_seed(7 + processes.rank())
        called = []
        history = train(
            flow,
            data,
            folder=folder / "points",
            context=context,
            held_out=data[:9],
            held_out_context=context[:9],
            evaluations=3,
            on_evaluation=lambda judged, history: called.append(len(history.loss)),
            # A shift before a batch norm has only rounding as its gradient, which Adam would turn into whole steps.
            optimizer=torch.optim.SGD(flow.parameters(), lr=0.05, momentum=0.5),
            **OPTIONS,
        )
        return {"state": state(flow), "history": asdict(history), "called": called}
    finally:
        torch.set_default_dtype(torch.float32)


class Seen(Layer):
    """A layer that returns its input and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.batches.append(x.detach().clone())
        return x, x.new_zeros(len(x))


def first_step(folder: Path) -> dict:
    """The ActNorms that a dequantized batch initialises, before any step, and the noise that each process draws."""
    torch.manual_seed(0)
    inner = glow((1, 4, 4), levels=8, scales=1, steps=2, hidden=4)
    seen = Seen()
    flow = Flow([UniformDequantize(8), seen, Rescale(1 / 8), *inner.chain[2:]], StandardNormal(), (1, 4, 4))
    data = torch.randint(8, (32, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    train(flow, data, folder=folder / "first", **(OPTIONS | {"steps": 1, "warmup": 0, "lr": 0.0, "ema": None}))
    return {"state": state(flow), "first": seen.batches[0], "batch": seen.batches[-1]}


def images(folder: Path, stop_at: int | None = None, resume: bool = False) -> dict:
    """A Glow with noise and augmentation; one process alone is told to stop at a step."""
    torch.manual_seed(99 if resume else 0)
    flow = glow((1, 4, 4), levels=8, scales=2, steps=1, hidden=4)
    data = torch.randint(8, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    last = processes.rank() == processes.world_size() - 1

    def noisily(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        if last and len(calls) - 1 == stop_at:  # one call is for the whole first batch
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(-1), batch)

    torch.manual_seed(98 if resume else 7)
    try:
        history = train(flow, data, augment=noisily, folder=folder, resume=resume, save_every=1e9, **OPTIONS)
    except Interrupted as error:
        return {"stopped": str(error)}
    return {"state": state(flow), "history": asdict(history), "share": calls[-1]}


def mean() -> dict[str, float]:
    """The mean m of 1 and 2, and the gradient of the sum of both processes' losses, m^2 and 2 m^2: 6 m / 2."""
    own = torch.tensor(1.0 + processes.rank(), requires_grad=True)
    found = mean_over_processes(own)
    (own.detach() * found.square()).backward()
    return {"mean": found.item(), "gradient": own.grad.item()}


def laid_out() -> Tensor:
    """The mean of matrices that are stored row by row in rank 0 and column by column in the others."""
    own = (1 + processes.rank()) * torch.arange(6.0).view(3, 2)
    return mean_over_processes(own if processes.rank() == 0 else own.T.contiguous().T)


def errors(folder: Path) -> dict[str, str]:
    """The errors that are raised in every process, though only one process has met them."""
    found = {}
    torch.manual_seed(0)
    flow = Flow([ActNorm(2)], StandardNormal(), (2,))
    data = torch.randn(16, 2)
    try:
        train(flow, data, folder=folder / "errors", **(OPTIONS | {"batch_size": 15}))
    except ValueError as error:
        found["batch_size"] = str(error)

    def outlying(batch: Tensor) -> Tensor:
        """A batch with an outlier in rank 1's share; the whole first batch has none."""
        return torch.where(torch.tensor(processes.rank() == 1 and len(batch) == 8), 1e30, batch)

    try:
        train(flow, data, folder=folder / "errors", augment=outlying, **OPTIONS)
    except NonFiniteLoss as error:
        found["loss"] = str(error)
    return found


def budget(folder: Path) -> int:
    """The number of steps that fits the time, the same in all processes, though one process is slower."""
    flow, data = Flow([ActNorm(2)], StandardNormal(), (2,)), torch.randn(64, 2)

    def slowly(batch: Tensor) -> Tensor:
        time.sleep(0.002 * (1 + processes.rank()))
        return batch

    return len(train(flow, data, folder=folder / "budget", budget=2.0, batch_size=16, augment=slowly).loss)


def fail(folder: Path) -> None:
    """An error in the middle of a run that only rank 0 raises."""

    def full(judged: Flow, history: History) -> None:
        raise OSError("no space left")

    flow, data = Flow([ActNorm(2)], StandardNormal(), (2,)), torch.randn(64, 2)
    with processes.process_group():
        train(
            flow,
            data,
            folder=folder / "fail",
            held_out=data,
            evaluations=3,
            on_evaluation=full,
            save_every=1e9,
            **OPTIONS,
        )


def command_line(folder: Path, words: list[str]) -> None:
    """Run a command line of the library, and keep its exit status and its output."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = command.main(words)
    torch.save({"status": status, "printed": printed.getvalue()}, folder / f"command-{processes.rank()}.pt")


def findings(folder: Path) -> None:
    with processes.process_group() as device:
        assert device.type == "cuda" or not torch.cuda.is_available()
        found = {
            "points": points(folder),
            "first step": first_step(folder),
            "images": images(folder / "images"),
            "stopped": images(folder / "run", stop_at=STOP),
            "resumed": images(folder / "run", resume=True),
            "errors": errors(folder),
            "budget": budget(folder),
            "broadcast": processes.broadcast(f"of {processes.rank()}"),
            "gathered": processes.all_gather(processes.rank()),
            "any": processes.any_of(processes.rank() == 1, False, True),
            "shard": processes.shard(torch.arange(6)),
            "mean": mean(),
            "laid out": laid_out(),
        }
    found["after"] = (processes.world_size(), processes.rank(), processes.launcher())
    torch.save(found, folder / f"{processes.rank()}.pt")


def launch(function: Callable[..., None], *arguments: object) -> None:
    """Run a function in two processes, as ``torchrun --standalone --nproc-per-node 2`` starts them, but forked."""
    there = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "two"}  # --standalone
    elastic_launch(LaunchConfig(1, 1, 2, max_restarts=0, start_method="fork", **there), function)(*arguments)


def on_their_own(said: Path) -> None:
    """Give this process a process group, to which a terminal's signals can be sent, the CPU, and a file as stderr."""
    os.setsid()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)


def run_module(*words: str) -> None:
    """Run what torchrun starts, ``python -u -m MODULE ARGUMENTS...``, in this process, as a new process would."""
    unbuffered, dash_m, module, *arguments = words
    assert (unbuffered, dash_m) == ("-u", "-m")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a forked process has the handlers of torchrun's agent
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__")


def torchrun(words: list[str], said: Path) -> None:
    """Run ``torchrun WORDS...``; the two processes are forked instead of started."""

    def forking(config: LaunchConfig, entrypoint: str) -> elastic_launch:
        assert entrypoint == sys.executable
        config.start_method = "fork"
        return elastic_launch(config, run_module)

    on_their_own(said)
    run.elastic_launch = forking
    run.main(words)


def work(folder: Path, words: list[str], said: Path) -> None:
    """Run the functions above in two processes, after a command line of the library."""
    on_their_own(said)
    launch(command_line, folder, words)
    launch(findings, folder)
    launch(fail, folder)  # the last: what one process raises ends this one, too
