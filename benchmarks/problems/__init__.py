"""The table of problems: a new one is a function ``size -> Problem`` and a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.problem import Problem, Size
from benchmarks.problems import cost, distillation, few_shot, language, quadratic, regression, tc2, training_settings
from benchmarks.problems.hyper_cleaning import Weights, cleaning


class Row(NamedTuple):
    """How a problem is made, and whether the small suite has it too."""

    make: Callable[[Size], Problem]
    small: bool = True


def _cleaning(name: str, corruption: float, weights: Weights) -> Callable[[Size], Problem]:
    return lambda size: cleaning(name, corruption, weights, size).problem


PROBLEMS: dict[str, Row] = {
    "quadratic": Row(quadratic.quadratic),
    "ridge": Row(regression.ridge),
    "logistic": Row(regression.logistic),
    **{
        f"cleaning-{name}-{100 * corruption:.0f}-{weights}": Row(
            _cleaning(name, corruption, weights), small=(name, corruption) in (("mnist", 0.5), ("fashion_mnist", 0.9))
        )
        for name in ("mnist", "fashion_mnist")
        for corruption in (0.5, 0.7, 0.9)
        for weights in ("samples", "network")
    },
    "maml": Row(few_shot.maml),
    "imaml": Row(few_shot.imaml),
    "distillation": Row(distillation.distillation),
    "learning-rates": Row(training_settings.learning_rates),
    "augmentation": Row(training_settings.augmentation),
    "language": Row(language.reweighting),
    "tc2-calibrator": Row(tc2.calibrator_stage),
    "tc2-encoder": Row(tc2.encoder_stage),
    "mlp": Row(cost.mlp_cost),
    "conv": Row(cost.conv_cost),
    "transformer": Row(cost.transformer_cost),
}
