"""Tests that every bijection in tests/bijections.py keeps the contract of nflows_lib/bijection.py."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pickle
import pkgutil
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bijections import BIJECTIONS, Fixed, build, randomize, used_batch_norm
from torch import Tensor, nn
from torch.func import jacrev, vmap

import nflows_lib
from nflows_lib.bijection import Bijection, ChannelBijection, Layer, Shape
from nflows_lib.coupling import AdditiveCoupling, AffineCoupling, alternating_mask, channel_mask, checkerboard_mask
from nflows_lib.dequantization import Logit, Rescale
from nflows_lib.multiscale import FactorOut
from nflows_lib.networks import MLP, ResNet
from nflows_lib.normalization import FlowBatchNorm

CASES = [
    pytest.param(name, shape, id=f"{name}-{'x'.join(map(str, shape))}")
    for name, example in BIJECTIONS.items()
    for shape in example.shapes
]
every_case = pytest.mark.parametrize(("name", "shape"), CASES)


# --- the dictionary is complete ---------------------------------------------------------------------------------------


def public_bijections() -> set[type[Bijection]]:
    """Every public subclass of Bijection in nflows_lib, except base classes without a forward."""
    found = set()
    for info in pkgutil.walk_packages(nflows_lib.__path__, "nflows_lib."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, Bijection) and value.__module__ == info.name:
                if value.forward is not Layer.forward and not name.startswith("_"):
                    found.add(value)
    return found


def test_every_public_bijection_has_an_entry():
    tested = {type(example.make(example.shapes[0])) for example in BIJECTIONS.values()}
    missing = {cls.__name__ for cls in public_bijections() - tested}
    assert not missing, f"no entry in tests/bijections.py for {', '.join(sorted(missing))}"
    assert {AdditiveCoupling, Rescale} <= public_bijections()  # the walk finds the subclasses
    assert not {Bijection, ChannelBijection} & public_bijections()


@pytest.mark.parametrize("name", BIJECTIONS)
def test_every_entry_has_several_shapes(name):
    assert len(set(BIJECTIONS[name].shapes)) >= 2


# --- the mathematics --------------------------------------------------------------------------------------------------


def jacobian(layer: Bijection, x: Tensor, context: Tensor | None) -> Tensor:
    """dz/dx of one example x of shape (1, *shape), as (D, D)."""
    matrix = torch.autograd.functional.jacobian(lambda v: layer(v, context)[0].flatten(), x)
    return matrix.reshape(x.numel(), x.numel())


def as_latent(layer: Bijection, x: Tensor) -> Tensor:
    """The numbers of x in the shape of the layer's output, as a latent to invert."""
    return x.view(len(x), *layer.output_shape(tuple(x.shape[1:])))


@every_case
def test_contribution_is_the_log_determinant_of_the_jacobian(name, shape):
    layer, x, context = build(name, shape)
    _, contribution = layer(x, context)
    for i in range(len(x)):
        matrix = jacobian(layer, x[i : i + 1], None if context is None else context[i : i + 1])
        assert not torch.allclose(matrix, torch.eye(len(matrix), dtype=matrix.dtype)), "a layer that does nothing"
        torch.testing.assert_close(contribution[i], torch.linalg.slogdet(matrix).logabsdet, rtol=1e-10, atol=1e-10)


@every_case
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["64", "32"])
@torch.no_grad()
def test_round_trip_both_ways(name, shape, dtype, bound):
    """The error, relative to the largest number on the way, stays within the bound of its precision."""
    layer, start, context = build(name, shape, dtype)
    z, _ = layer(start, context)
    back = layer.inverse(z, context)
    start_z = as_latent(layer, start)
    x = layer.inverse(start_z, context)
    forth, _ = layer(x, context)
    assert back.dtype == forth.dtype == dtype
    assert (back - start).abs().max() <= bound * max(1.0, start.abs().max(), z.abs().max())
    assert (forth - start_z).abs().max() <= bound * max(1.0, start.abs().max(), x.abs().max())


