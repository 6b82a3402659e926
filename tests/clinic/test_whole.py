"""The doctor on the whole flow: its log-det and its inverse, also where every layer is right."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from flows import Columns, Coupling, Matrix, Noise, Steps, Times, asked, couplings, grid, moved, only, points, sound
from torch import Tensor, nn

from nflows_lib.clinic import bijection
from nflows_lib.clinic.control import InFloat64, default_dtype
from nflows_lib.clinic.examination import Case
from nflows_lib.clinic.registry import COULD_NOT_RUN, TOO_LARGE

# --- the log-det of the whole -----------------------------------------------------------------------------------------


class Model(nn.Module):
    """A flow that scales the data in its own forward, and counts ``counted`` nats for each number."""

    def __init__(self, factor: float, counted: float, body: nn.Module | None = None, noisy: bool = False) -> None:
        super().__init__()
        self.factor, self.counted, self.noisy = factor, counted, noisy
        self.body = body or Steps(Coupling(), Columns())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = x + torch.rand(x.shape) if self.noisy else x
        z, log_det = self.body(u * self.factor)
        return z, log_det + self.counted * x[0].numel()

    def inverse(self, z: Tensor) -> Tensor:
        u = self.body.inverse(z) / self.factor
        return u.floor().clamp(0, 3) if self.noisy else u


@pytest.mark.parametrize("times", [0, 1, 2, -1])
def test_a_scaling_outside_of_the_layers_is_counted_once(times: int) -> None:
    found = only(bijection.log_det, moved(Model(3.0, times * math.log(3))), points())
    assert found.passed is (times == 1)
    if times == 1:
        assert found.measured == "agrees with autograd in 3 layers and the whole flow"
    else:
        assert found.entry == "P15"
        assert found.measured.startswith("the whole flow says ")
        assert "outside of its layers" in found.cause


@pytest.mark.parametrize(
    ("counted", "entry", "cause"),
    [
        (-math.log(4), "", ""),
        (0.0, "F10", "a scaling by 1/4 is not counted"),
        (-2 * math.log(4), "F10", "a scaling by 1/4 is counted twice"),
        (math.log(4), "F10", "a scaling by 1/4 has the wrong sign"),
        (-math.log(4) / 4, "F10", "log 4 is counted once per example"),
        (-math.log(3), "F9", "one of 4 and 3 scales the data"),
        (-0.7, "P15", "outside of its layers"),
    ],
)
def test_a_scaling_of_levels_in_the_model_itself(counted: float, entry: str, cause: str) -> None:
    found = only(bijection.log_det, moved(Model(1 / 4, counted, noisy=True)), grid())
    assert (found.passed, found.entry) == (not entry, entry)
    assert cause in found.cause


@pytest.mark.parametrize("counted", [None, 0.0])
def test_a_scaling_of_levels_in_a_layer(counted: float | None) -> None:
    found = only(bijection.log_det, moved(Steps(Noise(), Times(1 / 4, counted), *couplings())), grid())
    assert (found.passed, found.entry) == (counted is None, "" if counted is None else "F10")
    expected = "agrees with autograd in 4 layers and the whole flow" if counted is None else "steps.1 Times says 0.0000"
    assert found.measured.startswith(expected)


def test_256_levels_are_known_by_their_name() -> None:
    """Few levels of 256 occur in a small batch, and the scaling by 1/256 is still named."""
    found = only(bijection.log_det, moved(Model(1 / 256, 0.0, noisy=True)), grid())
    assert found.cause == "the log-det of a scaling by 1/256 is not counted"


class Forgets(Steps):
    """A chain that adds the log-det of each step ``times`` times."""

    times = (1, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(x))
        for step, n in zip(self.steps, self.times, strict=True):
            x, log_det = step(x)
            total = total + n * log_det
        return x, total


@pytest.mark.parametrize("times", [(1, 1, 1), (1, 0, 1), (1, 1, 2)])
def test_a_layer_that_the_whole_does_not_count_or_counts_twice(times: tuple[int, ...]) -> None:
    flow = moved(Forgets(*couplings(), Columns()))
    flow.times = times
    found = only(bijection.log_det, flow, points())
    added = only(bijection.sum_of_log_dets, flow, points(), after=[bijection.log_det])
    if times == (1, 1, 1):
        assert (found.passed, added.passed) == (True, True)
        return
    assert (found.passed, found.entry) == (False, "P15")
    assert "the layers are right" in found.cause
    assert (added.passed, added.entry) == (False, "P15")
    assert added.measured.startswith("differs from the flow's log-det by ")


def test_a_new_flow_is_woken_to_see_what_the_whole_leaves_out() -> None:
    """All log-dets of a new flow are 0, and the faulty sum is right until the parameters move."""
    flow = Forgets(*couplings(), Columns()).eval()
    flow.times = (1, 0, 1)
    found = only(bijection.log_det, flow, points())
    assert (found.passed, found.entry) == (False, "P15")
    assert found.measured.startswith("with moved parameters, the whole flow says ")
    flow.times = (1, 1, 1)
    assert only(bijection.log_det, flow, points()).passed


def test_what_forward_does_outside_of_its_layers_is_no_fault_of_the_sum() -> None:
    found = only(bijection.sum_of_log_dets, moved(Model(3.0, math.log(3))), points(), after=[bijection.log_det])
    assert found.passed
    assert found.measured == f"{4 * math.log(3):.4g} nats come from what forward does outside of its layers"
    unasked = only(bijection.sum_of_log_dets, moved(Model(3.0, math.log(3))), points())
    assert (unasked.passed, unasked.why) == (None, COULD_NOT_RUN)


class Twin(nn.Module):
    """A flow of two numbers that may return the first of them twice."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice, self.body = twice, Columns(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.body(x)
        a, b = z.chunk(2, 1)
        return torch.cat([a, a if self.twice else b], 1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        return self.body.inverse(z)


def test_a_flow_that_returns_one_number_twice_has_no_inverse() -> None:
    found = only(bijection.log_det, moved(Twin(True)), points(dims=2))
    assert (found.passed, found.entry) == (False, "P1")
    assert "singular" in found.measured
    assert "the flow has no inverse" in found.cause
    assert only(bijection.log_det, moved(Twin(False)), points(dims=2)).passed


class Alone(nn.Module):
    """A flow on levels without any layer."""

    def __init__(self, right: bool) -> None:
        super().__init__()
        self.right, self.log_scale = right, nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = self.log_scale.sum() if self.right else self.log_scale.square().sum()
        return (x + torch.rand(x.shape)) * self.log_scale.exp(), log_det.expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return (z / self.log_scale.exp()).floor()


@pytest.mark.parametrize("right", [True, False])
def test_a_flow_without_layers_that_draws_noise(right: bool) -> None:
    found = only(bijection.log_det, moved(Alone(right)), grid())
    assert (found.passed, found.entry) == (right, "" if right else "P15")
    assert right or found.cause == "the formula of the log-det is another map's"


class Cached(Columns):
    """A layer that returns the log-det of an earlier call."""

    cached = True

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        log_det = self.log_scale.sum() + (x.sum(1) if self.cached else 0 * x.sum(1))
        before = getattr(self, "before", None)
        self.before = log_det.detach()
        fits = self.cached and before is not None and len(before) == len(log_det)
        return super().forward(x)[0], before if fits else log_det


def test_a_log_det_of_an_earlier_call() -> None:
    layer = Cached()
    flow = moved(Steps(*couplings(), layer))
    found = only(bijection.log_det, flow, points())
    assert (found.passed, found.entry) == (False, "P15")
    assert found.measured.startswith("steps.2 Cached returns another log-det at a second call")
    assert "an earlier call" in found.cause
    layer.cached = False
    assert only(bijection.log_det, flow, points()).passed


class Averaged(Coupling):
    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x)
        return z, log_det.mean().expand(len(x))


