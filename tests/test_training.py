"""fit() and log_likelihoods(): every argument against what it says it does.

Many tests use a flow whose training is known by heart: ``DiagonalScaling(1)`` on data that are all zero has the loss
constant - s, so plain gradient descent moves s by exactly the learning rate at every step.
"""

from __future__ import annotations

import math
import weakref
from itertools import chain, pairwise

import pytest
import torch
from bijections import mlp, randomize
from torch import Tensor, nn

from nflows_lib import settings
from nflows_lib.bijection import Bijection
from nflows_lib.coupling import AdditiveCoupling, alternating_mask
from nflows_lib.distributions import StandardNormal
from nflows_lib.evaluation import log_likelihoods, mean_and_error
from nflows_lib.flow import Flow
from nflows_lib.models import nice
from nflows_lib.normalization import DiagonalScaling
from nflows_lib.training import History, NonFiniteLoss, fit

AT_ZERO = 0.5 * math.log(2 * math.pi)  # -log N(0; 0, 1)
ZEROS = torch.zeros(4, 1)


def scaling(dims: int = 1, *more) -> Flow:
    return Flow([*more, DiagonalScaling(dims)], StandardNormal(), (dims,))


def log_scale(flow: Flow) -> Tensor:
    return flow.chain[-1].log_scale.detach().clone()