@every_case
@torch.no_grad()
def test_contribution_is_one_number_an_example(name, shape):
    """Neither the contribution nor z changes with the other examples of the batch."""
    layer, x, context = build(name, shape)
    z, contribution = layer(x, context)
    assert contribution.shape == (len(x),)
    assert contribution.dtype == x.dtype
    others = BIJECTIONS[name].to_domain(3 * torch.randn_like(x))
    others[1] = x[1]
    z_others, contribution_others = layer(others, context)
    torch.testing.assert_close(z_others[1], z[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(contribution_others[1], contribution[1], rtol=0, atol=1e-12)
    assert not torch.allclose(z_others[0], z[0])


@every_case
def test_gradients_are_right_and_reach_every_parameter(name, shape):
    """Along a random direction for each tensor, autograd agrees with central differences."""
    layer, x, context = build(name, shape)
    z, contribution = layer(x, context)
    on_z, on_contribution = torch.randn_like(z), torch.randn_like(contribution)

    def loss() -> Tensor:
        z, contribution = layer(x, context)
        return (on_z * z.sin()).sum() + (on_contribution * contribution).sum()

    x.requires_grad_()
    tensors = {"x": x, **dict(layer.named_parameters())}
    loss().backward()
    for label, tensor in tensors.items():
        assert tensor.grad is not None, f"no gradient reaches {label}"
        assert tensor.grad.abs().max() > 0, f"only a gradient of zero reaches {label}"
        direction, step = torch.randn_like(tensor), 1e-6
        with torch.no_grad():
            tensor.add_(step * direction)
            above = loss()
            tensor.sub_(2 * step * direction)
            below = loss()
            tensor.add_(step * direction)
        slope = (above - below) / (2 * step)
        torch.testing.assert_close((tensor.grad * direction).sum(), slope, rtol=1e-5, atol=1e-6, msg=label)


# --- the module -------------------------------------------------------------------------------------------------------


@every_case
@torch.no_grad()
def test_state_dict_round_trip(name, shape):
    layer, x, context = build(name, shape)
    other, _, _ = build(name, shape, seed=1)
    if layer.state_dict() and not BIJECTIONS[name].only_moves:
        assert not torch.equal(other(x, context)[0], layer(x, context)[0])
    other.load_state_dict(layer.state_dict())
    for ours, theirs in zip(layer(x, context), other(x, context), strict=True):
        assert torch.equal(ours, theirs)


@every_case
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.no_grad()
def test_a_copy_does_the_same(name, shape, duplicate):
    layer, x, context = build(name, shape)
    other = duplicate(layer)
    for ours, theirs in zip(layer(x, context), other(x, context), strict=True):
        assert torch.equal(ours, theirs)


@every_case
@torch.no_grad()
def test_output_shape_agrees_with_what_comes_out(name, shape):
    layer, x, context = build(name, shape)
    z, _ = layer(x, context)
    assert tuple(z.shape[1:]) == layer.output_shape(shape)
    assert layer.inverse(z, context).shape == x.shape


@every_case
@torch.no_grad()
def test_input_is_not_changed_in_place(name, shape):
    layer, x, context = build(name, shape)
    before = x.clone()
    layer(x, context)
    layer.inverse(as_latent(layer, x), context)
    assert torch.equal(x, before)


@every_case
@torch.no_grad()
def test_context(name, shape):
    """An unconditional layer ignores the context; a conditional one uses it both ways and names it if it is missing."""
    layer, x, context = build(name, shape)
    other = torch.randn(len(x), *(BIJECTIONS[name].context or (3,)), dtype=x.dtype)
    z = as_latent(layer, x)
    pairs = [(layer(x, context)[0], layer(x, other)[0]), (layer.inverse(z, context), layer.inverse(z, other))]
    for with_context, with_other in pairs:
        assert torch.equal(with_context, with_other) == (context is None)
    if context is not None:
        expected = re.escape(f"expected shape ({', '.join(['B', *map(str, context.shape[1:])])}), got None")
        for direction, batch in ((layer, x), (layer.inverse, z)):
            with pytest.raises(ValueError, match=f"^context: {expected}$"):
                direction(batch, None)


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if BIJECTIONS[case.values[0]].context])
@torch.no_grad()
def test_each_example_has_a_context_of_its_own(name, shape):
    """Another context for one example changes this example, in both directions, and no other."""
    layer, x, context = build(name, shape)
    other = context.clone()
    other[1] = torch.randn_like(other[1])
    z = as_latent(layer, x)
    for found, expected in (
        (layer(x, other)[0], layer(x, context)[0]),
        (layer.inverse(z, other), layer.inverse(z, context)),
    ):
        changed = ((found - expected).flatten(1).abs().amax(1) > 1e-9).tolist()
        assert changed == [i == 1 for i in range(len(x))]
    _, contribution = layer(x, context)
    torch.testing.assert_close(layer(x[2:], context[2:])[1], contribution[2:], rtol=0, atol=1e-12)


def wrong_shapes(shape: Shape) -> list[Shape]:
    return [(*shape[:-1], shape[-1] + 1), (*shape, 1), shape[:-1]]


