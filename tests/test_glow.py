"""Tests of Glow and its layers: data-dependent starts, formulas by hand, checkpoints, labels, precision."""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from bijections import Fixed, randomize
from densities import gauss
from torch import Tensor, nn

from nflows_lib.bijection import Chain, ChannelBijection, Shape
from nflows_lib.convolution import ChannelPermutation, Invertible1x1Conv
from nflows_lib.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    BoundedGlowCoupling,
    GlowCoupling,
    channel_mask,
    checkerboard_mask,
)
from nflows_lib.data import digits
from nflows_lib.dequantization import Logit, Rescale, UniformDequantize, VariationalDequantize
from nflows_lib.distributions import StandardNormal
from nflows_lib.evaluation import log_likelihoods
from nflows_lib.experiments import checkpoint
from nflows_lib.experiments.trainer import CHECKPOINT, read_model, train
from nflows_lib.flow import Flow
from nflows_lib.models import glow
from nflows_lib.multiscale import FactorOut, PhaseOrder, Squeeze, split_latent
from nflows_lib.networks import MLP, ActNormConv, BoundedPrior, GlowNet, ResNet, ZeroConv
from nflows_lib.normalization import ActNorm
from nflows_lib.training import fit

NOT_YET = r"^ActNorm: expected one call of Flow\.initialize with a batch of data first, got none$"

vectors_and_images = pytest.mark.parametrize("shape", [(16, 3), (5, 3, 4, 2)], ids=["vectors", "images"])
both_kinds = pytest.mark.parametrize("lu", [True, False], ids=["lu", "plain"])


def spread(shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random batch with another mean and standard deviation in each of three channels."""
    torch.manual_seed(0)
    scale, shift = torch.tensor([0.02, 1.0, 30.0]), torch.tensor([0.5, -20.0, 1.0])
    return (torch.randn(shape) * per_channel(scale, shape) + per_channel(shift, shape)).to(dtype)


def per_channel(values: Tensor, shape: Shape) -> Tensor:
    return values.view(1, -1, *[1] * (len(shape) - 2))


def mean_and_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of each channel."""
    values = x.movedim(1, 0).reshape(x.shape[1], -1)
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().mean(1).sqrt()


def used_act_norm(shape: Shape = (16, 3), dtype: torch.dtype = torch.float32) -> ActNorm:
    layer = ActNorm(3).to(dtype)
    layer.initialize(spread(shape, dtype))
    return layer


@torch.no_grad()
def stir(module: nn.Module, scale: float) -> None:
    """Move every parameter by random numbers in proportion to its standard deviation: small weights stay small."""
    for parameter in module.parameters():
        spread = parameter.std(correction=0)
        parameter.add_(scale * torch.randn_like(parameter) * (spread if spread > 0 else 1.0))


def assert_same_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    assert module.state_dict().keys() == state.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


# --- layers that know their channels ----------------------------------------------------------------------------------

CHANNEL_LAYERS = {
    "permutation": lambda: ChannelPermutation(torch.tensor([2, 0, 1])),
    "act_norm": used_act_norm,
    "lu": lambda: Invertible1x1Conv(3),
    "plain": lambda: Invertible1x1Conv(3, lu=False),
    "coupling": lambda: GlowCoupling(3, nn.Identity()),
}
every_layer = pytest.mark.parametrize("name", CHANNEL_LAYERS)


@every_layer
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3, 3), (2, 2, 3, 3), (2, 3, 5), (2, 3, 1, 1, 1), (3,)])
def test_wrong_channels_are_named(name, shape):
    layer = CHANNEL_LAYERS[name]()
    expected = re.escape(f"expected shape (B, 3) or (B, 3, H, W), got {shape}")
    for argument, direction in (("x", layer), ("z", layer.inverse)):
        with pytest.raises(ValueError, match=f"^{argument}: {expected}$"):
            direction(torch.zeros(shape))


@every_layer
def test_wrong_channels_of_a_flow_are_named(name):
    layer = CHANNEL_LAYERS[name]()
    for shape in ((4,), (4, 2, 2), (3, 2), (3, 2, 2, 2), ()):
        expected = re.escape(f"channels: expected 3, as in (3,) or (3, H, W), got {shape}")
        with pytest.raises(ValueError, match=f"^{expected}$"):
            layer.output_shape(shape)
    for shape in ((3,), (3, 5, 2)):
        assert layer.output_shape(shape) == shape


@pytest.mark.parametrize("make", [ChannelBijection, ActNorm, Invertible1x1Conv])
@pytest.mark.parametrize("channels", [0, -2])
def test_no_channel_is_refused(make, channels):
    with pytest.raises(ValueError, match=f"^channels: expected at least 1, got {channels}$"):
        make(channels)


# --- ActNorm ----------------------------------------------------------------------------------------------------------


@vectors_and_images
def test_the_first_batch_leaves_standardised(shape):
    """Every channel has mean 0 and standard deviation 1; the log-det is H W sum s, where s = -log std."""
    x = spread(shape)
    layer = used_act_norm(shape, torch.float64)
    z, contribution = layer(x)
    mean, std = mean_and_std(z)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-12, atol=0)
    mean, std = mean_and_std(x)
    torch.testing.assert_close(z, (x - per_channel(mean, shape)) / per_channel(std, shape))
    expected = -math.prod(shape[2:]) * std.log().sum()
    torch.testing.assert_close(contribution, expected.expand(len(x)))
    assert expected.abs() > 0.1


@vectors_and_images
@torch.no_grad()
def test_act_norm_is_its_formula_in_either_mode(shape):
    """z = e^s x + b in each channel, and s and b are parameters."""
    x = spread(shape)
    layer = used_act_norm(shape, torch.float64)
    scale, bias = torch.tensor([2.0, 0.5, 3.0]).double(), torch.tensor([1.0, -1.0, 0.25]).double()
    layer.log_scale.copy_(scale.log())
    layer.bias.copy_(bias)
    for training in (True, False):
        z, contribution = layer.train(training)(x)
        torch.testing.assert_close(z, per_channel(scale, shape) * x + per_channel(bias, shape))
        torch.testing.assert_close(contribution.exp(), torch.full((len(x),), 3.0 ** math.prod(shape[2:])).double())
        torch.testing.assert_close(layer.inverse(z), x)
    assert {name for name, _ in layer.named_parameters()} == {"log_scale", "bias"}


def test_a_second_initialisation_changes_nothing():
    layer = used_act_norm()
    state = copy.deepcopy(layer.state_dict())
    layer.initialize(9 + 3 * torch.randn(8, 3))
    layer.initialize(torch.zeros(1, 7))  # the layer does not look at the data
    assert_same_state(layer, state)


def by_state_dict(layer: ActNorm, tmp_path) -> ActNorm:
    other = ActNorm(3)
    other.load_state_dict(layer.state_dict())
    return other


def by_checkpoint(layer: ActNorm, tmp_path) -> ActNorm:
    other = ActNorm(3)
    checkpoint.save(tmp_path / "layer", layer.state_dict(), {})
    checkpoint.load_into(other, checkpoint.load(tmp_path / "layer")[0], "layer")
    return other


@pytest.mark.parametrize("duplicate", [by_state_dict, by_checkpoint, lambda layer, _: copy.deepcopy(layer)])
def test_a_loaded_act_norm_is_not_initialised_again(tmp_path, duplicate):
    """The flag is part of the state, so new data do not undo what was learned."""
    layer = used_act_norm()
    randomize(layer)  # as training does
    other = duplicate(layer, tmp_path)
    x = torch.randn(8, 3)
    other.initialize(5 * x + 2)
    assert_same_state(other, layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])
    assert torch.equal(other.inverse(x), layer.inverse(x))
    fresh = duplicate(ActNorm(3), tmp_path)  # the state also says that it was not initialised
    with pytest.raises(ValueError, match=NOT_YET):
        fresh(x)
    fresh.initialize(x)
    assert mean_and_std(fresh(x)[0])[0].abs().max() < 1e-6


@vectors_and_images
@pytest.mark.parametrize("training", [True, False])
def test_act_norm_before_its_first_batch_is_refused(shape, training):
    layer = ActNorm(3).train(training)
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=NOT_YET):
            direction(torch.zeros(shape))


def test_a_flow_with_an_act_norm_before_its_first_batch_is_refused():
    flow = Flow([ActNorm(2)], StandardNormal(), (2,))
    for call in (lambda: flow(torch.zeros(3, 2)), lambda: flow.sample(3)):
        with pytest.raises(ValueError, match=NOT_YET):
            call()


def constant_channels(shape: Shape, constant: list[int], value: float) -> Tensor:
    x = spread(shape, torch.float32)
    x[:, constant] = value
    return x


@pytest.mark.parametrize(
    ("x", "constant"),
    [
        (constant_channels((16, 3), [1], 0.0), [1]),
        (constant_channels((16, 3), [2], 0.1), [2]),  # no float32: a computed mean is not quite the value
        (constant_channels((5, 3, 4, 2), [0], 1 / 3), [0]),
        (constant_channels((5, 3, 4, 2), [0, 2], -1e6 / 7), [0, 2]),
        (constant_channels((1, 3), [], 0.0), [0, 1, 2]),  # one row has no standard deviation
        (constant_channels((1, 3, 1, 1), [], 0.0), [0, 1, 2]),
    ],
    ids=["zero", "tenth", "third", "two", "one row", "one pixel"],
)
def test_constant_channels_are_refused_by_number(x, constant):
    layer = ActNorm(3)
    state = copy.deepcopy(layer.state_dict())
    message = f"x: expected a first batch whose channels vary, got constant channels {constant}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer.initialize(x)
    assert_same_state(layer, state)
    with pytest.raises(ValueError, match=NOT_YET):
        layer(x)
    layer.initialize(spread((16, 3), torch.float32))  # another batch will do
    assert layer.initialized


