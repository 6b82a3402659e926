"""Control over what a flow calls during an examination: types, random draws, rounding, and the seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InFloat64(TorchFunctionMode):
    """A mode in which float32 is float64 wherever a flow asks for it by name, as in ``x.float()``.

    The mode applies only while the default type is float64, so a test in float32 can switch it off.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.get_default_dtype() is torch.float64:
            if function is Tensor.float:
                function = Tensor.double
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = kwargs | {"dtype": torch.float64}
        return function(*args, **kwargs)


class HeldNoise(TorchFunctionMode):
    """A mode in which every uniform draw is one number, for example the middle of its interval.

    ``uniform`` and ``normal`` are the shapes of the draws that were made, ``dropped`` those of dropout's results, and
    ``half`` says whether something was converted to float16 or bfloat16.

    Args:
        level: what a draw from [0, 1) gives; None leaves the draws as they are.
    """

    UNIFORM = (torch.rand, torch.rand_like, Tensor.uniform_)
    DROPOUT = (torch.dropout, torch.nn.functional.dropout, torch.nn.functional.dropout2d, torch.bernoulli)
    NORMAL = (torch.randn, torch.randn_like, torch.normal, Tensor.normal_)

    def __init__(self, level: float | None = None) -> None:
        super().__init__()
        self.level = level
        self.uniform: list[tuple[int, ...]] = []
        self.normal: list[tuple[int, ...]] = []
        self.dropped: list[tuple[int, ...]] = []
        self.half = False

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        drawn = function(*args, **(kwargs or {}))
        named = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.dtype)]
        self.half |= function in (Tensor.half, Tensor.bfloat16) or torch.float16 in named or torch.bfloat16 in named
        if function in self.DROPOUT:
            self.dropped.append(tuple(drawn.shape))
        elif function in self.NORMAL:
            self.normal.append(tuple(drawn.shape))
        elif function in self.UNIFORM:
            self.uniform.append(tuple(drawn.shape))
            if self.level is not None:
                low, high = _interval(args, kwargs or {}) if function is Tensor.uniform_ else (0.0, 1.0)
                drawn.fill_(low + self.level * (high - low))
        return drawn


def _interval(args: tuple, kwargs: dict) -> tuple[float, float]:
    """The interval of a call ``tensor.uniform_(low, high)``."""
    low, high = [*args[1:], *[0.0, 1.0][len(args) - 1 :]][:2]
    return kwargs.get("from", low), kwargs.get("to", high)


class Unrounded(TorchFunctionMode):
    """A mode in which numbers stay as they are where a flow rounds them or makes them integers."""

    ROUNDING = (
        *(torch.floor, torch.round, torch.trunc, torch.fix, torch.ceil),
        *(Tensor.floor, Tensor.round, Tensor.trunc, Tensor.fix, Tensor.ceil),
        *(Tensor.floor_, Tensor.round_, Tensor.trunc_, Tensor.ceil_),
        *(Tensor.long, Tensor.int, Tensor.short, Tensor.byte),
    )
    DIVISIONS = (torch.floor_divide, Tensor.floor_divide, Tensor.__floordiv__)
    INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            if function in self.ROUNDING:
                return args[0]
            if function in (Tensor.to, Tensor.type) and {*args[1:], *kwargs.values()} & {*self.INTEGERS}:
                return args[0]
            if function in self.DIVISIONS:
                function = torch.div
        return function(*args, **kwargs)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which new floating-point tensors, such as those of noise, have this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context with its own seed for torch, NumPy and Python; their states are put back afterwards."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - a flow may use the global generator
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would look for other devices, too
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
