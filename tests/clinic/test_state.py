"""The doctor on what a flow keeps outside of its state dict, and on the flags of a first batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flows import Columns, Coupling, Steps, asked, couplings, moved, only, points, sound
from torch import Tensor, nn

from nflows_lib.clinic import bijection, state, usage
from nflows_lib.clinic.control import InFloat64, default_dtype
from nflows_lib.clinic.examination import Case, unwrapped

# --- values outside of the state dict ---------------------------------------------------------------------------------

ORDER, DIMS = [2, 0, 7, 3, 1, 5, 4, 6], 8


class Shuffle(nn.Module):
    """A permutation that is kept in one of several ways."""

    def __init__(self, kept: str, order: list[int] = ORDER) -> None:
        super().__init__()
        back = torch.tensor(order).argsort()
        if kept in ("buffer", "fleeting buffer"):
            for name, value in (("order", torch.tensor(order)), ("back", back)):
                self.register_buffer(name, value, persistent=kept == "buffer")
        else:
            make = {"list": list, "tuple": tuple, "array": np.array, "tensor": torch.tensor}[kept]
            self.order, self.back = make(order), make(back.tolist())

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.order], torch.zeros(len(x))

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        return z[:, self.back]


def asked_about(layer: nn.Module) -> object:
    return only(usage.saved_state, moved(Steps(layer, Coupling(DIMS))), points(dims=DIMS))


@pytest.mark.parametrize("kept", ["buffer", "tensor", "list", "array", "fleeting buffer"])
def test_a_permutation_is_kept_in_a_buffer(kept: str) -> None:
    found = asked_about(Shuffle(kept))
    assert (found.passed, found.entry) == (kept == "buffer", "" if kept == "buffer" else "F20")
    if kept != "buffer":
        assert found.measured == "steps.0 Shuffle keeps order outside of the state dict"
        assert found.cause == "a loaded flow has another one: register it as a buffer"


@pytest.mark.parametrize("kept", ["list", "array"])
def test_an_order_that_the_constructor_makes_again_may_be_kept_anywhere(kept: str) -> None:
    assert asked_about(Shuffle(kept, [7, 6, 5, 4, 3, 2, 1, 0])).passed


class Keeps(nn.Module):
    """A layer that multiplies by a matrix, or by a vector, that is no buffer."""

    def __init__(self, value: Tensor, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("value", value)
        else:
            self.value = value

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        if self.value.dim() == 1:
            return x * self.value, self.value.abs().log().sum().expand(len(x))
        return x @ self.value, torch.linalg.slogdet(self.value)[1].expand(len(x))

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        return z / self.value if self.value.dim() == 1 else z @ torch.linalg.inv(self.value)


@pytest.mark.parametrize("buffer", [True, False])
@pytest.mark.parametrize("value", [torch.linalg.qr(points(DIMS, DIMS))[0], 0.5 + points(DIMS, DIMS).abs()[0]])
def test_a_matrix_or_standard_deviations(value: Tensor, buffer: bool) -> None:
    found = asked_about(Keeps(value, buffer))
    assert (found.passed, found.entry) == (buffer, "" if buffer else "F20")
    assert buffer or found.measured == "steps.0 Keeps keeps value outside of the state dict"


class Masks(Coupling):
    """A coupling by a mask, whose network reads the whole masked vector."""

    def __init__(self, mask: Tensor, buffer: bool) -> None:
        super().__init__(2 * DIMS)
        if buffer:
            self.register_buffer("mask", mask)
        else:
            self.mask = mask

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.network(x * self.mask).chunk(2, 1)
        log_scale = log_scale.tanh() * (1 - self.mask)
        return x * log_scale.exp() + shift * (1 - self.mask), log_scale.sum(1)

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        log_scale, shift = self.network(z * self.mask).chunk(2, 1)
        return (z - shift * (1 - self.mask)) * (-log_scale.tanh() * (1 - self.mask)).exp()


DRAWN, EVEN = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1]), torch.tensor([1.0, 0] * 4)


def test_a_mask_that_was_drawn_is_state_and_one_made_by_a_rule_is_not() -> None:
    drawn = asked_about(Masks(DRAWN, buffer=False))
    assert (drawn.passed, drawn.entry) == (False, "F20")
    assert drawn.measured == "steps.0 Masks keeps mask outside of the state dict"
    assert asked_about(Masks(DRAWN, buffer=True)).passed
    assert asked_about(Masks(EVEN, buffer=True)).passed


def test_a_plain_tensor_made_by_a_rule_stays_behind_on_another_device() -> None:
    """PyTorch's fake tensors pretend to the device, so the test needs no GPU."""
    found = asked_about(Masks(EVEN, buffer=False))
    assert (found.passed, found.entry) == (False, "F20")
    assert found.measured == "steps.0 Masks: mask stays on the CPU when the flow moves to a GPU"

    class Moves(Masks):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            self.mask = self.mask.to(x.device)
            return super().forward(x)

    assert asked_about(Moves(EVEN, buffer=False)).passed


