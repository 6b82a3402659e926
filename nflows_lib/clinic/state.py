"""What a flow keeps outside of its state dict, and which of its attributes say that it has seen a first batch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nflows_lib.clinic.control import seeded
from nflows_lib.clinic.examination import Case, all_modules, copied, detached, equal

COUNTED = re.compile("init|count|seen|calls|steps|batches|ready|first|fresh")  # names of whole numbers used as flags


@dataclass(frozen=True)
class Place:
    """Where a value is kept: the module's name, the attribute, and whether the state dict holds it."""

    module: str
    attribute: str
    saved: bool

    def owner(self, flow: nn.Module) -> nn.Module:
        """The module in another copy of the flow."""
        return all_modules(flow)[self.module]

    def get(self, flow: nn.Module) -> Any:
        """The value in a copy of the flow."""
        return getattr(self.owner(flow), self.attribute)

    def put(self, flow: nn.Module, value: Any) -> None:
        """Replace the value in a copy of the flow."""
        owner = self.owner(flow)
        if self.attribute in owner._buffers or self.attribute in owner._parameters:
            with torch.no_grad():
                getattr(owner, self.attribute).copy_(torch.as_tensor(value))
        else:
            setattr(owner, self.attribute, value)

    def truth(self, flow: nn.Module) -> bool:
        """The value as a truth value."""
        return bool(self.get(flow))

    def set_truth(self, flow: nn.Module, value: bool) -> None:
        """Replace a truth value by one of the same type."""
        before = self.get(flow)
        self.put(flow, torch.full_like(before, float(value)) if isinstance(before, Tensor) else type(before)(value))

    def title(self, flow: nn.Module) -> str:
        """How the report names the place."""
        return f"{self.module} {type(self.owner(flow)).__name__}".strip()


def modules_outside(flow: nn.Module) -> list[str]:
    """The names of the outermost modules that have parameters and are kept in plain lists, tuples or dicts."""
    registered = {id(module) for module in flow.modules()}
    outside = [name for name, module in all_modules(flow).items() if id(module) not in registered]
    every = all_modules(flow)
    outer = [name for name in outside if not any(name.startswith(f"{other}.") for other in outside)]
    return [name for name in outer if any(True for _ in every[name].parameters())]


def values_outside(flow: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    """The tensors, arrays and lists of numbers that no state dict holds, as tensors."""
    for name, module in all_modules(flow).items():
        if type(module).__module__.startswith("torch."):
            continue
        for key, buffer in module._buffers.items():
            if key in module._non_persistent_buffers_set and buffer is not None:
                yield Place(name, key, saved=False), buffer
        for key, value in vars(module).items():
            if key[:1] == "_" or isinstance(value, nn.Parameter):
                continue
            if isinstance(value, Tensor):
                yield Place(name, key, saved=False), value
            elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
                yield Place(name, key, saved=False), torch.as_tensor(value)
            elif (
                isinstance(value, list | tuple) and len(value) > 2 and all(type(v) in (int, float, bool) for v in value)
            ):
                if any(type(v) is float for v in value) or sorted(value) == [*range(len(value))]:  # no shape
                    yield Place(name, key, saved=False), torch.tensor(value)


def looks_made_by_rule(value: Tensor) -> bool:
    """Whether a tensor looks as if the constructor makes the same one every time: a constant, a mask, a reversal."""
    if value.numel() < 2:
        return True
    flat = value.detach().flatten().to(torch.float64)
    if len(flat.diff().unique()) <= 2:
        return True  # a constant, a range, a reversal, a rotation, every second number and then the others
    if len(flat.unique()) > 3:
        return False
    ends = torch.cat([flat.diff().nonzero().flatten() + 1, torch.tensor([len(flat)])])
    runs = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))
    return len(runs.unique()) <= 2


def changed(value: Tensor) -> Tensor:
    """A value of the same kind and shape that is not the same."""
    if value.dtype == torch.bool:
        return ~value
    if value.is_floating_point():
        with seeded(5):
            return value + 0.1 * (1 + value.abs()) * torch.rand_like(value)
    if {*value.flatten().tolist()} == {0, 1}:
        return 1 - value
    return value.roll(1) if value.dim() else value


def matters(case: Case, place: Place, value: Tensor) -> bool:
    """Whether another value in this place changes what the flow, or its inverse, returns."""
    flow = copied(case.flow)
    before = place.get(flow)
    other = changed(value)
    if isinstance(before, np.ndarray):
        other = other.numpy().astype(before.dtype)
    elif isinstance(before, list | tuple):
        other = type(before)(other.tolist())
    try:
        with torch.no_grad():
            place.put(flow, other)
            done = case.through(flow)
            if not (equal(done.z, case.data_pass.z) and equal(done.log_det, case.data_pass.log_det)):
                return True
            place.put(flow, other)
            return not equal(case.back(flow, done.z), case.reconstruction)
    except Exception:  # the flow does not take the other value, so it reads it
        return True