@pytest.mark.parametrize("shape", [(16, 3), (5, 3, 4, 2)], ids=["vectors", "images"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", [[1], [0, 2]])
def test_a_first_batch_that_is_not_finite_is_refused_by_channel(shape, bad, broken):
    """One value is enough, and the layer stays as it was. The message distinguishes NaN from a constant channel."""
    layer = ActNorm(3)
    state = copy.deepcopy(layer.state_dict())
    x = constant_channels(shape, [1 if broken == [0, 2] else 2], 4.0)
    x[2, broken] = bad
    message = f"x: expected a first batch of finite values, got NaN or infinity in channels {broken}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer.initialize(x)
    assert_same_state(layer, state)
    with pytest.raises(ValueError, match=NOT_YET):
        layer(x)


def test_a_convolution_that_is_not_finite_on_the_first_batch_is_refused():
    layer = ActNormConv(2, 3, 1)
    x = torch.randn(8, 2, 5, 4)
    x[3, 1, 0, 2] = math.inf
    with pytest.raises(ValueError, match=re.escape("got NaN or infinity in channels [0, 1, 2]")):
        layer.initialize(x)
    assert not layer.initialized


def test_that_an_act_norm_is_initialised_is_asked_once(monkeypatch):
    """On a GPU each look at the buffer makes the CPU wait; a layer that refused its batch looks again."""
    layer, x = ActNorm(3), spread((16, 3), torch.float32)
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=NOT_YET):
            direction(x)
    layer.initialize(x)
    expected = layer(x)[0], layer.inverse(x)
    monkeypatch.setattr(Tensor, "__bool__", lambda _: pytest.fail("the buffer was asked again"))
    found = layer(x)[0], layer.inverse(x)
    monkeypatch.undo()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_an_act_norm_remembers_nothing_that_its_state_does_not_say():
    """The cached answer is not part of the state: a new layer follows the state dict, whether yes or no."""
    used, x = used_act_norm(), spread((16, 3), torch.float32)
    used(x)
    no = copy.deepcopy(used.state_dict())
    no["initialized"].fill_(False)
    assert set(no) == {"log_scale", "bias", "initialized"}
    for state, refuses in ((no, True), (used.state_dict(), False)):
        layer = ActNorm(3)
        layer.load_state_dict(state)
        for direction in (layer, layer.inverse):
            if refuses:
                with pytest.raises(ValueError, match=NOT_YET):
                    direction(x)
            else:
                direction(x)


@torch.no_grad()
def test_one_image_is_enough_to_initialise():
    x = torch.arange(8.0).view(1, 2, 2, 2)
    layer = ActNorm(2)
    layer.initialize(x)
    mean, std = mean_and_std(layer(x)[0])
    torch.testing.assert_close((mean, std), (torch.zeros(2), torch.ones(2)), rtol=0, atol=1e-6)


def test_act_norm_names_a_first_batch_of_other_channels():
    layer = ActNorm(3)
    with pytest.raises(ValueError, match=re.escape("x: expected shape (B, 3) or (B, 3, H, W), got (5, 4)")):
        layer.initialize(torch.randn(5, 4))
    assert not layer.initialized


@torch.no_grad()
def test_each_act_norm_of_a_chain_sees_what_the_ones_before_it_make():
    layers = [ActNorm(3), Invertible1x1Conv(3), Rescale(7.0), ActNorm(3)]
    chain = Chain(layers).double()
    x = spread((64, 3))
    chain.initialize(x)
    for end in (1, 4):
        mean, std = mean_and_std(Chain(layers[:end])(x)[0])
        torch.testing.assert_close(mean, torch.zeros(3).double(), rtol=0, atol=1e-10)
        torch.testing.assert_close(std, torch.ones(3).double())


@pytest.mark.parametrize("ema", [None, 0.5])
def test_training_keeps_the_flag_of_an_act_norm(ema):
    """This includes the average: a flow that fit returns needs no first batch."""
    torch.manual_seed(0)
    flow = Flow([ActNorm(2)], StandardNormal(), (2,))
    data = 3 * torch.randn(32, 2) + 5
    fit(flow, data, 3, batch_size=16, ema=ema, held_out=data)
    assert flow.chain[0].initialized
    state = copy.deepcopy(flow.state_dict())
    flow.initialize(torch.randn(8, 2))
    assert_same_state(flow, state)
    assert flow.sample(200).mean().item() == pytest.approx(5, abs=1)


# --- the invertible 1x1 convolution -----------------------------------------------------------------------------------


def matrix_of(layer: Invertible1x1Conv) -> Tensor:
    """W, column by column, as the layer's outputs for the unit vectors."""
    some = next(layer.parameters())
    with torch.no_grad():
        return layer(torch.eye(layer.channels, dtype=some.dtype))[0].T


def conv(channels: int, lu: bool, scale: float = 0.3, seed: int = 0) -> Invertible1x1Conv:
    """A 1x1 convolution in float64 with random parameters."""
    torch.manual_seed(seed)
    layer = Invertible1x1Conv(channels, lu).double()
    randomize(layer, scale)
    return layer


@both_kinds
@pytest.mark.parametrize("size", [(2, 4), (2, 2), (1, 1)])
@torch.no_grad()
def test_conv_mixes_the_channels_at_every_pixel(lu, size):
    """Vectors and pixels, more or fewer than the channels, meet the same matrix; the log-det is H W log|det W|."""
    layer = conv(5, lu)
    weight = matrix_of(layer)
    assert (weight - weight.T).abs().max() > 0.1
    x = torch.randn(3, 5, *size, dtype=torch.float64)
    z, contribution = layer(x)
    torch.testing.assert_close(z, torch.einsum("ij,bjhw->bihw", weight, x))
    log_det = torch.linalg.slogdet(weight).logabsdet
    assert log_det.abs() > 0.1
    torch.testing.assert_close(contribution, (math.prod(size) * log_det).expand(3))
    torch.testing.assert_close(layer.inverse(z), x)
    turned = x.contiguous(memory_format=torch.channels_last).flip(0)
    torch.testing.assert_close(layer(turned)[0], z.flip(0))
    y, contribution = layer(x[..., -1, 0])
    torch.testing.assert_close(y, z[..., -1, 0])
    torch.testing.assert_close(contribution, log_det.expand(3))
    torch.testing.assert_close(layer.inverse(y), x[..., -1, 0])


@pytest.mark.parametrize("channels", [1, 2, 7, 12])
@torch.no_grad()
def test_lu_and_plain_are_the_same_map(channels):
    """Both forms of one matrix agree in both directions."""
    lu, plain = conv(channels, True), conv(channels, False)
    plain.weight.copy_(matrix_of(lu))
    for shape in ((6, channels), (2, channels, 3, 1)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(lu(x), plain(x))
        torch.testing.assert_close(lu.inverse(x), plain.inverse(x))


@both_kinds
@pytest.mark.parametrize("channels", [1, 3, 48])
@torch.no_grad()
def test_conv_starts_as_a_random_rotation(lu, channels):
    torch.manual_seed(0)
    layer = Invertible1x1Conv(channels, lu)
    weight = matrix_of(layer)
    torch.testing.assert_close(weight @ weight.T, torch.eye(channels), rtol=0, atol=1e-5)
    x = torch.randn(2, channels, 4, 3)
    z, contribution = layer(x)
    torch.testing.assert_close(z.square().sum(1), x.square().sum(1), rtol=1e-4, atol=1e-5)
    assert contribution.abs().max() < 12 * 1e-5
    if channels > 1:
        other = matrix_of(Invertible1x1Conv(channels, lu))
        assert (other - weight).abs().max() > 0.1
        assert (weight - torch.eye(channels)).abs().max() > 0.1


def test_lu_is_the_default():
    assert set(Invertible1x1Conv(3).state_dict()) == set(Invertible1x1Conv(3, lu=True).state_dict())
    assert "LU" in repr(Invertible1x1Conv(3))
    assert "plain" in repr(Invertible1x1Conv(3, lu=False))


@both_kinds
@pytest.mark.parametrize("channels", [1, 4, 6])
def test_conv_learns_every_entry_of_its_matrix(lu, channels):
    """Each of C^2 numbers gets a gradient from z alone; those of the determinant get one from log|det W|."""
    layer = conv(channels, lu)
    (parameter,) = layer.parameters()
    assert parameter.numel() == channels**2
    x = torch.randn(8, channels, 2, 1, dtype=torch.float64)
    z, contribution = layer(x)
    (z.sin() * torch.randn_like(z)).sum().backward(retain_graph=True)
    assert (parameter.grad.abs() > 1e-6).all()
    parameter.grad = None
    contribution.sum().backward()
    expected = 16 * torch.eye(channels).double() if lu else 16 * torch.linalg.inv(parameter.detach()).T
    torch.testing.assert_close(parameter.grad, expected)


@torch.no_grad()
def test_permutation_and_signs_of_lu_are_state_and_not_learned():
    """Two layers that started from other matrices are equal after loading; both buffers move with the module."""
    layer, other = conv(6, True), conv(6, True, seed=3)
    assert not torch.equal(layer.permutation, other.permutation)
    assert not torch.equal(layer.sign, other.sign)
    buffers = {name for name, _ in layer.named_buffers()}
    assert buffers == {"permutation", "sign"} <= layer.state_dict().keys()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(matrix_of(other), matrix_of(layer), rtol=0, atol=0)
    assert (layer.sign.abs() == 1).all()
    assert torch.equal(layer.permutation.sum(0), torch.ones(6).double())
    assert torch.equal(layer.permutation.sum(1), torch.ones(6).double())
    assert not torch.equal(layer.permutation, layer.permutation.T)
    assert layer.to("meta").permutation.device.type == layer.sign.device.type == "meta"


@torch.no_grad()
def test_lu_is_its_formula():
    """W = P L (U + diag(s)): L has a unit diagonal, and the diagonal of the upper factor has the fixed signs."""
    layer = conv(6, True)
    product = layer.permutation.T @ matrix_of(layer)
    minors = torch.stack([torch.linalg.det(product[:n, :n]) for n in range(1, 7)])  # of L's ones, so those of U
    scale = minors / torch.cat([torch.ones(1).double(), minors[:-1]])
    assert torch.equal(scale.sign(), layer.sign)
    assert len(layer.sign.unique()) == 2
    torch.testing.assert_close(scale.abs().log().sum(), layer(torch.zeros(1, 6).double())[1][0])


def descend(layer: Invertible1x1Conv, target: Tensor, steps: int) -> Tensor:
    """Move a matrix towards another one by plain gradient descent."""
    x = torch.eye(len(target), dtype=target.dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x)[0].T - target).square().sum().backward()
        optimizer.step()
    return matrix_of(layer)


def test_lu_cannot_become_singular():
    """On the way to a W with one row negated, a plain determinant goes through 0; that of LU keeps its sign."""
    signs = set()
    for lu in (True, False):
        torch.manual_seed(1)
        layer = Invertible1x1Conv(4, lu).double()
        start = matrix_of(layer)
        target = start.clone()
        target[0] *= -1
        end = descend(layer, target, 400)
        before, after = torch.linalg.slogdet(start), torch.linalg.slogdet(end)
        signs.add((lu, bool(before.sign == after.sign)))
        if lu:
            x = torch.randn(5, 4, dtype=torch.float64)
            assert end.isfinite().all()
            torch.testing.assert_close(layer.inverse(layer(x)[0]), x, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(layer(x)[1], after.logabsdet.expand(5))
            assert (end - start).abs().max() > 0.3
        else:
            torch.testing.assert_close(end, target)
    assert signs == {(True, True), (False, False)}


@both_kinds
@torch.no_grad()
def test_conv_of_many_channels_is_inverted_in_single_precision(lu):
    torch.manual_seed(0)
    layer = Invertible1x1Conv(48, lu)
    randomize(layer, 0.02)
    x = torch.randn(2, 48, 4, 4)
    z, _ = layer(x)
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(layer.inverse(z), x, rtol=0, atol=3e-5)
    torch.testing.assert_close(layer(layer.inverse(x))[0], x, rtol=0, atol=3e-5)


def test_channel_permutation_by_hand():
    """Channel i of z is channel order[i] of x; the order is state."""
    layer = ChannelPermutation(torch.tensor([2, 0, 1]))
    x = torch.tensor([[10.0, 11.0, 12.0]])
    for batch in (x, x.view(1, 3, 1, 1).repeat(2, 1, 2, 3)):
        z, contribution = layer(batch)
        assert torch.equal(z, torch.stack([batch[:, 2], batch[:, 0], batch[:, 1]], dim=1))
        assert torch.equal(contribution, torch.zeros(len(batch)))
        assert torch.equal(layer.inverse(z), batch)
    other = ChannelPermutation(torch.tensor([0, 1, 2]))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [0, 2], [-1, 0], [2, 1, 2], [0, 1, 3], [1, 2, 3, 4], [1], [[1, 0]]])
