"""The table of problems: a new one is a function ``size -> Problem`` and a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.methods import Method
from benchmarks.problem import Problem, Size
from benchmarks.problems import cost, distillation, few_shot, language, quadratic, regression, tc2, training_settings
from benchmarks.problems.hyper_cleaning import Weights, cleaning


class Row(NamedTuple):
    """How a problem is made, whether the small suite has it too, and which methods it is for."""

    make: Callable[[Size], Problem]
    small: bool = True
    asks: Callable[[Method], bool] = lambda method: True


def _cleaning(name: str, corruption: float, weights: Weights) -> Callable[[Size], Problem]:
    return lambda size: cleaning(name, corruption, weights, size)


PROBLEMS: dict[str, Row] = {
    "quadratic": Row(quadratic.quadratic),
    "ridge": Row(regression.ridge),
    "logistic": Row(regression.logistic, small=False),
    **{
        f"cleaning-{name}-{100 * corruption:.0f}-{weights}": Row(
            _cleaning(name, corruption, weights),
            small=(name, corruption, weights) == ("mnist", 0.5, "samples"),
        )
        for name in ("mnist", "fashion_mnist")
        for corruption in (0.5, 0.7, 0.9)
        for weights in ("samples", "network")
    },
    "maml": Row(few_shot.maml),
    "imaml": Row(few_shot.imaml, small=False),
    "distillation": Row(distillation.distillation),
    "learning-rates": Row(training_settings.learning_rates),
    "augmentation": Row(training_settings.augmentation, small=False),
    "language": Row(language.reweighting, small=False),
    "tc2-calibrator": Row(tc2.calibrator_stage, small=False),
    "tc2-encoder": Row(tc2.encoder_stage, small=False),
    "mlp": Row(cost.mlp_cost, asks=cost.asks),
    "conv": Row(cost.conv_cost, asks=cost.asks),
    "transformer": Row(cost.transformer_cost, asks=cost.asks),
}