@pytest.mark.parametrize("wrong", [[[1.0, 2.0]], np.ones((1, 2))], ids=["list", "array"])
@pytest.mark.parametrize("name", BIJECTIONS)
def test_what_is_no_tensor_is_named(name, wrong):
    layer = BIJECTIONS[name].make(BIJECTIONS[name].shapes[0])
    for method, argument in ((layer, "x"), (layer.inverse, "z")):
        with pytest.raises(ValueError, match=f"^{argument}: expected a tensor, got {type(wrong).__name__}$"):
            method(wrong)


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if not BIJECTIONS[case.values[0]].any_shape])
def test_wrong_shapes_are_named(name, shape: Shape):
    """The message names the argument, what was expected and what came."""
    layer, x, context = build(name, shape)
    for argument, direction, right in (("x", layer, shape), ("z", layer.inverse, layer.output_shape(shape))):
        for wrong in wrong_shapes(right):
            bad = torch.zeros(len(x), *wrong, dtype=x.dtype)
            expected = re.escape(f"expected shape ({', '.join(['B', *map(str, right)])}), got {tuple(bad.shape)}")
            with pytest.raises(ValueError, match=f"^{argument}: {expected}$"):
                direction(bad, context)
    for wrong in wrong_shapes(shape):
        # The got value is the layer's own argument; a factor-out has the shape itself.
        expected, got = (shape, wrong) if isinstance(layer, FactorOut) else (wrong, shape)
        with pytest.raises(ValueError, match=f"expected .*{re.escape(str(expected))}.*, got {re.escape(str(got))}"):
            layer.output_shape(wrong)


# --- masks and couplings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "parity", "expected"),
    [(2, 0, [1, 0]), (2, 1, [0, 1]), (5, 0, [1, 0, 1, 0, 1]), (5, 1, [0, 1, 0, 1, 0])],
)
def test_alternating_mask(dims, parity, expected):
    mask = alternating_mask(dims, parity)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == expected


@pytest.mark.parametrize(("arguments", "message"), [((1, 0), "dims: .* got 1"), ((4, 2), "parity: .* got 2")])
def test_alternating_mask_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        alternating_mask(*arguments)


def network_output(
    layer: AdditiveCoupling | AffineCoupling, x: Tensor, context: Tensor | None, parts: int
) -> list[Tensor]:
    """The parts of a coupling network's output, each in the shape of x, with zeros where x is left unchanged.

    The network sees b x if x are images, and only the unchanged half if they are vectors.
    """
    passes = layer.mask
    if x.dim() > 2:
        return [~passes * part for part in layer.network(passes * x, context).chunk(parts, dim=1)]
    zeros = torch.zeros_like(x)
    return [zeros.masked_scatter(~passes, part) for part in layer.network(x[:, passes], context).chunk(parts, dim=1)]


@pytest.mark.parametrize("name", [name for name in BIJECTIONS if name.startswith("additive_coupling")])
def test_true_passes_and_only_that_feeds_the_network(name):
    """z = x + (1 - b) t(x1), so the Jacobian is 1 on its diagonal, and off it only x1 acts on changed numbers."""
    layer, x, context = build(name, BIJECTIONS[name].shapes[-1])
    z, _ = layer(x, context)
    passes = layer.mask
    (shift,) = network_output(layer, x, context, 1)
    torch.testing.assert_close(z, x + shift)
    assert torch.equal(z[:, passes], x[:, passes])
    assert (z[:, ~passes] != x[:, ~passes]).all()
    matrix = jacobian(layer, x[:1], None if context is None else context[:1])
    changed = ~passes.flatten()
    assert torch.equal(matrix.diagonal(), torch.ones(len(matrix), dtype=matrix.dtype))
    off_diagonal = matrix - torch.eye(len(matrix), dtype=matrix.dtype)
    assert (off_diagonal[changed][:, ~changed] != 0).any()
    assert (off_diagonal[~changed] == 0).all()
    assert (off_diagonal[changed][:, changed] == 0).all()


@pytest.mark.parametrize("coupling", [AdditiveCoupling, AffineCoupling])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4), "mask: expected a boolean tensor, got torch.float32"),
        (torch.ones(4, dtype=torch.bool), "mask: expected both True and False, got only True"),
        (torch.zeros(4, dtype=torch.bool), "mask: expected both True and False, got only False"),
    ],
)
def test_coupling_refuses_a_mask_that_does_not_split(coupling, mask, message):
    with pytest.raises(ValueError, match=message):
        coupling(mask, nn.Identity())


@pytest.mark.parametrize(("coupling", "expected", "wrong"), [(AdditiveCoupling, 2, 1), (AffineCoupling, 4, 2)])
def test_coupling_refuses_a_network_of_another_shape(coupling, expected, wrong):
    """An output of shape (B, 1), or (B, 2) for two parts, would broadcast to a coupling that is not the one meant."""
    layer = coupling(alternating_mask(4, 0), MLP(2, wrong, hidden=3, depth=1))
    for direction in (layer, layer.inverse):
        with pytest.raises(
            ValueError, match=rf"network's output: expected shape \(B, {expected}\), got \(2, {wrong}\)"
        ):
            direction(torch.zeros(2, 4))


