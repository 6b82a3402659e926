"""A normalizing flow: a list of layers and a base density, together a likelihood that can be sampled from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from nflows_lib.bijection import Chain, Layer, Shape, check_shape
from nflows_lib.distributions import Base
from nflows_lib.multiscale import FactorOut


class Flow(nn.Module):
    """log p(x) = log p_base(z) + the sum of the layers' contributions, where z is what the layers make of x.

    With a noise layer among them (``UniformDequantize``), log p(x) is a one-draw lower bound of the log-likelihood of
    the discrete data (chapter 2); without one it is exact.

    Args:
        layers: the steps from data to latent, in that order.
        base: density of the latent, which is (B, D) for it whatever the layers' last shape.
        shape: shape of one example of the *data*, without the batch: (2,) for points, (1, 28, 28) for images.

    Raises:
        ValueError: a layer cannot take the shape that reaches it.

    >>> import torch
    >>> from nflows_lib.dequantization import Rescale
    >>> from nflows_lib.distributions import StandardNormal
    >>> flow = Flow([Rescale(0.5)], StandardNormal(), shape=(2,))      # x = 2 z: a normal of standard deviation 2
    >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)             # -log(2 pi) - 2 log 2
    -3.2242
    """

    def __init__(self, layers: Iterable[Layer], base: Base, shape: Sequence[int]) -> None:
        super().__init__()
        self.chain = Chain(layers)
        self.base = base
        self.shape = tuple(shape)
        self.dims = math.prod(self.shape)  # D of the input, the D of bits per dimension
        self.latent_shape = self.chain.output_shape(self.shape)
        # How many levels discrete data have; None where the data are real numbers.
        self.levels: int | None = getattr(self.chain[0], "levels", None) if len(self.chain) else None

    def forward(self, x: Tensor, context: Tensor | None = None, validate: bool = True) -> Tensor:
        """log p(x) in nats: ``(B, *shape)`` to (B,). The same as :meth:`log_prob`, and what wrappers of modules call.

        Args:
            x: a batch of examples.
            context: one row for each example, where the flow is conditional.
            validate: whether to check x and context first. On a GPU that waits for all that was queued, so
                :func:`nflows_lib.training.fit` checks its data once and skips it in each step.

        Raises:
            ValueError: x has another shape or type than the flow's data, or values that are not finite or out of range.
        """
        if validate:
            check_data(x, context, self.shape, self.levels)
        z, contribution = self.chain(x, context)
        return self.base.log_prob(z.flatten(1)) + contribution

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats: ``(B, *shape)`` to (B,)."""
        return self(x, context)

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None, draws: int = 1) -> Tensor:
        """-log2 p(x) / D, averaged over that many draws of the noise: ``(B, *shape)`` to (B,).

        D counts the dimensions of the input. The average of logs is the bound; it does not tighten with more draws,
        it only gets less noisy.
        """
        if draws < 1:
            raise ValueError(f"draws: expected at least 1, got {draws}")
        log_prob = torch.stack([self(x, context) for _ in range(draws)]).mean(0)
        return -log_prob / (self.dims * math.log(2))

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The latent of x: ``(B, *shape)`` to (B, D)."""
        check_data(x, context, self.shape, self.levels)
        return self.chain(x, context)[0].flatten(1)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The data whose latent is z: (B, D) to ``(B, *shape)``."""
        check_shape("z", z, (self.dims,))
        check_context(context, len(z))
        return self.chain.inverse(z.unflatten(1, self.latent_shape), context)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, context: Tensor | None = None) -> Tensor:
        """n draws, ``(n, *shape)``. The latent is multiplied by the temperature; below 1 it stays nearer the mode.

        A context holds one row for each sample.
        """
        check_sampling(n, temperature)
        like = next(self.parameters(), torch.empty(0))
        z = self.base.sample(torch.empty(n, self.dims, device=like.device, dtype=like.dtype))
        return self.decode(temperature * z, context)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Run every layer's data-dependent initialisation on a first batch. Call it once, before the optimizer."""
        check_data(x, context, self.shape, self.levels)
        if len(x) == 0:
            raise ValueError("x: expected a first batch of at least one example, got none")
        self.chain.initialize(x, context)

    def summary(self) -> str:
        """A table of the layers: what each is, the shape of one example after it, its number of parameters.

        Layers inside another are indented; its own line counts what is not theirs.
        """
        rows = [("data", self.shape, ""), *_rows(self.chain, self.shape)]
        rows.append((type(self.base).__name__, (self.dims,), f"{sum(p.numel() for p in self.parameters()):,} in all"))
        width = max(len(title) for title, _, _ in rows)
        lines = (f"{title:{width}}  {shape!s:13} {parameters:>12}" for title, shape, parameters in rows)
        return "\n".join(line.rstrip() for line in lines)


def check_data(
    x: Tensor,
    context: Tensor | None,
    shape: Shape,
    levels: int | None,
    names: tuple[str, str] = ("x", "context"),
) -> None:
    """Raise a ValueError unless x is a batch of examples of this shape, and its values are those of such data.

    That is integers from 0 to levels - 1; or, where levels is None, finite floats. The context must belong to them.
    The names are those of both arguments in an error.
    """
    name, name_of_context = names
    check_shape(name, x, shape)
    check_context(context, len(x), name_of_context)
    if torch.compiler.is_compiling():
        return  # a compiled graph cannot look at values
    if levels is None:
        if not x.is_floating_point():
            raise ValueError(
                f"{name}: expected floating-point numbers, got {x.dtype}; discrete data need UniformDequantize first"
            )
        if not x.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    else:
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"{name}: expected integers from 0 to {levels - 1}, got {x.dtype}")
        # As Python numbers: 256 compared within uint8 would wrap around to 0.
        low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
        if low < 0 or high >= levels:
            raise ValueError(f"{name}: expected integers from 0 to {levels - 1}, got values from {low} to {high}")


def check_context(context: Tensor | None, n: int, name: str = "context") -> None:
    """Raise a ValueError unless a context, where there is one, has n rows of finite floats."""
    if context is None:
        return
    if context.shape[:1] != (n,):
        got = len(context) if context.dim() else "a single number"
        raise ValueError(f"{name}: expected {n} rows, one for each example, got {got}")
    if not context.is_floating_point():
        raise ValueError(f"{name}: expected floating-point numbers, got {context.dtype}")
    if not torch.compiler.is_compiling() and not context.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def check_sampling(n: int, temperature: float) -> None:
    """Raise a ValueError unless so many samples can be drawn at that temperature."""
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    if not temperature >= 0:
        raise ValueError(f"temperature: expected a number >= 0, got {temperature}")


def _rows(layers: Chain, shape: Shape, indent: str = "") -> list[tuple[str, Shape, str]]:
    """The lines of a summary: title, shape of one example afterwards, number of parameters."""
    rows = []
    for layer in layers:
        shape = layer.output_shape(shape)
        own, inside = sum(p.numel() for p in layer.parameters()), []
        if isinstance(layer, FactorOut):
            own -= sum(p.numel() for p in layer.inner.parameters())
            inside = _rows(layer.inner, layer.half, indent + "  ")
        rows += [(f"{indent}{type(layer).__name__}({layer.extra_repr()})", shape, f"{own:,}"), *inside]
    return rows
