"""From the raw integers of an image to real numbers on a scale: the first layers of a flow on discrete data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_lib.bijection import Bijection, Chain, Layer, sum_per_example
from nflows_lib.distributions import StandardLogistic, random_state_kept


class UniformDequantize(Layer):
    """k -> k + eps with eps ~ U[0, 1), drawn again for every value at every call (Theis et al. 2016, section 3.1).

    Integers come in, floats of the flow's own type in [k, k + 1) go out; the inverse takes the floor and clamps it to
    the levels (NaN becomes 0, with a warning). The noise has density 1, so the contribution is 0, and log p(x) becomes
    a one-draw lower bound of log P(k).

    Args:
        levels: number of levels n; the data are integers from 0 to n - 1.
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels: expected at least 2, got {levels}")
        self.levels = levels
        # Of the flow's type, also after flow.double(): the integers and their noise become numbers of this type.
        self.register_buffer("example", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k = x.to(self.example.dtype)
        return _add_within_level(k, torch.rand_like(k)), k.new_zeros(len(k))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        if z.isnan().any():
            warnings.warn(f"{int(z.isnan().sum())} of {z.numel()} values are NaN and become level 0", stacklevel=2)
        return z.nan_to_num(nan=0.0).floor().clamp(0, self.levels - 1).long()

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class VariationalDequantize(UniformDequantize):
    """k -> k + eps, where a flow draws the noise given k (Ho et al. 2019, section 3.1).

    Logistic noise v passes the layers *forward*, with k as their context, and then a sigmoid: eps = sigmoid(f(v; k)).
    Going through it once gives the noise and its log-density, and the contribution is -log q(eps | k). With it log p(x)
    is a one-draw lower bound of log P(k), tight where q is the model's own density within the cell. Layers that
    are the identity give uniform noise and a contribution of 0.

    Args:
        layers: conditional bijections from (B, C, ...) to the same shape. Their context is k brought to [-1, 1].
        levels: number of levels n; the data are integers from 0 to n - 1.
    """

    def __init__(self, layers: Iterable[Layer], levels: int = 256) -> None:
        super().__init__(levels)
        self.noise = Chain(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k = x.to(self.example.dtype)
        base = StandardLogistic()
        v = base.sample(k)
        y, log_det = self.noise(v, self._as_context(k))
        # The sigmoid's own log-determinant is the logistic log-density of where it is taken.
        log_q = base.log_prob(v) - log_det - base.log_prob(y)
        return _add_within_level(k, y.sigmoid()), -log_q

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        k = x.to(self.example.dtype)
        with random_state_kept(k.device):  # whether there is something to initialise or not, a run draws the same
            self.noise.initialize(StandardLogistic().sample(k), self._as_context(k))

    def _as_context(self, k: Tensor) -> Tensor:
        return 2 * k / (self.levels - 1) - 1


def _add_within_level(k: Tensor, eps: Tensor) -> Tensor:
    # In float32, 255 + .999999 rounds up to 256, another level; stay below.
    return torch.minimum(k + eps, torch.nextafter(k + 1, k))


class Rescale(Bijection):
    """x -> scale * x. The log-determinant is D log|scale|: -D log n for n levels brought to the unit interval."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        if scale == 0 or not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number other than 0, got {scale}")
        self.scale = scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = math.prod(x.shape[1:]) * math.log(abs(self.scale))
        return self.scale * x, x.new_full((len(x),), log_det)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return z / self.scale

    def extra_repr(self) -> str:
        return f"{self.scale:.4g}"


class Logit(Bijection):
    """u -> logit(alpha + (1 - 2 alpha) u): from the unit cube to all reals (Dinh et al. 2016, section 4.1).

    Without it a flow gives probability to pixels that cannot exist. alpha keeps the argument off 0 and 1, where the
    logit is infinite. The inverse is bounded, too: it lies within alpha / (1 - 2 alpha) of the unit interval.

    Args:
        alpha: in (0, 1/2). The paper's is 0.05; its text writes alpha + (1 - alpha) u, its code this symmetric form.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha: expected a number between 0 and 1/2, got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = torch.logit(self.alpha + (1 - 2 * self.alpha) * x)
        return y, sum_per_example(F.softplus(y) + F.softplus(-y) + math.log(1 - 2 * self.alpha))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return (z.sigmoid() - self.alpha) / (1 - 2 * self.alpha)

    def extra_repr(self) -> str:
        return f"{self.alpha:.4g}"
