"""The first layers of a flow on discrete data, which turn the raw integers of an image into real numbers."""

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from nflows_lib.bijection import Bijection, Chain, Layer, sum_per_example
from nflows_lib.checks import check_at_least, check_tensor, is_number
from nflows_lib.distributions import StandardLogistic, random_state_kept


class UniformDequantize(Layer):
    r"""Uniform dequantization, which adds noise from [0, 1) to the integers (Theis et al. 2016, section 3.1).

    Forward takes integers k to floats :math:`k + \varepsilon` in :math:`[k, k + 1)`, of the type of the flow's
    parameters. The noise :math:`\varepsilon \sim \mathcal{U}[0, 1)` is redrawn for every value at every call. The
    inverse takes the floor and clamps it to the levels. NaN becomes level 0, with a warning.

    The noise has density 1, so the contribution is 0. The :math:`\log p(x)` of a flow that begins with this layer uses
    one draw of the noise. Averaged over the noise, it is a lower bound of :math:`\log P(k)`.

    Args:
        levels: number of levels n, at least 2; the data are integers from 0 to n - 1.

    Raises:
        ValueError: if levels is below 2.
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        check_at_least(2, levels=levels)
        self.levels = levels
        # flow.double() changes the type of this buffer, too: the integers and their noise become numbers of its type.
        self.register_buffer("example", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k = x.to(self.example.dtype)
        return _add_within_level(k, torch.rand_like(k)), k.new_zeros(len(k))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        check_tensor("z", z)
        if z.isnan().any():
            warnings.warn(f"{int(z.isnan().sum())} of {z.numel()} values are NaN and become level 0", stacklevel=2)
        return z.nan_to_num(nan=0.0).floor().clamp(0, self.levels - 1).long()

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class VariationalDequantize(UniformDequantize):
    r"""Variational dequantization, whose noise a flow draws given the integers k (Ho et al. 2019, section 3.1).

    Logistic noise v goes *forward* through the layers, which get k as their context, and then through a sigmoid:
    :math:`\varepsilon = \sigma(h(v; k))`. One pass gives the noise and its log-density, where :math:`p_v` is the
    logistic density:

    .. math::

        \log q(\varepsilon \mid k) = \log p_v(v) - \log\left|\det \frac{\partial \varepsilon}{\partial v}\right|

    Elsewhere forward leads from data to latent, and the log-determinant is added. This flow leads from its base sample
    to the noise, so its log-determinant is subtracted. The contribution is :math:`-\log q(\varepsilon \mid k)`.
    Averaged over the noise, :math:`\log p(x)` is a lower bound of :math:`\log P(k)`. The bound is tight if q is the
    model's own density within the cell of k, normalised. If the layers are the identity, the noise is uniform and the
    contribution is 0.

    Args:
        layers: conditional bijections that keep the shape ``(B, C, ...)`` of the data. Their context is k, rescaled to
            [-1, 1].
        levels: number of levels n, at least 2; the data are integers from 0 to n - 1.

    Raises:
        ValueError: if levels is below 2.
    """

    def __init__(self, layers: Iterable[Layer], levels: int = 256) -> None:
        super().__init__(levels)
        self.noise = Chain(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        k = x.to(self.example.dtype)
        base = StandardLogistic()
        v = base.sample(k)
        y, log_det = self.noise(v, self._as_context(k))
        # The log-determinant of the sigmoid at y is the logistic log-density of y.
        log_q = base.log_prob(v) - log_det - base.log_prob(y)
        return _add_within_level(k, y.sigmoid()), -log_q

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        k = x.to(self.example.dtype)
        # The state is kept so that a run draws the same numbers whether or not there is something to initialise.
        with random_state_kept(k.device):
            self.noise.initialize(StandardLogistic().sample(k), self._as_context(k))

    def _as_context(self, k: Tensor) -> Tensor:
        """The integers, rescaled to [-1, 1]."""
        return 2 * k / (self.levels - 1) - 1


def _add_within_level(k: Tensor, eps: Tensor) -> Tensor:
    # In float32, 255 + 0.999999 rounds up to 256, which is another level.
    """k + eps, kept below k + 1."""
    return torch.minimum(k + eps, torch.nextafter(k + 1, k))


class Rescale(Bijection):
    r"""Multiplication by a constant, such as 1/n to bring n levels to the unit interval.

    The log-determinant is :math:`D \log|\text{scale}|`, which is :math:`-D \log n` for a scale of :math:`1/n`.

    Args:
        scale: the constant, finite and not 0.

    Raises:
        ValueError: if scale is 0 or not finite.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        if not is_number(scale) or scale == 0:
            raise ValueError(f"scale: expected a finite number other than 0, got {scale}")
        self.scale = scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_tensor("x", x)
        log_det = math.prod(x.shape[1:]) * math.log(abs(self.scale))
        return self.scale * x, x.new_full((len(x),), log_det)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        check_tensor("z", z)
        return z / self.scale

    def extra_repr(self) -> str:
        return f"{self.scale:.4g}"


class Logit(Bijection):
    r"""The logit with a margin, which maps the unit cube to all real numbers (Dinh et al. 2016, section 4.1).

    .. math::

        y = \operatorname{logit}(\alpha + (1 - 2 \alpha)\, u)

    Without the logit a flow gives probability to pixels that cannot exist. The margin :math:`\alpha` keeps the argument
    away from 0 and 1, where the logit is infinite. The inverse is bounded, too: it lies within
    :math:`\alpha / (1 - 2 \alpha)` of the unit interval.

    Args:
        alpha: :math:`\alpha`, between 0 and 1/2. The paper uses 0.05. Its text writes
            :math:`\alpha + (1 - \alpha)\, u`, its code the symmetric form above.

    Raises:
        ValueError: if alpha is not between 0 and 1/2.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not is_number(alpha) or not 0 < alpha < 0.5:
            raise ValueError(f"alpha: expected a number between 0 and 1/2, got {alpha}")
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_tensor("x", x)
        y = torch.logit(self.alpha + (1 - 2 * self.alpha) * x)
        return y, sum_per_example(F.softplus(y) + F.softplus(-y) + math.log(1 - 2 * self.alpha))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        check_tensor("z", z)
        return (z.sigmoid() - self.alpha) / (1 - 2 * self.alpha)

    def extra_repr(self) -> str:
        return f"{self.alpha:.4g}"