def sgd(flow: Flow, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(flow.parameters(), lr=lr)


def noisy_nice() -> tuple[Flow, Tensor]:
    """A flow with noise, and integers for it; every call gives the same ones."""
    torch.manual_seed(0)
    flow = nice(4, levels=5, couplings=2, hidden=8, depth=1)
    randomize(flow, 0.1)
    return flow, torch.randint(5, (40, 4))


class Recorder(Bijection):
    """A layer that returns x and keeps it; the first batch sets its parameter, and a buffer counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(()))
        self.register_buffer("calls", torch.zeros(()))
        self.initialized_with: list[Tensor] = []
        self.seen: list[tuple[Tensor, Tensor | None, bool]] = []

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.initialized_with.append(x.clone())
        self.start.fill_(100.0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():  # a training step, not the initialisation or an evaluation
            self.seen.append((x.detach().clone(), context, self.training))
            self.calls += 1
        return x, 0 * self.start.expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z


# --- does it learn ----------------------------------------------------------------------------------------------------


def test_fit_reaches_the_entropy_of_the_data():
    """The best loss on Gaussian data is known, and equals their entropy up to sampling error."""
    torch.manual_seed(0)
    stds = torch.tensor([0.5, 3.0])
    data = stds * torch.randn(2_000, 2)
    flow = scaling(2)
    history = fit(flow, data, steps=200, batch_size=2_000, lr=0.05, cosine=True)
    best = 0.5 * (2 * math.pi * math.e * data.square().mean(0)).log().sum().item()
    assert history.loss[0] > best + 1
    assert history.loss[-1] == pytest.approx(best, abs=1e-3)
    entropy = 0.5 * (2 * math.pi * math.e * stds**2).log().sum().item()
    assert abs(history.loss[-1] - entropy) < 5 * math.sqrt(2 * 0.5 / 2_000)  # each square has variance 2
    torch.testing.assert_close((-log_scale(flow)).exp(), data.square().mean(0).sqrt(), rtol=1e-2, atol=0)


def test_fit_learns_a_coupling():
    """x2 = 2 tanh(x1) + noise, of which only the coupling can remove the dependence on x1."""
    torch.manual_seed(0)
    x1, noise = torch.randn(2, 1_000)
    data = torch.stack([x1, 2 * x1.tanh() + 0.3 * noise], 1)
    flow = Flow([AdditiveCoupling(alternating_mask(2, 0), mlp((2,), 1)), DiagonalScaling(2)], StandardNormal(), (2,))
    history = fit(flow, data, steps=300, batch_size=250, lr=2e-2, cosine=True)
    entropy = math.log(2 * math.pi * math.e) + math.log(0.3)
    without_coupling = 0.5 * (2 * math.pi * math.e * data.var(0)).log().sum().item()
    assert history.loss[0] > without_coupling > entropy + 1
    assert sum(history.loss[-20:]) / 20 == pytest.approx(entropy, abs=0.15)  # 5 standard errors of 1,000 examples


def test_fit_leaves_the_flow_in_evaluation_mode_after_training_in_training_mode():
    recorder = Recorder()
    flow = scaling(1, recorder)
    fit(flow.eval(), ZEROS, 2, batch_size=4)
    assert [training for _, _, training in recorder.seen] == [True, True]
    assert not any(module.training for module in flow.modules())


def test_loss_is_the_mean_negative_log_likelihood_before_each_step():
    flow = scaling()
    history = fit(flow, ZEROS, 3, batch_size=2, optimizer=sgd(flow))
    assert history.loss == pytest.approx([AT_ZERO, AT_ZERO - 1, AT_ZERO - 2])
    assert history.grad_norm == pytest.approx([1, 1, 1])
    assert log_scale(flow).item() == 3


def test_a_large_block_is_allocated_and_freed_before_the_run(monkeypatch):
    """glibc then keeps freed memory: it learns from a block of up to 32 MiB, the larger the better."""
    empty, blocks = torch.empty, []

    def recorded(*args, **options) -> Tensor:
        made = empty(*args, **options)
        if made.nbytes > 2**20:
            blocks.append((made.nbytes, made.device.type, weakref.ref(made)))
        return made

    class Looks(Recorder):
        def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
            self.found = [(size, device, block() is None) for size, device, block in blocks]

    monkeypatch.setattr(torch, "empty", recorded)
    layer = Looks()
    fit(scaling(1, layer), ZEROS, 1, batch_size=4)
    ((size, device, freed),) = layer.found
    assert 30 * 2**20 <= size < 32 * 2**20
    assert device == "cpu"
    assert freed


def test_adam_is_the_default_optimizer():
    """Its first step has the length of the learning rate for every gradient."""
    flow = scaling()
    fit(flow, ZEROS, 1, batch_size=4, lr=0.01)
    assert log_scale(flow).item() == pytest.approx(0.01, rel=1e-4)


# --- clipping, schedule, average --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "length"), [(None, 3.0), (0.1, 0.1), (5.0, 3.0)])
def test_clipping(clip, length):
    """The gradient (-1, ..., -1) has norm 3: the history holds 3, and the step has the clipped length."""
    flow = scaling(9)
    history = fit(flow, torch.zeros(4, 9), 1, batch_size=4, optimizer=sgd(flow), clip=clip)
    assert history.grad_norm == pytest.approx([3.0])
    assert log_scale(flow).norm().item() == pytest.approx(length, rel=1e-4)
    assert log_scale(flow).std() < 1e-6  # shorter, in the same direction


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup": 3}, [1 / 3, 2 / 3, 1, 1]),
        ({"warmup": 4}, [1 / 4, 2 / 4, 3 / 4, 1]),
        ({"cosine": True}, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ({"cosine": True, "warmup": 2}, [1 / 2, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
    ids=["constant", "warmup", "warmup to the end", "cosine", "both"],
)
def test_schedule(options, factors):
    """Each step's length is the learning rate of that step."""
    flow = scaling()
    history = fit(flow, ZEROS, 4, batch_size=4, optimizer=sgd(flow, 0.1), **options)
    positions = [AT_ZERO - loss for loss in history.loss] + [log_scale(flow).item()]
    assert [b - a for a, b in pairwise(positions)] == pytest.approx([0.1 * f for f in factors], abs=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.9])
def test_moving_average(decay):
    """s is 1, 2, 3, ... after the steps; the flow ends with the average, and evaluations use the average."""
    flow = scaling()
    history = fit(flow, ZEROS, 6, batch_size=4, optimizer=sgd(flow), ema=decay, held_out=ZEROS, evaluations=6)
    averages = [1.0]
    for n, s in enumerate([2.0, 3.0, 4.0, 5.0, 6.0], start=1):
        now = min(decay, (1 + n) / (10 + n))
        averages.append(now * averages[-1] + (1 - now) * s)
    assert history.loss == pytest.approx([AT_ZERO - s for s in range(6)])  # the training itself is not averaged
    assert [AT_ZERO - loss for _, loss, _ in history.held_out] == pytest.approx(averages, abs=1e-5)
    assert log_scale(flow).item() == pytest.approx(averages[-1], abs=1e-5)


