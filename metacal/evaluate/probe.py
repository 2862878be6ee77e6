"""The linear probe: how much of the labels a linear classifier reads off frozen features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metacal.evaluate._inputs import comparable, labelled, matrix, several_classes, warn_if_collapsed

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""The default grid of L2 strengths, relative to the mean loss."""

_THREADS = 4  # at most, and never more than torch uses: on small matrices threads wait for each other


class ProbeResult(NamedTuple):
    """What a probe found; accuracies are shares in [0, 1].

    ``strength`` was chosen by ``validation_accuracy``; ``accuracy`` is on the test rows after the refit. ``converged`` is False where
    a fit, of the grid or the last, stopped at ``max_iterations``: accuracies are then those of an unfinished fit; raise it.
    """

    accuracy: float
    validation_accuracy: float
    strength: float
    converged: bool


def linear_probe(
    train: Tensor | np.ndarray,
    train_labels: Tensor | np.ndarray,
    test: Tensor | np.ndarray,
    test_labels: Tensor | np.ndarray,
    *,
    validation: float | tuple[Tensor | np.ndarray, Tensor | np.ndarray] = 0.2,
    strengths: Sequence[float] = STRENGTHS,
    max_iterations: int = 1000,
    seed: int = 0,
) -> ProbeResult:
    """Fits an L2-regularised logistic regression on frozen features and reports its test accuracy.

    Minimises mean cross-entropy + strength / 2 ||W||^2 by LBFGS in float64 (scikit-learn), on features standardised by the mean
    and deviation of the rows fitted. The strength is the one with the best validation accuracy (the strongest of equals); the
    probe is then refitted on all training and validation rows. The grid is walked from strong to weak, each fit starting at the
    last.

    Args:
        train: ``[N_train, d]``, floating point.
        train_labels: ``[N_train]``, integers from 0.
        test: ``[N_test, d]``.
        test_labels: ``[N_test]``.
        validation: the share of every training class to hold out, or (features, labels) held out already.
        strengths: the grid; 1 / (strength N) is scikit-learn's C.
        max_iterations: of LBFGS, per fit.
        seed: of the validation split; nothing else is random.

    Cost on one CPU core: 4,000 x 64 features of 10 classes take about 1 s, 4,000 x 784 pixels 9 s. Work grows with the number of
    classes: the 659 of Omniglot (9,226 x 64) take 20 s to a minute *per strength*. Prefer :func:`knn` there (1 s), or pass a short
    grid and ``validation`` drawn per class: ``strengths=(1e-2, 1e-3)``.

    Errors:
        ValueError: NaN features, negative labels, a single class, a class that is missing from the training rows or too small to split.

    >>> x = torch.cat([torch.randn(50, 2) - 3, torch.randn(50, 2) + 3])
    >>> y = torch.arange(100) // 50
    >>> linear_probe(x, y, x, y).accuracy
    1.0
    """
    x, y = labelled("train", train, train_labels)
    x_test, y_test = labelled("test", test, test_labels)
    several_classes(y)
    comparable(x, y, "test", x_test, y_test)
    if not strengths or min(strengths) <= 0:
        raise ValueError(f"`strengths` should hold positive numbers, got {tuple(strengths)}. The default is {STRENGTHS}.")
    warn_if_collapsed(x)
    if isinstance(validation, tuple):
        x_held, y_held = labelled("validation", *validation)
        comparable(x, y, "validation", x_held, y_held)
        fit, held = (_array(x), y.numpy(force=True)), (_array(x_held), y_held.numpy(force=True))
    else:
        fit, held = _hold_out(_array(x), y.numpy(force=True), validation, seed)

    accuracies, converged = _fit_path(*fit, *held, sorted(strengths, reverse=True), max_iterations)
    validation_accuracy, strength = max((a, s) for s, a in accuracies.items())
    everything = np.concatenate([fit[0], held[0]]), np.concatenate([fit[1], held[1]])
    final, final_converged = _fit_path(*everything, _array(x_test), y_test.numpy(force=True), [strength], max_iterations)
    return ProbeResult(final[strength], validation_accuracy, strength, converged and final_converged)


