"""The doctor on what enters the flow: noise, columns, inputs that are overwritten, and causes of NaN."""

from __future__ import annotations

import math

import pytest
import torch
from flows import Columns, Coupling, Matrix, Noise, Steps, Times, asked, couplings, grid, moved, only, points, sound
from torch import Tensor, nn

from nflows_lib.clinic import inputs
from nflows_lib.clinic.registry import TOO_LARGE

# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "cause"), [(1.0, ""), (1 / 4, "almost as discrete"), (1 / 256, "as discrete"), (2.0, "overlap")]
)
def test_noise_fills_one_step(width: float, cause: str) -> None:
    found = only(inputs.noise, moved(Steps(Noise(width=width), Times(1 / 4), *couplings())), grid())
    assert (found.passed, found.entry) == (not cause, "F6" if cause else "")
    assert cause in found.cause
    if cause:
        assert found.measured == f"the noise is {width:.3g} steps wide, a step being 1"
    else:
        assert found.measured == "steps.0 Noise draws noise for every value"


@pytest.mark.parametrize(("width", "passes"), [(1 / 3, True), (1.0, False), (1 / 256, False)])
def test_noise_fills_the_step_of_data_in_the_unit_interval(width: float, passes: bool) -> None:
    class Bare(Noise):
        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            return (3 * z).floor() / 3

    found = only(inputs.noise, moved(Steps(Bare(width=width), *couplings())), grid() / 3)
    assert (found.passed, found.entry) == (passes, "" if passes else "F6")
    if not passes:
        assert f"is {3 * width:.3g} steps wide" in found.measured


def test_noise_that_is_added_twice_is_too_wide() -> None:
    found = only(inputs.noise, moved(Steps(Noise(), Noise(), Times(1 / 4), *couplings())), grid())
    assert (found.passed, found.entry) == (False, "F6")
    assert "2 steps wide" in found.measured
    assert "added twice" in found.cause


@pytest.mark.parametrize("before", [True, False])
def test_noise_comes_before_what_bends_the_levels(before: bool) -> None:
    class Bends(nn.Module):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            return (x + 1).log(), -(x + 1).log().sum(1)

        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            return z.exp() - 1

    order = [Noise(), Bends()] if before else [Bends(), Noise()]
    found = only(inputs.noise, moved(Steps(*order, *couplings())), grid())
    assert (found.passed, found.entry) == (before, "" if before else "F6")
    if not before:
        assert found.measured == "the noise does not take one level to the next"
        assert "put the noise first" in found.cause


def test_a_scaling_before_the_noise_shows_in_its_width() -> None:
    found = only(inputs.noise, moved(Steps(Times(1 / 4), Noise(), *couplings())), grid())
    assert (found.passed, found.entry) == (False, "F6")
    assert "4 steps wide" in found.measured
    assert only(inputs.noise, moved(Steps(Times(1 / 4), Noise(width=1 / 4), *couplings())), grid()).passed


def test_normal_noise_is_named() -> None:
    class Normal(Noise):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            return x + 0.3 * torch.randn(x.shape), torch.zeros(len(x))

    found = only(inputs.noise, moved(Steps(Normal(), *couplings())), grid())
    assert (found.passed, found.entry) == (False, "F6")
    assert found.measured == "the noise on the levels is normal, not uniform"


