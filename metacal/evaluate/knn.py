"""Weighted nearest neighbours on frozen features: no training, no hyperparameter to choose."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from metacal.evaluate._inputs import comparable, labelled, scaled, several_classes, warn_if_collapsed

_CHUNK = 1024  # test rows compared at once with all training rows


def knn(
    train: Tensor | np.ndarray,
    train_labels: Tensor | np.ndarray,
    test: Tensor | np.ndarray,
    test_labels: Tensor | np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of weighted cosine k-nearest-neighbour classification.

    Each of the ``k`` training features most similar to a test feature votes for its class with weight exp(similarity /
    temperature) (Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", section 3.4).
    Runs on the features' device; cost N_test N_train d, memory 1,024 N_train.

    Args:
        train: ``[N_train, d]``, floating point.
        train_labels: ``[N_train]``, integers from 0.
        test: ``[N_test, d]``.
        test_labels: ``[N_test]``.
        k: number of neighbours; published tables use 20 and 200.
        temperature: of the weights.

    Errors:
        ValueError: NaN features, negative labels, test classes that the training set lacks, a single class, ``k`` out of range.

    >>> import torch
    >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> knn(train, torch.tensor([0, 1]), torch.tensor([[0.9, 0.1]]), torch.tensor([0]), k=1)
    1.0
    """
    train, train_labels = labelled("train", train, train_labels)
    test, test_labels = labelled("test", test, test_labels)
    comparable(train, train_labels, "test", test, test_labels)
    several_classes(train_labels)
    if not 1 <= k <= len(train):
        raise ValueError(f"`k` should be between 1 and the {len(train)} training rows, got {k}. Take fewer neighbours.")
    if not temperature > 0:
        raise ValueError(f"`temperature` should be positive, got {temperature}. The usual value is 0.07.")
    warn_if_collapsed(train)

    keys = normalize(scaled(train), dim=1)
    queries = normalize(scaled(test).to(keys), dim=1)
    correct = 0
    for query, label in zip(queries.split(_CHUNK), test_labels.to(keys.device).split(_CHUNK), strict=True):
        similarity, nearest = (query @ keys.T).topk(k, dim=1)  # [chunk, k]
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the nearest: cannot overflow
        votes = weight.new_zeros(len(query), int(train_labels.max()) + 1).scatter_add_(1, train_labels[nearest], weight)
        correct += int((votes.argmax(1) == label).sum())
    return correct / len(test)