def stays_behind(case: Case, place: Place) -> bool:
    """Whether a layer fails on another device because this tensor is not moved there with it.

    The device is a pretended one: PyTorch's fake tensors have a device and a shape, and hold no numbers.
    """
    module = next(
        (r for r in case.data_pass.leaves if place.owner(case.flow) in [*all_modules(r.layer).values()]), None
    )
    if (
        module is None
        or not isinstance(place.get(case.flow), Tensor)
        or place.attribute in place.owner(case.flow)._buffers
    ):
        return False  # a buffer moves with its module
    from torch._subclasses.fake_tensor import FakeTensorMode  # imported here, since it takes seconds

    x = module.x[:4] if module.x.is_floating_point() else module.x[:4].clone()

    def fails(moved: bool) -> bool:
        layer = copied(module.layer)
        inside = {
            id(a): b for a, b in zip(all_modules(module.layer).values(), all_modules(layer).values(), strict=True)
        }
        owner = inside[id(place.owner(case.flow))]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:

            def pretend(value: Tensor, device: str = "cuda") -> Tensor:
                fake = mode.from_tensor(value)
                return fake if device == "cpu" else torch.empty_like(fake, device=device)

            for each in all_modules(layer).values():
                for store in (each._parameters, each._buffers):
                    for key, value in store.items():
                        if value is not None:
                            store[key] = pretend(value.detach())
            vars(owner)[place.attribute] = pretend(getattr(owner, place.attribute), "cuda" if moved else "cpu")
            further = [pretend(v[:4]) if isinstance(v, Tensor) else v for v in module.further]
            try:
                layer(pretend(x), *further)
            except Exception:
                return True
            return False

    try:
        return fails(moved=False) and not fails(moved=True)
    except Exception:  # the layer cannot be pretended with: it looks at its numbers
        return False


def first_batch_flags(case: Case) -> dict[Place, bool]:
    """The attributes that say whether a layer has seen its first batch, and their values before that batch.

    A flag, whatever its name and type, is a truth value that a pass in training mode turns, if a parameter of its
    module changes in the same pass. To find the flags of a flow that has seen a batch, its truth values are turned
    first, in one copy to False and in another copy to True.
    """
    found: dict[Place, bool] = {}

    def turn(places: list[Place], value: bool | None) -> None:
        flow = detached(case.flow)
        for module in all_modules(flow).values():
            module.train()
        for place in places if value is not None else ():
            place.set_truth(flow, value)
        before = {name: _state(module) for name, module in all_modules(flow).items()}
        truths = {place: place.truth(flow) for place in places}
        try:
            with torch.no_grad():
                case.through(flow, *case.rows(slice(0, 16)))
        except Exception:  # the flow does not work with its options turned: turn each kind alone
            kinds = {(type(place.owner(flow)), place.attribute) for place in places}
            for kind in kinds if len(kinds) > 1 else ():
                turn([place for place in places if (type(place.owner(flow)), place.attribute) == kind], value)
            return
        for place in places:
            after = _state(place.owner(flow))
            moved = any(not equal(a, b) for a, b in zip(before[place.module], after, strict=False))
            if moved and place.truth(flow) is not truths[place]:
                found[place] = truths[place]

    places = [*_truths(case.flow)]
    turn(places, None)
    for value in (False, True):
        if turned := [place for place in places if place.truth(case.flow) is not value]:
            turn(turned, value)
    return found


def _state(module: nn.Module) -> list[Tensor]:
    """Copies of the parameters of a module itself and of its buffers of more than one number."""
    inside = [*module._parameters.values(), *module._buffers.values()]
    return [
        value.detach().clone() for value in inside if value is not None and value.is_floating_point() and value.dim()
    ]


def _truths(flow: nn.Module) -> list[Place]:
    """The truth values of a flow: bools, tensors of one truth value, and whole numbers with the name of a counter."""
    places = []
    for name, module in all_modules(flow).items():
        if type(module).__module__.startswith("torch."):
            continue  # its truth values are options, and batch norm's whole number counts its batches
        for key, value in {**vars(module), **module._buffers, **module._parameters}.items():
            saved = (
                key in module._buffers and key not in module._non_persistent_buffers_set
            ) or key in module._parameters
            number = isinstance(value, Tensor) and value.numel() == 1
            whole = (number and not value.is_floating_point()) or (number and bool(COUNTED.search(key)))
            if key[:1] == "_" or key == "training":
                continue
            if isinstance(value, bool) or whole or (type(value) is int and COUNTED.search(key)):
                places.append(Place(name, key, saved))
    return places


def begin_again(flow: nn.Module, flags: dict[Place, bool], case: Case) -> None:
    """Let a copy of the flow, in training mode from then on, initialise itself from the batch of the examination."""
    for flag, value in flags.items():
        flag.set_truth(flow, value)
    flow.train()
    if hasattr(flow, "initialize"):
        flow.initialize(case.x, case.context)
    else:
        case.through(flow)