@pytest.mark.parametrize(("coupling", "own"), [(AdditiveCoupling, []), (AffineCoupling, ["gain"])])
@pytest.mark.parametrize("mask", [checkerboard_mask((1, 2, 2), 0), alternating_mask(3, 0)], ids=["image", "vector"])
def test_coupling_moves_its_mask_with_the_module(coupling, own, mask):
    """The mask is a buffer: a checkpoint holds it, but nothing that follows from it; all move to another device."""
    layer = coupling(mask, nn.Identity())
    assert list(layer.state_dict()) == [*own, "mask"]
    assert {buffer.device.type for buffer in layer.to("meta").buffers()} == {"meta"}


class Seeing(Fixed):
    """A network that is initialised from data, and that also keeps the data of its initialisation."""

    initialize = Fixed.forward


MASKS = [alternating_mask(dims, parity) for dims in (2, 5, 6) for parity in (0, 1)]
MASKS += [torch.tensor([True, True, False, False, True, False, False])]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "".join(map(str, mask.int().tolist())))
def test_the_network_of_a_vector_coupling_sees_the_passing_half_and_answers_for_the_other(mask, parts):
    """It sees exactly the unchanged half, in order, both ways and at initialisation; each output has its own place."""
    size = int((~mask).sum())
    shift = torch.arange(1.0, size + 1)
    network = Seeing(*[0.0] * (parts - 1) * size, *shift)  # if there is a log-scale, it is 0
    layer = {1: AdditiveCoupling, 2: AffineCoupling}[parts](mask, network)
    x, context = torch.randn(3, len(mask)), torch.zeros(3, 1)
    expected = x.clone()
    expected[:, ~mask] += shift
    for call, result in (
        (lambda: layer(x, context)[0], expected),
        (lambda: layer.inverse(x, context), 2 * x - expected),
        (lambda: layer.initialize(x, context), None),
    ):
        network.seen = None
        torch.testing.assert_close(call(), result)
        assert torch.equal(network.seen[0], x[:, mask])
        assert network.seen[1] is context


@pytest.mark.parametrize("coupling", [AdditiveCoupling, AffineCoupling])
@torch.no_grad()
def test_a_vector_coupling_follows_the_mask_that_it_loads(coupling):
    """The mask is in the state dict, and the halves follow from it, not from the constructor's mask."""
    outputs = 2 if coupling is AdditiveCoupling else 4
    torch.manual_seed(0)
    masks = alternating_mask(4, 0), torch.tensor([False, False, True, True])
    layer, other = (coupling(mask, MLP(2, outputs, hidden=3, depth=1)) for mask in masks)
    randomize(other)
    x = torch.randn(5, 4)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.mask, masks[1])
    for found, expected in zip(layer(x), other(x), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(layer.inverse(x), other.inverse(x))
    assert torch.equal(layer(x)[0][:, masks[1]], x[:, masks[1]])
    chain = nn.Sequential(coupling(masks[0], MLP(2, outputs, hidden=3, depth=1)))
    chain.load_state_dict({f"0.{name}": tensor for name, tensor in other.state_dict().items()})
    assert torch.equal(chain[0].inverse(x), other.inverse(x))


COUPLINGS = [case for case in CASES if case.values[0].startswith(("additive_coupling", "affine_coupling"))]


@pytest.mark.parametrize(("name", "shape"), COUPLINGS)
def test_couplings_work_under_vmap_and_jacrev(name, shape):
    """torch.func sees one example at a time, and its Jacobians have the layer's determinants."""
    layer, x, context = build(name, shape)

    def one_by_one(direction: Callable[[Tensor, Tensor | None], Tensor], batch: Tensor) -> tuple[Tensor, Tensor]:
        """The flat output of one direction, and its Jacobians."""

        def alone(v: Tensor, c: Tensor | None) -> Tensor:
            return direction(v[None], None if c is None else c[None]).flatten()

        dims = 0, None if context is None else 0
        return vmap(alone, dims)(batch, context), vmap(jacrev(alone), dims)(batch, context).flatten(2)

    z, log_det = layer(x, context)
    for direction, start, end, expected in (
        (lambda *example: layer(*example)[0], x, z, log_det),
        (layer.inverse, z, x, -log_det),
    ):
        found, matrices = one_by_one(direction, start)
        torch.testing.assert_close(found, end.flatten(1))
        torch.testing.assert_close(torch.linalg.slogdet(matrices).logabsdet, expected)
        eye = torch.eye(start[0].numel(), dtype=start.dtype)
        assert not any(torch.allclose(matrix, eye) for matrix in matrices)


def test_checkerboard_mask():
    mask = checkerboard_mask((3, 2, 5), 0)
    assert mask.dtype == torch.bool
    assert mask.shape == (3, 2, 5)
    for channel in mask:
        assert channel.int().tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]
    assert torch.equal(checkerboard_mask((3, 2, 5), 1), ~mask)
    assert checkerboard_mask((1, 1, 2), 1).tolist() == [[[False, True]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 1, 1), 0), "shape: expected (C, H, W) with at least two pixels, got (1, 1, 1)"),
        (((0, 2, 2), 0), "shape: expected (C, H, W) with at least two pixels, got (0, 2, 2)"),
        (((4, 4), 0), "shape: expected (C, H, W) with at least two pixels, got (4, 4)"),
        (((1, 4, 4), 2), "parity: expected 0 or 1, got 2"),
    ],
)
def test_checkerboard_mask_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checkerboard_mask(*arguments)


