"""Small flows that the tests of the doctor break, and the helpers that ask one test of the doctor alone.

The flows are plain PyTorch modules, as a reader may write them. None of them uses the library.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nflows_lib.clinic.control import InFloat64, default_dtype, seeded
from nflows_lib.clinic.examination import Case
from nflows_lib.clinic.registry import DoctorsTest, Finding


def asked(
    test: DoctorsTest,
    flow: nn.Module,
    batch: Tensor,
    context: Tensor | None = None,
    base: object = None,
    after: Sequence[DoctorsTest] = (),
) -> list[Finding]:
    """The findings of one test of the doctor, after other tests whose verdicts it needs."""
    with default_dtype(torch.float64), InFloat64():
        case = Case(flow, batch, context, base)
        for each in (*after, test):
            with seeded(2):
                findings = each(case)
    assert all(finding.entry in ("", *test.finds) for finding in findings), findings
    assert all(finding.test == test.name for finding in findings)
    return findings


def only(*question: object, **more: object) -> Finding:
    """The only finding of one test of the doctor."""
    findings = asked(*question, **more)
    assert len(findings) == 1, findings
    return findings[0]


def points(n: int = 16, dims: int = 4, seed: int = 0) -> Tensor:
    """Real-valued data, or contexts."""
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


def grid(n: int = 16, dims: int = 4, levels: int = 4, seed: int = 0) -> Tensor:
    """Integers from 0 to ``levels`` - 1, as floats."""
    return torch.randint(levels, (n, dims), generator=torch.Generator().manual_seed(seed)).float()


def moved(flow: nn.Module, by: float = 0.3) -> nn.Module:
    """The flow in evaluation mode, each parameter moved at random from where the layer starts, at the identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return flow.eval()


def network(inputs: int, outputs: int) -> nn.Sequential:
    """A network of one hidden layer, all of whose numbers are zero until the flow is moved."""
    layers = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))
    for parameter in layers.parameters():
        nn.init.zeros_(parameter)
    return layers


class Steps(nn.Module):
    """A chain of layers."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x))
        for step in self.steps:
            x, log_det = step(x, *context)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        for step in reversed(self.steps):
            z = step.inverse(z, *context)
        return z


class Coupling(nn.Module):
    """An affine coupling of vectors; with ``flip`` it changes the first half."""

    def __init__(self, dims: int = 4, flip: bool = False, context: int = 0) -> None:
        super().__init__()
        self.flip, self.half = flip, dims // 2
        self.network = network(dims // 2 + context, 2 * (dims - dims // 2))
        self.gain = nn.Parameter(torch.ones(1))

    def parts(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x.flip(1) if self.flip else x
        kept, changed = x[:, : self.half], x[:, self.half :]
        log_scale, shift = self.network(torch.cat([kept, *context], 1)).chunk(2, 1)
        return kept, changed, self.gain * log_scale.tanh(), shift

    def whole(self, kept: Tensor, changed: Tensor) -> Tensor:
        x = torch.cat([kept, changed], 1)
        return x.flip(1) if self.flip else x

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed, log_scale, shift = self.parts(x, *context)
        return self.whole(kept, changed * log_scale.exp() + shift), log_scale.sum(1)

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        kept, changed, log_scale, shift = self.parts(z, *context)
        return self.whole(kept, (changed - shift) * (-log_scale).exp())


class Columns(nn.Module):
    """A learned scale and shift of each column."""

    def __init__(self, dims: int = 4) -> None:
        super().__init__()
        self.log_scale, self.shift = nn.Parameter(torch.zeros(dims)), nn.Parameter(torch.zeros(dims))

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp() + self.shift, self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        return (z - self.shift) * (-self.log_scale).exp()


class Matrix(nn.Module):
    """A learned matrix."""

    def __init__(self, dims: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dims))

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T, torch.linalg.slogdet(self.weight)[1].expand(len(x))

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        return torch.linalg.solve(self.weight, z.T).T


class Noise(nn.Module):
    """Uniform noise on levels, and the floor in the inverse."""

    def __init__(self, levels: int = 4, width: float = 1.0) -> None:
        super().__init__()
        self.levels, self.width = levels, width

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.width * torch.rand(x.shape), torch.zeros(len(x))

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        return z.floor().clamp(0, self.levels - 1)


class Times(nn.Module):
    """A fixed scaling; ``counted`` is what its log-det says of each number, log |factor| if None."""

    def __init__(self, factor: float, counted: float | None = None) -> None:
        super().__init__()
        self.factor = factor
        self.counted = torch.tensor(factor).abs().log().item() if counted is None else counted

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.factor, torch.full((len(x),), self.counted * x[0].numel())

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        return z / self.factor


def couplings(dims: int = 4, context: int = 0) -> list[nn.Module]:
    """Two couplings that change all numbers between them."""
    return [Coupling(dims, False, context), Coupling(dims, True, context)]


def sound(dims: int = 4, context: int = 0) -> nn.Module:
    """A sound flow of vectors."""
    return moved(Steps(*couplings(dims, context), Columns(dims)))