@pytest.mark.parametrize(
    ("value", "by_rule"),
    [
        (torch.ones(6), True),
        (torch.arange(6), True),
        (torch.arange(6).flip(0), True),
        (torch.tensor([0.0, 1, 0, 1, 0, 1]), True),
        (torch.tensor([1.0, 1, 1, 0, 0, 0]), True),
        (torch.tensor([3, 4, 5, 0, 1, 2]), True),
        (torch.tensor([0, 2, 4, 1, 3, 5]), True),
        (torch.tensor(2.5), True),
        (torch.tensor(ORDER), False),
        (DRAWN, False),
        (points(4, 4), False),
    ],
)
def test_what_looks_made_by_a_rule(value: Tensor, by_rule: bool) -> None:
    assert state.looks_made_by_rule(value) is by_rule


def test_another_value_of_the_same_kind() -> None:
    assert torch.equal(state.changed(torch.tensor([True, False])), torch.tensor([False, True]))
    assert torch.equal(state.changed(torch.tensor([0, 1, 1])), torch.tensor([1, 0, 0]))
    assert sorted(state.changed(torch.tensor(ORDER)).tolist()) == sorted(ORDER)
    assert not torch.equal(state.changed(torch.tensor(ORDER)), torch.tensor(ORDER))
    x = torch.tensor([0.0, 2.0])
    assert ((state.changed(x) - x).abs() > 0).all()


def test_values_that_change_nothing_are_not_state() -> None:
    layer = Columns(DIMS)
    layer.seen_losses = torch.tensor([0.3, 0.1, 0.7, 0.2])
    layer.notes, layer.sizes = [3.1, 2.7, 9.9], [3, 64, 64]
    assert asked_about(layer).passed


# --- modules outside --------------------------------------------------------------------------------------------------


class Listed(nn.Module):
    """A chain that keeps its first layers in a plain list, tuple or dict."""

    def __init__(self, kind: type, *steps: nn.Module) -> None:
        super().__init__()
        self.kept = dict(zip("abc", steps, strict=False)) if kind is dict else kind(steps)
        self.more = Columns()

    def layers(self) -> list[nn.Module]:
        return [*(self.kept.values() if isinstance(self.kept, dict) else self.kept), self.more]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x))
        for layer in self.layers():
            x, log_det = layer(x)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers()):
            z = layer.inverse(z)
        return z


@pytest.mark.parametrize("kind", [list, tuple, dict, nn.ModuleList])
def test_layers_in_a_plain_list(kind: type) -> None:
    flow = Listed(kind, *[moved(layer) for layer in couplings()]).eval()
    found = only(usage.saved_state, flow, points())
    registered = kind is nn.ModuleList
    assert (found.passed, found.entry) == (registered, "" if registered else "F20")
    if not registered:
        first = "kept.a" if kind is dict else "kept.0"
        assert found.measured == f"{first} Coupling is not in the state dict (1 more)"
        assert "nn.ModuleList" in found.cause
    if kind is dict:
        assert only(bijection.log_det, flow, points()).measured == "agrees with autograd in 3 layers and the whole flow"


def test_a_plain_list_of_layers_without_parameters_needs_no_saving() -> None:
    flow = Listed(list, Shuffle("buffer", [1, 0, 3, 2])).eval()
    assert only(usage.saved_state, flow, points()).passed


# --- the same after loading -------------------------------------------------------------------------------------------


class Remembers(Columns):
    """A layer that computes its scale once for each parameter, or for each version of it."""

    def __init__(self, dims: int, versions: bool) -> None:
        super().__init__(dims)
        self._key, self._versions = None, versions

    def scale(self) -> Tensor:
        key = id(self.log_scale), self.log_scale._version if self._versions else 0
        if key != self._key:
            self._key, self._scale = key, self.log_scale.exp().detach()
        return self._scale

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale() + self.shift, self.scale().log().sum().expand(len(x))

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        return (z - self.shift) / self.scale()


