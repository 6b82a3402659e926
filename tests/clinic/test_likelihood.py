"""The doctor on what a flow says of itself: log_prob, bits_per_dim, samples, and its prior."""

from __future__ import annotations

import math

import pytest
import torch
from flows import Columns, Noise, Steps, Times, couplings, grid, moved, only, points, sound
from torch import Tensor, nn

from nflows_lib.clinic import inputs, likelihood, trained
from nflows_lib.distributions import StandardLogistic, StandardNormal

# --- log_prob ---------------------------------------------------------------------------------------------------------


class Density(Steps):
    """A flow with a log_prob of its own, in which the log-det has this sign."""

    sign, base = 1, StandardNormal()

    def log_prob(self, x: Tensor) -> Tensor:
        z, log_det = self(x)
        return self.base.log_prob(z) + self.sign * log_det


def density(sign: int = 1) -> Density:
    flow = moved(Density(*couplings(), Columns()))
    flow.sign = sign
    return flow


@pytest.mark.parametrize(
    ("sign", "measured", "cause"),
    [
        (1, "log_prob is the base's log-density plus the log-det", ""),
        (0, "log_prob is the base's log-density alone", "the log-det is left out: add it"),
        (-1, "log_prob subtracts the log-det", "its sign is wrong: add it"),
    ],
)
def test_log_prob_adds_the_log_det(sign: int, measured: str, cause: str) -> None:
    found = only(likelihood.own_log_prob, density(sign), points())
    assert (found.passed, found.entry) == (sign == 1, "" if sign == 1 else "F27")
    assert (found.measured, found.cause) == (measured, cause)


def test_a_log_prob_of_another_base_is_not_judged() -> None:
    flow = density()
    flow.base = StandardLogistic()
    assert only(likelihood.own_log_prob, flow, points()).passed  # the doctor finds a base of that name
    del flow.base

    class Own(Density):
        def log_prob(self, x: Tensor) -> Tensor:
            z, log_det = self(x)
            return StandardLogistic().log_prob(z) + log_det

    flow = moved(Own(*couplings(), Columns()))
    found = only(likelihood.own_log_prob, flow, points())
    assert (found.passed, "pass it as base=" in found.measured) == (None, True)
    assert only(likelihood.own_log_prob, flow, points(), base=StandardLogistic()).passed


def test_a_log_prob_that_is_a_mean_is_not_compared() -> None:
    class Mean(Density):
        def log_prob(self, x: Tensor) -> Tensor:
            return super().log_prob(x).mean()

    assert only(likelihood.own_log_prob, moved(Mean(*couplings())), points()).passed is None
    assert only(likelihood.own_log_prob, sound(), points()).measured == "the flow has no method log_prob"


# --- the flow's own samples -------------------------------------------------------------------------------------------


class Samples(Density):
    """A flow with a method sample, which may be wrong in one of several ways."""

    how = "right"

    def sample(self, n: int) -> Tensor:
        z = self.base.sample(torch.empty(n, 4))
        if self.how == "wide":
            z = 2 * z
        if self.how == "cool":
            z = 0.7 * z
        if self.how == "shifted":
            z = z + 1
        if self.how == "logistic":
            z = StandardLogistic().sample(torch.empty(n, 4))
        if self.how == "forgets":
            for step in reversed(self.steps[:-1]):
                z = step.inverse(z)
            return z
        return self.inverse(z)


@pytest.mark.parametrize("how", ["right", "wide", "shifted", "logistic", "forgets"])
def test_samples_sent_forward_are_draws_from_the_base(how: str) -> None:
    flow = moved(Samples(*couplings(), Columns()), by=0.5)
    flow.how = how
    found = only(likelihood.own_samples, flow, points())
    assert (found.passed, found.entry) == (how == "right", "" if how == "right" else "P1")
    assert found.measured.startswith("sent forward, they have standard deviation ")
    if how != "right":
        assert "sample does not invert this forward, or draws from another base" in found.cause


class Tempered(Samples):
    def sample(self, n: int, temperature: float = 1.0) -> Tensor:
        return super().sample(n)


@pytest.mark.parametrize("kind", [Tempered, Samples])
def test_a_temperature_below_1_is_no_fault(kind: type[Samples]) -> None:
    """Without an argument of that name, nobody says that the narrow samples are meant."""
    flow = moved(kind(*couplings(), Columns()))
    flow.how = "cool"
    found = only(likelihood.own_samples, flow, points())
    assert (found.passed, found.entry) == ((None, "") if kind is Tempered else (False, "P1"))
    assert (": a temperature of 0.7" in found.measured) is (kind is Tempered)


def test_a_temperature_does_not_excuse_a_shift() -> None:
    flow = moved(Tempered(*couplings(), Columns()), by=0.5)
    flow.how = "shifted"
    assert only(likelihood.own_samples, flow, points()).entry == "P1"


def test_samples_that_are_not_finite() -> None:
    class Logarithms(Samples):
        def sample(self, n: int) -> Tensor:
            return super().sample(n).log()

    found = only(likelihood.own_samples, moved(Logarithms(*couplings(), Columns())), points())
    assert (found.passed, found.entry) == (False, "P1")
    assert "are not finite" in found.measured


