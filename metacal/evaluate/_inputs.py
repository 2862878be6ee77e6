"""Checks of labelled features, shared by the probe and the neighbours."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def labelled(name: str, features: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """``features`` as detached floating point ``[N, d]`` and ``labels`` as int64 ``[N]`` on one device, or an error."""
    x = torch.as_tensor(features).detach()
    y = torch.as_tensor(labels).detach()
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"`{name}` should be features [N, d] with N, d >= 1, got {tuple(x.shape)}. Flatten images with .flatten(1).")
    if not x.is_floating_point():
        raise ValueError(f"`{name}` should be floating point, got {x.dtype}. Convert with .float(); pixels with metacal.data.to_float.")
    if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"`{name}_labels` should be {len(x)} integers, one per row of `{name}`; got {tuple(y.shape)} of {y.dtype}.")
    if (y < 0).any():
        raise ValueError(f"`{name}_labels` should not be negative, got {y.min().item()}. Drop the unlabelled rows: keep = labels >= 0.")
    finite = torch.isfinite(x).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"`{name}` should be finite; {(~finite).sum().item()} of {len(x)} rows hold NaN or inf, the first is row "
            f"{finite.logical_not().nonzero()[0].item()}. Did the encoder diverge? Evaluate its last good checkpoint."
        )
    return x, y.long().to(x.device)


def comparable(train: Tensor, train_labels: Tensor, name: str, other: Tensor, other_labels: Tensor) -> None:
    """Raises ValueError unless ``other`` has the width of ``train`` and classes that ``train`` has."""
    if train.shape[1] != other.shape[1]:
        raise ValueError(f"`{name}` should have features of width {train.shape[1]} as `train` has, got {other.shape[1]}. Use one encoder.")
    unknown = sorted(set(other_labels.tolist()) - set(train_labels.tolist()))
    if unknown:
        raise ValueError(
            f"`train_labels` should hold every class of `{name}_labels`; missing: {', '.join(map(str, unknown[:10]))}"
            f"{' ...' if len(unknown) > 10 else ''}. Split by class: metacal.data.split_validation or split_per_class."
        )


def several_classes(train_labels: Tensor) -> None:
    """Raises ValueError if there is nothing to tell apart."""
    if (train_labels == train_labels[0]).all():
        raise ValueError(f"`train_labels` should hold at least 2 classes, got only class {train_labels[0].item()}. Shuffle before cutting.")


def warn_if_collapsed(train: Tensor) -> None:
    """Warns where all rows are the same up to rounding: the accuracy then is that of guessing one class."""
    spread = (train - train.mean(0)).abs().max()
    if spread <= 1e-5 * train.abs().max():
        warnings.warn(
            "`train` has collapsed: all features are equal up to rounding, so the accuracy is that of guessing one class. "
            "Follow metacal.evaluate.dimension_std and rank_me during training to see when it happened.",
            RuntimeWarning,
            stacklevel=3,
        )
