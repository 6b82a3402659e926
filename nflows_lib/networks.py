"""The inside of a coupling or of a prior: ordinary networks, which are never inverted and may compute anything."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from nflows_lib.bijection import check_positive, check_shape, initialize_network
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
        check_positive(inputs=inputs, outputs=outputs, hidden=hidden, depth=depth)
        self.context = context
        widths = [inputs + context] + [hidden] * depth
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), activation()]
        self.layers = nn.Sequential(*layers, zeroed(nn.Linear(hidden, outputs)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, inputs) and, where the network has one, a context (B, context) to (B, outputs)."""
        if self.context:
            check_shape("context", context, (self.context,))
            x = torch.cat([x, context], dim=1)
        return self.layers(x)


class ResNet(nn.Module):
    """A convolutional network from images to images of the same height and width (Dinh et al. 2016, section 4.1).

    The input enters as [h, -h] and a ReLU, which keeps both signs. A 3x3 convolution, residual blocks of two, and a
    1x1 skip connection from the first layer and from each block to a sum; from that, through a ReLU, a 1x1 convolution
    makes the output. All weights are normalised (Salimans and Kingma 2016). There is no batch norm inside, so the
    output for one image depends on no other.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        hidden: channels of every hidden layer.
        blocks: number of residual blocks.
        context: channels of the context, an image or a vector, which joins the input; 0 where there is none.
        precision: what the convolutions compute in; the output is float32 all the same. bfloat16 is several times
            faster on a GPU, and on a processor that has instructions for it.
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
        check_positive(inputs=inputs, outputs=outputs, hidden=hidden)
        if blocks < 0:
            raise ValueError(f"blocks: expected at least 0, got {blocks}")
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
        """(B, inputs, H, W) and, if there is one, a context, (B, context, ...), to (B, outputs, H, W)."""
        with computing_in(self.precision, x):
            h = self.first(_joined([x.relu(), (-x).relu()], context, self.context))
            total = self.skips[0](h)
            for block, skip in zip(self.blocks, self.skips[1:], strict=True):
                h = h + block(h)
                total = total + skip(h)
            return finished(self.last(total.relu()), x)


class ActNormConv(nn.Module):
    """A convolution and an ActNorm after it, in one: the scales multiply the weights, the shift is the bias.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        size: of the kernel, odd; height and width stay as they are.
    """

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.05 * torch.randn(outputs, inputs, size, size))
        self.log_scale = nn.Parameter(torch.zeros(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        weight = self.weight * self.log_scale.exp()[:, None, None, None]
        return F.conv2d(x, weight, self.bias, padding="same")

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Let this batch leave with mean 0 and variance 1 in every channel, unless an earlier call has done so."""
        if not self.initialized:
            standardise_first(self, F.conv2d(x, self.weight, padding="same"))


class GlowNet(nn.Module):
    """The network of Glow's couplings, from images to images of the same height and width (Kingma and Dhariwal 2018).

    A 3x3 convolution, a 1x1 and a 3x3. After the first two an ActNorm, as in their code, and a ReLU; the last starts
    at zero, so that a coupling starts with the same scale everywhere (section 3.3).

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        hidden: channels of both hidden layers.
        context: channels of the context, an image or a vector, which joins the input; 0 where there is none.
        precision: as of :class:`ResNet`.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: int, context: int = 0, precision: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        check_positive(inputs=inputs, outputs=outputs, hidden=hidden)
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
        """Initialise both ActNorms from a first batch."""
        h = _joined([x], context, self.context)
        for layer in self.layers[:-1]:
            initialize_network(layer, h, None)
            h = layer(h)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W) and, if there is one, a context, (B, context, ...), to (B, outputs, H, W)."""
        with computing_in(self.precision, x):
            return finished(self.layers(_joined([x], context, self.context)), x)


class ZeroConv(nn.Module):
    """A 3x3 convolution that starts at zero: a learned prior that starts as the standard normal (Glow's code).

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        context: channels of the context, an image or a vector, which joins the input; 0 where there is none.
    """

    def __init__(self, inputs: int, outputs: int, context: int = 0) -> None:
        super().__init__()
        self.context = context
        self.conv = zeroed(nn.Conv2d(inputs + context, outputs, 3, padding=1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """As :meth:`GlowNet.forward`."""
        return finished(self.conv(_joined([x], context, self.context)), x)


class BoundedPrior(nn.Module):
    """The network of a learned prior with its log-scale, the second half of what it gives, kept within [-g, g].

    It becomes g tanh(.), with one learned gain g, which starts at 1, as in the couplings: both directions stay tame.

    Args:
        network: called as ``network(x, context)``; gives (B, 2 C, H, W).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.gain = nn.Parameter(torch.ones(()))

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Initialise the network from a first batch."""
        initialize_network(self.network, x, context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """As of the network."""
        mean, log_scale = self.network(x, context).chunk(2, dim=1)
        return torch.cat([mean, self.gain * log_scale.tanh()], dim=1)


def check_precision(precision: torch.dtype) -> None:
    """Raise a ValueError unless networks compute in it."""
    if precision not in (torch.float32, torch.bfloat16):
        raise ValueError(f"precision: expected torch.float32 or torch.bfloat16, got {precision}")


def computing_in(precision: torch.dtype, x: Tensor) -> torch.autocast:
    """While it is entered, convolutions on x's device compute in that precision."""
    return torch.autocast(x.device.type, precision, enabled=precision != torch.float32)


def _joined(parts: list[Tensor], context: Tensor | None, channels: int) -> Tensor:
    """Images and a context with that number of channels, concatenated, in the layout where convolutions are fastest.

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
    """The images in memory pixel by pixel, all channels of a pixel together, where convolutions are fastest.

    It is torch's memory format ``channels_last``, reached by operations that ``torch.func.vmap`` knows.
    """
    return images.movedim(1, -1).contiguous().movedim(-1, 1)


def finished(output: Tensor, x: Tensor) -> Tensor:
    """In the type and the layout of x, examples or channels first: arithmetic on both is then several times faster."""
    if x.dim() == 4 and x.stride(1) > x.stride(0):
        return output.to(x.dtype).transpose(0, 1).contiguous().transpose(0, 1)
    return output.to(x.dtype, memory_format=torch.contiguous_format)


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """The layer, with weights and biases of 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _conv(inputs: int, outputs: int, size: int) -> nn.Module:
    return weight_norm(nn.Conv2d(inputs, outputs, size, padding=size // 2))
