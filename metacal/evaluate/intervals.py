"""Means over seeds, and paired differences, with 95% Student t intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """``mean`` +- ``half_width``."""

    mean: float
    half_width: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and half width of its 95% t-interval, (n - 1) degrees of freedom: t_{0.975} s / sqrt(n).

    Raises:
        ValueError: fewer than 2 values, or NaN or inf among them.

    >>> mean, half_width = mean_interval([0.80, 0.82, 0.84])
    >>> print(f"{mean:.2f} +- {half_width:.3f}")
    0.82 +- 0.050
    """
    x = _values("values", values)
    from scipy.stats import t

    return Interval(float(x.mean()), float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5))


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Interval of the mean of ``a - b``, pair by pair: what the seeds have in common cancels.

    ``a[i]`` and ``b[i]`` should share their seed. A difference whose interval excludes 0 is significant at 5%, one comparison alone.

    Raises:
        ValueError: lengths that differ, fewer than 2 pairs, or NaN or inf among them.

    >>> paired_interval([0.875, 0.75], [0.75, 0.625]).mean
    0.125
    """
    x, y = _values("a", a), _values("b", b)
    if len(x) != len(y):
        raise ValueError(
            f"`a` and `b` should be of one length, one pair per seed; got {len(x)} and {len(y)}. Keep the seeds that both have."
        )
    return mean_interval((x - y).tolist())


def _values(name: str, values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"`{name}` should hold at least 2 numbers, one per seed; got shape {x.shape}. An interval needs more seeds.")
    if not np.isfinite(x).all():
        raise ValueError(f"`{name}` should be finite, got {x.tolist()}. Leave out the runs that failed, and say so.")
    return x