def test_channel_permutation_refuses_what_is_none(order):
    message = f"order: expected a permutation of 0 to {len(order) - 1}, got {order}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ChannelPermutation(torch.tensor(order))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([1, 0], "expected a tensor, got list"),
        (torch.tensor(1), "expected a permutation of 0 to 0, got 1"),
    ],
)
def test_an_order_of_another_form_is_refused(order, message):
    with pytest.raises(ValueError, match=f"^order: {message}$"):
        ChannelPermutation(order)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_an_order_of_another_type_is_refused(dtype):
    """As an index, a mask would select, and floats would fail only at the first call."""
    message = f"order: expected integers of type torch.int64, got {dtype}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ChannelPermutation(torch.tensor([1, 0], dtype=dtype))


def test_channel_permutation_of_no_channel_is_refused():
    with pytest.raises(ValueError, match=r"^channels: expected at least 1, got 0$"):
        ChannelPermutation(torch.tensor([], dtype=torch.long))


def test_an_order_is_compared_where_it_lies():
    """It is compared on its own device, not on the default device, which may be another."""
    order = torch.tensor([1, 0])
    with torch.device("meta"):
        layer = ChannelPermutation(order)
    assert layer.order.device.type == "cpu"


@pytest.mark.parametrize("channels", [4, 8, 12])
def test_the_order_of_phases_is_a_permutation_of_channels(channels):
    """Its order is state, and it knows its number of channels."""
    layer = PhaseOrder(channels)
    assert isinstance(layer, ChannelPermutation)
    assert layer.channels == channels
    assert set(layer.state_dict()) == {"order"}
    expected = [4 * c + phase for phase in (0, 3, 1, 2) for c in range(channels // 4)]
    assert layer.order.tolist() == expected
    x = torch.arange(float(channels)).expand(2, -1)
    assert layer(x)[0][0].tolist() == expected
    assert torch.equal(layer.inverse(layer(x)[0]), x)
    with pytest.raises(ValueError, match=f"^x: expected shape .*, got \\(2, {channels + 1}\\)$"):
        layer(torch.zeros(2, channels + 1))


# --- the coupling -----------------------------------------------------------------------------------------------------


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_coupling_in_numbers():
    """x = (1; 2, 3), scales 3/4 and 1/2, shifts 1 and -1: z = (1; (2 + 1) 3/4, (3 - 1) 1/2); the larger half moves."""
    network = Fixed(logit(0.75) - 2, logit(0.5) - 2, 1.0, -1.0)
    layer = GlowCoupling(3, network)
    x, context = torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 9)
    z, contribution = layer(x, context)
    torch.testing.assert_close(z, torch.tensor([[1.0, 2.25, 1.0]]))
    torch.testing.assert_close(contribution, torch.tensor([0.375]).log())
    torch.testing.assert_close(layer.inverse(z, context), x)
    assert network.seen[0].tolist() == [[1.0]]
    assert network.seen[1] is context


class Scaled(GlowCoupling):
    """A Glow coupling with another scale function."""

    def scale(self, h: Tensor) -> Tensor:
        return 1 + h.square()


def test_the_scale_of_a_coupling_can_be_replaced():
    """x = (1; 2, 3), scales 1 + 2^2 and 1 + 0.5^2, shifts 1 and -1, in both directions and in the log-det."""
    layer = Scaled(3, Fixed(2.0, -0.5, 1.0, -1.0))
    x = torch.tensor([[1.0, 2.0, 3.0]])
    z, contribution = layer(x)
    torch.testing.assert_close(z, torch.tensor([[1.0, 15.0, 2.5]]))
    torch.testing.assert_close(contribution, torch.tensor([6.25]).log())
    torch.testing.assert_close(layer.inverse(z), x)
    h = torch.tensor([0.0, -2.0])
    torch.testing.assert_close(GlowCoupling(2, nn.Identity()).scale(h), torch.tensor([1 / (1 + math.exp(-2)), 0.5]))


@torch.no_grad()
def test_a_scale_that_underflows_has_a_log_determinant_of_minus_infinity():
    layer = GlowCoupling(2, Fixed(-110.0, 0.0))
    assert layer(torch.ones(1, 2))[1].item() == -math.inf
    assert GlowCoupling(2, Fixed(-90.0, 0.0))(torch.ones(1, 2))[1].item() == pytest.approx(-88)


def test_the_bounded_coupling_in_numbers():
    """x = (1; 2, 3), h = (artanh 1/2, -40), gain 2: scales e and e^-2; shifts 1 and -1."""
    layer = BoundedGlowCoupling(3, Fixed(math.atanh(0.5), -40.0, 1.0, -1.0))
    assert layer.gain.item() == 1
    x = torch.tensor([[1.0, 2.0, 3.0]])
    for gain, scales in ((1.0, (math.exp(0.5), math.exp(-1))), (2.0, (math.e, math.exp(-2)))):
        with torch.no_grad():
            layer.gain.fill_(gain)
        z, contribution = layer(x)
        torch.testing.assert_close(z, torch.tensor([[1.0, 3 * scales[0], 2 * scales[1]]]))
        torch.testing.assert_close(contribution, torch.tensor([-0.5 * gain]))
        torch.testing.assert_close(layer.inverse(z), x)
    contribution.sum().backward()
    assert layer.gain.grad.item() == pytest.approx(-0.5)
    assert {name for name, _ in layer.named_parameters()} == {"gain"}


@pytest.mark.parametrize("h", [-1e30, -120.0, 120.0, 1e30])
@torch.no_grad()
def test_a_bounded_scale_neither_underflows_nor_overflows(h):
    """The scale of the released code loses the image at -120 and below."""
    layer, x = BoundedGlowCoupling(4, Fixed(h, h, 1.0, -1.0)), torch.tensor([[5.0, 6.0, 2.0, 3.0]])
    z, contribution = layer(x)
    assert contribution.item() == pytest.approx(math.copysign(2, h))
    torch.testing.assert_close(layer.inverse(z), x)
    assert GlowCoupling(4, layer.network)(x)[1].isfinite().item() == (h > 0)


def glow_coupling(channels: int, context: int = 0, scale: float = 0.3, **options) -> GlowCoupling:
    """A coupling on images with a GlowNet inside, initialised and with random parameters."""
    torch.manual_seed(0)
    passes = channels // 2
    layer = GlowCoupling(channels, GlowNet(passes, 2 * (channels - passes), hidden=6, context=context, **options))
    layer.initialize(torch.randn(8, channels, 5, 4), torch.randn(8, context) if context else None)
    stir(layer, scale)
    return layer


@pytest.mark.parametrize("channels", [2, 5])
@torch.no_grad()
def test_coupling_is_its_formula(channels):
    """The first half is unchanged to the bit, and alone decides the second half's shifts and scales in (0, 1)."""
    layer = glow_coupling(channels).double()
    x = torch.randn(3, channels, 5, 4, dtype=torch.float64)
    z, contribution = layer(x)
    n = channels // 2
    h, shift = layer.network(x[:, :n]).tensor_split(2, dim=1)
    scale = (h + 2).sigmoid()
    assert (scale > 0).all()
    assert (scale < 1).all()
    assert scale.std() > 0.01
    torch.testing.assert_close(z[:, n:], (x[:, n:] + shift) * scale)
    torch.testing.assert_close(contribution, scale.log().sum((1, 2, 3)))
    for y in (z, layer.inverse(x)):
        assert torch.equal(y[:, :n], x[:, :n])
    torch.testing.assert_close(layer.inverse(z), x)
    other = x.clone()
    other[:, :n] += 1
    assert ((layer(other)[0] - z)[:, n:].abs() > 1e-6).all()
    other = x.clone()
    other[:, n:] += 1
    torch.testing.assert_close((layer(other)[0] - z)[:, n:], scale)


@pytest.mark.parametrize("h", [-50.0, -2.0, 40.0, 1e30])
@torch.no_grad()
def test_coupling_never_stretches(h):
    """A network whose output explodes reaches a scale of 1; far below 0 the logarithm is still right."""
    layer = GlowCoupling(2, Fixed(h, 0.25))
    x = torch.tensor([[3.0, -2.0]])
    z, contribution = layer(x)
    expected = -math.log1p(math.exp(-h - 2))
    assert contribution.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(z, torch.tensor([[3.0, -1.75 * math.exp(expected)]]))
    torch.testing.assert_close(layer.inverse(z), x)


@pytest.mark.parametrize("context", [0, 3])
def test_coupling_starts_with_one_scale_everywhere(context):
    """The scale is sigmoid(2), and the shift is 0."""
    layer = GlowCoupling(5, GlowNet(2, 6, hidden=8, context=context))
    x, c = torch.randn(4, 5, 3, 4), torch.randn(4, context) if context else None
    layer.initialize(x, c)
    z, contribution = layer(x, c)
    scale = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(z[:, 2:], scale * x[:, 2:])
    assert torch.equal(z[:, :2], x[:, :2])
    torch.testing.assert_close(contribution, torch.full((4,), 3 * 12 * math.log(scale)))


@pytest.mark.parametrize("shape", [(4,), (4, 1, 3)])
def test_coupling_obeys_a_vector_as_context(shape):
    """This holds in both directions, for vectors and for images."""
    if len(shape) == 1:
        torch.manual_seed(0)
        layer = GlowCoupling(4, MLP(2, 4, hidden=8, depth=1, context=2))
        randomize(layer)
    else:
        layer = glow_coupling(4, context=2)
    x, context = torch.randn(3, *shape), torch.randn(3, 2)
    z, _ = layer(x, context)
    torch.testing.assert_close(layer.inverse(z, context), x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(layer(x, context + 1)[0], z)
    assert not torch.allclose(layer.inverse(z, context + 1), x)
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=r"^context: expected shape \(B, 2.*\), got None$"):
            direction(x)


def test_coupling_needs_two_channels():
    with pytest.raises(ValueError, match=r"^channels: expected at least 2, one for each half, got 1$"):
        GlowCoupling(1, nn.Identity())
    with pytest.raises(ValueError, match=r"^channels: expected at least 1, got 0$"):
        GlowCoupling(0, nn.Identity())


@pytest.mark.parametrize("outputs", [1, 2, 4, 12])
def test_coupling_refuses_a_network_of_another_shape(outputs):
    """2 and 4 channels would split into halves, and the halves of 2 would broadcast."""
    layer = GlowCoupling(5, ZeroConv(2, outputs))
    message = f"network's output: expected shape (B, 6, 3, 1), got (2, {outputs}, 3, 1)"
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            direction(torch.zeros(2, 5, 3, 1))


# --- its networks -----------------------------------------------------------------------------------------------------

NETWORKS = {
    "glow_net": lambda context=0, **options: GlowNet(2, 4, hidden=6, context=context, **options),
    "resnet": lambda context=0, **options: ResNet(2, 4, hidden=6, blocks=1, context=context, **options),
    "zero_conv": lambda context=0: ZeroConv(2, 4, context=context),
}
every_network = pytest.mark.parametrize("name", NETWORKS)
zeroed = pytest.mark.parametrize("name", ["glow_net", "zero_conv"])
with_precision = pytest.mark.parametrize("name", ["glow_net", "resnet"])


def network(name: str, context: int = 0, scale: float = 0.3, **options) -> nn.Module:
    """A network from 2 to 4 channels, initialised if possible, then moved by random numbers of this scale."""
    torch.manual_seed(0)
    made = NETWORKS[name](context, **options)
    if hasattr(made, "initialize"):
        made.initialize(torch.randn(8, 2, 5, 4), torch.randn(8, context) if context else None)
    stir(made, scale)
    return made


@zeroed
@pytest.mark.parametrize("context", [0, 3])
def test_networks_start_at_zero(name, context):
    made = network(name, context, scale=0.0)
    x, c = 9 * torch.randn(3, 2, 5, 4), 9 * torch.randn(3, context) if context else None
    assert torch.equal(made(x, c), torch.zeros(3, 4, 5, 4))
    assert not torch.equal(network(name, context)(x, c), torch.zeros(3, 4, 5, 4))


@zeroed
@pytest.mark.parametrize("size", [(5, 4), (1, 1), (2, 7)])
@torch.no_grad()
def test_networks_keep_height_and_width(name, size):
    made = network(name)
    for batch in (0, 1, 3):
        y = made(torch.randn(batch, 2, *size))
        assert y.shape == (batch, 4, *size)
        assert y.dtype == torch.float32


@pytest.mark.parametrize(("name", "reach"), [("glow_net", 2), ("zero_conv", 1)])
def test_how_far_a_network_looks(name, reach):
    """3x3, 1x1, 3x3 see two pixels to each side; a single 3x3 sees one."""
    made = network(name).double()
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    seen = torch.zeros(7, 7, dtype=torch.bool)
    for output in made(x)[0, :, 3, 3]:
        seen |= torch.autograd.grad(output, x, retain_graph=True)[0][0].abs().sum(0) > 0
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[3 - reach : 4 + reach, 3 - reach : 4 + reach] = True
    assert torch.equal(seen, expected)


@every_network
@torch.no_grad()
def test_a_vector_as_context_is_the_same_at_every_pixel(name):
    made = network(name, context=3)
    x, vector = torch.randn(2, 2, 4, 5), torch.randn(2, 3)
    y = made(x, vector)
    torch.testing.assert_close(made(x, vector[..., None, None].repeat(1, 1, 4, 5)), y)
    for i in range(3):
        other = vector.clone()
        other[0, i] += 1
        assert ((made(x, other) - y)[0].flatten(1).abs().amax(1) > 1e-3).all()
        assert torch.equal(made(x, other)[1], y[1])
    image = torch.randn(2, 3, 4, 5)
    assert not torch.allclose(made(x, image), made(x, image.flip(3)))
    labels = torch.tensor([[0, 1, 0], [1, 0, 0]])  # integers, as one_hot gives them
    assert torch.equal(made(x, labels), made(x, labels.float()))


@every_network
@torch.no_grad()
def test_a_network_without_context_ignores_it(name):
    made = network(name)
    x = torch.randn(2, 2, 4, 5)
    for context in (torch.randn(2, 3), torch.randn(2, 3, 4, 5), torch.randn(7)):
        assert torch.equal(made(x, context), made(x))


@every_network
@pytest.mark.parametrize(
    "context",
    [None, torch.zeros(2, 2), torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 4)],
    ids=lambda context: "none" if context is None else "x".join(map(str, context.shape)),
)
def test_a_wrong_context_is_named(name, context):
    made = network(name, context=3)
    shape = "(B, 3)" if context is not None and context.dim() == 2 else "(B, 3, 4, 5)"
    message = f"context: expected shape {shape}, got {None if context is None else tuple(context.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        made(torch.zeros(2, 2, 4, 5), context)