def test_a_log_det_that_is_averaged_over_the_batch() -> None:
    found = only(bijection.log_det, moved(Steps(Averaged(), Coupling(flip=True))), points())
    assert (found.passed, found.entry) == (False, "P15")
    assert found.measured.startswith("steps.0 Averaged: ")
    assert found.cause == "sum over the dimensions of each example, not over the batch"


class Estimated(Columns):
    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x)
        return z, log_det + torch.randn(len(x))


def test_a_log_det_that_is_estimated_at_random_is_not_compared() -> None:
    found = only(bijection.log_det, moved(Steps(*couplings(), Estimated())), points())
    assert found.passed
    assert found.measured == "agrees with autograd in 2 layers"


def test_a_flow_too_steep_for_float64_is_not_blamed() -> None:
    """The determinant of a Jacobian with a condition number of 1e16 cannot be told in float64."""
    steep, flat = Columns(2), Columns(2)
    with torch.no_grad():
        for layer, by in ((steep, 19.0), (flat, 0.5)):
            layer.log_scale.copy_(torch.tensor([by, -by]))
    found = asked(bijection.log_det, moved(Steps(Matrix(2), steep), by=0.0), points(dims=2))
    assert all(finding.passed is not False for finding in found)
    assert "the whole flow" not in found[-1].measured
    found = only(bijection.log_det, moved(Steps(Matrix(2), flat), by=0.0), points(dims=2))
    assert found.measured == "agrees with autograd in 2 layers and the whole flow"