def class_probabilities(
    train: Tensor | np.ndarray, train_labels: Tensor | np.ndarray, other: Tensor | np.ndarray, *, strength: float = 1e-2
) -> Tensor:
    """What a probe fitted on ``train`` says of ``other`` rows, ``[N_other, C]`` in float64: the source classifier of :func:`leep`.

    One fit of the given strength, as in :func:`linear_probe`; columns are the classes present, in the order of their labels.

    Errors:
        ValueError: as :func:`linear_probe`, and ``other`` of another width.

    >>> x = torch.cat([torch.randn(50, 2) - 3, torch.randn(50, 2) + 3])
    >>> class_probabilities(x, torch.arange(100) // 50, torch.tensor([[-3.0, -3.0]])).argmax(1)
    tensor([0])
    """
    x, y = labelled("train", train, train_labels)
    several_classes(y)
    judged = matrix("other", other)
    if judged.shape[1] != x.shape[1]:
        raise ValueError(f"`other` should have features of width {x.shape[1]} as `train` has, got {judged.shape[1]}. Use one encoder.")
    warn_if_collapsed(x)
    return torch.from_numpy(_classifier(strength, len(x)).fit(_array(x), y.numpy(force=True)).predict_proba(_array(judged)))


def held_out_probabilities(rows: Tensor | np.ndarray, labels: Tensor | np.ndarray, *, strength: float = 1e-2, seed: int = 0) -> Tensor:
    """What probes say of rows that they were not fitted on, ``[N, C]`` in float64: :func:`class_probabilities` of a set by itself.

    Five folds, or as many as the smallest class has rows; a probe fitted on the others names each.

    Errors:
        ValueError: as :func:`linear_probe`; a class of a single row.

    >>> x = torch.cat([torch.randn(50, 2) - 3, torch.randn(50, 2) + 3])
    >>> held_out_probabilities(x, torch.arange(100) // 50).argmax(1).float().mean()
    tensor(0.5000)
    """
    x, y = labelled("rows", rows, labels)
    several_classes(y)
    smallest = int(y.unique(return_counts=True)[1].min())
    if smallest < 2:
        raise ValueError("`labels` should have at least two rows of every class: a probe is judged on rows that it was not fitted on.")
    warn_if_collapsed(x)
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(min(5, smallest), shuffle=True, random_state=seed)
    model = _classifier(strength, len(x) - len(x) // folds.n_splits)
    return torch.from_numpy(cross_val_predict(model, _array(x), y.numpy(force=True), cv=folds, method="predict_proba"))


def _classifier(strength: float, num_rows: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / (strength * num_rows), max_iter=1000))


def _array(x: Tensor) -> np.ndarray:
    return x.double().numpy(force=True)


_Labelled = tuple[np.ndarray, np.ndarray]


def _hold_out(x: np.ndarray, y: np.ndarray, fraction: float, seed: int) -> tuple[_Labelled, _Labelled]:
    """A stratified (fitted, held out), each class rounding for itself, with at least one row on either side."""
    if not 0 < fraction < 1:
        raise ValueError(f"`validation` should be a share between 0 and 1, both excluded, or (features, labels); got {fraction}.")
    classes, counts = np.unique(y, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"`train_labels` should hold each class at least twice to hold a share out for validation; class {classes[counts.argmin()]} "
            "is there once. Pass validation=(features, labels), or drop that class."
        )
    rng = np.random.default_rng(seed)
    held = np.zeros(len(y), dtype=bool)
    for label, count in zip(classes, counts, strict=True):
        size = min(max(round(fraction * count), 1), count - 1)
        held[rng.permutation(np.flatnonzero(y == label))[:size]] = True
    return (x[~held], y[~held]), (x[held], y[held])


def _fit_path(
    x: np.ndarray, y: np.ndarray, x_judged: np.ndarray, y_judged: np.ndarray, strengths: Sequence[float], max_iterations: int
) -> tuple[dict[float, float], bool]:
    """Accuracy on the judged rows by strength, and whether every fit converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    scaler = StandardScaler().fit(x)
    x, x_judged = scaler.transform(x), scaler.transform(x_judged)
    model = LogisticRegression(max_iter=max_iterations, warm_start=True)
    accuracies = {}
    with threadpool_limits(min(_THREADS, torch.get_num_threads()), user_api="blas"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for strength in strengths:
            model.set_params(C=1 / (strength * len(x))).fit(x, y)
            accuracies[strength] = float(model.score(x_judged, y_judged))
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return accuracies, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