@every_network
@torch.no_grad()
def test_the_output_has_the_type_of_the_input_and_the_ordinary_layout(name):
    made = network(name, context=3).double()
    x, context = torch.randn(2, 2, 4, 5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    y = made(x, context)
    assert y.dtype == torch.float64
    assert y.is_contiguous()
    assert made(x.contiguous(memory_format=torch.channels_last), context).is_contiguous()
    torch.testing.assert_close(made.float()(x.float(), context.float()), y.float(), rtol=1e-4, atol=1e-5)


@with_precision
@pytest.mark.parametrize("precision", [torch.float16, torch.float64, torch.int8])
def test_other_precisions_are_refused(name, precision):
    message = f"^precision: expected torch.float32 or torch.bfloat16, got {precision}$"
    with pytest.raises(ValueError, match=message):
        NETWORKS[name](precision=precision)
    with pytest.raises(ValueError, match=message):
        glow((1, 2, 2), scales=1, steps=1, hidden=2, precision=precision)


@with_precision
def test_bfloat16_is_near_float32(name):
    """A few roundings of 2^-9 make a few per cent at most, in the output and in the gradients."""
    exact, rounded = network(name, 1), network(name, 1, precision=torch.bfloat16)
    x, context = torch.randn(3, 2, 6, 5), torch.randn(3, 1)
    y, z = exact(x, context), rounded(x, context)
    assert z.dtype == torch.float32
    assert 1e-5 < (z - y).norm() / y.norm() < 0.03
    for made, output in ((exact, y), (rounded, z)):
        output.square().sum().backward()
        assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in made.parameters())
    ours, theirs = (torch.cat([p.grad.flatten() for p in made.parameters()]) for made in (exact, rounded))
    assert (ours - theirs).norm() / ours.norm() < 0.05


