"""Checks of features and labels, shared by all that judges them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from metacal._safe import wide

_ROUNDING = 16  # units of the last place: a column that varies less is constant


def matrix(name: str, features: Any) -> Tensor:
    """``features`` as detached, finite, floating point ``[N, d]``, or an error."""
    x = torch.as_tensor(features).detach()
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"`{name}` should be features [N, d] with N, d >= 1, got {tuple(x.shape)}. Flatten images with .flatten(1).")
    if not x.is_floating_point():
        raise ValueError(f"`{name}` should be floating point, got {x.dtype}. Convert with .float(); pixels with metacal.data.to_float.")
    finite = torch.isfinite(x).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"`{name}` should be finite; {(~finite).sum().item()} of {len(x)} rows hold NaN or inf, the first is row "
            f"{finite.logical_not().nonzero()[0].item()}. Did the encoder diverge? Evaluate its last good checkpoint."
        )
    return x


def classes(name: str, labels: Any, rows: Tensor, rows_name: str) -> Tensor:
    """``labels`` as int64 ``[N]`` on the device of ``rows`` [N, ...], or an error."""
    y = torch.as_tensor(labels).detach()
    if y.shape != rows.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"`{name}` should be {len(rows)} integers, one per row of `{rows_name}`; got {tuple(y.shape)} of {y.dtype}.")
    y = y.long()  # unsigned integers know no comparison
    if (y < 0).any():
        raise ValueError(f"`{name}` should not be negative, got {y.min().item()}. Drop the unlabelled rows: keep = labels >= 0.")
    return y.to(rows.device)


def scaled(x: Tensor) -> Tensor:
    """``x``, in float32 at least, with its largest entry between 1 and 2, for squares that neither vanish nor overflow.

    By a power of two, so that no digit changes.
    """
    x = wide(x)
    return x / 2.0 ** (math.frexp(x.abs().max().item())[1] - 1)


def labelled(name: str, features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """``features`` and ``{name}_labels``, checked."""
    x = matrix(name, features)
    return x, classes(f"{name}_labels", labels, x, name)


def scored(features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """``features`` in float64 and ``labels`` renumbered 0 ... C - 1, of at least 2 classes: what a label-based score reads."""
    x = matrix("features", features)
    y = classes("labels", labels, x, "features")
    several_classes(y, "labels")
    warn_if_collapsed(x, "features", "so the score says nothing about the classes", stacklevel=4)
    return x.double(), y.unique(return_inverse=True)[1]


def comparable(train: Tensor, train_labels: Tensor, name: str, other: Tensor, other_labels: Tensor) -> None:
    """Raises ValueError unless ``other`` has the width of ``train`` and classes that ``train`` has."""
    if train.shape[1] != other.shape[1]:
        raise ValueError(f"`{name}` should have features of width {train.shape[1]} as `train` has, got {other.shape[1]}. Use one encoder.")
    known_classes(train_labels, name, other_labels)


def known_classes(train_labels: Tensor, name: str, other_labels: Tensor) -> None:
    """Raises ValueError unless every class of ``other_labels`` is one of ``train_labels``."""
    unknown = sorted(set(other_labels.tolist()) - set(train_labels.tolist()))
    if unknown:
        raise ValueError(
            f"`train_labels` should hold every class of `{name}_labels`; missing: {', '.join(map(str, unknown[:10]))}"
            f"{' ...' if len(unknown) > 10 else ''}. Split by class: metacal.data.split_validation or split_per_class."
        )


def several_classes(labels: Tensor, name: str = "train_labels") -> None:
    """Raises ValueError if there is nothing to tell apart."""
    if (labels == labels[0]).all():
        raise ValueError(f"`{name}` should hold at least 2 classes, got only class {labels[0].item()}. Shuffle before cutting.")


def warn_if_collapsed(
    features: Tensor, name: str = "train", meaning: str = "so the accuracy is that of guessing one class", *, stacklevel: int = 3
) -> bool:
    """Whether all rows are the same up to rounding, every column by its own magnitude; warns where they are."""
    spread = features.amax(0) - features.amin(0)
    collapsed = bool((spread <= _ROUNDING * torch.finfo(features.dtype).eps * features.abs().amax(0)).all())
    if collapsed:
        warnings.warn(
            f"`{name}` has collapsed: all features are equal up to rounding, {meaning}. "
            "Follow metacal.evaluate.dimension_std and rank_me during training to see when it happened.",
            RuntimeWarning,
            stacklevel=stacklevel,
        )
    return collapsed
