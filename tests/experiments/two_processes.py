"""What test_parallel.py has two processes do: ``torchrun --nproc-per-node 2 tests/two_processes.py FOLDER``.

Each leaves what it found in FOLDER, in a file of its own. The same functions, called in one process, say what is
expected.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from nflows_lib.bijection import Layer
from nflows_lib.coupling import AffineCoupling, alternating_mask
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments import processes
from nflows_lib.experiments.checkpoint import CheckpointError
from nflows_lib.experiments.trainer import Interrupted
from nflows_lib.flow import Flow
from nflows_lib.models import glow
from nflows_lib.networks import MLP
from nflows_lib.normalization import ActNorm, FlowBatchNorm
from nflows_lib.training import History, NonFiniteLoss, fit

STOP = 6  # the step after which a run is stopped
OPTIONS = {"steps": 12, "batch_size": 16, "lr": 1e-2, "clip": 1.0, "warmup": 3, "cosine": True, "ema": 0.9}


def state(flow: Flow) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in flow.state_dict().items()}


def points() -> dict:
    """No noise anywhere, a batch norm, a context, double precision: the very numbers of one process can be expected."""
    torch.set_default_dtype(torch.float64)
    try:
        # Each process starts from other weights: those of number 0 are everybody's.
        torch.manual_seed(processes.number())
        layers: list[Layer] = [ActNorm(2)]
        for i in range(4):
            network = MLP(2, 4, 8, 1, torch.nn.Tanh, context=1)
            layers += [AffineCoupling(alternating_mask(2, i % 2), network), FlowBatchNorm(2)]
        flow = Flow(layers, StandardNormal(), (2,))
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        drawn = torch.Generator().manual_seed(0)
        data = torch.randn(40, 2, generator=drawn) * torch.tensor([3.0, 0.5]) + 5
        context = data.sum(1, keepdim=True) + 0.1 * torch.randn(40, 1, generator=drawn)
        torch.manual_seed(7)
        called = []
        history = fit(
            flow,
            data,
            context=context,
            held_out=data[:9],
            held_out_context=context[:9],
            evaluations=3,
            on_evaluation=lambda judged, history: called.append((len(history.loss), processes.processes())),
            # A shift before a batch norm has gradient 0 but for rounding, which Adam would blow up to whole steps.
            optimizer=torch.optim.SGD(flow.parameters(), lr=0.05, momentum=0.5),
            **OPTIONS,
        )
        return {"state": state(flow), "history": vars(history), "called": called}
    finally:
        torch.set_default_dtype(torch.float32)


class Seen(Layer):
    """Passes on what it sees, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.batches.append(x.detach().clone())
        return x, x.new_zeros(len(x))


def first_step() -> dict:
    """What a dequantized batch does to the ActNorms, before any step has moved them, and which noise each has drawn."""
    torch.manual_seed(0)
    inner = glow((1, 4, 4), levels=8, scales=1, steps=2, hidden=4)
    seen = Seen()
    flow = Flow([UniformDequantize(8), seen, Rescale(1 / 8), *list(inner.chain)[2:]], StandardNormal(), (1, 4, 4))
    data = torch.randint(8, (32, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    fit(flow, data, **(OPTIONS | {"steps": 1, "warmup": 0, "lr": 0.0, "ema": None}))
    return {"state": state(flow), "first": seen.batches[0], "batch": seen.batches[-1]}


def images(folder: Path | None = None, stop_at: int | None = None, resume: bool = False) -> dict:
    """A Glow with noise and augmentation, which one process alone is told to stop at a step."""
    torch.manual_seed(99 if resume else 0)
    flow = glow((1, 4, 4), levels=8, scales=2, steps=1, hidden=4)
    data = torch.randint(8, (40, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    last = processes.number() == processes.processes() - 1

    def noisily(batch: Tensor) -> Tensor:
        calls.append(len(batch))
        if last and len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(-1), batch)

    torch.manual_seed(98 if resume else 7)
    try:
        history = fit(flow, data, augment=noisily, folder=folder, resume=resume, save_every=1e9, **OPTIONS)
    except Interrupted as error:
        return {"stopped": str(error)}
    return {"state": state(flow), "history": vars(history), "share": calls[-1]}


def mean() -> dict[str, float]:
    """The mean m of 1 and 2, and the gradient of the sum of both processes' losses, m^2 and 2 m^2: 6 m / 2."""
    own = torch.tensor(1.0 + processes.number(), requires_grad=True)
    found = processes.mean(own)
    (own.detach() * found.square()).backward()
    return {"mean": found.item(), "gradient": own.grad.item()}


def laid_out() -> Tensor:
    """The mean of matrices that lie row by row in number 0, column by column in the others."""
    own = (1 + processes.number()) * torch.arange(6.0).view(3, 2)
    return processes.mean(own if processes.number() == 0 else own.T.contiguous().T)


def alone(folder: Path) -> str:
    """What one process says to the checkpoint of two."""
    try:
        with processes.alone():
            images(folder, resume=True)
    except CheckpointError as error:
        return str(error)
    return "nothing"


def by_itself() -> tuple[int, list[int]]:
    with processes.alone():
        return processes.processes(), processes.gathered(processes.number())


def errors() -> dict[str, str]:
    """What is raised in every process, though only one has met it."""
    found = {}
    torch.manual_seed(0)
    flow = Flow([ActNorm(2)], StandardNormal(), (2,))
    data = torch.randn(16, 2)
    try:
        fit(flow, data, **(OPTIONS | {"batch_size": 15}))
    except ValueError as error:
        found["batch_size"] = str(error)

    def outlying(batch: Tensor) -> Tensor:
        return torch.where(torch.tensor(processes.number() == 1), 1e30, batch)

    try:
        fit(flow, data, augment=outlying, **OPTIONS)
    except NonFiniteLoss as error:
        found["loss"] = str(error)
    return found


def budget() -> int:
    """The number of steps that fits the time: one for all, though one process is slower."""
    flow, data = Flow([ActNorm(2)], StandardNormal(), (2,)), torch.randn(64, 2)

    def slowly(batch: Tensor) -> Tensor:
        time.sleep(0.002 * (1 + processes.number()))
        return batch

    return len(fit(flow, data, budget=2.0, batch_size=16, augment=slowly).loss)


def fail() -> None:
    """Number 0 raises in the midst of a run, alone."""

    def full(judged: Flow, history: History) -> None:
        raise OSError("no space left")

    flow, data = Flow([ActNorm(2)], StandardNormal(), (2,)), torch.randn(64, 2)
    with processes.joined():
        fit(flow, data, held_out=data, evaluations=3, on_evaluation=full, **OPTIONS)


def main(folder: Path) -> None:
    with processes.joined() as device:
        assert device.type == "cuda" or not torch.cuda.is_available()
        found = {
            "points": points(),
            "first step": first_step(),
            "images": images(),
            "stopped": images(folder / "run", stop_at=STOP),
            "resumed": images(folder / "run", resume=True),
            "alone": alone(folder / "run"),
            "errors": errors(),
            "budget": budget(),
            "shared": processes.shared(f"of {processes.number()}"),
            "gathered": processes.gathered(processes.number()),
            "any": processes.any_of(processes.number() == 1, False, True),
            "share": processes.share(torch.arange(6)),
            "mean": mean(),
            "laid out": laid_out(),
            "by itself": by_itself(),
        }
    found["after"] = (processes.processes(), processes.number(), processes.launcher())
    torch.save(found, folder / f"{processes.number()}.pt")


if __name__ == "__main__":
    if "fail" in sys.argv:
        fail()
    else:
        main(Path(sys.argv[1]))
