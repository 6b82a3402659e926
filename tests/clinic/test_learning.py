"""The doctor on what a flow can learn: gradients, volume, masks, dead parameters, and the first batch."""

from __future__ import annotations

import pytest
import torch
from flows import Columns, Coupling, Matrix, Steps, Times, asked, couplings, grid, moved, network, only, points, sound
from torch import Tensor, nn

from nflows_lib.clinic import bijection, learning
from nflows_lib.clinic.registry import COULD_NOT_RUN, TOO_LARGE

# --- the gradient -----------------------------------------------------------------------------------------------------


class Cuts(Coupling):
    """A coupling that takes something out of autograd's graph."""

    def __init__(self, what: str, flip: bool = False) -> None:
        super().__init__(flip=flip)
        self.what = what

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        if self.what == "no_grad":
            with torch.no_grad():
                return super().forward(x)
        kept, changed, log_scale, shift = self.parts(x)
        log_det = log_scale.sum(1)
        if self.what == "log-det":
            log_det = log_det.detach()
        if self.what == "number":
            log_det = torch.tensor(log_det.tolist())
        if self.what == "shift":
            shift = shift.detach()
        return self.whole(kept, changed * log_scale.exp() + shift), log_det


@pytest.mark.parametrize(
    ("what", "entry", "measured", "cause"),
    [
        ("nothing", "", "backward gives the slope of log p(x)", ""),
        ("log-det", "P15", "the log-det's gradient is ", "keep it in autograd's graph"),
        ("number", "P15", "the log-det's gradient is ", "a number"),
        ("shift", "F24", "the latent's gradient is ", "a tensor on the way to the latent is detached"),
        ("no_grad", "F24", "'s gradient is ", ""),
    ],
)
def test_the_gradient_is_the_slope(what: str, entry: str, measured: str, cause: str) -> None:
    found = only(learning.gradient, moved(Steps(Coupling(), Cuts(what, flip=True))), points())
    if what == "no_grad":  # the first coupling's gradient is lost as well
        assert (found.passed, found.entry in ("F24", "P15")) == (False, True)
        return
    assert (found.passed, found.entry) == (not entry, entry)
    assert measured in found.measured
    assert cause in found.cause


def test_a_flow_that_leaves_the_graph_altogether() -> None:
    found = only(learning.gradient, moved(Steps(Cuts("no_grad"), Cuts("no_grad", True))), points())
    assert (found.passed, found.entry) == (False, "F24")
    assert found.measured == "log p(x) has no gradient: forward leaves autograd's graph"