def test_channel_mask():
    """The mask leaves the first or the second half of the channels unchanged; of three channels the half is one."""
    mask = channel_mask((4, 2, 3), 0)
    assert mask.dtype == torch.bool
    assert mask.shape == (4, 2, 3)
    assert mask[:2].all()
    assert not mask[2:].any()
    assert torch.equal(channel_mask((4, 2, 3), 1), ~mask)
    assert channel_mask((3, 1, 2), 0).int().tolist() == [[[1, 1]], [[0, 0]], [[0, 0]]]
    assert channel_mask((2, 1, 1), 1).flatten().tolist() == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 4, 4), 0), "shape: expected (C, H, W) with at least two channels, got (1, 4, 4)"),
        (((4, 4), 0), "shape: expected (C, H, W) with at least two channels, got (4, 4)"),
        (((2, 4, 4), 2), "parity: expected 0 or 1, got 2"),
    ],
)
def test_channel_mask_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        channel_mask(*arguments)


# --- affine couplings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BIJECTIONS if name.startswith(("affine_", "channel_"))])
def test_affine_coupling_is_its_formula(name):
    """z = b x + (1 - b) (x e^s + t); the Jacobian's diagonal is 1 for unchanged numbers and e^s for the others."""
    layer, x, context = build(name, BIJECTIONS[name].shapes[-1])
    z, contribution = layer(x, context)
    passes = layer.mask
    raw, shift = network_output(layer, x, context, 2)
    log_scale = layer.gain * raw.tanh()
    assert torch.equal(z[:, passes], x[:, passes])
    torch.testing.assert_close(z[:, ~passes], (x * log_scale.exp() + shift)[:, ~passes])
    torch.testing.assert_close(contribution, log_scale[:, ~passes].sum(1))
    assert torch.equal(layer.inverse(x, context)[:, passes], x[:, passes])

    matrix = jacobian(layer, x[:1], None if context is None else context[:1])
    changed = ~passes.flatten()
    diagonal = matrix.diagonal()
    assert torch.equal(diagonal[~changed], torch.ones_like(diagonal[~changed]))
    torch.testing.assert_close(diagonal[changed], log_scale[0, ~passes].exp())
    off_diagonal = matrix - diagonal.diag()
    assert (off_diagonal[changed][:, ~changed] != 0).any()
    assert (off_diagonal[~changed] == 0).all()
    assert (off_diagonal[changed][:, changed] == 0).all()


def test_affine_coupling_by_hand():
    """The first half of the output becomes s, the second t: x = (1, 2), s = 2 tanh(ln 2) = 1.2, t = -5."""
    network = Fixed(torch.tensor(2.0).log().item(), -5.0)
    layer = AffineCoupling(alternating_mask(2, 0), network)
    nn.init.constant_(layer.gain, 2.0)
    x, context = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 9)
    z, contribution = layer(x, context)
    assert torch.equal(network.seen[0], torch.tensor([[1.0]]))
    assert network.seen[1] is context
    torch.testing.assert_close(z, torch.tensor([[1.0, 2 * 3.3201169 - 5]]))
    torch.testing.assert_close(contribution, torch.tensor([1.2]))
    torch.testing.assert_close(layer.inverse(z, context), x)


