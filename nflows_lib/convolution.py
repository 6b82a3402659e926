"""Layers that mix the channels at every pixel: a fixed permutation, or a learned invertible matrix."""

import torch
from torch import Tensor, nn

from nflows_lib.bijection import AffineBijection, ChannelBijection, forward_as_one, mix
from nflows_lib.checks import check_tensor


class ChannelPermutation(ChannelBijection):
    """A fixed permutation of the channels: channel i of z is channel ``order[i]`` of x.

    The log-determinant is 0.

    Args:
        order: a permutation of 0 to C - 1, shape ``(C,)``, of type ``torch.int64``.

    Raises:
        ValueError: if order is not a permutation of 0 to C - 1, or not of type ``torch.int64``.
    """

    def __init__(self, order: Tensor) -> None:
        check_tensor("order", order)
        super().__init__(len(torch.atleast_1d(order)))
        if order.dtype != torch.long:  # an index of type bool or uint8 would select channels
            raise ValueError(f"order: expected integers of type torch.int64, got {order.dtype}")
        if not torch.equal(order.sort().values, torch.arange(self.channels, device=order.device)):
            raise ValueError(f"order: expected a permutation of 0 to {self.channels - 1}, got {order.tolist()}")
        self.register_buffer("order", order)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.check_channels("x", x)
        return x[:, self.order], x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_channels("z", z)
        return z[:, self.order.argsort()]


class Invertible1x1Conv(AffineBijection):
    r"""A learned C x C matrix that multiplies the channels at every pixel (Kingma and Dhariwal 2018, section 3.2).

    .. math::

        z &= \mathbf{W} x \\
        \log\left|\det \mathbf{J}\right| &= H W \log\left|\det \mathbf{W}\right|

    :math:`H W` is the number of pixels, 1 for vectors. :math:`\mathbf{W}` starts as a random orthogonal matrix.

    If ``lu`` is True, the layer learns the factors of
    :math:`\mathbf{W} = \mathbf{P} \mathbf{L} (\mathbf{U} + \operatorname{diag} \omega)`. :math:`\mathbf{P}` is a fixed
    permutation, :math:`\mathbf{L}` is lower triangular with ones on its diagonal, :math:`\mathbf{U}` is strictly upper
    triangular, and the signs of :math:`\omega` are fixed. Then :math:`\log|\det \mathbf{W}|` is the sum of
    :math:`\log|\omega_c|`, in :math:`O(C)`, and :math:`\det \mathbf{W}` never crosses 0.

    Args:
        channels: number of channels C of vectors ``(B, C)`` or images ``(B, C, H, W)``.
        lu: whether the factors are learned. If not, :math:`\mathbf{W}` itself is learned, and its log-determinant costs
            :math:`O(C^3)`.

    Raises:
        ValueError: if channels is below 1.
    """

    def __init__(self, channels: int, lu: bool = True) -> None:
        super().__init__(channels)
        self.lu = lu
        weight = torch.linalg.qr(torch.randn(channels, channels)).Q
        if lu:
            permutation, lower, upper = torch.linalg.lu(weight)
            scale = upper.diagonal()
            self.register_buffer("permutation", permutation)
            self.register_buffer("sign", scale.sign())
            # One matrix holds all learned numbers: L below the diagonal, U above it, log|omega| on it.
            self.factors = nn.Parameter(lower.tril(-1) + upper.triu(1) + scale.abs().log().diag())
        else:
            self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return forward_as_one([self], x, context)

    def as_affine(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.lu:
            return self.weight, self.weight.new_zeros(self.channels), torch.linalg.slogdet(self.weight).logabsdet
        factors = self.lu_factors(context)
        log_scale = factors.diagonal(dim1=-2, dim2=-1)
        # P L (U + diag(omega)): the unit diagonal of L gives a P of its own, diag(omega) scales the columns of P L.
        lower = self.permutation @ factors.tril(-1) + self.permutation
        weight = lower @ factors.triu(1) + lower * (self.sign * log_scale.exp())[..., None, :]
        return weight, factors.new_zeros(self.channels), log_scale.sum(-1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        self.check_channels("z", z)
        if not self.lu:
            return mix(torch.linalg.inv(self.weight), z, z.new_zeros(self.channels))
        factors = self.lu_factors(context)
        scale = self.sign * factors.diagonal(dim1=-2, dim2=-1).exp()
        # solve_triangular reads only one triangle of the factors, and no diagonal if told that it is unitriangular.
        solved = torch.linalg.solve_triangular(factors, self.permutation.T, upper=False, unitriangular=True)
        upper = factors.triu(1) + scale.diag_embed()
        return mix(torch.linalg.solve_triangular(upper, solved, upper=True), z, z.new_zeros(self.channels))

    def lu_factors(self, context: Tensor | None) -> Tensor:
        r"""Return one matrix with L below the diagonal, U above it, and :math:`\log|\omega|` on it.

        Its shape is ``(C, C)`` if all examples share it, ``(B, C, C)`` if it depends on the context.
        """
        return self.factors

    def extra_repr(self) -> str:
        return "LU" if self.lu else "plain"
