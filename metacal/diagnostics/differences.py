"""Derivatives by differences, with an estimate of their own error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

_LADDER = {torch.float64: (0.02, 5)}  # dtype: (largest step, how often it is halved)
_COARSE = (0.1, 4)
_FINE = {torch.float64: (1e-3, 7)}  # dtype: (largest step, number of steps, each a tenth of the last)
_FINE_ELSE = (0.1, 3)


class Difference(NamedTuple):
    """A derivative and the error that the differences themselves show; NaN where the function is."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.error:.1g}"


def central_difference(fn: Callable[[float], float], dtype: torch.dtype, scale: float = 0.0) -> Difference:
    """``d fn(s) / ds`` at 0, for a function that varies over a length of about 1 and is computed in ``dtype``.

    Central differences at a ladder of halved steps s, extrapolated to s = 0: the k-th column of the table cancels the error's
    terms up to s^{2k}, and the entry that differs least from its neighbours is taken. The error is that difference, and what
    rounding may do, relative to ``fn`` or to ``scale``, the larger of the two. Work: two values per step of the ladder, ten in
    float64, eight in float32.

    Source: Ridders 1982, Advances in Engineering Software 4(2), 75-76.

    >>> value, error = central_difference(lambda s: math.exp(2 * s), torch.float64)
    >>> abs(value - 2) <= error <= 1e-10
    True
    """
    step, num_steps = _LADDER.get(dtype, _COARSE)
    best, above = Difference(math.nan, math.inf), list[float]()
    for i in range(num_steps):
        s = step / 2**i
        ahead, behind = fn(s), fn(-s)
        row = [(ahead - behind) / (2 * s)]
        for k, coarser in enumerate(above, 1):
            row.append(row[-1] + (row[-1] - coarser) / (4**k - 1))
        rounding = torch.finfo(dtype).eps * max(4 * abs(ahead), 4 * abs(behind), scale) / s
        for k, (value, coarser) in enumerate(zip(row, above, strict=False)):
            neighbour = row[k - 1] if k else coarser
            error = max(abs(value - coarser), abs(value - neighbour)) + rounding
            if error < best.error:
                best = Difference(value, error)
        above = row
    return best if math.isfinite(best.value) else Difference(math.nan, math.nan)


def close_difference(fn: Callable[[float], float], dtype: torch.dtype, scale: float = 0.0) -> Difference:
    """As :func:`central_difference`, for a function that may have kinks and jumps close to 0, but none at 0.

    Nothing is extrapolated, and steps are far apart: a step that crosses a jump, or a kink, then differs from the next one, and
    from its own other side. The error is the sum of both and of rounding; the step where it is least is taken. Work: 15 values in
    float64, seven in float32.

    >>> steep = lambda s: 3 * s + abs(s - 2e-6) + (s > 1e-5)
    >>> value, error = close_difference(steep, torch.float64)
    >>> abs(value - 2) <= error <= 1e-6
    True
    """
    step, num_steps = _FINE.get(dtype, _FINE_ELSE)
    here, best, coarser = fn(0.0), Difference(math.nan, math.inf), math.nan
    for i in range(num_steps):
        s = step / 10**i
        ahead, behind = fn(s), fn(-s)
        value = (ahead - behind) / (2 * s)
        rounding = torch.finfo(dtype).eps * max(4 * abs(ahead), 4 * abs(behind), scale) / s
        error = abs(value - coarser) + abs(ahead - 2 * here + behind) / (2 * s) + rounding
        if error < best.error:
            best = Difference(value, error)
        coarser = value
    return best if math.isfinite(best.value) else Difference(math.nan, math.nan)
