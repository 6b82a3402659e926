"""How good a flow is on data that it has not seen: log-likelihoods, their mean and standard error, tighter bounds."""

import math

import torch
from torch import Tensor

from nflows_lib import settings
from nflows_lib.checks import check_at_least, check_tensor
from nflows_lib.distributions import random_state_kept
from nflows_lib.flow import Flow, check_context


@torch.no_grad()
def log_likelihoods(
    flow: Flow, data: Tensor, context: Tensor | None = None, draws: int = 1, batch_size: int = 250
) -> Tensor:
    r"""Return :math:`\log p` of every example in nats, ``(N,)``, on the CPU, averaged over draws of the noise.

    The flow is evaluated in evaluation mode. Its mode and torch's global random state are the same before and after. A
    progress bar appears after two seconds.

    Args:
        flow: the flow.
        data: examples, ``(N, *flow.shape)``.
        context: one row per example, if the flow is conditional.
        draws: number of draws of the noise per example.
        batch_size: number of examples that are evaluated at once.

    Raises:
        ValueError: if draws or batch_size is below 1, there is no example, or the data or the contexts are refused by
            :meth:`~nflows_lib.flow.Flow.forward`.
    """
    check_tensor("data", data)
    check_at_least(1, draws=draws, batch_size=batch_size, **{"examples in data": len(data)})
    check_context(context, len(data))
    device = next(flow.parameters(), data).device  # a flow without parameters has no device of its own
    training = flow.training
    flow.eval()
    values = []
    try:
        with random_state_kept(device), settings.progress_bar(len(data), 1, delay=2) as bar:
            for i in range(0, len(data), batch_size):
                x = data[i : i + batch_size].to(device)
                c = None if context is None else context[i : i + batch_size].to(device)
                values.append(torch.stack([flow(x, c) for _ in range(draws)]).mean(0).cpu())
                bar.update(len(x))
    finally:
        flow.train(training)
    return torch.cat(values)


def log_mean_exp(log_p: Tensor) -> Tensor:
    """Return the importance-weighted bound: the log of the mean of p over draws of the noise, the first dimension.

    It maps log-likelihoods ``(draws, ...)`` to ``(...)``, in nats. It is at least as tight as the mean of the logs
    (Burda et al. 2016).
    """
    return log_p.logsumexp(0) - math.log(len(log_p))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of independent values and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()
