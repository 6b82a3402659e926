"""A flow on vectors as JSON, for programs without PyTorch, such as the book's playground."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from nflows_lib.bijection import Layer
from nflows_lib.coupling import AdditiveCoupling, AffineCoupling
from nflows_lib.distributions import StandardLogistic, StandardNormal
from nflows_lib.flow import Flow
from nflows_lib.networks import MLP
from nflows_lib.normalization import DiagonalScaling

BASES = {"normal": StandardNormal, "logistic": StandardLogistic}
COUPLINGS = {"additive": AdditiveCoupling, "affine": AffineCoupling}
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


def to_json(flow: Flow) -> dict[str, Any]:
    """All that a program needs to run the flow in both directions, as an object that ``json.dumps`` takes.

    The object is ``{"dims": D, "base": ..., "layers": [...]}``. The layers go from data to latent, each with its
    ``kind``:

    - ``scaling``: z = exp(s) x; ``log_scale`` holds the D numbers s.
    - ``additive`` or ``affine``: ``passes`` is the mask, D numbers, 1 for each number that the coupling leaves
      unchanged and 0 for the others. ``gain`` is the g of an affine coupling. ``widths`` and ``activation`` describe
      the network. ``weights`` holds the network's numbers: for each layer the matrix, row by row, and then the bias, as
      little-endian float16 in base64. The network takes the unchanged numbers and returns one shift for each of the
      others. The network of an affine coupling first returns, for all of them, the numbers that become log-scales.

    Weights are rounded to float16, three decimal digits. So :func:`from_json` does not read back this flow but the
    rounded one, which is the flow that the other program runs.

    Raises:
        ValueError: if the flow is not on vectors, if it has a part that is not listed here (or a subclass of a part,
            which may compute something else), or if a number is not finite or too large for float16.
    """
    if not isinstance(flow, Flow):
        raise ValueError(f"flow: expected a Flow, got {type(flow).__name__}")
    if len(flow.shape) != 1:
        raise ValueError(f"flow: expected a flow on vectors, got one on examples of shape {flow.shape}")
    return {
        "dims": flow.dims,
        "base": _name_of(flow.base, BASES, "base"),
        "layers": [_layer_to_json(layer) for layer in flow.chain],
    }


def from_json(content: Mapping[str, Any]) -> Flow:
    """The flow that :func:`to_json` described, with its rounded weights, in evaluation mode.

    Raises:
        ValueError: if an entry is missing, of another type, unknown or not finite, if the hidden layers have different
            widths, or if the number of weights does not fit them.
    """
    dims = _entry(content, "dims", int)
    layers = [_layer_from_json(layer, dims) for layer in _entry(content, "layers", list)]
    return Flow(layers, _find(content, BASES, "base")(), (dims,)).eval()


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    if type(layer) is DiagonalScaling:
        return {"kind": "scaling", "log_scale": [_rounded(s, "log_scale") for s in layer.log_scale.tolist()]}
    content = {"kind": _name_of(layer, COUPLINGS, "layer"), "passes": layer.mask.int().tolist()}
    if type(layer) is AffineCoupling:
        content["gain"] = _rounded(layer.gain.item(), "gain")
    if type(layer.network) is not MLP or layer.network.context:
        raise ValueError(f"network: expected an MLP without a context, got {type(layer.network).__name__}")
    linear = [part for part in layer.network.layers if isinstance(part, nn.Linear)]
    content["widths"] = [part.out_features for part in linear[:-1]]
    content["activation"] = _name_of(layer.network.layers[1], ACTIVATIONS, "activation")
    content["weights"] = encode(parameters_to_vector(layer.network.parameters()))
    return content


def _layer_from_json(content: Mapping[str, Any], dims: int) -> Layer:
    if _entry(content, "kind", str) == "scaling":
        layer = DiagonalScaling(dims)
        layer.log_scale.data.copy_(_numbers(content, "log_scale", dims))
        return layer
    coupling = _find(content, COUPLINGS, "kind")
    mask = _numbers(content, "passes", dims).bool()
    if mask.tolist() != content["passes"]:
        raise ValueError(f"passes: expected only 0 and 1, got {content['passes']}")
    widths, activation = _entry(content, "widths", list), _find(content, ACTIVATIONS, "activation")
    passes = int(mask.sum())
    outputs = (2 if coupling is AffineCoupling else 1) * (dims - passes)
    if not widths or any(width != widths[0] for width in widths):
        raise ValueError(f"widths: expected equal widths, got {widths}")
    network = MLP(passes, outputs, widths[0], len(widths), activation)
    layer = coupling(mask, network)
    if coupling is AffineCoupling:
        _finite(_entry(content, "gain", int | float), "gain")
        layer.gain.data.fill_(content["gain"])
    values = decode(_entry(content, "weights", str))
    needed = sum(parameter.numel() for parameter in network.parameters())
    if needed != len(values):
        raise ValueError(f"weights: expected {needed} numbers, got {len(values)}")
    vector_to_parameters(values, network.parameters())
    return layer


def encode(values: Tensor) -> str:
    """Numbers as little-endian float16 in base64, row by row.

    Raises:
        ValueError: if a number is not finite or too large for float16.
    """
    half = values.detach().cpu().half()
    if not half.isfinite().all():
        raise ValueError(
            f"values: expected finite numbers within ±65,504, got {values.abs().max().item():g} as the largest"
        )
    return base64.b64encode(half.numpy().astype("<f2").tobytes()).decode("ascii")


def decode(text: str) -> Tensor:
    """The numbers that :func:`encode` wrote, as float32, (N,).

    Raises:
        ValueError: if the text is not the base64 of finite numbers in float16.

    >>> decode(encode(torch.tensor([1.0, -0.5])))
    tensor([ 1.0000, -0.5000])
    """
    try:
        values = torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float16).float()
    except ValueError as error:
        raise ValueError(f"weights: expected numbers in float16 as base64, got {text[:20]!r}: {error}") from error
    if not values.isfinite().all():
        raise ValueError("weights: expected finite numbers, got NaN or infinity")
    return values


def _rounded(value: float, argument: str) -> float:
    return round(_finite(value, argument), 5)


def _finite(value: float, argument: str) -> float:
    if not math.isfinite(value):  # JSON has no NaN and no infinity
        raise ValueError(f"{argument}: expected finite numbers, got {value}")
    return value


def _name_of(thing: object, names: Mapping[str, type], argument: str) -> str:
    for name, kind in names.items():
        if type(thing) is kind:
            return name
    raise ValueError(f"{argument}: expected {_listed(names)}, got {type(thing).__name__}")


def _find(content: Mapping[str, Any], names: Mapping[str, type], key: str) -> type:
    name = _entry(content, key, str)
    if name not in names:
        raise ValueError(f"{key}: expected {', '.join(names)}, got {name!r}")
    return names[name]


def _entry(content: Any, key: str, kind: Any) -> Any:
    """An entry of a JSON object, which must be of this type."""
    if not isinstance(content, Mapping) or key not in content:
        got = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"content: expected an object with the entry {key}, got {got or 'an empty one'}")
    if not isinstance(content[key], kind):
        raise ValueError(f"{key}: expected {getattr(kind, '__name__', kind)}, got {type(content[key]).__name__}")
    return content[key]


def _numbers(content: Mapping[str, Any], key: str, n: int) -> Tensor:
    """An entry that is a list of n finite numbers, as float32."""
    values = _entry(content, key, list)
    if len(values) != n or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{key}: expected {n} numbers, got {values}")
    return torch.tensor([_finite(value, key) for value in values])


def _listed(names: Mapping[str, type]) -> str:
    return ", ".join(kind.__name__ for kind in names.values())
