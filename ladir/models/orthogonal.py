"""Muon's arithmetic (Jordan et al. 2024): a matrix step whose singular values are all about one."""

from __future__ import annotations

import torch
from torch import Tensor

#: quintic Newton-Schulz coefficients of the reference implementation: fast, singular values end between 0.7 and 1.2
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_EPS = 1e-7
#: root mean square of AdamW's usual step (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2)
_ADAMW_RMS = 0.2


def orthogonalised(matrices: Tensor) -> Tensor:
    """``matrices`` [N, m, n] = U S V' with their singular values S brought near 1, by Newton-Schulz steps in their own dtype.

    A zero matrix stays zero.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + _EPS)
    for _ in range(_STEPS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def step_scale(rows: int, columns: int) -> float:
    """What makes an orthogonalised step [rows, columns] as long as one of AdamW, so that both take the same learning rate."""
    return _ADAMW_RMS * float(max(rows, columns)) ** 0.5
