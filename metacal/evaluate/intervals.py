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

    Errors:
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

    Errors:
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


def paired_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the paired t-test of equal means; 1 where all differences are 0, 0 where they are one other number.

    Errors: as :func:`paired_interval`.

    >>> round(paired_p_value([1.0, 2.0, 3.5], [0.5, 1.0, 2.0]), 4)
    0.0742
    """
    mean, half_width = paired_interval(a, b)
    if half_width == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.stats import ttest_rel

    return float(ttest_rel(a, b).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method, in the given order.

    The i-th smallest of n is multiplied by n - i + 1 and is at least as large as the one before; rejecting those below 0.05 makes
    a false rejection among all of them less probable than 5%, however they depend on each other. Holm 1979.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _values(name: str, values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"`{name}` should hold at least 2 numbers, one per seed; got shape {x.shape}. An interval needs more seeds.")
    if not np.isfinite(x).all():
        raise ValueError(f"`{name}` should be finite, got {x.tolist()}. Leave out the runs that failed, and say so.")
    return x
