"""Rows: truncated, sketched and difference estimates of the derivative of the steps that were taken."""

from __future__ import annotations

from metacal import adjoints
from metacal.registry.costs import one_step, replayed
from metacal.registry.row import HPARAMS, Method, cite

APPROXIMATE = (
    Method(
        "Unrolled(window=k)", "approximate", lambda s: adjoints.Unrolled(window=s.number), HPARAMS,
        "steps before the last k are left out", "T + 4.25 k at most; T + 3.25 k with `segment=1`",
        "√(2 k) states, one step's double-backward graph", "as its mode", cite("Shaban et al. 2019", "1810.10667"),
        lambda s: s.num_steps + 4.25 * min(s.number, s.num_steps), lambda s: replayed(s, min(s.number, s.num_steps)),
        kind="biased", path=True,
    ),
    Method(
        "ForwardSketch(k)", "approximate", lambda s: adjoints.ForwardSketch(s.number), HPARAMS,
        "none in the mean; variance (m - 1) / k of its square", "T (1 + 2 k) at most", "2 k states, one step's activations for k tangents",
        "forward-mode AD of the step; any solver", cite("Shen et al. 2024", "2406.14095"),
        lambda s: s.num_steps * (1 + 2 * s.number),
        lambda s: 2 * s.number * s.state_bytes + (1 + s.number) * s.activation_bytes, kind="unbiased", path=True,
    ),
    Method(
        "ZerothOrder(k, radius)", "approximate", lambda s: adjoints.ZerothOrder(s.number, s.step_size), HPARAMS,
        "O(radius²) in the mean; variance as above", "T (1 + 2 k)", "two states, one step's activations",
        "a run that can be repeated: its steps are not differentiated", cite("Salimans et al. 2017", "1703.03864"),
        lambda s: s.num_steps * (1 + 2 * s.number), lambda s: 2 * s.state_bytes + s.activation_bytes,
        kind="unbiased", path=True, differentiates=False,
    ),
    Method(
        "FiniteDifference(radius, a)", "approximate", lambda s: adjoints.FiniteDifference(step_size=s.step_size), HPARAMS,
        "the last step stands for all, H for the identity; O(radius²)", "T + 2", "one step's activations",
        "an inner objective; first derivatives only", cite("DARTS: Liu et al. 2019", "1806.09055"),
        lambda s: s.num_steps + 2, one_step, kind="biased",
    ),
    Method(
        "SAMA(radius)", "approximate", lambda s: adjoints.SAMA(), HPARAMS,
        "the last step stands for all, seen through its optimizer; O(radius²)", "T + 2", "one step's activations",
        "an update differentiable by its gradient", cite("Choe et al. 2023", "2310.05674"),
        lambda s: s.num_steps + 2, one_step, kind="biased",
    ),
    Method(
        "FirstOrder()", "approximate", lambda s: adjoints.FirstOrder(), "initial params; hparams directly only",
        "all that is of second order", "T", "one state", "nothing", cite("Finn et al. 2017", "1703.03400"),
        lambda s: s.num_steps, lambda s: s.state_bytes + s.activation_bytes, kind="biased", initial_params=True, differentiates=False,
    ),
)  # fmt: skip