@pytest.mark.parametrize("gain", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("sign", [-1, 1])
@torch.no_grad()
def test_log_scale_stays_within_the_gain(gain, sign):
    """A network whose output explodes reaches [-g, g] and no more, so that the layer can still be inverted."""
    layer = AffineCoupling(alternating_mask(4, 0), Fixed(*[sign * 1e30] * 2, *[0.25] * 2))
    assert layer.gain.item() == 1
    layer.gain.fill_(gain)
    x = torch.tensor([[0.5, -1.0, 2.0, 3.0]])
    z, contribution = layer(x)
    assert contribution.item() == pytest.approx(2 * sign * gain)
    torch.testing.assert_close(z[0, 1::2], x[0, 1::2] * torch.tensor(sign * gain).exp() + 0.25)
    torch.testing.assert_close(layer.inverse(z), x)


def steps_of(layer: AffineCoupling, steps: int) -> list[set[str]]:
    """The parameters that each step of gradient descent moves; the loss needs scales and shifts."""
    x = torch.randn(16, *layer.mask.shape)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    moved = []
    for _ in range(steps):
        before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
        optimizer.zero_grad()
        z, contribution = layer(x)
        weight = 1 + x.flatten(1)[:, 0].square()
        (weight * (0.5 * z.square().flatten(1).sum(1) - contribution)).mean().backward()
        optimizer.step()
        moved.append({name for name, parameter in layer.named_parameters() if not torch.equal(parameter, before[name])})
    return moved


def test_affine_coupling_with_an_mlp_starts_as_the_identity_and_leaves_it():
    """The first step moves the last layer, both its scale and its shift, because the gain starts at 1.

    The second step moves everything: no part of the layer is stuck at the identity map.
    """
    torch.manual_seed(0)
    layer = AffineCoupling(alternating_mask(4, 1), MLP(2, 4, hidden=16, depth=2))
    x = torch.randn(16, 4)
    z, contribution = layer(x)
    assert torch.equal(z, x)
    assert torch.equal(contribution, torch.zeros(16))
    assert steps_of(layer, 1) == [{"network.layers.4.weight", "network.layers.4.bias"}]
    last = layer.network.layers[-1]
    for parameter in (last.weight, last.bias[:, None]):
        assert (parameter != 0).any(1).all()  # every row belongs to a number that the layer changes
    assert steps_of(layer, 1) == [{name for name, _ in layer.named_parameters()}]


def test_every_parameter_of_an_affine_coupling_with_a_resnet_moves_at_once():
    torch.manual_seed(0)
    layer = AffineCoupling(checkerboard_mask((2, 3, 5), 0), ResNet(2, 4, hidden=8, blocks=1))
    assert steps_of(layer, 1) == [{name for name, _ in layer.named_parameters()}]


def test_affine_coupling_with_a_resnet_inside():
    """The contract is the same; weight norm cannot be pickled, so this coupling is not in the dictionary."""
    torch.manual_seed(0)
    shape = (2, 3, 4)
    layer = AffineCoupling(checkerboard_mask(shape, 1), ResNet(2, 4, hidden=5, blocks=2, context=3)).double()
    randomize(layer, 0.3)
    x, context = torch.randn(2, *shape, dtype=torch.float64), torch.randn(2, 3, 3, 4, dtype=torch.float64)
    z, contribution = layer(x, context)
    for i in range(2):
        matrix = jacobian(layer, x[i : i + 1], context[i : i + 1])
        torch.testing.assert_close(contribution[i], torch.linalg.slogdet(matrix).logabsdet, rtol=1e-10, atol=1e-10)
    assert contribution.abs().min() > 0.01
    torch.testing.assert_close(layer.inverse(z, context), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(layer.inverse(x, context), context)[0], x, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(layer(x, context + 1)[0], z)
    assert not torch.allclose(layer.inverse(z, context + 1), x)
    for direction in (layer, layer.inverse):
        with pytest.raises(ValueError, match=re.escape("context: expected shape (B, 3, 3, 4), got None")):
            direction(x)


# --- batch norm -------------------------------------------------------------------------------------------------------

batch_norm_shapes = pytest.mark.parametrize("shape", [(16, 3), (5, 3, 4, 2)], ids=["vectors", "images"])


def batch_of(shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random batch with another mean and standard deviation in every channel."""
    torch.manual_seed(0)
    scale, shift = torch.tensor([0.02, 1.0, 3.0]), torch.tensor([0.5, -2.0, 1.0])
    x = torch.randn(shape) * scale.view(1, 3, *[1] * (len(shape) - 2)) + shift.view(1, 3, *[1] * (len(shape) - 2))
    return x.to(dtype)


def per_channel(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the variance of each channel."""
    values = x.movedim(1, 0).reshape(x.shape[1], -1)
    return values.mean(1), (values - values.mean(1, keepdim=True)).square().mean(1)


@batch_norm_shapes
def test_batch_norm_in_training_mode(shape):
    """Every channel has mean 0 and variance v / (v + eps); the log-det is the sum of -1/2 H W log(v + eps)."""
    x = batch_of(shape)
    layer = FlowBatchNorm(3, eps=1e-3).double()
    z, contribution = layer(x)
    _, variance = per_channel(x)
    new_mean, new_variance = per_channel(z)
    torch.testing.assert_close(new_mean, torch.zeros_like(new_mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(new_variance, variance / (variance + 1e-3))
    assert new_variance[0] < 0.5  # an eps that is not negligible
    torch.testing.assert_close(z, nn.functional.batch_norm(x, None, None, training=True, eps=1e-3))
    positions = x[0, 0].numel()
    expected = -0.5 * positions * (variance + 1e-3).log().sum()
    torch.testing.assert_close(contribution, expected.expand(len(x)))


@batch_norm_shapes
@pytest.mark.parametrize("momentum", [0.1, 0.75])
@torch.no_grad()
def test_batch_norm_keeps_running_averages(shape, momentum):
    """running = (1 - momentum) running + momentum batch, from 0 and 1; evaluation and the inverse only read them."""
    x = batch_of(shape)
    layer = FlowBatchNorm(3, momentum=momentum).double()
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for batch in (x, 2 * x + 1, x):
        layer.train()
        z, _ = layer(batch)
        batch_mean, batch_variance = per_channel(batch)
        mean = (1 - momentum) * mean + momentum * batch_mean
        variance = (1 - momentum) * variance + momentum * batch_variance
        layer.inverse(z)
        layer.eval()
        layer(z)
        layer.inverse(z)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_variance, variance)
    assert set(layer.state_dict()) == {"running_mean", "running_variance"}
    assert (FlowBatchNorm(3).momentum, FlowBatchNorm(3).eps) == (0.1, 1e-4)


def test_batch_norm_learns_through_the_statistics_of_the_batch():
    """The batch's mean and variance carry gradients, as they do in any batch norm; the running averages carry none."""
    x = batch_of((6, 3)).requires_grad_()
    layer = FlowBatchNorm(3).double()
    on_z = torch.randn(6, 3, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        z, contribution = layer(x)
        return (on_z * z).sum() + contribution.sum()

    assert torch.autograd.gradcheck(loss, x)
    assert not layer.running_mean.requires_grad
    assert not layer.running_variance.requires_grad
    assert list(layer.parameters()) == []


@batch_norm_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_process_has_the_statistics_of_its_batch_to_the_bit(shape, dtype):
    """Other processes add no rounding to a process alone; gradients are those of the plain formula."""
    x = batch_of(shape, dtype).requires_grad_()
    layer = FlowBatchNorm(3, momentum=1.0).to(dtype)
    z, contribution = layer(x)
    variance, mean = torch.var_mean(x.transpose(0, 1).flatten(1), dim=1, correction=0)
    assert torch.equal(layer.running_mean, mean)
    assert torch.equal(layer.running_variance, variance)
    of_each = [3, *[1] * (len(shape) - 2)]
    expected = (x - mean.view(of_each)) * (variance + layer.eps).rsqrt().view(of_each)
    log_det = -0.5 * math.prod(shape[2:]) * (variance + layer.eps).log().sum()
    assert torch.equal(z, expected)
    assert torch.equal(contribution, log_det.expand(len(x)))
    weights = torch.randn_like(z)
    gradients = [
        torch.autograd.grad((weights * a).sum() + 0.3 * b.sum(), x, retain_graph=True)[0]
        for a, b in ((z, contribution), (expected, log_det.expand(len(x))))
    ]
    assert gradients[1].abs().max() > 0.1
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_batch_norm_is_a_bijection_in_evaluation_mode_only():
    """The lesson of F15 and F16: the contract holds in evaluation mode, and no part of it in training mode."""
    x = batch_of((4, 3))
    layer = used_batch_norm((3,)).double()

    # In training mode a shift of the whole batch changes nothing: the map of the batch cannot be undone, and the
    # log-determinant of its Jacobian is -infinity, whatever the contribution says.
    z, contribution = layer.train()(x)
    matrix = torch.autograd.functional.jacobian(lambda v: layer(v)[0], x).reshape(12, 12)
    torch.testing.assert_close(matrix.sum(1), torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.linalg.slogdet(matrix).logabsdet < -50
    assert contribution.sum().abs() < 50
    # Nor is the contribution the log-determinant of one example's part of that map.
    own = torch.linalg.slogdet(matrix[:3, :3]).logabsdet
    assert (own - contribution[0]).abs() > 0.5
    # One example's z depends on the others, and the inverse, which uses the running averages, does not return x.
    others = torch.cat([x[:1], 2 * x[1:]])
    assert (layer(others)[0][0] - z[0]).abs().max() > 0.1
    assert (layer.inverse(z) - x).abs().max() > 0.1

    z, contribution = layer.eval()(x)
    matrix = torch.autograd.functional.jacobian(lambda v: layer(v)[0], x).reshape(12, 12)
    torch.testing.assert_close(torch.linalg.slogdet(matrix).logabsdet, contribution.sum())
    torch.testing.assert_close(torch.linalg.slogdet(matrix[:3, :3]).logabsdet, contribution[0])
    assert torch.equal(layer(others)[0][0], z[0])
    torch.testing.assert_close(layer.inverse(z), x)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (0, 3), (0, 3, 2, 2)])
@torch.no_grad()
def test_batch_norm_needs_several_values_a_channel_to_train(shape):
    layer = FlowBatchNorm(3)
    x = torch.zeros(shape)
    before = copy.deepcopy(layer.state_dict())
    message = f"x: expected several values per channel in training mode, got shape {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(x)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    z, contribution = layer.eval()(x)
    assert z.shape == layer.inverse(z).shape == x.shape
    assert contribution.shape == (len(x),)


def test_batch_norm_trains_on_one_image():
    z, _ = FlowBatchNorm(3)(torch.randn(1, 3, 2, 2))
    assert z.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3, 3), (2, 2, 3, 3), (2, 3, 5), (3,)])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_names_wrong_channels(shape, training):
    layer = FlowBatchNorm(3).train(training)
    expected = re.escape(f"expected shape (B, 3) or (B, 3, H, W), got {shape}")
    with pytest.raises(ValueError, match=f"^x: {expected}$"):
        layer(torch.zeros(shape))
    with pytest.raises(ValueError, match=f"^z: {expected}$"):
        layer.inverse(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(4,), (4, 2, 2), (3, 2), ()])
