"""Tests of the export: a flow goes to JSON and back, and parts that cannot be written are refused by name."""

import json
import math

import pytest
import torch
from torch import nn

from nflows_lib import models
from nflows_lib.coupling import AdditiveCoupling, AffineCoupling, alternating_mask
from nflows_lib.distributions import StandardLogistic, StandardNormal
from nflows_lib.experiments import export, memory
from nflows_lib.flow import Flow
from nflows_lib.networks import MLP
from nflows_lib.normalization import DiagonalScaling


def random_flow(flow: Flow) -> Flow:
    """A flow whose parameters have all moved from their first values, so that none can be forgotten unnoticed."""
    torch.manual_seed(0)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.5)
    return flow


FLOWS = {
    "nice, logistic": lambda: models.nice(3, couplings=3, hidden=5, depth=2),
    "nice, normal, tanh": lambda: models.nice(
        2, couplings=2, hidden=4, depth=1, activation=nn.Tanh, base=StandardNormal()
    ),
    "realnvp": lambda: models.realnvp_points(2, couplings=3, hidden=6),
    "realnvp, silu, odd": lambda: models.realnvp_points(5, couplings=2, hidden=6, depth=3, activation=nn.SiLU),
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_comes_back(name: str) -> None:
    """Rounding happens once: the JSON of the flow that was read back is the same to the letter."""
    flow = random_flow(FLOWS[name]())
    content = json.loads(json.dumps(export.to_json(flow)))
    again = export.from_json(content)
    assert export.to_json(again) == content
    assert not again.training
    assert type(again.base) is type(flow.base)
    x = torch.randn(50, *flow.shape)
    assert torch.allclose(again.encode(x), flow.encode(x), atol=0.05, rtol=0.01)
    assert torch.allclose(again.log_prob(x), flow.log_prob(x), atol=0.05, rtol=0.01)


@pytest.mark.parametrize("build", [models.nice, models.realnvp_points])
def test_the_rounding_is_that_of_float16_and_nothing_else(build) -> None:
    """Weights that float16 holds exactly give the same flow, so no column or row that matters is left out."""
    flow = random_flow(build(4, couplings=3, hidden=5))
    for parameter in flow.parameters():
        parameter.data.copy_(parameter.half().float().mul(8).round().div(8))
    again = export.from_json(export.to_json(flow))
    x = torch.randn(50, 4)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert torch.equal(again.encode(x), flow.encode(x))


class Subclass(AffineCoupling):
    pass


class Scaled(DiagonalScaling):
    pass


class Perceptron(MLP):
    pass


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (
            lambda: models.glow((1, 4, 4), scales=1, steps=1, hidden=4),
            r"flow: expected a flow on vectors, got .*\(1, 4, 4\)",
        ),
        (lambda: models.nice(4, levels=16), "layer: expected AdditiveCoupling, AffineCoupling, got UniformDequantize"),
        (
            lambda: Flow([Subclass(alternating_mask(2, 0), MLP(1, 2, 3, 1))], StandardNormal(), (2,)),
            "layer: expected .*, got Subclass",
        ),
        (
            lambda: Flow([AdditiveCoupling(alternating_mask(2, 0), nn.Linear(1, 1))], StandardNormal(), (2,)),
            "network: expected an MLP without a context, got Linear",
        ),
        (
            lambda: Flow([AdditiveCoupling(alternating_mask(2, 0), Perceptron(1, 1, 3, 1))], StandardNormal(), (2,)),
            "network: expected an MLP without a context, got Perceptron",
        ),
        (
            lambda: Flow(
                [AdditiveCoupling(alternating_mask(2, 0), MLP(1, 1, 3, 1, context=2))], StandardNormal(), (2,)
            ),
            "network: expected an MLP without a context, got MLP",
        ),
        (lambda: Flow([Scaled(2)], StandardNormal(), (2,)), "layer: expected .*, got Scaled"),
        (
            lambda: Flow([AdditiveCoupling(alternating_mask(2, 0), MLP(1, 1, 3, 1, nn.ELU))], StandardNormal(), (2,)),
            "activation: expected ReLU, SiLU, Tanh, got ELU",
        ),
        (lambda: Flow(models.nice(2).chain, nn.Identity(), (2,)), "base: expected .*, got Identity"),
    ],
)
def test_what_cannot_be_written_is_refused(flow, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.to_json(flow())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4])
def test_a_weight_that_float16_cannot_hold_is_refused(value: float) -> None:
    flow = models.nice(2, couplings=2, hidden=3, depth=1)
    flow.chain[0].network.layers[0].bias.data[0] = value
    with pytest.raises(ValueError, match=r"values: expected finite numbers within ±65,504, got .* as the largest"):
        export.to_json(flow)


