"""What training shows beside its losses: ``metric/<name>`` as (sum, count), from tensors that the losses needed anyway."""

from __future__ import annotations

import torch
from torch import Tensor

#: a latent element whose mean varies more than this over the sentences carries something
ACTIVE_VARIANCE = 0.01
#: parts of the noise path whose flow loss is told apart
TIME_BINS = 4


@torch.no_grad()
def vae_metrics(mistakes: Tensor, tokens: int, mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """Reconstruction and latents of N sentences with ``tokens`` labels: ``mistakes`` [N], ``mean`` and ``logvar`` [N, L, d].

    ``exact``, ``token_accuracy``: shares of sentences without a mistake and of right tokens; ``posterior_std``, ``latent_std``:
    mean standard deviation of a posterior, spread of the means; ``active_units``: elements of a sentence's latents whose
    mean varies over the sentences by more than 0.01 (variance; Burda et al. 2016, "Importance weighted autoencoders", 5.2).
    """
    count = len(mean)
    active = (mean.var(0, correction=min(count - 1, 1)) > ACTIVE_VARIANCE).sum()
    return {
        "metric/exact": _pair((mistakes == 0).sum(), count),
        "metric/token_accuracy": _pair(tokens - mistakes.sum(), tokens),
        "metric/posterior_std": _pair((0.5 * logvar).exp().mean() * count, count),
        "metric/latent_std": _pair(mean.std() * count, count),
        "metric/active_units": _pair(active * count, count) if count > 1 else _pair(active, 0),  # one has no variance
    }


@torch.no_grad()
def flow_by_time(losses: Tensor, t: Tensor, elements: int) -> dict[str, Tensor]:
    """``flow_t<low>-<high>``: the flow loss by quarter of the path (t = 1: noise).

    ``losses`` [K, M]: sums over the ``elements`` of each noisy block, denoised from t [K, M]; finished ones (t = 0) do not count.
    """
    losses = losses.flatten().float()
    part = (t.flatten() * TIME_BINS).long().clamp(0, TIME_BINS - 1)
    values = torch.stack([losses, elements * (t.flatten() > 0).float()], dim=1)
    bins = values.new_zeros(TIME_BINS, 2).index_add_(0, part, values)
    return {f"metric/flow_t{i / TIME_BINS:.2f}-{(i + 1) / TIME_BINS:.2f}": pair for i, pair in enumerate(bins)}


@torch.no_grad()
def accuracy(name: str, right: Tensor) -> dict[str, Tensor]:
    """``<name>_accuracy``: the share of ``right``, bool [n], that is true."""
    return {f"metric/{name}_accuracy": _pair(right.sum(), len(right))}


def _pair(total: Tensor, count: int) -> Tensor:
    total = total.float()
    return torch.stack([total, total.new_tensor(float(count))])
