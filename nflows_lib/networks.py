"""The inside of a coupling: ordinary networks, never inverted, free to be anything."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nflows_lib.bijection import check_shape


class MLP(nn.Module):
    """A fully connected network from vectors to vectors.

    The last layer starts at zero, so that a coupling starts as the identity (Kingma and Dhariwal 2018, section 3.3).

    Args:
        inputs: size of a vector that comes in.
        outputs: size of a vector that goes out.
        hidden: width of every hidden layer.
        depth: number of hidden layers.
        activation: builds the nonlinearity after each hidden layer.
        context: size of the context vector, which is appended to the input; 0 where there is none.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int,
        depth: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        context: int = 0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth: expected at least 1 hidden layer, got {depth}")
        self.context = context
        widths = [inputs + context] + [hidden] * depth
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), activation()]
        last = nn.Linear(hidden, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, inputs) and, where the network has one, a context (B, context) to (B, outputs)."""
        if self.context:
            if context is None:
                raise ValueError(f"context: expected shape (B, {self.context}), got None")
            check_shape("context", context, (self.context,))
            x = torch.cat([x, context], dim=1)
        return self.layers(x)
