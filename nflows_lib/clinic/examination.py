"""One examination of a flow: a copy of the flow, a batch, and a record of what each layer did with the batch.

This module holds what the doctor's tests share. Nothing in it judges the flow.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nflows_lib.clinic.control import HeldNoise, Unrounded, seeded
from nflows_lib.distributions import Base, StandardNormal

EXAMPLES = 64  # the tests look at this number of examples of a batch,
FEW = 16  # or at this number if an example has more than LARGEST dimensions
LARGEST = 1024  # a whole Jacobian is computed for at most this number of dimensions
ROWS = 128  # as many rows of a Jacobian are computed at once
BASES = ("base", "prior", "base_dist", "base_distribution", "distribution", "q0")  # where flows keep their base density
UNUSED = {"allow_unused": True, "materialize_grads": True}  # a number may not depend on another at all
EXACT = 1e-6  # rounding in float64 leaves an error below this one, relative to the largest value


@dataclass
class Independent:
    """A distribution of torch.distributions as a base density: its log_prob sums over the dimensions."""

    distribution: torch.distributions.Distribution

    def log_prob(self, z: Tensor) -> Tensor:
        """The log-density of latents in nats, (B,)."""
        log_p = self.distribution.log_prob(z)
        return log_p if log_p.dim() < 2 else log_p.flatten(1).sum(1)

    def sample(self, like: Tensor) -> Tensor:
        """Draws of the shape of ``like``, (B, D)."""
        drawn = self.distribution.sample((len(like),))
        return drawn if drawn.shape == like.shape else self.distribution.sample(like.shape)


@dataclass
class Record:
    """One call of one layer inside the flow, or of the whole flow, with B examples.

    Many public flows hand the log-det through: a layer gets ``(x, log_det)`` and returns the log-det with its own term
    added. ``handed`` is the position of that log-det among the further arguments, and ``log_det`` is the term alone.
    """

    name: str
    layer: nn.Module
    x: Tensor
    further: tuple[Any, ...]  # the arguments after x
    options: dict[str, Any]  # the keyword arguments
    z: Tensor
    log_det: Tensor  # (B,)
    overwritten: bool = False  # whether the layer has changed x in place
    unsummed: bool = False  # whether the layer has returned more than one log-det per example
    handed: int | None = None

    @property
    def title(self) -> str:
        return f"{self.name} {type(self.layer).__name__}".strip()

    @property
    def learned(self) -> bool:
        return next(self.layer.parameters(), None) is not None

    def again(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output and its log-det, (B,), for other examples x, which get the contexts of the first ones."""
        z, log_det = self.layer(x, *self._rows(self.further, len(x)), **self._rows(self.options, len(x)))
        return z, one_each(log_det, len(x), summed=bool(self.name))

    def alone(self, i: int = 0) -> Record:
        """The record of example i alone; other examples then get its context."""

        def own(value: Any) -> Any:
            each = isinstance(value, Tensor) and value.dim() and len(value) == len(self.x)
            return value[i : i + 1] if each else value

        further, options = tuple(map(own, self.further)), {key: own(value) for key, value in self.options.items()}
        return replace(self, x=own(self.x), z=own(self.z), log_det=own(self.log_det), further=further, options=options)

    def back(self, z: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the layer's inverse makes of the layer's output, or of z, and the log-det that it returns, if any.

        The inverse gets the context of the forward call if it takes one.
        """
        z = self.z if z is None else z
        further = self._rows(self.further, len(z))
        options = self._rows(self.options, len(z))
        contexts = [value for i, value in enumerate(further) if i != self.handed and isinstance(value, Tensor)]
        contexts += [value for value in options.values() if isinstance(value, Tensor)]
        calls = ((further, options), (tuple(contexts), {}), ((), {}))
        fitting = [call for call in calls if _takes(self.layer.inverse, z, *call[0], **call[1])]
        further, options = fitting[0] if fitting else calls[1]
        output = self.layer.inverse(z, *further, **options)
        if not isinstance(output, tuple):
            return output, None
        log_det = output[1] if len(output) == 2 and isinstance(output[1], Tensor | float | int) else None
        return output[0], None if log_det is None else one_each(log_det, len(z), summed=bool(self.name))

    def _rows(self, values: Any, n: int) -> Any:
        """The first n rows of every tensor that has one row per example; a handed log-det becomes 0."""
        if isinstance(values, Mapping):
            return dict(zip(values, self._rows(tuple(values.values()), n), strict=True))
        chosen = []
        for i, value in enumerate(values):
            if isinstance(value, Tensor) and value.dim() and len(value) == len(self.x):
                value = value[torch.arange(n) % len(value)]
            if i == self.handed and values is self.further:
                value = torch.zeros(n)
            chosen.append(value)
        return tuple(chosen)

    def layer_in(self, flow: nn.Module) -> nn.Module:
        """The layer of the same name in another copy of the flow."""
        return all_modules(chain_of(flow))[self.name]

    def is_within(self, layers: set[int]) -> bool:
        """Whether the layer is one of these layers, given by their ids, or has one of them inside it."""
        return any(id(module) in layers for module in all_modules(self.layer).values())

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
    records: list[Record]  # of layers, in the order of the calls
    whole: Record

    @property
    def is_finite(self) -> bool:
        """Whether every latent and every log-likelihood is finite."""
        return bool(self.z.isfinite().all() and self.log_p.isfinite().all())

    @cached_property
    def leaves(self) -> list[Record]:
        """The records of layers that have no other layer inside them."""
        layers = {id(record.layer) for record in self.records}
        return [
            r
            for r in self.records
            if not any(id(m) in layers for m in all_modules(r.layer).values() if m is not r.layer)
        ]

    @cached_property
    def outermost(self) -> list[Record]:
        """The records of layers that are inside no other layer."""
        inside = {id(m) for r in self.records for m in all_modules(r.layer).values() if m is not r.layer}
        return [record for record in self.records if id(record.layer) not in inside]

    @cached_property
    def inner_first(self) -> list[Record]:
        """All records, each after those of the layers inside its own: the first with an error is to blame."""
        return sorted(self.records, key=lambda record: len(all_modules(record.layer)))

    @cached_property
    def gapless(self) -> bool:
        """Whether each outermost layer gets what the one before it returned, and the first the data."""
        before = self.whole.x
        for record in self.outermost:
            if not same_numbers(before, record.x):
                return False
            before = record.z
        return bool(self.records) and same_numbers(before, self.z)


class Case:
    """A copy of the flow, the batch, and the pass of the batch through the copy.

    The copy is in evaluation mode. The copy, the batch and the contexts are on the CPU and in float64; integers stay
    integers.

    Raises:
        ValueError: if a tensor of the flow belongs to a graph that no forward pass computes again, or if a log_det or
            the base's log_prob has another shape than (B,).
    """

    def __init__(self, flow: nn.Module, batch: Tensor, context: Tensor | None, base: Base | None) -> None:
        self.original, self.base = unwrapped(flow), base
        self.alone = False  # whether the flow has no layers and counts as its own only layer
        self.sound = True  # whether no test has failed so far; the doctor keeps it up to date
        self.whole_is_right: bool | None = None  # what the test of log-dets says of the whole flow; None: not compared
        self.inverse_is_right: bool | None = None  # what the test of round trips says of the whole flow
        self.flow = copied(self.original)
        self.own_base = copied(base) if isinstance(base, nn.Module) else base
        if isinstance(base, torch.distributions.Distribution):
            self.own_base = Independent(_converted(base, torch.float64))
        self.everything = batch.detach()
        self.dims = batch[0].numel()
        examples = EXAMPLES if self.dims <= LARGEST else FEW
        self.x = as_float64(batch[:examples])
        self.context = None if context is None else as_float64(context[:examples])
        # A tensor that belongs to a graph and that no forward pass replaces was computed outside of forward (F4).
        graphs = [name for name, value in kept(flow) if not value.is_leaf]
        before = {name: id(value) for name, value in kept(self.flow)}
        self.data_pass = self.through(self.flow)
        after = {name: id(value) for name, value in kept(self.flow)}
        if any(after.get(name) == before[name] for name in graphs):
            raise ValueError("a tensor computed outside of forward is part of the flow")
        if not self.data_pass.records and not self.random:
            self.alone = True
            self.data_pass.records.append(self.data_pass.whole)

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
            seed: seed of the random generators, whose states are restored afterwards.
            grad: whether autograd records a graph.
            after_noise: a function of the noise layer's output, which returns what the next layer gets instead.

        Raises:
            ValueError: if forward does not return a latent and a log-det, or if a log_det or the base's log_prob has
                another shape than (B,).
        """
        x = self.x if x is None else x
        context = self.context if context is None else context
        chain, records = chain_of(flow), []
        inputs: dict[str, tuple[Tensor, Tensor]] = {}  # what came, and a copy of it

        def keep(name: str, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not args and kwargs:  # the data came by keyword, as in layer(x=x)
                first = next(iter(kwargs))
                args, kwargs = (kwargs[first],), {key: value for key, value in kwargs.items() if key != first}
            if args and isinstance(args[0], Tensor):
                inputs[name] = args[0], args[0] if args[0].requires_grad else args[0].clone()
            return args, kwargs

        def note(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
            if not (
                name in inputs and isinstance(output, tuple) and len(output) == 2 and isinstance(output[0], Tensor)
            ):
                return None
            z, (came, before) = output[0], inputs[name]
            if not isinstance(output[1], Tensor | float | int):
                return None
            handed = self._handed(args, output[1])
            log_det = output[1] if handed is None else output[1] - args[1 + handed]
            own = one_each(log_det, len(z), summed=True)
            if after_noise is not None and self.noise is not None and name == self.noise.name:
                z = after_noise(z)
            many = isinstance(log_det, Tensor) and log_det.numel() > len(z)
            changed = not equal(before, came)
            records.append(Record(name, layer, before, args[1:], kwargs, z, own, changed, many, handed))
            return (z, output[1]) if after_noise is not None else None

        hooks = []
        for name, layer in all_modules(chain).items():
            if name and callable(getattr(layer, "inverse", None)):
                before = lambda *call, name=name: keep(name, *call)  # noqa: E731
                after = lambda *call, name=name: note(name, *call)  # noqa: E731
                hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                hooks.append(layer.register_forward_hook(after, with_kwargs=True))
        further = () if context is None else (context[: len(x)].clone(),)
        try:
            with seeded(seed), torch.set_grad_enabled(grad):
                given = x * 1 if x.requires_grad else x.clone()  # a flow may change its input in place
                z, log_det = pair(chain(given, *further))
                log_det = one_each(log_det, len(x))
                log_p = self.base_of(flow).log_prob(z.flatten(1))
                if log_p.shape != log_det.shape:
                    raise ValueError(f"base: expected log_prob of shape {(len(x),)}, got {tuple(log_p.shape)}")
                log_p = log_p + log_det
        finally:
            for hook in hooks:
                hook.remove()
        overwritten = not equal(given, x)
        whole = Record("", chain, x, () if context is None else (context[: len(x)],), {}, z, log_det, overwritten)
        if self.alone:
            records.append(whole)
        return Pass(z, log_det, log_p, records, whole)

    def _handed(self, args: tuple, log_det: object) -> int | None:
        """The position, after x, of a log-det that the layer was handed and adds to, or None."""
        for i, value in enumerate(args[1:]):
            if not (isinstance(value, Tensor) and value.is_floating_point() and isinstance(log_det, Tensor)):
                continue
            is_context = self.context is not None and value.shape == self.context.shape
            if value.shape in ((), (len(args[0]),)) and not is_context:
                return i
        return None

    def rows(self, which: slice) -> tuple[Tensor, Tensor | None]:
        """Some examples of the batch and their contexts, which are None if the batch has no contexts."""
        return self.x[which], None if self.context is None else self.context[which]

    def base_of(self, flow: nn.Module) -> Base:
        """The base density: the one that the caller gave, else the flow's own, else the standard normal."""
        if isinstance(self.base, nn.Module):  # the same module in this copy, if it is a part of the flow
            name = next((n for n, m in all_modules(self.original).items() if m is self.base), None)
            return self.own_base if name is None else all_modules(flow)[name]
        if self.base is not None:
            return self.own_base
        named = (getattr(flow, name, None) for name in BASES)
        own = next((base for base in named if hasattr(base, "log_prob")), None)
        if isinstance(own, torch.distributions.Distribution):
            return Independent(own)
        return own or StandardNormal()

    @cached_property
    def random(self) -> bool:
        """Whether the latent differs from call to call, as it does after dequantization."""
        return not equal(self.through(self.flow, seed=1).z, self.data_pass.z)

    @cached_property
    def noise(self) -> Record | None:
        """The record of the first layer whose output differs from call to call, which is dequantization, or None."""
        if not self.random:
            return None
        with torch.no_grad():
            for record in self.data_pass.records:
                outputs = []
                for seed in (0, 1):
                    with seeded(seed):
                        outputs.append(record.again(record.x)[0])
                if not equal(*outputs):
                    return record
        return None

    @cached_property
    def draws(self) -> HeldNoise:
        """Which random draws one pass of the batch makes."""
        with HeldNoise() as draws:
            self.through(self.flow)
        return draws

    @cached_property
    def flags(self) -> Mapping[Any, bool]:
        """The attributes that say whether a layer has seen its first batch, and their values before that batch."""
        from nflows_lib.clinic.state import first_batch_flags  # imported here: it builds on this module

        return first_batch_flags(self)

    def woken(self) -> nn.Module:
        """A copy with every trainable parameter moved at random, which shows what the flow can learn to depend on."""
        flow = copied(self.flow)
        every = all_parameters(flow)
        with torch.no_grad(), seeded(1):
            for parameter in [p for p in every if p.requires_grad] or every:
                parameter += 0.05 * torch.randn_like(parameter)
        return flow

    @cached_property
    def woken_flow(self) -> nn.Module:
        """A woken copy that no test changes."""
        return self.woken()

    @cached_property
    def woken_pass(self) -> Pass:
        """The pass of the batch through the woken copy."""
        return self.through(self.woken_flow)

    @cached_property
    def spacing(self) -> float | None:
        """The step between one level and the next if the data are discrete; None if they are real numbers."""
        if not self.x.is_floating_point():
            return 1.0
        return spacing_of(self.x)

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

    def back(self, flow: nn.Module, z: Tensor, seed: int = 1) -> Tensor:
        """What a whole copy's inverse makes of latents; these get the contexts of the batch in turn."""
        further = () if self.context is None else (self.context[torch.arange(len(z)) % len(self.context)].clone(),)
        with seeded(seed):
            return first_of(chain_of(flow).inverse(z.clone(), *further))

    def back_to_noise(self, flow: nn.Module, z: Tensor) -> Tensor:
        """A whole copy's inverse without the rounding to levels, as far as it can be left out."""
        if self.noise is not None:
            layer = self.noise.layer_in(flow)
            layer.inverse = lambda z, *further, **options: z
            try:
                return self.back(flow, z)
            finally:
                del layer.inverse
        return self.back_unrounded(flow, z)

    def back_unrounded(self, flow: nn.Module, z: Tensor) -> Tensor:
        """A whole copy's inverse without any rounding, or with it if the inverse cannot do without."""
        try:
            with Unrounded():
                return self.back(flow, z)
        except Exception:  # an index, for example, must be an integer
            return self.back(flow, z)

    @cached_property
    def reconstruction(self) -> Tensor:
        """What the flow's inverse makes of the latents of the batch."""
        with torch.no_grad():
            return self.back(self.flow, self.data_pass.z)


def drawn_from(base: Base, like: Tensor) -> Tensor:
    """Draws from a base density, of the shape of ``like``, (B, D), however its method ``sample`` is called."""
    for argument in (like, len(like), (len(like),), tuple(like.shape)):
        try:
            drawn = first_of(base.sample(argument))
        except (TypeError, AttributeError, ValueError, RuntimeError):
            continue
        if isinstance(drawn, Tensor) and drawn.numel() == like.numel():
            return drawn.reshape(like.shape).to(like.dtype)
    raise ValueError("base: expected a method sample that takes a tensor like the latents, or a number of draws")


def spacing_of(x: Tensor) -> float | None:
    """The step of the grid on which all values of x lie; None if there is no such grid of at most 257 values."""
    levels = x.unique()
    if not 2 <= len(levels) <= min(257, x.numel() // 4):
        return None
    step = levels.diff().min()
    off = ((levels - levels[0]) / step).sub(((levels - levels[0]) / step).round()).abs().max()
    return step.item() if off < 1e-3 else None


def unwrapped(flow: nn.Module) -> nn.Module:
    """The flow itself, without the wrapper of torch.compile, DataParallel or DistributedDataParallel."""
    while True:
        inside = flow._modules.get("_orig_mod") or (None if _can_invert(flow) else flow._modules.get("module"))
        if inside is None:
            return flow
        flow = inside


def _can_invert(flow: nn.Module) -> bool:
    return callable(getattr(flow, "inverse", None)) or callable(getattr(getattr(flow, "chain", None), "inverse", None))


def chain_of(flow: nn.Module) -> nn.Module:
    """The module that maps data to latents: the flow itself if it has an inverse, else its chain."""
    return flow if callable(getattr(flow, "inverse", None)) else getattr(flow, "chain", flow)


def all_modules(module: nn.Module) -> dict[str, nn.Module]:
    """All modules inside a module by name, those included that are kept in plain lists, tuples and dicts."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(name: str, one: nn.Module) -> None:
        if id(one) in seen:
            return
        seen.add(id(one))
        found[name] = one
        begin = f"{name}." if name else ""
        for key, child in one._modules.items():
            if child is not None:
                visit(begin + key, child)
        for key, value in vars(one).items():
            if key[:1] != "_" and isinstance(value, list | tuple | dict):
                for i, inner in value.items() if isinstance(value, dict) else enumerate(value):
                    if isinstance(inner, nn.Module):
                        visit(f"{begin}{key}.{i}", inner)

    visit("", module)
    return found


def all_parameters(flow: nn.Module) -> list[nn.Parameter]:
    """The parameters of a flow, those of modules in plain lists included."""
    found = {id(p): p for module in all_modules(flow).values() for p in module._parameters.values() if p is not None}
    return list(found.values())


def copied(flow: nn.Module, *, keep_mode: bool = False) -> nn.Module:
    """A copy of the flow on the CPU, in float64 and, unless the mode is to be kept, in evaluation mode."""
    flow = converted(detached(flow), torch.float64)
    for module in all_modules(flow).values() if not keep_mode else ():
        module.training = False
    return flow


def converted(flow: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The flow on the CPU and in a type, and so what its modules keep in plain attributes."""
    registered = {id(module) for module in flow.to("cpu", dtype).modules()}
    for module in all_modules(flow).values():
        if id(module) not in registered:
            module.to("cpu", dtype)
        if not type(module).__module__.startswith("torch."):
            vars(module).update(
                {key: _converted(value, dtype) for key, value in vars(module).items() if key[:1] != "_"}
            )
    return flow


def _converted(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, torch.distributions.Distribution):
        value = copy.copy(value)
        vars(value).update({key: _converted(one, dtype) for key, one in vars(value).items()})
        return value
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to("cpu", dtype)
    if type(value) in (list, tuple) and any(isinstance(one, Tensor) for one in value):
        return type(value)(_converted(one, dtype) for one in value)
    if type(value) is dict and any(isinstance(one, Tensor) for one in value.values()):
        return {key: _converted(one, dtype) for key, one in value.items()}
    return value


def detached(flow: nn.Module) -> nn.Module:
    """A copy of the flow in which tensors kept from a forward pass, such as its last log-det, belong to no graph."""
    memo = {id(value): value.detach().clone() for _, value in kept(flow) if not value.is_leaf}
    flow = copy.deepcopy(flow, memo)
    for module in all_modules(flow).values():
        for key, child in module._modules.items():
            if child is not None and "_orig_mod" in child._modules:  # compiled: it would not call the doctor's hooks
                module._modules[key] = child._orig_mod
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None
    return flow


def kept(flow: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The names and values of the tensors that modules keep in plain attributes, alone or in a list or tuple."""
    for name, module in all_modules(flow).items():
        for key, value in vars(module).items():
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, Tensor):
                    yield f"{name}.{key}", one


def as_float64(x: Tensor) -> Tensor:
    """A copy on the CPU, without a graph: in float64, or as it is if it holds integers."""
    x = x.detach().cpu().clone()
    return x.to(torch.float64) if x.is_floating_point() else x


def pair(output: object) -> tuple[Tensor, Any]:
    """The latent and the log-det that a flow has returned.

    Raises:
        ValueError: if the output is no pair that begins with a tensor.
    """
    if isinstance(output, Sequence) and len(output) == 2 and isinstance(output[0], list | tuple):
        raise ValueError(f"z: expected one tensor, got the latents as a {type(output[0]).__name__} of {len(output[0])}")
    if not isinstance(output, tuple | list) or len(output) != 2 or not isinstance(output[0], Tensor):
        parts = f"a tuple of {len(output)}" if isinstance(output, tuple | list) else type(output).__name__
        raise ValueError(f"forward: expected the pair (z, log_det), got {parts}")
    return output[0], output[1]


def first_of(output: Tensor | tuple) -> Tensor:
    """What an inverse returns, without the log-det that some add."""
    return output[0] if isinstance(output, tuple) else output


def arguments(x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments of a layer: x and, if there is a context, as many rows of the context."""
    return (x,) if context is None else (x, context[: len(x)])


def _takes(function: Callable, *args: Any, **kwargs: Any) -> bool:
    """Whether a function can be called with these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True


def one_each(log_det: Tensor | float, n: int, summed: bool = False) -> Tensor:
    """A log-det as one number per example, (n,).

    Args:
        log_det: a single number, (n,), or with ``summed`` also (n, ...), whose further dimensions are summed.
        n: number of examples.
        summed: whether further dimensions are allowed.

    Raises:
        ValueError: if the log-det is of another shape.
    """
    log_det = torch.as_tensor(log_det)
    if summed and log_det.dim() > 1 and len(log_det) == n:
        log_det = log_det.flatten(1).sum(1)
    if log_det.dim() and log_det.shape != (n,):
        raise ValueError(f"log_det: expected one number per example, ({n},), got {tuple(log_det.shape)}")
    return log_det.expand(n)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, where NaN equals NaN."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their shapes are."""
    return a.numel() == b.numel() and torch.equal(a.flatten(1).to(b.dtype), b.flatten(1))


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of b or to 1; infinite for NaN or another shape."""
    if a.shape != b.shape:
        return math.inf
    return ((a - b).abs().max() / max(1.0, b.abs().max().item())).nan_to_num(nan=math.inf).item()


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of a function at a batch of one example, of shape (numbers of the output, numbers of x)."""
    x, rows = x.detach(), []
    with torch.enable_grad():
        value = function(x.clone()).flatten(1)
        for part in torch.arange(value.numel()).split(ROWS):  # one copy of the example for each row
            copies = x.expand(len(part), *x.shape[1:]).clone().requires_grad_()
            z = function(copies * 1).flatten(1)  # copies * 1 may be changed in place, a leaf may not
            if not z.requires_grad or relative_error(z, value.expand_as(z)) > EXACT / 100:
                x = x.clone().requires_grad_()  # the copies' noise differs, or they influence one another
                return gradients(function(x * 1).flatten(), x)
            rows.append(torch.autograd.grad(z[torch.arange(len(part)), part].sum(), copies, **UNUSED)[0].flatten(1))
    return torch.cat(rows)


def gradients(z: Tensor, x: Tensor) -> Tensor:
    """The gradients d z_i / d x of a flat z, of shape (len(z), numbers of x)."""
    if not z.requires_grad:
        return z.new_zeros(len(z), x.numel())
    options = {"retain_graph": True, **UNUSED}
    units = torch.eye(len(z), dtype=z.dtype)
    try:
        rows = torch.cat(
            [torch.autograd.grad(z, x, some, is_grads_batched=True, **options)[0] for some in units.split(ROWS)]
        )
    except RuntimeError:  # vmap does not know some operation
        rows = torch.stack([torch.autograd.grad(z[i], x, **options)[0] for i in range(len(z))])
    return rows.flatten(1)