def test_moving_average_starts_after_initialisation_and_copies_buffers():
    recorder = Recorder()
    flow = scaling(1, recorder)
    fit(flow, ZEROS, 5, batch_size=4, optimizer=sgd(flow), ema=0.9)
    assert recorder.start.item() == 100
    assert recorder.calls.item() == 5


# --- batches, initialisation, context ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "batch_size"), [(12, 3), (11, 3), (5, 5)])
def test_batches_are_whole_and_hold_each_example_once_an_epoch(examples, batch_size):
    torch.manual_seed(0)
    recorder = Recorder()
    flow = scaling(1, recorder)
    an_epoch = examples // batch_size
    fit(flow, torch.arange(float(examples))[:, None], 2 * an_epoch, batch_size=batch_size)
    batches = [x.flatten().tolist() for x, _, _ in recorder.seen]
    assert [len(batch) for batch in batches] == [batch_size] * 2 * an_epoch
    epochs = [list(chain(*batches[:an_epoch])), list(chain(*batches[an_epoch:]))]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == an_epoch * batch_size
        assert set(epoch) <= set(range(examples))
    assert epochs[0] != epochs[1]  # a new shuffle
    assert epochs[0] != sorted(epochs[0])


def test_initialises_once_with_the_first_batch_before_the_optimizer():
    torch.manual_seed(0)
    recorder = Recorder()
    flow = scaling(1, recorder)
    history = fit(flow, torch.arange(12.0)[:, None], 8, batch_size=3, lr=1e-9)
    assert len(recorder.initialized_with) == 1
    assert torch.equal(recorder.initialized_with[0], recorder.seen[0][0])
    assert len(recorder.seen) == len(history.loss) == 8  # the first batch is trained on as well
    assert recorder.start.item() == pytest.approx(100)


def test_context_rows_stay_with_their_examples():
    torch.manual_seed(0)
    recorder = Recorder()
    data = torch.randn(20, 1)
    fit(scaling(1, recorder), data, 8, context=10 * data, batch_size=5)
    assert len(recorder.seen) == 8
    for x, context, _ in recorder.seen:
        assert torch.equal(context, 10 * x)


def test_augmentation_changes_the_batches_and_not_the_held_out_data():
    recorder = Recorder()
    flow = scaling(1, recorder)
    options = {"batch_size": 4, "lr": 1e-9, "held_out": ZEROS}
    history = fit(flow, ZEROS, 3, augment=lambda x: x + torch.rand(len(x), 1) + 5, **options)
    assert torch.equal(recorder.initialized_with[0], recorder.seen[0][0])
    batches = torch.cat([x for x, _, _ in recorder.seen])
    assert ((batches >= 5) & (batches < 6)).all()
    assert len(batches.unique()) == 12  # every batch draws its own
    assert history.held_out == [(3, pytest.approx(AT_ZERO), 0.0)]


def test_with_a_context_augmentation_is_given_both_and_gives_both():
    """They belong to the same examples, also in the first batch, from which the flow is initialised."""
    torch.manual_seed(0)
    recorder, given = Recorder(), []
    data = torch.randn(20, 1)

    def augment(x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        given.append((x, context))
        shift = torch.rand(len(x), 1)
        return x + shift, context + 10 * shift

    options = {"held_out": data[:4], "held_out_context": data[:4], "lr": 1e-9}
    history = fit(scaling(1, recorder), data, 4, context=10 * data, augment=augment, batch_size=5, **options)
    assert sorted(torch.cat([x for x, _ in given]).flatten().tolist()) == sorted(data.flatten().tolist())
    assert all(torch.equal(context, 10 * x) for x, context in given)
    assert torch.equal(recorder.initialized_with[0], recorder.seen[0][0])
    for (before, _), (x, context, _) in zip(given, recorder.seen, strict=True):
        torch.testing.assert_close(context, 10 * x)
        assert (x > before).all() and len((x - before).unique()) == 5
    expected = AT_ZERO + 0.5 * data[:4].square().mean().item()
    assert history.held_out == [(4, pytest.approx(expected, abs=1e-5), pytest.approx(0, abs=1))]


# --- held-out evaluation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"), [(8, 3, [3, 6, 8]), (6, 2, [3, 6]), (4, 1, [4]), (2, 5, [1, 2])]
)
def test_evaluates_evenly_over_the_run(steps, evaluations, expected):
    flow = scaling()
    options = {"batch_size": 4, "optimizer": sgd(flow), "held_out": ZEROS[:2], "evaluations": evaluations}
    history = fit(flow, ZEROS, steps, **options)
    assert history.held_out == [(step, pytest.approx(AT_ZERO - step), 0.0) for step in expected]


