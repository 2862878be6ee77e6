"""Checks of the tensors and the weights that objectives are given."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor

from metacal._safe import wide
from metacal._typing import Tree


def views(name: str, value: Tensor | None, *, min_samples: int = 1) -> Tensor:
    """Returns ``value``, in float32 at least, if it is [n, m, d] with n >= min_samples and m >= 2, else raises."""
    if value is None:
        raise ValueError(
            f"`outputs.{name}` should be a tensor [n, m, d] for this objective, got None. Its `heads` and `ema_target` say which "
            "networks it reads."
        )
    if value.ndim != 3:
        raise ValueError(
            f"`outputs.{name}` should have shape [n, m, d] (samples, views, entries), got {tuple(value.shape)}. Stack the views "
            "on axis 1; map several tasks with torch.func.vmap."
        )
    n, m, _ = value.shape
    if m < 2:
        raise ValueError(
            f"`outputs.{name}` should hold m >= 2 views of every sample, got m = {m} in shape {tuple(value.shape)}. Draw more "
            "views; support and query need two each where they are split by views."
        )
    if n < min_samples:
        raise ValueError(
            f"`outputs.{name}` should hold n >= {min_samples} samples to compare, got n = {n} in shape {tuple(value.shape)}. Use a "
            "larger batch or fewer tasks."
        )
    return wide(value)


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    """Returns ``value``, in float32 at least, if it has the shape of ``other``, else raises."""
    if value.shape != other.shape:
        raise ValueError(
            f"`outputs.{name}` should have the shape of `outputs.{other_name}`, {tuple(other.shape)}, got {tuple(value.shape)}. "
            "The predictor maps d entries to d entries, and the target network ends as the trained one."
        )
    return wide(value)


def carried(name: str, carry: Tree, z: Tensor) -> Tensor:
    """Returns the tensor [..., d] of that name in ``carry``, detached and like ``z`` [..., d], else raises."""
    if not isinstance(carry, dict) or name not in carry:
        raise ValueError(
            f"`carry` should hold '{name}', the state of this objective, got {carry!r}. Start from init_carry(d) and move it by "
            "update(outputs, carry) once per outer iteration."
        )
    value = carry[name]
    if value.shape[-1] != z.shape[-1]:
        raise ValueError(
            f"`carry['{name}']` should end in the d = {z.shape[-1]} entries of the representations, got {tuple(value.shape)}. Start "
            f"from init_carry({z.shape[-1]})."
        )
    return value.detach().to(z)


def share(name: str, value: float) -> None:
    """Raises ValueError unless ``value`` is a number in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` should be in [0, 1], got {value!r}.")


def weight(name: str, value: Any, *, positive: bool = False) -> None:
    """Raises unless a number is finite and >= 0 (> 0 if ``positive``).

    A tensor is let through: it may be a hyperparameter under a transform, whose value cannot be looked at.
    """
    if isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` should be a number or a 0-dim tensor, got {value!r}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"`{name}` should be a finite number {'> 0' if positive else '>= 0'}, got {value!r}.")
