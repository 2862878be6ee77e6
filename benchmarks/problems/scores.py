"""How good what was learned is, as numbers of which larger is better."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks.problems.nets import Apply
from metacal._typing import Tree


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """The share of outputs [..., classes] that are largest at their label."""
    return float((outputs.argmax(-1) == labels).double().mean())


def classified(apply: Apply) -> Callable[[Tree, Tree, tuple[Tensor, Tensor]], dict[str, float]]:
    """A goal's scores where it is to classify: the accuracy on inputs and labels."""
    return lambda w, h, test: {"accuracy": accuracy(apply(w, test[0]), test[1])}


def f1(logits: Tensor, wrong: Tensor) -> float:
    """Of finding what is wrong as that whose weight fell below a half."""
    found = logits < 0
    right = float((found & wrong).sum())
    return 2 * right / max(1.0, float(found.sum() + wrong.sum()))
