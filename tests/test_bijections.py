"""Every bijection in tests/bijections.py keeps the contract of nflows_lib/bijection.py."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
import re

import pytest
import torch
from bijections import BIJECTIONS, build, checkerboard
from torch import Tensor, nn

import nflows_lib
from nflows_lib.bijection import Bijection, Shape
from nflows_lib.coupling import AdditiveCoupling, alternating_mask
from nflows_lib.dequantization import Rescale
from nflows_lib.networks import MLP

CASES = [
    pytest.param(name, shape, id=f"{name}-{'x'.join(map(str, shape))}")
    for name, example in BIJECTIONS.items()
    for shape in example.shapes
]
every_case = pytest.mark.parametrize(("name", "shape"), CASES)


# --- the dictionary is complete ---------------------------------------------------------------------------------------


def public_bijections() -> set[type[Bijection]]:
    """Every public subclass of Bijection that a module of nflows_lib defines."""
    found = set()
    for info in pkgutil.walk_packages(nflows_lib.__path__, "nflows_lib."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if inspect.isclass(value) and issubclass(value, Bijection) and value.__module__ == info.name:
                if value is not Bijection and not name.startswith("_"):
                    found.add(value)
    return found


def test_every_public_bijection_has_an_entry():
    tested = {type(example.make(example.shapes[0])) for example in BIJECTIONS.values()}
    missing = {cls.__name__ for cls in public_bijections() - tested}
    assert not missing, f"no entry in tests/bijections.py for {', '.join(sorted(missing))}"
    assert {AdditiveCoupling, Rescale} <= public_bijections()  # the walk does find them


@pytest.mark.parametrize("name", BIJECTIONS)
def test_every_entry_has_several_shapes(name):
    assert len(set(BIJECTIONS[name].shapes)) >= 2


# --- the mathematics --------------------------------------------------------------------------------------------------


def jacobian(layer: Bijection, x: Tensor, context: Tensor | None) -> Tensor:
    """dz/dx of one example, x of shape (1, *shape): (D, D)."""
    matrix = torch.autograd.functional.jacobian(lambda v: layer(v, context)[0].flatten(), x)
    return matrix.reshape(x.numel(), x.numel())


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
    x = layer.inverse(start, context)
    forth, _ = layer(x, context)
    assert back.dtype == forth.dtype == dtype
    assert (back - start).abs().max() <= bound * max(1.0, start.abs().max(), z.abs().max())
    assert (forth - start).abs().max() <= bound * max(1.0, start.abs().max(), x.abs().max())


@every_case
@torch.no_grad()
def test_contribution_is_one_number_an_example(name, shape):
    """And neither it nor z changes with the other examples of the batch."""
    layer, x, context = build(name, shape)
    z, contribution = layer(x, context)
    assert contribution.shape == (len(x),)
    assert contribution.dtype == x.dtype
    others = 3 * torch.randn_like(x)
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
    if layer.state_dict() and any(True for _ in layer.parameters()):
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
    layer.inverse(x, context)
    assert torch.equal(x, before)


@every_case
@torch.no_grad()
def test_context(name, shape):
    """An unconditional layer ignores it; a conditional one obeys it in both directions and misses it by name."""
    layer, x, context = build(name, shape)
    other = torch.randn(len(x), *(BIJECTIONS[name].context or (3,)), dtype=x.dtype)
    pairs = [(layer(x, context)[0], layer(x, other)[0]), (layer.inverse(x, context), layer.inverse(x, other))]
    for with_context, with_other in pairs:
        assert torch.equal(with_context, with_other) == (context is None)
    if context is not None:
        for direction in (layer, layer.inverse):
            with pytest.raises(ValueError, match=r"^context: expected shape \(B, 3\), got None"):
                direction(x, None)


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if not BIJECTIONS[case.values[0]].any_shape])
def test_wrong_shapes_are_named(name, shape: Shape):
    """The message names the argument, what was expected and what came."""
    layer, x, context = build(name, shape)
    wrong_shapes = [(*shape[:-1], shape[-1] + 1), (*shape, 1), shape[:-1]]
    for wrong in wrong_shapes:
        bad = torch.zeros(len(x), *wrong, dtype=x.dtype)
        expected = re.escape(f"expected shape ({', '.join(['B', *map(str, shape)])}), got {tuple(bad.shape)}")
        with pytest.raises(ValueError, match=f"^x: {expected}$"):
            layer(bad, context)
        with pytest.raises(ValueError, match=f"^z: {expected}$"):
            layer.inverse(bad, context)
        with pytest.raises(ValueError, match=f"expected .*{re.escape(str(wrong))}.*, got {re.escape(str(shape))}"):
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


@pytest.mark.parametrize("name", [name for name in BIJECTIONS if name.startswith("additive_coupling")])
def test_true_passes_and_only_that_feeds_the_network(name):
    """z = x + (1 - b) t(b x); so the Jacobian has ones on its diagonal, and off it only where changed meets passing."""
    layer, x, context = build(name, BIJECTIONS[name].shapes[-1])
    z, _ = layer(x, context)
    passes = layer.mask
    torch.testing.assert_close(z, x + ~passes * layer.network(passes * x, context))
    assert torch.equal(z[:, passes], x[:, passes])
    assert (z[:, ~passes] != x[:, ~passes]).all()
    matrix = jacobian(layer, x[:1], None if context is None else context[:1])
    changed = ~passes.flatten()
    assert torch.equal(matrix.diagonal(), torch.ones(len(matrix), dtype=matrix.dtype))
    off_diagonal = matrix - torch.eye(len(matrix), dtype=matrix.dtype)
    assert (off_diagonal[changed][:, ~changed] != 0).any()
    assert (off_diagonal[~changed] == 0).all()
    assert (off_diagonal[changed][:, changed] == 0).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4), "mask: expected a boolean tensor, got torch.float32"),
        (torch.ones(4, dtype=torch.bool), "mask: expected both True and False, got only True"),
        (torch.zeros(4, dtype=torch.bool), "mask: expected both True and False, got only False"),
    ],
)
def test_coupling_refuses_a_mask_that_does_not_split(mask, message):
    with pytest.raises(ValueError, match=message):
        AdditiveCoupling(mask, nn.Identity())


def test_coupling_refuses_a_network_of_another_shape():
    """An output of shape (B, 1) would broadcast: a coupling, but not the one that was meant."""
    layer = AdditiveCoupling(alternating_mask(4, 0), MLP(4, 1, hidden=3, depth=1))
    with pytest.raises(ValueError, match=r"network's output: expected shape \(B, 4\), got \(2, 1\)"):
        layer(torch.zeros(2, 4))


def test_coupling_moves_its_mask_with_the_module():
    """The mask is a buffer: a checkpoint holds it, and it follows the module to another device."""
    layer = AdditiveCoupling(checkerboard((1, 2, 2)), nn.Identity())
    assert list(layer.state_dict()) == ["mask"]
    assert layer.to("meta").mask.device.type == "meta"


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_rescale_refuses(scale):
    with pytest.raises(ValueError, match=f"scale: expected a finite number other than 0, got {scale}"):
        Rescale(scale)
