"""Layers that scale and shift each dimension, or each channel, by itself."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from nflows_lib.bijection import AffineBijection, Bijection, ChannelBijection, Shape
from nflows_lib.checks import check_at_least, check_shape


class DiagonalScaling(Bijection):
    r"""A learned scale factor for each dimension (Dinh et al. 2014, section 3.3).

    .. math::

        z_i = e^{s_i} x_i

    The log-determinant is :math:`\sum_i s_i`. The log-scales :math:`s_i` start at 0, so the layer starts as the
    identity.

    Args:
        dims: number of dimensions D of one example, which is a vector.

    Raises:
        ValueError: if dims is below 1.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        check_at_least(1, dims=dims)
        self.log_scale = nn.Parameter(torch.zeros(dims))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_shape("x", x, self.log_scale.shape)
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        check_shape("z", z, self.log_scale.shape)
        return z * (-self.log_scale).exp()

    def output_shape(self, shape: Shape) -> Shape:
        if tuple(shape) != tuple(self.log_scale.shape):
            raise ValueError(f"dims: expected {shape}, that of one example, got {tuple(self.log_scale.shape)}")
        return shape


class FlowBatchNorm(ChannelBijection):
    r"""Batch normalisation as a layer of a flow, for each dimension or channel (Dinh et al. 2016, section 3.7).

    .. math::

        z_c &= \frac{x_c - \mu_c}{\sqrt{\nu_c + \delta}} \\
        \log\left|\det \mathbf{J}\right| &= -\frac{H W}{2} \sum_c \log(\nu_c + \delta)

    :math:`H W` is the number of pixels, 1 for vectors. In training mode the means :math:`\mu_c` and variances
    :math:`\nu_c` are those of the batch (under torchrun, of the batches of all processes together), and the running
    averages follow them. In evaluation mode, and in the inverse in either mode, the running averages are used.

    Only in evaluation mode is the layer a bijection of each example. In training mode an example's z depends on the
    other examples of the batch, and the inverse does not return x (chapter 3, F15 and F16).

    Args:
        channels: number of channels C of vectors ``(B, C)`` or images ``(B, C, H, W)``.
        eps: :math:`\delta`, which is added to the variance.
        momentum: weight of the newest batch in the running averages.

    Raises:
        ValueError: if a batch in training mode has only one value per channel, whose variance says nothing.
    """

    def __init__(self, channels: int, eps: float = 1e-4, momentum: float = 0.1) -> None:
        super().__init__(channels)
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_channels("x", x)
        mean, variance = self.running_mean, self.running_variance
        if self.training:
            if x[:, 0].numel() < 2:
                raise ValueError(f"x: expected several values per channel in training mode, got shape {tuple(x.shape)}")
            variance, own = torch.var_mean(x.transpose(0, 1).flatten(1), dim=1, correction=0)
            # Under torchrun each process holds a part of the batch: take mean and variance over all parts.
            mean = mean_over_processes(own)
            variance = mean_over_processes(variance + (own - mean).square())
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_variance.lerp_(variance.detach(), self.momentum)
        log_det = -0.5 * math.prod(x.shape[2:]) * (variance + self.eps).log().sum()
        return (x - _per_channel(mean, x)) * _per_channel((variance + self.eps).rsqrt(), x), log_det.expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_channels("z", z)
        return z * _per_channel((self.running_variance + self.eps).sqrt(), z) + _per_channel(self.running_mean, z)


class ActNorm(AffineBijection):
    r"""A learned scale factor and shift per channel, set from a first batch (Kingma and Dhariwal 2018, section 3.1).

    .. math::

        z_c &= e^{s_c} x_c + b_c \\
        \log\left|\det \mathbf{J}\right| &= H W \sum_c s_c

    :math:`H W` is the number of pixels, 1 for vectors. :meth:`initialize` sets :math:`s` and :math:`b` so that a first
    batch leaves with mean 0 and variance 1 in every channel. From then on they are ordinary parameters, and an
    example's z does not depend on other examples. Whether the layer has been initialised is part of its state (a
    buffer): a layer that was trained, saved and loaded is not initialised again.

    Args:
        channels: number of channels C of vectors ``(B, C)`` or images ``(B, C, H, W)``.

    Raises:
        ValueError: if the layer is used before it is initialised, or if a channel of the first batch is constant or not
            finite.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self._ready = False  # the buffer's value, cached: reading the buffer would force a GPU sync

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_channels("x", x)
        log_scale, bias = self.log_scale_and_bias(context)
        log_det = math.prod(x.shape[2:]) * log_scale.sum(-1)
        return x * _per_channel(log_scale.exp(), x) + _per_channel(bias, x), log_det.expand(len(x))

    def as_affine(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        log_scale, bias = self.log_scale_and_bias(context)
        return log_scale.exp().diag_embed(), bias, log_scale.sum(-1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_channels("z", z)
        log_scale, bias = self.log_scale_and_bias(context)
        return (z - _per_channel(bias, z)) * _per_channel((-log_scale).exp(), z)

    def log_scale_and_bias(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return s and b: ``(C,)`` each if all examples share them, ``(B, C)`` each if they depend on the context."""
        return self.log_scale, self.bias

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set s and b so that this batch leaves standardised. Do nothing if an earlier call has set them.

        Raises:
            ValueError: if a channel of the batch is constant or not finite.
        """
        if not self.initialized:
            super().check_channels("x", x)
            standardise_first(self, x)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._ready = False  # the loaded state may be that of a layer that was never initialised

    def check_channels(self, name: str, x: Tensor) -> None:
        """Raise a ValueError if x has another number of channels, or if the layer was never initialised."""
        super().check_channels(name, x)
        if torch.compiler.is_compiling() or self._ready:
            return
        self._ready = bool(self.initialized)
        if not self._ready:
            raise ValueError("ActNorm: expected one call of Flow.initialize with a batch of data first, got none")


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean of a tensor over the processes that train together (torchrun).

    Each process calls it with a tensor of the same shape. Gradients flow back through the mean to every process. A
    process that trains alone gets its own values back.
    """
    if not dist.is_available() or not dist.is_initialized():
        return values
    return _SumOverProcesses.apply(values) / dist.get_world_size()


class _SumOverProcesses(torch.autograd.Function):
    """The sum over processes. The values of one process act on the losses of all, so the gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, gradient)


def standardise_first(layer: nn.Module, x: Tensor) -> None:
    """Set the layer's log-scale and bias so that x leaves with mean 0 and variance 1 per channel, and set its flag.

    Raises:
        ValueError: if a channel of x is constant or not finite.
    """
    values = x.transpose(0, 1).flatten(1)
    broken = (~values.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"x: expected a first batch of finite values, got NaN or infinity in channels {broken}")
    constant = (values.amin(1) == values.amax(1)).nonzero().flatten().tolist()
    if constant:  # no scale factor gives such a channel a variance of 1
        raise ValueError(f"x: expected a first batch whose channels vary, got constant channels {constant}")
    std, mean = torch.std_mean(values, dim=1, correction=0)
    layer.log_scale.copy_(-std.log())
    layer.bias.copy_(-mean / std)
    layer.initialized.fill_(True)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) or (B, C), shaped so that it broadcasts against (B, C, ...)."""
    return values.view(*values.shape, *[1] * (x.dim() - 2))
