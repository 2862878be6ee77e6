"""Means over seeds, and paired differences, with 95% Student t intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_ROUNDING = 1e-9  # of the values: differences that vary less are one number


class Interval(NamedTuple):
    """``mean`` +- ``half_width``, which :func:`paired_interval` may leave open: NaN."""

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
    The half width is NaN where all differences are one number up to rounding, as those of few seeds can be whose accuracies are counts
    of the same images: that says nothing of how seeds vary.

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
    mean, half_width = mean_interval((x - y).tolist())
    return Interval(mean, half_width if np.ptp(x - y) > _ROUNDING * np.abs([x, y]).max() else math.nan)


def paired_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the paired t-test of equal means; NaN where :func:`paired_interval` has no half width: not testable.

    Errors: as :func:`paired_interval`.

    >>> round(paired_p_value([1.0, 2.0, 3.5], [0.5, 1.0, 2.0]), 4)
    0.0742
    """
    if math.isnan(paired_interval(a, b).half_width):
        return math.nan
    from scipy.stats import ttest_rel

    return float(ttest_rel(a, b).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method, in the given order.

    The i-th smallest of n is multiplied by n - i + 1 and is at least as large as the one before; rejecting those below 0.05 makes
    a false rejection among all of them less probable than 5%, however they depend on each other. Holm 1979. NaN, of what could not be
    tested, stays NaN and does not count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _values(name: str, values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"`{name}` should hold at least 2 numbers, one per seed; got shape {x.shape}. An interval needs more seeds.")
    if not np.isfinite(x).all():
        raise ValueError(f"`{name}` should be finite, got {x.tolist()}. Leave out the runs that failed, and say so.")
    return x