def test_no_held_out_data_no_evaluation():
    assert fit(scaling(), ZEROS, 3, batch_size=4).held_out == []


def test_held_out_context_is_passed_on():
    torch.manual_seed(0)
    layer = AdditiveCoupling(alternating_mask(2, 0), mlp((2,), 1, context=2))
    flow = Flow([layer, DiagonalScaling(2)], StandardNormal(), (2,))
    x = torch.randn(40, 2)
    options = {"context": x.flip(1), "held_out": x, "held_out_context": 2 * x}
    history = fit(flow, x, 5, batch_size=20, lr=0.1, **options)
    expected, error = mean_and_error(-log_likelihoods(flow, x, 2 * x))
    assert history.held_out == [(5, pytest.approx(expected), pytest.approx(error))]
    assert -log_likelihoods(flow, x, x).mean().item() != pytest.approx(expected)


def test_evaluation_does_not_disturb_the_training():
    losses = []
    for evaluations in (1, 2, 7):
        flow, data = noisy_nice()
        torch.manual_seed(1)
        losses.append(fit(flow, data, 7, batch_size=16, held_out=data[:9], evaluations=evaluations).loss)
    assert losses[0] == losses[1] == losses[2]


# --- repeatable, and loud when it fails -------------------------------------------------------------------------------


def test_a_seed_repeats_a_run_bit_by_bit():
    runs = []
    for seed in (1, 1, 2):
        flow, data = noisy_nice()
        torch.manual_seed(seed)
        history = fit(flow, data, 10, batch_size=16, clip=1.0, ema=0.9, held_out=data, evaluations=2)
        runs.append((history, flow.state_dict()))
    (first, weights), (second, same_weights), (other, _) = runs
    assert first == second
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert first.loss != other.loss


@pytest.mark.parametrize(("value", "expected"), [(0.0, "nan"), (0.5, "inf")])
def test_a_loss_that_is_not_finite_stops_the_run(value, expected):
    """A learning rate of 1e38 overflows e^s in the first step."""
    flow = scaling()
    with pytest.raises(NonFiniteLoss, match=f"the loss is {expected} at step 2;") as caught:
        fit(flow, torch.full((4, 1), value), 9, batch_size=4, optimizer=sgd(flow, 1e38))
    history = caught.value.history
    assert len(history.loss) == 2
    assert math.isfinite(history.loss[0])
    assert str(history.loss[1]) == expected
    assert len(history.grad_norm) == 1
    assert log_scale(flow).item() > 1e37  # the parameters that gave it


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_step():
    """The loss of sqrt at 0 is finite, but its slope is not."""
    flow = scaling()
    flow.base.log_prob = lambda z: (flow.chain[0].log_scale * 0).sqrt().sum() + z.sum(1)
    with pytest.raises(NonFiniteLoss, match="the gradient's norm is nan at step 1;") as caught:
        fit(flow, ZEROS, 3, batch_size=4)
    assert math.isfinite(caught.value.history.loss[-1])
    assert math.isnan(caught.value.history.grad_norm[-1])
    assert log_scale(flow).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected 1 to 4, the number of examples, got 0"),
        ({"batch_size": 5}, "batch_size: expected 1 to 4, the number of examples, got 5"),
        ({"context": torch.zeros(3, 1)}, "context: expected one row per example, 4 in all, got 3"),
        ({"clip": 0.0}, "clip: expected a number above 0, got 0.0"),
        ({"clip": math.nan}, "clip: expected a number above 0, got nan"),
        ({"warmup": -1}, "warmup: expected 0 to 2, the number of steps, got -1"),
        ({"warmup": 3}, "warmup: expected 0 to 2, the number of steps, got 3"),
        ({"ema": 1.0}, r"ema: expected a decay in \[0, 1\), got 1.0"),
        ({"ema": -0.1}, r"ema: expected a decay in \[0, 1\), got -0.1"),
        ({"evaluations": 0}, "evaluations: expected at least 1, got 0"),
        ({"evaluations": 2}, "held_out: expected data for 2 evaluations, got None"),
        (
            {"held_out": ZEROS, "held_out_context": ZEROS[:1]},
            "held_out_context: expected one row per example, 4 in all, got 1",
        ),
        ({"steps": 2.5}, "steps: expected a whole number, got 2.5"),
        ({"batch_size": 2.5}, "batch_size: expected 1 to 4, the number of examples, got 2.5"),
        ({"warmup": 1.5}, "warmup: expected 0 to 2, the number of steps, got 1.5"),
        ({"draws": 0}, "draws: expected at least 1, got 0"),
        ({"held_out": ZEROS[:0]}, "held_out: expected at least one example, got none"),
        ({"held_out": [[0.0]]}, "held_out: expected a tensor, got list"),
        ({"context": [[0.0]] * 4}, "context: expected a tensor, got list"),
        ({"clip": "1"}, "clip: expected a number above 0, got 1"),
        ({"ema": "0.9"}, r"ema: expected a decay in \[0, 1\), got 0.9"),
        ({"held_out": torch.zeros(4, 2)}, r"held_out: expected shape \(B, 1\), got \(4, 2\)"),
        ({"held_out": torch.tensor([[math.nan]])}, "held_out: expected finite values, got NaN or infinity"),
    ],
)
def test_argument_errors(options, message):
    """They are raised before the first step, not after the last one."""
    recorder = Recorder()
    with pytest.raises(ValueError, match=message):
        fit(scaling(1, recorder), ZEROS, **{"steps": 2, "batch_size": 2, **options})
    assert recorder.seen == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([[0.0]] * 4, "expected a tensor, got list"),
        (None, r"expected shape \(B, 1\), got None"),
        (ZEROS[:0], "expected at least one example, got none"),
    ],
)
def test_what_are_no_data_are_named(data, message):
    with pytest.raises(ValueError, match=f"^data: {message}$"):
        fit(scaling(), data, 2)
    if data is not None:
        with pytest.raises(ValueError, match=r"^data: expected a tensor, got list$|^examples in data: .* got 0$"):
            log_likelihoods(scaling(), data)


