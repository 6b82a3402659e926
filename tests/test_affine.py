"""Tests of consecutive affine maps of the channels, which a chain merges into one product."""

from __future__ import annotations

import pytest
import torch
from bijections import BIJECTIONS, build, conditional_act_norm, conditional_conv, randomize
from torch import Tensor

from nflows_lib.bijection import AffineBijection, Chain
from nflows_lib.convolution import Invertible1x1Conv
from nflows_lib.dequantization import Rescale
from nflows_lib.models import glow
from nflows_lib.normalization import ActNorm

AFFINE = [name for name in BIJECTIONS if isinstance(BIJECTIONS[name].make(BIJECTIONS[name].shapes[0]), AffineBijection)]
SHAPES = [(3,), (3, 2, 5), (6, 1, 1)]
CHAINS = {
    "one step": lambda c: [ActNorm(c), Invertible1x1Conv(c)],
    "plain": lambda c: [ActNorm(c), Invertible1x1Conv(c, lu=False)],
    "the other order": lambda c: [Invertible1x1Conv(c), ActNorm(c)],
    "four": lambda c: [ActNorm(c), Invertible1x1Conv(c), Invertible1x1Conv(c), ActNorm(c)],
    "two apart": lambda c: [ActNorm(c), Rescale(2.0), Invertible1x1Conv(c), ActNorm(c)],
    "conditional": lambda c: [conditional_act_norm((c,), (2,)), conditional_conv((c,), (2,))],
    "half conditional": lambda c: [ActNorm(c), conditional_conv((c,), (2,)), Invertible1x1Conv(c)],
}


def made(name: str, shape: tuple[int, ...]) -> tuple[Chain, Tensor, Tensor]:
    torch.manual_seed(0)
    chain = Chain(CHAINS[name](shape[0])).double()
    x, context = torch.randn(4, *shape, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    chain.initialize(x, context)
    randomize(chain, 0.3)
    return chain, x, context


def watched(chain: Chain) -> list[str]:
    """The names of the layers that are called; a chain whose layers are watched calls each of them."""
    called: list[str] = []
    for layer in chain:
        layer.register_forward_hook(lambda layer, *_: called.append(type(layer).__name__))
    return called


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CHAINS)
def test_merged_is_unmerged_in_values_and_gradients(name, shape):
    chain, x, context = made(name, shape)
    x.requires_grad_()
    weights = torch.randn(x.shape, dtype=x.dtype)

    def values_and_gradients() -> list[Tensor]:
        z, log_det = chain(x, context)
        total = (weights * z).sum() + (weights.flatten(1)[:, 0] * log_det).sum()
        return [z, log_det, *torch.autograd.grad(total, [x, *chain.parameters()])]

    merged = values_and_gradients()
    called = watched(chain)
    unmerged = values_and_gradients()
    assert len(called) == len(chain)
    for one, other in zip(merged, unmerged, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CHAINS)
def test_a_merged_round_trip_closes_in_float32(name):
    chain, x, context = made(name, (6, 3, 2))
    chain, x, context = chain.float(), x.float(), context.float()
    torch.testing.assert_close(chain.inverse(chain(x, context)[0], context), x, rtol=0, atol=1e-4)


def test_neighbours_alone_are_merged(monkeypatch):
    """Two pairs have a coupling between them: each pair is one product, and no layer of a pair is called."""
    products = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args: products.append(args[1].shape) or addmm(*args))
    flow = glow((1, 4, 4), scales=1, steps=2, hidden=4)
    flow.initialize(torch.randint(256, (4, 1, 4, 4)))
    products.clear()
    monkeypatch.setattr(ActNorm, "forward", None)
    monkeypatch.setattr(Invertible1x1Conv, "forward", None)
    flow.log_prob(torch.randint(256, (4, 1, 4, 4)))
    assert products == [(4, 4), (4, 4)]


class Doubled(ActNorm):
    """An ActNorm with a forward of its own, as a reader writes it."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return 2 * x, x.new_zeros(len(x))


class DoubledMap(Doubled):
    """The same ActNorm, which also says what its map is."""

    def as_affine(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return 2 * torch.eye(self.channels), torch.zeros(self.channels), torch.zeros(())


@pytest.mark.parametrize("kind", [Doubled, DoubledMap])
def test_a_forward_of_ones_own_is_what_counts(kind):
    torch.manual_seed(0)
    conv, x = Invertible1x1Conv(3), torch.randn(4, 3)
    expected, _ = conv(2 * x)
    torch.testing.assert_close(Chain([kind(3), conv])(x)[0], expected)


def test_a_forward_that_a_reader_puts_in_its_place_is_called():
    torch.manual_seed(0)
    conv, norm, x = Invertible1x1Conv(3), ActNorm(3), torch.randn(4, 3)
    norm.initialize(x)
    norm.forward = lambda x, context=None: (x, x.new_ones(len(x)))
    z, log_det = Chain([norm, conv])(x)
    torch.testing.assert_close(z, conv(x)[0])
    torch.testing.assert_close(log_det, conv(x)[1] + 1)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_that_is_watched_is_called_until_the_hook_is_gone(hook):
    chain, x, _ = made("one step", (3, 2, 5))
    called = []
    handle = getattr(chain[1], hook)(lambda *_: called.append(True))
    chain(x)
    assert called == [True]
    handle.remove()
    chain(x)
    assert called == [True]


def test_a_merged_pair_still_checks():
    chain = Chain([ActNorm(3), Invertible1x1Conv(3)])
    with pytest.raises(ValueError, match=r"ActNorm: expected one call of Flow\.initialize"):
        chain(torch.randn(4, 3))
    chain.initialize(torch.randn(4, 3))
    for x in (torch.randn(4, 2), torch.randn(4, 3, 1)):
        with pytest.raises(ValueError, match=r"x: expected shape \(B, 3\) or \(B, 3, H, W\), got"):
            chain(x)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 4\)"):
        Chain([chain[0], Invertible1x1Conv(4)])(torch.randn(4, 3))


def test_an_empty_batch_passes():
    chain, x, _ = made("one step", (3, 2, 5))
    z, log_det = chain(x[:0])
    assert z.shape == (0, 3, 2, 5) and log_det.shape == (0,)


@pytest.mark.parametrize("name", AFFINE)
def test_the_map_is_what_the_layer_says(name):
    """A, b and the log-determinant of A agree with the layer's own forward, and with slogdet."""
    shape = next(shape for shape in BIJECTIONS[name].shapes if len(shape) == 1)
    layer, x, context = build(name, shape)
    matrix, bias, log_det = layer.as_affine(context)
    z, contribution = layer(x, context)
    torch.testing.assert_close((matrix @ x[..., None]).squeeze(-1) + bias, z)
    torch.testing.assert_close(log_det.expand(len(x)), contribution)
    torch.testing.assert_close(torch.linalg.slogdet(matrix).logabsdet, log_det)
    assert {"act_norm", "conv1x1_lu", "conv1x1_conditional"} <= {*AFFINE}
