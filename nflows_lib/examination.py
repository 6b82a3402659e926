"""What happens inside a flow while a batch goes through it: what the doctor of :mod:`nflows_lib.clinic` looks at."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from nflows_lib.distributions import Base, StandardNormal

EXAMPLES = 64  # of a batch are looked at


@dataclass
class Record:
    """One call of one layer inside the flow."""

    name: str
    layer: nn.Module
    x: Tensor
    context: Tensor | None
    z: Tensor
    log_det: Tensor  # (B,)
    overwritten: bool  # whether the layer has changed its input in place

    @property
    def title(self) -> str:
        return f"{self.name} {type(self.layer).__name__}".strip()

    @property
    def learned(self) -> bool:
        return next(self.layer.parameters(), None) is not None

    def again(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer makes of other examples, under the contexts of the first ones."""
        z, log_det = self.layer(*given(x, self.context))
        return z, one_each(log_det, len(x))

    def back(self) -> Tensor:
        """The layer's inverse of its own output."""
        x = self.layer.inverse(*given(self.z, self.context))
        return x[0] if isinstance(x, tuple) else x

    def is_within(self, layers: set[int]) -> bool:
        """Whether it is one of these layers (by id), or holds one."""
        return any(id(module) in layers for module in self.layer.modules())


@dataclass
class Run:
    """One pass of a batch through the flow: what came out, and every layer's part in it, in the order of the calls."""

    z: Tensor
    log_det: Tensor
    log_p: Tensor
    records: list[Record]

    @property
    def leaves(self) -> list[Record]:
        """Those with no layer inside them."""
        layers = {id(record.layer) for record in self.records}
        return [r for r in self.records if not any(id(m) in layers for m in r.layer.modules() if m is not r.layer)]

    @property
    def outermost(self) -> list[Record]:
        """Those that stand inside no other."""
        inside = {id(m) for r in self.records for m in r.layer.modules() if m is not r.layer}
        return [record for record in self.records if id(record.layer) not in inside]

    @property
    def inner_first(self) -> list[Record]:
        """All of them, each after those inside it: the first that is wrong is the one to blame."""
        return sorted(self.records, key=lambda record: sum(1 for _ in record.layer.modules()))


