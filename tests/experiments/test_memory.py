"""Tests of flows that store less in training: gradients stay the same, and memory does not grow with depth."""

from __future__ import annotations

import pytest
import torch
from bijections import BIJECTIONS, build, randomize
from torch import Tensor, nn

from nflows_lib import models
from nflows_lib.convolution import Invertible1x1Conv
from nflows_lib.coupling import AdditiveCoupling, alternating_mask
from nflows_lib.dequantization import Rescale
from nflows_lib.distributions import StandardNormal
from nflows_lib.experiments.memory import checkpointed, peak_memory, reversible
from nflows_lib.flow import Flow
from nflows_lib.networks import MLP
from nflows_lib.normalization import FlowBatchNorm
from nflows_lib.training import fit

WAYS = pytest.mark.parametrize("way", [reversible, checkpointed])
EXACT = sorted(name for name in BIJECTIONS if "batch_norm" not in name)
# Every model, without its noise layer. RealNVP on images is missing: it has batch norms, which no inverse undoes.
MODELS = {
    "nice": (lambda: models.nice(5, levels=17, hidden=6, depth=2)[1:], None),
    "points": (lambda: models.realnvp_points(3, hidden=6), None),
    "glow": (lambda: models.glow((3, 8, 8), steps=2, hidden=6)[1:], None),
    "glow with classes": (lambda: models.glow((1, 8, 8), scales=2, steps=2, hidden=6, classes=3, lu=False)[1:], (3,)),
    "bounded glow": (lambda: models.glow((2, 4, 4), scales=2, steps=1, hidden=6, alpha=0.1, bounded=True)[1:], None),
    "cglow": (lambda: models.cglow((1, 4, 4), (1, 8, 8), scales=2, steps=2, hidden=6, conditioning=5)[1:], (1, 8, 8)),
}


def gradients(flow: Flow, x: Tensor, context: Tensor | None) -> dict[str, Tensor]:
    """Gradients of a weighted sum of log p(x) with respect to x, the context, and every parameter by its name."""
    inputs = {"x": x.clone().requires_grad_()}
    if context is not None:
        inputs["context"] = context.clone().requires_grad_()
    named = dict(flow.named_parameters())
    weights = torch.linspace(0.5, 2, len(x), dtype=x.dtype)
    total = (weights * flow(inputs["x"], inputs.get("context"))).sum()
    tensors = [*inputs.values(), *named.values()]
    found = torch.autograd.grad(total, tensors, allow_unused=True)
    own = {id(tensor): gradient for tensor, gradient in zip(tensors, found, strict=True)}
    return {name: own[id(tensor)] for name, tensor in (inputs | named).items()}


def assert_same_gradients(flow: Flow, way, x: Tensor, context: Tensor | None) -> None:
    stored, recomputing = flow.train(), way(flow.train())
    expected = gradients(stored, x, context)
    found = gradients(recomputing, x, context)
    # The names of the parameters differ, but their order is the same.
    assert [id(parameter) for parameter in flow.parameters()] == [id(p) for p in recomputing.parameters()]
    for (name, gradient), other in zip(expected.items(), found.values(), strict=True):
        if gradient is None:
            assert other is None or not other.any(), name
        else:
            torch.testing.assert_close(other, gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item(), msg=name)
    assert any(gradient is not None and gradient.any() for gradient in expected.values())


@WAYS
@pytest.mark.parametrize("name", EXACT)
def test_gradients_through_each_bijection_are_autograds(name, way):
    shape = BIJECTIONS[name].shapes[-1]
    layer, x, context = build(name, shape)
    assert_same_gradients(Flow([layer], StandardNormal(), shape).double(), way, x, context)


@WAYS
@pytest.mark.parametrize("name", MODELS)
def test_gradients_through_each_model_are_autograds(name, way):
    make, context_shape = MODELS[name]
    torch.manual_seed(0)
    flow = make().double()
    x = 0.1 + 0.8 * torch.rand(4, *flow.shape, dtype=torch.float64)  # within (0, 1), as the logit needs
    context = None if context_shape is None else torch.rand(4, *context_shape, dtype=torch.float64)
    randomize(flow, 0.1)
    flow.initialize(x, context)
    assert_same_gradients(flow, way, x, context)


@WAYS
def test_a_parameter_that_two_layers_share_gets_both_gradients(way):
    torch.manual_seed(0)
    conv = Invertible1x1Conv(2)
    layer = AdditiveCoupling(alternating_mask(2, 0), MLP(1, 1, 4, 1, nn.Tanh))
    randomize(layer)
    flow = Flow([conv, layer, conv], StandardNormal(), (2,)).double()
    assert_same_gradients(flow, way, torch.randn(5, 2, dtype=torch.float64), None)


