"""A normalizing flow: a list of layers and a base density, which together give a likelihood and samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from nflows_lib.bijection import Chain, Layer, Shape
from nflows_lib.checks import check_at_least, check_shape, check_tensor, is_number, is_shape
from nflows_lib.distributions import Base
from nflows_lib.multiscale import FactorOut


class Flow(nn.Module):
    r"""A likelihood that can be evaluated and sampled from, made of a list of layers and a base density.

    .. math::

        \log p(x) = \log p_Z(z) + \sum_i c_i

    Here :math:`z` is the output of the last layer, and :math:`c_i` is the contribution of layer i, in nats.

    If the first layer is a noise layer (:class:`~nflows_lib.dequantization.UniformDequantize`), each value of
    :math:`\log p(x)` uses one draw of the noise. Averaged over the noise, it is a lower bound of the log-likelihood of
    the discrete data (chapter 2). Without a noise layer it is exact.

    A slice is a flow of consecutive layers, with the same base and the same parameters: ``flow[1:]`` is the flow
    without its noise layer. Write checkpoints from the whole flow, never from a slice (see
    :class:`~nflows_lib.bijection.Chain`).

    Args:
        layers: the steps, in the order from data to latent.
        base: density of the latent, which reaches it as ``(B, D)`` whatever shape the last layer gives.
        shape: shape of one example of the *data*, without the batch dimension: ``(2,)`` for points, ``(1, 28, 28)`` for
            images.

    Raises:
        ValueError: if a size is below 1, a layer cannot take the shape that reaches it, or a noise layer is not the
            first layer.

    If :math:`x = 2 z`, x is normal with standard deviation 2. In two dimensions, its log-density at 0 is
    :math:`-\log 2\pi - 2 \log 2`:

    >>> import torch
    >>> from nflows_lib.dequantization import Rescale
    >>> from nflows_lib.distributions import StandardNormal
    >>> flow = Flow([Rescale(0.5)], StandardNormal(), shape=(2,))
    >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)
    -3.2242
    """

    def __init__(self, layers: Iterable[Layer], base: Base, shape: Sequence[int]) -> None:
        super().__init__()
        self.chain = Chain(layers)
        self.base = base
        if not is_shape(shape):
            raise ValueError(f"shape: expected sizes of at least 1, such as (2,) or (1, 28, 28), got {shape!r}")
        self.shape = tuple(shape)
        self.dims = math.prod(self.shape)  # D, counted on the input, as bits per dimension needs it
        self.latent_shape = self.chain.output_shape(self.shape)
        # The number of levels of discrete data; None if the data are real numbers.
        self.levels: int | None = getattr(self.chain[0], "levels", None) if len(self.chain) else None
        for position, layer in self.chain.layers.named_modules():
            if position not in ("", "0") and getattr(layer, "levels", None) is not None:
                got = f"{type(layer).__name__} at position {position}"
                raise ValueError(f"layers: expected a noise layer only at position 0, got {got}")

    def __getitem__(self, part: slice) -> Flow:
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise ValueError(f"part: expected a slice of consecutive layers, as in flow[1:], got {part!r}")
        skipped = part.indices(len(self.chain))[0]
        shape = self.chain[:skipped].output_shape(self.shape)
        return Flow(self.chain[part], self.base, shape).train(self.training)

    def forward(self, x: Tensor, context: Tensor | None = None, validate: bool = True) -> Tensor:
        r"""Return :math:`\log p(x)` in nats: ``(B, *shape)`` to ``(B,)``.

        This is :meth:`log_prob` under the name that DataParallel, DistributedDataParallel and torch.compile call.

        Args:
            x: a batch of examples.
            context: one row per example, if the flow is conditional.
            validate: whether to check x and context first. On a GPU the check forces a sync, so
                :func:`~nflows_lib.training.fit` checks its data once and skips the check in each step.

        Raises:
            ValueError: if x has another shape or type than the flow's data, if a value is not finite or out of range,
                or if the context does not have one row per example.
        """
        if validate:
            check_data(self, x, context)
        z, contribution = self.chain(x, context)
        return self.base.log_prob(z.flatten(1)) + contribution

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Return :math:`\log p(x)` in nats: ``(B, *shape)`` to ``(B,)``.

        Arguments and errors are those of :meth:`forward`.
        """
        return self(x, context)

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None, draws: int = 1) -> Tensor:
        r"""Return :math:`-\log_2 p(x) / D`, averaged over draws of the noise, in bits/dim: ``(B, *shape)`` to ``(B,)``.

        D counts the dimensions of the input. What is averaged over draws is the logarithm: more draws make the result
        less noisy, but they do not tighten the bound.

        Args:
            x: a batch of examples.
            context: one row per example, if the flow is conditional.
            draws: number of draws of the noise per example, at least 1.

        Raises:
            ValueError: if draws is below 1, or if x or the context is refused by :meth:`forward`.
        """
        check_at_least(1, draws=draws)
        log_prob = torch.stack([self(x, context) for _ in range(draws)]).mean(0)
        return -log_prob / (self.dims * math.log(2))

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the latent of x: ``(B, *shape)`` to ``(B, D)``. Errors are those of :meth:`forward`."""
        check_data(self, x, context)
        return self.chain(x, context)[0].flatten(1)

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the data whose latent is z: ``(B, D)`` to ``(B, *shape)``.

        Raises:
            ValueError: if z has another shape, or if the context does not have one row of finite floats per latent.
        """
        check_shape("z", z, (self.dims,))
        check_context(context, len(z))
        return self.chain.inverse(z.unflatten(1, self.latent_shape), context)

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, context: Tensor | None = None) -> Tensor:
        """Draw n examples, ``(n, *shape)``.

        Args:
            n: number of examples, at least 1.
            temperature: factor on the latent before it is decoded, at least 0. Below 1, the latents lie nearer to the
                mode of the base density.
            context: one row per sample, if the flow is conditional.

        Raises:
            ValueError: if n is below 1, temperature is negative or not finite, or the context does not have n rows of
                finite floats.
        """
        check_sampling(n, temperature)
        like = next(self.parameters(), torch.empty(0))
        z = self.base.sample(torch.empty(n, self.dims, device=like.device, dtype=like.dtype))
        return self.decode(temperature * z, context)

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Run the data-dependent initialisation of every layer on a first batch.

        Call it once, before the first step, and before anything copies, wraps or compiles the flow.

        Raises:
            ValueError: if the batch is empty, or is refused by :meth:`forward`.
        """
        check_data(self, x, context, need=1)
        self.chain.initialize(x, context)

    def summary(self) -> str:
        """Return a table of the layers, one line each: name, shape of one example afterwards, number of parameters.

        Layers inside another layer are indented. The line of the outer layer counts only the parameters of its own.
        """
        rows = [("data", self.shape, ""), *_rows(self.chain, self.shape)]
        rows.append((type(self.base).__name__, (self.dims,), f"{sum(p.numel() for p in self.parameters()):,} in all"))
        width = max(len(title) for title, _, _ in rows)
        lines = (f"{title:{width}}  {shape!s:13} {parameters:>12}" for title, shape, parameters in rows)
        return "\n".join(line.rstrip() for line in lines)


def check_data(
    model: nn.Module, x: Tensor, context: Tensor | None = None, names: tuple[str, str] = ("x", "context"), need: int = 0
) -> None:
    """Raise a ValueError unless x is a batch of the model's data and the context has one row per example.

    The data are integers from 0 to ``model.levels - 1``. If ``model.levels`` is None, they are finite floats of the
    same type as the model's parameters. In a compiled graph and under ``torch.func.vmap`` no value can be read, so only
    shapes and types are checked.

    Args:
        model: a :class:`Flow`, or another model with a ``shape`` and ``levels``.
        x: the batch, ``(B, *shape)``.
        context: contexts of the examples, ``(B, ...)``, or None.
        names: what an error calls x and the context.
        need: number of examples that the batch must have at least.
    """
    name, name_of_context = names
    dtype = next((parameter.dtype for parameter in model.parameters()), None)
    check_shape(name, x, model.shape)
    if len(x) < need:
        raise ValueError(f"{name}: expected at least one example, got none")
    check_context(context, len(x), name_of_context, dtype)
    if model.levels is None:
        _check_floats(name, x, dtype, "; discrete data need UniformDequantize first")
        return
    expected = f"{name}: expected integers from 0 to {model.levels - 1}"
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{expected}, got {x.dtype}")
    if x.numel():
        # Compare as int64: within uint8, 256 would wrap around to 0.
        low, high = x.min().long(), x.max().long()
        if not _holds((low >= 0) & (high < model.levels)):
            raise ValueError(f"{expected}, got values from {low} to {high}")


def check_context(context: Tensor | None, n: int, name: str = "context", dtype: torch.dtype | None = None) -> None:
    """Raise a ValueError unless the context is None or has n rows of finite floats.

    Args:
        context: one row per example, ``(n, ...)``, or None.
        n: number of examples.
        name: what an error calls the context.
        dtype: type that the floats must have; None allows any.
    """
    if context is None:
        return
    check_tensor(name, context)
    if context.shape[:1] != (n,):
        got = len(context) if context.dim() else "a single number"
        raise ValueError(f"{name}: expected one row per example, {n} in all, got {got}")
    _check_floats(name, context, dtype)


def _check_floats(name: str, values: Tensor, dtype: torch.dtype | None, hint: str = "") -> None:
    """Raise a ValueError unless the values are finite floats of the type, if one is given."""
    if not values.is_floating_point():
        raise ValueError(f"{name}: expected floating-point numbers, got {values.dtype}{hint}")
    if values.dtype != (dtype or values.dtype):
        raise ValueError(f"{name}: expected {dtype}, as the flow's parameters are, got {values.dtype}")
    if values.numel() and not _holds(torch.stack(values.aminmax()).isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def _holds(condition: Tensor) -> bool:
    """Whether a condition on values holds; True where no value can be read (in a compiled graph, under vmap)."""
    try:
        return torch.compiler.is_compiling() or bool(condition)
    except RuntimeError:
        return True


def check_sampling(n: int, temperature: float) -> None:
    """Raise a ValueError unless n is at least 1 and the temperature is finite and not negative."""
    check_at_least(1, n=n)
    if not is_number(temperature) or temperature < 0:
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")


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