@torch.no_grad()
def test_bfloat16_inside_a_coupling_still_closes_the_round_trip():
    layer = glow_coupling(4, context=2, precision=torch.bfloat16)
    x, context = torch.randn(3, 4, 5, 4), torch.randn(3, 2)
    z, contribution = layer(x, context)
    assert z.dtype == contribution.dtype == torch.float32
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(layer.inverse(z, context), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["glow_net", "zero_conv"])
def test_networks_leave_zero(name, precision):
    """The first step moves only the last layer; after a few steps every parameter has a gradient."""
    options = {"precision": precision} if name == "glow_net" else {}
    made = network(name, 1, scale=0.0, **options)
    x, context, target = torch.randn(8, 2, 5, 4), torch.randn(8, 1), torch.randn(8, 4, 5, 4)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (made(x, context) - target).square().mean().backward()
        optimizer.step()
    for label, parameter in made.named_parameters():
        assert parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0, label


class Told(nn.Module):
    """A network that returns zeros, twice as many channels as its input or as many, and keeps what initialises it."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.told = times, []

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.told.append((x.clone(), context))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x).repeat(1, self.times, 1, 1)


def test_the_networks_inside_are_told_of_the_first_batch():
    """They see the same input and context as in forward; networks without an initialisation stay as they are."""
    x, context = torch.randn(5, 4, 2, 3), torch.randn(5, 7)
    mask = channel_mask((4, 2, 3), 1)
    layers = [
        (GlowCoupling(4, Told(2)), x[:, :2]),
        (AdditiveCoupling(mask, Told(1)), x * mask),
        (AffineCoupling(mask, Told(2)), x * mask),
    ]
    for layer, seen in layers:
        layer.initialize(x, context)
        ((told, with_context),) = layer.network.told
        assert torch.equal(told, seen)
        assert with_context is context
    prior, inner = Told(2), Told(2)
    FactorOut((4, 2, 3), [GlowCoupling(2, inner)], prior).initialize(x, context)
    for made, seen in ((prior, x[:, :2]), (inner, x[:, :1])):
        ((told, with_context),) = made.told
        assert torch.equal(told, seen)
        assert with_context is context
    GlowCoupling(4, nn.Identity()).initialize(x, context)
    FactorOut((4, 2, 3), []).initialize(x, context)


def relu_inputs(made: GlowNet, x: Tensor, context: Tensor | None) -> list[Tensor]:
    """The input of each nonlinearity."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        for module in made.modules()
        if isinstance(module, nn.ReLU)
    ]
    made(x, context)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("context", [0, 3])
@torch.no_grad()
def test_a_first_batch_standardises_what_reaches_the_nonlinearities(context):
    """This holds in every channel, for images of any brightness and labels, once: the state remembers it."""
    torch.manual_seed(0)
    made = GlowNet(2, 4, hidden=6, context=context).double()
    x = 5 + 20 * torch.randn(16, 2, 5, 4, dtype=torch.float64)
    c = torch.randn(16, context, dtype=torch.float64) if context else None
    made.initialize(x, c)
    seen = relu_inputs(made, x, c)
    assert len(seen) == 2
    for h in seen:
        mean, std = mean_and_std(h)
        assert len(mean) == 6
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-10)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=1e-10, atol=0)
    assert torch.equal(made(x, c), torch.zeros(16, 4, 5, 4, dtype=torch.float64))
    stir(made, 0.3)
    state = copy.deepcopy(made.state_dict())
    made.initialize(x + 1, c)
    assert_same_state(made, state)
    fresh = GlowNet(2, 4, hidden=6, context=context).double()
    fresh.load_state_dict(state)
    fresh.initialize(x + 1, c)
    assert_same_state(fresh, state)
    assert torch.equal(fresh(x, c), made(x, c))


@torch.no_grad()
def test_act_norm_conv_is_a_convolution_and_an_act_norm():
    """This holds on the first batch and on others; before initialisation it is a convolution alone."""
    torch.manual_seed(0)
    layer = ActNormConv(2, 3, 3).double()
    conv = copy.deepcopy(layer)
    x, other = 3 + torch.randn(8, 2, 5, 4, dtype=torch.float64), torch.randn(2, 2, 1, 3, dtype=torch.float64)
    torch.testing.assert_close(conv(-2 * x), -2 * conv(x))
    norm = ActNorm(3).double()
    norm.initialize(conv(x))
    layer.initialize(x)
    for batch in (x, other):
        torch.testing.assert_close(layer(batch), norm(conv(batch))[0])
    layer.initialize(2 * x)
    torch.testing.assert_close(layer(x), norm(conv(x))[0])


def test_act_norm_conv_refuses_a_constant_channel():
    layer = ActNormConv(2, 3, 1)
    with pytest.raises(ValueError, match=re.escape("got constant channels [0, 1, 2]")):
        layer.initialize(torch.ones(8, 2, 5, 4))
    x = torch.randn(8, 2, 5, 4)
    layer.initialize(x)  # it was not done
    assert (mean_and_std(layer(x))[1] - 1).abs().max() < 1e-5


# --- the model --------------------------------------------------------------------------------------------------------

MODELS = [((1, 2, 2), 1), ((1, 4, 6), 1), ((3, 4, 8), 2), ((1, 8, 16), 3)]
every_model = pytest.mark.parametrize(
    ("shape", "scales"), MODELS, ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
)


def levels_of(shape: Shape, levels: int = 256) -> Tensor:
    """Images in which every level occurs at every place, (levels, *shape), bytes."""
    k = torch.arange(levels).view(-1, 1) + torch.randperm(levels)[torch.arange(math.prod(shape)) % levels]
    return (k % levels).to(torch.uint8).reshape(-1, *shape)


def labels_of(n: int, classes: int) -> Tensor | None:
    return nn.functional.one_hot(torch.arange(n) % classes, classes).float() if classes else None


def small(shape: Shape, scales: int, levels: int = 256, seed: int = 0, scale: float = 0.1, **options) -> Flow:
    """A small Glow, initialised on every level and then moved by random numbers, in evaluation mode."""
    torch.manual_seed(seed)
    flow = glow(shape, levels=levels, scales=scales, **{"steps": 2, "hidden": 4, **options})
    flow.initialize(levels_of(shape, levels), labels_of(levels, options.get("classes", 0)))
    stir(flow, scale)
    return flow.eval()


