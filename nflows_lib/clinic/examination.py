"""One examination of a flow: a copy of the flow, a batch, and a record of what each layer did with the batch.

This module holds what the doctor's tests share. Nothing in it judges the flow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from nflows_lib.distributions import Base, StandardNormal

EXAMPLES = 64  # the tests look at this number of examples of a batch
LARGEST = 1024  # a whole Jacobian is computed for at most this number of dimensions
EXACT = 1e-6  # rounding in float64 leaves an error below this one, relative to the largest value


@dataclass
class Record:
    """One call of one layer inside the flow, with B examples."""

    name: str
    layer: nn.Module
    x: Tensor
    context: Tensor | None
    z: Tensor
    log_det: Tensor  # (B,)
    overwritten: bool  # whether the layer has changed x in place

    @property
    def title(self) -> str:
        return f"{self.name} {type(self.layer).__name__}".strip()

    @property
    def learned(self) -> bool:
        return next(self.layer.parameters(), None) is not None

    def again(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output and its log-det, (B,), for other examples x, which get the contexts of the first ones."""
        z, log_det = self.layer(*arguments(x, self.context))
        return z, one_each(log_det, len(x))

    def back(self) -> Tensor:
        """What the layer's inverse makes of the layer's output: x, if the layer is right."""
        x = self.layer.inverse(*arguments(self.z, self.context))
        return x[0] if isinstance(x, tuple) else x

    def layer_in(self, flow: nn.Module) -> nn.Module:
        """The layer of the same name in another copy of the flow."""
        return chain_of(flow).get_submodule(self.name)

    def is_within(self, layers: set[int]) -> bool:
        """Whether the layer is one of these layers, given by their ids, or has one of them inside it."""
        return any(id(module) in layers for module in self.layer.modules())

    def is_elementwise(self) -> bool:
        """Whether the first output depends on the first input alone, and no other output depends on that input."""
        step = torch.zeros_like(self.x[0], memory_format=torch.contiguous_format)
        step.view(-1)[0] = 1
        first, others = ((self.again(self.x + s)[0] != self.z).flatten(1).any(0) for s in (step, 1 - step))
        return first.numel() == self.x[0].numel() and not first[1:].any() and not others[0]


@dataclass
class Pass:
    """One pass of a batch of B examples through the flow: the flow's output, and a record of every call of a layer."""

    z: Tensor
    log_det: Tensor  # (B,), in nats
    log_p: Tensor  # (B,), in nats
    records: list[Record]  # in the order of the calls

    @property
    def leaves(self) -> list[Record]:
        """The records of layers that have no other layer inside them."""
        layers = {id(record.layer) for record in self.records}
        return [r for r in self.records if not any(id(m) in layers for m in r.layer.modules() if m is not r.layer)]

    @property
    def outermost(self) -> list[Record]:
        """The records of layers that are inside no other layer."""
        inside = {id(m) for r in self.records for m in r.layer.modules() if m is not r.layer}
        return [record for record in self.records if id(record.layer) not in inside]

    @property
    def inner_first(self) -> list[Record]:
        """All records, each after those of the layers inside its own: the first with an error is to blame."""
        return sorted(self.records, key=lambda record: sum(1 for _ in record.layer.modules()))


