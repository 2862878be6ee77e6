"""Steps with all singular values alike: Muon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from metacal import tree
from metacal._typing import Tree
from metacal.optim.algebra import at_least, mix, plus_decay
from metacal.optim.transformation import DifferentiableTransformation, Hyperparameter, Multiple, at, checked, transformation


class MuonState(NamedTuple):
    step: Tensor
    mean: Tree


def muon(
    lr: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.1,
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (3.4445, -4.775, 2.0315),
    eps: Hyperparameter = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral_unclamped"] | None = None,
) -> DifferentiableTransformation:
    """Muon, for matrices: ``u = -lr c NS(d) - lr weight_decay w``, where NS brings the singular values of d near 1.

    ``m' = momentum m + (1 - momentum) g``; d is m', or with ``nesterov`` ``momentum m' + (1 - momentum) g``. NS starts from
    ``x = d / max(|d|, eps)`` and repeats ``x <- a x + (b A + c A^2) x`` with ``A = x x^T``, ``ns_steps`` times: each singular value s
    goes to ``a s + b s^3 + c s^5``, so with the default coefficients they end between about 0.7 and 1.2, except the smallest. For a
    matrix of R rows and C columns the c of the update is ``sqrt(max(1, R / C))`` ("original", also None), ``0.2 sqrt(max(R, C))``
    ("match_rms_adamw") or ``sqrt(R / C)``.

    Cost: ``3 ns_steps`` matrix products. Keeps one copy of the params. The iteration runs in the params' precision
    (``torch.optim.Muon`` rounds it to bfloat16, which its derivative would not survive). A polynomial of x is smooth; the derivative
    of the normalisation is that of the case taken, and at ``d = 0`` finite: ``NS = a^ns_steps d / eps``. Small singular values are
    amplified by up to ``a^ns_steps`` (485), and so are their derivatives. Its fixed points are not the zeros of the gradient unless
    ``weight_decay=0``. Jordan et al., 2024 (kellerjordan.github.io/posts/muon); rates: Liu et al., 2025 (arXiv 2502.16982).

    >>> import torch
    >>> params = {"w": torch.eye(2)}
    >>> optimizer = muon(lr=0.1, weight_decay=0.0)
    >>> updates, state = optimizer.update({"w": torch.tensor([[5.0, 0.0], [0.0, -2.0]])}, optimizer.init(params), params=params)
    >>> updates["w"]
    tensor([[-0.0731, -0.0000],
            [-0.0000,  0.1047]])

    Errors:
        ValueError: a leaf is not a matrix (give the others another rule with :func:`by_label`), a setting is out of range.
    """
    checked("lr", lr), checked("weight_decay", weight_decay), checked("momentum", momentum), checked("eps", eps)
    if not isinstance(ns_coefficients, (tuple, list)) or len(ns_coefficients) != 3:
        raise TypeError(
            f"`ns_coefficients` should be three numbers (a, b, c), got {ns_coefficients!r}. The default is (3.4445, -4.775, 2.0315)."
        )
    for i, coefficient in enumerate(ns_coefficients):
        checked(f"ns_coefficients[{i}]", coefficient, low=-math.inf)
    if not 0 <= ns_steps < 100:
        raise ValueError(f"`ns_steps` should be in [0, 100), got {ns_steps}. 5 is usual.")
    if adjust_lr_fn not in (None, *_RATES):
        raise ValueError(f"`adjust_lr_fn` should be None or one of {tuple(_RATES)}, got {adjust_lr_fn!r}.")
    adjustment = _RATES[adjust_lr_fn or "original"]

    def init(params: Tree, step: Tensor) -> MuonState:
        for path, leaf in zip(tree.paths(params), tree.leaves(params), strict=True):
            if leaf.ndim != 2:
                raise ValueError(
                    f"`params`{f' at {path!r}' if path else ''} should be a matrix to be orthogonalised by muon, got shape "
                    f"{tuple(leaf.shape)}. Give the others another rule: by_label({{'matrix': muon(), 'rest': adamw()}}, lambda params: "
                    "tree.map(lambda p: 'matrix' if p.ndim == 2 else 'rest', params))."
                )
        return MuonState(step, tree.zeros_like(params))

    def rule(t: Tensor, g: Tree, w: Tree | None, state: MuonState) -> tuple[Tree, MuonState]:
        eta, decay, mu, epsilon, *coefficients = at(t, lr, weight_decay, momentum, eps, *ns_coefficients)
        m = mix(mu, state.mean, g)
        d = mix(mu, m, g) if nesterov else m
        direction = tree.map(lambda d: adjustment(*d.shape) * _newton_schulz(d, coefficients, ns_steps, epsilon), d)
        return Multiple(-eta, plus_decay(direction, decay, w)), MuonState(state.step + 1, m)

    return transformation(init, rule)


_RATES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}


def _newton_schulz(d: Tensor, coefficients: list[Any], num_steps: int, eps: Any) -> Tensor:
    a, b, c = coefficients
    wide = d.shape[0] <= d.shape[1]  # x x^T is the smaller of the two products
    x = d if wide else d.T
    x = x / at_least(eps, tree.norm(x))
    for _ in range(num_steps):
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return x if wide else x.T