def test_a_layer_that_cannot_be_asked_is_not_counted_as_right() -> None:
    class Numpy(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            x.detach().numpy()  # fails on what torch.func hands to the layer
            if len(x) == 1:
                raise RuntimeError("no batch of one")
            return z, log_det

    found = asked(bijection.log_det, moved(Steps(Coupling(), Numpy())), points())
    unable = [finding for finding in found if finding.why == COULD_NOT_RUN]
    assert any("steps.1 Numpy: RuntimeError: no batch of one" in finding.measured for finding in unable)
    passed = [finding for finding in found if finding.passed]
    assert [finding.measured for finding in passed] == ["agrees with autograd in 1 layer"]


def test_a_flow_that_is_too_large_says_so() -> None:
    found = only(bijection.log_det, moved(Steps(Columns(1100)), by=0.1), points(8, 1100))
    assert (found.passed, found.why) == (None, TOO_LARGE)


class Learned(nn.Module):
    """Noise whose width is learned: its log-det is minus the log-density of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.rand(x.shape)
        power = self.raw.exp()
        return x + v**power, (self.raw + (power - 1) * v.log()).sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        return z.floor().clamp(0, 3)


@pytest.mark.parametrize("counted", [None, 0.0])
def test_after_noise_that_is_learned_the_rest_is_compared(counted: float | None) -> None:
    flow = moved(Steps(Learned(), Times(1 / 4, counted), *couplings()))
    found = only(bijection.log_det, flow, grid())
    assert (found.passed, found.entry) == (counted is None, "" if counted is None else "F10")
    if counted is None:
        assert found.measured == "agrees with autograd in 3 layers and the whole flow"


def test_a_whole_image_is_compared_by_its_corner() -> None:
    class Pixels(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.log_scale.exp(), (self.log_scale.sum() * x[0].numel()).expand(len(x))

        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            return z * (-self.log_scale).exp()

    x = points(8, 40 * 40).view(8, 1, 40, 40)
    for counted in (math.log(3), 0.0):
        found = only(bijection.log_det, moved(Model(3.0, counted, Steps(Pixels(1)))), x)
        assert found.passed is bool(counted)
        assert ("the whole flow" in found.measured) is True


# --- the log-det of an inverse, and log-dets that are handed through --------------------------------------------------


class Both(Coupling):
    """A coupling whose inverse returns a log-det, too: forward's with this sign."""

    sign = -1.0

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed, log_scale, shift = self.parts(z)
        return self.whole(kept, (changed - shift) * (-log_scale).exp()), self.sign * log_scale.sum(1)


class Pairs(Steps):
    sign = 1.0

    def inverse(self, z: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros(len(z))
        for step in reversed(self.steps):
            z, log_det = step.inverse(z)
            total = total + self.sign * log_det
        return z, total


@pytest.mark.parametrize("sign", [-1.0, 1.0, 0.0])
def test_the_log_det_that_an_inverse_returns(sign: float) -> None:
    flow = moved(Pairs(Both(), Both(flip=True)))
    for step in flow.steps:
        step.sign = sign
    found = asked(bijection.log_det, flow, points())
    assert [finding.passed for finding in found] == [sign == -1] * (1 if sign == -1 else 2)
    if sign != -1:
        assert found[0].entry == "P15"
        assert found[0].measured.startswith("steps.0 Both: the inverse's log-det is ")
        expected = "the inverse returns the log-det with the sign of forward" if sign else "the two must cancel"
        assert found[0].cause == expected


def test_the_log_det_that_the_whole_inverse_returns() -> None:
    flow = moved(Pairs(Both(), Both(flip=True)))
    flow.sign = -1.0
    found = only(bijection.log_det, flow, points())
    assert (found.passed, found.entry) == (False, "P15")
    assert "with the sign of forward" in found.cause
    assert found.measured.startswith("Pairs: the inverse's log-det")


class Handed(Coupling):
    """A layer that gets the log-det so far and adds its own, with this sign."""

    sign = 1.0

    def forward(self, x: Tensor, so_far: Tensor) -> tuple[Tensor, Tensor]:
        z, own = super().forward(x)
        return z, so_far + self.sign * own

    def inverse(self, z: Tensor, so_far: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed, log_scale, shift = self.parts(z)
        return self.whole(kept, (changed - shift) * (-log_scale).exp()), so_far - self.sign * log_scale.sum(1)


class Hands(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([Handed(), Handed(flip=True)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.full((len(x),), 3.0) - 3.0
        for step in self.steps:
            x, log_det = step(x, log_det)
        return x, log_det

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = torch.zeros(len(z))
        for step in reversed(self.steps):
            z, log_det = step(z, log_det) if False else step.inverse(z, log_det)
        return z, log_det


@pytest.mark.parametrize("wrong", [False, True])
def test_of_log_dets_that_are_handed_through_each_layer_is_asked_for_its_own(wrong: bool) -> None:
    flow = moved(Hands())
    flow.steps[1].sign = -1.0 if wrong else 1.0
    with default_dtype(torch.float64), InFloat64():
        case = Case(flow, points(), None, None)
    first, second = case.data_pass.records
    assert (first.handed, second.handed) == (0, 0)
    torch.testing.assert_close(first.log_det + second.log_det, case.data_pass.log_det)
    assert (first.log_det - second.log_det).abs().min() > 1e-6
    found = only(bijection.log_det, flow, points())
    assert (found.passed, found.entry) == (not wrong, "P15" if wrong else "")
    if wrong:
        assert found.measured.startswith("steps.1 Handed says ")
    assert only(bijection.round_trip, flow, points()).passed
    assert only(bijection.sum_of_log_dets, flow, points(), after=[bijection.log_det]).passed


# --- the inverse of the whole -----------------------------------------------------------------------------------------


class InOrder(Steps):
    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        for step in self.steps:
            z = step.inverse(z, *context)
        return z


class CallsForward(Steps):
    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        for step in reversed(self.steps):
            z, _ = step(z, *context)
        return z


class LeavesOut(Steps):
    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        for step in reversed(self.steps[:-1]):
            z = step.inverse(z, *context)
        return z


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (Steps, ""),
        (InOrder, "the inverse goes through the layers in forward's order"),
        (CallsForward, "the inverse calls its layers' forward"),
        (LeavesOut, "the inverse leaves out 1 of the layers, the first is steps.2"),
    ],
)
def test_how_a_whole_inverse_goes_through_its_layers(kind: type[Steps], cause: str) -> None:
    found = only(bijection.round_trip, moved(kind(*couplings(), Matrix())), points())
    assert (found.passed, found.entry) == (not cause, "P1" if cause else "")
    assert cause in found.cause
    assert found.measured.startswith("the whole flow's inverse misses" if cause else "every inverse returns its input")


class Standardised(nn.Module):
    """A flow that standardises in its own forward, and may forget to undo that in its inverse."""

    def __init__(self, undone: int) -> None:
        super().__init__()
        self.undone, self.body = undone, Steps(*couplings())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.body((x - 3) / 5)
        return z, log_det - math.log(5) * x.shape[1]

    def inverse(self, z: Tensor) -> Tensor:
        x = self.body.inverse(z)
        for _ in range(self.undone):
            x = x * 5 + 3
        return x


@pytest.mark.parametrize("undone", [1, 0, 2])
def test_a_standardisation_is_undone_once(undone: int) -> None:
    found = only(bijection.round_trip, moved(Standardised(undone)), 3 + 5 * points())
    assert (found.passed, found.entry) == (undone == 1, "" if undone == 1 else "P1")
    assert undone == 1 or found.cause == "a scaling or a shift that forward applies is not undone, or undone twice"


class Conditional(Steps):
    """A flow with a context: ``inverse_gets`` says what the inverse hands to its layers."""

    inverse_gets = "context"

    def inverse(self, z: Tensor, context: Tensor) -> Tensor:
        if self.inverse_gets == "fresh":
            context = context + 0.1 * torch.randn_like(context)
        if self.inverse_gets == "zeros":
            context = torch.zeros_like(context)
        for step in reversed(self.steps):
            z = step.inverse(z) if self.inverse_gets == "nothing" else step.inverse(z, context)
        return z


class Optional(Coupling):
    """A coupling that takes zeros for a context that is left out."""

    def parts(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return super().parts(x, *(context or (torch.zeros(len(x), 2, dtype=x.dtype),)))


@pytest.mark.parametrize(
    ("gets", "cause"),
    [
        ("context", ""),
        ("fresh", "the condition gets fresh noise in each direction"),
        ("zeros", "the condition is used in one direction only"),
        ("nothing", "the condition reaches the layers in forward, and not in the inverse"),
    ],
)
def test_the_condition_reaches_the_layers_in_both_directions(gets: str, cause: str) -> None:
    flow = moved(Conditional(Optional(context=2), Optional(flip=True, context=2)))
    flow.inverse_gets = gets
    found = only(bijection.round_trip, flow, points(), points(dims=2, seed=1))
    assert (found.passed, found.entry) == (not cause, "P1" if cause else "")
    assert cause in found.cause


def test_an_inverse_without_the_condition() -> None:
    class Alone(Steps):
        def inverse(self, z: Tensor) -> Tensor:
            return super().inverse(z, z[:, :2])

    found = only(bijection.round_trip, moved(Alone(*couplings(context=2))), points(), points(dims=2, seed=1))
    assert (found.passed, found.entry) == (False, "P1")
    assert found.measured.startswith("the whole flow's inverse raises TypeError")
    assert found.cause == "the inverse does not take the condition that forward takes"


def test_a_layer_whose_inverse_raises_is_named() -> None:
    class Raises(Columns):
        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            return z * self.alpha

    found = asked(bijection.round_trip, moved(Steps(Coupling(), Raises(), Coupling(flip=True))), points())
    unable = [finding for finding in found if finding.why == COULD_NOT_RUN]
    assert len(unable) == 1
    assert unable[0].measured.startswith("steps.1 Raises, its inverse: AttributeError")
    failed = [finding for finding in found if finding.passed is False]
    assert [finding.entry for finding in failed] == ["P1"]
    assert failed[0].cause == "it stops in the inverse of steps.1"
    assert not any(finding.passed for finding in found)


@pytest.mark.parametrize(("levels", "passes"), [(4, True), (5, False)])
def test_a_round_trip_with_noise_in_the_model_itself(levels: int, passes: bool) -> None:
    """The noise is held, so a scaling that the inverse undoes by another number of levels is seen."""

    class Noisy(Model):
        def inverse(self, z: Tensor) -> Tensor:
            return (self.body.inverse(z) * levels).floor().clamp(0, 3)

    found = only(bijection.round_trip, moved(Noisy(1 / 4, -math.log(4), noisy=True)), grid())
    assert (found.passed, found.entry) == (passes, "" if passes else "P1")


@pytest.mark.parametrize("kind", [torch.floor, torch.trunc, lambda x: x.long(), lambda x: x.to(torch.int64)])
def test_an_inverse_may_round_to_levels_in_any_way(kind: Callable[[Tensor], Tensor]) -> None:
    class Rounds(Noise):
        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            return kind(z).clamp(0, 3)

    assert only(bijection.round_trip, moved(Steps(Rounds(), *couplings())), grid()).passed


def test_an_inverse_that_goes_to_the_next_level_is_no_inverse() -> None:
    class Beyond(Noise):
        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            return z + 2

    found = asked(bijection.round_trip, moved(Steps(Beyond(), *couplings())), grid())
    assert found[0].passed is False


def test_an_inverse_that_rounding_alone_spoils_is_left_to_the_test_of_precision() -> None:
    """A factor of 1e-14 before a shift of 1 loses the digits in forward, and no inverse brings them back."""

    class Loses(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            return z * 1e-14 + 1, log_det + math.log(1e-14) * x.shape[1]

        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            return super().inverse((z - 1) * 1e14) + self.off

    flow = moved(Steps(Loses()))
    flow.steps[0].off = 0.0
    found = only(bijection.round_trip, flow, points())
    assert found.passed is not False
    flow.steps[0].off = 1e4
    assert only(bijection.round_trip, flow, points()).entry == "P1"


def test_latents_that_the_inverse_redraws() -> None:
    class Redraws(Steps):
        redraws = True

        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            if self.redraws:
                z = torch.cat([z[:, :2], torch.randn_like(z[:, 2:])], 1)
            return super().inverse(z)

    flow = moved(Redraws(*couplings()))
    found = only(bijection.round_trip, flow, points())
    assert (found.passed, found.entry) == (False, "F18")
    assert "the inverse redraws them" in found.cause
    flow.redraws = False
    assert only(bijection.round_trip, flow, points()).passed


@pytest.mark.parametrize("numbers", [2, 4, 6])
def test_as_many_numbers_come_out_as_go_in(numbers: int) -> None:
    class Resized(Steps):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            return torch.cat([z, torch.zeros(len(z), 4)], 1)[:, :numbers], log_det

    found = only(bijection.sum_of_log_dets, moved(Resized(*couplings())), points())
    assert (found.passed, found.entry) == {2: (False, "F18"), 4: (True, ""), 6: (False, "P18")}[numbers]
    if numbers != 4:
        assert found.measured == f"4 numbers go into the flow, {numbers} come out"


# --- training mode ----------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """A batch norm whose log-det uses a variance with another divisor than the output."""

    right = False

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = (x.mean(0), x.var(0, correction=0)) if self.training else (self.mean, self.variance)
        counted = x.var(0) if self.training and not self.right else variance
        return (x - mean) / variance.sqrt() * self.log_scale.exp(), (self.log_scale - counted.log() / 2).sum().expand(
            len(x)
        )

    def inverse(self, z: Tensor) -> Tensor:
        return z * (-self.log_scale).exp() * self.variance.sqrt() + self.mean


@pytest.mark.parametrize("right", [True, False])
def test_in_training_mode_the_output_and_the_log_det_use_the_same_statistics(right: bool) -> None:
    flow = moved(Steps(Norm(), *couplings()))
    flow.steps[0].right = right
    assert only(bijection.log_det, flow, points()).passed
    found = only(bijection.log_det, flow.train(), points())
    assert (found.passed, found.entry) == (right, "" if right else "P15")
    if not right:
        assert found.measured.startswith("steps.0 Norm scales by ")
        assert found.cause == "the log-det uses other statistics than the output"


def test_a_sound_flow_passes_all_three() -> None:
    for test in (bijection.round_trip, bijection.log_det, bijection.sum_of_log_dets):
        assert only(test, sound(), points()).passed
        assert only(test, sound(context=2), points(), points(dims=2, seed=1)).passed


def test_a_noise_layer_whose_inverse_does_not_round_is_sound() -> None:
    class Open(Noise):
        def inverse(self, z: Tensor) -> Tensor:
            return z

    class Off(Noise):
        def inverse(self, z: Tensor) -> Tensor:
            return z + 2

    for kind, passed in ((Open, True), (Off, False)):
        flow = moved(Steps(kind(), Times(1 / 4), *couplings()))
        assert only(bijection.round_trip, flow, grid()).passed is passed


def test_each_example_has_a_log_det_of_its_own() -> None:
    class First(nn.Module):
        def __init__(self, right: bool) -> None:
            super().__init__()
            self.right = right

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            log_det = (3 * x.square()).log().sum(1)
            return x**3, log_det if self.right else log_det[:1].expand(len(x))

        def inverse(self, z: Tensor) -> Tensor:
            return z.sign() * z.abs() ** (1 / 3)

    x = points() + 5
    assert only(bijection.log_det, moved(Steps(First(True), Columns())), x).passed
    found = only(bijection.log_det, moved(Steps(First(False), Columns())), x)
    assert (found.passed, found.entry) == (False, "P15")
    assert found.cause == "every example gets the log-det of the first one"
