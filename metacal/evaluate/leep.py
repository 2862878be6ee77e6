"""LEEP and NCE: how well a classifier of other classes predicts these."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metacal.evaluate._inputs import classes, matrix, several_classes


def leep(probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """Mean log likelihood of the labels when a source classifier's classes z are translated: ``p(y | x) = sum_z p^(y | z) p(z | x)``.

    ``p^(y, z)`` is the empirical joint, the mean over rows of ``p(z | x_i) [y_i = y]``. At most 0, and at least the negative entropy
    of the labels, which a classifier that says nothing reaches. Needs no features and no training; cost N C_source C.

    Args:
        probabilities: p(z | x), ``[N, C_source]``, rows that sum to 1. For an encoder without labels take a probe on the source set
            (:func:`metacal.evaluate.class_probabilities`) or a mixture fitted to the features.
        labels: ``[N]``, the target's classes.

    Errors:
        ValueError: rows that are no probabilities, unlabelled rows, a single class.

    Source: Nguyen et al. 2020 (arXiv 2002.12462), section 2.

    >>> leep(torch.eye(2)[torch.tensor([0, 1, 0, 1])], torch.tensor([1, 0, 1, 0]))
    0.0
    """
    p = matrix("probabilities", probabilities).double()
    if p.min() < 0 or not torch.allclose(p.sum(1), p.new_ones(()), atol=1e-3):
        raise ValueError(
            f"`probabilities` should be at least 0 and sum to 1 in every row; the least is {p.min():g}, the sums lie between "
            f"{p.sum(1).min():g} and {p.sum(1).max():g}. Apply a softmax to logits."
        )
    y = _target(labels, p, "probabilities")
    joint = p.new_zeros(int(y.max()) + 1, p.shape[1]).index_add_(0, y, p) / len(p)  # p^(y, z), [C, C_source]
    given = joint / joint.sum(0).clamp_min(torch.finfo(p.dtype).tiny)  # p^(y | z)
    return (given[y] * p).sum(1).log().mean().item()


def nce(source_labels: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """Negative conditional entropy ``-H(Y | Z)`` of the labels given the source classes of the same rows.

    At most 0, where the source class fixes the label. It is what :func:`leep` gives for predictions without doubt.

    Args:
        source_labels: ``[N]``, labels or predictions of a source task.
        labels: ``[N]``, the target's classes.

    Errors:
        ValueError: unlabelled rows, a single target class, lengths that differ.

    Source: Tran et al. 2019 (arXiv 1908.08142), equation 7.

    >>> round(nce(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 2])), 4)  # half of log 2
    -0.3466
    """
    rows = torch.as_tensor(labels)
    z = classes("source_labels", source_labels, rows, "labels").unique(return_inverse=True)[1]
    y = _target(labels, z, "source_labels")
    joint = torch.zeros(int(y.max()) + 1, int(z.max()) + 1, dtype=torch.float64, device=z.device)
    joint.index_put_((y, z), joint.new_full((), 1 / len(y)), accumulate=True)
    return (torch.special.entr(joint.sum(0)).sum() - torch.special.entr(joint).sum()).item()  # H(Z) - H(Y, Z)


def _target(labels: Tensor | np.ndarray, rows: Tensor, name: str) -> Tensor:
    y = classes("labels", labels, rows, name)
    several_classes(y, "labels")
    return y.unique(return_inverse=True)[1]
