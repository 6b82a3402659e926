"""A pretended GPU, with which the suite finds tensors on the wrong device on a machine without a GPU.

After :func:`install`, and while the mode that it returns is entered, PyTorch has a device "pretended". A tensor on it
keeps its numbers in an ordinary tensor, with which every operation is computed. But the tensor says that it is on a
GPU, and what a GPU refuses is refused: an operation on tensors of two devices, and a NumPy array of a tensor that was
not copied to the CPU first. FakeTensorMode refuses the same, but has no numbers and no backward pass; here checks of
values, training, checkpoints and whole chapters run unchanged. What a GPU allows is allowed: 0-dim tensors and indices
on the CPU, and copies.

The device has a random state of its own, which ``torch.manual_seed`` seeds, as it seeds CUDA's. The pretended GPU
cannot show kernels that compute something else on a GPU, torch.compile, or how long anything takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
NAME = "pretended"
# Operations that take tensors of two devices: copies, and indices on the CPU into a tensor on a GPU.
MIXING = {aten.copy_.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# Operations whose result the CPU needs, so that it waits for all queued work, as it does for a copy in either
# direction.
WAITING = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}


# Operations nest lists and tuples only. PyTorch's own functions for nested values would take much of their time.


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def changed(change: Callable[[Tensor], Any], value: Any) -> Any:
    """An operation's argument or result, with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([changed(change, inner) for inner in value])
    return value


class OnGPU(Tensor):
    """A tensor that says that it is on the pretended GPU; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        tensor = Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{func} on the pretended GPU, while its mode is not entered")

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None  # a module that moves then replaces whole tensors, not the data inside them

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> OnGPU:
        return OnGPU(inner["held"])

    def tolist(self) -> Any:
        return self.cpu().tolist()  # PyTorch's own method refuses subclasses

    def __format__(self, form: str) -> str:
        return format(self.held, form)

    def numpy(self, **options: Any) -> None:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self, **options: Any) -> str:
        return repr(self.held).removesuffix(")") + f", device='{self.device}')"


class PretendedGPU(TorchDispatchMode):
    """A mode that computes every operation with the held tensors; ``waits`` counts how often the CPU waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        self.manual_seed_all(torch.initial_seed())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        on_gpu = any(isinstance(tensor, OnGPU) for tensor in tensors)
        target = kwargs.get("device")
        to_gpu = on_gpu if target is None else target.type == NAME
        if not on_gpu and not to_gpu:
            return func(*args, **kwargs)
        if on_gpu and func not in MIXING:
            strange = [t for t in tensors if not isinstance(t, OnGPU) and t.dim() > 0]
            if strange:
                raise RuntimeError(
                    f"{func}: expected all tensors on {NAME}, got shape {tuple(strange[0].shape)} on cpu"
                )
        mixed = len({isinstance(tensor, OnGPU) for tensor in tensors}) > 1
        crosses = mixed if func is aten.copy_.default else on_gpu != to_gpu and bool(tensors)
        self.waits += func in WAITING or crosses
        if target is not None:
            kwargs["device"] = torch.device("cpu")

        def held(tensor: Tensor) -> Tensor:
            return tensor.held if isinstance(tensor, OnGPU) else tensor

        held_kwargs = {name: changed(held, value) for name, value in kwargs.items()}
        with self._drawing(func):
            result = func(*changed(held, args), **held_kwargs)
        # A tensor that was changed in place is returned as the same tensor.
        given = {id(held(tensor)): tensor for tensor in tensors}

        def out(tensor: Tensor) -> Tensor:
            return given.get(id(tensor)) if id(tensor) in given else OnGPU(tensor) if to_gpu else tensor

        return changed(out, result)

    @contextmanager
    def _drawing(self, func: Any) -> Iterator[None]:
        """A context in which the CPU's generator has the GPU's state, if the operation draws random numbers."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            yield
            return
        before = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(before)

    def __enter__(self) -> PretendedGPU:
        torch._C._set_only_lift_cpu_tensors(True)  # makes torch.tensor(..., device=...) an operation like others
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)

    # What PyTorch asks of a device's module, such as torch.cuda.

    def manual_seed_all(self, seed: int) -> None:
        self.random_state = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.random_state.clone()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.random_state = state.clone()

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install() -> PretendedGPU:
    """Register the device with PyTorch for the rest of this process, and return the mode that computes on it.

    This must be done before the process's first backward pass, for which PyTorch counts the devices once. It must not
    be done on a machine with a real GPU, which the pretended one would replace.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # not every PyTorch has it

    gpu = PretendedGPU()
    _setup_privateuseone_for_python_backend(NAME, gpu)
    key = "AutocastPrivateUse1"
    EVERY.fallback(fallthrough_kernel, key)
    for name in ("conv2d.padding", "conv2d", "linear"):
        ATEN.impl(name, partial(_lowered, getattr(aten, name.split(".")[0])), key)
    return gpu


def _lowered(operation: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The operation in autocast's precision, as on a GPU."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    dtype = torch.get_autocast_dtype(NAME)
    with torch._C._ExcludeDispatchKeyGuard(key):
        return operation(*changed(lambda tensor: tensor.to(dtype), args), **kwargs)


EVERY, ATEN = Library("_", "IMPL"), Library("aten", "IMPL")  # as long as these live, so does what they register
