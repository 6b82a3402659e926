"""Tests of the pixelwise classifier: its likelihood, samples and mean by hand, and its U-Net."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from densities import FIVE_SIGMA
from scipy.stats import chisquare
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_lib.evaluation import log_likelihoods
from nflows_lib.experiments.pixelwise import PixelClassifier, UNet
from nflows_lib.training import fit

# --- the classifier ---------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A network that returns its context, with one parameter that gives its device."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, context: Tensor) -> Tensor:
        return self.scale * context


def told(shape=(2, 2, 3), levels: int = 3, n: int = 4) -> tuple[PixelClassifier, Tensor]:
    """A classifier whose logits are its contexts, and contexts for it."""
    torch.manual_seed(0)
    return PixelClassifier(Given(), shape, levels), torch.randn(n, levels * shape[0], *shape[1:])


@torch.no_grad()
def test_log_likelihood_by_hand():
    """A pixel's log-likelihood is its level's logit minus the logsumexp over levels; channels are within a level."""
    model, context = told()
    y = torch.randint(3, (4, 2, 2, 3))
    expected = torch.zeros(4)
    for b, c, i, j in itertools.product(range(4), range(2), range(2), range(3)):
        logits = [context[b, 2 * level + c, i, j].item() for level in range(3)]
        expected[b] += logits[y[b, c, i, j]] - math.log(sum(math.exp(logit) for logit in logits))
    for kind in (torch.uint8, torch.int64):
        torch.testing.assert_close(model(y.to(kind), context), expected)
    assert model.dims == 12
    assert (model.shape, model.levels) == ((2, 2, 3), 3)


@pytest.mark.parametrize(("shape", "levels"), [((1, 2, 2), 2), ((2, 1, 1), 3), ((1, 1, 3), 4)])
@torch.no_grad()
def test_the_probabilities_of_all_images_sum_to_one(shape, levels):
    model, context = told(shape, levels, n=2)
    every = torch.tensor(list(itertools.product(range(levels), repeat=math.prod(shape)))).view(-1, *shape)
    for row in context:
        p = model(every, row.expand(len(every), *row.shape)).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-5)
        assert p.max() > 2 * p.min()


@torch.no_grad()
def test_the_likelihood_is_exact_and_of_each_example_alone():
    """There is no noise: two calls agree, and the random state stays the same."""
    model, context = told()
    y = torch.randint(3, (4, 2, 2, 3))
    state = torch.get_rng_state()
    log_p = model(y, context)
    assert torch.equal(model(y, context), log_p)
    model.initialize(y, context)
    assert torch.equal(torch.get_rng_state(), state)
    other = context.clone()
    other[1] += torch.randn_like(other[1])
    assert (model(y, other) != log_p).tolist() == [False, True, False, False]
    torch.testing.assert_close(log_likelihoods(model, y, context, draws=3, batch_size=3), log_p)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_samples_follow_the_softmax_of_the_logits_over_the_temperature(temperature):
    model, context = told(n=1)
    n = 20_000
    drawn = model.sample(n, temperature, context.expand(n, -1, -1, -1))
    assert drawn.shape == (n, 2, 2, 3)
    assert drawn.dtype == torch.int64
    p = (context[0].double().unflatten(0, (3, 2)) / temperature).softmax(0)
    for c, i, j in itertools.product(range(2), range(2), range(3)):
        counts = torch.bincount(drawn[:, c, i, j], minlength=3)
        assert chisquare(counts.numpy(), (n * p[:, c, i, j]).numpy()).pvalue > FIVE_SIGMA
    # Every pixel is drawn by itself.
    together = torch.corrcoef(drawn.flatten(1).T.double())
    assert (together - torch.eye(12).double()).abs().max() < 5 / math.sqrt(n)


def test_a_sample_has_the_context_of_its_row():
    model, context = told(n=5)
    graphs: list[bool] = []
    model.network.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    drawn = model.sample(5, context=1e6 * context)
    assert torch.equal(drawn, context.unflatten(1, (3, 2)).argmax(1))
    assert torch.equal(model.sample(5, 1e-6, context), drawn)
    torch.manual_seed(0)
    first = model.sample(5, context=context)
    assert not torch.equal(model.sample(5, context=context), first)
    torch.manual_seed(0)
    assert torch.equal(model.sample(5, context=context), first)
    assert not any(graphs)  # no memory for gradients


def test_the_mean_is_that_of_the_levels():
    """For two levels the mean is the probability of a 1."""
    model, context = told()
    p = context.unflatten(1, (3, 2)).softmax(1)
    torch.testing.assert_close(model.mean(context), p[:, 1] + 2 * p[:, 2])
    assert not model.mean(context).requires_grad
    model, context = told((1, 2, 2), 2)
    torch.testing.assert_close(model.mean(context), (context[:, 1:] - context[:, :1]).sigmoid())


def test_a_classifier_is_trained_by_fit():
    """The probabilities approach the shares of the levels under each context, and the loss their entropy."""
    torch.manual_seed(0)
    which = torch.arange(1_000) % 2
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    y = torch.multinomial(shares[which], 1).view(-1, 1, 1, 1)
    context = which.float().view(-1, 1, 1, 1)
    model = PixelClassifier(nn.Conv2d(1, 3, 1), (1, 1, 1), 3)
    options = {"context": context, "held_out": y, "held_out_context": context, "evaluations": 2}
    history = fit(model, y, 150, batch_size=1_000, lr=0.1, **options)
    counted = torch.stack([torch.bincount(y[which == i].flatten(), minlength=3) / 500 for i in range(2)])
    found = model.logits(context[:2]).softmax(1).flatten(1)
    torch.testing.assert_close(found, counted, rtol=0, atol=0.01)
    entropy = -(counted * counted.log()).sum(1).mean().item()
    assert history.loss[0] > entropy + 0.1
    assert history.loss[-1] == pytest.approx(entropy, abs=1e-3)
    assert history.held_out[-1][1] == pytest.approx(history.loss[-1], abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, y, c: m(y), "context: expected one row per example, got None"),
        (lambda m, y, c: m.sample(4), "context: expected one row per example, got None"),
        (lambda m, y, c: m(y, c[:1]), "context: expected one row per example, 4 in all, got 1"),
        (lambda m, y, c: m.sample(3, context=c), "context: expected one row per example, 3 in all, got 4"),
        (lambda m, y, c: m(y.float(), c), "x: expected integers from 0 to 2, got torch.float32"),
        (lambda m, y, c: m(y + 3, c), "x: expected integers from 0 to 2, got values from 3 to 3"),
        (lambda m, y, c: m(y - 100, c), "x: expected integers from 0 to 2, got values from -100 to -100"),
        (lambda m, y, c: m(y, c * torch.nan), "context: expected finite values, got NaN or infinity"),
        (lambda m, y, c: m.sample(0, context=c[:0]), "n: expected at least 1, got 0"),
        (lambda m, y, c: m.sample(4, -1.0, c), "temperature: expected a finite number >= 0, got -1.0"),
        (lambda m, y, c: m(y[:, :1], c), "x: expected shape (B, 2, 2, 3), got (4, 1, 2, 3)"),
        (lambda m, y, c: m(y, c[:, :2]), "network's output: expected shape (B, 6, 2, 3), got (4, 2, 2, 3)"),
        (lambda m, y, c: m.mean(c[..., :2]), "network's output: expected shape (B, 6, 2, 3), got (4, 6, 2, 2)"),
    ],
)
def test_what_a_classifier_does_not_take_is_named(call, message):
    model, context = told()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(model, torch.zeros(4, 2, 2, 3, dtype=torch.long), context)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PixelClassifier(nn.Identity(), 4, 2), "shape: expected (C, H, W), got 4"),
        (lambda: PixelClassifier(nn.Identity(), (4,), 2), "shape: expected (C, H, W), got (4,)"),
        (lambda: PixelClassifier(nn.Identity(), (1, 2, 2), 1), "levels: expected at least 2, got 1"),
        (lambda: UNet(1, 1, 2, 3)([1]), "x: expected a tensor, got list"),
    ],
)
def test_what_is_no_classifier_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_at_temperature_zero_each_pixel_has_its_likeliest_level():
    model, context = told()
    assert torch.equal(model.sample(4, 0.0, context), model.logits(context).argmax(1))


# --- the U-Net --------------------------------------------------------------------------------------------------------


def unet(levels: int = 3, **options) -> UNet:
    torch.manual_seed(0)
    return UNet(2, 5, hidden=4, levels=levels, **options)


@pytest.mark.parametrize(("levels", "size"), [(1, (5, 3)), (2, (2, 6)), (3, (8, 4)), (4, (8, 16))])
@torch.no_grad()
def test_a_u_net_is_its_formula(levels, size):
    """Each size has two 3x3 convolutions with ReLUs; images are pooled by 2 on the way down, doubled on the way up."""
    network = unet(levels).double()
    x = torch.randn(2, 2, *size).double()

    def two(block: nn.Module, h: Tensor) -> Tensor:
        for layer in (module for module in block if isinstance(module, nn.Conv2d)):
            h = F.conv2d(h, layer.weight, layer.bias, padding=1).relu()
        return h

    kept = [two(network.down[0], x)]
    for block in network.down[1:]:
        kept.append(two(block, F.max_pool2d(kept[-1], 2)))
    assert [h.shape[1:] for h in kept] == [(4 * 2**i, size[0] // 2**i, size[1] // 2**i) for i in range(levels)]
    h = kept[-1]
    for i in range(levels - 2, -1, -1):
        large = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        h = two(network.up[i], torch.cat([kept[i], large], 1))
        assert h.shape == kept[i].shape
    expected = F.conv2d(h, network.last.weight, network.last.bias)
    assert expected.shape == (2, 5, *size)
    torch.testing.assert_close(network(x), expected)
    assert network(x).is_contiguous()


def parameters_of_unet(inputs: int, outputs: int, hidden: int, levels: int) -> int:
    """The number of parameters, counted by hand: two 3x3 convolutions with biases per size and way, and one 1x1."""

    def two(a: int, b: int) -> int:
        return 9 * a * b + b + 9 * b * b + b

    widths = [hidden * 2**i for i in range(levels)]
    down = sum(two(a, b) for a, b in itertools.pairwise([inputs, *widths]))
    return down + sum(two(a + b, a) for a, b in itertools.pairwise(widths)) + hidden * outputs + outputs


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_a_u_net_s_parameters_are_those_counted_by_hand(levels):
    counted = parameters_of_unet(2, 5, 4, levels)
    assert sum(parameter.numel() for parameter in unet(levels).parameters()) == counted


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_parameter_of_a_u_net(precision):
    network = UNet(2, 5, hidden=16, levels=3, precision=precision)
    output = network(torch.randn(4, 2, 8, 12))
    assert output.dtype == torch.float32
    (output - torch.randn_like(output)).square().mean().backward()
    for label, parameter in network.named_parameters():
        assert parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0, label


@pytest.mark.parametrize(("levels", "reach"), [(1, 2), (4, 31)])
def test_how_far_a_u_net_looks(levels, reach):
    """With one size it looks two pixels to either side, with four sizes from corner to corner of 32x32."""
    torch.manual_seed(0)
    network = UNet(1, 1, hidden=8, levels=levels).double()
    x = torch.rand(1, 1, 32, 32, dtype=torch.float64, requires_grad=True)
    network(x)[0, 0, 0, 0].backward()
    seen = x.grad[0, 0].nonzero()
    assert seen.amax(0).tolist() == [reach, reach]


@pytest.mark.parametrize("size", [(8, 10), (6, 8)])
def test_a_size_that_cannot_be_halved_is_named(size):
    with pytest.raises(ValueError, match=r"^x: expected height and width that are multiples of 4, got "):
        unet()(torch.zeros(1, 2, *size))
    with pytest.raises(ValueError, match=r"^levels: expected at least 1, got 0$"):
        unet(0)


@torch.no_grad()
def test_bfloat16_in_a_u_net_is_near_float32():
    exact, rounded = (unet(precision=precision) for precision in (torch.float32, torch.bfloat16))
    x = torch.randn(3, 2, 8, 8)
    assert 1e-5 < (exact(x) - rounded(x)).norm() / exact(x).norm() < 0.03
    with pytest.raises(ValueError, match=r"^precision: expected torch.float32 or torch.bfloat16, got torch.float16$"):
        unet(precision=torch.float16)