@WAYS
def test_a_frozen_parameter_gets_no_gradient(way):
    flow = models.realnvp_points(2, hidden=4)
    frozen = flow.chain[0].network.layers[0].weight.requires_grad_(False)
    way(flow).log_prob(torch.randn(3, 2)).sum().backward()
    assert frozen.grad is None
    assert flow.chain[0].network.layers[-1].weight.grad.any()


@WAYS
def test_training_goes_the_same_way(way):
    """The training starts from integers with noise, and moves the original flow's parameters."""
    losses, flows = [], []
    data = torch.randint(8, (64, 1, 4, 4))
    for change in (lambda flow: flow, way):
        torch.manual_seed(0)
        flow = models.glow((1, 4, 4), levels=8, scales=2, steps=2, hidden=4)
        losses.append(fit(change(flow), data, 5, batch_size=16).loss)
        flows.append(flow)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    for one, other in zip(*(flow.parameters() for flow in flows), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@WAYS
def test_a_flow_without_layers_stays_one(way):
    x = torch.randn(3, 2)
    torch.testing.assert_close(way(Flow([], StandardNormal(), (2,))).log_prob(x), StandardNormal().log_prob(x))


@WAYS
def test_it_is_the_same_flow(way):
    torch.manual_seed(0)
    flow = models.glow((1, 8, 8), levels=8, steps=1, hidden=4)[1:].eval()
    x = torch.rand(3, 1, 8, 8)
    randomize(flow, 0.1)
    flow.initialize(x)
    changed = way(flow)
    assert not changed.training
    with torch.no_grad():
        torch.testing.assert_close(changed.log_prob(x), flow.log_prob(x))
        torch.testing.assert_close(changed.decode(flow.encode(x)), x, rtol=0, atol=1e-4)
        assert changed.sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.realnvp((1, 4, 4), hidden=2, blocks=0), "got FlowBatchNorm at position 4"),
        (lambda: Flow([Rescale(2.0), FlowBatchNorm(3)], StandardNormal(), (3,)), "got FlowBatchNorm at position 1"),
        (lambda: Flow([FlowBatchNorm(3), Rescale(2.0)], StandardNormal(), (3,)), "got FlowBatchNorm at position 0"),
        (lambda: models.realnvp((1, 4, 4), scales=2, hidden=2, blocks=0)[:5], "got FlowBatchNorm at position 4"),
    ],
)
def test_what_no_inverse_gives_back_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=f"flow: expected exact bijections, {message}"):
        reversible(make())


def test_batch_norms_are_updated_once_where_only_couplings_are_run_again():
    flow = models.realnvp((1, 4, 4), hidden=2, blocks=0).train()
    x = torch.randint(256, (8, 1, 4, 4))
    torch.manual_seed(0)
    checkpointed(flow)(x).sum().backward()
    found = [norm.running_mean.clone() for norm in flow.chain if isinstance(norm, FlowBatchNorm)]
    for norm in flow.chain:
        if isinstance(norm, FlowBatchNorm):
            norm.running_mean.zero_(), norm.running_variance.fill_(1)
    torch.manual_seed(0)
    flow(x)
    for mean, norm in zip(found, (norm for norm in flow.chain if isinstance(norm, FlowBatchNorm)), strict=True):
        torch.testing.assert_close(mean, norm.running_mean)


def stored(flow: Flow, x: Tensor) -> int:
    """The bytes that autograd keeps between forward and backward pass, without parameters, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in flow.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        log_prob = flow.log_prob(x)
        total = sum(sizes.values())  # while the graph lives, no storage is used twice
    assert log_prob.requires_grad
    return total


def test_what_is_stored_does_not_grow_with_depth():
    found: dict[str, list[int]] = {"stored": [], "checkpointed": [], "reversible": []}
    for steps in (2, 4, 8):
        torch.manual_seed(0)
        flow = models.glow((1, 16, 16), scales=2, steps=steps, hidden=16)[1:]
        x = torch.rand(4, 1, 16, 16)
        flow.initialize(x)
        for name, way in (("stored", lambda flow: flow), ("checkpointed", checkpointed), ("reversible", reversible)):
            found[name].append(stored(way(flow), x))
    assert max(found["reversible"]) <= 1.1 * min(found["reversible"])
    assert found["stored"][-1] > 3.5 * found["stored"][0]
    assert found["reversible"][-1] < found["checkpointed"][-1] < found["stored"][-1]


def test_memory_is_the_most_held_at_a_time() -> None:
    def task() -> None:
        a = torch.ones(2**18)  # 1 MiB
        b = torch.ones(2**19)
        del a
        torch.ones(2**18)
        del b
        torch.ones(2**18)

    assert peak_memory(task) / 2**20 == pytest.approx(3, abs=0.01)
