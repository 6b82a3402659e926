"""Networks for the inside of a coupling or of a prior. They are never inverted, so they may compute anything."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from nflows_lib.bijection import initialize_network
from nflows_lib.checks import check_at_least, check_shape
from nflows_lib.normalization import standardise_first


class MLP(nn.Module):
    """A fully connected network from vectors to vectors.

    The last layer starts at zero, so that a coupling starts as the identity (Kingma and Dhariwal 2018, section 3.3).

    Args:
        inputs: size of a vector that comes in.
        outputs: size of a vector that goes out.
        hidden: width of every hidden layer.
        depth: number of hidden layers.
        activation: builds the nonlinearity after each hidden layer.
        context: size of the context vector, which is appended to the input; 0 if there is no context.

    Raises:
        ValueError: if inputs, outputs, hidden or depth is below 1.
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
        check_at_least(1, inputs=inputs, outputs=outputs, hidden=hidden, depth=depth)
        self.context = context
        widths = [inputs + context] + [hidden] * depth
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), activation()]
        self.layers = nn.Sequential(*layers, zeroed(nn.Linear(hidden, outputs)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map vectors ``(B, inputs)`` and, if the network has one, a context ``(B, context)`` to ``(B, outputs)``.

        Raises:
            ValueError: if the network has a context, and context is None or of another shape.
        """
        if self.context:
            check_shape("context", context, (self.context,))
            x = torch.cat([x, context], dim=1)
        return self.layers(x)


class ResNet(nn.Module):
    r"""A convolutional network of residual blocks, which keeps height and width (Dinh et al. 2016, section 4.1).

    The input x enters as :math:`[\operatorname{ReLU}(x), \operatorname{ReLU}(-x)]`, which keeps both signs. A 3x3
    convolution follows, then residual blocks of two 3x3 convolutions each. 1x1 skip connections add up the output of
    the first convolution and of each block. A ReLU and a 1x1 convolution turn this sum into the output.

    All weights are normalised, :math:`w = g\, v / \lVert v \rVert` (Salimans and Kingma 2016). The network has no batch
    normalisation, so the output for one image does not depend on the other images of the batch.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        hidden: channels of every hidden layer.
        blocks: number of residual blocks.
        context: channels of the context, an image or a vector, which joins the input; 0 if there is no context.
        precision: type that the convolutions compute in; the output has the type of the input in any case. bfloat16 is
            several times faster on a GPU, and on a processor that has instructions for it.

    Raises:
        ValueError: if inputs, outputs or hidden is below 1, blocks is negative, or precision is neither float32 nor
            bfloat16.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int,
        blocks: int,
        context: int = 0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_at_least(1, inputs=inputs, outputs=outputs, hidden=hidden)
        check_at_least(0, blocks=blocks)
        check_precision(precision)
        self.context, self.precision = context, precision
        self.first = _conv(2 * inputs + context, hidden, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ReLU(), _conv(hidden, hidden, 3), nn.ReLU(), _conv(hidden, hidden, 3))
            for _ in range(blocks)
        )
        self.skips = nn.ModuleList(_conv(hidden, hidden, 1) for _ in range(blocks + 1))
        self.last = _conv(hidden, outputs, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map images ``(B, inputs, H, W)`` and, if the network has one, a context to ``(B, outputs, H, W)``.

        The context is an image ``(B, context, H, W)``, or a vector ``(B, context)``, which is repeated at every pixel.

        Raises:
            ValueError: if the network has a context, and context is None or of another shape.
        """
        with computing_in(self.precision, x):
            h = self.first(_joined([x.relu(), (-x).relu()], context, self.context))
            total = self.skips[0](h)
            for block, skip in zip(self.blocks, self.skips[1:], strict=True):
                h = h + block(h)
                total = total + skip(h)
            return finished(self.last(total.relu()), x)


class ActNormConv(nn.Module):
    """A convolution followed by an ActNorm, computed as one convolution.

    The scale factors of the ActNorm multiply the weights, and its shift is the bias.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        size: height and width of the kernel, odd; the image keeps its height and width.
    """

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(outputs, inputs, size, size))
        self.log_scale = nn.Parameter(torch.zeros(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, inputs, H, W)`` to ``(B, outputs, H, W)``."""
        weight = self.weight * self.log_scale.exp()[:, None, None, None]
        return F.conv2d(x, weight, self.bias, padding="same")

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Make this batch leave with mean 0 and variance 1 per channel. Do nothing if an earlier call has done so.

        Raises:
            ValueError: if a channel that leaves is constant or not finite.
        """
        if not self.initialized:
            standardise_first(self, F.conv2d(x, self.weight, padding="same"))


class GlowNet(nn.Module):
    """The network of Glow's couplings, which keeps height and width (Kingma and Dhariwal 2018).

    It has three convolutions: 3x3, 1x1 and 3x3. After each of the first two come an ActNorm, as in the paper's code,
    and a ReLU. The last one starts at zero, so that a coupling starts with the same scale factor everywhere (section
    3.3).

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        hidden: channels of both hidden layers.
        context: channels of the context, an image or a vector, which joins the input; 0 if there is no context.
        precision: type that the convolutions compute in, as in :class:`ResNet`.

    Raises:
        ValueError: if inputs, outputs or hidden is below 1, or precision is neither float32 nor bfloat16.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int, context: int = 0, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        check_at_least(1, inputs=inputs, outputs=outputs, hidden=hidden)
        check_precision(precision)
        self.context, self.precision = context, precision
        self.layers = nn.Sequential(
            ActNormConv(inputs + context, hidden, 3),
            nn.ReLU(inplace=True),
            ActNormConv(hidden, hidden, 1),
            nn.ReLU(inplace=True),
            zeroed(nn.Conv2d(hidden, outputs, 3, padding=1)),
        )

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Initialise both ActNorms from a first batch and its context."""
        h = _joined([x], context, self.context)
        for layer in self.layers[:-1]:
            initialize_network(layer, h, None)
            h = layer(h)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map images ``(B, inputs, H, W)`` and, if the network has one, a context to ``(B, outputs, H, W)``.

        The context is as in :meth:`ResNet.forward`.
        """
        with computing_in(self.precision, x):
            return finished(self.layers(_joined([x], context, self.context)), x)


class ZeroConv(nn.Module):
    """A 3x3 convolution that starts at zero: as a learned prior, it starts as the standard normal (Glow's code).

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        context: channels of the context, an image or a vector, which joins the input; 0 if there is no context.
    """

    def __init__(self, inputs: int, outputs: int, context: int = 0) -> None:
        super().__init__()
        self.context = context
        self.conv = zeroed(nn.Conv2d(inputs + context, outputs, 3, padding=1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map images ``(B, inputs, H, W)`` and, if the network has one, a context to ``(B, outputs, H, W)``.

        The context is as in :meth:`ResNet.forward`.
        """
        return finished(self.conv(_joined([x], context, self.context)), x)


class BoundedPrior(nn.Module):
    r"""The network of a learned prior, with a bounded log-scale.

    The second half of what the inner network gives, :math:`h`, becomes the log-scale :math:`g \tanh h`, with one
    learned gain :math:`g`, which starts at 1, as in the couplings. So the log-scale stays within :math:`[-g, g]`, and
    neither direction can divide by a number close to 0.

    Args:
        network: the inner network, called as ``network(x, context)``; gives ``(B, 2 C, H, W)``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.gain = nn.Parameter(torch.ones(()))

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Initialise the inner network from a first batch and its context."""
        initialize_network(self.network, x, context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the output of the inner network, ``(B, 2 C, H, W)``, with its second half bounded."""
        mean, log_scale = self.network(x, context).chunk(2, dim=1)
        return torch.cat([mean, self.gain * log_scale.tanh()], dim=1)


def check_precision(precision: torch.dtype) -> None:
    """Raise a ValueError unless the precision is ``torch.float32`` or ``torch.bfloat16``."""
    if precision not in (torch.float32, torch.bfloat16):
        raise ValueError(f"precision: expected torch.float32 or torch.bfloat16, got {precision}")


def computing_in(precision: torch.dtype, x: Tensor) -> torch.autocast:
    """Return a context manager inside which convolutions on x's device compute in that precision."""
    return torch.autocast(x.device.type, precision, enabled=precision != torch.float32)


def _joined(parts: list[Tensor], context: Tensor | None, channels: int) -> Tensor:
    """The images and a context of that many channels, concatenated, in the layout in which convolutions are fastest.

    A context that is a vector is repeated at every pixel.
    """
    size = parts[0].shape[2:]
    if channels:
        if context is not None and context.dim() == 2:
            check_shape("context", context, (channels,))
            context = context[..., None, None].expand(-1, -1, *size)
        check_shape("context", context, (channels, *size))
        parts = [*parts, context]
    return channels_last(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])


def channels_last(images: Tensor) -> Tensor:
    """Return the images with all channels of a pixel together in memory, the layout in which convolutions are fastest.

    This is torch's memory format ``channels_last``, reached by operations that ``torch.func.vmap`` supports. Vectors
    ``(B, C)`` stay as they are.
    """
    return images.movedim(1, -1).contiguous().movedim(-1, 1)


def finished(output: Tensor, x: Tensor) -> Tensor:
    """Return a network's output in the type and the memory layout of x, examples first or channels first.

    Arithmetic on two tensors of the same layout is several times faster.
    """
    if x.dim() == 4 and x.stride(1) > x.stride(0):
        return output.to(x.dtype).transpose(0, 1).contiguous().transpose(0, 1)
    return output.to(x.dtype, memory_format=torch.contiguous_format)


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """Set the layer's weights and biases to 0, and return the layer."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _conv(inputs: int, outputs: int, size: int) -> nn.Module:
    return weight_norm(nn.Conv2d(inputs, outputs, size, padding=size // 2))
