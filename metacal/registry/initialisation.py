"""Rows: learned initial params, per task."""

from __future__ import annotations

from metacal import adjoints, linear
from metacal.bilevel import meta_initialisation
from metacal.registry.costs import one_step, replayed
from metacal.registry.row import DISTANCE, Method, cite

INITIALISATION = (
    Method(
        "meta_initialisation(outer, solver, Unrolled(), optimizer)", "initialisation",
        lambda f, solver, opt, s: meta_initialisation(f, solver, adjoints.Unrolled(), opt),
        "initial params; hparams too with `hparams_optimizer`", "none",
        "5.25 T at most", "√(2 T) states and gradients, one step's activations", "as `Unrolled()`",
        cite("MAML: Finn et al. 2017", "1703.03400"),
        lambda s: 5.25 * s.num_steps, lambda s: replayed(s, s.num_steps), initial_params=True, path=True,
    ),
    Method(
        "meta_initialisation(outer, solver, FirstOrder(), optimizer)", "initialisation",
        lambda f, solver, opt, s: meta_initialisation(f, solver, adjoints.FirstOrder(), opt), "initial params",
        "all that is of second order", "T", "one state", "nothing", "FOMAML: the same",
        lambda s: s.num_steps, lambda s: s.state_bytes + s.activation_bytes, kind="biased", initial_params=True,
    ),
    Method(
        "meta_initialisation(outer, proximal(...), Implicit(linear.CG(n)), optimizer)", "initialisation",
        lambda f, solver, opt, s: meta_initialisation(f, solver, adjoints.Implicit(linear.CG(s.number)), opt),
        "initial params, as the anchor", DISTANCE, "T + 3 n + 4 at most", "one step's activations",
        "`proximal`; positive definite Hessian", cite("iMAML: Rajeswaran et al. 2019", "1909.04630"),
        lambda s: s.num_steps + 3 * s.number + 4, lambda s: one_step(s) + 4 * s.params_bytes, kind="solution", initial_params=True,
        symmetric=True,
    ),
)  # fmt: skip