def test_batch_norm_names_wrong_channels_of_a_flow(shape):
    expected = re.escape(f"channels: expected 3, as in (3,) or (3, H, W), got {shape}")
    with pytest.raises(ValueError, match=f"^{expected}$"):
        FlowBatchNorm(3).output_shape(shape)


def test_batch_norm_refuses_no_channel():
    with pytest.raises(ValueError, match="channels: expected at least 1, got 0"):
        FlowBatchNorm(0)


# --- scales and the logit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_rescale_refuses(scale):
    with pytest.raises(ValueError, match=f"scale: expected a finite number other than 0, got {scale}"):
        Rescale(scale)


ALPHAS = [1e-6, 1e-3, 0.05, 0.25, 0.45]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_logit_against_autograd(alpha):
    """The log-det is log((1 - 2 alpha) / (p (1 - p))) with p = alpha + (1 - 2 alpha) u, as autograd computes it."""
    u = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None].requires_grad_()
    y, contribution = Logit(alpha)(u)
    p = alpha + (1 - 2 * alpha) * u
    torch.testing.assert_close(y, p.log() - (1 - p).log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(contribution, ((1 - 2 * alpha) / (p * (1 - p))).log()[:, 0], rtol=1e-9, atol=1e-9)
    (slope,) = torch.autograd.grad(y.sum(), u)
    torch.testing.assert_close(contribution, slope[:, 0].log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(Logit(alpha).inverse(y), u, rtol=0, atol=1e-9)


def test_logit_has_the_alpha_of_the_paper():
    y, _ = Logit()(torch.tensor([[0.0, 0.5, 1.0]]))
    torch.testing.assert_close(y, torch.tensor([[-1.0, 0.0, 1.0]]) * torch.tensor(19.0).log())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_logit_is_finite_at_both_ends(alpha):
    u = torch.tensor([[0.0], [1.0], [1 - 2**-24]], requires_grad=True)
    y, contribution = Logit(alpha)(u)
    assert y.dtype == contribution.dtype == torch.float32
    assert y.isfinite().all()
    assert contribution.isfinite().all()
    (y.sum() + contribution.sum()).backward()
    assert u.grad.isfinite().all()
    torch.testing.assert_close(Logit(alpha).inverse(y), u, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_inverse_logit_is_bounded(alpha):
    """Its values end alpha / (1 - 2 alpha) below 0 and as much above 1, at the ends of the real line."""
    z = torch.tensor([[-1e30, -30.0, 0.0, 30.0, 1e30]], dtype=torch.float64)
    u = Logit(alpha).inverse(z)[0]
    beyond = alpha / (1 - 2 * alpha)
    torch.testing.assert_close(u[[0, 2, 4]], torch.tensor([-beyond, 0.5, 1 + beyond], dtype=torch.float64))
    assert (u.diff() >= 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0, 0.7, float("nan")])
def test_logit_refuses(alpha):
    with pytest.raises(ValueError, match=f"^alpha: expected a number between 0 and 1/2, got {alpha}$"):
        Logit(alpha)
