"""What several formulas share, written so that a derivative at zero is finite and a NaN stays a NaN."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metacal import tree
from metacal._typing import Tree
from metacal.optim.transformation import is_off


def plus_decay(x: Tree, decay: Any, w: Tree | None) -> Tree:
    """``x + decay w``."""
    return x if is_off(decay) else tree.axpy(decay, given(w), x)


def given(w: Tree | None) -> Tree:
    """The params, for an optimizer whose update depends on them."""
    if w is None:
        raise ValueError("`params` should be given, for this update depends on them: update(grads, state, params=params).")
    return w


def mix(beta: Any, old: Tree, new: Tree) -> Tree:
    """``beta old + (1 - beta) new``: a step of a decaying mean."""
    return tree.map(lambda old, new: _mix(beta, old, new), old, new)


def _mix(beta: Any, old: Tensor, new: Tensor) -> Tensor:
    # lerp wants one dtype, of tangents too, which differ where `new` came of a number times a 0-dim tensor.
    if isinstance(beta, Tensor) or old.dtype != new.dtype or new.ndim == 0:
        return beta * old + (1 - beta) * new
    return torch.lerp(old, new, 1 - beta)  # one kernel


def one_minus_power(beta: Any, n: Tensor) -> Tensor:
    """``1 - beta^n``; for a number without the cancellation, which costs float32 five digits in Adam's first steps."""
    if isinstance(beta, Tensor):
        return 1 - beta**n
    return -torch.expm1(n * math.log(beta)) if beta else torch.ones_like(n)


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1, with derivative 0. A NaN stays NaN (``torch.sign`` makes it 0)."""
    return torch.where(x.isnan(), x, x.sign())


def at_least(low: Any, x: Tensor) -> Tensor:
    """``max(low, x)``, with the derivative of the one taken, x at a tie. A NaN stays NaN."""
    return torch.where(x < low, low, x)


def at_most(high: Any, x: Tensor) -> Tensor:
    """``min(high, x)``, with the derivative of the one taken, x at a tie. A NaN stays NaN."""
    return torch.where(x > high, high, x)