def nats_of(flow: Flow, k: Tensor, context: Tensor | None = None, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return flow(k, context)


def kernels(network: nn.Module) -> list[Tensor]:
    """The kernels of a flow's convolutions in order, each (outputs, inputs, height, width)."""
    return [parameter for parameter in network.parameters() if parameter.dim() == 4]


@every_model
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("lu", [True, False])
def test_glow_is_its_list_of_layers(shape, scales, classes, bounded, lu):
    """At every scale except the last: a squeeze, steps of three layers, a half factored out under a learned prior."""
    options = {"scales": scales, "steps": 3, "hidden": 5, "classes": classes, "lu": lu, "precision": torch.bfloat16}
    flow = glow(shape, levels=32, bounded=bounded, **options)
    layers = list(flow.chain)
    assert [type(layer) for layer in layers[:2]] == [UniformDequantize, Rescale]
    assert (flow.levels, layers[0].levels, layers[1].scale) == (32, 32, 1 / 32)
    layers, here = layers[2:], shape
    for left in range(scales - 1, -1, -1):
        channels, *size = (4 * here[0], here[1] // 2, here[2] // 2)
        steps = [ActNorm, Invertible1x1Conv, BoundedGlowCoupling if bounded else GlowCoupling] * 3
        assert [type(layer) for layer in layers] == [Squeeze, *steps, *([FactorOut] if left else [])]
        for i in range(3):
            norm, mix, coupling = layers[1 + 3 * i : 4 + 3 * i]
            assert norm.channels == mix.channels == coupling.channels == channels
            assert mix.lu is lu
            assert isinstance(coupling.network, GlowNet)
            assert (coupling.network.context, coupling.network.precision) == (classes, torch.bfloat16)
            assert [len(kernel) for kernel in kernels(coupling.network)] == [5, 5, channels]
        if left:
            assert layers[-1].shape == (channels, *size)
            assert isinstance(layers[-1].prior, ZeroConv)
            assert layers[-1].prior.context == classes
            layers, here = list(layers[-1].inner), (channels // 2, *size)
    assert isinstance(flow.base, StandardNormal)
    assert flow.latent_shape == ((channels, *size) if scales == 1 else (math.prod(shape),))
    assert (flow.shape, flow.dims) == (shape, math.prod(shape))


def test_glow_has_the_defaults_of_the_paper():
    flow = glow((1, 8, 8), hidden=2)
    assert flow.levels == 256
    steps = []
    layers = flow.chain
    while True:
        steps.append(sum(type(layer) is GlowCoupling for layer in layers))
        if not isinstance(layers[-1], FactorOut):
            break
        layers = layers[-1].inner
    assert steps == [32, 32, 32]
    network, mix = flow.chain[5].network, flow.chain[4]
    assert (network.precision, network.context, mix.lu) == (torch.float32, 0, True)
    wide = glow((1, 2, 2), scales=1, steps=1).chain[5].network
    assert [len(kernel) for kernel in kernels(wide)] == [512, 512, 4]


def test_glow_is_drawn_layer_by_layer_a_prior_before_what_is_inside():
    """A seed always gives the same weights, those from which the records were trained."""
    torch.manual_seed(0)
    flow = glow((1, 4, 4), scales=2, steps=1, hidden=6)
    torch.manual_seed(0)
    network, mix, prior = GlowNet(2, 4, 6), Invertible1x1Conv(4), ZeroConv(2, 4)
    inner_network, inner_mix = GlowNet(4, 8, 6), Invertible1x1Conv(8)
    last = flow.chain[-1]
    for ours, made in (
        (flow.chain[5].network, network),
        (flow.chain[4], mix),
        (last.prior, prior),
        (last.inner[3].network, inner_network),
        (last.inner[2], inner_mix),
    ):
        assert_same_state(ours, made.state_dict())


@every_model
def test_a_bounded_glow_has_one_number_more_in_each_coupling(shape, scales):
    """It starts from the same draws: apart from the scales it is the same flow."""
    options = {"scales": scales, "steps": 3, "hidden": 5}
    states = []
    for bounded in (False, True):
        torch.manual_seed(0)
        states.append(glow(shape, bounded=bounded, **options).state_dict())
    usual, bounded = states
    gains = bounded.keys() - usual.keys()
    assert len(gains) == 3 * scales
    assert all(name.endswith(".gain") and bounded[name].shape == () and bounded[name] == 1 for name in gains)
    for name, value in usual.items():
        assert torch.equal(bounded[name], value), name


@torch.no_grad()
def test_one_scale_of_a_bounded_glow_gives_samples_whatever_its_networks_say():
    """With wild networks all samples are finite; with the released code's couplings none is."""
    for bounded in (True, False):
        flow = small((1, 8, 8), 1, bounded=bounded)
        for layer in flow.chain:
            if isinstance(layer, GlowCoupling):
                layer.network.layers[-1].weight.mul_(100)
        torch.manual_seed(1)
        drawn = Chain([*flow.chain][1:]).inverse(torch.randn(50, *flow.latent_shape))
        assert (drawn.flatten(1).isfinite().all(1) == bounded).all()


@every_model
@pytest.mark.parametrize("classes", [0, 3])
def test_glow_against_autograd(shape, scales, classes):
    """The log-determinant of the whole flow after the noise, and its inverse."""
    flow = small(shape, scales, classes=classes, scale=0.2).double()
    continuous = flow[1:]
    x, context = 256 * torch.rand(2, *shape, dtype=torch.float64), labels_of(2, classes)
    context = None if context is None else context.double()
    z, contribution = continuous.chain(x, context)
    dims = math.prod(shape)
    for i in range(2):
        c = None if context is None else context[i : i + 1]
        matrix = torch.autograd.functional.jacobian(lambda v, c=c: continuous.chain(v, c)[0].flatten(), x[i : i + 1])
        log_det = torch.linalg.slogdet(matrix.reshape(dims, dims)).logabsdet
        torch.testing.assert_close(contribution[i], log_det, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(continuous(x, context), StandardNormal().log_prob(z.flatten(1)) + contribution)
    torch.testing.assert_close(continuous.decode(continuous.encode(x, context), context), x, rtol=1e-9, atol=1e-9)


@every_model
@torch.no_grad()
def test_encode_and_decode_every_level(monkeypatch, shape, scales):
    """The noise avoids the edges of a level, which float32 may round into the next level."""
    rand_like = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda like: 0.01 + 0.98 * rand_like(like))
    flow = small(shape, scales)
    k = levels_of(shape)
    z = flow.encode(k)
    assert z.shape == (256, math.prod(shape))
    assert torch.equal(flow.decode(z), k.long())
    pieces = split_latent(flow.chain, z)
    assert [piece[0].numel() for piece in pieces] == [
        math.prod(shape) // n for n in {1: [1], 2: [2, 2], 3: [2, 4, 4]}[scales]
    ]


@pytest.mark.parametrize(("shape", "scales"), [((1, 4, 6), 1), ((3, 8, 4), 2), ((1, 8, 8), 3)])
@torch.no_grad()
def test_latents_after_the_first_batch(shape, scales):
    """The coarsest scale has mean 0 in every channel; the last coupling has shrunk one half from variance 1."""
    torch.manual_seed(0)
    flow = glow(shape, scales=scales, steps=3, hidden=4)
    k = levels_of(shape)
    torch.manual_seed(1)
    flow.initialize(k)
    torch.manual_seed(1)  # the same noise again
    last = split_latent(flow.chain, flow.encode(k))[-1]
    last = last.unflatten(1, flow.latent_shape) if last.dim() == 2 else last
    mean, std = mean_and_std(last)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-3)
    half = len(std) // 2
    shrunk = torch.cat([std[:half], std[half:] * (1 + math.exp(-2))])
    assert shrunk.square().mean().item() == pytest.approx(1, abs=1e-3)
    bits = flow.bits_per_dim(k)
    assert bits.isfinite().all()
    assert abs(bits.mean().item() - 8) < 1.5


@pytest.mark.parametrize("classes", [0, 2])
@torch.no_grad()
def test_glow_against_exact_enumeration(classes):
    """P(k) of all 16 images of 2 x 2 bits sums to nearly 1 for each label, and samples have these frequencies."""
    torch.manual_seed(0)
    flow = glow((1, 2, 2), levels=2, scales=1, steps=2, hidden=4, classes=classes).double()
    continuous = flow[1:]
    context = labels_of(1_000, classes)
    context = None if context is None else context.double()
    continuous.initialize(1 + 0.2 * torch.randn(1_000, 1, 2, 2, dtype=torch.float64), context)  # well within [0, 2)
    stir(flow, 0.2)
    k = torch.tensor(list(itertools.product((0, 1), repeat=4))).view(16, 1, 2, 2)
    within, weights = gauss(10, 4)
    within = within.view(-1, 1, 2, 2)
    n, found = 20_000, []
    for label in range(max(classes, 1)):

        def rows(count: int, label: int = label) -> Tensor | None:
            return None if context is None else context[label : label + 1].expand(count, -1)

        density = torch.stack([continuous(image + within, rows(len(within))).exp() for image in k])
        probability = density @ weights
        assert 0.97 < probability.sum() < 1 + 1e-4
        assert probability.max() > 2 * probability.min()
        found.append(probability)

        x = flow.sample(n, context=rows(n)).flatten(1)
        counts = torch.bincount(x @ torch.tensor([8, 4, 2, 1]), minlength=16).double()
        # Samples outside of the cube are clamped into it.
        error = 5 * (probability * (1 - probability) / n).sqrt() + (1 - probability.sum()).clamp(min=0)
        assert ((counts / n - probability).abs() < error).all()
    if classes:
        assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("scales", [1, 3])
@torch.no_grad()
def test_likelihood_depends_on_the_label(scales):
    """It does so by every coupling's network and every prior, and each image has its own label."""
    flow = small((1, 8, 8), scales, classes=3)
    k, context = levels_of((1, 8, 8))[:6], labels_of(6, 3)
    nats = nats_of(flow, k, context)
    other = context.clone()
    other[0] = context[1]
    assert ((nats_of(flow, k, other) - nats).abs() > 1e-3).tolist() == [True, *[False] * 5]
    networks = [layer.network for layer in flow.modules() if isinstance(layer, GlowCoupling)]
    networks += [layer.prior for layer in flow.modules() if isinstance(layer, FactorOut)]
    assert len(networks) == 2 * scales + scales - 1
    for made in networks:
        x = torch.zeros(1, kernels(made)[0].shape[1] - made.context, 2, 2)
        assert not torch.allclose(made(x, context[:1]), made(x, context[1:2]))


@torch.no_grad()
def test_labels_are_asked_for_and_have_their_width():
    flow = small((1, 4, 4), 2, classes=3)
    k = levels_of((1, 4, 4))[:5]
    calls = (flow, flow.log_prob, flow.encode, flow.initialize, flow.bits_per_dim)
    for call in (*(lambda c, f=f: f(k, c) for f in calls), lambda c: flow.sample(5, context=c)):
        for context in (None, torch.zeros(5, 2), torch.zeros(5, 4), torch.zeros(5)):
            shape = r"\(B, 3\), got \(5, [24]\)$" if context is not None and context.dim() == 2 else r"\(B, 3, "
            with pytest.raises(ValueError, match=f"^context: expected shape {shape}"):
                call(context)
        with pytest.raises(ValueError, match=r"^context: expected one row per example, 5 in all, got 1$"):
            call(torch.zeros(1, 3))


@torch.no_grad()
def test_without_classes_a_context_is_ignored():
    flow = small((1, 4, 4), 2)
    k = levels_of((1, 4, 4))[:5]
    assert torch.equal(nats_of(flow, k, torch.randn(5, 3)), nats_of(flow, k))
    torch.manual_seed(0)
    x = flow.sample(5, context=torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    assert torch.equal(x, flow.sample(5))


@torch.no_grad()
def test_samples_of_labels():
    """Each sample has one row of labels; at temperature 0 another label has another image."""
    flow = small((1, 4, 8), 2, classes=3, scale=0.3)
    context = labels_of(7, 3)
    x = flow.sample(7, context=context)
    assert x.shape == (7, 1, 4, 8)
    assert x.dtype == torch.long
    assert x.min() >= 0
    assert x.max() <= 255
    assert nats_of(flow, x, context).isfinite().all()
    x = flow.sample(7, temperature=0.0, context=context)
    for i, j in itertools.combinations(range(7), 2):
        assert torch.equal(x[i], x[j]) == (i % 3 == j % 3)


def test_gradients_reach_every_parameter():
    flow = small((1, 8, 8), 3, classes=3).train()
    flow.bits_per_dim(levels_of((1, 8, 8))[::8], labels_of(32, 3)).mean().backward()
    for label, parameter in flow.named_parameters():
        assert parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0, label


def test_a_copy_has_the_same_likelihood():
    """deepcopy and the state dict include the flags of the ActNorms, permutations and signs."""
    flow = small((1, 4, 4), 2, scale=0.2)
    k = levels_of((1, 4, 4))[::16]
    nats = nats_of(flow, k)
    assert torch.equal(nats_of(copy.deepcopy(flow), k), nats)
    fresh = glow((1, 4, 4), scales=2, steps=2, hidden=4)
    with pytest.raises(ValueError, match=NOT_YET):
        fresh(k)
    fresh.load_state_dict(flow.state_dict())
    assert torch.equal(nats_of(fresh, k), nats)
    fresh.initialize(k // 2)  # of no effect
    assert torch.equal(nats_of(fresh, k), nats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": 0}, "scales: expected at least 1, got 0"),
        ({"scales": -1}, "scales: expected at least 1, got -1"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"hidden": 0}, "hidden: expected at least 1, got 0"),
        ({"classes": 1}, "classes: expected 0 or at least 2, got 1"),
        ({"classes": -1}, "classes: expected 0 or at least 2, got -1"),
        ({"shape": (1, 5, 4)}, "shape: expected (C, H, W) with even height and width, got (1, 5, 4)"),
        ({"shape": (1, 4, 5)}, "shape: expected (C, H, W) with even height and width, got (1, 4, 5)"),
        ({"shape": (1, 6, 4)}, "shape: expected (C, H, W) with even height and width, got (2, 3, 2)"),
        ({"shape": (1, 2, 2)}, "shape: expected (C, H, W) with even height and width, got (2, 1, 1)"),
        ({"shape": (4, 4)}, "shape: expected (C, H, W) with even height and width, got (4, 4)"),
        ({"noise": -1}, "noise: expected at least 0 channels, got -1"),
    ],
)
def test_what_glow_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        glow(**{"shape": (1, 4, 4), "scales": 2, "steps": 1, "hidden": 2, **options})


# --- Glow of logits, with learned noise, with bounded priors ----------------------------------------------------------

OPTIONS = {"alpha": 0.05, "noise": 5, "bounded_priors": True}
each_option = pytest.mark.parametrize(
    "options", [*({name: value} for name, value in OPTIONS.items()), OPTIONS], ids=[*OPTIONS, "all"]
)
with_or_without_classes = pytest.mark.parametrize("classes", [0, 3])


@pytest.fixture
def in_float64():
    """A fixture that makes float64 the default type, which noise and new networks then have."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every_model
@pytest.mark.parametrize("noise", [0, 6])
@pytest.mark.parametrize("alpha", [None, 0.02])
def test_the_start_of_glow_is_its_list_of_layers(shape, scales, noise, alpha):
    """Noise, scale and an optional logit come first; the later layers do not depend on them."""
    options = {"levels": 32, "scales": scales, "steps": 1, "hidden": 5, "classes": 3, "precision": torch.bfloat16}
    flow = glow(shape, noise=noise, alpha=alpha, **options)
    dequantize, rescale, *layers = flow.chain
    assert type(dequantize) is (VariationalDequantize if noise else UniformDequantize)
    assert (flow.levels, dequantize.levels, rescale.scale) == (32, 32, 1 / 32)
    logits = layers[:1] if alpha else []
    assert [(type(layer), layer.alpha) for layer in logits] == ([(Logit, 0.02)] if alpha else [])
    usual = [*glow(shape, **options).chain][2:]
    assert [type(layer) for layer in layers[len(logits) :]] == [type(layer) for layer in usual]
    assert (flow.shape, flow.dims) == (shape, math.prod(shape))


@pytest.mark.parametrize("shape", [(1, 4, 6), (3, 2, 4)])
@with_or_without_classes
def test_the_noise_of_glow_is_two_couplings_that_see_the_image(shape, classes):
    """Each changes the pixels that the other leaves unchanged; no label enters."""
    options = {"scales": 1, "steps": 1, "hidden": 5, "classes": classes, "noise": 6, "precision": torch.bfloat16}
    couplings = list(glow(shape, **options).chain[0].noise)
    assert [type(coupling) for coupling in couplings] == [AffineCoupling] * 2
    channels = shape[0]
    for parity, coupling in enumerate(couplings):
        assert torch.equal(coupling.mask, checkerboard_mask(shape, parity))
        network = coupling.network
        assert type(network) is ResNet
        assert (network.context, network.precision) == (channels, torch.bfloat16)
        assert len(network.blocks) == 1
        assert (network.first.in_channels, network.first.out_channels) == (3 * channels, 6)
        assert (network.last.in_channels, network.last.out_channels) == (6, 2 * channels)


@every_model
@with_or_without_classes
def test_bounded_priors_are_those_of_glow_with_a_gain(shape, scales, classes):
    """They come from the same draws, so the flow starts as the usual one."""
    flows = []
    for bounded_priors in (False, True):
        torch.manual_seed(0)
        flows.append(
            glow(shape, scales=scales, steps=1, hidden=5, classes=classes, bounded_priors=bounded_priors).eval()
        )
    usual, bounded = ([m.prior for m in flow.modules() if isinstance(m, FactorOut)] for flow in flows)
    assert len(bounded) == len(usual) == scales - 1
    for prior, same in zip(bounded, usual, strict=True):
        assert type(prior) is BoundedPrior
        assert prior.gain == 1
        assert_same_state(prior.network, same.state_dict())
    state = {name.replace("prior.network.", "prior."): value for name, value in flows[1].state_dict().items()}
    gains = [name for name in state if name.endswith("prior.gain")]
    assert len(gains) == scales - 1
    assert_same_state(flows[0], {name: value for name, value in state.items() if name not in gains})
    k, context = levels_of(shape)[:8], labels_of(8, classes)
    for flow in flows:
        torch.manual_seed(1)
        flow.initialize(k, context)
    assert torch.equal(nats_of(flows[0], k, context), nats_of(flows[1], k, context))


def test_glow_without_its_options_is_glow():
    """Options that are missing or off give the same state from the same draws, also with a logit."""
    shape, size = (1, 8, 8), {"scales": 2, "steps": 2, "hidden": 4}
    states, next_draws = [], []
    for options in ({}, {"alpha": None, "noise": 0, "bounded_priors": False}, {"alpha": 0.05}):
        torch.manual_seed(0)
        flow = glow(shape, **size, **options)
        states.append(Chain([*flow.chain][3 if options.get("alpha") else 2 :]))
        assert all(".noise." not in name and ".gain" not in name for name in flow.state_dict())
        next_draws.append(torch.rand(()).item())
    assert len(set(next_draws)) == 1
    assert_same_state(states[1], states[0].state_dict())
    assert_same_state(states[2], states[0].state_dict())


def fitted(shape: Shape, classes: int, options: dict, steps: int = 3) -> tuple[Flow, Tensor, Tensor | None]:
    """A small Glow after a few steps on every level, with its images and labels."""
    torch.manual_seed(0)
    flow = glow(shape, scales=2, steps=1, hidden=4, classes=classes, **options)
    k, context = levels_of(shape), labels_of(256, classes)
    context = None if context is None else context.to(torch.get_default_dtype())
    fit(flow, k, steps, context=context, batch_size=128, lr=1e-2)
    return flow, k, context


@each_option
@with_or_without_classes
@pytest.mark.parametrize("shape", [(1, 8, 4), (3, 4, 8)])
def test_glow_with_its_options_leads_back_to_every_level(in_float64, shape, classes, options):
    flow, k, context = fitted(shape, classes, options)
    with torch.no_grad():
        assert flow.log_prob(k, context).isfinite().all()
        z = flow.encode(k, context)
        assert z.shape == (256, math.prod(shape))
        assert torch.equal(flow.decode(z, context), k.long())


@each_option
@with_or_without_classes
@pytest.mark.parametrize("shape", [(1, 8, 4), (3, 4, 8)])
def test_gradients_reach_every_parameter_of_glow_with_its_options(shape, classes, options):
    """They do so after the start, at which networks return zeros."""
    flow, k, context = fitted(shape, classes, options)
    flow.train().bits_per_dim(k, context).mean().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@each_option
def test_glow_with_its_options_learns(options):
    """A gradient through the noise makes the bound better; samples are levels."""
    torch.manual_seed(0)
    flow = glow((1, 8, 8), levels=17, scales=2, steps=2, hidden=16, **options)
    loss = fit(flow, digits().images, 60, batch_size=64, clip=50.0, lr=3e-3).loss
    bits = held_out_bits(flow)
    assert bits.isfinite().all()
    assert bits.mean() < loss[0] / (64 * math.log(2)) - 0.3
    drawn = flow.sample(20)
    assert drawn.dtype == torch.long
    assert 0 <= drawn.min() < drawn.max() <= 16


def test_the_noise_of_a_glow_with_labels_depends_on_the_image_alone():
    flow, k, context = fitted((1, 8, 4), 3, {"noise": 5})
    dequantize = flow.chain[0]

    def noise(k: Tensor, context: Tensor) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return dequantize(k, context)[0] - k.float()

    assert torch.equal(noise(k, context), noise(k, context.roll(1, 1)))
    assert (noise(k, context) - noise(255 - k, context)).abs().max() > 0.01
    assert not torch.equal(nats_of(flow, k, context), nats_of(flow, k, context.roll(1, 1)))


@torch.no_grad()
def test_the_logit_of_glow_keeps_samples_near_the_levels_there_are():
    """For every latent alpha bounds how far its pixels are from the unit interval: here 0.1 / 0.8."""
    flow = small((1, 8, 8), 1, alpha=0.1, bounded=True)
    pixels = Chain([*flow.chain][2:])
    torch.manual_seed(1)
    drawn = pixels.inverse(100 * torch.randn(50, *flow.latent_shape))
    assert -0.126 < drawn.min() < -0.12
    assert 1.12 < drawn.max() < 1.126
    usual = Chain([*small((1, 8, 8), 1, bounded=True).chain][2:])
    assert usual.inverse(100 * torch.randn(50, *flow.latent_shape)).abs().max() > 2


@pytest.mark.parametrize("alpha", [0, 0.5, -0.1, 1.0])
def test_an_alpha_of_glow_that_is_out_of_range_is_named(alpha):
    with pytest.raises(ValueError, match=f"^alpha: expected a number between 0 and 1/2, got {alpha}$"):
        glow((1, 4, 4), scales=2, steps=1, hidden=2, alpha=alpha)


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compilable(classes: int = 3, seed: int = 0, bounded: bool = False) -> tuple[Flow, Tensor, Tensor | None]:
    """A Glow with two scales that is not initialised, with data and labels."""
    torch.manual_seed(seed)
    flow = glow((1, 4, 4), levels=17, scales=2, steps=1, hidden=4, classes=classes, bounded=bounded)
    return flow, torch.randint(17, (24, 1, 4, 4)), labels_of(24, classes)


@pytest.mark.parametrize("used", [False, True], ids=["loaded", "used"])
@pytest.mark.parametrize("bounded", [False, True])
def test_glow_with_classes_compiles_to_one_graph(fresh_compiler, bounded, used):
    """No check looks at a value, whether the ActNorms have been used before or only loaded."""
    flow, k, context = compilable(bounded=bounded)
    flow.initialize(k, context)
    if not used:
        other = compilable(seed=1, bounded=bounded)[0]
        other.load_state_dict(flow.state_dict())
        flow = other
    explained = torch._dynamo.explain(flow)(k, context)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


def test_a_flow_on_real_numbers_compiles_to_one_graph(fresh_compiler):
    """A check for finite values would break the graph."""
    flow = Flow([ActNorm(2), Invertible1x1Conv(2)], StandardNormal(), (2,))
    x = torch.randn(8, 2)
    flow.initialize(x)
    explained = torch._dynamo.explain(flow)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


def test_a_compiled_glow_is_trained_to_the_same_losses(fresh_compiler):
    """Parameters and average have the same names and values, so uncompiled programs can load them."""
    losses, states, nats = [], [], []
    for compiled in (False, True):
        flow, k, context = compilable()
        keys = list(flow.state_dict())
        if compiled:
            flow.compile(backend="eager")
        assert list(flow.state_dict()) == keys
        torch.manual_seed(1)
        losses.append(fit(flow, k, 4, context=context, batch_size=8, lr=1e-2, ema=0.5).loss)
        assert list(flow.state_dict()) == keys
        states.append(flow.state_dict())
        nats.append(nats_of(flow, k, context))
        plain = compilable(seed=1)[0]
        plain.load_state_dict(flow.state_dict())
        torch.testing.assert_close(nats_of(plain, k, context), nats[-1])
    assert len(set(losses[0])) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*nats, rtol=1e-4, atol=1e-4)


def test_what_a_compiled_flow_still_checks(fresh_compiler):
    """It checks shapes, which a graph knows, but not values; methods other than forward check as usual."""
    flow, k, context = compilable()
    flow.initialize(k, context)
    flow.compile(backend="eager")
    high = k.clone()
    high[0] = 17
    assert flow(high, context).shape == (24,)
    for call in (flow.encode, flow.initialize):
        with pytest.raises(ValueError, match=r"^x: expected integers from 0 to 16, got values from 0 to 17$"):
            call(high, context)
    for bad, message in (
        ((k[:, :, :2], context), "x: expected shape (B, 1, 4, 4), got (24, 1, 2, 4)"),
        ((k, context[:5]), "context: expected one row per example, 24 in all, got 5"),
        ((k, context[:, :2]), "context: expected shape (B, 3), got (24, 2)"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            flow(*bad)


# --- trained ----------------------------------------------------------------------------------------------------------


def digits_glow(classes: int = 0, precision: torch.dtype = torch.float32, seed: int = 0) -> Flow:
    torch.manual_seed(seed)
    return glow((1, 8, 8), levels=17, scales=2, steps=2, hidden=16, classes=classes, precision=precision)


def held_out_bits(flow: Flow) -> Tensor:
    """The bits/dim of the test digits under one draw of the noise."""
    torch.manual_seed(5)
    return -log_likelihoods(flow, digits("test").images) / (flow.dims * math.log(2))


def test_bfloat16_networks_cost_nothing():
    """Two flows, trained from one seed in either precision, score within 0.01 bits/dim in both precisions."""
    precisions = (torch.float32, torch.bfloat16)
    bits = []
    for precision in precisions:
        flow = digits_glow(precision=precision)
        start = fit(flow, digits().images, 60, batch_size=64, clip=50.0).loss[0] / (64 * math.log(2))
        bits.append(held_out_bits(flow))
        assert bits[-1].mean() < start - 0.4
        other = digits_glow(precision=precisions[precision == torch.float32])
        other.load_state_dict(flow.state_dict())
        difference = held_out_bits(other) - bits[-1]
        assert abs(difference.mean()) < 0.01
        assert difference.abs().max() > 1e-5  # the two precisions differ
    assert abs(bits[0].mean() - bits[1].mean()) < 0.01


class Stop(Exception):
    """Raised by a test to end a run in the middle."""


def digits_run(folder: Path | None = None, at: int | None = None, **options) -> dict[str, Tensor]:
    """A conditional Glow on digits, 8 steps with an average; with ``at`` it ends in the evaluation after that step.

    With a folder it writes checkpoints there.
    """
    images, context = digits().images, nn.functional.one_hot(digits().labels, 10).float()
    flow = digits_glow(classes=10, seed=7 if options.get("resume") else 0)  # a resumed one starts from other weights

    def on_evaluation(judged: Flow, history) -> None:
        if history.held_out[-1][0] == at:
            raise Stop

    options |= {"held_out": images[:20], "held_out_context": context[:20], "evaluations": 8}
    options |= {"context": context, "batch_size": 32, "ema": 0.9}
    if folder is None:
        fit(flow, images, 8, **options)
    else:
        train(flow, images, 8, folder=folder, on_evaluation=on_evaluation, **options)
    return flow.state_dict()


def test_a_stopped_run_is_loaded_and_goes_on(tmp_path):
    """The likelihood is equal to the bit; a resumed run ends like an uninterrupted one, with the same ActNorms."""
    with pytest.raises(Stop):
        digits_run(tmp_path, at=5, save_every=-1.0)
    images, context = digits("test").images, nn.functional.one_hot(digits("test").labels, 10).float()
    nats = []
    for seed in (1, 2):
        flow = digits_glow(classes=10, seed=seed)
        checkpoint.load_into(flow, read_model(tmp_path), CHECKPOINT)
        flow.initialize(images // 2, context)  # of no effect
        torch.manual_seed(0)
        nats.append(log_likelihoods(flow, images, context))
    assert torch.equal(*nats)
    assert nats[0].isfinite().all()

    expected = digits_run()
    assert any(not torch.equal(expected[name], value) for name, value in flow.state_dict().items())
    found = digits_run(tmp_path, resume=True)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert all(value for name, value in found.items() if name.endswith("initialized"))
