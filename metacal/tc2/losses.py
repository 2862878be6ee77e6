"""The calibration loss L_tc2: named, weighted terms of (Z, V, w), in a literal and a stable form.

Literal, as reported [S]:

    L_v = ||V^T V - I||_F + ||Z - Z V V^T||_F          orthogonality + reconstruction
    L_w = ||z - w V^T||_2 + ||w||_1                    per-sample reconstruction + sparsity (mean over samples [O])
    L_tc2 = L_v + lambda_s L_w

Stable [O], the default:

    L_orth = ||V^T V - I||_F^2 / n_f
    L_rec  = ||Z - Z V V^T||_F^2 / ||Z||_F^2                                     Z detached
    L_w    = mean_j [ ||z_j - w_j V^T||^2 / d + lambda_1 ||w_j||_1 / n_f ]
    L_tc2  = L_orth + L_rec + lambda_s L_w

Squared, because second-order products meet the kink of an unsquared norm exactly where training goes (a Hessian-vector
product near an orthonormal V grows like 1 / ||V^T V - I||_F); normalised, so that d, n_f and the scale of z leave the
balance of the terms alone; and because the literal L_w is degenerate: for orthonormal V, and z in its span, lambda >=
||zV||_inf / ||zV||_2, which is at most 1, makes w = 0 the global minimum of ||z - w V^T||_2 + lambda ||w||_1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metacal import _checks
from metacal._safe import root

Term = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(Z [..., d], V [d, n_f], w [..., n_f]) -> scalar``."""


@dataclass(frozen=True)
class CalibrationLoss:
    """A weighted sum of named terms; called, it returns the total and every term's unweighted value by its name.

    ``loss(Z, V, w) -> (total, {name: value})`` with Z [..., d], V [d, n_f] and w [..., n_f]; both forms are made by
    :func:`literal` and :func:`stable`.

    Args:
        terms: ``{name: term}``.
        weights: ``{name: float or 0-dim tensor}``; a term without one has weight 1.

    Errors:
        ValueError: a weight names no term; ``without`` is given an unknown name.

    >>> loss = stable(lambda_1=0.5).without("reconstruction").with_term("decay", lambda Z, V, w: w.square().mean(), weight=0.01)
    >>> Z, V = torch.ones(4, 3), torch.eye(3)
    >>> total, values = loss(Z, V, Z)
    >>> sorted(values)
    ['decay', 'orthogonality', 'sparsity', 'weight_reconstruction']
    >>> round(total.item(), 6)
    0.06
    """

    terms: Mapping[str, Term]
    weights: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.weights:
            self._known(name)

    def __call__(self, Z: Tensor, V: Tensor, w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values = {name: term(Z, V, w) for name, term in self.terms.items()}
        total = torch.zeros((), dtype=V.dtype, device=V.device)
        for name, value in values.items():
            total = total + self.weights.get(name, 1.0) * value
        return total, values

    def with_term(self, name: str, term: Term, weight: float | Tensor = 1.0) -> CalibrationLoss:
        """This loss with one term added or replaced."""
        return CalibrationLoss({**self.terms, name: term}, {**self.weights, name: weight})

    def with_weight(self, name: str, weight: float | Tensor) -> CalibrationLoss:
        """This loss with one term's weight changed."""
        self._known(name)
        return CalibrationLoss(self.terms, {**self.weights, name: weight})

    def without(self, name: str) -> CalibrationLoss:
        """This loss without one term."""
        self._known(name)
        return CalibrationLoss(
            {key: term for key, term in self.terms.items() if key != name},
            {key: weight for key, weight in self.weights.items() if key != name},
        )

    def _known(self, name: str) -> None:
        if name not in self.terms:
            raise ValueError(f"`{name}` should be one of the loss's terms, {sorted(self.terms)}. Add it with .with_term(name, term).")


def literal(lambda_s: float = 0.1) -> CalibrationLoss:
    """L_tc2 as reported [S]: unsquared norms (see the module for why ``stable`` is the default).

    The norms' derivatives at zero are taken as zero; anywhere near it second derivatives are unbounded.

    >>> total, values = literal()(torch.ones(4, 3), torch.eye(3), torch.ones(4, 3))
    >>> {name: round(value.item(), 6) for name, value in values.items()}
    {'orthogonality': 0.0, 'reconstruction': 0.0, 'weight_reconstruction': 0.0, 'sparsity': 3.0}
    """
    _checks.number("lambda_s", lambda_s, "it weighs the terms per sample")
    return CalibrationLoss(
        {
            "orthogonality": lambda Z, V, w: safe_norm(gram_error(V), dim=(-2, -1)),
            "reconstruction": lambda Z, V, w: safe_norm(Z - Z @ V @ V.mT, dim=None),
            "weight_reconstruction": lambda Z, V, w: safe_norm(Z - w @ V.mT, dim=-1).mean(),
            "sparsity": lambda Z, V, w: w.abs().sum(-1).mean(),
        },
        {"weight_reconstruction": lambda_s, "sparsity": lambda_s},
    )


def stable(lambda_s: float = 0.1, lambda_1: float = 0.1) -> CalibrationLoss:
    """L_tc2 with squared, normalised terms [O].

    ``reconstruction`` is the share of Z's energy outside V's span, a constant to the encoder (Z is detached); a batch of
    zeros counts as reconstructed. For orthonormal V the minimiser over w is softthreshold(z V, lambda_1 d / (2 n_f)).

    Args:
        lambda_s: weight of both per-sample terms.
        lambda_1: sparsity's weight against per-sample reconstruction.

    Errors:
        TypeError, ValueError: a weight is no number, or negative.

    >>> Z, V = torch.ones(4, 4), torch.eye(4, 2)
    >>> total, values = stable()(Z, V, Z @ V)
    >>> {name: round(value.item(), 6) for name, value in values.items()}
    {'orthogonality': 0.0, 'reconstruction': 0.5, 'weight_reconstruction': 0.5, 'sparsity': 1.0}
    """
    _checks.number("lambda_s", lambda_s, "it weighs the terms per sample")
    _checks.number("lambda_1", lambda_1, "it weighs sparsity")
    return CalibrationLoss(
        {
            "orthogonality": lambda Z, V, w: gram_error(V).square().sum() / V.shape[-1],
            "reconstruction": _energy_outside,
            "weight_reconstruction": lambda Z, V, w: (Z - w @ V.mT).square().mean(),
            "sparsity": lambda Z, V, w: w.abs().mean(),
        },
        {"weight_reconstruction": lambda_s, "sparsity": lambda_s * lambda_1},
    )


def gram_error(V: Tensor) -> Tensor:
    """V^T V - I [n_f, n_f]."""
    return V.mT @ V - torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)


def safe_norm(x: Tensor, dim: int | tuple[int, ...] | None) -> Tensor:
    """The Euclidean norm over ``dim`` (None: over everything), with first and second derivatives zero at zero, not NaN."""
    return root(x.square().sum(dim))


def _energy_outside(Z: Tensor, V: Tensor, w: Tensor) -> Tensor:
    Z = Z.detach()
    energy = Z.square().sum()
    return (Z - Z @ V @ V.mT).square().sum() / energy.clamp_min(torch.finfo(energy.dtype).tiny)