@pytest.mark.parametrize(("build", "name"), [(models.nice, "log_scale"), (models.realnvp_points, "gain")])
def test_a_number_that_json_cannot_hold_is_refused(build, name: str) -> None:
    flow = build(2, couplings=2, hidden=3)
    getattr(flow.chain[-1], name).data.fill_(float("nan"))
    with pytest.raises(ValueError, match=f"{name}: expected finite numbers, got nan"):
        export.to_json(flow)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "spline"}, "kind: expected additive, affine, got 'spline'"),
        ({"activation": "gelu"}, "activation: expected relu, silu, tanh, got 'gelu'"),
        ({"widths": [4, 5]}, r"widths: expected equal widths, got \[4, 5\]"),
        ({"widths": []}, r"widths: expected equal widths, got \[\]"),
        ({"widths": [7]}, "weights: expected 22 numbers, got 10"),
        ({"widths": 7}, "widths: expected list, got int"),
        ({"widths": [[3]]}, r"hidden: expected a whole number, got \[3\]"),
        ({"kind": ["additive"]}, "kind: expected str, got list"),
        ({"passes": [1]}, r"passes: expected 2 numbers, got \[1\]"),
        ({"passes": ["1", "0"]}, "passes: expected 2 numbers, got"),
        ({"passes": [2, 0]}, r"passes: expected only 0 and 1, got \[2, 0\]"),
        ({"weights": None}, "weights: expected str, got NoneType"),
        ({"weights": "no base64"}, "weights: expected numbers in float16 as base64, got 'no base64'"),
        ({"weights": ""}, "weights: expected numbers in float16 as base64, got ''"),
        ({"weights": "AHw="}, "weights: expected finite numbers, got NaN or infinity"),
        ({"kind": "scaling", "log_scale": [0.5]}, r"log_scale: expected 2 numbers, got \[0.5\]"),
        ({"kind": "scaling", "log_scale": [0.5, math.nan]}, "log_scale: expected finite numbers, got nan"),
        ({"kind": "affine", "gain": math.inf}, "gain: expected finite numbers, got inf"),
    ],
)
def test_content_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    content = export.to_json(models.nice(2, couplings=2, hidden=3, depth=1, base=StandardLogistic()))
    content["layers"][0] |= change
    with pytest.raises(ValueError, match=message):
        export.from_json(content)


def test_what_is_no_flow_is_refused() -> None:
    for function in (export.to_json, memory.reversible):
        with pytest.raises(ValueError, match=r"^flow: expected a Flow, got Linear$"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "content: expected an object with the entry dims, got NoneType"),
        ([], "content: expected an object with the entry dims, got list"),
        ({}, "content: expected an object with the entry dims, got an empty one"),
        ({"dims": 2}, "content: expected an object with the entry layers, got dims"),
        ({"dims": "2", "layers": []}, "dims: expected int, got str"),
        ({"dims": 2, "layers": [3]}, "content: expected an object with the entry kind, got int"),
        ({"dims": 2, "layers": [{"kind": "additive"}]}, "content: expected an object with the entry passes, got kind"),
        ({"dims": 2, "layers": []}, "content: expected an object with the entry base, got dims, layers"),
    ],
)
def test_content_of_another_form_is_refused(content, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        export.from_json(content)