class Case:
    """A copy of the flow, the batch, and one pass of the one through the other."""

    def __init__(self, flow: nn.Module, batch: Tensor, context: Tensor | None, base: Base | None) -> None:
        self.given, self.base = flow, base
        self.sound = True  # whether all tests so far have passed
        self.flow = copied(flow)
        self.x = as_float64(batch[:EXAMPLES])
        self.context = None if context is None else as_float64(context[:EXAMPLES])
        self.dims = self.x[0].numel()
        # What hangs on a graph before a forward pass, and is not replaced by one, was computed outside of it (F4).
        graphs = [name for name, value in kept(flow) if not value.is_leaf]
        before = {name: id(value) for name, value in kept(self.flow)}
        self.run = self.through(self.flow)
        after = {name: id(value) for name, value in kept(self.flow)}
        if any(after.get(name) == before[name] for name in graphs):
            raise ValueError("a tensor computed outside of forward is part of the flow")

    def through(
        self,
        flow: nn.Module,
        x: Tensor | None = None,
        context: Tensor | None = None,
        *,
        seed: int = 0,
        grad: bool = False,
        after_noise: Callable[[Tensor], Tensor] | None = None,
    ) -> Run:
        """Send examples (the batch, where none are given) through a copy of the flow.

        ``after_noise`` may put something else in the place of what the noise layer gives.
        """
        x = self.x if x is None else x
        context = self.context if context is None else context
        chain, records = chain_of(flow), []
        inputs: dict[str, Tensor] = {}

        def keep(name: str, layer: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                inputs[name] = args[0] if args[0].requires_grad else args[0].clone()

        def note(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
            if not (args and isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor)):
                return None
            z, log_det = output[0], one_each(output[1], len(output[0]))
            if after_noise is not None and self.noise is not None and name == self.noise.name:
                z = after_noise(z)
            its_context = args[1] if len(args) > 1 else kwargs.get("context")
            before = inputs[name]
            records.append(Record(name, layer, before, its_context, z, log_det, not torch.equal(before, args[0])))
            return z, log_det

        layers = {n: m for n, m in chain.named_modules() if n and callable(getattr(m, "inverse", None))}
        hooks = []
        for name, layer in (layers or {"": chain}).items():
            hooks.append(layer.register_forward_pre_hook(lambda *call, name=name: keep(name, *call)))
            hooks.append(layer.register_forward_hook(lambda *call, name=name: note(name, *call), with_kwargs=True))
        try:
            with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad):
                torch.manual_seed(seed)
                z, log_det = chain(*given(x, context))
                log_det = one_each(log_det, len(x))
                log_p = self.base_of(flow).log_prob(z.flatten(1))
                if log_p.shape != log_det.shape:
                    raise ValueError(f"base: expected log_prob of shape {(len(x),)}, got {tuple(log_p.shape)}")
                log_p = log_p + log_det
        finally:
            for hook in hooks:
                hook.remove()
        return Run(z, log_det, log_p, records)

    def rows(self, which: slice) -> tuple[Tensor, Tensor | None]:
        """Some examples of the batch, and their contexts."""
        return self.x[which], None if self.context is None else self.context[which]

    def base_of(self, flow: nn.Module) -> Base:
        own = getattr(flow, "base", None)
        return self.base or (own if hasattr(own, "log_prob") else StandardNormal())

    @cached_property
    def noise(self) -> Record | None:
        """The first layer that answers differently when it is asked twice: dequantization."""
        with torch.no_grad():
            for record in self.run.records:
                first, second = record.again(record.x)[0], record.again(record.x)[0]
                if not torch.equal(first, second):
                    return record
        return None

    def woken(self) -> nn.Module:
        """A copy with every parameter moved at random: of a fresh flow, what it is built to depend on."""
        flow = copied(self.flow)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for parameter in flow.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return flow

    @cached_property
    def woken_run(self) -> Run:
        return self.through(self.woken())

    @cached_property
    def spacing(self) -> float | None:
        """The step between two levels where the data are discrete, None where they are real numbers."""
        if not self.x.is_floating_point():
            return 1.0
        levels = self.x.unique()
        if not 2 <= len(levels) <= min(257, self.x.numel() // 4):
            return None
        step = levels.diff().min()
        off = ((levels - levels[0]) / step).sub(((levels - levels[0]) / step).round()).abs().max()
        return step.item() if off < 1e-3 else None

    @cached_property
    def levels(self) -> int | None:
        """How many levels discrete data have, from the layer that says so, or counted."""
        if self.spacing is None:
            return None
        named = (getattr(record.layer, "levels", None) for record in self.run.records)
        counted = round(((self.x.max() - self.x.min()) / self.spacing).item()) + 1
        return next((n for n in named if isinstance(n, int)), max(counted, 2))

    def log_p_of(self, flow: nn.Module) -> float:
        """Mean log-likelihood of the batch under a changed copy, in nats for each dimension; -inf if not a number."""
        return (self.through(flow).log_p.mean() / self.dims).nan_to_num(nan=-math.inf).item()


def chain_of(flow: nn.Module) -> nn.Module:
    """What takes data to latents: the chain of a Flow, or the module itself."""
    chain = getattr(flow, "chain", None)
    return chain if callable(getattr(chain, "inverse", None)) else flow


def copied(flow: nn.Module) -> nn.Module:
    return detached(flow).to("cpu", torch.float64).eval()


def detached(flow: nn.Module) -> nn.Module:
    """A copy in which what a forward has kept, its last log-det say, has lost the graph that it hangs on."""
    memo = {id(value): value.detach().clone() for _, value in kept(flow) if not value.is_leaf}
    return copy.deepcopy(flow, memo)


def kept(flow: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that the modules hold in plain attributes, alone or in lists and tuples, with where they are held."""
    for name, module in flow.named_modules():
        for key, value in vars(module).items():
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, Tensor):
                    yield f"{name}.{key}", one


def as_float64(x: Tensor) -> Tensor:
    return x.detach().cpu().to(torch.float64) if x.is_floating_point() else x.detach().cpu()


@contextmanager
def computing_by_default_in(dtype: torch.dtype) -> Iterator[None]:
    """New tensors, noise for example, are of this type inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_float64() -> AbstractContextManager[None]:
    return computing_by_default_in(torch.float64)


def given(x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if context is None else (x, context[: len(x)])


def one_each(log_det: Tensor | float, n: int) -> Tensor:
    log_det = torch.as_tensor(log_det)
    if log_det.dim() and log_det.shape != (n,):
        raise ValueError(f"log_det: expected one number for each example, ({n},), got {tuple(log_det.shape)}")
    return log_det.expand(n)


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value or 1; infinite where one is not a number."""
    if a.shape != b.shape:
        return math.inf
    return ((a - b).abs().max() / max(1.0, b.abs().max().item())).nan_to_num(nan=math.inf).item()


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(Entries of the output, entries of x), for a batch of one."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return gradients(function(x).flatten(), x)


def gradients(z: Tensor, x: Tensor) -> Tensor:
    """d z_i / d x for each of the numbers z, (len(z), entries of x)."""
    if not z.requires_grad:
        return z.new_zeros(len(z), x.numel())
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    try:
        rows = torch.autograd.grad(z, x, torch.eye(len(z)), is_grads_batched=True, **options)[0]
    except RuntimeError:  # an operation that vmap does not know
        rows = torch.stack([torch.autograd.grad(z[i], x, **options)[0] for i in range(len(z))])
    return rows.flatten(1)