@pytest.mark.parametrize("shape", ["batch", "each"])
def test_noise_of_the_model_itself_is_asked_for_too(shape: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Steps(*couplings())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(x + torch.rand(x.shape if shape == "each" else x.shape[1:]))

        def inverse(self, z: Tensor) -> Tensor:
            return self.body.inverse(z).floor()

    found = only(inputs.noise, moved(Model()), grid())
    assert (found.passed, found.entry) == (shape == "each", "" if shape == "each" else "F8")
    assert found.measured.startswith("forward draws noise" if shape == "each" else "forward gives eight copies")


def test_levels_without_noise_and_real_numbers() -> None:
    found = only(inputs.noise, sound(), grid())
    assert (found.passed, found.entry) == (False, "F6")
    assert found.measured == "the data lie on a grid of step 1, and the flow adds no noise"
    assert only(inputs.noise, sound(), points()).measured == "the data are real numbers"


def test_values_that_many_examples_share() -> None:
    """Real numbers that are clamped at 0 are discrete in part."""
    x = points(64)
    found = only(inputs.noise, sound(), x.clamp(min=0))
    assert (found.passed, found.entry) == (False, "F7")
    assert "are exactly 0" in found.measured
    assert only(inputs.noise, sound(), x).passed


# --- columns ----------------------------------------------------------------------------------------------------------


def test_columns_that_tell_nothing_new() -> None:
    x = points(64)
    assert only(inputs.columns, sound(), x).passed
    for change, measured, cause in (
        (x[:, [0, 1, 2, 0]], "column 3 is a linear function of column 0", "drop the column"),
        (torch.cat([x[:, :3], 2 - 3 * x[:, 1:2]], 1), "column 3 is a linear function of column 1", "drop the column"),
        (torch.cat([x[:, :3], x[:, 1:2] + x[:, 2:3]], 1), "columns 1, 2, 3 are linearly dependent", "fewer dimensions"),
        (torch.cat([x[:, :3], torch.full((64, 1), 0.5)], 1), "column 3 is constant", "has no maximum"),
    ):
        found = only(inputs.columns, sound(), change.double())
        assert (found.passed, found.entry, found.measured) == (False, "F28", measured)
        assert cause in found.cause


def test_columns_that_are_alike_are_left_alone() -> None:
    x = points(64)
    close = torch.cat([x[:, :3], x[:, :1] + 1e-3 * x[:, 3:]], 1)
    assert only(inputs.columns, sound(), close).passed


def test_columns_are_compared_over_all_examples() -> None:
    """The other tests look at the first 64 examples, in which two columns may happen to agree."""
    x = points(96)
    x[:64, 3] = x[:64, 0]
    assert only(inputs.columns, sound(), x).passed


def test_columns_of_discrete_data_are_not_compared() -> None:
    x = grid()
    assert only(inputs.columns, sound(), x[:, [0, 1, 2, 0]]).passed is None
    assert only(inputs.columns, moved(Steps(Noise(), *couplings())), x).passed is None
    found = only(inputs.columns, moved(Steps(Columns(1100)), by=0.0), points(8, 1100))
    assert (found.passed, found.why) == (None, TOO_LARGE)


# --- causes of NaN ----------------------------------------------------------------------------------------------------


class Logdet(Matrix):
    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T, torch.logdet(self.weight).expand(len(x))


class LogScale(nn.Module):
    """A scale of each column that may become negative, and its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale, self.scale.log().sum().expand(len(x))

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        return z / self.scale


@pytest.mark.parametrize(
    ("layer", "parameter", "cause"),
    [(Logdet(), "weight", "use slogdet"), (LogScale(), "scale", "take that of its absolute value")],
)
def test_the_logarithm_of_a_negative_number(layer: nn.Module, parameter: str, cause: str) -> None:
    flow = Steps(Coupling(), layer).eval()
    assert only(inputs.finite, flow, points()).passed
    with torch.no_grad():
        getattr(layer, parameter)[0] *= -1
    found = only(inputs.finite, flow, points())
    assert (found.passed, found.entry) == (False, "P15")
    assert found.measured == f"steps.1 {type(layer).__name__} turns the data into NaN or infinity"
    assert found.cause.endswith(cause)


@pytest.mark.parametrize("zeros", [True, False])
def test_a_normalised_weight_of_zeros(zeros: bool) -> None:
    layer = Coupling()
    last = layer.network[-1]
    if not zeros:
        nn.init.normal_(last.weight, std=0.1)
    layer.network[-1] = nn.utils.parametrizations.weight_norm(last)
    found = only(inputs.finite, Steps(layer, Coupling(flip=True)).eval(), points())
    assert (found.passed, found.entry) == (not zeros, "P22" if zeros else "")
    assert (
        not zeros
        or found.cause == "weight normalisation divides a weight of zeros by its norm: start it at small numbers"
    )


class Exponential:
    """A base density on the positive numbers."""

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.where(z < 0, -math.inf, -z).sum(1)


def test_latents_outside_of_the_support_of_the_base() -> None:
    found = only(inputs.finite, sound(), points(), base=Exponential())
    assert (found.passed, found.entry) == (False, "P23")
    assert found.measured.endswith("latents, which are finite")
    assert found.cause == "the latents leave the support of the base density"

    class Positive(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.exp(), x.sum(1)

        def inverse(self, z: Tensor) -> Tensor:
            return z.log()

    assert only(inputs.finite, Positive(), points(), base=Exponential()).passed


def test_a_model_that_is_not_finite_outside_of_its_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Steps(*couplings())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = self.body(x.log())
            return z, log_det - x.log().sum(1)

        def inverse(self, z: Tensor) -> Tensor:
            return self.body.inverse(z).exp()

    assert only(inputs.finite, moved(Model()), points().abs()).passed
    found = asked(inputs.finite, moved(Model()), -points().abs())[0]
    assert (found.passed, bool(found.cause)) == (False, True)


def test_a_constant_column_has_no_scale() -> None:
    class Standardises(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x / x.std(0))

    x = points()
    assert only(inputs.finite, Standardises().eval(), x).passed
    x[:, 2] = 0.5
    found = only(inputs.finite, Standardises().eval(), x)
    assert (found.passed, found.entry) == (False, "F20")
    assert "a channel is constant" in found.cause


# --- in place ---------------------------------------------------------------------------------------------------------


class Overwrites(Columns):
    overwrites = True

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x)
        if self.overwrites:
            x.copy_(z)
        return z, log_det


def test_a_layer_that_changes_its_input() -> None:
    flow = moved(Steps(*couplings(), Overwrites()))
    found = only(inputs.in_place, flow, points())
    assert (found.passed, found.entry) == (False, "P2")
    assert found.measured == "steps.2 Overwrites changes its input in place"
    flow.steps[2].overwrites = False
    assert only(inputs.in_place, flow, points()).passed


def test_a_model_that_changes_the_data_outside_of_its_layers() -> None:
    class Model(Steps):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            x -= 1
            return super().forward(x)

    x = points()
    before = x.clone()
    found = only(inputs.in_place, moved(Model(*couplings())), x)
    assert (found.passed, found.entry) == (False, "P2")
    assert found.measured == "Model changes its input in place"
    assert torch.equal(x, before)
