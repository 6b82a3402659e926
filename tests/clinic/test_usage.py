"""The doctor on a flow in use: in another batch, in the other mode, and in other types."""

from __future__ import annotations

import pytest
import torch
from flows import Columns, Coupling, Matrix, Steps, couplings, moved, only, points, sound
from torch import Tensor, nn

from nflows_lib.clinic import bijection, usage
from nflows_lib.clinic.registry import COULD_NOT_RUN

# --- precision --------------------------------------------------------------------------------------------------------


def precise(flow: nn.Module, batch: Tensor, **more: object) -> object:
    return only(usage.precision, flow, batch, after=[bijection.round_trip], **more)


def test_a_sound_flow_in_float32() -> None:
    found = precise(sound(), points())
    assert found.passed
    assert found.measured.startswith("in float32 the round trip returns the data within ")


@pytest.mark.parametrize("smallest", [0.5, 1e-7])
def test_a_matrix_that_is_nearly_singular(smallest: float) -> None:
    layer, (turn, _) = Matrix(), torch.linalg.qr(points(4, 4))
    with torch.no_grad():
        layer.weight.copy_(turn @ torch.diag(torch.tensor([1.0, 1.0, 1.0, smallest])) @ turn.T)
    found = precise(Steps(Coupling(), layer).eval(), points())
    assert (found.passed, found.entry) == (smallest == 0.5, "" if smallest == 0.5 else "P11")
    if smallest < 0.5:
        assert found.measured.startswith("in float32 the round trip misses the data by ")
        assert found.cause.startswith("the matrix of steps.1 Matrix is nearly singular (condition number ")


def test_scales_that_multiply_to_tiny_ones() -> None:
    shrinks = Columns()
    with torch.no_grad():
        shrinks.log_scale.fill_(-16.0)
        shrinks.shift.fill_(1.0)
    found = precise(moved(Steps(*couplings(), shrinks), by=0.0), points())
    assert (found.passed, found.entry) == (False, "P11")
    assert found.measured.startswith("in float32 the round trip misses the data by ")
    assert found.cause == "the layers' scale factors multiply to too small or too large ones"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_flow_in_half_precision_is_asked_in_that_type(dtype: torch.dtype) -> None:
    """Numbers beyond 65,504 are infinite in float16, not in bfloat16."""
    large = Columns()
    with torch.no_grad():
        large.log_scale.fill_(11.0)
    found = precise(Steps(*couplings(), large).eval().to(dtype), points().to(dtype))
    passes = dtype == torch.bfloat16
    assert (found.passed, found.entry) == (passes, "" if passes else "P11")
    assert found.measured.startswith(f"in {str(dtype).removeprefix('torch.')} ")
    assert passes or found.cause == "float16 ends at 65,504: keep log-dets and sums in float32"


def test_a_flow_in_float64_is_left_alone() -> None:
    found = precise(sound().double(), points().double())
    assert (found.passed, found.measured) == (None, "the flow computes in float64")


def test_a_wrong_inverse_is_not_laid_to_precision() -> None:
    class Wrong(Columns):
        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            return super().inverse(z) + 1

    found = precise(moved(Steps(Coupling(), Wrong())), points())
    assert (found.passed, found.measured) == (None, "the round trip fails in float64, too")


def test_a_flow_that_asks_for_one_type_could_not_run() -> None:
    class Wants(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            if x.dtype == torch.float32:
                raise TypeError("float64 only")
            return super().forward(x)

    found = precise(moved(Steps(Coupling(), Wants())), points())
    assert (found.passed, found.why) == (None, COULD_NOT_RUN)
    assert found.measured == "in float32: TypeError: float64 only"


def test_a_flow_may_ask_for_float32_by_name() -> None:
    """x.float() inside of a flow does not spoil the examination in float64."""

    class Float(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x.float())
            return z, log_det.to(torch.float32)

    flow = moved(Steps(*couplings(), Float()))
    found = only(bijection.round_trip, flow, points())
    assert found.passed
    assert float(found.measured.rpartition(" ")[2]) < 1e-12
    assert only(bijection.log_det, flow, points()).passed


# --- the other examples of the batch, and the other mode --------------------------------------------------------------


class Norm(nn.Module):
    """A batch norm, which uses the batch in training mode, or always."""

    def __init__(self, always: bool, momentum: float = 0.1) -> None:
        super().__init__()
        self.always, self.momentum = always, momentum
        self.log_scale = nn.Parameter(torch.zeros(4))
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self.running_mean, self.running_var
        if self.training or self.always:
            mean, var = x.mean(0), x.var(0, correction=0)
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        return (x - mean) / var.sqrt() * self.log_scale.exp(), (self.log_scale - var.log() / 2).sum().expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return z * (-self.log_scale).exp() * self.running_var.sqrt() + self.running_mean


@pytest.mark.parametrize(("always", "training"), [(False, False), (False, True), (True, False)])
def test_statistics_of_the_batch(always: bool, training: bool) -> None:
    found = only(usage.neighbours, moved(Steps(*couplings(), Norm(always))).train(training), points())
    passes = not (always or training)
    assert (found.passed, found.entry) == (passes, "" if passes else "F15")
    if not passes:
        assert ("call eval()" if training else "in evaluation mode, too") in found.cause


def test_a_log_det_alone_that_depends_on_the_batch() -> None:
    class Mean(Coupling):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            return z, log_det.mean().expand(len(x))

    found = only(usage.neighbours, moved(Steps(Mean(), Coupling(flip=True))), points())
    assert (found.passed, found.entry) == (False, "P15")
    assert "only the log-det" in found.cause
    assert only(usage.neighbours, sound(), points()).passed


def test_averages_that_are_stale() -> None:
    x = 3 + 2 * points()
    for momentum in (1.0, 0.01):
        flow = Steps(Norm(False, momentum), *couplings()).train()
        flow(x)
        found = only(usage.modes, flow.eval(), x)
        stale = momentum == 0.01
        assert (found.passed, found.entry) == (not stale, "F15" if stale else "")
        assert not stale or "the running averages are not the data's" in found.cause
    fresh = only(usage.modes, Steps(Norm(False), *couplings()).eval(), x)
    assert (fresh.passed, "nothing to compare" in fresh.measured) == (None, True)


def test_a_round_trip_in_training_mode() -> None:
    x = 3 + 2 * points()
    flow = Steps(Norm(False, 0.5), *couplings()).train()
    flow(x)
    found = only(usage.modes, flow, x)
    assert (found.passed, found.entry) == (False, "F16")
    assert found.measured.startswith("in training mode the round trip misses the data by ")
    assert found.cause == "forward uses the batch, the inverse running averages: call eval()"


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_edges_of_the_unit_interval(margin: float) -> None:
    class Logit(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            u = margin + (1 - 2 * margin) * x
            log_det = torch.log(torch.full_like(u, 1 - 2 * margin) / (u * (1 - u))).sum(1)
            return u.logit(), log_det

        def inverse(self, z: Tensor) -> Tensor:
            return (z.sigmoid() - margin) / (1 - 2 * margin)

    found = only(usage.edges, moved(Steps(Logit(), *couplings())), 0.1 + 0.8 * points().sigmoid())
    assert (found.passed, found.entry) == (bool(margin), "" if margin else "F14")
    assert margin or found.measured == "steps.0 Logit is not finite at 0"
    assert only(usage.edges, sound(), points()).measured == "no layer is on the unit interval"