def test_an_in_place_change_of_what_backward_needs() -> None:
    class InPlace(Coupling):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.in_place = in_place

        def parts(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            h = self.network[1](self.network[0](x[:, :2]))
            if self.in_place:
                h /= 2.0
            else:
                h = h / 2.0
            log_scale, shift = self.network[2](h).chunk(2, 1)
            return x[:, :2], x[:, 2:], log_scale.tanh(), shift

    for in_place in (True, False):
        found = only(learning.gradient, moved(Steps(Coupling(flip=True), InPlace(in_place))), points())
        assert (found.passed, found.entry) == (not in_place, "P2" if in_place else "")
        if in_place:
            assert found.measured == "steps.1 InPlace changes in place what backward needs"


def test_a_backward_that_fails_for_another_reason_could_not_run() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            raise RuntimeError("not written yet")

    class Custom(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            return Fails.apply(z), log_det

    found = only(learning.gradient, moved(Steps(Coupling(), Custom())), points())
    assert (found.passed, found.why) == (None, COULD_NOT_RUN)
    assert "not written yet" in found.measured


def test_kinks_are_no_fault_of_the_gradient() -> None:
    class Sign(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            z, log_det = super().forward(x)
            return z + self.shift.sign() * 0.0, log_det

    assert only(learning.gradient, moved(Steps(Coupling(), Sign())), points()).passed
    assert only(learning.gradient, Times(2.0), points()).passed is None


# --- volume -----------------------------------------------------------------------------------------------------------


class OneSided(Coupling):
    """A coupling whose log-scale is bounded by 0 from above, or from below."""

    sign = 1

    def parts(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kept, changed, _, shift = super().parts(x)
        raw = self.network(kept).chunk(2, 1)[0]
        return kept, changed, self.sign * nn.functional.logsigmoid(raw + 2), shift


@pytest.mark.parametrize(("sign", "passes"), [(1, False), (-1, True)])
def test_scales_that_can_only_shrink(sign: int, passes: bool) -> None:
    flow = moved(Steps(OneSided(), OneSided(flip=True)))
    for step in flow.steps:
        step.sign = sign
    found = only(learning.volume, flow, points(), after=[bijection.log_det])
    assert (found.passed, found.entry) == (passes, "" if passes else "F1")
    if not passes:
        assert found.measured == "whatever is learned, no layer's log-det rises above 0"
        assert "add a layer that scales both ways" in found.cause
    flow = moved(Steps(OneSided(), OneSided(flip=True), Columns()))
    assert only(learning.volume, flow, points(), after=[bijection.log_det]).passed


def test_layers_that_keep_volume_need_a_scaling() -> None:
    class Additive(Coupling):
        def parts(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            kept, changed, log_scale, shift = super().parts(x)
            return kept, changed, 0 * log_scale, shift

    found = only(learning.volume, moved(Steps(Additive(), Additive(flip=True))), points())
    assert (found.passed, found.entry) == (False, "F1")
    assert found.measured == "no parameter moves a log-det"
    assert only(learning.volume, moved(Steps(Additive(), Additive(flip=True), Columns())), points()).passed


def test_of_a_wrong_log_det_no_volume_is_told() -> None:
    class Wrong(Columns):
        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x)[0], torch.zeros(len(x))

    flow = moved(Steps(*couplings(), Wrong()))
    found = only(learning.volume, flow, points(), after=[bijection.log_det])
    assert (found.passed, found.measured) == (None, "a log-det is wrong")


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_flow_of_one_dimension() -> None:
    """A coupling in one dimension has nothing to read, so that it can only scale and shift."""

    class Blind(nn.Module):
        def __init__(self, bends: bool) -> None:
            super().__init__()
            self.bends, self.network, self.log_scale = bends, network(1, 2), nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            log_scale, shift = self.network(torch.zeros_like(x)).chunk(2, 1)
            z = (x * log_scale.exp() + shift) * self.log_scale.exp()
            log_det = (log_scale + self.log_scale).sum(1)
            return (z.sinh(), log_det + z.cosh().log().sum(1)) if self.bends else (z, log_det)

        def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
            log_scale, shift = self.network(torch.zeros_like(z)).chunk(2, 1)
            z = z.asinh() if self.bends else z
            return (z * (-self.log_scale).exp() - shift) * (-log_scale).exp()

    found = only(learning.masks, moved(Steps(Blind(False), Blind(False))), points(dims=1))
    assert (found.passed, found.entry) == (False, "F2")
    assert found.measured == "the flow can only scale and shift its only dimension"
    assert only(learning.masks, moved(Steps(Blind(False), Blind(True))), points(dims=1)).passed
    assert only(learning.masks, moved(Steps(Columns(1))), points(dims=1)).passed is None


class Shuffle(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.order], torch.zeros(len(x))

    def inverse(self, z: Tensor, *context: Tensor) -> Tensor:
        return z[:, self.order.argsort()]


def test_a_random_shuffle_may_leave_a_few_numbers_alone_by_chance() -> None:
    """Of an order that a rule makes, such as a reversal, the same is a fault of the masks."""
    by_chance = moved(Steps(Coupling(8), Shuffle(4, 0, 6, 2, 5, 1, 3, 7), Coupling(8)))
    found = only(learning.masks, by_chance, points(dims=8))
    assert found.passed is None
    assert found.measured.endswith("by chance")
    by_rule = moved(Steps(Coupling(8), Shuffle(2, 3, 4, 5, 6, 7, 0, 1), Coupling(8)))
    found = only(learning.masks, by_rule, points(dims=8))
    assert (found.passed, found.entry) == (False, "F2")
    assert "depend on a single number of the data" in found.measured
    reversal = moved(Steps(Coupling(8), Shuffle(7, 6, 5, 4, 3, 2, 1, 0), Coupling(8)))
    assert only(learning.masks, reversal, points(dims=8)).passed


def test_half_of_the_numbers_left_alone_are_no_chance() -> None:
    found = only(learning.masks, moved(Steps(Coupling(), Columns(), Coupling())), points())
    assert (found.passed, found.entry) == (False, "F2")
    assert found.measured.startswith("50 % of the latent's numbers")
    assert only(learning.masks, sound(), points()).passed
    found = only(learning.masks, moved(Steps(Columns(1100))), points(8, 1100))
    assert (found.passed, found.why) == (None, TOO_LARGE)


# --- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_that_never_get_a_gradient() -> None:
    flow = sound()
    assert only(learning.dead_parameters, flow, points()).passed
    flow.steps[0].unused = nn.Linear(2, 2)
    found = only(learning.dead_parameters, flow, points())
    assert (found.passed, found.entry) == (False, "F24")
    assert found.measured.startswith("2 of ")
    assert "steps.0.unused.weight, steps.0.unused.bias" in found.measured


def test_two_parameters_that_do_the_same() -> None:
    class Twice(Columns):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
            log_scale = self.log_scale - self.other
            return x * log_scale.exp() + self.shift, log_scale.sum().expand(len(x))

    found = only(learning.mirrored, moved(Steps(*couplings(), Twice())), points())
    assert (found.passed, found.entry) == (False, "F4")
    assert found.measured == "steps.2.log_scale and steps.2.other have opposite gradients"
    assert only(learning.mirrored, sound(), points()).passed


# --- the first batch --------------------------------------------------------------------------------------------------


class FirstBatch(Columns):
    """A layer that sets its scale and shift from the first batch, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        if self.training and not self.initialized:
            scale = x.var(0) if self._how == "variance" else x.std(0)
            with torch.no_grad():
                self.log_scale.copy_(-scale.log())
                self.shift.copy_(-x.mean(0) if self._how == "shift" else -x.mean(0) / scale)
                if self._how == "no mean":
                    self.shift.zero_()
            self.initialized.fill_(True)
        return super().forward(x)


@pytest.mark.parametrize(
    ("how", "wrong"),
    [
        ("right", ""),
        ("variance", "standard deviations off 1 by up to"),
        ("no mean", "means up to"),
        ("shift", "means up"),
    ],
)
def test_what_the_first_batch_leaves(how: str, wrong: str) -> None:
    x = 2 + 3 * points()
    flow = Steps(FirstBatch(how), *couplings()).train()
    flow(x)
    found = only(learning.start, flow.eval(), x)
    assert (found.passed, found.entry) == (not wrong, "F20" if wrong else "")
    if wrong:
        assert found.measured.startswith("steps.0 FirstBatch, set from this batch, gives means up to ")
        assert wrong in found.measured
        assert found.cause == "the first batch must leave it with mean 0 and variance 1"


def test_a_first_batch_that_was_another_one() -> None:
    x = 2 + 3 * points()
    flow = Steps(FirstBatch("right"), *couplings()).train()
    flow(0.1 * points(seed=4))
    found = only(learning.start, flow.eval(), x)
    assert (found.passed, found.entry) == (False, "F20")
    assert found.measured.startswith("with ActNorm set from this batch the batch is likelier by ")
    assert found.cause == "the flow was not initialised from data, or the flow is not trained"


def test_a_start_at_random() -> None:
    flow = Steps(*couplings(), Columns()).eval()
    assert only(learning.start, flow, points()).passed
    nn.init.constant_(flow.steps[2].log_scale, 1.0)
    found = only(learning.start, flow, points())
    assert (found.passed, found.entry) == (False, "F5")
    flow = Steps(*couplings(), Columns()).eval()
    for layer in flow.steps[0].network[::2]:
        nn.init.ones_(layer.weight)
    nn.init.constant_(flow.steps[0].network[-1].bias, 2.0)
    found = only(learning.start, flow, points())
    assert (found.passed, found.entry) == (False, "F21")
    assert only(learning.start, moved(Steps(Matrix())), points()).passed is None
    assert asked(learning.start, moved(Steps(Times(2.0), Matrix())), grid())[0].passed is None