def test_of_whom_no_samples_are_asked() -> None:
    assert only(likelihood.own_samples, sound(), points()).measured == "the flow has no method sample"
    noisy = moved(Samples(Noise(), Times(1 / 4), *couplings()))
    assert only(likelihood.own_samples, noisy, grid()).measured == "the flow is conditional, or the data get noise"

    class Unknown(Samples):
        def log_prob(self, x: Tensor) -> Tensor:
            return super().log_prob(x) - 1

    found = only(likelihood.own_samples, moved(Unknown(*couplings(), Columns())), points())
    assert (found.passed, found.measured) == (None, "the doctor does not know the base density of the samples")


# --- the prior --------------------------------------------------------------------------------------------------------


class Prior(nn.Module):
    """A normal prior with a learned mean and scale, which may lack the log of its scale, or a constant."""

    def __init__(self, dims: int = 4, normalised: bool = True, constant: float = 0.0) -> None:
        super().__init__()
        self.mean, self.log_scale = nn.Parameter(torch.full((dims,), 0.3)), nn.Parameter(torch.full((dims,), 0.2))
        self.normalised, self.constant = normalised, constant

    def log_prob(self, z: Tensor) -> Tensor:
        log_p = -((z - self.mean) / self.log_scale.exp()).square() / 2 - math.log(2 * math.pi) / 2 + self.constant
        return (log_p - self.log_scale * self.normalised).sum(1)

    def sample(self, like: Tensor) -> Tensor:
        return self.mean + self.log_scale.exp() * torch.randn_like(like)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_prior_stays_normalised(normalised: bool) -> None:
    found = only(likelihood.prior, sound(), points(), base=Prior(normalised=normalised))
    assert (found.passed, found.entry) == (normalised, "" if normalised else "P23")
    if not normalised:
        assert found.measured.startswith("a parameter of the prior raises log p everywhere, by ")
        assert "minus the log of the scale" in found.cause


@pytest.mark.parametrize("constant", [0.0, math.log(2)])
def test_a_prior_of_one_dimension_is_integrated(constant: float) -> None:
    found = only(likelihood.prior, moved(Columns(1)), points(dims=1), base=Prior(1, constant=constant))
    assert (found.passed, found.entry) == (not constant, "P23" if constant else "")
    assert not constant or found.measured == "in one dimension the base density integrates to 2"


def test_a_prior_without_parameters_is_integrated_too() -> None:
    class Unnormalised:
        def log_prob(self, z: Tensor) -> Tensor:
            return (-z.square() / 2).sum(1)

    found = only(likelihood.prior, sound(), points(), base=Unnormalised())
    assert (found.passed, found.entry) == (False, "P23")
    assert found.measured == "in one dimension the base density integrates to 2.51"
    assert only(likelihood.prior, sound(), points(), base=StandardLogistic()).passed is None
    assert only(likelihood.prior, sound(), points()).measured == "the prior has no parameters"


@pytest.mark.parametrize("numbers", [(0.0, 1.0), (torch.zeros(4), torch.ones(4))])
def test_a_distribution_of_torch_is_a_base(numbers: tuple) -> None:
    class Summed(Steps):
        base = torch.distributions.Normal(*numbers)

        def log_prob(self, x: Tensor) -> Tensor:
            z, log_det = self(x)
            return self.base.log_prob(z).sum(1) + log_det

    assert only(likelihood.own_log_prob, moved(Summed(*couplings())), points()).passed


# --- discrete data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("off", "entry"), [(0.0, ""), (math.log(4), "F10"), (0.3, "F10")])
def test_bits_per_dim_are_those_of_log_p(off: float, entry: str) -> None:
    class Scored(Steps):
        def bits_per_dim(self, x: Tensor) -> Tensor:
            z, log_det = self(x)
            return (-(StandardNormal().log_prob(z) + log_det) / 4 + off) / math.log(2)

    found = only(likelihood.bits_per_dim, moved(Scored(Noise(), Times(1 / 4), *couplings())), grid())
    assert (found.passed, found.entry) == (not entry, entry)
    if off == math.log(4):
        assert found.cause == "D log 4 is left out, or counted twice"


def test_the_bound_on_discrete_data() -> None:
    bound = only(likelihood.bound, moved(Steps(Noise(), Times(1 / 4), *couplings())), grid())
    assert bound.passed
    assert bound.measured.endswith("the limit 0")
    assert only(likelihood.bound, sound(), points()).passed is None
    narrow = Steps(Columns()).eval()
    nn.init.constant_(narrow.steps[0].log_scale, 4.0)
    x = torch.zeros(16, 4)
    x[3, 0] = 0.1
    found = only(likelihood.bound, narrow, x)
    assert (found.passed, found.entry) == (False, "F6")
    assert found.measured.endswith("the limit 9.21")  # 4 log 10


def test_a_context_that_reaches_no_layer() -> None:
    class Deaf(Steps):
        def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x)

        def inverse(self, z: Tensor, context: Tensor) -> Tensor:
            return super().inverse(z)

    context = points(dims=2, seed=1)
    found = only(trained.context, moved(Deaf(*couplings())), points(), context)
    assert (found.passed, found.entry) == (False, "F25")
    assert found.measured == "log p(x) does not depend on it"
    new = only(trained.context, Steps(*couplings(context=2)).eval(), points(), context)
    assert (new.passed, new.measured.startswith("not used yet")) == (None, True)
    same = only(trained.context, moved(Steps(*couplings(context=2))), points(), context[:1].expand(16, 2))
    assert (same.passed, same.measured) == (None, "all examples have the same context")
    assert inputs.finite.name == "finite"