@pytest.mark.parametrize("versions", [False, True])
def test_what_was_computed_before_loading_is_computed_again(versions: bool) -> None:
    """Loading writes into the parameters, which stay the same objects."""
    found = asked_about(Remembers(DIMS, versions))
    assert (found.passed, found.entry) == (versions, "" if versions else "F20")
    if not versions:
        assert found.measured == "a flow that loads this state dict is another one"
        assert "compute it again" in found.cause


def test_a_state_that_cannot_be_loaded_says_so() -> None:
    class Refuses(Columns):
        def _load_from_state_dict(self, *arguments: object) -> None:
            raise KeyError("log_scale")

    found = asked_about(Refuses(DIMS))
    assert (found.passed, found.why) == (None, "could not run")
    assert found.measured.startswith("loading a state dict: KeyError")


# --- flags of the first batch -----------------------------------------------------------------------------------------


class Norm(Columns):
    """A layer that takes its scale and shift from its first batch, and remembers by a flag that it has."""

    def __init__(self, name: str, first: object, then: object, buffer: bool = False) -> None:
        super().__init__()
        self._name, self._first, self._then = name, first, then
        if buffer:
            self.register_buffer(name, first.clone())
        else:
            setattr(self, name, first.clone() if isinstance(first, Tensor) else first)

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        flag = getattr(self, self._name)
        if bool(flag) is bool(self._first) and self.training:
            with torch.no_grad():
                self.log_scale.copy_(-x.std(0).log())
                self.shift.copy_(-(x.mean(0) / x.std(0)))
            if isinstance(flag, Tensor):
                flag.fill_(self._then)
            else:
                setattr(self, self._name, self._then)
        return super().forward(x)


FLAGS = {
    "initialized": (False, True, False),
    "is_set": (False, True, False),
    "fresh": (True, False, False),
    "needs_data": (True, False, False),
    "batches": (0, 1, False),
    "count": (0, 1, False),
    "inited buffer": (torch.tensor(False), True, True),
    "ready buffer": (torch.tensor(0), 1, True),
    "done buffer": (torch.tensor(False), True, True),
    "plain tensor": (torch.tensor(False), True, False),
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_known_by_what_it_does(name: str, used: bool) -> None:
    """Whatever its name and type is, before and after the first batch."""
    first, then, saved = FLAGS[name]
    flow = Steps(Norm(name.split()[0], first, then, saved), Coupling()).train()
    if used:
        flow(points(seed=3))
    with default_dtype(torch.float64), InFloat64():
        case = Case(flow, points(), None, None)
        flags = {(place.module, place.attribute, place.saved): value for place, value in case.flags.items()}
    assert flags == {("steps.0", name.split()[0], saved): bool(first)}
    if not used:
        found = only(usage.saved_state, flow, points())
        assert (found.passed, found.entry) == (saved, "" if saved else "F20")
        assert saved or found.measured == "Norm keeps in a plain attribute whether it is initialised"


def test_options_are_no_flags() -> None:
    class Options(Columns):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.init_scale, self.steps = True, 3, 0
            self.register_buffer("reverse", torch.tensor(False))

        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            self.steps += 1  # counts, and no parameter changes with it
            return super().forward(x)

    with default_dtype(torch.float64), InFloat64():
        case = Case(moved(Steps(Options(), *couplings())), points(), None, None)
        assert not case.flags


def test_looking_for_flags_leaves_the_flow_alone() -> None:
    flow = Steps(Norm("fresh", True, False), *couplings()).eval()
    asked(usage.saved_state, flow, points())
    assert flow.steps[0].fresh is True
    assert not flow.training
    assert not flow.steps[0].log_scale.any()


# --- wrappers ---------------------------------------------------------------------------------------------------------


class Parallel(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(*inputs)


def test_a_wrapper_is_taken_off() -> None:
    flow = sound()
    assert unwrapped(Parallel(flow)) is flow
    assert unwrapped(Parallel(Parallel(flow))) is flow
    compiled = nn.Module()
    compiled._orig_mod = Parallel(flow)  # as torch.compile keeps what it compiles
    assert unwrapped(compiled) is flow
    found = only(bijection.log_det, Parallel(flow), points())
    assert found.measured == "agrees with autograd in 3 layers and the whole flow"


def test_a_flow_that_calls_its_body_module_is_no_wrapper() -> None:
    class Model(Parallel):
        def inverse(self, z: Tensor) -> Tensor:
            return self.module.inverse(z)

    flow = Model(sound())
    assert unwrapped(flow) is flow
    assert only(bijection.log_det, flow, points()).measured == "agrees with autograd in 4 layers and the whole flow"
