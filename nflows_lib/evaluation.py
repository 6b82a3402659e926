"""How good a flow is on data that it has not seen: log-likelihoods, their mean and error, bounds over many draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nflows_lib import settings
from nflows_lib.bijection import check_positive
from nflows_lib.distributions import random_state_kept
from nflows_lib.flow import Flow


@torch.no_grad()
def log_likelihoods(
    flow: Flow, data: Tensor, context: Tensor | None = None, draws: int = 1, batch_size: int = 250
) -> Tensor:
    """log p of every example in nats, (N,), on the CPU, in evaluation mode, averaged over draws of the noise.

    The global random state is the same before and after. A progress bar appears after two seconds.

    Raises:
        ValueError: draws or batch_size is below 1, or the data are not the flow's.
    """
    check_positive(draws=draws, batch_size=batch_size)
    device = next(flow.parameters(), data).device  # a flow need not have parameters to be evaluated
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
    """The importance-weighted bound: log of the mean of p over the first dimension, the draws of the noise.

    (draws, ...) to (...), in nats. It is at least as tight as the mean of the logs (Burda et al. 2016).
    """
    return log_p.logsumexp(0) - math.log(len(log_p))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent values and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()