def test_contexts_of_another_number_are_named_before_the_first_batch():
    with pytest.raises(ValueError, match=r"^context: expected one row per example, 4 in all, got 6$"):
        log_likelihoods(scaling(), ZEROS, torch.zeros(6, 1))


def test_an_optimizer_of_another_flow_is_refused():
    """This happens in a notebook if the flow is built again."""
    flow = scaling()
    optimizer = sgd(flow)
    with pytest.raises(ValueError, match="optimizer: expected only parameters of this flow, got 1 not in it"):
        fit(scaling(), ZEROS, 2, batch_size=2, optimizer=optimizer)
    fit(flow, ZEROS, 2, batch_size=2, optimizer=optimizer)


def test_the_optimizer_keeps_its_learning_rate():
    """A flow that is trained again with the same optimizer starts the schedule again."""
    flow = scaling()
    optimizer = sgd(flow, 0.1)
    for _ in range(2):
        fit(flow, ZEROS, 4, batch_size=4, optimizer=optimizer, cosine=True)
        assert optimizer.param_groups[0]["lr"] == 0.1
    assert log_scale(flow).item() == pytest.approx(2 * 0.1 * 2.5, abs=1e-6)  # 1 + (1 + r)/2 + 1/2 + (1 - r)/2 per run


def test_the_callback_comes_after_each_step_and_its_evaluation_and_does_not_disturb_the_training():
    called = []

    def callback(flow: Flow, history: History) -> None:
        torch.rand(5)
        called.append((len(history.loss), len(history.held_out), flow.training))

    losses = []
    for options in ({}, {"callback": callback}):
        flow, data = noisy_nice()
        torch.manual_seed(1)
        losses.append(fit(flow, data, 4, batch_size=16, held_out=data[:9], evaluations=2, **options).loss)
    assert losses[0] == losses[1]
    assert called == [(1, 0, True), (2, 1, True), (3, 1, True), (4, 2, True)]