class Case:
    """A copy of the flow, the batch, and the pass of the batch through the copy.

    The copy is in evaluation mode. The copy, the batch and the contexts are on the CPU and in float64; integers stay
    integers.

    Raises:
        ValueError: if a tensor of the flow belongs to a graph that no forward pass computes again, or if a log_det or
            the base's log_prob has another shape than (B,).
    """

    def __init__(self, flow: nn.Module, batch: Tensor, context: Tensor | None, base: Base | None) -> None:
        self.original, self.base = flow, base
        self.sound = True  # whether no test has failed so far; the doctor keeps it up to date
        self.flow = copied(flow)
        self.x = as_float64(batch[:EXAMPLES])
        self.context = None if context is None else as_float64(context[:EXAMPLES])
        self.dims = self.x[0].numel()
        # A tensor that belongs to a graph and that no forward pass replaces was computed outside of forward (F4).
        graphs = [name for name, value in kept(flow) if not value.is_leaf]
        before = {name: id(value) for name, value in kept(self.flow)}
        self.data_pass = self.through(self.flow)
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
    ) -> Pass:
        """Send examples through a copy of the flow, and record what each layer does with them.

        Args:
            flow: a copy of the flow, in any mode.
            x: the examples, (B, ...); the whole batch if None.
            context: the examples' contexts, (B, ...); those of the batch if None.
            seed: seed of the random generator, whose state is restored afterwards.
            grad: whether autograd records a graph.
            after_noise: a function of the noise layer's output, which returns what the next layer gets instead.

        Raises:
            ValueError: if a log_det or the base's log_prob has another shape than (B,).
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
                z, log_det = chain(*arguments(x, context))
                log_det = one_each(log_det, len(x))
                log_p = self.base_of(flow).log_prob(z.flatten(1))
                if log_p.shape != log_det.shape:
                    raise ValueError(f"base: expected log_prob of shape {(len(x),)}, got {tuple(log_p.shape)}")
                log_p = log_p + log_det
        finally:
            for hook in hooks:
                hook.remove()
        return Pass(z, log_det, log_p, records)

    def rows(self, which: slice) -> tuple[Tensor, Tensor | None]:
        """Some examples of the batch and their contexts, which are None if the batch has no contexts."""
        return self.x[which], None if self.context is None else self.context[which]

    def base_of(self, flow: nn.Module) -> Base:
        """The base density: the one that the caller gave, else the flow's own, else the standard normal."""
        own = getattr(flow, "base", None)
        return self.base or (own if hasattr(own, "log_prob") else StandardNormal())

    @cached_property
    def noise(self) -> Record | None:
        """The record of the first layer whose output differs from call to call, which is dequantization, or None."""
        with torch.no_grad():
            for record in self.data_pass.records:
                first, second = record.again(record.x)[0], record.again(record.x)[0]
                if not torch.equal(first, second):
                    return record
        return None

    def woken(self) -> nn.Module:
        """A copy with every parameter moved at random, which shows what the flow can learn to depend on."""
        flow = copied(self.flow)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for parameter in flow.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return flow

    @cached_property
    def woken_pass(self) -> Pass:
        """The pass of the batch through a woken copy."""
        return self.through(self.woken())

    @cached_property
    def spacing(self) -> float | None:
        """The step between one level and the next if the data are discrete; None if they are real numbers."""
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
        """How many levels the data have: what a layer's ``levels`` says, else their count. None for real numbers."""
        if self.spacing is None:
            return None
        named = (getattr(record.layer, "levels", None) for record in self.data_pass.records)
        counted = round(((self.x.max() - self.x.min()) / self.spacing).item()) + 1
        return next((n for n in named if isinstance(n, int)), max(counted, 2))

    def log_p_of(self, flow: nn.Module) -> float:
        """Mean log-likelihood of the batch under a changed copy, in nats per dimension; -inf if the mean is NaN."""
        return (self.through(flow).log_p.mean() / self.dims).nan_to_num(nan=-math.inf).item()

    def back_to_noise(self, flow: nn.Module, z: Tensor) -> Tensor:
        """A whole copy's inverse without the rounding to levels: the copy's noise layer gets an identity inverse."""
        if self.noise is not None:
            self.noise.layer_in(flow).inverse = lambda z, context=None: z
        context = None if self.context is None else self.context[torch.arange(len(z)) % len(self.context)]
        x = chain_of(flow).inverse(*arguments(z, context))
        return x[0] if isinstance(x, tuple) else x


def chain_of(flow: nn.Module) -> nn.Module:
    """The module that maps data to latents: the chain of a Flow, or the module itself."""
    chain = getattr(flow, "chain", None)
    return chain if callable(getattr(chain, "inverse", None)) else flow


def copied(flow: nn.Module) -> nn.Module:
    """A copy of the flow on the CPU, in float64 and in evaluation mode."""
    return detached(flow).to("cpu", torch.float64).eval()


def detached(flow: nn.Module) -> nn.Module:
    """A copy of the flow in which tensors kept from a forward pass, such as its last log-det, belong to no graph."""
    memo = {id(value): value.detach().clone() for _, value in kept(flow) if not value.is_leaf}
    return copy.deepcopy(flow, memo)


def kept(flow: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names and values of the tensors that modules keep in plain attributes, alone or in a list or tuple."""
    for name, module in flow.named_modules():
        for key, value in vars(module).items():
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, Tensor):
                    yield f"{name}.{key}", one


def init_flags(module: nn.Module) -> list[Tensor]:
    """The buffers that say whether the module has seen its first batch, found by the names that libraries use."""
    return [buffer for name, buffer in module.named_buffers() if "init" in name and buffer.numel() == 1]


def as_float64(x: Tensor) -> Tensor:
    """A copy on the CPU, without a graph: in float64, or as it is if it holds integers."""
    return x.detach().cpu().to(torch.float64) if x.is_floating_point() else x.detach().cpu()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which new floating-point tensors, such as those of noise, have this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def arguments(x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments of a layer: x and, if there is a context, as many rows of the context."""
    return (x,) if context is None else (x, context[: len(x)])


def one_each(log_det: Tensor | float, n: int) -> Tensor:
    """A log-det as one number per example, (n,).

    Raises:
        ValueError: if the log-det is neither a single number nor of shape (n,).
    """
    log_det = torch.as_tensor(log_det)
    if log_det.dim() and log_det.shape != (n,):
        raise ValueError(f"log_det: expected one number per example, ({n},), got {tuple(log_det.shape)}")
    return log_det.expand(n)


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of b or to 1; infinite for NaN or another shape."""
    if a.shape != b.shape:
        return math.inf
    return ((a - b).abs().max() / max(1.0, b.abs().max().item())).nan_to_num(nan=math.inf).item()


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of a function at a batch of one example, of shape (numbers of the output, numbers of x)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return gradients(function(x).flatten(), x)


def gradients(z: Tensor, x: Tensor) -> Tensor:
    """The gradients d z_i / d x of a flat z, of shape (len(z), numbers of x)."""
    if not z.requires_grad:
        return z.new_zeros(len(z), x.numel())
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    try:
        rows = torch.autograd.grad(z, x, torch.eye(len(z)), is_grads_batched=True, **options)[0]
    except RuntimeError:  # vmap does not know some operation
        rows = torch.stack([torch.autograd.grad(z[i], x, **options)[0] for i in range(len(z))])
    return rows.flatten(1)
