"""What the doctor controls while a flow runs: types, random draws, rounding, and the seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from nflows_lib.clinic.control import HeldNoise, InFloat64, Unrounded, default_dtype, seeded

F32, F64 = torch.float32, torch.float64

ASKS_FOR_FLOAT32: dict[str, Callable[[Tensor], Tensor]] = {
    "float()": lambda x: x.float(),
    "to(dtype)": lambda x: x.to(F32),
    "to(dtype=)": lambda x: x.to(dtype=F32),
    "type(dtype)": lambda x: x.type(F32),
    "zeros": lambda x: torch.zeros(2, dtype=F32),
    "zeros_like": lambda x: torch.zeros_like(x, dtype=F32),
    "arange": lambda x: torch.arange(3, dtype=F32),
    "new_zeros": lambda x: x.new_zeros(2, dtype=F32),
    "sum": lambda x: x.sum(0, dtype=F32),
}


@pytest.mark.parametrize("name", ASKS_FOR_FLOAT32)
def test_who_asks_for_float32_gets_float64(name: str) -> None:
    x = torch.ones(3, 2, dtype=F64)
    with default_dtype(F64), InFloat64():
        assert ASKS_FOR_FLOAT32[name](x).dtype == F64
    with InFloat64():  # the test of precision sets the default type back, and wants float32
        assert ASKS_FOR_FLOAT32[name](x).dtype == F32
    assert ASKS_FOR_FLOAT32[name](x).dtype == F32


def test_other_types_stay_what_they_are() -> None:
    with default_dtype(F64), InFloat64():
        assert torch.ones(2).long().dtype == torch.int64
        assert torch.ones(2).half().dtype == torch.float16
        assert torch.ones(2, dtype=torch.bool).to(torch.uint8).dtype == torch.uint8
        assert torch.arange(3).float().dtype == F64


DRAWS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(3, 2),
    "rand_like": lambda: torch.rand_like(torch.zeros(3, 2)),
    "uniform_": lambda: torch.zeros(3, 2).uniform_(),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("level", [0.0, 0.25])
def test_uniform_draws_are_held_and_noted(name: str, level: float) -> None:
    with HeldNoise(level) as draws:
        drawn = DRAWS[name]()
    assert torch.equal(drawn, torch.full((3, 2), level))
    assert (draws.uniform, draws.normal) == ([(3, 2)], [])


def test_draws_from_another_interval_are_held_within_it() -> None:
    with HeldNoise(0.25):
        x = torch.zeros(4)
        assert torch.equal(x.uniform_(-1, 1), torch.full((4,), -0.5))
        assert torch.equal(x.uniform_(2, to=6), torch.full((4,), 3.0))
        assert torch.equal(x.uniform_(**{"from": -4, "to": 0}), torch.full((4,), -3.0))


def test_without_a_level_draws_are_noted_and_left_alone() -> None:
    with seeded(0):
        expected = torch.rand(2), torch.randn(3), torch.normal(0.0, 1.0, (4,)), torch.zeros(5).normal_()
    with seeded(0), HeldNoise() as draws:
        drawn = torch.rand(2), torch.randn(3), torch.normal(0.0, 1.0, (4,)), torch.zeros(5).normal_()
    assert all(map(torch.equal, drawn, expected))
    assert draws.uniform == [(2,)]
    assert draws.normal == [(3,), (4,), (5,)]


def test_normal_draws_are_not_held() -> None:
    with seeded(0), HeldNoise(0.5):
        assert torch.randn(8).std() > 0.1


ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "floor": torch.floor,
    "x.floor": lambda x: x.floor(),
    "x.floor_": lambda x: x.clone().floor_(),
    "round": torch.round,
    "ceil": lambda x: x.ceil(),
    "trunc": torch.trunc,
    "long": lambda x: x.long(),
    "int": lambda x: x.int(),
    "byte": lambda x: x.byte(),
    "to int": lambda x: x.to(torch.int64),
    "to uint8": lambda x: x.to(dtype=torch.uint8),
    "type": lambda x: x.type(torch.int32),
    "// 1": lambda x: x // 1,
    "floor_divide": lambda x: torch.floor_divide(x, 1),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_what_a_flow_rounds_stays_as_it_is(name: str) -> None:
    x = torch.tensor([0.3, 1.7, 2.5])
    assert not torch.equal(ROUNDED[name](x).float(), x)
    with Unrounded():
        assert torch.equal(ROUNDED[name](x), x)


def test_integers_and_changes_between_float_types_go_through() -> None:
    k = torch.tensor([5, 7])
    with Unrounded():
        assert torch.equal(k // 2, torch.tensor([2, 3]))
        assert k.to(torch.uint8).dtype == torch.uint8
        assert torch.ones(2).to(F64).dtype == F64


def test_a_seed_holds_within_and_is_put_back_after() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), float(np.random.rand())  # noqa: NPY002

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    with seeded(3):
        first = draw()
    with seeded(3):
        second = draw()
    with seeded(4):
        third = draw()
    assert first == second
    assert not any(a == b for a, b in zip(first, third, strict=True))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2][1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_a_seed_is_put_back_after_an_error() -> None:
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(ZeroDivisionError), seeded(3):
        random.random()
        _ = 1 / 0
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_the_default_type_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), default_dtype(F64):
        _ = 1 / 0
    assert torch.get_default_dtype() == F32