def test_a_flow_in_double_precision_is_trained_in_it():
    """The noise is in double precision as well: a float32 would meet float64 matrices."""
    flow, data = noisy_nice()
    history = fit(flow.double(), data, 3, batch_size=16, held_out=data[:9])
    assert {tensor.dtype for tensor in flow.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    assert flow.log_prob(data).dtype == torch.float64
    assert math.isfinite(history.loss[-1])


@pytest.mark.parametrize("double", ["flow", "data"])
def test_floats_of_another_type_than_the_flows_are_named(double):
    flow, data = scaling(), ZEROS
    (flow, data) = (flow.double(), data) if double == "flow" else (flow, data.double())
    types = ("float64", "float32") if double == "flow" else ("float32", "float64")
    with pytest.raises(
        ValueError, match="data: expected torch.{}, as the flow's parameters are, got torch.{}".format(*types)
    ):
        fit(flow, data, 2, batch_size=2)


def test_a_history_is_shown_in_one_line():
    assert repr(History()) == "History of 0 steps"
    history = fit(scaling(), ZEROS, 3, batch_size=2, lr=1e-9)
    assert repr(history) == "History of 3 steps, mean loss of the last 3: ≈ 0.92 nats"
    history.loss = [5.0] * 1000 + [1.0] * 100
    assert repr(history) == "History of 1,100 steps, mean loss of the last 100: ≈ 1.00 nats"


def test_data_of_another_shape_are_refused_before_training():
    with pytest.raises(ValueError, match=r"data: expected shape \(B, 1\), got \(4, 3\)"):
        fit(scaling(), torch.zeros(4, 3), 1, batch_size=2)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_log_likelihoods_keeps_the_mode_and_the_random_state(training):
    flow, data = noisy_nice()
    flow.train(training)
    state = torch.get_rng_state()
    values = log_likelihoods(flow, data, draws=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert flow.training == training
    assert not values.requires_grad
    with pytest.raises(ValueError, match="x: expected"):
        log_likelihoods(flow, torch.zeros(3, 99))
    assert flow.training == training


def test_log_likelihoods_are_those_of_the_flow_in_evaluation_mode():
    torch.manual_seed(0)
    flow = Flow([nn_dropout_coupling(), DiagonalScaling(2)], StandardNormal(), (2,))
    randomize(flow)
    x = torch.randn(10, 2)
    expected = flow.eval()(x).detach()
    assert not torch.allclose(flow.train()(x), expected)
    for batch_size in (1, 3, 10, 1000):  # batches are a matter of memory only
        torch.testing.assert_close(log_likelihoods(flow, x, batch_size=batch_size), expected)


def nn_dropout_coupling() -> AdditiveCoupling:
    """A coupling that differs between training and evaluation."""
    coupling = AdditiveCoupling(alternating_mask(2, 0), mlp((2,), 1))
    coupling.network.layers.append(nn.Dropout(0.5))
    return coupling


def test_log_likelihoods_slices_the_context_with_the_data():
    torch.manual_seed(0)
    layer = AdditiveCoupling(alternating_mask(2, 0), mlp((2,), 1, context=1))
    flow = Flow([layer], StandardNormal(), (2,))
    randomize(flow)
    x, context = torch.randn(7, 2), torch.randn(7, 1)
    torch.testing.assert_close(log_likelihoods(flow, x, context, batch_size=3), flow(x, context).detach())


def test_log_likelihoods_averages_its_draws():
    flow, data = noisy_nice()
    torch.manual_seed(3)
    one_by_one = torch.stack([flow(data) for _ in range(4)]).mean(0).detach()
    torch.manual_seed(3)
    torch.testing.assert_close(log_likelihoods(flow, data, draws=4), one_by_one)
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        log_likelihoods(flow, data, draws=0)


def test_log_likelihoods_shows_how_far_it_is_after_two_seconds(monkeypatch):
    shown, progress_bar = [], settings.progress_bar

    def watched(total, unit, **options):
        bar = progress_bar(total, unit, **options)
        shown.append((total, unit, options, bar))
        bar.update = shown.append
        return bar

    monkeypatch.setattr(settings, "progress_bar", watched)
    log_likelihoods(Flow([], StandardNormal(), (1,)), torch.zeros(7, 1), draws=2, batch_size=3)
    assert shown[0][:3] == (7, 1, {"delay": 2})
    assert shown[1:] == [3, 3, 1]


def test_log_likelihoods_of_a_flow_without_parameters():
    values = log_likelihoods(Flow([], StandardNormal(), (1,)), ZEROS)
    assert values.tolist() == pytest.approx([-AT_ZERO] * 4)


def test_mean_and_error():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3
    assert error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
