"""The papers' models, each a readable list of layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from nflows_lib.bijection import Layer
from nflows_lib.coupling import AdditiveCoupling, alternating_mask
from nflows_lib.dequantization import Rescale, UniformDequantize
from nflows_lib.distributions import Base, StandardLogistic
from nflows_lib.flow import Flow
from nflows_lib.networks import MLP
from nflows_lib.normalization import DiagonalScaling


def nice(
    dims: int,
    *,
    levels: int | None = None,
    couplings: int = 4,
    hidden: int = 1000,
    depth: int = 5,
    activation: Callable[[], nn.Module] = nn.ReLU,
    base: Base | None = None,
) -> Flow:
    """NICE (Dinh et al. 2014): additive couplings with alternating halves, then one diagonal scaling.

    The defaults are the paper's for MNIST: 4 couplings, 5 hidden layers of 1000 rectified units, logistic prior.

    Args:
        dims: D, the size of one example, a vector (images are flattened).
        levels: number of levels where the data are integers, which are then dequantized and brought to [0, 1);
            None where the data are real numbers.
        couplings: number of additive couplings; two at least, or half of the vector is never changed.
        hidden: width of the networks' hidden layers.
        depth: number of hidden layers in each network.
        activation: builds the networks' nonlinearity.
        base: prior of the latent; standard logistic where None.
    """
    if couplings < 2:
        raise ValueError(f"couplings: expected at least 2, so that each half is changed, got {couplings}")
    layers: list[Layer] = [] if levels is None else [UniformDequantize(levels), Rescale(1 / levels)]
    for i in range(couplings):
        layers.append(AdditiveCoupling(alternating_mask(dims, i % 2), MLP(dims, dims, hidden, depth, activation)))
    layers.append(DiagonalScaling(dims))
    return Flow(layers, base or StandardLogistic(), (dims,))
