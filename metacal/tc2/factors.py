"""Factors V [d, n_f]: how many there can be, and what they are made of."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from metacal._safe import wide


class VacuousReconstructionWarning(UserWarning):
    """The calibration can keep everything: n_f = d, and nothing makes the weights sparse."""


def check_num_factors(n_f: int, d: int, *, sparse: bool) -> None:
    """Refuses n_f > d, and warns at n_f = d where calibration has nothing to do (fact 2 of the documentation).

    ``sparse`` says whether anything makes the weights sparse: a sparse output or a sparsity term in the loss.

    Errors:
        ValueError: n_f > d. Such a V cannot have orthonormal columns: min ||V^T V - I||_F = sqrt(n_f - d).

    Warns:
        VacuousReconstructionWarning: n_f = d without sparsity. V V^T = I for every square orthonormal V, so the
            reconstruction term is zero and z~ = z is optimal.

    >>> check_num_factors(8, 8, sparse=True)
    """
    if n_f > d:
        raise ValueError(
            f"`n_f` should be at most d = {d}, the representation's dimension: {n_f} columns of length {d} cannot be "
            f"orthonormal (||V^T V - I||_F is at least {math.sqrt(n_f - d):.3g}). Got n_f = {n_f}; pass n_f <= {d}."
        )
    if n_f == d and not sparse:
        warnings.warn(
            f"With n_f = d = {d} and no sparsity an orthonormal V reconstructs everything (V V^T = I): calibration has nothing to "
            "learn. Pass n_f < d, a sparse output (SoftThreshold, TopK), or a loss with a sparsity term.",
            VacuousReconstructionWarning,
            stacklevel=2,
        )


def statistics(Z: Tensor) -> Tensor:
    """S = [mu, Sigma] [d, d + 1]: mean and biased covariance (divided by R, so that R = 1 is fine) of Z [..., d].

    >>> statistics(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    tensor([[1., 1., 2.],
            [2., 2., 4.]])
    """
    Z = wide(Z).flatten(end_dim=-2)  # [R, d]
    mu = Z.mean(0)
    centred = Z - mu
    return torch.cat([mu[:, None], centred.mT @ centred / len(Z)], dim=1)


def orthonormalised(A: Tensor) -> Tensor:
    """The Q [d, n_f] of A = Q R with R's diagonal positive: unique, so a smooth function of a full-rank A [d, n_f].

    >>> orthonormalised(torch.tensor([[-3.0, 1.0], [-4.0, 1.0]]))
    tensor([[-0.6000,  0.8000],
            [-0.8000, -0.6000]])
    """
    Q, R = torch.linalg.qr(A)
    # LAPACK leaves the signs of R's diagonal to the data: without fixing them V's columns would jump between steps.
    return torch.where(R.diagonal() < 0, -Q, Q)


def cosine_basis(d: int, n_f: int, like: Tensor) -> Tensor:
    """The first n_f columns of the orthonormal DCT-II matrix [d, n_f], of ``like``'s device and dtype (at least float32)."""
    i, j = torch.arange(d, device=like.device)[:, None], torch.arange(n_f, device=like.device)
    # cos(pi (2i + 1) j / 2d); reduced modulo the period in integers, or float32 would lose four digits at d = 512.
    phase = ((2 * i + 1) * j % (4 * d)).to(torch.promote_types(like.dtype, torch.float32))
    basis = (phase * (math.pi / (2 * d))).cos() * math.sqrt(2 / d)
    return torch.where(j == 0, math.sqrt(0.5) * basis, basis)
